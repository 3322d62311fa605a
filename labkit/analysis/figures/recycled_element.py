"""Draws experiment 15: another key's value against the time that a pointer is held."""

from __future__ import annotations

import math

from matplotlib.axes import Axes

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run
from labkit.analysis.statistics import wilson, zero_bound


@draws("recycled-element")
def recycled_element(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw how often another key's value was used, against the hold, and the cures beside it.

    Parameters
    ----------
    run
        Its table ``rounds`` is drawn.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = style.axes(ax, height=3.4)
    rounds = run.table("rounds")
    rounds = rounds[rounds["variant"] != "control"]
    for series, (case, rows) in enumerate(rounds.groupby("case", sort=False)):
        label = str(case).removeprefix("hash, ") if series else str(case)
        fixed = rows["variant"].iloc[0] == "fixed"
        look = style.VARIANT["fixed"] if fixed else style.look((0, 1, 4, 6)[series])
        if fixed and "checksum" in label and "NO_PREALLOC" in label:
            continue  # as the preallocated one
        by_hold = rows.groupby("hold").agg(
            ns=("hold_ns", "median"), foreign=("foreign", "sum"), reads=("reads", "sum"),
            absent=("absent", "sum"),
        )  # fmt: skip
        used = by_hold["reads"] - by_hold["absent"]
        rates = [wilson(int(f), int(n)) for f, n in zip(by_hold["foreign"], used, strict=True)]
        ax.errorbar(
            by_hold["ns"], [1e6 * rate.estimate or math.nan for rate in rates],
            yerr=[[1e6 * (rate.estimate - rate.low) for rate in rates],
                  [1e6 * (rate.high - rate.estimate) for rate in rates]],
            label=None if fixed else label, **look.line(),
        )  # fmt: skip
        clean = by_hold["foreign"] == 0
        bounds = [1e6 * zero_bound(int(n)) for n in used[clean]]
        ax.errorbar(by_hold["ns"][clean], bounds, yerr=[0.4 * bound for bound in bounds],
                    uplims=True, mfc="white", **look.points())  # fmt: skip
    ax.plot([], [], mfc="white", label="with a cure", **style.VARIANT["fixed"].points())
    ax.set_yscale("log")
    ax.set_xlabel("ns from lookup to end of use\n(hollow: none, bound at 95 %)", loc="right")
    ax.set_ylabel("another key's value,\nper million values used")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.25, 1), ncols=1)
    return ax
