"""Draws experiment 5: lookups that missed a key, per setting."""

from __future__ import annotations

from matplotlib.axes import Axes

from labkit.analysis.figures import anomaly_rates, draws
from labkit.analysis.runs import Run


@draws("transient-null")
def transient_null(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the rate of every case, with its interval."""
    return anomaly_rates(run, ax=ax)
