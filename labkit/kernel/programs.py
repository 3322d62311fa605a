"""Load, run and attach the programs in ``bpf/``; closing leaves nothing.

bcc compiles them (:mod:`labkit.kernel.compiler`). Making the maps and loading the programs goes
through libbpf: that gives every program type (sleepable ones too), the verifier's own last words
as the error, and nothing printed behind our back.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput
from labkit.kernel import libbpf, tools
from labkit.kernel.closing import Closing
from labkit.kernel.compiler import SOURCES, Compiled, LoadFailed, compiled, defines, is_open
from labkit.kernel.libbpf import AttachType, MapKind, ProgramKind
from labkit.kernel.maps import Map

_REPEATABLE = {ProgramKind.TC, ProgramKind.XDP, ProgramKind.SOCKET_FILTER}
_HOOKS = {
    "fentry": (ProgramKind.TRACING, AttachType.TRACE_FENTRY),
    "fexit": (ProgramKind.TRACING, AttachType.TRACE_FEXIT),
    "tp_btf": (ProgramKind.TRACING, AttachType.TRACE_RAW_TP),
    "lsm": (ProgramKind.LSM, AttachType.LSM_MAC),
}


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


class Program:
    """One loaded program. Made by :meth:`BpfObject.program`, which also closes it."""

    def __init__(self, name: str, kind: ProgramKind, fd: int) -> None:
        self.name = name
        self.kind = kind
        self.fd = fd
        self.id: int = libbpf.prog_info(fd).id

    def __repr__(self) -> str:
        return f"<Program {self.name} id {self.id} {self.kind.name.lower()}>"

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


class BpfObject(Closing):
    """One compiled source with its maps, programs and links; a context manager.

    Made by :func:`load`.
    """

    def __init__(self, name: str, code: Compiled, given: Mapping[str, int]) -> None:
        self.name = name
        self._code = code
        self._given = given
        self._made: dict[str, int] = {}
        self._maps: list[Map] = []
        self._programs: list[Program] = []
        self._links: list[int] = []
        self._make_maps()

    def _make_maps(self) -> None:
        types = -1
        try:
            if self._code.btf:
                types = libbpf.btf_load(self._code.btf)
            for name, one in self._code.maps.items():
                self._made[name] = libbpf.map_create(
                    MapKind(one.kind),
                    name=name,
                    key_size=one.key_size,
                    value_size=one.value_size,
                    max_entries=one.max_entries,
                    flags=one.flags,
                    inner_fd=self._made[one.inner] if one.inner else None,
                    btf=(types, one.key_type, one.value_type) if one.value_type else None,
                )
        except OSError as error:
            self.close()
            raise LoadFailed(f"bpf/{self.name}.bpf.c: {error.args[1]}.") from error
        finally:
            libbpf.close(types)

    def map(
        self, name: str, *, key: npt.DTypeLike | None = None, value: npt.DTypeLike | None = None
    ) -> Map:
        """A map of the source; it is closed with the object.

        Parameters
        ----------
        name : str
            As declared in the source.
        key, value : dtype-like, optional
            Layouts; by default the map's BTF.
        """
        fd = self._descriptor(name)
        if fd is None:
            raise BadInput(f"bpf/{self.name}.bpf.c declares no map {name!r}.")
        opened = Map.from_fd(fd, key=key, value=value)
        self._maps.append(opened)
        return opened

    def _descriptor(self, name: str) -> int | None:
        return self._made.get(name)

    def _instructions(self, name: str) -> bytes | None:
        known = self._code.programs.get(name)
        return None if known is None else known.bound({**self._made, **self._given})

    def program(
        self,
        name: str,
        kind: ProgramKind = ProgramKind.TC,
        *,
        hook: str | None = None,
        sleepable: bool = False,
    ) -> Program:
        """Load one program of the source.

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
        Program
            Closed with the object.

        Raises
        ------
        LoadFailed
            With the kernel's answer and the verifier's last words.
        """
        attach_type, target = AttachType.NONE, 0
        flags = libbpf.PROGRAM_SLEEPABLE if sleepable or kind is ProgramKind.SYSCALL else 0
        if kind is ProgramKind.XDP:
            attach_type = AttachType.XDP
        instructions = self._instructions(name)
        if instructions is None:
            raise BadInput(f"bpf/{self.name}.bpf.c has no program {name!r}.")
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
        loaded = Program(name, kind, fd)
        self._programs.append(loaded)
        return loaded

    def attach(self, program: Program, where: str | int | None = None) -> int:
        """Attach a loaded program until the object is closed or :meth:`detach`.

        Parameters
        ----------
        program : Program
            Of this object.
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
            held = self._attached(program, where)
        except OSError as error:
            raise LoadFailed(f"Attaching {program.name} to {where}: {error.args[1]}.") from error
        self._links.append(held)
        return held

    def _attached(self, program: Program, where: str | int | None) -> int:
        lib = libbpf.api()
        kind, doing = program.kind, f"attaching {program.name}"
        if kind is ProgramKind.RAW_TRACEPOINT and isinstance(where, str):
            return libbpf.checked(lib.bpf_raw_tracepoint_open(where.encode(), program.fd), doing)
        if kind in (ProgramKind.TRACING, ProgramKind.LSM):
            return libbpf.checked(lib.bpf_raw_tracepoint_open(None, program.fd), doing)
        if kind is ProgramKind.XDP and isinstance(where, int):
            link = lib.bpf_link_create(program.fd, where, int(AttachType.XDP), None)
            return libbpf.checked(link, doing)
        from bcc.libbcc import lib as libbcc

        if kind is ProgramKind.TRACEPOINT and isinstance(where, str):
            category, _, event = where.partition(":")
            with _standard_error() as said:
                held = libbcc.bpf_attach_tracepoint(program.fd, category.encode(), event.encode())
        elif kind is ProgramKind.KPROBE and isinstance(where, str):
            with _standard_error() as said:
                held = libbcc.bpf_attach_kprobe(
                    program.fd, 0, f"labkit_{os.getpid()}_{where}".encode(), where.encode(), 0, 0
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
        """Detach and unload everything of this object; safe to call twice."""
        for held in self._links:
            libbpf.close(held)
        for program in self._programs:
            libbpf.close(program.fd)
        for opened in self._maps:
            opened.close()
        for fd in self._made.values():
            libbpf.close(fd)
        self._links, self._programs, self._maps, self._made = [], [], [], {}


class BccObject(BpfObject):
    """A source that bcc holds in this very process, with bcc's own tables and pins.

    Made by :func:`load_by_bcc`, for experiments whose subject is bcc.
    """

    def __init__(self, name: str, module: Any) -> None:
        self._module = module
        super().__init__(name, Compiled({}, {}, b""), {})

    def table(self, name: str) -> Any:
        """The table object of bcc itself."""
        try:
            return self._module[name.encode()]
        except KeyError:
            raise BadInput(f"bpf/{self.name}.bpf.c declares no map {name!r}.") from None

    def _descriptor(self, name: str) -> int | None:
        from bcc.libbcc import lib as libbcc

        # Not by bcc's table object, which refuses per-CPU values of odd sizes.
        fd = int(libbcc.bpf_table_fd(self._module.module, name.encode()))
        return fd if fd >= 0 else None

    def _instructions(self, name: str) -> bytes | None:
        try:
            return bytes(self._module.dump_func(name.encode()))
        except Exception:  # bcc raises plain Exception
            return None

    def close(self) -> None:
        """Detach and unload everything of this object; safe to call twice."""
        super().close()
        module, self._module = self._module, None
        if module is not None:
            # bcc keeps every such object alive until the process ends, for its own clean-up.
            atexit.unregister(module.cleanup)
            module.cleanup()


def load(name: str, **constants: int | str) -> BpfObject:
    """Compile ``bpf/<name>.bpf.c`` and make its maps.

    Parameters
    ----------
    name : str
        Source file without its ending.
    **constants : int or str
        Become ``-D``: integers as they are, text as a C string literal (which is what
        bcc's ``BPF_TABLE`` takes as the map type). Each must stand in the source. One whose name
        ends in ``_FD`` is a descriptor, which the source hands to ``bpf_pseudo_fd``; one in
        ``_ID`` is a number known only now. Another of either asks for no other compilation.

    Returns
    -------
    BpfObject
        Use it in a ``with`` statement.

    Raises
    ------
    BadInput
        No such source, or a constant that it does not use.
    Unavailable
        bcc or the kernel headers are missing.
    LoadFailed
        The compiler's first error, or the kernel's refusal of a map.
    """
    given = {one: int(value) for one, value in constants.items() if is_open(one)}
    return BpfObject(name, compiled(name, constants), given)


def load_by_bcc(name: str, **constants: int | str) -> BccObject:
    """Compile ``bpf/<name>.bpf.c`` in this very process, for experiments whose subject is bcc.

    A fault within LLVM would end this process; :func:`load` has none.

    Parameters
    ----------
    name, **constants
        As for :func:`load`.

    Returns
    -------
    BccObject
        Use it in a ``with`` statement.

    Raises
    ------
    BadInput, Unavailable, LoadFailed
        As :func:`load`.
    """
    flags = [f"-I{SOURCES}", *defines(name, constants)]
    bcc = tools.prepare_bcc()
    module, failure = None, ""
    with _standard_error() as said:
        try:
            module = bcc.BPF(src_file=os.fsencode(SOURCES / f"{name}.bpf.c"), cflags=flags)
        except Exception as error:  # bcc raises plain Exception
            failure = str(error)
    if module is None:
        reason = said.first_line("error:") or said.first_line() or failure
        raise LoadFailed(f"bpf/{name}.bpf.c does not compile or load: {reason}")
    return BccObject(name, module)


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
