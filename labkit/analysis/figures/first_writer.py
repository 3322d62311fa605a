"""Draws experiment 19: keys that had more than one first writer."""

from __future__ import annotations

from matplotlib.axes import Axes

from labkit.analysis.figures import anomaly_rates, draws
from labkit.analysis.runs import Run


@draws("first-writer")
def first_writer(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the rate of every case, with its interval."""
    return anomaly_rates(run, ax=ax)
