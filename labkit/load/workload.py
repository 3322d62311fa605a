"""Open-loop loads: a writer on its own CPU, by schedule, and a follower on another one.

A write is due at its intended time whether or not the one before it was in time, and its latency
counts from there: a writer or a follower that falls behind cannot hide it (wrk2, YCSB#731).
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput, TimedOut
from labkit.kernel import libbpf
from labkit.kernel.closing import Holding
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, ahead_of_others, another_cpu, shared_array
from labkit.kernel.ringbuf import RingReader
from labkit.load.event_writer import EventWriter, updates
from labkit.load.steady_writer import SteadyWriter
from labkit.sync.changes import Changes, event_dtype
from labkit.sync.double_map import DoubleMap, DoubleMapWriter, Layout
from labkit.sync.ring_events import Channel
from labkit.sync.strategy import Stats, Strategy

_LEAD_NS = 3_000_000  # from the writer's word that it stands ready to its first write
_SETTLE_S = 10.0
_FLOOR_CALLS = 2_000
_NAP_NS = 300_000  # before a switch is due its writer is awake, as a sleep may end late
QUIET_S = 0.015  # longer than the poll intervals and timers of the strategies that are compared

WRITERS = ("program", "process", "batches")
"""``program``: a kernel program that writes and emits events. ``process``: one that updates the
map by system calls, an update at a time, and tells nobody. ``batches``: one that collects `BATCH`
changes before it makes a system call for them."""

BATCH = 50


@dataclass(frozen=True)
class Trace:
    """What one repetition was, operation by operation.

    Attributes
    ----------
    key, version, intended_ns, start_ns, end_ns : numpy.ndarray
        Of each write, shape (n,), uint64; times CLOCK_MONOTONIC. A write may be a whole
        generation (`Generations`): then its key is 0.
    seen_ns : numpy.ndarray
        When the follower's replica first could return that version or a newer one, shape (n,),
        uint64; 0 where it never could.
    stats : Stats
        The follower's account, once it had come to rest.
    follower_cpu_ns, follower_wall_ns : int
        CPU and time that the follower took from the first write's intended time on until the
        writer was done and the last change had come.
    map_bytes, replica_bytes : int
        Kernel memory of the map and, where events are used, of ring and counters; the replica's
        key and value columns. Of `Generations`: the outer map, and the two maps that there are
        at a switch.
    reads, mixed : int
        Calls of `Strategy.poll` that brought something, and those of them after which the
        replica had not all keys at one version, as somebody would have read it then.
    changes : int
        Changes that one write makes: 1, or the number of keys of a generation.
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
    reads: int
    mixed: int
    changes: int = 1

    def __len__(self) -> int:
        return len(self.key)


