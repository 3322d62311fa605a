"""The event path in C: ``native.c`` beside this file, compiled at first use and loaded by ctypes.

The interpreter's lock is given back while a ring is waited for, and while its reader reads it.
What touches a replica keeps it, so that another thread which reads there finds each row whole.
Where the file cannot be compiled, or ``LABKIT_NATIVE=0``, NumPy does the same, slower: `compiled`
is the one place where this is decided, and `state` says how it came out.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from ctypes import POINTER, Structure, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from labkit.kernel import tools

SOURCE: Final = Path(__file__).with_suffix(".c")
"""The one file of C that is no BPF program."""

KEPT: Final = tools.cache_folder() / "native"
"""Where what was compiled is kept, by the digest of source, compiler and flags."""

FLAGS: Final = ("-std=c11", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")

SWITCH: Final = "LABKIT_NATIVE"
"""Environment variable; ``0`` has NumPy do everything."""

PLACE: Final = np.dtype([("start", "u4"), ("size", "u4")])
"""``struct place``: where a record of any size stands in the array that holds it."""

_COMPILERS: Final = ("clang-14", "clang")
_COMPILE_LIMIT_S: Final = 60.0
_MOST_KEPT: Final = 8
_DIGEST_BYTES: Final = 32


class Ring(Structure):
    """``struct ring``: a mapped ring, and where we read on."""

    mapped: object
    _fields_ = (
        ("consumer", c_void_p),
        ("producer", c_void_p),
        ("data", c_void_p),
        ("capacity", c_uint64),
        ("position", c_uint64),
        ("discarded", c_uint64),
        ("refused", c_int64),
        ("fd", c_int64),
    )


class Table(Structure):
    """``struct table``: rows and slots of a replica."""

    _fields_ = (
        ("rows", c_void_p),
        ("slots", c_void_p),
        ("mask", c_uint64),
        ("room", c_uint64),
        ("used", c_uint64),
        ("live", c_uint64),
        ("complete_ns", c_uint64),
        ("row_bytes", c_uint64),
        ("key_bytes", c_uint64),
        ("words", c_uint64),
        ("value_at", c_uint64),
        ("value_bytes", c_uint64),
    )


class Diff(Structure):
    """``struct diff``: entries of a snapshot, and what they changed so far."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("versions", c_void_p),
        ("count", c_uint64),
        ("done", c_uint64),
        ("started_ns", c_uint64),
        ("rows", c_void_p),
        ("newer", c_void_p),
        ("news", c_uint64),
        ("steps", c_uint64),
    )


class Follow(Structure):
    """``struct follow``: a ring, the replica that it feeds, and the numbers of its events."""

    _fields_ = (
        ("ring", POINTER(Ring)),
        ("table", POINTER(Table)),
        ("events", c_void_p),
        ("most", c_uint64),
        ("event_bytes", c_uint64),
        ("value_at", c_uint64),
        ("fresh", c_void_p),
        ("cpus", c_uint64),
        ("sources", c_uint64),
        ("expected", c_void_p),
        ("produced_before", c_void_p),
        ("dropped_before", c_void_p),
        ("give_back", c_void_p),
        ("take", c_void_p),
        ("gather_ns", c_uint64),
        ("timer_ns", c_uint64),
        ("unread", c_uint64),
        ("applied", c_uint64),
        ("gap", c_int64),
    )


_FUNCTIONS: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "lab_ring_wait": (c_int, (POINTER(Ring), c_int64)),
    "lab_ring_take": (c_int64, (POINTER(Ring), c_void_p, c_uint64, c_uint64)),
    "lab_ring_ready": (c_int64, (POINTER(Ring), c_uint64, c_uint64)),
    "lab_ring_hand_back": (c_int, (POINTER(Ring), c_uint64)),
    "lab_ring_each": (c_int64, (POINTER(Ring), c_uint64, c_void_p, c_void_p)),
    "lab_ring_take_any": (c_int64, (POINTER(Ring), c_void_p, c_uint64, c_void_p, c_uint64)),
    "lab_table_find": (None, (POINTER(Table), c_void_p, c_int64, c_uint64, c_void_p)),
    "lab_table_index": (None, (POINTER(Table), c_uint64)),
    "lab_table_apply": (
        c_uint64, (POINTER(Table), c_void_p, c_int64, c_uint64, c_uint64, c_void_p),
    ),
    "lab_table_diff": (None, (POINTER(Table), POINTER(Diff))),
    "lab_events_number": (
        c_int, (c_void_p, c_uint64, c_uint64, c_uint64, c_uint64, c_void_p, c_void_p, c_void_p),
    ),
    "lab_follow": (c_int64, (POINTER(Follow),)),
}  # fmt: skip


