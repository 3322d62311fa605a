"""What the benchmark of the strategies' own speed shows: every result, and the bars of some."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np
import pandas as pd

from labkit.figures import Axes, Figure, style
from labkit.judge.bars import Result, checks, result, short
from labkit.judge.findings import Finding
from labkit.runs import BadRun, Run

EXPERIMENT: Final = "bench-sync"

EVENTS: Final = "events"
POLL: Final = "poll 10 ms"
C: Final = "libbpf in C"
GO: Final = "cilium/ebpf in Go"
OURS: Final = "RingReader"
OURS_BESIDE: Final = "RingEvents, Python"
HAND_OUT_S: Final = 0.1
"""How often our follower hands its changes out; its replica has each of them before."""
BCC: Final = ("bcc, event(data)", "bcc, ctypes cast", "bcc, bytes copied")
"""What bcc's callback does for an event. The first two reach its fields; the last one keeps the
bytes, so that NumPy makes a batch of them as `RingReader` does: the least a callback can do."""
READ: Final = "the map read by batch"
BOOTSTRAP: Final = "bootstrap of a replica"
APPLY: Final = "changes of random keys applied"
CLOCK: Final = "an empty call"
EMPTY_POLL: Final = "a poll of events that finds none"

P99_SHARE: Final = 0.05
AGAINST_BCC: Final = 10.0
BOOTSTRAP_COST: Final = 1.2
APPLIED: Final = 15_000_000.0
FLOOR: Final = 5.0
P50_OF_GO: Final = 1.0
TIME_OF_C: Final = 1.2
CPU_OF_C: Final = 1.3
CPU_OF_GO: Final = 0.6
CPU_AT: Final = {10_000: 15.0, 100_000: 35.0}
"""Of one CPU, percent, at so many changes per second."""
JUDGED: Final = "default"
"""Wakeup policy whose figures the bars judge: the kernel's own rule, which none has to ask for."""
QUIET: Final = 20.0
"""How many times its p50 the p99 of the follower in C may be: else other load took the CPUs, and a
bar that is not reached decides nothing. Some 5 on a quiet machine, above 100 beside load."""
JUDGED_RATES: Final = (1_000, 10_000, 100_000)


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
    timed = [*_path(run), *_beside(run)]
    if _is_noisy(run):
        timed = [
            replace(one, holds=None) if one.holds is False and one.unit != "changes" else one
            for one in timed
        ]
    return [*timed, *_sustained(run), *_replica(run), *_floor(run)]


def _is_noisy(run: Run) -> bool:
    every = run.table("beside")
    of_c = every[(every["policy"] == JUDGED) & (every["follower"] == C)]
    return bool((of_c["p99_ns"] / of_c["p50_ns"]).median() > QUIET)


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
    with_bar = {one.name: one for one in every if one.bar}
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
    for name in (EVENTS, POLL):
        yield result(f"{name}, p50", by["p50_ns"][name] / 1e3, "us")
        yield result(f"{name}, p99", p99[name] / 1e3, "us")
        yield result(f"{name}, writer late, p99", by["late_p99_ns"][name] / 1e3, "us")
    for name in (EVENTS, POLL):
        yield result(f"follower of the {name}, of one CPU", 100 * by["follower_cpu"][name], "%")


