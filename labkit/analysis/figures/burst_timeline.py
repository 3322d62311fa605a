"""Draws experiment 51: the ring's fill, the drops and the repair, over the time of one burst."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run

_WORDS = {
    "broken": "events alone",
    "control": "larger ring",
    "fixed": "hybrid",
}


@draws("burst-timeline")
def burst_timeline(run: Run) -> Figure:
    """Draw three axes over one axis of time for each variant: its first round.

    Parameters
    ----------
    run
        Its tables ``timeline`` and ``bursts`` are drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Above, how full the ring was; then the events that had found no room by then; below, how
        many keys of the burst the replica was behind with. Grey: the burst. A line from top to
        bottom: the keys of the burst are right, for good.
    """
    figure, grid = pyplot.subplots(
        3, 3, figsize=(2 * style.HALF_PAGE[0], 4.6), sharex=True, sharey="row"
    )
    bursts = run.table("bursts")
    bursts = bursts[bursts["round"] == 0].set_index("variant")
    facts: dict[Any, dict[Any, float]] = bursts.drop(columns="round").to_dict("index")
    timeline = run.table("timeline")
    # From the burst on: long enough for its repair, and as long again.
    until = 4 * float(np.nanmax(bursts["repaired_ns"] + bursts["burst_ns"])) / 1e6
    for column, (variant, words) in zip(grid.T, _WORDS.items(), strict=True):
        of = timeline[timeline["variant"] == variant]
        burst, look = facts[variant], style.VARIANT[variant]
        at = of["at_ns"] / 1e6
        for ax, values in zip(
            column,
            (100 * of["unread_bytes"] / burst["ring_bytes"], of["dropped"], of["behind"]),
            strict=True,
        ):
            ax.plot(at, values, color=look.color, drawstyle="steps-post", lw=1)
            ax.axvspan(0, burst["burst_ns"] / 1e6, color=style.GREY, alpha=0.2, lw=0)
            if not np.isnan(burst["repaired_ns"]):
                ax.axvline(
                    (burst["burst_ns"] + burst["repaired_ns"]) / 1e6, color=style.BLACK, lw=0.8,
                    ls=":",
                )  # fmt: skip
        column[0].set_title(f"{variant}: {words}")
        _sign(column[2], int(burst["behind_at_end"]), burst["repaired_ns"] / 1e6)
        column[2].set_xlabel("since the burst began (ms)", loc="right")
        column[0].set_xlim(-until / 8, until)
    for ax, words in zip(
        grid[:, 0],
        ("unread (% of the ring)", "events dropped so far", "keys behind"),
        strict=True,
    ):
        ax.set_ylabel(words)
    grid[0, 0].set_ylim(0, 105)
    for row in grid[1:]:
        row[0].set_ylim(top=1.3 * row[0].get_ylim()[1])
        row[0].yaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
    return figure


def _sign(ax: Axes, behind: int, repaired_ms: float) -> None:
    words = (
        f"{behind:,} behind in the end"
        if np.isnan(repaired_ms)
        else f"all right {repaired_ms:,.0f} ms after the burst"
    )
    ax.text(0.98, 0.97, words, transform=ax.transAxes, ha="right", va="top", fontsize=6.5)
