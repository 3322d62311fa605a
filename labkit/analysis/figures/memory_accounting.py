"""Draws experiment 36: memory that a group is charged as maps are made, and where it ends."""

from __future__ import annotations

from matplotlib.axes import Axes

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run


@draws("memory-accounting")
def memory_accounting(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw what each map added to the group's memory, made inside and outside of it.

    Parameters
    ----------
    run
        Its table ``maps`` is drawn: one point for each map that was asked for.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = style.axes(ax)
    maps = run.table("maps")
    largest = float(maps["mib"].max())
    ax.plot([0, largest], [0, largest], color=style.GREY, lw=0.8, label="the map's own size")
    for variant, label, rows, more in (
        ("broken", "made by somebody else", maps[~maps["limited"]], {}),
        ("control", "made by a member", maps[maps["limited"] & (maps["answer"] == 0)], {}),
        (
            "fixed",
            "refused to a member (ENOMEM)",
            maps[maps["limited"] & (maps["answer"] != 0)],
            {"mfc": "none", "ms": 9},
        ),
    ):
        look = style.VARIANT[variant].points() | more
        ax.plot(rows["mib"], rows["charged_mib"], **look, label=label)
    limit = run.parameters["limit_mib"]
    ax.set_xlabel(f"size of the map (MiB), one beside the other;\nlimit of the group {limit} MiB")
    ax.set_ylabel("charged to the group (MiB)")
    ax.legend(loc="upper left", fontsize=6)
    return ax
