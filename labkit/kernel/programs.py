"""Compile, load, run and attach the programs in ``bpf/``; closing leaves nothing.

bcc compiles the source and makes its maps. The loading itself goes through libbpf with
the instructions that bcc produced: that gives every program type (sleepable ones too),
the verifier's own last words as the error, and nothing printed behind our back.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput, LabError
from labkit.kernel import libbpf, probe
from labkit.kernel.closing import Closing
from labkit.kernel.libbpf import AttachType, ProgramKind
from labkit.kernel.maps import Map

SOURCES = Path(__file__).parents[2] / "bpf"
"""Where the programs' sources stand."""

_REPEATABLE = {ProgramKind.TC, ProgramKind.XDP, ProgramKind.SOCKET_FILTER}
_HOOKS = {
    "fentry": (ProgramKind.TRACING, AttachType.TRACE_FENTRY),
    "fexit": (ProgramKind.TRACING, AttachType.TRACE_FEXIT),
    "tp_btf": (ProgramKind.TRACING, AttachType.TRACE_RAW_TP),
    "lsm": (ProgramKind.LSM, AttachType.LSM_MAC),
}


class LoadFailed(LabError):
    """A program did not compile, or the verifier or kernel refused it."""


@dataclass(frozen=True)
class TestRun:
    """Outcome of running a program in place.

    Attributes
    ----------
    value : int
        What the last run returned.
    mean_ns : int
        The kernel's own mean duration of one run, nanoseconds; 0 where it takes no time
        (sleepable and raw tracepoint programs).
    """

    __test__ = False

    value: int
    mean_ns: int


class Function:
    """One loaded program. Made by :meth:`Unit.function`, which also closes it."""

    def __init__(self, name: str, kind: ProgramKind, fd: int) -> None:
        self.name = name
        self.kind = kind
        self.fd = fd
        self.id: int = libbpf.prog_info(fd).id

    def __repr__(self) -> str:
        return f"<Function {self.name} id {self.id} {self.kind.name.lower()}>"

    def test_run(
        self,
        repeat: int = 1,
        *,
        data: bytes | npt.NDArray[Any] | None = None,
        context: npt.NDArray[Any] | None = None,
    ) -> TestRun:
        """Run the program in place (``BPF_PROG_TEST_RUN``), at kernel speed.

        The call releases the interpreter's lock and runs on the CPU of its thread, so
        two threads pinned to two CPUs race for real.

        Parameters
        ----------
        repeat : int
            Runs in one call; tc, XDP and socket filters only.
        data : bytes or numpy.ndarray, optional
            The packet, at least 14 bytes; zeros by default.
        context : numpy.ndarray, optional
            For sleepable ("syscall") and raw tracepoint programs: their argument block.
            A syscall program's changes to it are copied back.

        Returns
        -------
        TestRun
            Last return value and mean duration.

        Raises
        ------
        BadInput
            A repeat that this type cannot do.
        OSError
            The kernel's refusal.
        """
        if repeat < 1:
            raise BadInput(f"repeat must be at least 1, not {repeat}.")
        options = libbpf.TestRunOpts()
        keep: Any = None
        if self.kind in _REPEATABLE:
            keep = np.frombuffer(bytes(64) if data is None else data, np.uint8)
            options.data_in, options.data_size_in = keep.ctypes.data, keep.nbytes
            options.repeat = repeat
        elif repeat > 1:
            raise BadInput(
                f"The kernel runs a {self.kind.name.lower()} program once a call: repeat must be 1."
            )
        if context is not None:
            options.ctx_in, options.ctx_size_in = context.ctypes.data, context.nbytes
        result = libbpf.api().bpf_prog_test_run_opts(self.fd, ctypes.byref(options))
        libbpf.checked(result, f"running {self.name}")
        del keep
        return TestRun(int(options.retval), int(options.duration))


