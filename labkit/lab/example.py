"""A control plane that was restarted, to look at where no map of one's own is at hand."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Final

from labkit.errors import Unavailable
from labkit.inspect.canary import PLACE
from labkit.kernel import probe, programs
from labkit.kernel.closing import Holding
from labkit.kernel.libbpf import MapKind, ProgramKind, UpdateFlag
from labkit.kernel.maps import KeyExists, Map

CANARY_KEY: Final = 1_000
"""A key of the policies that the control plane itself leaves alone."""

_PAUSE_S: Final = 0.1
_SELDOM: Final = "sched_process_exec"
_COMMAND: Final = """
import ctypes, sys
libbpf = ctypes.CDLL("libbpf.so.1")
fd, key, value = libbpf.bpf_map_get_fd_by_id(int(sys.argv[1])), *map(int, sys.argv[2:])
key, value = ctypes.c_uint32(key), ctypes.c_uint64(value)
given = ctypes.byref(key), ctypes.byref(value), ctypes.c_uint64(0)
sys.exit(-libbpf.bpf_map_update_elem(fd, *given))
"""


class Example(Holding):
    """Two maps of a control plane, which goes on to write them; a context manager.

    It has been started anew: the program that runs refers to the policies of before. Its values
    have no version. It updates, deletes and inserts policies and routes in turn, and has one
    insertion refused each time.

    Attributes
    ----------
    policies, routes : str
        Ids of the maps that it writes.
    command : list of str
        Writes a version to `CANARY_KEY` of the policies, in a process of its own.

    Raises
    ------
    Unavailable
        This machine runs no BPF.
    """

    def __init__(self) -> None:
        probe.require("bpf")
        with self._opening() as opened:
            before = self._map("policies")
            loaded = opened.enter_context(programs.load("held_map", TABLE_FD=before.fd))
            loaded.attach(loaded.program("look_up", ProgramKind.RAW_TRACEPOINT), _SELDOM)
            before.close()  # that program keeps it
            self._tables = self._map("policies"), self._map("routes")
        self.policies, self.routes = (str(table.id) for table in self._tables)
        self.command = [
            sys.executable, "-S", "-c", _COMMAND, self.policies, str(CANARY_KEY), PLACE,
        ]  # fmt: skip
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write, name="control plane", daemon=True)
        self._writer.start()

    @classmethod
    def where_it_can(cls, say: Callable[[str], object] = print) -> Example | None:
        """An example; None, with a sentence that says why, where this machine runs no BPF."""
        try:
            return cls()
        except Unavailable as error:
            say(f"No live example here. {error}")
            return None

    def _map(self, name: str) -> Map:
        made = Map.create(MapKind.HASH, key="u4", value="u8", max_entries=64, name=name)
        return self._open.enter_context(made)

    def _write(self) -> None:
        turn = 0
        while not self._ended.wait(_PAUSE_S):
            turn += 1
            for table in self._tables:
                table.update(80, turn)
                table.update(turn % 32 + 100, turn)
                table.delete(turn % 32 + 100)
                with contextlib.suppress(KeyExists):
                    table.update(80, 0, UpdateFlag.NOEXIST)

    def close(self) -> None:
        """End the control plane, and remove its maps; safe to call twice."""
        self._ended.set()
        self._writer.join()
        super().close()
