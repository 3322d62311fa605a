"""Draws experiment 57: keys that one insertion pushes out, by the size of the map."""

from __future__ import annotations

from matplotlib.axes import Axes

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run


@draws("lru-free-target")
def lru_free_target(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the keys that were gone of each map, beside all that it held."""
    ax = style.axes(ax)
    gone = run.table("evicted").groupby("entries")["gone"].median()
    ax.plot(gone.index, gone.index, color=style.GREY, linestyle=":", label="all of them")
    ax.plot(gone.index, gone, **style.VARIANT["broken"].line(), label="gone")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(gone.index, map(str, gone.index))
    ax.set_xlabel("keys in a full LRU map")
    ax.set_ylabel("gone after one insertion")
    ax.legend()
    return ax
