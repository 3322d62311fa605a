"""Judges experiment 31: a map tells nobody that it changed."""

from __future__ import annotations

import select

import pandas as pd

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_EDGES = "epoll, edges only"
_RING = "events"


@judges("no-notification")
def no_notification(run: Run) -> Finding:
    """A map's descriptor answers POLLERR at once, whatever happens; a ring waits and tells."""
    polls = run.table("polls")
    rings, edges = polls["map"] == _RING, polls["way"] == _EDGES
    levels, edge, ring = polls[~rings & ~edges], polls[~rings & edges], polls[rings]
    changed = levels[levels["changed"]]
    # The median: on a busy machine the change may come before a follower is on its CPU.
    early = changed.groupby("case")[["waited_ms", "change_ms"]].median()
    broken, control, fixed = run.count("broken"), run.count("control"), run.count("fixed")
    checks = (
        Check(
            "poll and epoll answer POLLERR on every kind of map, and nothing else",
            len(levels) > 0
            and bool((levels["events"] == select.POLLERR).all())
            and bool((levels["events_after"] == select.POLLERR).all()),
            f"{int((levels['events'] == select.POLLERR).sum()):,} of {len(levels):,} waits on "
            f"{levels['map'].nunique()} kinds, answers {_words(levels['events'])}",
        ),
        Check(
            "they answer before the change that the follower waits for",
            len(early) > 0 and bool((early["waited_ms"] < early["change_ms"]).all()),
            f"answered after {early['waited_ms'].max():.3f} ms, changed after "
            f"{early['change_ms'].min():.2f} ms (medians)",
        ),
        Check(
            "epoll for edges alone never answers: nothing wakes it",
            len(edge) > 0 and bool((edge["events"] == 0).all()),
            f"{int((edge['events'] != 0).sum())} of {len(edge)} waits answered",
        ),
        Check(
            "no answer on a map tells of a change",
            broken.anomalies == broken.operations > 0 and not levels["told"].any(),
            f"{broken} changes not told",
        ),
        Check(
            "a ring buffer keeps its follower waiting while nothing happens",
            control.operations > 0 and control.anomalies == 0,
            f"{control} waits answered",
        ),
        Check(
            "and wakes it for every event",
            fixed.operations > 0 and fixed.anomalies == 0 and bool(
                (ring.loc[ring["changed"], "events"] == select.POLLIN).all()
            ),
            f"{fixed} changes not told",
        ),
    )  # fmt: skip
    return Finding(
        run.experiment,
        f"poll and epoll on maps of {levels['map'].nunique()} kinds answered POLLERR in "
        f"{int((levels['events'] == select.POLLERR).sum()):,} of {len(levels):,} waits, changed "
        f"or not, after {1e3 * levels['waited_ms'].median():.0f} µs; they told of "
        f"{broken.operations - broken.anomalies} of {broken.operations:,} changes. A ring buffer "
        f"told of {fixed.operations - fixed.anomalies:,} of {fixed.operations:,}, "
        f"{fixed.cost_ns / 1e3:.0f} µs after the event, and woke nobody in "
        f"{control.operations - control.anomalies:,} of {control.operations:,} waits without one.",
        checks,
    )


def _words(events: pd.Series[int]) -> str:
    return ", ".join(f"{answer:#x}" for answer in sorted(events.unique()))
