"""Draws experiment 10: memory of a map as it fills, preallocated and not."""

from __future__ import annotations

from matplotlib.axes import Axes

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run

_FILLS = {0.0: ("empty", "none"), 0.5: ("half full", "left"), 1.0: ("full", "full")}


@draws("no-prealloc")
def no_prealloc(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the memory that the kernel states for a map against its max_entries.

    Parameters
    ----------
    run
        Its table ``fill`` is drawn: one line for each way of allocation and each fill.
    ax
        Where to draw.
    """
    ax = style.axes(ax)
    fill = run.table("fill")
    for i, (flags, rows) in enumerate(fill.groupby("flags", sort=False)):
        look = style.look(i)
        for share, (label, filled) in _FILLS.items():
            points = rows[rows["filled"] == rows["entries"] * share]
            ax.plot(points["entries"], points["memlock_bytes"] / 2**20, **look.line(),
                    fillstyle=filled, label=f"{flags}, {label}")  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("max_entries (key 4 B, value 8 B)")
    ax.set_ylabel("memory of the map (MiB)")
    ax.legend(loc="upper left", fontsize=6)
    return ax
