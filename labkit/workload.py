"""Open-loop loads: a writer on its own CPU, by schedule, and a follower on another one.

A write is due at its intended time whether or not the one before it was in time, and its latency
counts from there: a writer or a follower that falls behind cannot hide it (wrk2, YCSB#731).
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput, TimedOut
from labkit.kernel import libbpf
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, ahead_of_others, another_cpu, shared_array
from labkit.kernel.ringbuf import RingReader
from labkit.sync.changes import Changes, event_dtype
from labkit.sync.event_writer import EventWriter, updates
from labkit.sync.ring_events import Channel
from labkit.sync.strategy import Stats, Strategy

_LEAD_NS = 3_000_000  # from the writer's word that it stands ready to its first write
_SETTLE_S = 10.0
_FLOOR_CALLS = 2_000
_QUIET_S = 0.015  # longer than the poll intervals and timers of the strategies that are compared

WRITERS = ("program", "process")
"""``program``: a kernel program that writes and emits events. ``process``: one that updates the
map by system calls, an update at a time, and tells nobody."""


@dataclass(frozen=True)
class Trace:
    """What one repetition was, operation by operation.

    Attributes
    ----------
    key, version, intended_ns, start_ns, end_ns : numpy.ndarray
        Of each write, shape (n,), uint64; times CLOCK_MONOTONIC.
    seen_ns : numpy.ndarray
        When the follower's replica first could return that version or a newer one, shape (n,),
        uint64; 0 where it never could.
    stats : Stats
        The follower's account, once it had come to rest.
    follower_cpu_ns, follower_wall_ns : int
        CPU and time that the follower took from the first write's intended time on until the
        writer was done.
    map_bytes, replica_bytes : int
        Kernel memory of the map and, where events are used, of ring and counters; the replica's
        key and value columns.
    """

    key: npt.NDArray[np.uint64]
    version: npt.NDArray[np.uint64]
    intended_ns: npt.NDArray[np.uint64]
    start_ns: npt.NDArray[np.uint64]
    end_ns: npt.NDArray[np.uint64]
    seen_ns: npt.NDArray[np.uint64]
    stats: Stats
    follower_cpu_ns: int
    follower_wall_ns: int
    map_bytes: int
    replica_bytes: int

    def __len__(self) -> int:
        return len(self.key)


class Load:
    """A map, a channel and a writer that can be run again and again; a context manager.

    Parameters
    ----------
    value_bytes : int
        8 to 1024, whole words; the first is the version.
    wakeup, wakeup_at
        As for `labkit.kernel.ringbuf.wakeup_constants`.
    keys : int
        Keys that are written in turns.
    most_operations : int
        The longest run that will be ordered.
    ring_bytes : int
        Size of the ring; a power of two and whole pages.
    channel : Channel, optional
        Use this one, which stays the caller's, instead of a ring of ``ring_bytes``.

    Raises
    ------
    BadInput
        The map or ring cannot be so.
    """

    def __init__(
        self,
        value_bytes: int,
        *,
        wakeup: str = "default",
        wakeup_at: int = 1,
        keys: int,
        most_operations: int,
        ring_bytes: int,
        channel: Channel | None = None,
    ) -> None:
        if value_bytes % 8 or not 8 <= value_bytes <= 1024:
            raise BadInput(f"A value has 8 to 1024 bytes, whole words, not {value_bytes}.")
        words = value_bytes // 8
        value: npt.DTypeLike = "u8"
        if words > 1:
            value = [("version", "u8"), ("rest", "u8", (words - 1,))]
        self._keys, self._version, self._most = keys, 1, most_operations
        self._open = ExitStack()
        try:
            self.table = self._open.enter_context(
                Map.create(MapKind.HASH, key="u8", value=value, max_entries=keys, name="followed")
            )
            self.channel = channel or self._open.enter_context(Channel.create(ring_bytes))
            rounds = -(-most_operations // keys)
            self._writer = self._open.enter_context(
                EventWriter(
                    self.table,
                    self.channel,
                    updates(keys, rounds),
                    wakeup=wakeup,
                    wakeup_at=wakeup_at,
                )
            )
            # Every key is there from the beginning, so that steps of versions count changes.
            self._level()
        except BaseException:
            self.close()
            raise

    def run(
        self, strategy: Strategy, *, rate: float, seconds: float, writer: str = "program"
    ) -> Trace:
        """Write at a rate, follow, and wait until the follower has come to rest.

        Parameters
        ----------
        strategy : Strategy
            Not attached yet.
        rate : float
            Intended writes per second, evenly spaced.
        seconds : float
            Length of the schedule; cut where it would exceed ``most_operations``.
        writer : str
            One of `WRITERS`.

        Raises
        ------
        BadInput
            No such writer, or a rate or time that is not above 0.
        TimedOut
            Writer or follower did not come to an end.
        """
        if writer not in WRITERS or not rate > 0 or not seconds > 0:
            raise BadInput(f"A load has a rate, a time and a writer of {', '.join(WRITERS)}.")
        script = self._writer.script
        count = min(self._most, max(1, round(rate * seconds)))
        place = np.arange(count)
        script["key"][:count] = place % self._keys
        script["version"][:count] = self._version + 1 + place // self._keys
        script["due_ns"][:count] = 1 + place * 1e9 / rate
        for name in ("done", "at", "round", "limit"):
            self._writer.control[name] = 0
        order = script[:count].copy()
        self._drain()
        replica = strategy.attach(self.table)
        start = shared_array(1, np.uint64)
        if writer == "program":
            progress = self._writer.control["done"]

            def write() -> None:
                start[0] = time.monotonic_ns() + _LEAD_NS
                self._writer.write(count, start_ns=int(start[0]))

        else:
            times = shared_array((count, 2), np.uint64)
            progress = shared_array(1, np.uint64)

            def write() -> None:
                start[0] = time.monotonic_ns() + _LEAD_NS + 200 * count  # for its preparations
                write_by_calls(self.table, order, order["due_ns"] + start[0], times, progress)

        with _undisturbed(), Child(write, cpu=another_cpu(0)) as child:
            os.sched_setaffinity(0, {another_cpu(1)})
            _await(lambda: int(start[0]) > 0, child)
            news, cpu_ns, wall_ns = _follow(strategy, lambda: int(progress[0]) >= count, child)
            child.result(_SETTLE_S)
        if writer == "program":
            order["start_ns"], order["end_ns"] = (
                script["start_ns"][:count],
                script["end_ns"][:count],
            )
        else:
            order["start_ns"], order["end_ns"] = times[:, 0], times[:, 1]
        seen = seen_at(news, order["key"], order["version"], self._keys, self._version + 1)
        stats = strategy.stats()
        self._version = int(order["version"].max())
        if count % self._keys:
            self._level()
        held = [self.table.fd]
        if stats.size_bytes is not None:
            held += [self.channel.ring.fd, self.channel.counts.fd]
        return Trace(
            key=order["key"],
            version=order["version"],
            intended_ns=order["due_ns"] + start[0],
            start_ns=order["start_ns"],
            end_ns=order["end_ns"],
            seen_ns=seen,
            stats=stats,
            follower_cpu_ns=cpu_ns,
            follower_wall_ns=wall_ns,
            map_bytes=sum(map(libbpf.map_memory, held)),
            replica_bytes=len(replica) * (8 + 8 + self.table.value_size),
        )

    def _drain(self) -> None:
        """Take away the events that a follower without a ring has left unread."""
        event = event_dtype(self.table.key_dtype, self.table.value_dtype)
        with RingReader(self.channel.ring, event, batch=4096) as reader:
            while len(reader.read()):
                pass

    def _level(self) -> None:
        """Bring all keys to one version, so that the next run's versions are steps of 1."""
        words = np.full((self._keys, self.table.value_size // 8), self._version, np.uint64)
        values = words.view(self.table.value_dtype)[:, 0]
        self.table.update_many(np.arange(self._keys, dtype=np.uint64), values)

    def close(self) -> None:
        """Free map, channel and writer; safe to call twice."""
        self._open.close()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def seen_at(
    news: list[Changes],
    key: npt.NDArray[np.uint64],
    version: npt.NDArray[np.uint64],
    keys: int,
    first_version: int,
) -> npt.NDArray[np.uint64]:
    """When each write, or a newer one of its key, was first seen.

    O(n), as versions of a key are steps of 1.

    Parameters
    ----------
    news : list of numpy.ndarray
        What the follower delivered: ``key``, ``version``, ``seen_ns``.
    key, version : numpy.ndarray
        Of the writes, shape (n,); keys from 0 on.
    keys : int
        How many keys there are.
    first_version : int
        The version of each key's first write.

    Returns
    -------
    numpy.ndarray
        uint64, shape (n,), CLOCK_MONOTONIC nanoseconds; 0 where it was never seen.
    """
    never = np.iinfo(np.uint64).max
    rounds = int(version.max()) - first_version + 1
    seen = np.full((rounds, keys), never, np.uint64)
    for changes in news:
        at = changes["version"].astype(np.int64) - first_version
        ours = at >= 0
        np.minimum.at(
            seen, (at[ours], changes["key"][ours].astype(np.int64)), changes["seen_ns"][ours]
        )
    seen = np.minimum.accumulate(seen[::-1], axis=0)[::-1]
    found = seen[version.astype(np.int64) - first_version, key.astype(np.int64)]
    found[found == never] = 0
    return found


def write_by_calls(
    table: Map,
    order: npt.NDArray[np.void],
    intended_ns: npt.NDArray[np.uint64],
    times: npt.NDArray[np.uint64],
    progress: npt.NDArray[np.uint64],
) -> None:
    """Update a map by one system call per write, each at its intended time.

    Parameters
    ----------
    table : Map
        Keys from 0 on.
    order : numpy.ndarray
        Rows with ``key`` and ``version``.
    intended_ns : numpy.ndarray
        When, CLOCK_MONOTONIC; times that have passed are made up for at once.
    times : numpy.ndarray
        Shape (n, 2), filled in: before and after each call.
    progress : numpy.ndarray
        Its first element becomes the number of writes done, at the end.
    """
    value = np.zeros(table.value_size // 8, np.uint64)
    raw = value.view(np.uint8)
    update = [table.updater(key, raw) for key in range(int(order["key"].max()) + 1)]
    clock = time.monotonic_ns
    rows = zip(order["key"].tolist(), order["version"].tolist(), intended_ns.tolist(), strict=True)
    before, after = [0] * len(order), [0] * len(order)
    for i, (key, version, due) in enumerate(rows):
        value[:] = version
        now = clock()
        while now < due:
            now = clock()
        before[i] = now
        if update[key]() < 0:
            raise BadInput("The map refused an update of a key that it holds.")
        after[i] = clock()
    times[:, 0], times[:, 1] = before, after
    progress[0] = len(order)


def since(later: npt.NDArray[np.uint64], earlier: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Nanoseconds from one moment to another one, which may be before it."""
    return later.astype(np.int64) - earlier.astype(np.int64)


def median_ns(call: Callable[[], object]) -> float:
    """What a call takes with a look at the clock on both sides: the harness's floor for it, ns."""
    clock, taken = time.monotonic_ns, []
    for _ in range(_FLOOR_CALLS):
        begun = clock()
        call()
        taken.append(clock() - begun)
    return float(np.median(taken))


def _await(ready: Callable[[], bool], child: Child) -> None:
    deadline = time.monotonic() + _SETTLE_S
    while not ready():
        if child.ended():
            child.result(0.1)  # it says why
        if time.monotonic() > deadline:
            raise TimedOut("The writer did not begin.")
        time.sleep(0.0005)


def _follow(
    strategy: Strategy, done: Callable[[], bool], child: Child
) -> tuple[list[Changes], int, int]:
    """Poll until the writer is done and nothing more comes; what came, CPU and time till then."""
    news: list[Changes] = []
    cpu, wall = time.thread_time_ns(), time.monotonic_ns()
    while not done():
        if child.ended() and not done():
            child.result(0.1)  # it says why
        some = strategy.poll(_QUIET_S)
        if len(some):
            news.append(some)
    spent = time.thread_time_ns() - cpu, time.monotonic_ns() - wall
    deadline, quiet = time.monotonic() + _SETTLE_S, 0
    while quiet < 2:
        if time.monotonic() > deadline:
            raise TimedOut("The follower did not come to rest after the last write.")
        some = strategy.poll(_QUIET_S)
        if len(some):
            news.append(some)
        quiet = 0 if len(some) or strategy.behind else quiet + 1
    return news, *spent


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No collection of garbage meanwhile, our share of the CPUs, and our CPUs back in the end."""
    usual, collecting = os.sched_getaffinity(0), gc.isenabled()
    gc.disable()
    try:
        with ahead_of_others():
            yield
    finally:
        os.sched_setaffinity(0, usual)
        if collecting:
            gc.enable()
