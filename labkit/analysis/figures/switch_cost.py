"""Draws experiment 47: who sees mixed generations, and what each way to publish costs."""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from labkit.analysis import style
from labkit.analysis.figures import anomaly_rates, broken_at_commas, draws
from labkit.analysis.runs import Run


@draws("switch-cost")
def switch_cost(run: Run) -> Figure:
    """Draw the share of mixed readings for every way, and the time of every way to publish.

    Parameters
    ----------
    run
        Its tables ``counts`` and ``costs`` are drawn; of the sizes, the smallest and the largest.

    Returns
    -------
    matplotlib.figure.Figure
        Two axes, one above the other.
    """
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(style.HALF_PAGE[0], 5.4), height_ratios=(1.3, 1)
    )
    anomaly_rates(run, ax=above)
    broken_at_commas(above)
    above.set_xlabel("mixed readings per reading\n(hollow: none seen, bound at 95 %)", loc="right")
    _costs(below, run)
    return figure


def _costs(ax: Axes, run: Run) -> None:
    costs = run.table("costs")
    changes, loads = list(costs["change"].unique()), list(costs["load"].unique())
    series = [
        (keys, load)
        for keys in sorted({costs["keys"].min(), costs["keys"].max()})
        for load in loads
    ]
    for place, (keys, load) in enumerate(series):
        look = style.look(place)
        shift = 0.18 * (place - (len(series) - 1) / 2)
        some = costs[(costs["keys"] == keys) & (costs["load"] == load)]
        for y, change in enumerate(changes):
            ms = some.loc[some["change"] == change, "ns"] / 1e6
            low, middle, high = np.percentile(ms, [5, 50, 95])
            ax.errorbar(
                middle, y + shift, xerr=[[middle - low], [high - middle]],
                label=f"{keys:,} keys, {load}" if y == 0 else None, **look.points(),
            )  # fmt: skip
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(numticks=8))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(changes)), [one.replace(", ", ",\n", 1) for one in changes], fontsize=6)
    ax.set_ylim(len(changes) - 0.5, -0.5)
    ax.set_xlabel("ms per generation: median, 5 % to 95 %", loc="right")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, columnspacing=0.8,
              handletextpad=0.1)  # fmt: skip
