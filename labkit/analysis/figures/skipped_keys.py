"""Draws experiment 17: keys skipped or repeated by each way to read a map."""

from __future__ import annotations

from matplotlib.axes import Axes

from labkit.analysis.figures import anomaly_rates, draws
from labkit.analysis.runs import Run


@draws("skipped-keys")
def skipped_keys(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the rate of every case, with its interval."""
    return anomaly_rates(run, ax=ax)
