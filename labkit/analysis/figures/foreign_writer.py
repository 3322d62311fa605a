"""Draws experiment 45: how late each follower saw the other process's writes."""

from __future__ import annotations

from matplotlib.axes import Axes

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run


@draws("foreign-writer")
def foreign_writer(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the delays of all versions written; a curve ends at the share that was seen."""
    ax = style.axes(ax)
    delays = run.table("delays")
    for i, (case, group) in enumerate(delays.groupby("case", sort=False)):
        count = run.count(str(group["variant"].iloc[0]), str(case))
        seen = 1 - count.rate
        late = group["delay_ns"].sort_values() / 1e6
        share = [seen * (place + 1) / len(late) for place in range(len(late))]
        look = style.look(i)
        ax.step(late, share, where="post", color=look.color, ls=look.linestyle,
                label=f"{case}: {seen:.0%} seen")  # fmt: skip
    ax.set_xscale("log")
    ax.set_ylim(0, 1.3)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    ax.set_xlabel("from the writer's time stamp to the copy (ms)", loc="right")
    ax.set_ylabel("share of versions written")
    ax.legend(loc="upper left")
    return ax
