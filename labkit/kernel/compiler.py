"""Compiles the programs of ``bpf/`` with bcc, in a process of its own, and keeps what came out.

A fault within LLVM ends the process that it runs in, so that is never the user's. bcc makes the
maps of a source while it compiles it; the child tells what they are and goes, and its caller
makes them anew. What was compiled is kept in `KEPT`, by everything that it depends on.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import faulthandler
import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from labkit.errors import BadInput, LabError, TimedOut
from labkit.kernel import libbpf, tools
from labkit.kernel.parallel import Child

SOURCES = tools.CHECKOUT / "bpf" if tools.CHECKOUT else Path(__file__).parents[1] / "bpf"
"""Where the programs' sources stand: in the checkout, else beside the installed modules."""

KEPT = tools.cache_folder() / "objects"
"""Where compiled sources are kept; without it, all are compiled each time."""

_MOST_KEPT: Final = 1000
_LIMIT_S: Final = 120.0
_INNER: Final = re.compile(r'BPF_ARRAY_OF_MAPS\(\s*(\w+)\s*,\s*"(\w+)"')

# The one instruction of 16 bytes: its first half says what the number in it means.
_LOAD_WIDE: Final = 0x18
_NUMBER, _OF_A_MAP = 0, (1, 2)  # BPF_PSEUDO_MAP_FD, BPF_PSEUDO_MAP_VALUE
_FIRST_STAND_IN: Final = 0x4C414200  # of what is only known when the program is loaded
_OPEN: Final = {"_FD": "{}", "_ID": "((u32)bpf_pseudo_fd(0, {}))"}


class LoadFailed(LabError):
    """A program did not compile, or the verifier or kernel refused it."""


@dataclass(frozen=True)
class CompiledMap:
    """What a map of a source is made with.

    Attributes
    ----------
    kind, key_size, value_size, max_entries, flags : int
        As the kernel takes them.
    key_type, value_type : int
        Their types in the object's BTF; 0 where it says nothing of them.
    inner : str
        The map of the same source that is the template of its values; empty for most.
    """

    kind: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    key_type: int
    value_type: int
    inner: str


@dataclass(frozen=True)
class CompiledProgram:
    """Instructions of a program, which name no descriptor and no id yet.

    Attributes
    ----------
    instructions : bytes
        8 bytes each.
    places : dict
        By the number of an instruction: what belongs there, the descriptor of a map of the source
        or a constant ending in ``_FD`` or ``_ID``.
    """

    instructions: bytes
    places: dict[int, str]

    def bound(self, numbers: Mapping[str, int]) -> bytes:
        """The instructions with numbers in their places.

        By name: descriptors of the source's maps, and its constants.
        """
        code = np.frombuffer(bytearray(self.instructions), libbpf.INSTRUCTION)
        for place, name in self.places.items():
            code["immediate"][place] = numbers[name]
        return code.tobytes()


@dataclass(frozen=True)
class Compiled:
    """One compiled source.

    Attributes
    ----------
    maps : dict of str to CompiledMap
        In the order in which they are to be made.
    programs : dict of str to CompiledProgram
        By the names of their C functions.
    btf : bytes
        Of the maps' types; empty where there is none.
    """

    maps: dict[str, CompiledMap]
    programs: dict[str, CompiledProgram]
    btf: bytes


def defines(name: str, constants: Mapping[str, int | str]) -> list[str]:
    """The ``-D`` options of a source, whose constants must all stand in it.

    Parameters
    ----------
    name : str
        Source file without its ending.
    constants : mapping
        Integers as they are, text as a C string literal.

    Raises
    ------
    BadInput
        No such source, or a constant that it does not use.
    """
    text = _text(name)
    for constant in constants:
        if not re.search(rf"\b{re.escape(constant)}\b", text):
            raise BadInput(f"bpf/{name}.bpf.c knows no constant {constant}.")
    return [
        f'-D{constant}="{value}"' if isinstance(value, str) else f"-D{constant}={int(value)}"
        for constant, value in constants.items()
    ]


def is_open(constant: str) -> bool:
    """Whether a constant is a descriptor or an id, bound only when the program is loaded."""
    return constant[-3:] in _OPEN


def compiled(name: str, constants: Mapping[str, int | str]) -> Compiled:
    """Compile ``bpf/<name>.bpf.c``, or take what was compiled before.

    Parameters
    ----------
    name : str
        Source file without its ending.
    constants : mapping
        As for `defines`. Of those that `is_open` only the names matter: `CompiledProgram` tells
        where their numbers belong.

    Returns
    -------
    Compiled
        Nothing of it is in the kernel.

    Raises
    ------
    BadInput
        No such source, or a constant that it does not use.
    Unavailable
        bcc or the kernel headers are missing.
    LoadFailed
        The compiler's first error, or how it ended.
    """
    open_places = [constant for constant in constants if is_open(constant)]
    flags = [one for one in defines(name, constants) if not is_open(one.partition("=")[0])]
    for i, one in enumerate(open_places):
        flags.append(f"-D{one}={_OPEN[one[-3:]].format(_FIRST_STAND_IN + i)}")
    kept = KEPT / f"{name}-{_digest(_text(name), *flags, *_tools())}.json"
    said = _kept(kept)
    if said is None:
        said = _compiled_by_child(name, flags, open_places)
        _keep(kept, said)
    return _from_json(said)


def _text(name: str) -> str:
    """A source with all headers that it may include."""
    path = SOURCES / f"{name}.bpf.c"
    if not path.is_file():
        raise BadInput(f"There is no program bpf/{name}.bpf.c.")
    return "".join(file.read_text() for file in [path, *sorted(SOURCES.glob("*.h"))])


