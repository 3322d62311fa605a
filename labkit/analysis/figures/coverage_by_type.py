"""Draws experiment 48: what each mechanism sees, by type of map and way of writing."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run

_TITLES = {"functions": "fexit on functions", "kprobes": "kprobe on functions",
           "syscalls": "return of bpf(2)", "pull": "periodic pull"}  # fmt: skip
_NO_HOOK, _NO_WRITE = "#D9D9D9", "white"


@draws("coverage-by-type")
def coverage_by_type(run: Run) -> Figure:
    """Draw one square for each type and way: all seen, some, none; and what cannot be."""
    matrix = run.table("matrix")
    maps, paths = list(matrix["map"].unique()), list(matrix["path"].unique())
    figure, axes = pyplot.subplots(1, len(_TITLES), figsize=(6.9, 3.0), sharey=True)
    for ax, (mechanism, title) in zip(axes, _TITLES.items(), strict=True):
        _squares(ax, matrix[matrix["mechanism"] == mechanism], maps, paths)
        ax.set_title(title, fontsize=7)
    axes[0].set_yticks(range(len(paths)), paths, fontsize=6.5)
    figure.supxlabel(
        "● all seen   ◐ some   ○ none\ngrey: hook refused   empty: no such write",
        x=0.01, ha="left", fontsize=6.5,
    )  # fmt: skip
    return figure


def _squares(ax: Axes, rows: pd.DataFrame, maps: list[str], paths: list[str]) -> None:
    for _, row in rows.iterrows():
        x, y = maps.index(row["map"]), paths.index(row["path"])
        colour, sign = _cell(row)
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
        ax.text(x, y, sign, ha="center", va="center", fontsize=6,
                color="black" if colour == style.YELLOW else "white")  # fmt: skip
    ax.set_xlim(-0.5, len(maps) - 0.5)
    ax.set_ylim(len(paths) - 0.5, -0.5)
    ax.set_xticks(range(len(maps)), maps, rotation=90, fontsize=6)
    ax.tick_params(length=0)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _cell(row: pd.Series) -> tuple[str, str]:
    if row["answer"]:
        return _NO_HOOK, ""
    if not row["writes"]:
        return _NO_WRITE, ""
    if row["seen"] == row["writes"]:
        return style.GREEN, "●"
    return (style.YELLOW, "◐") if row["seen"] else (style.VERMILLION, "○")
