"""Draws experiment 7: what each CPU reads, and what each slot keeps."""

from __future__ import annotations

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run


@draws("per-cpu-slot")
def per_cpu_slot(run: Run) -> Figure:
    """Draw versions read against versions written, and counts kept against counts made."""
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(style.HALF_PAGE[0], 4.6), height_ratios=(1.2, 1)
    )
    _reads(run, above)
    _slots(run, below)
    return figure


def _reads(run: Run, ax: Axes) -> None:
    reads = run.table("reads")
    for number, (case, group) in enumerate(reads.groupby("case", sort=False)):
        # Cases that lie on one line show by markers at different places of it.
        step = max(len(group) // 8, 1)
        start = number * step // 4
        ax.plot(
            group["written"], group["read"], **style.look(number).line(),
            markevery=(start, step), label=str(case),
        )  # fmt: skip
    ax.set_xlabel("version written on one CPU")
    ax.set_ylabel("version read")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1))


def _slots(run: Run, ax: Axes) -> None:
    slots = run.table("slots")
    slots = slots[slots["counted"] > 0]  # a slot in which nobody counted keeps no share
    cases = list(slots["case"].unique())
    for number, (who, group) in enumerate(slots.groupby("counted_by", sort=False)):
        rows = group["case"].map(cases.index) + 0.3 * (number - 0.5)
        ax.plot(
            100 * group["found"] / group["counted"], rows,
            **style.look(number).points(), alpha=0.7, label=f"counted by {who}",
        )  # fmt: skip
    wrapped = [case.replace("user space ", "").replace(" the ", " the\n", 1) for case in cases]
    ax.set_yticks(range(len(cases)), wrapped)
    ax.set_ylim(len(cases) - 0.5, -0.5)
    ax.set_xlim(-3, 103)
    ax.grid(False, axis="y")
    ax.set_xlabel("counts kept, % (one point a round)")
    ax.legend(loc="lower left")
