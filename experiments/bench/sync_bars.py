"""What the benchmark of the strategies' own speed shows: every result, and the bars of some."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pandas as pd

from labkit.judge.bars import Result, checks, result, short
from labkit.judge.findings import Finding
from labkit.runs import BadRun, Run

EXPERIMENT: Final = "bench-sync"

EVENTS: Final = "events, gathered 0.3 ms"
POLL: Final = "poll 10 ms"
OURS: Final = "RingReader"
BCC: Final = ("bcc, event(data)", "bcc, ctypes cast", "bcc, bytes copied")
"""What bcc's callback does for an event. The first two reach its fields; the last one keeps the
bytes, so that NumPy makes a batch of them as `RingReader` does: the least a callback can do."""
READ: Final = "the map read by batch"
BOOTSTRAP: Final = "bootstrap of a replica"
APPLY: Final = "changes of random keys applied"
CLOCK: Final = "an empty call"
EMPTY_POLL: Final = "a poll of events that finds none"

P99_SHARE: Final = 0.1
FOLLOWER_CPU: Final = 60.0
AGAINST_BCC: Final = 10.0
BOOTSTRAP_COST: Final = 2.0
APPLIED: Final = 1_000_000.0
FLOOR: Final = 5.0


def results(run: Run) -> list[Result]:
    """Every result of a run.

    Parameters
    ----------
    run
        A run of the benchmark.

    Returns
    -------
    list of Result
        Ratios are taken within each repetition, and their median is held against the bar.
    """
    return [*_path(run), *_sustained(run), *_replica(run), *_floor(run)]


def judge(run: Run) -> Finding:
    """Every bar of the strategies' own speed holds.

    Parameters
    ----------
    run
        A run of the benchmark.

    Raises
    ------
    BadRun
        Its counts are not those of its tables.
    """
    _check_counts(run)
    every = results(run)
    with_bar = {one.name: one for one in every if one.holds is not None}
    sooner, faster = with_bar["p99 of events, of that of the 10 ms poll"], _against(run)
    return Finding(
        EXPERIMENT,
        f"At {_rate(run):,} changes/s the p99 of events was {short(sooner.value)} of that of a "
        f"10 ms poll. Without a drop the follower sustained {short(faster)} times the rate that "
        "it does on bcc's callback.",
        checks(every),
    )


def _check_counts(run: Run) -> None:
    """Refuse a run whose counts are not those of its tables."""
    trials = run.table("trials")
    ours = trials[trials["way"] == OURS]
    slowest = ours[ours["rate"] == ours["rate"].min()]
    count = run.count("control", OURS)
    if [count.operations, count.anomalies] != slowest[["operations", "dropped"]].sum().to_list():
        raise BadRun(f"The counts of {OURS} are not those of the run's table trials.")
    path = run.table("path")
    for variant, name in (("broken", POLL), ("fixed", EVENTS)):
        rows = path[path["strategy"] == name]
        missing = int((rows["operations"] - rows["delivered"]).clip(lower=0).sum())
        count = run.count(variant, name)
        if (count.operations, count.anomalies) != (int(rows["operations"].sum()), missing):
            raise BadRun(f"The counts of {name} are not those of the run's table path.")


def _rate(run: Run) -> int:
    return int(str(run.parameters["rate"]))


def _path(run: Run) -> Iterator[Result]:
    path = run.table("path")
    by = path.pivot(index="repetition", columns="strategy")
    events = path[path["strategy"] == EVENTS]
    dropped, produced = int(events["dropped"].sum()), int(events["operations"].sum())
    yield Result(
        f"events at {_rate(run):,} changes/s, dropped of {produced:,}", dropped, "changes",
        bar="0", holds=dropped == 0,
    )  # fmt: skip
    p99 = by["p99_ns"]
    yield result(
        "p99 of events, of that of the 10 ms poll", p99[EVENTS] / p99[POLL], most=P99_SHARE
    )
    yield result(
        "follower of events, of one CPU", 100 * by["follower_cpu"][EVENTS], "%", most=FOLLOWER_CPU
    )
    for name in (EVENTS, POLL):
        yield result(f"{name}, p50", by["p50_ns"][name] / 1e3, "us")
        yield result(f"{name}, p99", p99[name] / 1e3, "us")
        yield result(f"{name}, writer late, p99", by["late_p99_ns"][name] / 1e3, "us")
    yield result(f"follower of the {POLL}, of one CPU", 100 * by["follower_cpu"][POLL], "%")


def _sustained(run: Run) -> Iterator[Result]:
    table = run.table("sustained")
    rate = table.pivot(index="repetition", columns="way", values="rate")
    yield result(
        "highest rate without a drop, against bcc's callback", _ratios(rate), least=AGAINST_BCC
    )
    yield result(f"the same against {BCC[2]}", rate[OURS] / rate[BCC[2]])
    for way in (OURS, *BCC):
        limit = table[table["way"] == way]["by_writer"].mean()
        words = ", where the writer ends" if limit > 0.5 else ""
        yield result(f"highest rate without a drop{words}, {way}", rate[way] / 1e6, "M changes/s")


def _ratios(rate: pd.DataFrame) -> pd.Series[float]:
    """Ours to the faster of the callbacks that reach the fields."""
    ratios: pd.Series[float] = rate[OURS] / rate[list(BCC[:2])].max(axis=1)
    return ratios


def _against(run: Run) -> float:
    rate = run.table("sustained").pivot(index="repetition", columns="way", values="rate")
    return float(_ratios(rate).median())


def _replica(run: Run) -> Iterator[Result]:
    table = run.table("replica")
    took = table.pivot(index="repetition", columns="way", values="ns")
    keys = int(str(run.parameters["replica_keys"]))
    yield result(
        f"bootstrap of a replica of {keys:,} keys, of the cost of reading the map",
        took[BOOTSTRAP] / took[READ],
        most=BOOTSTRAP_COST,
    )
    applied = table[table["way"] == APPLY]
    yield result(
        f"{APPLY} to a replica of {keys:,}",
        1e9 * applied["things"] / applied["ns"],
        "changes/s",
        least=APPLIED,
    )
    for way in (READ, BOOTSTRAP):
        yield result(f"{way}, {keys:,} keys", took[way] / 1e6, "ms")


def _floor(run: Run) -> Iterator[Result]:
    path = run.table("path")
    floor = run.table("floor").pivot(index="repetition", columns="what", values="ns")
    p50 = path.pivot(index="repetition", columns="strategy", values="p50_ns")
    yield result(
        "harness floor, of the smallest latency compared",
        100 * floor.max(axis=1) / p50.min(axis=1),
        "%",
        most=FLOOR,
    )
    for what in (CLOCK, EMPTY_POLL):
        yield result(what, floor[what], "ns")
    for name in (EVENTS, POLL):
        late = path[path["strategy"] == name]["late_p50_ns"]
        yield result(f"writer late, p50, {name}", late, "ns")
