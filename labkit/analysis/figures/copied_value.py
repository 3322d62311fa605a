"""Draws experiment 6: the version of each read around an update, and how long updates block."""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labkit.analysis import history, style
from labkit.analysis.checkers import stale
from labkit.analysis.figures import draws
from labkit.analysis.history import Op
from labkit.analysis.runs import Run

_MS = 1e6
_HELD = {"inner map held, ordinary program": 1, "inner map held, sleepable program": 0}


@draws("copied-value")
def copied_value(run: Run) -> Figure:
    """Draw the reads of one run of each case, and blocked time against time left."""
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(style.HALF_PAGE[0], 5.2), height_ratios=(1.3, 1)
    )
    _reads(run, above)
    _blocked(run, below)
    return figure


def _reads(run: Run, ax: Axes) -> None:
    updates = run.table("updates")
    longest = updates[updates["program_ms"] == updates["program_ms"].max()]
    one_each = longest.drop_duplicates("case")
    whole = history.from_frame(run.table("history"))
    late = stale(whole)
    for row, update in enumerate(one_each.itertuples()):
        begun = int(update.start_ns)
        blocked_ms = (int(update.end_ns) - begun) / _MS
        ax.barh(row, max(blocked_ms, 0.5), left=0, height=0.75, color=style.YELLOW, zorder=0)
        reads = (whole["key"] == update.key) & (whole["op"] == Op.READ)
        for chosen, look in (
            (reads & (whole["version"] == 1) & ~late, {"color": style.GREY, "marker": "o"}),
            (reads & late, style.VARIANT["broken"].points()),
            (reads & (whole["version"] == 2), style.VARIANT["fixed"].points()),
        ):
            at = (whole["start_ns"][chosen].astype(np.int64) - begun) / _MS
            ax.plot(at, [row] * len(at), **{**look, "linestyle": "none"}, ms=2.5)
    ax.plot([], [], "o", color=style.GREY, ms=2.5, label="old, update not returned")
    ax.plot([], [], **style.VARIANT["broken"].points(), ms=2.5, label="old, update returned")
    ax.plot([], [], **style.VARIANT["fixed"].points(), ms=2.5, label="new")
    ax.barh([0], [0], color=style.YELLOW, label="update under way")
    ax.set_yticks(range(len(one_each)), [case.replace(", ", ",\n") for case in one_each["case"]])
    ax.set_ylim(len(one_each) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.set_xlabel("read, ms after the update began")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, columnspacing=1)


def _blocked(run: Run, ax: Axes) -> None:
    updates = run.table("updates")
    highest = 0.0
    for case, number in _HELD.items():
        rows = updates[updates["case"] == case]
        left = (rows["ended_ns"] - rows["start_ns"]) / _MS
        blocked = (rows["end_ns"] - rows["start_ns"]) / _MS
        highest = max(highest, left.max(), blocked.max())
        ax.plot(left, blocked, **style.look(number).points(), label=case, alpha=0.8)
    ax.plot([0, highest], [0, highest], color=style.GREY, lw=0.8, label="the program's end")
    ax.set_xlabel("time the program had left, ms")
    ax.set_ylabel("update blocked, ms")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1))
