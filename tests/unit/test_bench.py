"""The benchmark's pure parts: the matrix, when a write was seen, and the tables made from a run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.across.strategies import beside_the_article, by_need, choices, measured
from experiments.sync.sync_benchmark import Cell, matrix
from labkit.judge.findings import FAILS, UNDECIDED
from labkit.lab.catalogue import complete, judge
from labkit.load.strategies import DOUBLE_MAP, STRATEGIES
from labkit.load.workload import keys_behind, mixed_reads, seen_at
from labkit.runs import Run
from labkit.sync.changes import change_dtype

RATES, SATURATION = [1_000, 10_000, 100_000], [1_000_000]
WAKEUPS = ["always", "every-n", "adaptive", "never"]


def cells_of(sizes: list[int]) -> list[Cell]:
    return matrix(RATES, sizes, SATURATION, wakeups=WAKEUPS[-1:], switched=[10_000, 100_000])


def made_up() -> Run:
    """A run with round figures: events at once, polls late and with versions passed over."""
    rows = []
    for number, cell in enumerate(cells_of([8, 64])):
        delay, given_out = (5e6, 0.25) if cell.strategy.startswith("poll") else (1e5, 1.0)
        mixed = 0 if cell.strategy == DOUBLE_MAP else 90
        delivered = 1_000 if cell.rate == 1_000 else int(1_000 * given_out)
        for turn in range(7):
            rows.append(
                {
                    "cell": number, "round": turn, **dataclasses.asdict(cell),
                    "operations": 1_000, "produced": 1_000, "delivered": delivered, "dropped": 0,
                    "coalesced": 1_000 - delivered, "unseen": 0, "measured": 800,
                    "reads": 100, "mixed": mixed,
                    "mean_ns": delay, "p50_ns": delay, "p99_ns": 2 * delay, "late_p99_ns": 1e4,
                    "commit_mean_ns": delay, "commit_p50_ns": delay, "commit_p99_ns": 2 * delay,
                    "achieved": float(cell.rate), "writer_ns": 200.0, "follower_cpu": 0.1,
                    "follower_ns": 1e12 / delay, "late_p50_ns": 1e3,
                    "map_bytes": 1 << 20, "replica_bytes": 4800,
                }
            )  # fmt: skip
    return complete(
        Run(
            "sync-benchmark",
            "quick",
            {"rates": RATES},
            {"kernel": "6.18.44", "recorded_at": "2026-11-22T22:00:00+00:00"},
            {"cells": pd.DataFrame(rows)},
        )
    )


def spoilt(run: Run, strategy: str, **columns: float) -> Run:
    """The run with other figures in all cells of a strategy."""
    cells = run.tables["cells"].copy()
    for column, value in columns.items():
        cells.loc[cells["strategy"] == strategy, column] = value
    return complete(dataclasses.replace(run, tables={**run.tables, "cells": cells}))


def test_the_matrix_names_strategies_that_exist_and_no_cell_twice() -> None:
    cells = cells_of([8, 64, 1024])
    assert {cell.strategy for cell in cells} == {*STRATEGIES, DOUBLE_MAP}
    assert len(cells) == len(set(cells))
    for strategy in ("events", "poll 10 ms", "hybrid"):
        assert {Cell(strategy, rate) for rate in RATES + SATURATION} <= set(cells)


def test_the_matrix_varies_each_axis_for_every_strategy_that_has_it() -> None:
    cells = cells_of([8, 64, 1024])
    for name in (*STRATEGIES, DOUBLE_MAP):
        ours = [cell for cell in cells if cell.strategy == name]
        assert {cell.value_bytes for cell in ours if cell.rate == 10_000} >= {8, 1024}
        assert len({cell.rate for cell in ours if cell.value_bytes == 8}) >= 2
        foreign = {"hook": "process", DOUBLE_MAP: "publisher"}.get(name, "program")
        assert foreign in {cell.writer for cell in ours}
    assert {"events", "hook"} <= {cell.strategy for cell in cells if cell.value_bytes == 64}
    woken = {cell.strategy for cell in cells if cell.wakeup == "never"}
    assert woken == {"events", "hybrid", "hook"}
    assert {cell.wakeup for cell in cells if cell.strategy == "events"} == {"default", *WAKEUPS}


@given(st.data())
def test_seen_is_the_first_sight_of_that_version_or_a_newer_one(data: st.DataObject) -> None:
    keys, rounds, first = 3, 4, 7
    place = np.arange(keys * rounds)
    key, version = (place % keys).astype(np.uint64), (first + place // keys).astype(np.uint64)
    # What a follower may deliver: rows in time, versions that only grow by key, old ones too.
    told = data.draw(st.lists(st.tuples(st.integers(0, keys - 1), st.integers(first - 2, 10))))
    news = np.zeros(len(told), change_dtype("u8", "u8"))
    for row, (at, (of, to)) in zip(news, enumerate(told, 1), strict=True):
        row["key"], row["version"], row["seen_ns"] = of, to, 100 * at
    cut = data.draw(st.integers(0, len(news)))
    seen = seen_at([news[:cut], news[cut:]], key, version, keys, first)
    for i in place:
        moments = [
            int(row["seen_ns"])
            for row in news
            if row["key"] == key[i] and row["version"] >= version[i]
        ]
        assert seen[i] == min(moments, default=0)


@given(st.data())
def test_a_key_is_behind_from_a_commit_until_it_or_a_newer_one_is_seen(data: st.DataObject) -> None:
    keys, rounds = 3, 4
    key = np.repeat(np.arange(keys, dtype=np.uint64), rounds)
    end, seen = np.zeros(len(key), np.uint64), np.zeros(len(key), np.uint64)
    for of in range(keys):
        times = st.lists(st.integers(1, 60), min_size=rounds, max_size=rounds, unique=True)
        end[of * rounds : (of + 1) * rounds] = sorted(data.draw(times))
        # Seen is of that version or a newer one, so that it only grows; from some on, never.
        first = sorted(data.draw(times))
        last = data.draw(st.integers(0, rounds))
        seen[of * rounds : of * rounds + last] = first[:last]
    order = np.argsort(end, kind="stable")
    moments = np.arange(0, 62)
    counted = keys_behind(moments, key[order], end[order], seen[order])
    for moment in moments.tolist():
        behind = 0
        for of in range(keys):
            mine = slice(of * rounds, (of + 1) * rounds)
            known = np.flatnonzero(end[mine] <= moment)
            if len(known):
                at = int(seen[mine][known[-1]])
                behind += at == 0 or at > moment
        assert counted[moment] == behind


def test_a_sound_run_holds() -> None:
    assert judge(made_up()).require().holds


@pytest.mark.parametrize(
    ("column", "value"),
    [("dropped", 1), ("produced", 999), ("unseen", 1), ("commit_p50_ns", 4e6),
     ("commit_p99_ns", 1.2e7)],
)  # fmt: skip
def test_a_run_in_which_events_go_wrong_fails(column: str, value: float) -> None:
    assert judge(spoilt(made_up(), "events", **{column: value})).state == FAILS


def test_a_generation_that_came_in_pieces_fails() -> None:
    assert judge(spoilt(made_up(), DOUBLE_MAP, mixed=1)).state == FAILS


def test_one_stall_of_the_machine_decides_nothing() -> None:
    run = made_up()
    cells = run.tables["cells"].copy()
    stalled = (cells["strategy"] == "events") & (cells["round"] == 3)
    cells.loc[stalled, ["commit_p50_ns", "commit_p99_ns"]] = 1e9
    finding = judge(complete(dataclasses.replace(run, tables={**run.tables, "cells": cells})))
    assert finding.state == UNDECIDED
    assert [check.state for check in finding.checks].count(UNDECIDED) == 2


def test_a_read_is_mixed_unless_all_keys_are_at_one_version() -> None:
    rows = np.zeros(6, change_dtype("u8", "u8"))
    rows["key"], rows["version"] = [0, 1, 0, 1, 0, 1], [2, 2, 3, 3, 4, 4]
    assert mixed_reads([rows], 2, 1) == 0
    assert mixed_reads([rows[:1], rows[1:3], rows[3:4], rows[4:]], 2, 1) == 2
    assert mixed_reads([rows], 3, 1) == 1


def test_the_article_stands_beside_the_run() -> None:
    table = beside_the_article(made_up())
    assert list(table["method"]) == ["batch pull", "event-driven", "hybrid"] * 4
    throughput = table[table["figure"].str.startswith("throughput")]
    assert list(throughput["here"]) == ["1,000", "1,000,000", "1,000,000"]
    assert "contradicted" in throughput["verdict"].iloc[1]
    p99 = table[table["figure"].str.startswith("P99")]
    assert list(p99["ratio here"]) == ["1.00", "0.02", "0.02"]
    assert "same side" in p99["verdict"].iloc[1]


def test_every_cell_is_shown_with_its_spread() -> None:
    table = measured(made_up())
    assert len(table) == made_up().tables["cells"]["cell"].nunique()
    assert set(table["p50 (us)"]) == {"100 (100 to 100)", "5,000 (5,000 to 5,000)"}


def test_every_need_has_a_choice_and_a_measured_reason() -> None:
    table = choices(made_up())
    choose, because = (
        dict(zip(table["need"], map(str, table[column]), strict=True))
        for column in ("choose", "because")
    )
    assert choose["lowest latency"].startswith(("events", "hybrid"))
    assert "1,000,000/s" in because["no lost version"]
    assert choose["lowest cost"].startswith("poll")
    assert "100%" in because["foreign writers"]
    assert choose["atomic over keys"] == DOUBLE_MAP
    assert "none of" in because["atomic over keys"] and "90% did" in because["atomic over keys"]
    assert not (table == "").any().any()


def test_every_need_is_answered_for_every_strategy() -> None:
    table = by_need(made_up()).set_index("need")
    assert table.shape == (5, 5)
    atomic = table.loc["atomic over keys"].astype(str)
    assert atomic[DOUBLE_MAP].startswith("0% of") and atomic["events"].startswith("90% of")
    whole = table.loc["no lost version, at 100,000/s"].astype(str)
    assert whole["poll 10 ms"].startswith("25.0% of")
    assert not (table == "").any().any()
