"""Draws experiment 50: how late each strategy is, how fresh, how dear, and where it ends."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from labkit.analysis import checkers, history, style
from labkit.analysis.figures import draws
from labkit.analysis.findings.sync_benchmark import usual
from labkit.analysis.runs import Run
from labkit.analysis.statistics import LEAST_REPETITIONS, bootstrap

_STRATEGIES = (
    "events", "poll 10 ms", "hybrid", "poll 1 ms", "events, gathered 1 ms", "double map", "hook",
)  # fmt: skip
_WAKEUPS = ("always", "default", "every-n", "adaptive", "never")
_READS = 50_000  # of the replica, at random moments
_REPLICA = 1
_WIDE = 2 * style.HALF_PAGE[0]


@draws("sync-benchmark")
def sync_benchmark(run: Run) -> Figure:
    """Draw the latency of changes: its distribution and tail at every rate, and percentiles.

    Parameters
    ----------
    run
        Its tables ``tails`` and ``cells`` are drawn: the program as writer, the first size.

    Returns
    -------
    matplotlib.figure.Figure
        For each rate, the share of changes that were seen by a time, and below it, on two
        logarithmic axes, the share that was later, pooled over the repetitions; then p50, p99 and
        p99.9 against the rate, medians with 95 % intervals over the repetitions (their range
        where there are too few).
    """
    cells = usual(run)
    rates = _rates(run)
    figure = pyplot.figure(figsize=(_WIDE, 7.2))
    grid = figure.add_gridspec(3, 6)
    first: tuple[Axes | None, Axes | None] = (None, None)
    for i, rate in enumerate(rates[:3]):
        columns = slice(2 * i, 2 * i + 2)
        above = figure.add_subplot(grid[0, columns], sharex=first[0], sharey=first[0])
        below = figure.add_subplot(grid[1, columns], sharex=above, sharey=first[1])
        _tails(above, below, run, cells[cells["rate"] == rate])
        above.set_title(f"{rate:,} changes/s")
        if first[0] is None:
            first = above, below
            above.set_ylabel("share seen by then")
            below.set_ylabel("share seen later")
        below.set_xlabel("latency (ms)", loc="right")
    for i, name in enumerate(("p50_ns", "p99_ns", "p99.9_ns")):
        ax = figure.add_subplot(grid[2, 2 * i : 2 * i + 2])
        _against_rate(ax, cells[cells["rate"].isin(rates)], name, 1e6)
        ax.set_title(f"{name[:-3]} against the rate")
        if i == 0:
            ax.set_ylabel("latency (ms)")
    _legend(figure)
    return figure


@draws("sync-benchmark-cost")
def cost(run: Run) -> Figure:
    """Draw where each strategy ends and what it costs.

    Parameters
    ----------
    run
        Its table ``cells`` is drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Changes handed out against changes offered, with the share dropped; the follower's CPU
        time per million changes against the rate; latency and CPU by wakeup policy.
    """
    cells = usual(run)
    figure, axes = pyplot.subplots(2, 2, figsize=(_WIDE, 5.2))
    _throughput(axes[0, 0], axes[1, 0], cells)
    _against_rate(axes[0, 1], cells, "follower_ns", 1e3)
    axes[0, 1].set_ylabel("follower's CPU\n(s per million changes)")
    _wakeups(axes[1, 1], run)
    _legend(figure)
    return figure


@draws("sync-benchmark-freshness")
def freshness(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw t-visibility: how probably the replica is fresh, by the time since the last commit.

    Parameters
    ----------
    run
        Its table ``history`` is drawn: one repetition at the second rate.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
        A line for each strategy: the share of reads of the replica, at random moments, that
        return the newest committed version, by the time since its commit
        (`checkers.t_visibility`).
    """
    ax = style.axes(ax, height=3.0)
    cells = run.table("cells").drop_duplicates("cell")
    names = dict(zip(cells["cell"], cells["strategy"], strict=True))
    edges = np.geomspace(1e4, 1e8, 25).astype(np.int64)
    for number, rows in run.table("history").groupby("cell"):
        name = str(names[number])
        of = checkers.t_visibility(_history(rows), np.concatenate([[0], edges]))
        of = of[of["reads"] >= 20]
        middle = np.sqrt(np.maximum(of["from_ns"], 5e3) * of["to_ns"].astype(float))
        look = style.look(_STRATEGIES.index(name))
        ax.plot(middle / 1e6, of["probability"], **look.line(), label=name, ms=3)
    ax.set_xscale("log")
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("time since the newest commit of the key (ms)", loc="right")
    ax.set_ylabel("replica is fresh (probability)")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1.01), ncols=2, fontsize=6)
    return ax


def _rates(run: Run) -> list[int]:
    rates = run.parameters["rates"]
    assert isinstance(rates, list)
    return sorted(int(rate) for rate in rates)


def _named(cells: pd.DataFrame) -> list[str]:
    return [name for name in _STRATEGIES if (cells["strategy"] == name).any()]


def _tails(above: Axes, below: Axes, run: Run, cells: pd.DataFrame) -> None:
    tails = run.table("tails")
    for name in _named(cells):
        number = cells[cells["strategy"] == name]["cell"].iloc[0]
        # Every repetition has the same shares: their median is the pooled tail at its quantile.
        rows = tails[tails["cell"] == number].sort_values(["repetition", "share"])
        pooled = rows.assign(place=rows.groupby("repetition").cumcount()).groupby("place").median()
        look = style.look(_STRATEGIES.index(name))
        for ax, share in ((above, 1 - pooled["share"]), (below, pooled["share"])):
            ax.plot(pooled["ns"] / 1e6, share, color=look.color, ls=look.linestyle)
    above.set_xscale("log")
    above.set_ylim(0, 1.02)
    above.tick_params(labelbottom=False)
    below.set_yscale("log")
    below.xaxis.set_major_locator(LogLocator(numticks=6))
    below.xaxis.set_minor_formatter(NullFormatter())


