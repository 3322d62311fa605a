"""The bars of the strategies' own speed, judged from tables that were written by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from experiments.bench import sync_bars
from experiments.bench.bench_sync import Trial, highest
from experiments.bench.sync_bars import (
    APPLY,
    BCC,
    BOOTSTRAP,
    CLOCK,
    EMPTY_POLL,
    EVENTS,
    OURS,
    POLL,
    READ,
)  # fmt: skip
from labkit import runs
from labkit.runs import BadRun, Run, Triad

TURNS = range(1, 6)


def made(
    *, dropped: int = 0, p99_us: float = 500, cpu: float = 0.3, ours: float = 4e6,
    bcc: float = 0.3e6, bootstrap_ms: float = 550, applied_ms: float = 500, floor_ns: float = 9_000,
) -> Run:  # fmt: skip
    """A run whose every repetition has the given figures; a poll takes all of 10 ms."""
    path = [
        (EVENTS, t, 100_000, 100_000 - dropped, dropped, 0, 2e5, 1e3 * p99_us, 50.0, 5e3, cpu)
        for t in TURNS
    ] + [(POLL, t, 100_000, 20_000, 0, 0, 5e6, 1e7, 50.0, 5e3, 0.05) for t in TURNS]
    rates = {OURS: ours, BCC[0]: bcc / 2, BCC[1]: bcc, BCC[2]: 2 * bcc}
    took = {READ: 300e6, BOOTSTRAP: 1e6 * bootstrap_ms, APPLY: 1e6 * applied_ms}
    triad = Triad("version not handed out")
    triad.add("broken", case=POLL, operations=500_000, anomalies=400_000)
    triad.add("control", case=OURS, operations=500_000, anomalies=0)
    triad.add("fixed", case=EVENTS, operations=500_000, anomalies=5 * dropped)
    return Run(
        "bench-sync",
        "quick",
        {"rate": 100_000, "replica_keys": 1_000_000},
        {"kernel": "6.1.0", "recorded_at": "2026-01-01T00:00:00+00:00"},
        {
            "counts": triad.table(),
            "path": pd.DataFrame(
                path,
                columns=["strategy", "repetition", "operations", "delivered", "dropped", "unseen",
                         "p50_ns", "p99_ns", "late_p50_ns", "late_p99_ns", "follower_cpu"],
            ),
            "sustained": pd.DataFrame(
                [(way, t, rate, way == OURS) for way, rate in rates.items() for t in TURNS],
                columns=["way", "repetition", "rate", "by_writer"],
            ),
            "trials": pd.DataFrame(
                [(OURS, 1, rate, rate, 500_000, 0) for rate in (5e5, 7.5e5)],
                columns=["way", "repetition", "rate", "achieved", "operations", "dropped"],
            ),
            "replica": pd.DataFrame(
                [(way, t, 1_000_000, ns) for way, ns in took.items() for t in TURNS],
                columns=["way", "repetition", "things", "ns"],
            ),
            "floor": pd.DataFrame(
                [(w, t, ns) for w, ns in ((CLOCK, 60.0), (EMPTY_POLL, floor_ns)) for t in TURNS],
                columns=["what", "repetition", "ns"],
            ),
        },
    )  # fmt: skip


def test_every_bar_holds_and_each_figure_is_one_line() -> None:
    run = made()
    finding = sync_bars.judge(run)
    assert finding.holds and len(finding.checks) == 7
    lines = [str(one) for one in sync_bars.results(run)]
    assert not any("\n" in line for line in lines)
    assert "follower of events, of one CPU: 30 % (30 to 30), bar at most 60, holds" in lines
    # The faster of the callbacks that reach the fields is the one to beat.
    assert any("against bcc's callback: 13.3 times" in line for line in lines)
    assert any("without a drop, where the writer ends, RingReader: 4 M" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dropped": 1}, "dropped of"),
        ({"p99_us": 1_001}, "p99 of events"),
        ({"cpu": 0.61}, "follower of events"),
        ({"bcc": 0.41e6}, "against bcc's callback"),
        ({"bootstrap_ms": 601}, "bootstrap of a replica"),
        ({"applied_ms": 1_001}, "applied"),
        ({"floor_ns": 10_001}, "harness floor"),
    ],
)
def test_each_bar_falls_short_by_itself(change: dict[str, float], named: str) -> None:
    run = made(**change)  # type: ignore[arg-type]
    short = [one for one in sync_bars.results(run) if one.holds is False]
    assert len(short) == 1 and named in short[0].name
    assert "falls short" in str(short[0])
    assert not sync_bars.judge(run).holds


@pytest.mark.parametrize(("variant", "named"), [("fixed", EVENTS), ("control", OURS)])
def test_counts_that_contradict_the_tables_are_refused(variant: str, named: str) -> None:
    run = made()
    run.counts.loc[run.counts["variant"] == variant, "anomalies"] = 1
    with pytest.raises(BadRun, match=f"counts of {named}"):
        sync_bars.judge(run)


@pytest.mark.parametrize("first", [1e3, 2e5, 1e7])
@pytest.mark.parametrize("follower", [3e4, 4e5, 2e6])
def test_the_search_finds_where_drops_begin(follower: float, first: float) -> None:
    def attempt(rate: float) -> Trial:
        return Trial(rate, rate, 100, dropped=int(rate > follower))

    found, tried = highest(attempt, first)
    assert follower / 1.08 <= found.achieved <= follower
    assert not found.by_writer and len(tried) < 50


def test_the_search_ends_where_the_writer_does() -> None:
    def attempt(rate: float) -> Trial:
        return Trial(rate, min(rate, 4e6), 100, dropped=0)

    found, _ = highest(attempt, 1e5)
    assert found.achieved == 4e6 and found.by_writer


def test_the_recorded_runs_hold() -> None:
    found = runs.recorded("bench-sync", profile="quick")
    assert found and all(sync_bars.judge(run).holds for run in found)
