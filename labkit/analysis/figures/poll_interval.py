"""Draws experiment 12: delays of polls with the uniform law over them, and missed changes."""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from labkit.analysis import style
from labkit.analysis.figures import draws, shares_missed
from labkit.analysis.runs import Run

_CURVES = 5  # periods drawn as distributions; more would hide each other


@draws("poll-interval")
def poll_interval(run: Run) -> Figure:
    """Draw how late changes were seen, and which share was never seen.

    Parameters
    ----------
    run
        Its tables ``delays`` and ``follows`` are drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Above, the distribution of delay over period, with the uniform law; below, the share
        of changes missed against the period, with 95 % intervals.
    """
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(style.HALF_PAGE[0], 4.6))
    _delays(above, run)
    _missed(below, run)
    return figure


def _delays(ax: Axes, run: Run) -> None:
    delays = run.table("delays").dropna()
    polled = delays[delays["case"].isin(run.cases("broken"))]
    periods = np.sort(polled["period_ms"].unique())
    if len(periods) > _CURVES:
        periods = periods[np.linspace(0, len(periods) - 1, _CURVES).round().astype(int)]
    for i, period in enumerate(periods):
        waits = polled[polled["period_ms"] == period]["delay_ms"] / period
        look = style.look(i)
        ax.ecdf(waits, color=look.color, ls=look.linestyle, label=f"T = {period:g} ms")
    ax.plot([0, 1], [0, 1], color=style.BLACK, lw=2.5, alpha=0.25, label="uniform law")
    ax.set_xlim(0, 1.5)
    ax.set_xlabel("delay of a change, from its intended time (periods T)", loc="right")
    ax.set_ylabel("share of changes seen by then")
    ax.legend(loc="lower right")


def _missed(ax: Axes, run: Run) -> None:
    follows = run.table("follows")
    polled = follows[follows["variant"] == "broken"]
    shares_missed(ax, polled, style.VARIANT["broken"].line(), "poll")
    events = follows[follows["variant"] == "fixed"]
    ax.axhline(float((events["missed"] / events["changes"]).iloc[0]), color=style.GREEN, ls="-.",
               label="ring buffer events")  # fmt: skip
    ax.set_xscale("log")
    ax.set_ylim(-0.05, 1)
    gap = float(str(run.parameters["gap_ms"]))
    ax.axvline(gap, color=style.GREY, lw=0.8, ls=":")
    ax.annotate("mean gap", (gap, 0.9), xytext=(2, 0), textcoords="offset points", fontsize=6)
    ax.set_xticks(polled["period_ms"], [f"{period:g}" for period in polled["period_ms"]])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("poll interval T (ms)")
    ax.set_ylabel("changes never seen")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 0.08))
