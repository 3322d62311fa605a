"""Programs for plain libbpf: compiled by clang, loaded as an object file.

bcc has no global variables, so a program whose subject is ``.rodata`` or ``.data`` goes this
way. All others go through :mod:`labkit.kernel.programs`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sysconfig
from collections.abc import Mapping

import numpy.typing as npt

from labkit.errors import BadInput, Unavailable
from labkit.kernel import leftovers, libbpf, tools
from labkit.kernel.closing import Closing
from labkit.kernel.compiler import SOURCES, LoadFailed
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.programs import Program

_COMPILE_LIMIT_S = 60.0


class ElfObject(Closing):
    """One loaded object file with its maps and programs; a context manager.

    Made by :func:`load`.
    """

    def __init__(self, name: str, pointer: int) -> None:
        self.name = name
        self._pointer: int | None = pointer
        self._maps: list[Map] = []

    def map(
        self, name: str, *, key: npt.DTypeLike | None = None, value: npt.DTypeLike | None = None
    ) -> Map:
        """Open a map of the source, or its data section as a map; it is closed with the object.

        Parameters
        ----------
        name : str
            As in the source, or ``".rodata"`` or ``".data"``.
        key, value : dtype, optional
            Layout where the map carries none of its own.

        Returns
        -------
        Map
            Open until the object is closed.

        Raises
        ------
        BadInput
            There is no such map.
        """
        found = libbpf.api().bpf_object__find_map_by_name(self._pointer, name.encode())
        if not found:
            raise BadInput(f"bpf/{self.name}.bpf.c has no map {name!r}.")
        opened = Map.from_fd(libbpf.api().bpf_map__fd(found), key=key, value=value)
        self._maps.append(opened)
        return opened

    def program(self, name: str) -> Program:
        """A program of the source, loaded already; closed with the object."""
        found = libbpf.api().bpf_object__find_program_by_name(self._pointer, name.encode())
        if not found:
            raise BadInput(f"bpf/{self.name}.bpf.c has no program {name!r}.")
        fd = libbpf.api().bpf_program__fd(found)
        return Program(name, ProgramKind(libbpf.prog_info(fd).type), fd)

    def close(self) -> None:
        """Unload everything of this object; safe to call twice."""
        for opened in self._maps:
            opened.close()
        pointer, self._pointer, self._maps = self._pointer, None, []
        if pointer is not None:
            libbpf.api().bpf_object__close(pointer)


def compile(name: str, **constants: int) -> bytes:
    """Compile ``bpf/<name>.bpf.c`` with clang.

    Parameters
    ----------
    name : str
        Source file without its ending.
    **constants : int
        Become ``-D``.

    Returns
    -------
    bytes
        The object file, for :func:`load`.

    Raises
    ------
    BadInput
        No such source.
    Unavailable
        There is no clang.
    LoadFailed
        The compiler's first error.
    """
    source = SOURCES / f"{name}.bpf.c"
    if not source.is_file():
        raise BadInput(f"There is no program bpf/{name}.bpf.c.")
    clang = tools.find_tool("clang-14", "clang")
    if clang is None:
        raise Unavailable("clang is missing: install Debian's clang-14 (make setup does).")
    # For the target bpf clang does not look where Debian keeps <asm/types.h>.
    machine = f"-I/usr/include/{sysconfig.get_config_var('MULTIARCH')}"
    with leftovers.temporary_folder() as folder:
        made = folder / "object"
        given = [f"-D{constant}={value}" for constant, value in constants.items()]
        command = [clang, "-target", "bpf", "-g", "-O2", machine, *given, "-c", str(source)]
        try:
            done = subprocess.run(
                [*command, "-o", str(made)], capture_output=True, text=True, check=False,
                timeout=_COMPILE_LIMIT_S, env={**os.environ, "TMPDIR": str(folder)},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise LoadFailed(
                f"bpf/{name}.bpf.c was not compiled within {_COMPILE_LIMIT_S:g} s."
            ) from None
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error:" in line]
            reason = errors[0] if errors else f"clang ended with status {done.returncode}"
            raise LoadFailed(f"bpf/{name}.bpf.c does not compile: {reason}.")
        return made.read_bytes()


def load(
    name: str,
    body: bytes,
    initial: Mapping[str, bytes] | None = None,
    pins: Mapping[str, str] | None = None,
) -> ElfObject:
    """Load an object file: make its maps, verify its programs, freeze its ``.rodata``.

    Parameters
    ----------
    name : str
        Name of the source, for messages.
    body : bytes
        From :func:`compile`.
    initial : mapping, optional
        Whole contents, by name, of ``.rodata`` or ``.data``, in place of what the source
        says. This is the one moment at which ``.rodata`` can be set.
    pins : mapping, optional
        Paths by the name of a map: it is taken from there, or made and pinned there.

    Returns
    -------
    ElfObject
        Use it in a ``with`` statement.

    Raises
    ------
    LoadFailed
        libbpf cannot read it, a section is not there or of another size, a pinned map has
        other parameters than the source's (EINVAL), or the verifier refuses.
    """
    lib = libbpf.api()
    options = libbpf.ObjectOpenOpts(object_name=name.encode())
    pointer = lib.bpf_object__open_mem(body, len(body), ctypes.byref(options))
    if not pointer:
        raise LoadFailed(f"libbpf cannot read the object file of bpf/{name}.bpf.c.")
    opened = ElfObject(name, pointer)
    try:
        for section, content in (initial or {}).items():
            found = lib.bpf_object__find_map_by_name(pointer, section.encode())
            if not found or lib.bpf_map__set_initial_value(found, content, len(content)) < 0:
                raise LoadFailed(
                    f"bpf/{name}.bpf.c has no {section} of {len(content)} bytes to set."
                )
        for map_name, path in (pins or {}).items():
            found = lib.bpf_object__find_map_by_name(pointer, map_name.encode())
            if not found or lib.bpf_map__set_pin_path(found, path.encode()) < 0:
                raise LoadFailed(f"bpf/{name}.bpf.c has no map {map_name} to pin.")
        result = lib.bpf_object__load(pointer)
        if result < 0:
            raise LoadFailed(
                f"bpf/{name}.bpf.c does not load: {libbpf.error_name(-result)}; "
                "bpftool prog load tells more."
            )
    except BaseException:
        opened.close()
        raise
    return opened
