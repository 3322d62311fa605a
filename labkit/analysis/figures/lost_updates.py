"""Draws experiment 13: what each way to increment loses, and what it costs."""

from __future__ import annotations

import math

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run
from labkit.analysis.statistics import bootstrap, wilson, zero_bound

_LOAD = {
    "alone": style.Look(style.BLUE, "o", "none"),
    "contended": style.Look(style.VERMILLION, "D", "none"),
}


@draws("lost-updates")
def lost_updates(run: Run) -> Figure:
    """Draw, for every way, the share of increments lost and the time of one increment.

    Parameters
    ----------
    run
        Its tables ``counts`` and ``rounds`` are drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Two axes, one above the other, with one row for each way.
    """
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(style.HALF_PAGE[0], 4.9), sharey=True)
    cases = [str(case) for case in run.table("rounds")["case"].unique()]
    _lost(above, run, cases)
    _cost(below, run, cases)
    for ax in (above, below):
        ax.xaxis.set_major_locator(LogLocator(numticks=6))
        ax.xaxis.set_minor_formatter(NullFormatter())
    above.set_yticks(range(len(cases)), cases)
    above.set_ylim(len(cases) - 0.5, -0.5)
    return figure


def _lost(ax: Axes, run: Run, cases: list[str]) -> None:
    for y, case in enumerate(cases):
        variant = "broken" if case in run.cases("broken") else "fixed"
        count, look = run.count(variant, case), style.VARIANT[variant]
        if count.anomalies:
            rate = wilson(count.anomalies, count.operations)
            spread = [[100 * (rate.estimate - rate.low)], [100 * (rate.high - rate.estimate)]]
            ax.errorbar(100 * rate.estimate, y, xerr=spread, **look.points())
        else:
            bound = 100 * zero_bound(count.operations)
            ax.errorbar(bound, y, xerr=bound / 2, xuplims=True, **look.points(), mfc="white")
    ax.set_xscale("log")
    ax.set_xlabel(
        "increments lost under contention, %\n(hollow: none seen, bound at 95 %)", loc="right"
    )


def _cost(ax: Axes, run: Run, cases: list[str]) -> None:
    rounds = run.table("rounds")
    for shift, (load, look) in zip((-0.17, 0.17), _LOAD.items(), strict=True):
        for y, case in enumerate(cases):
            rows = rounds[(rounds["case"] == case) & (rounds["load"] == load)]
            ns = bootstrap(rows["ns"])
            # Too few rounds for an interval: the range of all of them.
            low = rows["ns"].min() if math.isnan(ns.low) else ns.low
            high = rows["ns"].max() if math.isnan(ns.high) else ns.high
            ax.errorbar(
                ns.estimate, y + shift, xerr=[[ns.estimate - low], [high - ns.estimate]],
                **look.points(), mfc="white" if load == "alone" else look.color,
                label=load if y == 0 else None,
            )  # fmt: skip
            ax.plot(
                rows["floor_ns"].median(), y + shift, "|", color=style.GREY, ms=6,
                label="loop alone" if y == 0 and load == "contended" else None,
            )  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlabel(
        "ns per increment, loop included\n(median over rounds, 95 % interval)", loc="right"
    )
    ax.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=3, columnspacing=0.8, handletextpad=0.1
    )
