"""Draws experiment 9: keys kept against keys inserted."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run


@draws("lru-eviction")
def lru_eviction(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the keys that are there at the end against those inserted, both of max_entries.

    Parameters
    ----------
    run
        Its table ``fill`` is drawn, one line a map type.
    ax
        Where to draw.
    """
    ax = style.axes(ax)
    entries = int(str(run.parameters["entries"]))
    for i, (case, rows) in enumerate(run.table("fill").groupby("case", sort=False)):
        label = f"{case} (refuses aloud)" if int(rows["refused"].max()) else str(case)
        ax.plot(rows["inserted"] / entries, rows["kept"] / entries, **style.look(i).line(),
                alpha=0.85, label=label)  # fmt: skip
    ax.axvline(1, color=style.GREY, lw=0.8, ls=":")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    ax.set_ylim(0, 1.4)
    ax.set_xlabel("keys inserted and confirmed (of max_entries)")
    ax.set_ylabel("keys in the map at the end")
    ax.legend(loc="upper left")
    return ax
