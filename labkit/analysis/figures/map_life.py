"""Draws experiment 28: who holds a map from step to step, and how late it goes."""

from __future__ import annotations

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run

_MAP = "the map exists"


@draws("map-life")
def map_life(run: Run) -> Figure:
    """Draw the life of one map step by step, and the time from a last drop to the end.

    Parameters
    ----------
    run
        Its tables ``life`` and ``rounds`` are drawn.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(style.HALF_PAGE[0], 4.8), height_ratios=(1.3, 1)
    )
    _life(run, above)
    _ends(run, below)
    return figure


def _life(run: Run, ax: Axes) -> None:
    life = run.table("life")
    steps = life.drop_duplicates("step").sort_values("step")
    references = list(life["reference"].unique())
    for row, name in enumerate(references):
        seen = life[(life["reference"] == name) & life["seen"]]["step"]
        ax.plot(seen, [row] * len(seen), color=style.BLUE, marker="o", linewidth=4)
    bottom = len(references)
    alive = steps[steps["exists"]]["step"]
    gone = steps[~steps["exists"]]["step"]
    ax.plot(alive, [bottom] * len(alive), color=style.GREEN, marker="s", linewidth=4)
    ax.plot(gone, [bottom] * len(gone), **style.look(1).points(), markersize=7)
    closed = float(steps.loc[steps["action"] == "close", "step"].iloc[0])
    ax.axvline(closed, color=style.BLACK, linewidth=1, linestyle=":")
    ax.annotate(
        "close()", (closed, -0.6), xytext=(3, 0), textcoords="offset points", fontsize=7,
        va="center",
    )  # fmt: skip
    ax.set_yticks(range(bottom + 1), [*references, _MAP])
    ax.set_ylim(bottom + 0.6, -0.9)
    ax.set_xticks(steps["step"], steps["action"], rotation=60, ha="right", rotation_mode="anchor")
    ax.set_title("Who holds the map")


def _ends(run: Run, ax: Axes) -> None:
    rounds = run.table("rounds")
    rounds = rounds[rounds["gone"]]
    names = list(rounds["reference"].unique())
    for row, name in enumerate(names):
        milliseconds = rounds[rounds["reference"] == name]["gone_ms"]
        look = style.look(2 if name == "" else 0)
        ax.plot(milliseconds, [row] * len(milliseconds), **look.points(), alpha=0.6)
    ax.set_yticks(range(len(names)), [name or "none but close()" for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(numticks=7))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(False, axis="y")
    ax.set_xlabel("ms after the last drop (one point a round)", loc="right")
    ax.set_title("How late the map goes")
