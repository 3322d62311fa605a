"""A writer that cooperates, as fast as one CPU can: the load under which a follower's limit shows.

`labkit.load.event_writer` writes by a script and takes down when it did what, which costs more
than the change itself.
"""

from __future__ import annotations

import mmap
import time

import numpy as np

from labkit.errors import BadInput, TimedOut
from labkit.kernel import programs
from labkit.kernel.closing import Holding
from labkit.kernel.libbpf import MapFlag, MapKind
from labkit.kernel.maps import Map
from labkit.sync.ring_events import Channel

CONTROL = np.dtype(
    [
        ("done", "u8"),
        ("limit", "u8"),
        ("per_second", "u8"),
        ("start_ns", "u8"),
        ("end_ns", "u8"),
        ("version", "u8"),
        ("key", "u8"),
    ]
)
"""``struct control`` of bpf/steady_writer.bpf.c."""

_BURST = 64  # changes of one program run at most
_RUNS = 1_000  # program runs between two reads of the clock: some 5 ms at most
_LATE_NS = 10_000_000_000


class SteadyWriter(Holding):
    """The program of bpf/steady_writer.bpf.c, bound to a map and a channel; a context manager.

    It wakes nobody: its follower polls by a timer.

    Parameters
    ----------
    table : Map
        An array of unsigned integers of 8 bytes. Its elements are written in turns, and become
        1, then 2, and so on.
    channel : Channel
        Ring and counters.

    Attributes
    ----------
    control : numpy.ndarray
        One row of `CONTROL`, live: the writer's progress. It stays as it is when this is closed.

    Raises
    ------
    BadInput
        The map is another one.

    Examples
    --------
    >>> from labkit.sync.ring_events import RingEvents
    >>> with (
    ...     Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=4) as table,
    ...     Channel.create(1 << 16) as channel,
    ...     SteadyWriter(table, channel) as writer,
    ...     RingEvents(channel, timer_s=0.001) as strategy,
    ... ):
    ...     replica = strategy.attach(table)
    ...     writer.write(6, per_second=1_000_000)
    ...     [int(version) for version in strategy.poll(1)["version"]]
    [1, 1, 1, 1, 2, 2]
    """

    def __init__(self, table: Map, channel: Channel) -> None:
        if table.kind != MapKind.ARRAY or table.value_dtype != np.dtype("u8"):
            raise BadInput(f"This writer wants an array of u8, not {table!r}.")
        with self._opening() as opened:
            control = opened.enter_context(
                Map.create(
                    MapKind.ARRAY, key="u4", value=CONTROL, max_entries=1, flags=MapFlag.MMAPABLE
                )
            )
            self.control = np.frombuffer(mmap.mmap(control.fd, mmap.PAGESIZE), CONTROL, count=1)
            unit = opened.enter_context(
                programs.load(
                    "steady_writer",
                    TABLE_FD=table.fd,
                    RING_FD=channel.ring.fd,
                    COUNTS_FD=channel.counts.fd,
                    CONTROL_FD=control.fd,
                    KEYS=table.max_entries,
                    BURST=_BURST,
                )
            )
            self._program = unit.program("write_due")

    def write(self, changes: int, *, per_second: int, start_ns: int | None = None) -> None:
        """Write evenly, on the CPU of this thread.

        Parameters
        ----------
        changes : int
            How many.
        per_second : int
            Their rate; what the CPU cannot reach is written as fast as it can.
        start_ns : int, optional
            When the first one is due, CLOCK_MONOTONIC; now, if left out.

        Raises
        ------
        BadInput
            No change, or no rate.
        TimedOut
            The writer fell ten seconds behind the schedule.
        """
        if changes < 1 or per_second < 1:
            raise BadInput("A steady writer makes at least one change, and one a second.")
        control = self.control[0]
        begin = time.monotonic_ns() if start_ns is None else start_ns
        control["done"] = 0
        control["per_second"], control["start_ns"] = per_second, begin
        control["limit"] = changes
        deadline = begin + changes * 1_000_000_000 // per_second + _LATE_NS
        while control["done"] < changes:
            self._program.test_run(repeat=_RUNS)
            if time.monotonic_ns() > deadline:
                raise TimedOut("The writer fell ten seconds behind: the machine is overloaded.")
