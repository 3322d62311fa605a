"""Draws experiment 46: what the security hook tells of, and what fexit does."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run


@draws("lsm-watch")
def lsm_watch(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw for each way to write how many changes there were, and how many each hook told of."""
    told = run.table("told")
    ways = list(told["way"].unique())
    ax = style.axes(ax, height=2.4)
    at = np.arange(len(ways))
    lsm = told[told["watcher"] == "lsm/bpf"].set_index("way")
    fexit = told[told["watcher"] != "lsm/bpf"].set_index("way")
    bars = (
        ("changes", lsm["changed"], style.GREY),
        ("told by lsm/bpf", lsm["told"], style.VERMILLION),
        ("told by fexit", fexit["told"], style.GREEN),
    )
    for place, (label, values, colour) in enumerate(bars):
        ax.barh(at + 0.25 * (place - 1), values.reindex(ways), 0.23, color=colour, label=label)
    ax.set_yticks(at, ways)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel(f"of {int(lsm['writes'].iloc[0]):,} calls or writes", loc="right")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, columnspacing=1.0,
              handlelength=1.0, fontsize=6.5)  # fmt: skip
    return ax
