"""Draws experiment 16: readings of several generations, and what a switch costs."""

from __future__ import annotations

from matplotlib import pyplot
from matplotlib.figure import Figure

from labkit.analysis import style
from labkit.analysis.figures import anomaly_rates, broken_at_commas, draws, times_of_changes
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
    costs = run.table("costs")
    times_of_changes(below, costs.assign(series=costs["load"]), unit="µs per change", unit_ns=1e3)
    return figure
