"""The strategies' own speed against its bars: ``python -m labkit bench sync``.

How it is run and judged: :mod:`labkit.lab.bench` and :mod:`experiments.bench.sync_bars`. What
the strategies are to each other in use is another question: the experiment sync-benchmark.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.bench import sync_bars as bars
from experiments.bench.peers import MOST_EVENTS, Peer, Told, policies, running
from labkit.errors import LabError
from labkit.judge.statistics import percentiles
from labkit.kernel import probe, programs
from labkit.kernel.closing import Closing
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import another_cpu
from labkit.kernel.provenance import provenance, usage, usage_since
from labkit.kernel.ringbuf import RingReader, slot_bytes
from labkit.lab import bench
from labkit.lab.driver import in_turns
from labkit.lab.experiment import say
from labkit.load.workload import QUIET_S, Load, Stream, median_ns, since
from labkit.runs import Run, Triad
from labkit.sync.changes import ChangeKind, Changes, change_dtype, event_dtype
from labkit.sync.poll import Poll
from labkit.sync.replica import Replica
from labkit.sync.ring_events import COUNTS, Channel, RingEvents
from labkit.sync.strategy import Stats, Strategy

PROFILES: Final[dict[str, dict[str, Any]]] = {
    "quick": {
        "rate": 100_000, "seconds": 1.0, "keys": 200, "rounds": 5,
        "rates": [1_000, 10_000, 100_000], "beside_s": 0.3, "beside_rounds": 7,
        "unjudged_rounds": 2,
        "search_ring_bytes": 1 << 23, "search_rings": 4, "replica_keys": 1_000_000,
        "batch": 16_384, "applied": 1_000_000,
    },
    "full": {
        "rate": 100_000, "seconds": 4.0, "keys": 200, "rounds": 11,
        "rates": [1_000, 10_000, 100_000, 1_000_000], "beside_s": 1.0, "beside_rounds": 11,
        "unjudged_rounds": 6,
        "search_ring_bytes": 1 << 23, "search_rings": 8, "replica_keys": 1_000_000,
        "batch": 16_384, "applied": 4_000_000,
    },
}  # fmt: skip

TIMER_S: Final = 0.001
"""At the highest rates nobody needs to be woken, and the writer need not see to it: all followers
look by this timer."""

_EVENT: Final = event_dtype("u4", "u8")
POLICIES: Final = policies(slot_bytes(event_dtype("u8", "u8").itemsize))[:-1]
"""Of a follower that sleeps: one that spins takes a CPU whatever it is written in."""
_WARM_UP: Final = 0.1  # of a schedule
_FIRST_RATE: Final = 500_000.0
_STEP: Final = 1.5  # between two rates until the limit lies between them
_NEAR: Final = 1.08  # and then so near
_IN_TIME: Final = 0.97  # of the rate that was asked for: else the writer is the limit
_HIGHEST: Final = 50_000_000.0


# -- followers on bcc's callback -----------------------------------------------------------------


class CallbackRing(Closing):
    """A ring of change events that is read by bcc's callback; a context manager.

    Parameters
    ----------
    ring_bytes : int
        Its size; a power of two and whole pages.
    way : str
        One of `bars.BCC`: what the callback does for each event.

    Attributes
    ----------
    channel : Channel
        The ring, and counters for one program.
    """

    def __init__(self, ring_bytes: int, way: str) -> None:
        self._open = ExitStack()
        self._rows: list[tuple[int, ...]] = []
        self._raw: list[bytes] = []
        try:
            unit = self._open.enter_context(
                programs.load_by_bcc("change_ring", PAGES=ring_bytes // os.sysconf("SC_PAGE_SIZE"))
            )
            table = unit.table("events")
            counts = Map.create(
                MapKind.PERCPU_ARRAY, key="u4", value=COUNTS, max_entries=1, name="counts"
            )
            self.channel = self._open.enter_context(Channel(unit.map("events"), counts))
            self._bpf = table.bpf
            table.open_ring_buffer(self._callback(way, table))
        except BaseException:
            self.close()
            raise

    def _callback(self, way: str, table: Any) -> Callable[[Any, int, int], int]:
        append, keep = self._rows.append, self._raw.append
        pointer, cast, copy = ctypes.POINTER(_Event), ctypes.cast, ctypes.string_at

        def by_event(context: Any, data: int, size: int) -> int:
            e = table.event(data)
            append((e.seq, e.version, e.committed_ns, e.kind, e.program, e.cpu, e.dropped,
                    e.key, e.value))  # fmt: skip
            return 0

        def by_cast(context: Any, data: int, size: int) -> int:
            e = cast(data, pointer).contents
            append((e.seq, e.version, e.committed_ns, e.kind, e.program, e.cpu, e.dropped,
                    e.key, e.value))  # fmt: skip
            return 0

        def by_copy(context: Any, data: int, size: int) -> int:
            keep(copy(data, size))
            return 0

        return dict(zip(bars.BCC, (by_event, by_cast, by_copy), strict=True))[way]

    def take(self) -> npt.NDArray[Any]:
        """Take all that is in the ring, by ``BPF.ring_buffer_consume``."""
        self._bpf.ring_buffer_consume()
        if self._raw:
            events = np.frombuffer(bytearray(b"".join(self._raw)), _EVENT)
        else:
            events = np.array(self._rows, _EVENT)
        self._rows.clear()
        self._raw.clear()
        return events

    def close(self) -> None:
        """Free ring and program; safe to call twice."""
        self._open.close()


class _Event(ctypes.Structure):
    _fields_ = [
        ("seq", ctypes.c_ulonglong), ("version", ctypes.c_ulonglong),
        ("committed_ns", ctypes.c_ulonglong), ("kind", ctypes.c_ubyte),
        ("program", ctypes.c_ubyte), ("cpu", ctypes.c_ushort), ("dropped", ctypes.c_uint),
        ("key", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_ulonglong),
    ]  # fmt: skip


class CallbackEvents(RingEvents):
    """Ring events, read by bcc's callback; everything else is the strategy's own.

    Parameters
    ----------
    ring : CallbackRing
        Where the events come from; it stays the caller's.
    """

    def __init__(self, ring: CallbackRing) -> None:
        super().__init__(ring.channel, timer_s=TIMER_S)
        self._ring = ring

    def _native_follow(self, reader: RingReader) -> None:
        """Compiled code would read the ring past the callback."""

    def _read(self, room: int) -> npt.NDArray[Any]:
        return self._ring.take()


# -- followers in other programs -----------------------------------------------------------------


class PeerEvents(Strategy):
    """Has another program follow: it reads the ring and keeps the replica, and we look on.

    Parameters
    ----------
    channel : Channel
        What the writer writes to; it stays the caller's.
    peer : Peer
        The program; it stays the caller's.
    timer_s : float
        Its longest sleep, seconds; 0: it never sleeps.

    Attributes
    ----------
    told : Told or None
        What the program says of itself, once `stats` has been asked for.
    """

    def __init__(self, channel: Channel, peer: Peer, timer_s: float) -> None:
        super().__init__()
        self._channel, self._peer, self._timer_us = channel, peer, round(1e6 * timer_s)
        self.told: Told | None = None
        self._running, self._seen = False, 0

    def _subscribe(self) -> None:
        self._before = self._count()
        self._peer.begin(f"take {self._channel.ring.id} {self._timer_us} replica")
        self._running = True

    def _unsubscribe(self) -> None:
        if self._running:
            self._running = False
            self._peer.stop()
            self.told = self._peer.answer()

    def _count(self) -> npt.NDArray[np.int64]:
        """Changes emitted and dropped so far."""
        counts = self._channel.counts.lookup(0)
        return np.array([counts["emitted"].sum(), counts["dropped"].sum()], np.int64)

    def _collect(self, deadline: float) -> Changes:
        """All changes at once, when no more come: to look at them costs its CPU."""
        time.sleep(max(0.0, deadline - time.monotonic()))
        before, self._seen = self._seen, self._peer.taken
        if self._seen > before or self._delivered == self._seen:
            return self._nothing()
        rows = self._peer.log()
        news = np.zeros(len(rows), self.replica.change_dtype)
        news["kind"], news["key"] = ChangeKind.UPDATE, rows["seq"]
        news["version"], news["seen_ns"] = rows["intended_ns"], rows["seen_ns"]
        self._delivered = len(news)
        return news

    @property
    def behind(self) -> bool:
        """Whether the program has still to take what the writer has emitted."""
        return bool((self._count() - self._before)[0] > self._peer.taken)

    def stats(self) -> Stats:
        """The writer's counters, and what the program says that it took."""
        self._unsubscribe()
        assert self.told is not None
        emitted, dropped = (self._count() - self._before).tolist()
        return Stats(
            produced=emitted + dropped, delivered=self._delivered, dropped=dropped,
            coalesced=self.told.records - self._delivered,
        )  # fmt: skip


