"""Draws experiment 43: the share of each writer's updates that each watcher sees."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run

_WATCHERS = {
    "kprobe with a program": "program\nby kprobe",
    "fentry": "program\nby fentry",
    "kprobe without a program": "kprobe,\nno program",
}


@draws("kprobe-trap")
def kprobe_trap(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw one cell for each writer and watcher."""
    seen = run.table("seen").set_index(["writer", "watcher"])
    writers = list(dict.fromkeys(seen.index.get_level_values("writer")))
    ax = style.axes(ax, height=2.1)
    for y, writer in enumerate(writers):
        for x, watcher in enumerate(_WATCHERS):
            count, updates = seen.loc[(writer, watcher), ["seen", "updates"]]
            whole = count == updates
            colour = style.GREEN if whole else style.YELLOW if count else style.VERMILLION
            words = f"all {updates:,}" if whole else f"{count:,} of {updates:,}"
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
            ax.text(x, y, words, ha="center", va="center", fontsize=6.5,
                    color="black" if colour == style.YELLOW else "white")  # fmt: skip
    ax.set_xlim(-0.5, len(_WATCHERS) - 0.5)
    ax.set_ylim(len(writers) - 0.5, -0.5)
    ax.set_xticks(range(len(_WATCHERS)), list(_WATCHERS.values()), fontsize=6.5)
    ax.set_yticks(range(len(writers)), writers, fontsize=7)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xlabel("updates seen, of a hash, by writer", loc="right")
    return ax