def _against_rate(ax: Axes, cells: pd.DataFrame, column: str, unit: float) -> None:
    for name in _named(cells):
        of = cells[cells["strategy"] == name].dropna(subset=[column])
        look = style.look(_STRATEGIES.index(name))
        rates = np.unique(of["rate"])
        middles, low, high = [], [], []
        for rate in rates:
            values = of[of["rate"] == rate][column].to_numpy() / unit
            spread = bootstrap(values)
            known = len(values) >= LEAST_REPETITIONS
            middles.append(spread.estimate)
            low.append(spread.estimate - (spread.low if known else values.min()))
            high.append((spread.high if known else values.max()) - spread.estimate)
        if len(rates):
            ax.errorbar(rates, middles, yerr=np.clip([low, high], 0, None), **look.line(), ms=3.5)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(cells["rate"].min() / 2, cells["rate"].max() * 2)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("changes/s, intended", loc="right")


def _throughput(above: Axes, below: Axes, cells: pd.DataFrame) -> None:
    cells = cells.assign(
        given=cells["achieved"] * cells["delivered"].clip(upper=cells["operations"])
        / cells["operations"],
        lost=100 * (cells["operations"] - cells["delivered"]).clip(lower=0) / cells["operations"],
    )  # fmt: skip
    for name in _named(cells):
        of = cells[cells["strategy"] == name].groupby("rate")[["given", "lost"]].median()
        look = style.look(_STRATEGIES.index(name))
        above.plot(of.index, of["given"], **look.line(), ms=3.5)
        below.plot(of.index, of["lost"], **look.line(), ms=3.5)
    ends = [cells["rate"].min(), cells["rate"].max()]
    above.plot(ends, ends, color=style.BLACK, lw=2.5, alpha=0.2)
    above.set_yscale("log")
    above.set_ylabel("changes/s handed out")
    below.set_ylabel("changes not handed out (%)")
    dropped = int(cells["dropped"].sum())
    below.set_title(f"dropped for want of room: {dropped:,}; the rest: passed over", loc="right",
                    fontsize=6.5, fontweight="normal")  # fmt: skip
    for ax in (above, below):
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("changes/s, intended", loc="right")


def _wakeups(ax: Axes, run: Run) -> None:
    cells = run.table("cells")
    cells = cells[
        (cells["strategy"] == "events")
        & (cells["writer"] == "program")
        & (cells["value_bytes"] == cells["value_bytes"].min())
    ]
    rate = cells[cells["wakeup"] != "default"]["rate"].max()
    for i, (column, words) in enumerate(
        (("writer_ns", "writer, per change"), ("follower_ns", "follower's CPU, per change"))
    ):
        of = cells[cells["rate"] == rate].groupby("wakeup")[column].median().reindex(_WAKEUPS)
        look = style.look(i)
        ax.plot(range(len(of)), of / 1e3, **look.points(), label=words)
    ax.set_yscale("log")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(range(len(_WAKEUPS)), _WAKEUPS, fontsize=6.5)
    ax.set_xlim(-0.5, len(_WAKEUPS) - 0.5)
    ax.set_ylabel("time (us)")
    ax.set_xlabel(f"who wakes the follower, at {rate:,} changes/s", loc="right")
    ax.set_ylim(0.1, None)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=6.5)


def _history(rows: pd.DataFrame) -> history.History:
    """The writes of one cell, and reads of the replica at random moments."""
    rng = np.random.default_rng(0)
    rows = rows[rows["seen_ns"] > 0].sort_values(["key", "version"])
    offset = max(0, -int(rows[["intended_ns", "start_ns", "end_ns", "seen_ns"]].min().min()))
    written = history.build(
        int(history.Op.WRITE), key=rows["key"], version=rows["version"],
        intended_ns=rows["intended_ns"] + offset, start_ns=rows["start_ns"] + offset,
        end_ns=rows["end_ns"] + offset,
    )  # fmt: skip
    keys, versions, moments = [], [], []
    for key, of in rows.groupby("key"):
        at = rng.integers(
            of["end_ns"].min(), of["end_ns"].max() + 1, _READS // rows["key"].nunique()
        )
        # What the replica held then: the newest version that was seen by that moment.
        held = np.searchsorted(of["seen_ns"].to_numpy(), at, side="right") - 1
        known = held >= 0
        keys.append(np.full(int(known.sum()), key))
        versions.append(of["version"].to_numpy()[held[known]])
        moments.append(at[known] + offset)
    read = history.build(
        int(history.Op.READ), key=np.concatenate(keys), version=np.concatenate(versions),
        start_ns=np.concatenate(moments), end_ns=np.concatenate(moments), actor=_REPLICA,
    )  # fmt: skip
    return history.concatenate(written, read)


def _legend(figure: Figure) -> None:
    """One legend for all axes, of the strategies that are drawn in any."""
    colours = {line.get_color() for ax in figure.axes for line in ax.get_lines()}
    handles = [
        Line2D([], [], **style.look(i).line(), label=name)
        for i, name in enumerate(_STRATEGIES)
        if style.look(i).color in colours
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=6.5)
