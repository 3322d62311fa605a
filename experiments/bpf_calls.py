"""Every bpf(2) of one thread, as it enters the kernel: bpf/lookup_syscall.bpf.c, attached."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from labkit.errors import LabError
from labkit.kernel import programs
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.programs import BccObject, Program

# enum bpf_cmd (include/uapi/linux/bpf.h).
LOOKUP, UPDATE = 1, 2
COMMANDS = {
    LOOKUP: "look up element",
    UPDATE: "update element",
    4: "get next key",
    24: "look up batch",
    26: "update batch",
}
_SPARE_CALLS: Final = 1_000  # room beyond the two that one element takes at most
_CALL: Final = np.dtype(
    [("number", "u8"), ("command", "u8"), ("pointer", "u8"), ("size", "u8"), ("attributes", "V64")]
)
# union bpf_attr, of commands on one element; it has the descriptor first in them alone.
ATTRIBUTES = np.dtype(
    {
        "names": ["map_fd", "key", "value", "flags"],
        "formats": ["u4", "u8", "u8", "u8"],
        "offsets": [0, 8, 16, 24],
        "itemsize": 64,
    }
)


@dataclass(frozen=True)
class Seen:
    """What a thread called while some work was done.

    Attributes
    ----------
    calls
        A row for each bpf(2): ``number``, ``command``, ``pointer``, ``size``, ``attributes`` (bytes
        to view as `ATTRIBUTES`).
    mmap, msync
        How many of these; mmap of a descriptor alone.
    result
        Of the work.
    """

    calls: npt.NDArray[Any]
    mmap: int
    msync: int
    result: Any


class Watcher:
    """Watches the calls of one thread while some work is done; from `watching`."""

    def __init__(self, loaded: BccObject) -> None:
        self._loaded = loaded
        self._calls = loaded.map("calls", value=_CALL)
        self._totals = loaded.map("totals")
        for name in ("mmap", "msync"):
            self._attach(loaded.program(f"on_{name}", ProgramKind.TRACEPOINT), name)
        self._on_bpf = loaded.program("on_bpf", ProgramKind.TRACEPOINT)

    def _attach(self, function: Program, call: str) -> int:
        return self._loaded.attach(function, f"syscalls:sys_enter_{call}")

    def watch(self, work: Callable[[], Any]) -> Seen:
        """Do the work, and answer what the thread called meanwhile."""
        self._totals.update(0, np.zeros(1, self._totals.value_dtype)[0])
        link = self._attach(self._on_bpf, "bpf")  # by other calls than bpf(2)
        try:
            result = work()
        finally:
            self._loaded.detach(link)
        totals = self._totals.lookup(0)
        if int(totals["bpf"]) > self._calls.max_entries:
            raise LabError(
                f"{int(totals['bpf'])} calls were made, more than the {self._calls.max_entries} "
                "that there is room for: run it with fewer entries."
            )
        calls = self._calls.snapshot().values[: int(totals["bpf"])]
        return Seen(calls, int(totals["mmap"]), int(totals["msync"]), result)


@contextmanager
def watching(thread: int, entries: int) -> Iterator[tuple[Watcher, BccObject]]:
    """Load what watches a thread.

    Parameters
    ----------
    thread : int
        Its number in this process's namespace.
    entries : int
        Elements that the program's hash ``table`` has room for; there is room for the calls that
        two on each element make.
    """
    namespace = os.stat("/proc/self/ns/pid")
    with programs.load_by_bcc(
        "lookup_syscall",
        ENTRIES=entries,
        CALLS=2 * entries + _SPARE_CALLS,
        THREAD=thread,
        NAMESPACE_DEVICE=namespace.st_dev,
        NAMESPACE_INODE=namespace.st_ino,
    ) as loaded:
        yield Watcher(loaded), loaded
