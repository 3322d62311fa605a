"""The benchmark's bars, judged from tables that were written by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest

from experiments.bench import kernel_bars
from labkit import figures, runs
from labkit.runs import BadRun, Run, Triad

DRAIN_NS = {
    "RingReader": 1_000,
    "RingReader, adding a field": 1_200,
    "bcc, event(data)": 400_000,
    "bcc, ctypes cast": 200_000,
    "bcc, empty callback": 90_000,
    "libbpf in C": 500,
}
MAPS_NS = {
    "snapshot()": 10,
    "items_lookup_batch()": 12,
    "items()": 400,
    "update_many(), fill": 10,
    "update_many(), overwrite": 20,
    "t[k] = v, fill": 100,
    "t[k] = v, overwrite": 110,
    "t[k] = v, objects ready, fill": 90,
    "t[k] = v, objects ready, overwrite": 100,
}


def made(
    drain: dict[str, int] | None = None, maps: dict[str, int] | None = None, lost: int = 0
) -> Run:
    """A run whose every repetition takes the given times; bcc loses half live."""
    turns = range(1, 6)
    drained = [
        (name, turn, 1000, ns) for turn in turns for name, ns in (DRAIN_NS | (drain or {})).items()
    ]
    handled = [
        (name, turn, 100, ns) for turn in turns for name, ns in (MAPS_NS | (maps or {})).items()
    ]
    produced, triad, lives = 20_000_000, Triad("lost"), []
    for variant, name, dropped in (
        ("broken", "bcc, ctypes cast", produced // 2),
        ("control", "libbpf in C", 0),
        ("fixed", "RingReader", lost),
    ):
        triad.add(variant, case=name, operations=produced, anomalies=dropped)
        lives.append((name, 0, produced, produced - dropped, dropped, 0, 10**9, 10**9))
    cells = list(product(("default", "never, 1 ms timer"), (1_000, 10_000)))
    return Run(
        "bench-kernel",
        "quick",
        {},
        {"kernel": "6.1.0", "recorded_at": "2026-01-01T00:00:00+00:00"},
        {
            "counts": triad.table(),
            "drain": pd.DataFrame(drained, columns=["consumer", "repetition", "events", "ns"]),
            "maps": pd.DataFrame(handled, columns=["way", "repetition", "entries", "ns"]),
            "live": pd.DataFrame(
                lives,
                columns=["consumer", "repetition", "produced", "delivered", "dropped", "gaps",
                         "produce_ns", "consume_ns"],
            ),
            "latency": pd.DataFrame(
                [(p, r, turn, 0, 1e4 * turn, 1e5 * turn) for p, r in cells for turn in turns],
                columns=["policy", "rate", "repetition", "dropped", "p50_ns", "p99_ns"],
            ),
            "latency_pooled": pd.DataFrame(
                [(p, r, 5000, 3e4, 3e5, np.nan, 1e6) for p, r in cells],
                columns=["policy", "rate", "events", "p50_ns", "p99_ns", "p999_ns", "max_ns"],
            ),
        },
    )  # fmt: skip


def test_every_bar_holds_and_each_figure_is_one_line() -> None:
    run = made()
    finding = kernel_bars.judge(run)
    assert finding.holds and len(finding.checks) == 6
    lines = [str(one) for one in kernel_bars.results(run)]
    assert not any("\n" in line for line in lines)
    assert (
        "drain against bcc's own callback: 200 times (200 to 200), bar at least 100, holds" in lines
    )
    assert (
        "live, RingReader, lost of 20,000,000: 0 events, bar 0 of at least 20,000,000, holds"
        in lines
    )
    # 100 + 110 against 10 + 20: filling and overwriting count together.
    assert "update_many() against bcc's t[k] = v: 7 times (7 to 7), bar at least 6, holds" in lines


@pytest.mark.parametrize(
    ("drain", "maps", "lost", "named"),
    [
        ({"bcc, ctypes cast": 99_000}, {}, 0, "bcc's own callback"),
        ({"libbpf in C": 399}, {}, 0, "libbpf's consumer"),
        ({}, {"items()": 199}, 0, "items()"),
        ({}, {"items_lookup_batch()": 9}, 0, "items_lookup_batch()"),
        ({}, {"t[k] = v, fill": 60}, 0, "t[k] = v"),
        ({}, {}, 1, "lost of"),
    ],
)
def test_each_bar_falls_short_by_itself(
    drain: dict[str, int], maps: dict[str, int], lost: int, named: str
) -> None:
    run = made(drain, maps, lost)
    short = [one for one in kernel_bars.results(run) if one.holds is False]
    assert len(short) == 1 and named in short[0].name
    assert "falls short" in str(short[0])
    assert not kernel_bars.judge(run).holds


def test_counts_that_contradict_the_live_table_are_refused() -> None:
    run = made()
    run.counts.loc[run.counts["variant"] == "fixed", "anomalies"] = 1
    with pytest.raises(BadRun, match="counts of RingReader"):
        kernel_bars.judge(run)


def test_the_figure_is_drawn() -> None:
    assert len(figures.draw(kernel_bars.draw, made()).axes) == 3


def test_the_recorded_runs_hold() -> None:
    found = runs.recorded("bench-kernel", profile="quick")
    assert found and all(kernel_bars.judge(run).holds for run in found)
