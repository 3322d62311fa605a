"""A writer that cooperates: a kernel program that goes through a script and emits each change.

It is the example of how a program tells followers what it did (bpf/change_event.h), and the
load of tests and benchmarks: the schedule is open loop, and what was done stands beside it.
"""

from __future__ import annotations

import mmap
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput, TimedOut
from labkit.kernel import programs
from labkit.kernel.closing import Holding
from labkit.kernel.libbpf import MapFlag, MapKind
from labkit.kernel.maps import Map
from labkit.kernel.ringbuf import wakeup_constants
from labkit.sync.changes import ChangeKind
from labkit.sync.ring_events import Channel

OPERATION = np.dtype(
    [
        ("key", "u8"),
        ("version", "u8"),
        ("due_ns", "u8"),
        ("start_ns", "u8"),
        ("end_ns", "u8"),
        ("kind", "u4"),
        ("outcome", "i4"),
        ("unread", "u4"),
        ("dropped", "u4"),
    ]
)
"""One operation of a script: key; version; due_ns after the start (0: at once); kind
(`labkit.sync.changes.ChangeKind`). The writer fills in start_ns and end_ns, CLOCK_MONOTONIC, and
outcome, 0 or -errno; one that is ``watched`` also how many bytes in the ring nobody had read by
then (``bpf_ringbuf_query``), and how many of its changes had been dropped."""

CONTROL = np.dtype(
    [
        ("done", "u8"),
        ("limit", "u8"),
        ("start_ns", "u8"),
        ("at", "u8"),
        ("round", "u8"),
        ("round_ns", "u8"),
        ("round_versions", "u8"),
    ]
)
"""``struct control`` of bpf/event_writer.bpf.c."""

_BURST = 8  # operations of one program run at most
_RUNS = 2_000  # program runs between two reads of the clock: some 0.1 ms
_LATE_NS = 10_000_000_000


