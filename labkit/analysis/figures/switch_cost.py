"""Draws experiment 47: who sees mixed generations, and what each way to publish costs."""

from __future__ import annotations

from matplotlib import pyplot
from matplotlib.figure import Figure

from labkit.analysis import style
from labkit.analysis.figures import anomaly_rates, broken_at_commas, draws, times_of_changes
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
    costs = run.table("costs")
    costs = costs[costs["keys"].isin([costs["keys"].min(), costs["keys"].max()])]
    costs = costs.assign(series=costs["keys"].map("{:,} keys, ".format) + costs["load"])
    times_of_changes(below, costs, unit="ms per generation", unit_ns=1e6)
    return figure
