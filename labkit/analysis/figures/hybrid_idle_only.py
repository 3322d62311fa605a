"""Draws experiment 52: what a hybrid that waits until the stream idles lacks, over time."""

from __future__ import annotations

from matplotlib.axes import Axes

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import VARIANTS, Run


@draws("hybrid-idle-only")
def hybrid_idle_only(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw how many of the lost changes the copy lacked, by the time since the stream began.

    Parameters
    ----------
    run
        Its tables ``timeline`` and ``streams`` are drawn, the first round.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
        A line for each variant. Grey: the stream is busy.
    """
    ax = style.axes(ax)
    timeline, streams = run.table("timeline"), run.table("streams")
    names: dict[str, str] = dict(run.counts[["variant", "case"]].itertuples(index=False))
    for variant in VARIANTS:
        of, look = timeline[timeline["variant"] == variant], style.VARIANT[variant]
        ax.plot(of["at_ns"] / 1e9, of["missing"], color=look.color, ls=look.linestyle,
                label=names[variant])  # fmt: skip
    busy = streams[(streams["variant"] == "broken") & (streams["round"] == 0)]["busy_ns"].iloc[0]
    ax.axvspan(0, busy / 1e9, color=style.GREY, alpha=0.15, lw=0)
    ax.text(busy / 2e9, ax.get_ylim()[1] * 0.97, "the stream is busy", ha="center", va="top",
            fontsize=6.5, color=style.GREY)  # fmt: skip
    ax.set_ylabel("lost changes still missing")
    ax.set_xlabel("since the stream began (s)", loc="right")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=6.5)
    return ax