class Load(Holding):
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
        value = _value(value_bytes)
        self._keys, self._version, self._most = keys, 1, most_operations
        script = updates(keys, rounds=-(-most_operations // keys))
        with self._opening() as opened:
            self.table = opened.enter_context(
                Map.create(MapKind.HASH, key="u8", value=value, max_entries=keys, name="followed")
            )
            self.channel = channel or opened.enter_context(Channel.create(ring_bytes))
            writer = EventWriter(
                self.table, self.channel, script, wakeup=wakeup, wakeup_at=wakeup_at
            )
            self._writer = opened.enter_context(writer)

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
        # Before anybody follows, and not behind the last run, whose follower still did.
        self._level()
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
                by = write_by_calls if writer == "process" else write_by_batches
                by(self.table, order, order["due_ns"] + start[0], times, progress)

        news, cpu_ns, wall_ns = _followed(strategy, write, start, progress, count)
        if writer == "program":
            order["start_ns"], order["end_ns"] = (
                script["start_ns"][:count],
                script["end_ns"][:count],
            )
        else:
            order["start_ns"], order["end_ns"] = times[:, 0], times[:, 1]
        seen = seen_at(news, order["key"], order["version"], self._keys, self._version + 1)
        mixed = mixed_reads(news, self._keys, self._version)
        stats = strategy.stats()
        self._version = int(order["version"].max())
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
            reads=len(news),
            mixed=mixed,
        )

    def _drain(self) -> None:
        """Take away the events that a follower without a ring has left unread."""
        event = event_dtype(self.table.key_dtype, self.table.value_dtype)
        with RingReader(self.channel.ring, event, batch=4096) as reader:
            while len(reader.read()):
                pass

    def _level(self) -> None:
        """Bring all keys to one version: then steps of versions count the changes of a run."""
        versions = np.full(self._keys, self._version, np.uint64)
        self.table.update_many(
            np.arange(self._keys, dtype=np.uint64), _values(self.table, versions)
        )


class Generations(Holding):
    """A table that is published whole, and a process that publishes; a context manager.

    A write is a switch (`labkit.sync.double_map.DoubleMapWriter.publish`): it makes a map, fills
    it, puts it in the place of the old one and returns when the programs that may read that have
    ended. It changes every key. So a rate of changes is one of switches, times the number of keys;
    and as each waits for a grace period, some ten milliseconds, a writer reaches tens of switches
    a second and no more. What is asked beyond makes it late, which the trace tells.

    Parameters
    ----------
    value_bytes : int
        8 to 1024, whole words; the first is the version, which is the generation.
    keys : int
        Of every generation.

    Raises
    ------
    BadInput
        The map cannot be so.
    """

    def __init__(self, value_bytes: int, *, keys: int) -> None:
        self.layout = Layout("u8", _value(value_bytes), keys)
        self._keys = np.arange(keys, dtype=np.uint64)
        with self._opening() as opened:
            self.outer = opened.enter_context(self.layout.outer())
            self._writer = DoubleMapWriter(self.outer, self.layout)
            self._version = self._publish(0)

    def _publish(self, expected: int) -> int:
        words = np.full((len(self._keys), np.dtype(self.layout.value).itemsize // 8), expected + 1)
        values = words.astype(np.uint64).view(self.layout.value)[:, 0]
        return self._writer.publish(self._keys, values, expected=expected)

    def run(self, strategy: DoubleMap, *, rate: float, switches: int) -> Trace:
        """Publish at a rate, follow, and wait until the follower has come to rest.

        Parameters
        ----------
        strategy : DoubleMap
            Not attached yet.
        rate : float
            Intended changes per second: switches per second times the number of keys.
        switches : int
            How many, evenly spaced.

        Raises
        ------
        BadInput
            A rate or a number that is not above 0.
        TimedOut
            Writer or follower did not come to an end.
        """
        if not rate > 0 or switches < 1:
            raise BadInput("A load has a rate above 0, and at least one switch.")
        keys, before = len(self._keys), self._version
        due = np.arange(switches) * 1e9 * keys / rate
        start, progress = shared_array(1, np.uint64), shared_array(1, np.uint64)
        times = shared_array((switches, 2), np.uint64)
        replica = strategy.attach(self.outer)

        def write() -> None:
            start[0] = time.monotonic_ns() + _LEAD_NS
            for i, at in enumerate((due + int(start[0])).astype(np.int64).tolist()):
                while (left := at - time.monotonic_ns()) > 0:
                    if left > _NAP_NS:
                        time.sleep((left - _NAP_NS) / 1e9)
                times[i, 0] = time.monotonic_ns()
                self._publish(before + i)
                times[i, 1] = time.monotonic_ns()
            progress[0] = switches

        news, cpu_ns, wall_ns = _followed(strategy, write, start, progress, switches)
        self._version = before + switches
        version = np.arange(before + 1, self._version + 1, dtype=np.uint64)
        of_each = seen_at(
            news, np.tile(self._keys, switches), np.repeat(version, keys), keys, before + 1
        ).reshape(switches, keys)
        return Trace(
            key=np.zeros(switches, np.uint64),
            version=version,
            intended_ns=due.astype(np.uint64) + start[0],
            start_ns=times[:, 0],
            end_ns=times[:, 1],
            seen_ns=np.where((of_each > 0).all(axis=1), of_each.max(axis=1), 0).astype(np.uint64),
            stats=strategy.stats(),
            follower_cpu_ns=cpu_ns,
            follower_wall_ns=wall_ns,
            map_bytes=libbpf.map_memory(self.outer.fd) + 2 * libbpf.map_memory(strategy.table.fd),
            replica_bytes=len(replica) * (8 + 8 + strategy.table.value_size),
            reads=len(news),
            mixed=mixed_reads(news, keys, before),
            changes=keys,
        )


@dataclass(frozen=True)
class Flow:
    """What one run of a `Stream` was.

    Attributes
    ----------
    changes : int
        Written.
    span_ns : int
        From the intended time of the first to the end of the last.
    stats : Stats
        The follower's account, once it had come to rest.
    """

    changes: int
    span_ns: int
    stats: Stats

    @property
    def rate(self) -> float:
        """Changes per second that the writer reached."""
        return self.changes / self.span_ns * 1e9


class Stream(Holding):
    """An array map and the fastest writer there is; a context manager.

    A `Load` takes down the times of every change. Its writer spends most of its time on that, and
    ends before a follower of events does.

    Parameters
    ----------
    keys : int
        Elements, written in turns; values of 8 bytes.
    ring_bytes : int
        Size of the ring; a power of two and whole pages.
    channel : Channel, optional
        Use this one, which stays the caller's, instead of a ring of ``ring_bytes``.

    Raises
    ------
    BadInput
        The map or ring cannot be so.
    """

    def __init__(self, *, keys: int, ring_bytes: int, channel: Channel | None = None) -> None:
        with self._opening() as opened:
            self.table = opened.enter_context(
                Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=keys, name="followed")
            )
            self.channel = channel or opened.enter_context(Channel.create(ring_bytes))
            self._writer = opened.enter_context(SteadyWriter(self.table, self.channel))

    def run(self, strategy: Strategy, *, rate: float, changes: int) -> Flow:
        """Write at a rate, follow, and wait until the follower has come to rest.

        Parameters
        ----------
        strategy : Strategy
            Not attached yet.
        rate : float
            Intended changes per second, evenly spaced.
        changes : int
            How many.

        Raises
        ------
        BadInput
            A rate or a number below 1.
        TimedOut
            Writer or follower did not come to an end.
        """
        if not rate >= 1 or changes < 1:
            raise BadInput("A stream has a rate and a number of changes, both at least 1.")
        control, start = self._writer.control, shared_array(1, np.uint64)
        control["done"] = 0
        strategy.attach(self.table)

        def write() -> None:
            start[0] = time.monotonic_ns() + _LEAD_NS
            self._writer.write(changes, per_second=round(rate), start_ns=int(start[0]))

        _followed(strategy, write, start, control["done"], changes)
        return Flow(changes, int(control["end_ns"][0] - start[0]), strategy.stats())


def _value(value_bytes: int) -> npt.DTypeLike:
    """Layout of a value of so many bytes whose first word is its version."""
    if value_bytes % 8 or not 8 <= value_bytes <= 1024:
        raise BadInput(f"A value has 8 to 1024 bytes, whole words, not {value_bytes}.")
    if value_bytes == 8:
        return "u8"
    return [("version", "u8"), ("rest", "u8", (value_bytes // 8 - 1,))]


def _values(table: Map, versions: npt.NDArray[np.uint64]) -> npt.NDArray[Any]:
    """Values of these versions, every word of them the version."""
    words = np.repeat(versions, table.value_size // 8).reshape(len(versions), -1)
    values: npt.NDArray[Any] = words.view(table.value_dtype)[:, 0]
    return values


def mixed_reads(news: list[Changes], keys: int, version: int) -> int:
    """How often a read of the replica would have found keys at different versions.

    Parameters
    ----------
    news : list of numpy.ndarray
        What each call of `Strategy.poll` delivered: ``key`` (from 0 on) and ``version``.
    keys : int
        How many keys there are.
    version : int
        That of all keys before the first.

    Returns
    -------
    int
        At most ``len(news)``.
    """
    held, mixed = np.full(keys, version, np.uint64), 0
    for changes in news:
        held[changes["key"].astype(np.int64)] = changes["version"]  # the last one of a key stays
        mixed += int(held.min() != held.max())
    return mixed


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


def write_by_batches(
    table: Map,
    order: npt.NDArray[np.void],
    intended_ns: npt.NDArray[np.uint64],
    times: npt.NDArray[np.uint64],
    progress: npt.NDArray[np.uint64],
) -> None:
    """Update a map by one system call for `BATCH` writes, when the last of them is intended.

    Parameters
    ----------
    table, order, intended_ns, times, progress
        As for `write_by_calls`.
    """
    values, clock = _values(table, order["version"]), time.monotonic_ns
    for begin in range(0, len(order), BATCH):
        some = slice(begin, begin + BATCH)
        keys, due = order["key"][some], int(intended_ns[some][-1])
        while clock() < due:
            pass
        times[some, 0] = clock()
        table.update_many(keys, values[some])
        times[some, 1] = clock()
    progress[0] = len(order)


def since(later: npt.NDArray[np.uint64], earlier: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Nanoseconds from one moment to another one, which may be before it."""
    return later.astype(np.int64) - earlier.astype(np.int64)


def median_ns(call: Callable[[], object]) -> float:
    """What a call takes with a read of the clock on both sides: the harness's floor for it, ns."""
    clock, taken = time.monotonic_ns, []
    for _ in range(_FLOOR_CALLS):
        begun = clock()
        call()
        taken.append(clock() - begun)
    return float(np.median(taken))


def _followed(
    strategy: Strategy,
    write: Callable[[], None],
    start: npt.NDArray[np.uint64],
    progress: npt.NDArray[np.uint64],
    count: int,
) -> tuple[list[Changes], int, int]:
    """Write in a child, and follow until all is done and nothing more comes.

    The child sets ``start`` when it begins, and ``progress`` becomes ``count`` when it is done.
    Answers what came, and the CPU and time that it took.
    """
    with undisturbed(), Child(write, cpu=another_cpu(0)) as child:
        os.sched_setaffinity(0, {another_cpu(1)})
        deadline = time.monotonic() + _SETTLE_S
        while not start[0]:
            if child.ended():
                child.result(0.1)  # it says why
            if time.monotonic() > deadline:
                raise TimedOut("The writer did not begin.")
            time.sleep(0.0005)
        followed = _follow(strategy, lambda: int(progress[0]) >= count, child)
        child.result(_SETTLE_S)
    return followed


def _follow(
    strategy: Strategy, done: Callable[[], bool], child: Child
) -> tuple[list[Changes], int, int]:
    """Poll until the writer is done and nothing more comes; what came, CPU and time of it."""
    news: list[Changes] = []
    cpu, wall = time.thread_time_ns(), time.monotonic_ns()
    while not done():
        if child.ended() and not done():
            child.result(0.1)  # it says why
        some = strategy.poll(QUIET_S)
        if len(some):
            news.append(some)
    spent = time.thread_time_ns() - cpu, time.monotonic_ns() - wall
    deadline, quiet = time.monotonic() + _SETTLE_S, 0
    while quiet < 2:
        if time.monotonic() > deadline:
            raise TimedOut("The follower did not come to rest after the last write.")
        some = strategy.poll(QUIET_S)
        if len(some):
            news.append(some)
            # What it has still to do when the writer is done is its work as well.
            spent = time.thread_time_ns() - cpu, time.monotonic_ns() - wall
        quiet = 0 if len(some) or strategy.behind else quiet + 1
    return news, *spent


def keys_behind(
    moments: npt.NDArray[np.int64],
    key: npt.NDArray[np.uint64],
    end_ns: npt.NDArray[np.uint64],
    seen_ns: npt.NDArray[np.uint64],
) -> npt.NDArray[np.int64]:
    """How many keys a replica was behind with, at some moments.

    A key is behind from the commit of a version until that one, or a newer one, is seen.
    O(n log n).

    Parameters
    ----------
    moments : numpy.ndarray
        CLOCK_MONOTONIC nanoseconds, shape (m,), int64.
    key, end_ns, seen_ns : numpy.ndarray
        Of the writes, each key's in the order of its versions: when it was committed, and when it
        or a newer one was first seen (`seen_at`; 0: never).

    Returns
    -------
    numpy.ndarray
        int64, shape (m,).
    """
    never = np.iinfo(np.int64).max
    order = np.argsort(key, kind="stable")
    of, begin = key[order], end_ns[order].astype(np.int64)
    seen = seen_ns[order].astype(np.int64)
    seen[seen == 0] = never
    # With the next version begins the next version's own span.
    following = np.append(begin[1:], never)
    following[np.append(of[1:] != of[:-1], True)] = never
    end = np.maximum(begin, np.minimum(seen, following))
    begun = np.searchsorted(np.sort(begin), moments, side="right")
    ended = np.searchsorted(np.sort(end), moments, side="right")
    return begun - ended


@contextmanager
def undisturbed() -> Iterator[None]:
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
