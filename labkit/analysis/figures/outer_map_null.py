"""Draws experiment 49: lookups that found no inner map, for each way to keep it."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run


@draws("outer-map-null")
def outer_map_null(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw NULL answers per 100 writes, and those of maps that nobody writes as they are."""
    ax = style.axes(ax, height=1.8)
    found = run.table("lookups")
    absents, writings = (found[name].to_numpy(np.int64) for name in ("absent", "writes"))
    per_100 = 100 * absents / np.maximum(writings, 1)
    ax.barh(found["case"], per_100, 0.6, color=style.VERMILLION)
    for y, (absent, writes, x) in enumerate(zip(absents, writings, per_100, strict=True)):
        ax.text(x, y, f" {absent:,} in {writes:,} writes", va="center", fontsize=6.5)
    ax.set_xlim(0, 2.2 * max(per_100.max(), 1))
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel("NULL lookups per 100 writes", loc="right")
    return ax