class Unit(Closing):
    """One compiled source with its maps, functions and links; a context manager.

    Made by :func:`load`.
    """

    def __init__(self, name: str, compiled: Any) -> None:
        self.name = name
        self._compiled = compiled
        self._maps: list[Map] = []
        self._functions: list[Function] = []
        self._links: list[int] = []

    def map(
        self, name: str, *, key: npt.DTypeLike | None = None, value: npt.DTypeLike | None = None
    ) -> Map:
        """A map of the source; it is closed with the unit.

        Parameters
        ----------
        name : str
            As declared in the source.
        key, value : dtype-like, optional
            Layouts; by default the map's BTF.
        """
        from bcc.libbcc import lib as libbcc

        # Not by bcc's table object, which refuses per-CPU values of odd sizes.
        fd = int(libbcc.bpf_table_fd(self._compiled.module, name.encode()))
        if fd < 0:
            raise BadInput(f"bpf/{self.name}.bpf.c declares no map {name!r}.")
        opened = Map.from_fd(fd, key=key, value=value)
        self._maps.append(opened)
        return opened

    def table(self, name: str) -> Any:
        """The table object of bcc itself, for experiments whose subject is bcc."""
        try:
            return self._compiled[name.encode()]
        except KeyError:
            raise BadInput(f"bpf/{self.name}.bpf.c declares no map {name!r}.") from None

    def function(
        self,
        name: str,
        kind: ProgramKind = ProgramKind.TC,
        *,
        hook: str | None = None,
        sleepable: bool = False,
    ) -> Function:
        """Load one function of the source.

        Parameters
        ----------
        name : str
            C function.
        kind : ProgramKind
            Program type; a ``hook`` decides it by itself.
        hook : str, optional
            ``"fentry:FUNCTION"``, ``"fexit:FUNCTION"``, ``"tp_btf:TRACEPOINT"`` or
            ``"lsm:HOOK"``: what a tracing program will be attached to.
        sleepable : bool
            Load as sleepable; ``SYSCALL`` programs always are.

        Returns
        -------
        Function
            Closed with the unit.

        Raises
        ------
        LoadFailed
            With the kernel's answer and the verifier's last words.
        """
        attach_type, target = AttachType.NONE, 0
        flags = libbpf.PROGRAM_SLEEPABLE if sleepable or kind is ProgramKind.SYSCALL else 0
        if kind is ProgramKind.XDP:
            attach_type = AttachType.XDP
        try:
            instructions = self._compiled.dump_func(name.encode())
        except Exception:
            raise BadInput(f"bpf/{self.name}.bpf.c has no function {name!r}.") from None
        try:
            if hook is not None:
                how, _, where = hook.partition(":")
                if how not in _HOOKS or not where:
                    raise BadInput(f"A hook is one of {sorted(_HOOKS)} and a name, not {hook!r}.")
                kind, attach_type = _HOOKS[how]
                target = libbpf.vmlinux_function_id(where, attach_type)
            fd = libbpf.prog_load(
                kind,
                instructions,
                name=name,
                attach_type=attach_type,
                attach_btf_id=target,
                flags=flags,
            )
        except OSError as error:
            raise LoadFailed(f"bpf/{self.name}.bpf.c: {error.args[1]}.") from error
        loaded = Function(name, kind, fd)
        self._functions.append(loaded)
        return loaded

    def attach(self, function: Function, where: str | int | None = None) -> int:
        """Attach a loaded function until the unit is closed or :meth:`detach`.

        Parameters
        ----------
        function : Function
            Of this unit.
        where : str or int, optional
            Raw tracepoint: its name. Tracepoint: ``"category:event"``. kprobe: the kernel
            function. XDP: interface index. Tracing and LSM: nothing, the hook was given at
            load time.

        Returns
        -------
        int
            Descriptor that holds the attachment.

        Raises
        ------
        LoadFailed
            The kernel refuses.
        """
        try:
            held = self._attached(function, where)
        except OSError as error:
            raise LoadFailed(f"Attaching {function.name} to {where}: {error.args[1]}.") from error
        self._links.append(held)
        return held

    def _attached(self, function: Function, where: str | int | None) -> int:
        lib = libbpf.api()
        kind, doing = function.kind, f"attaching {function.name}"
        if kind is ProgramKind.RAW_TRACEPOINT and isinstance(where, str):
            return libbpf.checked(lib.bpf_raw_tracepoint_open(where.encode(), function.fd), doing)
        if kind in (ProgramKind.TRACING, ProgramKind.LSM):
            return libbpf.checked(lib.bpf_raw_tracepoint_open(None, function.fd), doing)
        if kind is ProgramKind.XDP and isinstance(where, int):
            link = lib.bpf_link_create(function.fd, where, int(AttachType.XDP), None)
            return libbpf.checked(link, doing)
        from bcc.libbcc import lib as libbcc

        if kind is ProgramKind.TRACEPOINT and isinstance(where, str):
            category, _, event = where.partition(":")
            with _standard_error() as said:
                held = libbcc.bpf_attach_tracepoint(function.fd, category.encode(), event.encode())
        elif kind is ProgramKind.KPROBE and isinstance(where, str):
            with _standard_error() as said:
                held = libbcc.bpf_attach_kprobe(
                    function.fd, 0, f"labkit_{os.getpid()}_{where}".encode(), where.encode(), 0, 0
                )
        else:
            raise BadInput(f"A {kind.name.lower()} program does not attach to {where!r}.")
        if held < 0:
            raise OSError(0, said.first_line() or f"{where} cannot be attached to")
        return int(held)

    def detach(self, held: int) -> None:
        """Undo one :meth:`attach`."""
        self._links.remove(held)
        libbpf.close(held)

    def close(self) -> None:
        """Detach and unload everything of this unit; safe to call twice."""
        for held in self._links:
            libbpf.close(held)
        for function in self._functions:
            libbpf.close(function.fd)
        for opened in self._maps:
            opened.close()
        self._links, self._functions, self._maps = [], [], []
        compiled, self._compiled = self._compiled, None
        if compiled is not None:
            # bcc keeps every unit alive until the process ends, for its own clean-up.
            atexit.unregister(compiled.cleanup)
            compiled.cleanup()


