"""Draws experiment 18: events lost by each way to collect counts."""

from __future__ import annotations

from matplotlib.axes import Axes

from labkit.analysis.figures import anomaly_rates, draws
from labkit.analysis.runs import Run


@draws("collected-counts")
def collected_counts(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the rate of every case, with its interval."""
    return anomaly_rates(run, ax=ax)
