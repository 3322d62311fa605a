"""What a watch costs whoever updates a map, against its bars and a peer's way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pandas as pd

from labkit.judge.bars import Result, checks, result, short
from labkit.judge.findings import Finding
from labkit.runs import BadRun, Run

EXPERIMENT: Final = "bench-watch"

NOBODY: Final = "nobody watches"
WATCHED: Final = "this map is watched"
UNWATCHED: Final = "another map is watched"
PEER: Final = "mad's way, no filter"

EVENTS: Final = {NOBODY: 0, WATCHED: 1, UNWATCHED: 0, PEER: 2}
"""Events that one update makes."""

MOST_NS: Final = {WATCHED: 1_000.0, UNWATCHED: 300.0}
MOST_OF_PEER: Final = {WATCHED: 1.0, UNWATCHED: 0.5}


def results(run: Run) -> list[Result]:
    """Every result of a run.

    Parameters
    ----------
    run
        A run of `experiments.bench.bench_watch`.

    Returns
    -------
    list of Result
        CPU time that a watch adds to an update, differences and ratios within each repetition.
    """
    return list(_results(run.table("updates")))


def judge(run: Run) -> Finding:
    """Whether a watch keeps to its bars.

    Parameters
    ----------
    run
        A run of `experiments.bench.bench_watch`.

    Raises
    ------
    BadRun
        Its account does not add up: delivered + dropped = produced.
    """
    table = run.table("updates")
    if (table["delivered"] + table["dropped"] != table["produced"]).any():
        raise BadRun("Of the events of a watch some were neither delivered nor dropped.")
    added = _added(table).median()
    return Finding(
        EXPERIMENT,
        f"An update took {short(added[WATCHED])} ns more while its map was watched, "
        f"{short(added[UNWATCHED])} ns while another was, and {short(added[PEER])} ns in mad's "
        "way; the median of the repetitions, CPU time of the writer.",
        checks(results(run)),
    )


def _added(table: pd.DataFrame) -> pd.DataFrame:
    """Nanoseconds that each way added to an update, by repetition."""
    each = table["cpu_ns"] / table["updates"]
    ways = table.assign(ns=each, way=table["way"].map(str))
    wide = ways.pivot_table(index="repetition", columns="way", values="ns", observed=True)
    return wide.sub(wide[NOBODY], axis=0).drop(columns=NOBODY)


def _results(table: pd.DataFrame) -> Iterator[Result]:
    added = _added(table)
    for way, most in MOST_NS.items():
        yield result(f"{way}: added to an update", added[way], "ns", most=most)
    yield result(f"{PEER}: added to an update", added[PEER], "ns")
    for way, most in MOST_OF_PEER.items():
        yield result(f"{way}: of what {PEER}, adds", added[way] / added[PEER], most=most)
    rows = table[table["way"].map(str) == WATCHED]
    produced, dropped = int(rows["produced"].sum()), int(rows["dropped"].sum())
    yield result(
        f"{WATCHED}: dropped of {produced:,} events", pd.Series([float(dropped)]), "events"
    )
