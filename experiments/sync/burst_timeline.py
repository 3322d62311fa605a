"""A burst past the ring's capacity: its fill, the drops, and what repairs them, over time."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import TimedOut
from labkit.figures import Axes, Figure, style
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
from labkit.sync.strategy import Strategy

_STREAM_KEYS = 50
_ROUND = 500  # writes of the stream between two times at which it may end
_POINTS = 400  # of a timeline
_WAIT_S = 0.02
_LIMIT_S = 20.0
_TITLES = {"broken": "events alone", "control": "larger ring", "fixed": "hybrid"}


def _events_alone(channel: Channel) -> Strategy:
    """Events and nothing else: what was dropped is known, and never repaired."""
    return Hybrid(channel, on_loss=False, pull_every_s=None, idle_s=1e6)


def _figure(run: Run) -> Figure:
    """Draw three axes over one axis of time for each variant: its first round.

    Above, how full the ring was; then the events that had found no room by then; below, how
    many keys of the burst the replica was behind with. Grey: the burst. A line from top to
    bottom: the keys of the burst are right, for good.
    """
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        3, 3, figsize=(2 * style.HALF_PAGE[0], 4.6), sharex=True, sharey="row"
    )
    rounds, timeline = run.table("rounds"), run.table("timeline")
    rounds = rounds[rounds["round"] == 0].set_index("variant")
    facts: dict[Any, dict[Any, float]] = rounds.to_dict("index")
    # From the burst on: long enough for its repair, and as long again.
    until = 4 * float(np.nanmax(rounds["repaired_ns"] + rounds["burst_ns"])) / 1e6
    for column, (variant, words) in zip(grid.T, _TITLES.items(), strict=True):
        of = timeline[(timeline["variant"] == variant) & (timeline["round"] == 0)]
        burst, look = facts[variant], style.VARIANT[variant]
        at = of["at_ns"] / 1e6
        for ax, values in zip(
            column,
            (100 * of["unread_bytes"] / burst["ring_bytes"], of["dropped"], of["behind"]),
            strict=True,
        ):
            ax.plot(at, values, color=look.color, drawstyle="steps-post", lw=1)
            ax.axvspan(0, burst["burst_ns"] / 1e6, color=style.GREY, alpha=0.2, lw=0)
            if not np.isnan(burst["repaired_ns"]):
                ax.axvline(
                    (burst["burst_ns"] + burst["repaired_ns"]) / 1e6, color=style.BLACK, lw=0.8,
                    ls=":",
                )  # fmt: skip
        column[0].set_title(f"{variant}: {words}")
        _sign(column[2], int(burst["behind_at_end"]), burst["repaired_ns"] / 1e6)
        column[2].set_xlabel("since the burst began (ms)", loc="right")
        column[0].set_xlim(-until / 8, until)
    for ax, words in zip(
        grid[:, 0],
        ("unread (% of the ring)", "events dropped so far", "keys behind"),
        strict=True,
    ):
        ax.set_ylabel(words)
    grid[0, 0].set_ylim(0, 105)
    for row in grid[1:]:
        row[0].set_ylim(top=1.3 * row[0].get_ylim()[1])
        row[0].yaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
    return figure


def _sign(ax: Axes, behind: int, repaired_ms: float) -> None:
    words = (
        f"{behind:,} behind in the end"
        if np.isnan(repaired_ms)
        else f"all right {repaired_ms:,.0f} ms after the burst"
    )
    ax.text(0.98, 0.97, words, transform=ax.transAxes, ha="right", va="top", fontsize=6.5)


@experiment(
    "burst-timeline",
    number=51,
    family="sync",
    question="What happens in a ring that a burst overruns, and when is the copy right again?",
    claims=("4.4",),
    needs=("bpf", "compile", "test_run", "two_cpus", "hash", "batch_hash", "ringbuf",
           "mmapable_array"),
    quick={
        "burst": 20_000, "rate": 5_000, "after": 4, "rounds": 3,
        "ring_bytes": 1 << 15, "large_ring_bytes": 1 << 22,
    },
    full={
        "burst": 40_000, "rate": 5_000, "after": 6, "rounds": 20,
        "ring_bytes": 1 << 15, "large_ring_bytes": 1 << 22,
    },
    cases=(
        Case("broken", "events-alone", "events alone, burst past the ring",
             follower=_events_alone),
        Case("control", "large-ring", "events alone, burst fits", follower=_events_alone,
             fits=True),
        Case("fixed", "hybrid", "hybrid, burst past the ring", follower=Hybrid, repairs=True),
    ),
    counted=Counted("key behind", operations="keys", anomalies="behind_at_end"),
    statements=(
        Statement("produced = delivered + dropped + coalesced",
                  "all(0 < rounds.produced == rounds.delivered + rounds.dropped "
                  "+ rounds.coalesced)"),
        Statement("and is what was written", "all(0 < rounds.produced == rounds.written)"),
        Statement("the burst filled the ring",
                  'all(rounds(case=("events-alone", "hybrid")).fullest_bytes '
                  '> 0.9 * rounds(case=("events-alone", "hybrid")).ring_bytes)'),
        Statement("and events were dropped, with both followers",
                  'all(rounds(case=("events-alone", "hybrid")).dropped > 0)'),
        Statement("events alone never repair it: keys stay behind, one at most for each event that "
                  "was dropped",
                  'all(0 < rounds(case="events-alone").behind_at_end '
                  '<= rounds(case="events-alone").dropped)'),
        Statement("a follower that reads the map repairs all of it", "none(fixed)"),
        Statement("while the stream goes on", 'all(rounds(case="hybrid").left > 0)'),
        Statement("by reading the map, which the other one does not",
                  'all(rounds(case="hybrid").resyncs > 0) '
                  'and none(rounds(case="events-alone").resyncs > 0)'),
        Statement("a ring that holds the burst leaves no key behind", "none(control)"),
        Statement("and drops nothing",
                  'all(rounds(case="large-ring").dropped == 0 '
                  '< rounds(case="large-ring").delivered)'),
    ),
    sentence='A burst overran the ring: {sum(rounds(case="events-alone").dropped)} events of '
    '{sum(rounds(case="events-alone").written)} found no room, and {broken} keys stood at an old '
    "version until the stream ended, and after it. With a reading of the map the copy was right "
    '{ms(median(rounds(case="hybrid").repaired_ns))} after the burst (at most '
    '{ms(max(rounds(case="hybrid").repaired_ns))}), while the stream went on; one reading takes '
    '{ms(median(rounds(case="hybrid").read_ns))}. A ring that holds the burst dropped '
    '{sum(rounds(case="large-ring").dropped)}.',
    figure=_figure,
)  # fmt: skip
def burst_timeline(
    case: Case, *, burst: int, rate: int, after: int, ring_bytes: int, large_ring_bytes: int
) -> dict[str, Any]:
    """Write a steady stream, a burst in it, and the stream again, and watch ring and replica.

    The program that writes notes beside each operation what ``bpf_ringbuf_query`` tells of the
    ring and how many events found no room, so that what is drawn comes from the writer's own side.
    The burst has keys of its own, each written once: no later event heals them.

    Parameters
    ----------
    case : Case
        Follower, and whether the ring holds the burst.
    burst : int
        Writes at once, each of another key.
    rate : int
        Of the stream, writes per second.
    after : int
        The stream goes on for at least so many times 500 writes, and for as long as the follower
        has a repair before it.
    ring_bytes, large_ring_bytes : int
        A ring that is too small for the burst, and one that holds it.

    Returns
    -------
    dict
        ``ring_bytes``, ``keys`` (of the burst), ``written``, ``produced``, ``delivered``,
        ``dropped``, ``coalesced``, ``repaired``, ``resyncs``, ``fullest_bytes`` (most that was
        unread), ``behind_most`` (keys of the burst that the replica had not at their newest
        version), ``behind_at_end`` (when the stream ended), ``burst_ns`` (first to last write of
        it), ``repaired_ns`` (from the last write of the burst until its keys were right for good;
        NaN: never while the stream went on), ``left`` (writes of the stream after that),
        ``read_ns`` (one reading of the whole map). ``timeline``, a DataFrame: ``at_ns`` from the
        burst's first write on, ``unread_bytes``, ``dropped`` (so far), ``behind`` (keys of the
        burst).
    """
    size = large_ring_bytes if case.get("fits", False) else ring_bytes
    with ExitStack() as stack:
        stage = _Stage(stack, burst, rate, size)
        strategy = stack.enter_context(case.follower(stage.channel))
        row, timeline = _watch(stage, strategy, after, repairs=case.get("repairs", False))
    return {"ring_bytes": size, "keys": burst, **row, "timeline": timeline}


class _Stage:
    """The table with version 1 of all keys, the ring, and the two scripts that share them."""

    def __init__(self, stack: ExitStack, burst: int, rate: int, ring_bytes: int) -> None:
        self.keys = burst
        entries = burst + _STREAM_KEYS
        self.table = stack.enter_context(
            Map.create(MapKind.HASH, key="u8", value="u8", max_entries=entries, name="followed")
        )
        self.table.update_many(np.arange(entries, dtype=np.uint64), np.ones(entries, np.uint64))
        self.channel = stack.enter_context(Channel.create(ring_bytes, programs=2))
        stream = updates(_STREAM_KEYS, _ROUND // _STREAM_KEYS, per_second=rate, first_version=2)
        stream["key"] += burst
        self.stream = stack.enter_context(
            EventWriter(
                self.table, self.channel, stream, watched=True,
                round_versions=_ROUND // _STREAM_KEYS, round_ns=int(_ROUND / rate * 1e9),
            )
        )  # fmt: skip
        self.burst = stack.enter_context(
            EventWriter(
                self.table, self.channel, updates(burst, 1, first_version=2),
                program=1, watched=True,
            )
        )  # fmt: skip


def _watch(
    stage: _Stage, strategy: Strategy, after: int, *, repairs: bool
) -> tuple[dict[str, float], pd.DataFrame]:
    """What the writer noted, and what the follower had, by time."""
    strategy.attach(stage.table)
    begun = time.monotonic_ns()
    stage.table.snapshot()
    read_ns = time.monotonic_ns() - begun
    passed, enough = shared_array(1, np.int64), shared_array(1, np.int64)

    def write() -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
        start_ns, stream = time.monotonic_ns() + 1_000_000, []
        deadline = time.monotonic() + _LIMIT_S
        while not enough[0] and time.monotonic() < deadline:
            stage.stream.write(_ROUND, start_ns=start_ns)
            stream.append(stage.stream.script.copy())
            if len(stream) == 1:
                stage.burst.write(len(stage.burst.script))
            passed[0] += 1
        return np.concatenate(stream), stage.burst.script.copy()

    news: list[Changes] = []
    with undisturbed(), Child(write, cpu=another_cpu(0)) as child:
        os.sched_setaffinity(0, {another_cpu(1)})
        deadline, right_at = time.monotonic() + _LIMIT_S, 0
        while not child.ended():
            some = strategy.poll(_WAIT_S)
            if len(some):
                news.append(some)
            if repairs and strategy.behind:
                right_at = int(passed[0])
            # A whole turn of the stream after the repair, which thus is one in its middle.
            enough[0] = passed[0] > max(after, right_at + 1)
            if time.monotonic() > deadline:
                raise TimedOut("The stream of burst-timeline did not end.")
        stream, burst = child.result()
    while len(some := strategy.poll(_WAIT_S)) and time.monotonic() < deadline:
        news.append(some)
    return _figures(stage, strategy, stream, burst, news, read_ns)


def _figures(
    stage: _Stage,
    strategy: Strategy,
    stream: npt.NDArray[np.void],
    burst: npt.NDArray[np.void],
    news: list[Changes],
    read_ns: int,
) -> tuple[dict[str, float], pd.DataFrame]:
    ours = [some[some["key"] < stage.keys] for some in news]
    key, version, end_ns = burst["key"], burst["version"], burst["end_ns"]
    seen_ns = seen_at(ours, key, version, stage.keys, 2)
    first, last = int(burst["start_ns"].min()), int(end_ns.max())
    stream_end = int(stream["end_ns"].max())
    moments = _moments(stream["end_ns"], end_ns)
    behind = keys_behind(moments, key, end_ns, seen_ns)
    at_end = int(keys_behind(np.array([stream_end]), key, end_ns, seen_ns)[0])
    right = max(last, int(seen_ns.max()))
    stats = strategy.stats()
    row = {
        "written": len(stream) + len(burst),
        "produced": stats.produced,
        "delivered": stats.delivered,
        "dropped": stats.dropped,
        "coalesced": stats.coalesced,
        "repaired": stats.repaired,
        "resyncs": stats.resyncs,
        "fullest_bytes": int(max(stream["unread"].max(), burst["unread"].max())),
        "behind_most": int(behind.max()),
        "behind_at_end": at_end,
        "burst_ns": last - first,
        "repaired_ns": float("nan") if at_end else float(right - last),
        "left": 0 if at_end else int((stream["end_ns"] > right).sum()),
        "read_ns": read_ns,
    }
    both = np.concatenate([stream, burst])
    both = both[np.argsort(both["end_ns"])]
    place = np.searchsorted(both["end_ns"].astype(np.int64), moments, side="right") - 1
    # Each of the two programs counts its own.
    dropped = sum(
        np.append(0, one["dropped"])[
            np.searchsorted(one["end_ns"].astype(np.int64), moments, side="right")
        ].astype(np.int64)
        for one in (stream, burst)
    )
    timeline = pd.DataFrame(
        {
            "at_ns": moments - first,
            "unread_bytes": both["unread"][place].astype(np.int64),
            "dropped": dropped,
            "behind": behind,
        }
    )
    return row, timeline


def _moments(
    stream_ns: npt.NDArray[np.uint64], burst_ns: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """When operations ended: a sample of them, half of it in the burst."""
    return np.sort(
        np.concatenate(
            [
                some[np.linspace(0, len(some) - 1, min(len(some), _POINTS // 2)).astype(np.int64)]
                for some in (stream_ns, burst_ns)
            ]
        )
    ).astype(np.int64)
