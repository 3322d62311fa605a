"""The article's hybrid, which pulls only when the stream idles: what it makes of lost events."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import TimedOut
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, another_cpu, shared_array
from labkit.sync.changes import Changes
from labkit.sync.event_writer import EventWriter, updates
from labkit.sync.hybrid import Hybrid
from labkit.sync.ring_events import Channel
from labkit.workload import keys_behind, seen_at, undisturbed

_RING_BYTES = 1 << 22
_PIECE = 200  # writes
_POINTS = 600  # of a timeline
_WAIT_S = 0.02
_LIMIT_S = 20.0  # beside the stream and the idle time


def _idle_only(channel: Channel, idle_s: float) -> Hybrid:
    """The article's: events, and a pull when none came for so long."""
    return Hybrid(channel, idle_s=idle_s, pull_every_s=None, on_loss=False)


def _on_loss(channel: Channel, idle_s: float) -> Hybrid:
    """Ours: a pull also when a counter moves or a number is missing."""
    return Hybrid(channel, idle_s=idle_s, pull_every_s=None)


_WAYS = (
    ("broken", "pull when idle, events lost", _idle_only, True),
    ("control", "pull when idle, none lost", _idle_only, False),
    ("fixed", "pull when a loss shows, events lost", _on_loss, True),
)


@experiment(
    "hybrid-idle-only",
    number=52,
    family="sync",
    question="How long is a copy wrong that is read anew only when the stream idles?",
    claims=("4.4",),
    needs=("bpf", "compile", "test_run", "two_cpus", "hash", "batch_hash", "ringbuf",
           "mmapable_array"),
    quick={"rate": 10_000, "seconds": 3.0, "idle_s": 0.75, "lose_every": 100, "rounds": 1},
    full={"rate": 10_000, "seconds": 6.0, "idle_s": 1.0, "lose_every": 100, "rounds": 7},
)  # fmt: skip
def hybrid_idle_only(
    *, rate: int, seconds: float, idle_s: float, lose_every: int, rounds: int
) -> Tables:
    """Write steadily, lose a known share of the events, then stop, and watch the copy.

    The program that writes counts every so many-th event as dropped in place of sending it, as
    it would if the ring were full at that moment. Each key is written once, so that no later
    event heals what was lost.

    Parameters
    ----------
    rate : int
        Writes per second.
    seconds : float
        How long the stream is busy.
    idle_s : float
        The threshold: a pull comes when no event came for so long. The article has 5 s; it is
        shorter here, so that the run takes seconds, and the stream is busy for several times as
        long in either case.
    lose_every : int
        Every so many-th event is lost.
    rounds : int
        Repetitions of each variant, in turns.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a write of the first half of the busy stretch, an anomaly one
        whose version the replica still had not when it had taken the last event. The stretch is
        the whole stream, unless the machine kept the writer from its CPU for half the threshold:
        then it is what came after. ``streams``: one row per ``variant`` and ``round``:
        ``written``, ``produced``, ``delivered``, ``dropped``, ``coalesced``, ``repaired``,
        ``pauses`` (such ones of the writer), ``resyncs_busy`` (while the stream was),
        ``resyncs`` (in all), ``lost`` and ``lost_at_end`` (in the stretch: changes without an
        event, and those that were missing then), ``missing_most`` (changes without an event that
        were missing at one time), ``busy_ns``, ``healed_ns`` (from the last write until the
        replica equalled the map), ``oldest_ns`` (longest that a write was not seen).
        ``timeline``, of the first round: ``variant``, ``at_ns`` from the first write on,
        ``missing`` (as above).
    """
    rows, timelines = [], []
    for turn in range(rounds):
        for variant, _, follower, loses in _WAYS:
            say(f"round {turn + 1} of {rounds}, {variant}")
            with ExitStack() as stack:
                channel = stack.enter_context(Channel.create(_RING_BYTES))
                strategy = stack.enter_context(follower(channel, idle_s))
                row, timeline = _watch(
                    stack, channel, strategy, rate, seconds, idle_s, lose_every if loses else 0
                )
            rows.append({"variant": variant, "round": turn, **row})
            if turn == 0:
                timelines.append(timeline.assign(variant=variant))
    streams, triad = pd.DataFrame(rows), Triad("change still missing")
    for variant, case, _, _ in _WAYS:
        some = streams[streams["variant"] == variant]
        triad.add(
            variant, case=case, operations=int(some["early"].sum()),
            anomalies=int(some["early_missing"].sum()),
        )  # fmt: skip
    return {
        "counts": triad.table(),
        "streams": streams.drop(columns=["early", "early_missing"]),
        "timeline": pd.concat(timelines, ignore_index=True),
    }


