"""Draws experiment 42: the parts of the delay of a change that is polled for over HTTP."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run

# A hatch says the same as the colour, for print in grey.
_PARTS = {
    "wait": ("#D9D9D9", ""),
    "name lookup": (style.YELLOW, "...."),
    "connect": (style.ORANGE, ""),
    "TLS": (style.VERMILLION, "////"),
    "request": (style.SKY, ""),
    "server": (style.BLUE, "\\\\\\\\"),
    "compare": (style.BLACK, ""),
}


@draws("http-poll")
def http_poll(run: Run) -> Figure:
    """Draw stacked bars of the parts, with the whole at their ends.

    A bar is the mean over the middle half of the delays: parts still add up, and the few that
    other load on the machine held up do not count. Those show in the 99th percentile beside it.

    Parameters
    ----------
    run
        Its tables ``changes`` and ``polls`` are drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Above, the delay of a change for every client, from its intended moment on; below,
        one poll, that is all but the wait, for those whose server answers every time. The first
        poll over a kept connection, which opens it, is left out there.
    """
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(style.HALF_PAGE[0] * 1.35, 4.6), height_ratios=(8, 4.6)
    )
    answered = run.cases("control")
    pairs = zip(run.cases("broken"), run.cases("fixed"), strict=True)
    others = [case for pair in pairs for case in pair]
    _stacked(above, run.table("changes"), list(_PARTS), answered + others)
    above.set_xlabel("delay of a change (ms): middle half, and p99", loc="right")
    polls = run.table("polls")
    opening = polls["case"].str.contains("kept") & (polls["connect"] > 0)
    _stacked(below, polls[~opening], list(_PARTS)[1:], answered)
    below.set_xlabel("one poll, all but the wait (ms): middle half, and p99", loc="right")
    handles, labels = above.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, columnspacing=1.2)
    return figure


def _stacked(ax: Axes, table: pd.DataFrame, parts: list[str], cases: list[str]) -> None:
    rows, left = np.arange(len(cases)), np.zeros(len(cases))
    whole = table[parts].sum(axis=1).groupby(table["case"])
    tail = whole.quantile(0.99).loc[cases] / 1e6
    middle = whole.rank(pct=True).between(0.25, 0.75)
    means = table[middle].groupby("case")[parts].mean().loc[cases] / 1e6
    for part in parts:
        color, hatch = _PARTS[part]
        ax.barh(rows, means[part], left=left, height=0.72, color=color, hatch=hatch, lw=0.3,
                edgecolor=style.BLACK, label=part)  # fmt: skip
        left += means[part].to_numpy()
    for row, total, late in zip(rows, left, tail, strict=True):
        ax.annotate(f"{total:.3g} (p99 {late:.3g})", (total, row), xytext=(3, 0),
                    textcoords="offset points", va="center", fontsize=6)  # fmt: skip
    ax.set_yticks(rows, [case.replace("new connection", "new") for case in cases])
    ax.set_ylim(len(cases) - 0.5, -0.5)
    ax.set_xlim(0, left.max() * 1.28)
    ax.grid(False, axis="y")