class EventWriter(Holding):
    """The program of bpf/event_writer.bpf.c, bound to a map, a channel and a script.

    Parameters
    ----------
    table : Map
        Keys of 8 bytes; values of 8 to 1024 bytes, every word of which becomes the version.
    channel : Channel
        Ring and counters.
    script : numpy.ndarray
        Rows of `OPERATION`. The writer goes round and round in it.
    round_versions : int
        What every round adds to all versions.
    round_ns : int
        Length of one round's schedule, nanoseconds.
    program : int
        Number of this program among those that share the channel, from 0 on.
    wakeup : str
        When the follower is woken: one of `labkit.kernel.ringbuf.WAKEUPS`.
    wakeup_at : int
        Records (``every-n``) or unread bytes (``adaptive``).
    watched : bool
        Note the ring's fill and the drops beside each operation.
    lose_every : int
        Every so many-th event is not emitted but counted as dropped, as if the ring were full;
        0: none.
    locked : bool
        The table is that of bpf/locked_table.bpf.c: add 1 to the version in the map, under the
        value's lock, and put it into the script. So several writers may race for one key.

    Attributes
    ----------
    script : numpy.ndarray
        The script as it stands in the kernel, live: operations done have their times.
    control : numpy.ndarray
        One row of `CONTROL`, live: the writer's progress. Both stay as they are when it is closed.

    Raises
    ------
    BadInput
        The map or the script does not fit.

    Examples
    --------
    >>> from labkit.sync.ring_events import RingEvents
    >>> script = updates(keys=4, rounds=3)
    >>> with (
    ...     Map.create(MapKind.HASH, key="u8", value="u8", max_entries=8) as table,
    ...     Channel.create(1 << 16) as channel,
    ...     EventWriter(table, channel, script) as writer,
    ...     RingEvents(channel) as strategy,
    ... ):
    ...     replica = strategy.attach(table)
    ...     writer.write(12)
    ...     [int(version) for version in strategy.poll(1)["version"]]
    [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    """

    def __init__(
        self,
        table: Map,
        channel: Channel,
        script: npt.NDArray[Any],
        *,
        round_versions: int = 0,
        round_ns: int = 0,
        program: int = 0,
        wakeup: str = "default",
        wakeup_at: int = 1,
        watched: bool = False,
        lose_every: int = 0,
        locked: bool = False,
    ) -> None:
        if table.key_size != 8 or table.value_size % 8 or not 8 <= table.value_size <= 1024:
            raise BadInput(
                f"This writer wants keys of 8 bytes and values of 8 to 1024 bytes, whole words; "
                f"{table!r} has {table.key_size} and {table.value_size}."
            )
        if script.dtype != OPERATION or len(script) == 0:
            raise BadInput("A script is a non-empty array of dtype OPERATION.")
        if not 0 <= program < channel.counts.max_entries:
            raise BadInput(
                f"The channel counts for {channel.counts.max_entries} programs: number {program} "
                "is none of them."
            )
        constants = {**wakeup_constants(wakeup, wakeup_at), "BURST": _BURST}
        if lose_every < 0:
            raise BadInput(f"lose_every is a number of events, not {lose_every}.")
        options = {"LOCKED": int(locked), "WATCHED": int(watched), "LOSE_EVERY": lose_every}
        constants |= {name: number for name, number in options.items() if number}
        self._maps: list[Map] = []
        with self._opening() as opened:
            self.script = self._shared(OPERATION, len(script))
            self.control = self._shared(CONTROL, 1)
            self.script[:] = script
            self.control["round_ns"], self.control["round_versions"] = round_ns, round_versions
            unit = opened.enter_context(
                programs.load(
                    "event_writer",
                    TABLE_FD=table.fd,
                    RING_FD=channel.ring.fd,
                    COUNTS_FD=channel.counts.fd,
                    SCRIPT_FD=self._maps[0].fd,
                    CONTROL_FD=self._maps[1].fd,
                    SCRIPT_OPERATIONS=len(script),
                    VALUE_WORDS=table.value_size // 8,
                    PROGRAM=program,
                    **constants,
                )
            )
            self._program = unit.program("write_next")

    def _shared(self, dtype: np.dtype[Any], rows: int) -> npt.NDArray[Any]:
        """An array map, and its memory in ours, which goes with the last view of it."""
        made = self._open.enter_context(
            Map.create(
                MapKind.ARRAY, key="u4", value=dtype, max_entries=rows, flags=MapFlag.MMAPABLE
            )
        )
        self._maps.append(made)
        size = -(-rows * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        return np.frombuffer(mmap.mmap(made.fd, size), dtype, count=rows)

    @property
    def done(self) -> int:
        """Operations so far, refused ones included."""
        return int(self.control["done"][0])

    def write(self, operations: int, *, start_ns: int | None = None) -> None:
        """Go on with the script, on the CPU of this thread.

        Parameters
        ----------
        operations : int
            How many; those that are due at once run at the kernel's speed.
        start_ns : int, optional
            When the schedule of the script's first round began, CLOCK_MONOTONIC; now, if left
            out.

        Raises
        ------
        TimedOut
            The writer fell ten seconds behind the schedule.
        """
        control, size = self.control[0], len(self.script)
        control["start_ns"] = time.monotonic_ns() if start_ns is None else start_ns
        last = self.done + operations - 1
        control["limit"] = last + 1
        due_ns = last // size * int(control["round_ns"]) + int(self.script["due_ns"][last % size])
        deadline = max(time.monotonic_ns(), int(control["start_ns"]) + due_ns) + _LATE_NS
        while self.done < control["limit"]:
            scheduled = bool(self.script["due_ns"][int(control["at"])])
            self._program.test_run(repeat=_RUNS if scheduled else -(-operations // _BURST))
            if time.monotonic_ns() > deadline:
                raise TimedOut("The writer fell ten seconds behind: the machine is overloaded.")

    def stop(self) -> None:
        """End a `write` that another process, forked after this writer was made, is in."""
        self.control["limit"] = 0


def updates(
    keys: int, rounds: int, *, per_second: float = 0.0, first_version: int = 1
) -> npt.NDArray[Any]:
    """Script that writes every key once a round.

    Parameters
    ----------
    keys : int
        Keys from 0 on.
    rounds : int
        The first writes ``first_version``, each further one the next version.
    per_second : float
        Evenly spaced writes; 0: all at once.
    first_version : int
        At least 1.

    Returns
    -------
    numpy.ndarray
        Rows of `OPERATION`, shape ``(keys * rounds,)``.
    """
    script = np.zeros(keys * rounds, OPERATION)
    place = np.arange(len(script))
    script["key"], script["version"] = place % keys, first_version + place // keys
    script["kind"] = ChangeKind.UPDATE
    if per_second > 0:
        script["due_ns"] = 1 + place * 1e9 / per_second
    return script