def _watch(
    stack: ExitStack,
    channel: Channel,
    strategy: Hybrid,
    rate: int,
    seconds: float,
    idle_s: float,
    lose_every: int,
) -> tuple[dict[str, float], pd.DataFrame]:
    """One stream, its follower, and what became of both."""
    keys = round(rate * seconds)
    table = stack.enter_context(
        Map.create(MapKind.HASH, key="u8", value="u8", max_entries=keys, name="followed")
    )
    table.update_many(np.arange(keys, dtype=np.uint64), np.ones(keys, np.uint64))
    script = updates(keys, 1, per_second=rate, first_version=2)
    writer = stack.enter_context(EventWriter(table, channel, script, lose_every=lose_every))
    replica = strategy.attach(table)
    ended = shared_array(1, np.int64)

    def write() -> None:
        for first in range(0, keys, _PIECE):
            # Each piece has a schedule of its own: a writer that was kept from its CPU does not
            # make up for it in a rush, which nobody could follow.
            due_ns = int(script["due_ns"][first])
            writer.write(min(_PIECE, keys - first), start_ns=time.monotonic_ns() - due_ns)
        ended[0] = 1

    news: list[Changes] = []

    def follow() -> None:
        some = strategy.poll(_WAIT_S)
        if len(some):
            news.append(some)
        if time.monotonic() > deadline:
            raise TimedOut("The copy of hybrid-idle-only never became right.")

    with undisturbed(), Child(write, cpu=another_cpu(0)) as child:
        os.sched_setaffinity(0, {another_cpu(1)})
        deadline = time.monotonic() + seconds + idle_s + _LIMIT_S
        while not ended[0]:
            if child.ended():
                child.result(0.1)  # it says why
            follow()
        busy = strategy.stats().resyncs
        child.result(_LIMIT_S)
    while replica.differs(table.snapshot()):
        follow()
    return _figures(writer.script, strategy, news, busy, idle_s, lose_every)


def _figures(
    script: npt.NDArray[np.void],
    strategy: Hybrid,
    news: list[Changes],
    resyncs_busy: int,
    idle_s: float,
    lose_every: int,
) -> tuple[dict[str, float], pd.DataFrame]:
    key, end_ns = script["key"].copy(), script["end_ns"].copy()
    seen_ns = seen_at(news, key, script["version"], len(key), 2)
    begun, ended = int(script["start_ns"].min()), int(end_ns.max())
    until = max(ended, int(seen_ns.max()))
    place = np.arange(len(key))
    lost = place % lose_every == lose_every - 1 if lose_every else np.zeros(len(key), np.bool_)
    # When the follower has taken the last event, too: before that a change may be on its way.
    followed = max(ended, int(seen_ns[~lost].max()))
    moments = np.linspace(begun, until, _POINTS).astype(np.int64)
    missing = keys_behind(moments, key[lost], end_ns[lost], seen_ns[lost])
    pauses = np.flatnonzero(np.diff(end_ns.astype(np.int64)) > int(idle_s * 5e8))
    first = int(pauses[-1]) + 1 if len(pauses) else 0
    stretch = place >= first
    early = stretch & (place < first + (len(key) - first) // 2)
    stats = strategy.stats()
    row: dict[str, float] = {
        "written": len(key),
        "produced": stats.produced,
        "delivered": stats.delivered,
        "dropped": stats.dropped,
        "coalesced": stats.coalesced,
        "repaired": stats.repaired,
        "pauses": len(pauses),
        "resyncs_busy": resyncs_busy,
        "resyncs": stats.resyncs,
        "lost": int((lost & stretch).sum()),
        "lost_at_end": int((lost & stretch & (seen_ns > followed)).sum()),
        "missing_most": int(missing.max()),
        "busy_ns": ended - begun,
        "healed_ns": until - ended,
        "oldest_ns": int((seen_ns.astype(np.int64) - end_ns.astype(np.int64)).max()),
        "early": int(early.sum()),
        "early_missing": int((early & (seen_ns > followed)).sum()),
    }
    return row, pd.DataFrame({"at_ns": moments - begun, "missing": missing})
