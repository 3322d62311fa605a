"""The benchmark's bars, judged from tables that were written by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest

from experiments.bench import kernel_bars
from experiments.bench.kernel_bars import GO_COPY, LIBBPF, LIBBPF_COPY, OURS
from experiments.bench.sync_bars import C
from labkit import figures, runs
from labkit.runs import BadRun, Run, Triad

DRAIN_NS = {
    "RingReader": 1_000,
    "RingReader, any size": 1_100,
    "RingReader, adding a field": 450,
    "bcc, event(data)": 400_000,
    "bcc, ctypes cast": 200_000,
    "bcc, empty callback": 90_000,
    LIBBPF: 500,
    LIBBPF_COPY: 2_400,
    GO_COPY: 8_000,
}
MAPS_NS = {
    "snapshot()": 10,
    kernel_bars.BY_CALL: 10,
    "items_lookup_batch()": 21,
    "batch, libbpf in C, lookup": 12,
    "batch, libbpf in C, fill": 10,
    "batch, libbpf in C, overwrite": 18,
    "batch, cilium/ebpf in Go, lookup": 16,
    "items()": 400,
    "update_many(), fill": 10,
    "update_many(), overwrite": 20,
    "t[k] = v, fill": 100,
    "t[k] = v, overwrite": 110,
    "t[k] = v, objects ready, fill": 90,
    "t[k] = v, objects ready, overwrite": 100,
}


def made(
    drain: dict[str, int] | None = None,
    maps: dict[str, int] | None = None,
    lost: int = 0,
    large: int = 12_000,
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
        ("control", LIBBPF, 0),
        ("fixed", "RingReader", lost),
    ):
        triad.add(variant, case=name, operations=produced, anomalies=dropped)
        lives.append((name, 0, produced, produced - dropped, dropped, 0, 10**9, 10**9))
    cells = list(product(("default", "never, 1 ms timer"), (1_000, 10_000), (OURS, C)))
    return Run(
        "bench-kernel",
        "quick",
        {},
        {"kernel": "6.1.0", "recorded_at": "2026-01-01T00:00:00+00:00"},
        {
            "counts": triad.table(),
            "drain": pd.DataFrame(drained, columns=["consumer", "repetition", "events", "ns"]),
            "maps": pd.DataFrame(handled, columns=["way", "repetition", "entries", "ns"]),
            "large": pd.DataFrame(
                [(10, turn, 1_000) for turn in turns] + [(100, turn, large) for turn in turns],
                columns=["entries", "repetition", "ns"],
            ),
            "live": pd.DataFrame(
                lives,
                columns=["consumer", "repetition", "produced", "delivered", "dropped", "gaps",
                         "produce_ns", "consume_ns"],
            ),
            "latency": pd.DataFrame(
                [
                    (*cell, turn, 0, 5e3, 1e4 * turn, 1e5 * turn, np.nan)
                    for cell in cells
                    for turn in turns
                ],
                columns=["policy", "rate", "reader", "repetition", "dropped", "reader_ns",
                         "p50_ns", "p99_ns", "p999_ns"],
            ),
            "latency_pooled": pd.DataFrame(
                [(*cell, 5000, 3e4, 3e5, np.nan, 1e6) for cell in cells],
                columns=["policy", "rate", "reader", "events", "p50_ns", "p99_ns", "p999_ns",
                         "max_ns"],
            ),
        },
    )  # fmt: skip


def test_every_bar_holds_and_each_figure_is_one_line() -> None:
    run = made()
    finding = kernel_bars.judge(run)
    assert finding.holds and len(finding.checks) == 12
    lines = [str(one) for one in kernel_bars.results(run)]
    assert not any("\n" in line for line in lines)
    assert (
        "drain against bcc's own callback: 200 times (200 to 200), bar at least 150, holds" in lines
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
        ({"bcc, ctypes cast": 149_000}, {}, 0, "bcc's own callback"),
        ({"RingReader": 1_201}, {}, 0, "drain, copying, against libbpf's callback that copies"),
        ({"RingReader, any size": 1_201}, {}, 0, "records of any size"),
        ({LIBBPF: 449}, {}, 0, "adding a field in place"),
        ({GO_COPY: 4_999}, {}, 0, "Go's ReadInto"),
        ({}, {"items()": 199}, 0, "items()"),
        ({}, {"items_lookup_batch()": 19}, 0, "items_lookup_batch()"),
        ({}, {"batch, cilium/ebpf in Go, lookup": 14}, 0, "Go's BatchLookup"),
        ({}, {"batch, libbpf in C, fill": 8}, 0, "libbpf's batch in C"),
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


def test_a_map_whose_entries_cost_more_as_it_grows_falls_short() -> None:
    short = [one for one in kernel_bars.results(made(large=15_100)) if one.holds is False]
    assert len(short) == 1 and "cost of an entry" in short[0].name


def test_counts_that_contradict_the_live_table_are_refused() -> None:
    run = made()
    run.counts.loc[run.counts["variant"] == "fixed", "anomalies"] = 1
    with pytest.raises(BadRun, match="counts of RingReader"):
        kernel_bars.judge(run)


def test_the_figure_is_drawn() -> None:
    assert len(figures.draw(kernel_bars.draw, made()).axes) == 3


SHORT = {
    # Of copies that are streamed past the caches the store is what takes the time: 32 bytes of each
    # record, and 8 of the index where they have any size.
    "drain, copying, against libbpf's callback that copies",
    "the same with records of any size",
    # The system call is the same, and takes all of the time (kernel_bars.BY_CALL).
    "snapshot() against bcc's items_lookup_batch()",
    "snapshot() against Go's BatchLookup",
}
"""Bars that no run reaches, and why."""


def test_the_recorded_runs_fall_short_of_no_other_bar() -> None:
    found = runs.recorded("bench-kernel", profile="quick")
    short = {one.name for run in found for one in kernel_bars.results(run) if one.holds is False}
    assert found and short <= SHORT