def _beside(run: Run) -> Iterator[Result]:
    """What Python, Go and C cost, from the intended time to the replica."""
    every = run.table("beside")
    unaccounted = every["operations"] - every["delivered"] - every["dropped"]
    yield Result(
        f"changes of {every['operations'].sum():,} neither delivered nor dropped, of any follower",
        int(unaccounted.abs().sum()), "changes", bar="0", holds=not unaccounted.any(),
    )  # fmt: skip
    for rate in JUDGED_RATES:
        rows = every[(every["policy"] == JUDGED) & (every["rate"] == rate)]
        by = rows.pivot(index="repetition", columns="follower")
        for what, column in (("p50", "p50_ns"), ("p99", "p99_ns"), ("CPU", "cpu_ns")):
            ours, cpu = by[column][OURS_BESIDE], what == "CPU"
            words = f"{what} of our follower at {rate:,} changes/s"
            yield result(
                f"{words}, of C's", ours / by[column][C], most=CPU_OF_C if cpu else TIME_OF_C
            )
            if GO in by[column] and what != "p99":
                most = CPU_OF_GO if cpu else P50_OF_GO
                yield result(f"{words}, of Go's", ours / by[column][GO], most=most)
                words = f"{what} of libbpf in C at {rate:,} changes/s, of Go's"
                yield result(words, by[column][C] / by[column][GO])
            for name in by[column]:
                yield result(f"{what} at {rate:,} changes/s, {name}", by[column][name] / 1e3, "us")
        if rate in CPU_AT:
            share = by["cpu_ns"][OURS_BESIDE] * rate / 1e7
            words = f"our follower at {rate:,} changes/s, of one CPU"
            yield result(words, share, "%", most=CPU_AT[rate])


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
    # A change stands in the replica, with its time, before Python hears of it.
    yield result(
        "harness floor, of the smallest latency compared",
        100 * floor[CLOCK] / p50.min(axis=1),
        "%",
        most=FLOOR,
    )
    for what in (CLOCK, EMPTY_POLL):
        yield result(what, floor[what], "ns")
    for name in (EVENTS, POLL):
        late = path[path["strategy"] == name]["late_p50_ns"]
        yield result(f"writer late, p50, {name}", late, "ns")


def draw(run: Run) -> Figure:
    """Draw what a follower in Python, in Go and in C costs: latency and CPU against the rate.

    Parameters
    ----------
    run
        Its table ``beside`` is drawn, of the kernel's own wakeup rule.

    Returns
    -------
    matplotlib.figure.Figure
        Three axes, one above the other: p50 and p99 from the intended time to the replica, and
        CPU time for a change. Median, least and greatest repetition.
    """
    from matplotlib import pyplot

    every = run.table("beside")
    every = every[every["policy"] == JUDGED]
    figure, axes = pyplot.subplots(3, 1, figsize=(style.HALF_PAGE[0], 6.0), sharex=True)
    columns = {
        "p50_ns": "p50, intended time\nto replica, µs",
        "p99_ns": "p99, intended time\nto replica, µs",
        "cpu_ns": "CPU time for a\nchange, µs",
    }
    for ax, (column, label) in zip(axes, columns.items(), strict=True):
        for series, name in enumerate((OURS_BESIDE, GO, C)):
            told = every[every["follower"] == name].groupby("rate")[column]
            if not len(told):
                continue  # a machine without Go
            middle, low, high = told.median() / 1e3, told.min() / 1e3, told.max() / 1e3
            # Side by side, so that the bars of two followers do not hide each other.
            ax.errorbar(
                middle.index.to_numpy() * 1.09 ** (series - 1), middle,
                yerr=[middle - low, high - middle], **style.look(series).line(), label=name,
                elinewidth=0.7, capsize=1.5,
            )  # fmt: skip
        against_rates(ax, every["rate"])
        ax.set_ylabel(label)
    axes[-1].set_xlabel("changes per second, on a fixed schedule")
    axes[0].legend(
        loc="lower center", bbox_to_anchor=(0.42, 1), ncols=3, columnspacing=0.8, handletextpad=0.3
    )
    return figure


def against_rates(ax: Axes, rates: pd.Series[int]) -> None:
    """Make both axes logarithmic, with the rates below and plain numbers at the side."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    ax.set_yscale("log")
    known = sorted(rates.unique().tolist())
    ax.set_xticks(known, [f"{rate // 1000}k" for rate in known])
    ax.xaxis.set_minor_formatter(NullFormatter())
    few = np.ptp(np.log10(ax.get_ylim())) < 2
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
