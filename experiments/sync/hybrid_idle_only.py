"""The article's hybrid, which pulls only when the stream idles: what it makes of lost events."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import TimedOut
from labkit.figures import Axes, style
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, another_cpu, shared_array
from labkit.lab.experiment import Case, Counted, Statement, experiment
from labkit.load.event_writer import EventWriter, updates
from labkit.load.workload import keys_behind, seen_at, undisturbed
from labkit.runs import Run
from labkit.sync.changes import Changes
from labkit.sync.hybrid import Hybrid
from labkit.sync.ring_events import Channel

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


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw how many of the lost changes the copy lacked, by the time since the stream began."""
    ax = style.axes(ax)
    timeline, rounds = run.table("timeline"), run.table("rounds")
    timeline, rounds = timeline[timeline["round"] == 0], rounds[rounds["round"] == 0]
    for case, of in timeline.groupby("case", sort=False):
        look = style.VARIANT[str(of["variant"].iloc[0])]
        ax.plot(of["at_ns"] / 1e9, of["missing"], color=look.color, ls=look.linestyle,
                label=run.label(str(case)))  # fmt: skip
    busy = float(rounds.loc[rounds["case"] == "idle-only", "busy_ns"].iloc[0])
    ax.axvspan(0, busy / 1e9, color=style.GREY, alpha=0.15, lw=0)
    ax.text(busy / 2e9, ax.get_ylim()[1] * 0.97, "the stream is busy", ha="center", va="top",
            fontsize=6.5, color=style.GREY)  # fmt: skip
    ax.set_ylabel("lost changes still missing")
    ax.set_xlabel("since the stream began (s)", loc="right")
    style.legend_above(ax, fontsize=6.5)
    return ax


@experiment(
    "hybrid-idle-only",
    number=52,
    family="sync",
    question="How long is a copy wrong that is read anew only when the stream idles?",
    claims=("4.4",),
    needs=("bpf", "compile", "test_run", "two_cpus", "hash", "batch_hash", "ringbuf",
           "mmapable_array"),
    quick={"rate": 10_000, "seconds": 1.5, "idle_s": 0.75, "lose_every": 100, "rounds": 1},
    full={"rate": 10_000, "seconds": 6.0, "idle_s": 1.0, "lose_every": 100, "rounds": 7},
    cases=(
        Case("broken", "idle-only", "pull when idle, events lost", follower=_idle_only),
        Case("control", "none-lost", "pull when idle, none lost", follower=_idle_only,
             loses=False),
        Case("fixed", "on-loss", "pull when a loss shows, events lost", follower=_on_loss),
    ),
    counted=Counted("change still missing", operations="early", anomalies="early_missing"),
    statements=(
        Statement("produced = delivered + dropped + coalesced",
                  "all(0 < rounds.produced == rounds.delivered + rounds.dropped "
                  "+ rounds.coalesced)"),
        Statement("the known share was lost",
                  'all(rounds(case=("idle-only", "on-loss")).written - parameters.lose_every '
                  '< parameters.lose_every * rounds(case=("idle-only", "on-loss")).dropped '
                  '<= rounds(case=("idle-only", "on-loss")).written) '
                  'and all(rounds(case=("idle-only", "on-loss")).dropped > 0)'),
        Statement("and nothing beside it",
                  'all(rounds(case="none-lost").dropped == 0 '
                  '< rounds(case="none-lost").delivered)'),
        Statement("an idle pull comes only while the writer pauses, or the stream has ended",
                  'all(rounds(case="idle-only").resyncs_busy <= rounds(case="idle-only").pauses)'
                  ' and all(rounds(case="idle-only").resyncs_busy '
                  '< rounds(case="idle-only").resyncs)'),
        Statement("so what was lost is missing for as long as the stream is busy", "some(broken)"),
        Statement("and at its end all of it",
                  'all(0 < rounds(case="idle-only").lost == rounds(case="idle-only").lost_at_end)'),
        Statement("without losses nothing is missing", "none(control)"),
        Statement("nor with a pull when a loss shows", "none(fixed)"),
        Statement("which keeps from growing what is missing at a time",
                  'all(rounds(case="on-loss").missing_most '
                  '< rounds(case="idle-only").missing_most)'),
    ),
    sentence="One event of {parameters.lose_every} was lost in a stream that was busy for "
    '{ms(median(rounds(case="idle-only").busy_ns))}, with a pull after {parameters.idle_s} s '
    "without an event (the article's 5 s, scaled down with the stream): {broken} changes of its "
    "first half were still missing when it ended, the oldest for "
    '{ms(max(rounds(case="idle-only").oldest_ns))}, and '
    '{median(rounds(case="idle-only").missing_most)} in all. With a pull as soon as a loss shows '
    '{fixed} were, {median(rounds(case="on-loss").missing_most)} at a time at most, the oldest for '
    '{ms(median(rounds(case="on-loss").oldest_ns))}.',
    figure=_figure,
)  # fmt: skip
def hybrid_idle_only(
    case: Case, *, rate: int, seconds: float, idle_s: float, lose_every: int
) -> dict[str, Any]:
    """Write steadily, lose a known share of the events, then stop, and watch the copy.

    The program that writes counts every so many-th event as dropped in place of sending it, as
    it would if the ring were full at that moment. Each key is written once, so that no later
    event heals what was lost.

    Parameters
    ----------
    case : Case
        Follower, and whether events are lost.
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

    Returns
    -------
    dict
        ``early``: writes of the first half of the busy stretch; ``early_missing``: those whose
        version the replica still had not when it had taken the last event. The stretch is the
        whole stream, unless the machine kept the writer from its CPU for half the threshold:
        then it is what came after. ``written``, ``produced``, ``delivered``, ``dropped``,
        ``coalesced``, ``repaired``, ``pauses`` (such ones of the writer), ``resyncs_busy`` (while
        the stream was), ``resyncs`` (in all), ``lost`` and ``lost_at_end`` (in the stretch:
        changes without an event, and those that were missing then), ``missing_most`` (changes
        without an event that were missing at one time), ``busy_ns``, ``healed_ns`` (from the last
        write until the replica equalled the map), ``oldest_ns`` (longest that a write was not
        seen). ``timeline``, a DataFrame: ``at_ns`` from the first write on, ``missing`` (as
        above).
    """
    with ExitStack() as stack:
        channel = stack.enter_context(Channel.create(_RING_BYTES))
        strategy = stack.enter_context(case.follower(channel, idle_s))
        every = lose_every if case.get("loses", True) else 0
        row, timeline = _watch(stack, channel, strategy, rate, seconds, idle_s, every)
    return {**row, "timeline": timeline}


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
