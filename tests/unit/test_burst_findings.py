"""The findings about bursts and idle pulls: what they rest on can fail, one figure at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from labkit.lab.catalogue import complete, judge, recorded
from labkit.runs import Run


def newest(experiment: str) -> Run:
    found = recorded(experiment, profile="quick")
    assert found, f"no run of {experiment} was recorded"
    return found[-1]


def planted(run: Run, variant: str, column: str, add: float) -> Run:
    rows = run.table("rounds").copy()
    rows[column] = rows[column].astype(float) + add * (rows["variant"] == variant)
    return complete(replace(run, tables={**run.tables, "rounds": rows}))


@pytest.mark.parametrize(
    ("variant", "column", "add"),
    [
        ("fixed", "delivered", -1), ("broken", "written", 1), ("fixed", "left", -1e9),
        ("broken", "resyncs", 1), ("fixed", "resyncs", -1e9), ("control", "dropped", 1),
        ("broken", "behind_at_end", 1e4), ("broken", "fullest_bytes", -1e9),
    ],
)  # fmt: skip
def test_a_burst_that_went_otherwise_fails(variant: str, column: str, add: float) -> None:
    run = newest("burst-timeline")
    assert judge(run).holds
    assert not judge(planted(run, variant, column, add)).holds


@pytest.mark.parametrize(
    ("variant", "column", "add"),
    [
        ("fixed", "coalesced", 1), ("control", "dropped", 1), ("broken", "resyncs_busy", 9),
        ("broken", "lost_at_end", -1), ("broken", "resyncs", -1e9), ("fixed", "missing_most", 1e9),
    ],
)  # fmt: skip
def test_a_stream_that_went_otherwise_fails(variant: str, column: str, add: float) -> None:
    run = newest("hybrid-idle-only")
    assert judge(run).holds
    assert not judge(planted(run, variant, column, add)).holds