def compiled() -> Any | None:
    """The compiled file with the types of its functions; None: NumPy has to do it."""
    return None if os.environ.get(SWITCH) == "0" else _found()[0]


def state() -> str:
    """Who does the work of the event path, and why.

    Returns
    -------
    str
        Such as ``compiled by clang-14``, or ``NumPy: clang is missing``; no path of this machine.
    """
    if os.environ.get(SWITCH) == "0":
        return f"NumPy: {SWITCH}=0"
    found, said = _found()
    return f"NumPy: {said}" if found is None else said


def address(array: npt.NDArray[Any]) -> int:
    """Address of an array's first element; the array has to outlive its use."""
    return array.ctypes.data


def lock_functions() -> dict[str, int | None]:
    """What gives the interpreter's lock back and takes it again, as `Follow` has it."""
    names = {"give_back": "PyEval_SaveThread", "take": "PyEval_RestoreThread"}
    return {
        field: ctypes.cast(getattr(ctypes.pythonapi, name), c_void_p).value
        for field, name in names.items()
    }


def bound(path: Path) -> Any:
    """Load a compiled file.

    Raises
    ------
    OSError
        It cannot be loaded.
    """
    with_lock, without_lock = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
    functions = SimpleNamespace()
    for name, (answer, arguments) in _FUNCTIONS.items():
        function = getattr(without_lock if name.startswith("lab_ring") else with_lock, name)
        function.restype, function.argtypes = answer, arguments
        setattr(functions, name, function)
    return functions


@functools.cache
def _found() -> tuple[Any | None, str]:
    """The library, and a word on where it comes from or why there is none."""
    compiler = tools.find_tool(*_COMPILERS)
    if compiler is None:
        return None, "clang is missing; make setup installs it, or apt-get install clang"
    name = Path(compiler).name
    # A folder may be shared with a machine that has another C library.
    system = (platform.machine(), *platform.libc_ver())
    parts = "\0".join((SOURCE.read_text(), os.path.realpath(compiler), *system, *FLAGS))
    kept = KEPT / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.so"
    try:
        if not _is_whole(kept):
            _compile(compiler, kept)
        return bound(kept), f"compiled by {name}"
    except subprocess.TimeoutExpired:
        return None, f"{name} did not compile {SOURCE.name} within {_COMPILE_LIMIT_S:g} s"
    except subprocess.CalledProcessError as error:
        said = re.search(r"error: (.*)", str(error.stderr))  # without the path in front of it
        reason = said[1] if said else f"status {error.returncode}"
        return None, f"{name} does not compile {SOURCE.name}: {reason}"
    except OSError as error:
        reason = error.strerror or "the loader refuses what came out"
        return None, f"{SOURCE.name} cannot be compiled and kept: {reason}"


def _is_whole(kept: Path) -> bool:
    """Whether a compiled file ends with the digest of all before it; ELF minds no such end."""
    try:
        content = kept.read_bytes()
    except OSError:
        return False
    return content.endswith(hashlib.sha256(content[:-_DIGEST_BYTES]).digest())


def _compile(compiler: str, kept: Path) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT, prefix="partial-") as folder:
        made = Path(folder, kept.name)
        subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(made)], stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", check=True, timeout=_COMPILE_LIMIT_S,
        )  # fmt: skip
        with made.open("ab") as end:
            end.write(hashlib.sha256(made.read_bytes()).digest())
        made.replace(kept)  # whole or not at all, whoever compiles it at the same time
    with contextlib.suppress(OSError):  # somebody else may be tidying up as well
        by_age = sorted(KEPT.glob("*.so"), key=lambda file: file.stat().st_mtime)
        for file in by_age[:-_MOST_KEPT]:
            file.unlink(missing_ok=True)
        for left in KEPT.glob("partial-*"):  # of a process that was killed while it compiled
            if left.stat().st_mtime < time.time() - 2 * _COMPILE_LIMIT_S:
                shutil.rmtree(left, ignore_errors=True)
