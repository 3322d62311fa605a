"""Draws a run of the panel: one strategy under one load, window by window."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from labkit.figures import style
from labkit.runs import Run

_WIDE = 2 * style.HALF_PAGE[0]


def live_load(run: Run) -> Figure:
    """Draw the latency over the run, its tail, and what became of the changes.

    Left above p50 and p99 against time, each over the newest changes; left below the changes of
    each window that were not handed out; right the share of all changes that were later than x.
    """
    windows = run.table("windows")
    figure = pyplot.figure(figsize=(_WIDE, 3.4))
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 1))
    above = figure.add_subplot(grid[0, 0])
    for i, name in enumerate(("p50", "p99")):
        above.plot(
            windows["at_s"], windows[f"{name}_ns"] / 1e6, **style.look(i).line(), label=name, ms=3
        )
    above.set_yscale("log")
    _whole_decades(above, windows["p50_ns"], windows["p99_ns"])
    above.set_ylabel("latency (ms)")
    style.legend_above(above, 2)
    below = figure.add_subplot(grid[1, 0], sharex=above)
    share = 100 / windows["operations"]
    below.plot(
        windows["at_s"], windows["dropped"] * share, **style.look(1).line(), label="dropped", ms=3
    )
    below.plot(
        windows["at_s"], windows["coalesced"] * share, **style.look(3).line(), label="passed over",
        ms=3,
    )  # fmt: skip
    below.set_ylim(-4, 104)
    below.set_ylabel("changes (%)")
    below.set_xlabel("time (s)", loc="right")
    style.legend_above(below, 2, fontsize=6.5)
    right = figure.add_subplot(grid[:, 1])
    tail = run.table("tail")
    right.plot(tail["ns"] / 1e6, tail["share"], **(style.look(0).line() | {"marker": ""}))
    right.set_yscale("log")
    style.logarithmic(right, ticks=6)
    right.set_xlabel("latency from the intended time (ms)", loc="right")
    right.set_ylabel("share of changes seen later")
    chosen = run.parameters
    # A double map has no ring.
    ring = "" if chosen["strategy"] == "double map" else f", ring of {chosen['ring_bytes']:,} B"
    figure.suptitle(
        f"{chosen['strategy']}: {chosen['rate']:,} changes/s of {chosen['value_bytes']:,} B{ring}\n"
        f"{account(run)}; {latency(run)}",
        fontsize=7.5, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def account(run: Run) -> str:
    """Return what became of the changes of a run: a sum that is exact."""
    of = run.table("windows")[["produced", "delivered", "dropped", "coalesced"]].sum()
    return (
        f"{of['produced']:,} produced = {of['delivered']:,} delivered + {of['dropped']:,} dropped "
        f"+ {of['coalesced']:,} passed over"
    )


def latency(run: Run) -> str:
    """Return the percentiles of a run's latency that are known, as words."""
    of = run.table("percentiles").iloc[0]
    known = [name for name in ("p50", "p99", "p99.9") if of[f"{name}_ns"] > 0]
    return ", ".join(f"{name} {of[f'{name}_ns'] / 1e6:.3g} ms" for name in known)


def _whole_decades(ax: Axes, *series: pd.Series) -> None:
    """Let a logarithmic axis begin and end at a labelled tick."""
    values = np.concatenate([np.asarray(one, float) for one in series]) / 1e6
    values = values[values > 0]
    if len(values):
        ax.set_ylim(
            10 ** np.floor(np.log10(values.min())), 10 ** np.ceil(np.log10(values.max()) + 1e-9)
        )
    ax.yaxis.set_minor_formatter(NullFormatter())
