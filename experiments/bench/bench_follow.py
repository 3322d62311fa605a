"""Followers under a steady load for long: ``python -m labkit soak-follow``.

Two maps are changed at a rate each, keys inserted, updated and deleted that come once and never
again: one by a kernel program that emits each change, one by a process that knows nobody and asks
for what the kernel refuses too. `RingEvents` follows the first, `TraceHook` and `Watch` the second,
each in a process of its own. What is judged: that the account is exact, that the replicas are the
maps in the end, and that no process grows (:mod:`experiments.bench.follow_bars`).
"""

from __future__ import annotations

import mmap
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.bench import follow_bars as bars
from labkit.errors import BadInput, LabError, TimedOut
from labkit.inspect.watch import Watch
from labkit.kernel import probe
from labkit.kernel.closing import Closing
from labkit.kernel.libbpf import MapKind, UpdateFlag
from labkit.kernel.maps import KeyExists, Map
from labkit.kernel.parallel import Child, shared_array
from labkit.kernel.provenance import provenance, usage, usage_since
from labkit.lab import bench
from labkit.lab.experiment import say
from labkit.load.event_writer import OPERATION, EventWriter
from labkit.runs import Run
from labkit.sync.changes import ChangeKind
from labkit.sync.ring_events import Channel, RingEvents
from labkit.sync.strategy import Strategy
from labkit.sync.trace_hook import TraceHook

PROFILES: Final[dict[str, dict[str, Any]]] = {
    "quick": {"rate": 100_000, "seconds": 20.0},
    "full": {"rate": 100_000, "seconds": 1800.0},
}

FIGURES: Final = (
    "ready", "produced", "delivered", "dropped", "coalesced", "refused", "found", "unread_bytes",
    "entries", "differs",
)  # fmt: skip
"""What a process says of itself, again and again: counts so far; how the ring stands; keys of the
replica, and of those how many were not as in the map in the end. A writer makes (``produced``)
changes and asks for some that are refused."""

SAMPLE: Final = np.dtype([(name, "i8") for name in FIGURES])
Said = npt.NDArray[np.void]
"""One row of `SAMPLE`, in memory that is shared."""
Phase = npt.NDArray[np.int64]
"""One element: `_WRITE` and so on, in memory that is shared."""

_WRITE, _STOP, _END = 1, 2, 3

_TICK_S: Final = 0.001
_GROUPS: Final = 25  # of four changes each that a tick makes at the most
_HELD: Final = 1_024  # keys that a map holds at any time
_SAMPLES: Final = 240
_SAID_EVERY: Final = 12  # samples
_TOLD_S: Final = 0.05  # from one word of a follower to its next
_READY_S: Final = 60.0
_MOST_STALL_S: Final = 3.0
_SETTLE_S: Final = 30.0
_RING_BYTES: Final = 1 << 22
_MOST_RATE: Final = 1_000_000


