"""Draws experiment 44: the share of writes that each mechanism sees, by the way of writing."""

from __future__ import annotations

import re

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run

_COLUMNS = {
    "functions": "fexit on\nfunctions",
    "kprobes": "kprobe on\nfunctions",
    "syscalls": "return\nof bpf(2)",
    "pull": "periodic\npull",
}
_SEEN, _PART, _UNSEEN, _REFUSED = style.GREEN, style.YELLOW, style.VERMILLION, "#D9D9D9"


@draws("coverage-matrix")
def coverage_matrix(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw one cell for each path and mechanism, with the share in it."""
    matrix = run.table("matrix")
    matrix = matrix[matrix["group"] != "no write"]
    paths = list(matrix["path"].unique())
    ax = style.axes(ax, height=1.1 + 0.22 * len(paths))
    for x, mechanism in enumerate(_COLUMNS):
        rows = matrix[matrix["mechanism"] == mechanism].set_index("path")
        for y, path in enumerate(paths):
            colour, words = _cell(rows.loc[path])
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
            ax.text(x, y, words, ha="center", va="center", fontsize=6.5,
                    color="white" if colour in (_SEEN, _UNSEEN) else "black")  # fmt: skip
    groups = matrix[matrix["mechanism"] == "pull"]["group"].tolist()
    for y in range(1, len(groups)):
        if groups[y] != groups[y - 1]:
            ax.axhline(y - 0.5, color="black", linewidth=0.8)
    ax.set_xlim(-0.5, len(_COLUMNS) - 0.5)
    ax.set_ylim(len(paths) - 0.5, -0.5)
    ax.set_xticks(range(len(_COLUMNS)), list(_COLUMNS.values()), fontsize=6.5)
    ax.set_yticks(range(len(paths)), paths)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xlabel("writes seen; grey: this kernel refuses the hook", loc="right")
    return ax


def _cell(row: pd.Series) -> tuple[str, str]:
    if row["answer"]:
        number = re.search(r"\bE[A-Z]{3,}\b", str(row["answer"]))
        return _REFUSED, number.group() if number else "refused"
    seen, writes = int(row["seen"]), int(row["writes"])
    if seen == writes:
        return _SEEN, f"all {writes}"
    return (_PART, f"{seen} of {writes}") if seen else (_UNSEEN, f"0 of {writes}")
