"""Draws experiment 56: how long each sort of call took."""

from __future__ import annotations

from matplotlib.axes import Axes

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run


@draws("outer-lookup-wait")
def outer_lookup_wait(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the median call of each sort, and how many waited for the kernel's readers."""
    ax = style.axes(ax, height=1.8)
    calls = run.table("calls")
    labels = calls["case"].str.replace(", ", ",\n")
    median_us = calls["median_ns"].to_numpy() / 1e3
    ax.barh(labels, median_us, 0.6, color=style.BLUE)
    for y, (waited, total, x) in enumerate(
        zip(calls["waited"], calls["calls"], median_us, strict=True)
    ):
        ax.text(x, y, f" {waited} of {total} waited", va="center", fontsize=6.5)
    ax.set_xscale("log")
    ax.set_xlim(median_us.min() / 2, median_us.max() * 60)
    ax.tick_params(axis="y", labelsize=6.5)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel("median call, Python included [µs]", loc="right")
    return ax