class _Turns:
    """What happens next: each group inserts a key, updates it and an older one, deletes an old one.

    Every key comes once, and versions grow with every change, so that each change is known.
    """

    def __init__(self) -> None:
        self._group = _HELD

    def next(self, groups: int) -> list[tuple[ChangeKind, npt.NDArray[np.uint64]]]:
        """The kinds of the changes in their order, and their keys."""
        new = np.arange(self._group, self._group + groups, dtype=np.uint64)
        self._group += groups
        update, delete = ChangeKind.UPDATE, ChangeKind.DELETE
        return [(update, new), (update, new), (update, new - _HELD // 2), (delete, new - _HELD)]


def _table(name: str) -> Map:
    """A map that holds the first keys."""
    made = Map.create(MapKind.HASH, key="u8", value="u8", max_entries=2 * _HELD, name=name)
    made.update_many(np.arange(_HELD, dtype=np.uint64), np.ones(_HELD, np.uint64))
    return made


class _Process(Closing):
    """One of the processes: what it says of itself, its memory, and its end."""

    def __init__(self, name: str, work: Callable[[Said], None]) -> None:
        self.name = name
        self.said = shared_array(1, SAMPLE)

        def alone() -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # our parent says when it is over
            work(self.said)

        self.child = Child(alone)

    def row(self) -> tuple[str, *tuple[int, ...]]:
        """Its name, and what it said last."""
        return (self.name, *map(int, self.said[0].item()))

    def resident_bytes(self) -> int:
        """What it has of the machine's memory now."""
        pages = int(Path(f"/proc/{self.child.pid}/statm").read_text().split()[1])
        return pages * mmap.PAGESIZE

    def close(self) -> None:
        """End it; safe to call twice."""
        self.child.close()


def _write_by_program(table: Map, channel: Channel, rate: int, phase: Phase, said: Said) -> None:
    script = np.zeros(4 * _GROUPS, OPERATION)
    turns = _Turns()
    with EventWriter(table, channel, script) as writer:

        def write() -> tuple[int, int]:
            for i, (kind, keys) in enumerate(turns.next(_GROUPS)):
                rows = writer.script[i * _GROUPS : (i + 1) * _GROUPS]
                rows["kind"], rows["key"] = kind, keys
            writer.script["version"] = 2 + writer.done + np.arange(len(script))
            writer.write(len(script))
            if writer.script["outcome"].any():
                raise LabError("The map refused a change of the program.")
            return len(script), 0

        _pace(write, rate, phase, said)


def _write_by_calls(table: Map, rate: int, phase: Phase, said: Said) -> None:
    turns, version = _Turns(), 2

    def write() -> tuple[int, int]:
        nonlocal version
        changes = turns.next(_GROUPS)
        for kind, keys in changes:
            if kind == ChangeKind.DELETE:
                table.delete_many(keys)
            else:
                table.update_many(keys, np.full(_GROUPS, version, np.uint64))
            version += 1
        try:
            table.update(changes[0][1][0], version, UpdateFlag.NOEXIST)
        except KeyExists:
            return 4 * _GROUPS, 1
        raise LabError("The map took what it has to refuse.")

    _pace(write, rate, phase, said)


def _pace(write: Callable[[], tuple[int, int]], rate: int, phase: Phase, said: Said) -> None:
    """Write at a rate, some at a time, until told to stop; who is late makes up for it."""
    said["ready"] = 1
    while not phase[0]:
        time.sleep(_TICK_S)
    begun, made, refused = time.monotonic(), 0, 0
    while phase[0] == _WRITE:
        due = (time.monotonic() - begun) * rate
        if made >= due:
            time.sleep(_TICK_S)
            continue
        changed, not_changed = write()
        made, refused = made + changed, refused + not_changed
        said["produced"], said["refused"] = made, refused


def _follow(strategy: Strategy, table: Map, phase: Phase, said: Said) -> None:
    """Follow until the writers have ended, and then for as long as anything comes."""

    def tell() -> bool:
        stats = strategy.stats()
        for name in ("produced", "delivered", "dropped", "coalesced", "unread_bytes"):
            said[name] = getattr(stats, name)
        said["entries"] = len(replica)
        told = stats.delivered + stats.dropped + stats.coalesced
        return stats.produced == told and not strategy.behind

    with strategy:
        replica = strategy.attach(table)
        _until_told(lambda: strategy.poll(_TOLD_S), tell, phase, said)
        said["differs"] = replica.differs(table.snapshot())


def _watch(table: Map, phase: Phase, said: Said) -> None:
    with Watch(table) as watch:

        def tell() -> bool:
            said["delivered"], said["refused"] = watch.seen, watch.refused
            said["dropped"], said["found"] = watch.dropped, watch.found
            return True

        _until_told(lambda: watch.poll(_TOLD_S), tell, phase, said)
        watch.end()
        tell()


def _until_told(
    poll: Callable[[], Any],
    tell: Callable[[], bool],
    phase: Phase,
    said: Said,
) -> None:
    """Poll, and tell now and then; in the end until all is accounted for.

    At first it stalls until its ring has run over: so drops are a part of every account, and what
    memory a full ring takes is taken before memory is looked at.
    """
    poll()
    said["ready"] = 1
    while not phase[0]:
        time.sleep(_TICK_S)
    stalled = time.monotonic() + _MOST_STALL_S
    while not said["dropped"][0] and time.monotonic() < stalled:
        time.sleep(_TOLD_S)
        tell()
    told_at, ends = 0.0, np.inf
    while True:
        poll()
        now = time.monotonic()
        if phase[0] == _END:
            ends = min(ends, now + _SETTLE_S)
            if tell():
                return
            if now > ends:
                raise LabError("A follower did not come to rest.")
        elif now >= told_at:
            tell()
            told_at = now + _TOLD_S


def measure(profile: str, *, seconds: float | None = None, rate: int | None = None) -> Run:
    """Soak the followers, in processes of this one; SIGINT and SIGTERM end it early.

    Parameters
    ----------
    profile : str
        ``quick`` or ``full``.
    seconds : float, optional
        How long changes are made.
    rate : int, optional
        Changes per second of each of the two maps.

    Returns
    -------
    Run
        Not saved yet. ``samples``: one row for each process and moment: ``at_s``, ``rss_bytes``,
        ``process`` and `FIGURES`. ``accounts``: those of each process when all had ended.

    Raises
    ------
    Unavailable
        The machine lacks something; the sentence says what.
    BadInput
        The rate is none.
    LabError
        A process did not do its work.
    """
    given = {"seconds": seconds, "rate": rate}
    parameters = PROFILES[profile] | {name: one for name, one in given.items() if one is not None}
    rate, seconds = int(parameters["rate"]), float(parameters["seconds"])
    if not 0 < rate <= _MOST_RATE:
        raise BadInput(f"A rate is from 1 to {_MOST_RATE:,} changes per second, not {rate}.")
    probe.require("bpf", "compile", "test_run", "ringbuf", "hash", "batch_hash", "mmapable_array")
    facts, ticks = provenance(), usage()
    phase = shared_array(1, "i8")
    samples: list[tuple[Any, ...]] = []
    with ExitStack() as stack:
        interrupted = stack.enter_context(_interrupted())
        followers, writers = _started(stack, phase, rate)
        every = [*followers, *writers]
        _await(every, lambda: all(one.said["ready"][0] for one in every), _READY_S)
        begun = time.monotonic()
        phase[0] = _WRITE
        while (spent := time.monotonic() - begun) < seconds and not interrupted.is_set():
            samples += [(spent, one.resident_bytes(), *one.row()) for one in every]
            if len(samples) % (_SAID_EVERY * len(every)) == 0:
                made = sum(int(one.said["produced"][0]) for one in writers)
                say(f"{spent:,.0f} of {seconds:,.0f} s: {made:,} changes made")
            interrupted.wait(min(max(_TOLD_S, seconds / _SAMPLES), seconds - spent))
            _check(every)
        for after, ending in ((_STOP, writers), (_END, followers)):
            phase[0] = after
            for one in ending:
                one.child.result(2 * _SETTLE_S)
        accounts = [one.row() for one in every]
    facts["duration_s"] = round(time.monotonic() - begun, 3)
    facts["during"] = usage_since(ticks)
    tables = {
        "samples": pd.DataFrame(samples, columns=["at_s", "rss_bytes", "process", *FIGURES]),
        "accounts": pd.DataFrame(accounts, columns=["process", *FIGURES]),
    }
    return Run(bars.EXPERIMENT, profile, parameters, facts, tables)


@contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """What SIGINT and SIGTERM set, in place of ending us."""
    event = threading.Event()
    before = {number: signal.signal(number, lambda *_: event.set())
              for number in (signal.SIGINT, signal.SIGTERM)}  # fmt: skip
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _started(stack: ExitStack, phase: Phase, rate: int) -> tuple[list[_Process], list[_Process]]:
    """Followers and writers, each on its way to where it is ready."""
    ours, theirs = (stack.enter_context(_table(name)) for name in ("soak_ours", "soak_theirs"))
    channel = stack.enter_context(Channel.create(_RING_BYTES))
    following: dict[str, Callable[[Said], None]] = {
        bars.EVENTS: lambda said: _follow(RingEvents(channel), ours, phase, said),
        bars.HOOK: lambda said: _follow(TraceHook(ring_bytes=_RING_BYTES), theirs, phase, said),
        bars.WATCH: lambda said: _watch(theirs, phase, said),
    }
    writing: dict[str, Callable[[Said], None]] = {
        bars.PROGRAM: lambda said: _write_by_program(ours, channel, rate, phase, said),
        bars.CALLS: lambda said: _write_by_calls(theirs, rate, phase, said),
    }
    followers, writers = (
        [stack.enter_context(_Process(name, work)) for name, work in of.items()]
        for of in (following, writing)
    )
    return followers, writers


def _await(every: list[_Process], holds: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        _check(every)
        if time.monotonic() > deadline:
            raise TimedOut(f"The processes of the soak were not ready within {within_s:g} s.")
        time.sleep(_TICK_S)


def _check(every: list[_Process]) -> None:
    """None of them has ended, or the error that it ended with."""
    for one in every:
        if one.child.ended():
            one.child.result(_SETTLE_S)
            raise LabError(f"{one.name} ended before it was told to.")


BENCHMARK: Final = bench.Benchmark(measure, bars.results, bars.judge, apart=False)