def _tools() -> tuple[str, ...]:
    """What a compilation depends on beside its source."""
    bcc = tools.prepare_bcc()
    return (
        Path(__file__).read_text(),
        str(bcc.__version__),
        str(tools.headers_folder()),
        tools.headers_version(),
        platform.release(),
        platform.machine(),
        str(libbpf.possible_cpus()),
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _kept(path: Path) -> str | None:
    """What was kept there; None where nothing is, or it is not whole."""
    try:
        digest, _, said = path.read_text().partition("\n")
    except (OSError, ValueError):
        return None
    return said if digest == _digest(said) else None


def _keep(path: Path, said: str) -> None:
    """Put a compiled source where it is found again; one that cannot be kept is compiled again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(f"{_digest(said)}\n{said}")
        partial.replace(path)
        by_age = sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime)
        for file in by_age[:-_MOST_KEPT]:
            file.unlink(missing_ok=True)


def _compiled_by_child(name: str, flags: list[str], open_places: list[str]) -> str:
    with tempfile.TemporaryFile() as file:
        try:
            with Child(lambda: _compile(name, flags, open_places, file.fileno())) as child:
                return str(child.result(_LIMIT_S))
        except TimedOut:
            raise LoadFailed(f"bpf/{name}.bpf.c was not compiled within {_LIMIT_S:g} s.") from None
        except LabError as error:  # it died: what it had said by then were warnings, if anything
            ending, died = str(error), True
        except Exception as error:  # bcc raises plain Exception
            ending, died = str(error), False
        file.seek(0)
        said = file.read().decode(errors="replace")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()]
    reason = (errors or ([] if died else lines) or [ending])[0]
    raise LoadFailed(f"bpf/{name}.bpf.c does not compile or load: {reason}")


def _from_json(text: str) -> Compiled:
    read = json.loads(text)
    return Compiled(
        {name: CompiledMap(**one) for name, one in read["maps"].items()},
        {
            name: CompiledProgram(
                base64.b64decode(one["instructions"], validate=True),
                {int(place): str(whose) for place, whose in one["places"].items()},
            )
            for name, one in read["programs"].items()
        },
        base64.b64decode(read["btf"], validate=True),
    )


# -- in the child ----------------------------------------------------------------------------


def _compile(name: str, flags: list[str], open_places: list[str], output: int) -> str:
    faulthandler.disable()  # what ends this process is told by the compiler itself
    for standard in (1, 2):
        os.dup2(output, standard)
    path = SOURCES / f"{name}.bpf.c"
    module = tools.prepare_bcc().BPF(src_file=os.fsencode(path), cflags=[f"-I{SOURCES}", *flags])
    return json.dumps(_told(module, dict(_INNER.findall(path.read_text())), open_places))


def _told(module: Any, inner: Mapping[str, str], open_places: list[str]) -> dict[str, Any]:
    from bcc.libbcc import lib

    # bcc declares no arguments for the calls on tables, and ctypes then passes a pointer as an
    # int: cut to 32 bits, which is another address wherever the module lies above 2 GiB.
    lib.bpf_num_tables.argtypes = [ctypes.c_void_p]
    lib.bpf_table_name.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    lib.bpf_table_name.restype = lib.bpf_function_name.restype = ctypes.c_char_p
    names = [lib.bpf_table_name(module.module, i).decode()
             for i in range(lib.bpf_num_tables(module.module))]  # fmt: skip
    descriptors = {name: int(lib.bpf_table_fd(module.module, name.encode())) for name in names}
    infos = {name: libbpf.map_info(fd) for name, fd in descriptors.items()}
    whose = {fd: name for name, fd in descriptors.items()}
    whose.update({_FIRST_STAND_IN + i: name for i, name in enumerate(open_places)})
    maps = {
        name: CompiledMap(
            info.type, info.key_size, info.value_size, info.max_entries, info.map_flags,
            info.btf_key_type_id, info.btf_value_type_id, inner.get(name, ""),
        )
        for name, info in infos.items()
    }  # fmt: skip
    functions = [lib.bpf_function_name(module.module, i)
                 for i in range(lib.bpf_num_functions(module.module))]  # fmt: skip
    ids = {info.btf_id for info in infos.values() if info.btf_id}
    return {
        # Templates first.
        "maps": {name: asdict(maps[name]) for name in sorted(maps, key=lambda n: maps[n].inner)},
        "programs": {one.decode(): _program(module.dump_func(one), whose) for one in functions},
        "btf": base64.b64encode(_btf(ids.pop()) if ids else b"").decode(),
    }


def _program(instructions: bytes, whose: Mapping[int, str]) -> dict[str, Any]:
    code = np.frombuffer(bytearray(instructions), libbpf.INSTRUCTION)
    source, number = code["registers"] >> 4, code["immediate"]
    of_a_map = np.isin(source, _OF_A_MAP)
    is_id = (source == _NUMBER) & (number >= _FIRST_STAND_IN) & np.isin(number, list(whose))
    places = {
        int(at): whose[int(number[at])]
        for at in np.flatnonzero((code["code"] == _LOAD_WIDE) & (of_a_map | is_id))
    }
    for at in places:
        code["immediate"][at] = 0
    return {"instructions": base64.b64encode(code.tobytes()).decode(), "places": places}


def _btf(identifier: int) -> bytes:
    lib = libbpf.api()
    types = lib.btf__load_from_kernel_by_id(identifier)
    size = ctypes.c_uint32()
    raw = lib.btf__raw_data(types, ctypes.byref(size))
    return ctypes.string_at(raw, size.value)
