"""Draws experiment 58: what an addition takes inside of an update, and whether it is kept."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import VARIANTS, Run


@draws("nested-update")
def nested_update(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the time of an addition for every way, over the rounds, and write how many were lost."""
    calls = run.table("calls")
    ways = [(variant, case) for variant in VARIANTS for case in run.cases(variant)]
    ax = style.axes(ax, height=2.6)
    ns = (calls["ns"] / calls["calls"]).groupby(calls["case"]).agg(["min", "median", "max"])
    low, high = ns["min"].min(), ns["max"].max()
    for y, (variant, case) in enumerate(ways):
        least, middle, most = ns.loc[[case]].to_numpy(dtype=float)[0]
        look = style.VARIANT[variant].points()
        ax.errorbar(middle, y, xerr=[[middle - least], [most - middle]], **look)
        left = middle * middle > low * high  # where there is room for words
        ax.annotate(
            f"{run.count(variant, case)} lost", (least if left else most, y),
            (-5 if left else 5, 0), fontsize=6,
            textcoords="offset points", ha="right" if left else "left", va="center",
        )  # fmt: skip
    for variant in VARIANTS:
        ax.plot([], [], **style.VARIANT[variant].points(), label=variant)
    ax.set_xscale("log")
    ax.set_xlim(low / 25, high * 25)
    ax.xaxis.set_major_locator(LogLocator(numticks=7))
    ax.xaxis.set_minor_formatter(NullFormatter())
    labels = [case.replace(", ", ",\n").replace(": ", ":\n") for _, case in ways]
    ax.set_yticks(range(len(ways)), labels, fontsize=6)
    ax.set_ylim(len(ways) - 0.5, -0.5)
    ax.grid(False, axis="y")
    ax.set_xlabel("ns per addition, two looks at the clock included\n(median, and range over "
                  "rounds)", loc="right")  # fmt: skip
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, columnspacing=1.2,
              handletextpad=0.2)  # fmt: skip
    return ax