# -- measuring -----------------------------------------------------------------------------------


def path(rate: int, seconds: float, keys: int, rounds: int) -> pd.DataFrame:
    """Follow one load by events and by a poll, in turns.

    Parameters
    ----------
    rate : int
        Intended changes per second, of values of 8 bytes.
    seconds : float
        Length of a schedule; its first tenth is not judged.
    keys : int
        Written in turns.
    rounds : int
        Repetitions.

    Returns
    -------
    DataFrame
        One row per strategy and repetition: ``strategy``, ``repetition``, ``operations``,
        ``delivered``, ``dropped``, ``unseen``, ``p50_ns`` and ``p99_ns`` of the latency from the
        intended time on, ``late_p50_ns`` and ``late_p99_ns`` of the writer behind its schedule,
        ``follower_cpu`` (CPUs).

    Raises
    ------
    LabError
        The account does not add up.
    """
    followers: dict[str, Callable[[Channel], Strategy]] = {
        bars.EVENTS: lambda channel: RingEvents(channel, gather_s=bars.HAND_OUT_S),
        bars.POLL: lambda channel: Poll(0.01),
    }
    rows, points = [], (50.0, 99.0)
    with Load(
        8, keys=keys, most_operations=round(rate * seconds), ring_bytes=4 << 20
    ) as load:  # fmt: skip
        for turn, name in in_turns(list(followers), rounds):
            with followers[name](load.channel) as strategy:
                trace = load.run(strategy, rate=rate, seconds=seconds)
            _require_account(name, len(trace), trace.stats)
            judged = np.arange(len(trace)) >= _WARM_UP * len(trace)
            seen = trace.seen_ns > 0
            latency = since(trace.seen_ns, trace.intended_ns)[judged & seen]
            late = since(trace.start_ns, trace.intended_ns)[judged]
            rows.append((
                name, turn, len(trace), trace.stats.delivered, trace.stats.dropped,
                int((~seen).sum()), *percentiles(latency, points), *percentiles(late, points),
                trace.follower_cpu_ns / trace.follower_wall_ns,
            ))  # fmt: skip
            say(f"path: {len(rows)} of {len(followers) * rounds} measured")
    columns = [
        "strategy", "repetition", "operations", "delivered", "dropped", "unseen", "p50_ns",
        "p99_ns", "late_p50_ns", "late_p99_ns", "follower_cpu",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def beside(
    rates: tuple[int, ...], seconds: float, keys: int, rounds: int, unjudged: int
) -> pd.DataFrame:
    """Follow one load by our events, by libbpf in C and by cilium/ebpf in Go, in turns.

    Each keeps a replica: ours, a hash table, a Go map. The latency of a change ends when it stands
    there.

    Parameters
    ----------
    rates : tuple of int
        Intended changes per second, of values of 8 bytes.
    seconds : float
        Length of a schedule; its first tenth is not judged. `MOST_EVENTS` at most.
    keys : int
        Written in turns.
    rounds, unjudged : int
        Repetitions with the wakeup policy that the bars judge, and with each other one.

    Returns
    -------
    DataFrame
        One row per wakeup policy, rate, follower and repetition: ``policy``, ``rate``,
        ``follower``, ``repetition``, ``operations``, ``delivered``, ``dropped``, ``unseen``,
        ``p50_ns``, ``p99_ns`` and ``p999_ns`` of the latency from the intended time on (NaN where
        the samples are too few), ``late_p99_ns`` of the writer behind its schedule, ``cpu_ns``
        (CPU time of the follower for a change). Always operations = delivered + dropped. Without
        the rows of Go where this machine cannot build its follower.

    Raises
    ------
    LabError
        The account does not add up.
    """
    rows, points = [], (50.0, 99.0, 99.9)
    most = min(round(max(rates) * seconds), MOST_EVENTS)
    with ExitStack() as opened:
        peers = {
            peer.name: peer for peer in opened.enter_context(running(cpu=another_cpu(1), room=most))
        }
        loads = {
            policy.name: opened.enter_context(
                Load(
                    8, wakeup=policy.wakeup, wakeup_at=policy.wakeup_at, keys=keys,
                    most_operations=most, ring_bytes=4 << 20,
                )
            )
            for policy in POLICIES
        }  # fmt: skip
        pairs = [(policy, rate) for policy in POLICIES for rate in rates]
        # Followers of one policy and rate stand side by side: other load meets them alike.
        cells = [
            (turn, policy, rate, name)
            for place, (turn, (policy, rate)) in enumerate(in_turns(pairs, max(rounds, unjudged)))
            if turn < (rounds if policy.name == bars.JUDGED else unjudged)
            for _, name in in_turns([bars.OURS_BESIDE, *peers], 1, seed=place)
        ]
        for done, (turn, policy, rate, name) in enumerate(cells):
            if done % 10 == 0:
                say(f"beside C and Go: {done} of {len(cells)} measured")
            load = loads[policy.name]
            timer_s = min(policy.timer_s, QUIET_S)  # ours is asked so often by the load
            follower: Strategy
            if name in peers:
                follower = PeerEvents(load.channel, peers[name], timer_s)
            else:
                follower = RingEvents(load.channel, timer_s=timer_s, gather_s=bars.HAND_OUT_S)
            with follower:
                trace = load.run(follower, rate=rate, seconds=seconds)
            _require_account(name, len(trace), trace.stats)
            told = follower.told if isinstance(follower, PeerEvents) else None
            cpu_ns = told.cpu_ns if told else trace.follower_cpu_ns
            judged = np.arange(len(trace)) >= _WARM_UP * len(trace)
            seen = trace.seen_ns > 0
            latency = since(trace.seen_ns, trace.intended_ns)[judged & seen]
            late = since(trace.start_ns, trace.intended_ns)[judged]
            rows.append((
                policy.name, rate, name, turn, len(trace), trace.stats.delivered,
                trace.stats.dropped, int((~seen).sum()), *percentiles(latency, points, beyond=1),
                float(np.percentile(late, 99)), cpu_ns / max(1, trace.stats.delivered),
            ))  # fmt: skip
    columns = [
        "policy", "rate", "follower", "repetition", "operations", "delivered", "dropped", "unseen",
        "p50_ns", "p99_ns", "p999_ns", "late_p99_ns", "cpu_ns",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


@dataclass(frozen=True)
class Trial:
    """One schedule at one rate: what was asked for, what the writer reached, and what was lost."""

    rate: float
    achieved: float
    operations: int
    dropped: int

    @property
    def lossless(self) -> bool:
        """Whether nothing was dropped."""
        return self.dropped == 0

    @property
    def by_writer(self) -> bool:
        """Whether the writer could not go as fast as it was asked to."""
        return self.achieved < _IN_TIME * self.rate


def highest(attempt: Callable[[float], Trial], first: float) -> tuple[Trial, list[Trial]]:
    """Search the highest rate without a drop.

    From a first guess, up or down by half until one rate is without a drop and the next one is
    not, then between the two until they are 8 % apart. A rate has drops if two attempts had: one
    may be a stall of the machine. A rate that the writer does not reach ends the search: then the
    writer is the limit, and not the follower.

    Parameters
    ----------
    attempt : callable
        Gets a rate, changes per second; answers what came of it.
    first : float
        Where to begin.

    Returns
    -------
    tuple of (Trial, list of Trial)
        The fastest one without a drop, by the rate that was achieved, and all in their order.

    Raises
    ------
    LabError
        Events were dropped at 1 change per second.
    """
    tried: list[Trial] = []
    good, bad, rate = 0.0, _HIGHEST, first
    while bad > _NEAR * good:
        tried.append(trial := attempt(rate))
        if not trial.lossless:
            tried.append(trial := attempt(rate))
        if not trial.lossless:
            bad = min(rate, trial.achieved / _IN_TIME)
        elif trial.by_writer:
            break
        else:
            good = rate
        if good == 0.0:
            rate = bad / _STEP
        elif bad == _HIGHEST:
            rate = good * _STEP
        else:
            rate = float(np.sqrt(good * bad))
        if rate < 1:
            raise LabError("Events are dropped at any rate: the follower does not follow.")
    lossless = [trial for trial in tried if trial.lossless]
    return max(lossless, key=lambda trial: trial.achieved), tried


def sustained(
    ring_bytes: int, rings: int, keys: int, rounds: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Search the highest rate without a drop of the event follower, by the way it reads the ring.

    Parameters
    ----------
    ring_bytes : int
        Size of the ring.
    rings : int
        Each schedule fills so many rings: what a ring can hide for a while does not last.
    keys : int
        Written in turns.
    rounds : int
        Searches of each way, in turns; each begins where the last one ended.

    Returns
    -------
    best : DataFrame
        One row per way and repetition: ``way``, ``repetition``, ``rate`` (changes per second that
        the writer achieved), ``by_writer`` (the writer, not the follower, was the limit).
    trials : DataFrame
        Every schedule: ``way``, ``repetition``, ``rate``, ``achieved``, ``operations``,
        ``dropped``.

    Raises
    ------
    LabError
        An account does not add up.
    """
    operations = rings * ring_bytes // slot_bytes(_EVENT.itemsize)
    best, trials = [], []
    guess: dict[str, float] = {}
    with ExitStack() as opened:
        streams: dict[str, tuple[Stream, Callable[[], Strategy]]] = {}
        ours = opened.enter_context(Stream(keys=keys, ring_bytes=ring_bytes))
        streams[bars.OURS] = ours, lambda: RingEvents(ours.channel, timer_s=TIMER_S)
        for way in bars.BCC:
            ring = opened.enter_context(CallbackRing(ring_bytes, way))
            stream = opened.enter_context(
                Stream(keys=keys, ring_bytes=ring_bytes, channel=ring.channel)
            )
            streams[way] = stream, lambda ring=ring: CallbackEvents(ring)  # type: ignore[misc]
        for turn, way in in_turns(list(streams), rounds):
            attempt = partial(_attempt, way, *streams[way], operations)
            found, tried = highest(attempt, guess.get(way, _FIRST_RATE))
            guess[way] = found.rate
            best.append((way, turn, found.achieved, found.by_writer))
            trials += [(way, turn, t.rate, t.achieved, t.operations, t.dropped) for t in tried]
            say(f"sustained: {len(best)} of {len(streams) * rounds} searches done")
    return (
        pd.DataFrame(best, columns=["way", "repetition", "rate", "by_writer"]),
        pd.DataFrame(
            trials, columns=["way", "repetition", "rate", "achieved", "operations", "dropped"]
        ),
    )


def _attempt(
    way: str, stream: Stream, follower: Callable[[], Strategy], operations: int, rate: float
) -> Trial:
    with follower() as strategy:
        flow = stream.run(strategy, rate=rate, changes=operations)
    _require_account(way, operations, flow.stats)
    return Trial(rate, flow.rate, operations, flow.stats.dropped)


def replica(keys: int, batch: int, applied: int, rounds: int) -> pd.DataFrame:
    """Time the bootstrap of a large replica, and the changes that it takes.

    Parameters
    ----------
    keys : int
        In the map, a hash of 8-byte values.
    batch : int
        Changes that are applied at once, of random keys.
    applied : int
        Changes in all, per repetition.
    rounds : int
        Repetitions, in turns; one more, the first, warms up and is not counted.

    Returns
    -------
    DataFrame
        One row per way and repetition: ``way``, ``repetition``, ``things`` (keys or changes),
        ``ns``.

    Raises
    ------
    LabError
        The replica did not become what was written.
    """
    rng = np.random.default_rng(0)
    rows: list[tuple[str, int, int, int]] = []
    version = 1
    with Map.create(MapKind.HASH, key="u8", value="u8", max_entries=keys) as table:
        names = np.arange(keys, dtype=np.uint64)
        table.update_many(names, np.ones(keys, np.uint64))
        copy = Replica(table)
        copy.load(table.snapshot(), started_ns=time.monotonic_ns())
        for turn, way in in_turns([bars.READ, bars.BOOTSTRAP, bars.APPLY], rounds + 1):
            if way == bars.APPLY:
                changes = np.zeros(batch, change_dtype("u8", "u8"))
                changes["kind"] = ChangeKind.UPDATE
                spent = done = 0
                while done < applied:
                    version += 1
                    changes["key"] = rng.integers(0, keys, batch)
                    changes["version"] = changes["value"] = version
                    changes["committed_ns"] = time.monotonic_ns()
                    begun = time.monotonic_ns()
                    copy.apply(changes)
                    spent += time.monotonic_ns() - begun
                    done += batch
                    last = copy.get(changes["key"][-1])
                    if last is None or last.version != version:
                        raise LabError("The replica did not take the newest change.")
                rows.append((way, turn, done, spent))
                continue
            found, ns = _read(table) if way == bars.READ else _bootstrap(table)
            if found != keys:
                raise LabError(f"{way} found {found:,} of {keys:,} keys.")
            rows.append((way, turn, keys, ns))
            say(f"replica: {len(rows)} of {3 * (rounds + 1)} measured")
    measured = pd.DataFrame(rows, columns=["way", "repetition", "things", "ns"])
    return measured[measured["repetition"] > 0].reset_index(drop=True)


def _read(table: Map) -> tuple[int, int]:
    begun = time.monotonic_ns()
    taken = table.snapshot()
    return len(taken), time.monotonic_ns() - begun


def _bootstrap(table: Map) -> tuple[int, int]:
    """Its memory is free again for the next one: a machine may make new memory very slowly."""
    begun = time.monotonic_ns()
    with Poll() as strategy:
        made = strategy.attach(table)
        return len(made), time.monotonic_ns() - begun


def floor(rounds: int) -> pd.DataFrame:
    """What the harness takes for nothing.

    Parameters
    ----------
    rounds : int
        Repetitions.

    Returns
    -------
    DataFrame
        One row for each: ``what`` (two looks at the clock; a poll of events that finds none),
        ``repetition``, ``ns`` (median).
    """
    with (
        Map.create(MapKind.HASH, key="u8", value="u8", max_entries=1) as table,
        Channel.create(1 << 16) as channel,
        RingEvents(channel) as events,
    ):
        table.update(0, 1)
        events.attach(table)
        calls: dict[str, Callable[[], object]] = {
            bars.CLOCK: lambda: None, bars.EMPTY_POLL: lambda: events.poll(0)
        }  # fmt: skip
        rows = [
            (what, turn, median_ns(calls[what])) for turn, what in in_turns(list(calls), rounds)
        ]
    return pd.DataFrame(rows, columns=["what", "repetition", "ns"])


def measure(profile: str) -> Run:
    """Measure everything here and now, in this process.

    Parameters
    ----------
    profile : str
        ``quick`` or ``full``.

    Returns
    -------
    Run
        Not saved yet. Tables: ``path``, ``beside``, ``sustained``, ``trials``, ``replica``,
        ``floor``, as the functions of this module return them, and ``counts`` with the versions
        that were not handed out (broken: the poll; control: events at the lowest rate that was
        tried; fixed: events at the rate of the first bar).

    Raises
    ------
    Unavailable
        The machine lacks something; the sentence says what.
    LabError
        An account does not add up.
    """
    probe.require(
        "bpf", "compile", "test_run", "two_cpus", "ringbuf", "hash", "batch_hash", "mmapable_array"
    )
    parameters = PROFILES[profile]
    facts, ticks, begun = provenance(), usage(), time.monotonic()
    facts["nice"] = bench.ahead_of_all()
    keys, rounds = parameters["keys"], parameters["rounds"]
    nothing = floor(rounds)
    followed = path(parameters["rate"], parameters["seconds"], keys, rounds)
    compared = beside(
        tuple(parameters["rates"]), parameters["beside_s"], keys, parameters["beside_rounds"],
        parameters["unjudged_rounds"],
    )  # fmt: skip
    best, trials = sustained(
        parameters["search_ring_bytes"], parameters["search_rings"], keys, rounds
    )
    copied = replica(parameters["replica_keys"], parameters["batch"], parameters["applied"], rounds)
    triad = Triad("version not handed out")
    ours = trials[trials["way"] == bars.OURS]
    slowest = ours[ours["rate"] == ours["rate"].min()]
    triad.add(
        "control", case=bars.OURS, operations=int(slowest["operations"].sum()),
        anomalies=int(slowest["dropped"].sum()),
    )  # fmt: skip
    for variant, name in (("broken", bars.POLL), ("fixed", bars.EVENTS)):
        rows = followed[followed["strategy"] == name]
        triad.add(
            variant, case=name, operations=int(rows["operations"].sum()),
            anomalies=int((rows["operations"] - rows["delivered"]).clip(lower=0).sum()),
        )  # fmt: skip
    facts["duration_s"] = round(time.monotonic() - begun, 3)
    facts["during"] = usage_since(ticks)
    tables = {
        "counts": triad.table(), "path": followed, "beside": compared, "sustained": best,
        "trials": trials, "replica": copied, "floor": nothing,
    }  # fmt: skip
    return Run(bars.EXPERIMENT, profile, parameters, facts, tables)


def _require_account(name: str, written: int, stats: Stats) -> None:
    told = stats.delivered + stats.dropped + stats.coalesced
    if not written == stats.produced == told:
        raise LabError(
            f"{name}: {written:,} changes written, {stats.produced:,} counted and {told:,} "
            "accounted for."
        )


BENCHMARK: Final = bench.Benchmark(measure, bars.results, bars.judge)
