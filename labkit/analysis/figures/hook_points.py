"""Draws experiment 40: what became of each hook."""

from __future__ import annotations

import re

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run

_WRITERS = {
    "by\nbpf(2)": ("passes", "writes"),
    "by a\nprogram": ("program_passes", "program_writes"),
}
_REFUSED = "#D9D9D9"


@draws("hook-points")
def hook_points(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw a row for each hook, and in it the updates that passed it, or the refusal."""
    hooks = run.table("hooks")
    ax = style.axes(ax, height=0.8 + 0.15 * len(hooks))
    labels = []
    for y, (_, hook) in enumerate(hooks.iterrows()):
        of_type = f" ({hook['map']})" if hook["role"] == "function" else ""
        labels.append(f"{hook['mechanism']} {hook['where']}{of_type}")
        for x, (passes, writes) in enumerate(_WRITERS.values()):
            colour, words = _cell(hook, passes, writes)
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
            ink = "white" if colour in (style.GREEN, style.VERMILLION) else "black"
            ax.text(x, y, words, ha="center", va="center", fontsize=5.5, color=ink)
    ax.set_xlim(-0.5, len(_WRITERS) - 0.5)
    ax.set_ylim(len(hooks) - 0.5, -0.5)
    ax.set_xticks(range(len(_WRITERS)), list(_WRITERS), fontsize=6.5)
    ax.set_yticks(range(len(hooks)), labels, fontsize=5.5)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xlabel("updates that passed the hook; grey: refused", loc="right")
    return ax


def _cell(hook: pd.Series, passes: str, writes: str) -> tuple[str, str]:
    if hook["answer"]:
        return _REFUSED, refusal(str(hook["answer"]))
    if not hook[writes]:
        return "white", "–"
    if hook[passes] == hook[writes]:
        return style.GREEN, f"all {hook[writes]}"
    return style.VERMILLION, f"{hook[passes]} of {hook[writes]}"


def refusal(answer: str) -> str:
    """The kernel's answer in a word: the name of its errno, where it gives one."""
    name = re.search(r"\bE[A-Z]{3,}\b", answer)
    return name.group() if name else "ENOENT" if "No such file" in answer else "refused"