def load(name: str, **constants: int | str) -> Unit:
    """Compile ``bpf/<name>.bpf.c`` and make its maps.

    Parameters
    ----------
    name : str
        Source file without its ending.
    **constants : int or str
        Become ``-D``: integers as they are, text as a C string literal (which is what
        bcc's ``BPF_TABLE`` takes as the map type). Each must stand in the source.

    Returns
    -------
    Unit
        Use it in a ``with`` statement.

    Raises
    ------
    BadInput
        No such source, or a constant that it does not use.
    Unavailable
        bcc or the kernel headers are missing.
    LoadFailed
        The compiler's first error.
    """
    path = SOURCES / f"{name}.bpf.c"
    if not path.is_file():
        raise BadInput(f"There is no program bpf/{name}.bpf.c.")
    text = path.read_text()
    text += "".join(header.read_text() for header in SOURCES.glob("*.h"))
    flags = [f"-I{SOURCES}"]
    for constant, value in constants.items():
        if not re.search(rf"\b{re.escape(constant)}\b", text):
            raise BadInput(f"bpf/{name}.bpf.c knows no constant {constant}.")
        literal = f'"{value}"' if isinstance(value, str) else str(int(value))
        flags.append(f"-D{constant}={literal}")
    bcc = probe.prepare_bcc()
    compiled, failure = None, ""
    with _standard_error() as said:
        try:
            compiled = bcc.BPF(src_file=os.fsencode(path), cflags=flags)
        except Exception as error:  # bcc raises plain Exception
            failure = str(error)
    if compiled is None:
        reason = said.first_line("error:") or said.first_line() or failure
        raise LoadFailed(f"bpf/{name}.bpf.c does not compile or load: {reason}")
    return Unit(name, compiled)


class _Said:
    """What was printed while standard error was caught; filled when the block ends."""

    text = ""

    def first_line(self, having: str = "") -> str:
        lines = (line.strip() for line in self.text.splitlines())
        return next((line for line in lines if line and having in line), "")


@contextmanager
def _standard_error() -> Iterator[_Said]:
    """Catch what C libraries print to descriptor 2, so that no user sees it raw."""
    said = _Said()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.text = file.read().decode(errors="replace")
