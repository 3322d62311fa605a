"""Draws experiment 14: torn reads against the size of the value, and what a cure costs."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run
from labkit.analysis.statistics import wilson, zero_bound

_KINDS = {
    "in_array": "array",
    "in_percpu_array": "per-CPU array",
    "in_percpu_hash": "per-CPU hash",
    "in_hash": "hash",
}
_READERS = {"process": style.look(0), "program": style.look(1)}


@draws("torn-reads")
def torn_reads(run: Run) -> Figure:
    """Draw torn reads per million against size, and the time of a read with each cure.

    Parameters
    ----------
    run
        Its table ``rounds`` is drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Three axes, one above the other: a process reads, a program reads, the cost of a read.
    """
    rounds = run.table("rounds")
    figure, (by_process, by_program, cost) = pyplot.subplots(
        3, 1, figsize=(style.HALF_PAGE[0], 6.6), height_ratios=(1, 1, 1.1)
    )
    swept = rounds[rounds["table"].isin(_KINDS) & rounds["written"]]
    swept = swept[~swept["case"].str.startswith("hash, batch")]
    for ax, reader in ((by_process, "process"), (by_program, "program")):
        _against_size(ax, swept[swept["reader"] == reader])
        ax.set_title(f"read by a {reader}")
        ax.set_ylabel("torn per million reads")
    by_process.sharex(by_program)
    by_program.set_xlabel("value, bytes (hollow: none torn, bound at 95 %)", loc="right")
    by_process.legend(
        loc="lower right", bbox_to_anchor=(1, 1.1), ncols=2, columnspacing=0.8, handletextpad=0.3
    )
    _cost(cost, rounds[rounds["size"] == run.parameters["cure_size"]])
    cost.set_xlabel(f"ns per read of {run.parameters['cure_size']} bytes", loc="right")
    return figure


def _against_size(ax: Axes, rows: pd.DataFrame) -> None:
    for series, (table, label) in enumerate(_KINDS.items()):
        sums = rows[rows["table"] == table].groupby("size")[["torn", "reads"]].sum()
        look = style.look(series)
        rates = [wilson(int(t), int(n)) for t, n in zip(sums["torn"], sums["reads"], strict=True)]
        # Not a number where none was torn: the line breaks there.
        estimates = [1e6 * rate.estimate or math.nan for rate in rates]
        ax.errorbar(
            sums.index, estimates,
            yerr=[[1e6 * (rate.estimate - rate.low) for rate in rates],
                  [1e6 * (rate.high - rate.estimate) for rate in rates]],
            label=label, **look.line(),
        )  # fmt: skip
        clean = sums[sums["torn"] == 0]
        bounds = [1e6 * zero_bound(int(reads)) for reads in clean["reads"]]
        ax.errorbar(clean.index, bounds, yerr=[0.4 * bound for bound in bounds], uplims=True,
                    mfc="white", **look.points())  # fmt: skip
    sizes = sorted(rows["size"].unique())
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sizes, [f"{size}" for size in sizes], fontsize=6)
    ax.yaxis.set_major_locator(LogLocator(numticks=6))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _cost(ax: Axes, rows: pd.DataFrame) -> None:
    ways = rows["case"].str.replace(r", (read by a|nobody writes).*", "", regex=True)
    names = [name for name in ways.unique() if "only" not in name]
    for y, name in enumerate(names):
        for reader, look in _READERS.items():
            for written, fill in ((False, "white"), (True, look.color)):
                chosen = (ways == name) & (rows["reader"] == reader) & (rows["written"] == written)
                ns = rows.loc[chosen, "read_ns"]
                if ns.empty:
                    continue
                middle = ns.median()
                ax.errorbar(
                    middle, y + (0.15 if written else -0.15),
                    xerr=[[middle - ns.min()], [ns.max() - middle]], mfc=fill, **look.points(),
                )  # fmt: skip
    for reader, look in _READERS.items():
        ax.plot([], [], label=reader, **look.points())
    ax.plot([], [], "o", color=style.GREY, mfc="white", label="nobody writes")
    ax.set_xscale("log")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=3, columnspacing=0.8, handletextpad=0.1
    )
