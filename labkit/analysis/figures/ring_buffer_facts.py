"""Draws experiment 32: what each consumer was delivered at full speed."""

from __future__ import annotations

from matplotlib.axes import Axes

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run


@draws("ring-buffer-facts")
def ring_buffer_facts(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the share of records that each consumer was delivered, and the share dropped.

    Parameters
    ----------
    run
        Its table ``consumers`` is drawn: one bar each, with its rate of delivery.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = style.axes(ax, height=2.0)
    consumers = run.table("consumers")
    delivered = 100 * consumers["delivered"] / consumers["sent"]
    dropped = 100 * consumers["refused"] / consumers["sent"]
    ax.barh(consumers.index, delivered, height=0.5, color=style.BLUE, label="delivered")
    ax.barh(
        consumers.index, dropped, left=delivered, height=0.5, color=style.VERMILLION, hatch="//",
        edgecolor="white", label="dropped",
    )  # fmt: skip
    for y, (count, seconds) in enumerate(
        zip(consumers["delivered"], consumers["seconds"], strict=True)
    ):
        ax.text(2, y - 0.42, f"{count / seconds / 1e3:,.0f} k/s delivered", fontsize=6)
    names = [name.replace(", ", ",\n") for name in consumers["consumer"]]
    ax.set_yticks(consumers.index, names)
    ax.set_ylim(len(names) - 0.5, -0.6)
    ax.set_xlim(0, 100)
    ax.grid(False, axis="y")
    ax.set_xlabel("records sent at full speed (%)")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return ax
