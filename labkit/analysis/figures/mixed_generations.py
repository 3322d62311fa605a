"""Draws experiment 16: readings of several generations, and what a switch costs."""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from labkit.analysis import style
from labkit.analysis.figures import anomaly_rates, broken_at_commas, draws
from labkit.analysis.runs import Run


@draws("mixed-generations")
def mixed_generations(run: Run) -> Figure:
    """Draw the share of mixed readings for every way, and the time of every kind of change.

    Parameters
    ----------
    run
        Its tables ``counts`` and ``costs`` are drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Two axes, one above the other.
    """
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(style.HALF_PAGE[0], 4.9), height_ratios=(1.5, 1)
    )
    anomaly_rates(run, ax=above)
    broken_at_commas(above)
    above.set_xlabel("mixed readings per reading\n(hollow: none seen, bound at 95 %)", loc="right")
    _costs(below, run)
    return figure


def _costs(ax: Axes, run: Run) -> None:
    costs = run.table("costs")
    changes, loads = list(costs["change"].unique()), list(costs["load"].unique())
    for series, load in enumerate(loads):
        look = style.look(series)
        shift = 0.22 * (series - (len(loads) - 1) / 2)
        for y, change in enumerate(changes):
            us = costs.loc[(costs["change"] == change) & (costs["load"] == load), "ns"] / 1e3
            low, middle, high = np.percentile(us, [5, 50, 95])
            ax.errorbar(
                middle, y + shift, xerr=[[middle - low], [high - middle]],
                label=load if y == 0 else None, **look.points(),
            )  # fmt: skip
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(numticks=8))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(changes)), changes, fontsize=6)
    ax.set_ylim(len(changes) - 0.5, -0.5)
    ax.set_xlabel("µs per change: median, 5 % to 95 %", loc="right")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, columnspacing=0.8,
              handletextpad=0.1)  # fmt: skip
