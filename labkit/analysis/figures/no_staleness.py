"""Draws experiment 1: the age of what programs read, as updates go on."""

from __future__ import annotations

from matplotlib.axes import Axes

from labkit.analysis import history, style
from labkit.analysis.checkers import t_staleness
from labkit.analysis.figures import draws
from labkit.analysis.history import Op
from labkit.analysis.runs import VARIANTS, Run

_PATHS = {"same CPU": "o", "other CPU": "^", "XDP": "D"}
_MS = 1e6


@draws("no-staleness")
def no_staleness(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw how long each read had missed an update, over the time of its case."""
    ax = style.axes(ax, height=3.0)
    saved = run.table("history")
    saved = saved.assign(age_ms=t_staleness(history.from_frame(saved)) / _MS)
    first = saved.groupby("case")["start_ns"].transform("min")
    saved = saved.assign(at_ms=(saved["start_ns"] - first) / _MS)
    reads = saved[saved["op"] == Op.READ]
    for (variant, case), group in reads.groupby(["variant", "case"], sort=False):
        marker = _PATHS[str(case).rpartition(", ")[2]]
        look = {**style.VARIANT[str(variant)].points(), "marker": marker}
        ax.plot(group["at_ms"], group["age_ms"], **look, ms=3, alpha=0.6)
    for variant in VARIANTS:
        for case in run.cases(variant)[:1]:
            ax.plot(
                [], [], lw=4, color=style.VARIANT[variant].color, label=case.rpartition(", ")[0]
            )
    for path, marker in _PATHS.items():
        ax.plot([], [], color=style.GREY, marker=marker, linestyle="none", ms=3, label=path)
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set_ylim(bottom=-0.03)
    ax.set_xlabel("time since the first update, ms")
    ax.set_ylabel("age of the update missed, ms")
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=2, columnspacing=1)
    return ax
