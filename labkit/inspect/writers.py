"""Who asked for a change: a process, and the program that ran in it, by the kernel's stack."""

from __future__ import annotations

import bisect
import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from labkit.kernel import libbpf

_AGAIN_S: Final = 1.0  # from one look at the machine's programs to the next, while events come
_MOST_KNOWN: Final = 4_096


@dataclass(frozen=True)
class Writer:
    """Who asked for a change.

    Attributes
    ----------
    pid, tid : int
        Process and thread in whose context it was done. Where a program wrote, that may be
        anybody whom it interrupted.
    comm : str
        Name of the thread, as it may be shown.
    cgroup : int
        Id of its cgroup of version 2.
    program_id : int
        The program that wrote; 0: none, or the mechanism cannot tell.
    program : str
        Its name.
    """

    pid: int
    tid: int
    comm: str
    cgroup: int
    program_id: int = 0
    program: str = ""

    def __str__(self) -> str:
        """In words, such as ``bpftool[123]``, and ``program 7 count in ksoftirqd/0[16]``."""
        process = f"{self.comm}[{self.pid}]"
        if not self.program_id:
            return process
        return f"program {self.program_id} {self.program} in {process}"


class Programs:
    """The machine's programs by the addresses of their machine code.

    Parameters
    ----------
    own : sequence of int
        Ids of the hooks themselves, which stand on top of every stack.
    """

    def __init__(self, own: Sequence[int]) -> None:
        self._own = frozenset(own)
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, str]] = []  # end, id and name, as `_starts`
        self._looked_for: set[int] = set()  # addresses, the kernel's own among them
        self._looked = -_AGAIN_S
        self._writers: dict[tuple[int, int, int, bytes, tuple[int, ...]], Writer] = {}

    def writers(self, events: npt.NDArray[np.void]) -> list[Writer]:
        """Who is behind each event of `labkit.inspect.watch_hooks.event_dtype`."""
        count = len(events)
        raw = events["comm"].tobytes()
        comms = [raw[at : at + 16] for at in range(0, len(raw), 16)]
        frames: list[tuple[int, ...]] = [()] * count
        if "frames" in (events.dtype.names or ()):
            frames = list(map(tuple, events["frames"].tolist()))
            if time.monotonic() >= self._looked + _AGAIN_S:
                self._look()  # an address may be another program's by now
        columns = [events[name].tolist() for name in ("pid", "tid", "cgroup")]
        return [self._writer(row) for row in zip(*columns, comms, frames, strict=True)]

    def _writer(self, row: tuple[int, int, int, bytes, tuple[int, ...]]) -> Writer:
        known = self._writers.get(row)
        if known is None:
            pid, tid, cgroup, comm, frames = row
            name = libbpf.shown(comm.split(b"\0", 1)[0])
            known = Writer(pid, tid, name, cgroup, *self._of(frames))
            if len(self._writers) >= _MOST_KNOWN:
                self._writers.clear()
            self._writers[row] = known
        return known

    def _of(self, frames: tuple[int, ...]) -> tuple[int, str]:
        """The innermost program of a stack that is none of ours; (0, "") where there is none."""
        for address in filter(None, frames):
            found = self._at(address)
            if found is None and address not in self._looked_for:
                self._look()
                self._looked_for.add(address)
                found = self._at(address)
            if found is not None and found[0] not in self._own:
                return found
        return 0, ""

    def _at(self, address: int) -> tuple[int, str] | None:
        place = bisect.bisect_right(self._starts, address) - 1
        if place < 0:
            return None
        end, identifier, name = self._ranges[place]
        return (identifier, name) if address <= end else None

    def _look(self) -> None:
        self._looked = time.monotonic()
        self._writers.clear()
        found: list[tuple[int, tuple[int, int, str]]] = []
        for identifier in libbpf.ids("prog"):
            try:
                fd = libbpf.fd_by_id("prog", identifier)
            except OSError:
                continue  # gone between listing and opening
            try:
                found += _code(fd)
            finally:
                libbpf.close(fd)
        found.sort()
        self._starts = [start for start, _ in found]
        self._ranges = [rest for _, rest in found]


def _code(fd: int) -> list[tuple[int, tuple[int, int, str]]]:
    """Where the functions of a program stand: start; end, id and name."""
    info = libbpf.prog_info(fd)
    count = min(info.nr_jited_ksyms, info.nr_jited_func_lens)
    starts, lengths = (ctypes.c_uint64 * max(count, 1))(), (ctypes.c_uint32 * max(count, 1))()
    request: dict[str, Any] = {
        "nr_jited_ksyms": count,
        "jited_ksyms": ctypes.addressof(starts),
        "nr_jited_func_lens": count,
        "jited_func_lens": ctypes.addressof(lengths),
    }
    libbpf.object_info(fd, libbpf.ProgInfo(**request))
    name = libbpf.shown(info.name)
    return [
        (start, (start + length, info.id, name))
        for start, length in zip(starts[:count], lengths[:count], strict=True)
        if start
    ]
