"""Draws experiment 34: how long single calls take, with the floor of the measurement."""

from __future__ import annotations

from matplotlib.axes import Axes

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run

_WAYS = (
    "clock alone",
    "refused bpf(2)",
    "lookup, inside the kernel",
    "update, inside the kernel",
    "lookup, libbpf",
    "lookup, labkit Map",
    "lookup, bcc t[k]",
)
_SAID_NS = 47e6


@draws("syscall-cost")
def syscall_cost(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw which share of the calls took at most so long, for each way.

    Parameters
    ----------
    run
        Its table ``times`` is drawn.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = style.axes(ax, height=3.2)
    times = run.table("times").groupby("way")["ns"]
    for number, way in enumerate(_WAYS):
        look = style.look(number)
        ax.ecdf(times.get_group(way), color=look.color, ls=look.linestyle, label=way)
    ax.axvline(_SAID_NS, color=style.BLACK, lw=0.8)
    ax.text(_SAID_NS, 0.5, "47 ms, the article's mean ", ha="right", va="center", rotation=90,
            fontsize=6)  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlim(20, 2e8)
    ax.set_xlabel("duration of one call (ns)")
    ax.set_ylabel("share of the calls")
    ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1), ncols=2, fontsize=6, columnspacing=1.0)
    return ax
