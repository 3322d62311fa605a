"""Draws experiment 30: lines that were read, and changes of the map, against calls."""

from __future__ import annotations

from matplotlib.axes import Axes

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run


@draws("printk-watch")
def printk_watch(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw how lines and changes grow with the calls, in the article's example and its cures.

    Parameters
    ----------
    run
        Its table ``progress`` is drawn.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = style.axes(ax)
    progress = run.table("progress")
    cases = {
        variant: list(group["case"].unique()) for variant, group in progress.groupby("variant")
    }
    (article,), (once, always) = cases["broken"], cases["fixed"]
    for number, (case, column, label) in enumerate(
        (
            (article, "lines", "lines, article's example"),
            (article, "changed", "changes of the map by it"),
            (once, "lines", "lines, if it prints changes alone"),
            (always, "lines", "lines, if it also overwrites"),
        )
    ):
        rows = progress[progress["case"] == case]
        # Curves that lie on one another show by markers at different places.
        ax.plot(
            rows["calls"], rows[column], **style.look(number).line(), label=label,
            markevery=(number, 4),
        )  # fmt: skip
    ax.set_yscale("log")
    ax.set_ylim(0.7, None)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("calls")
    ax.set_ylabel("lines, or changes")
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1))
    return ax
