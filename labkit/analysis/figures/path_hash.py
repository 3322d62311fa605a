"""Draws experiment 35: paths that share a 32-bit key, against how many paths there are."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run


@draws("path-hash")
def path_hash(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the collisions that stood in the map beside those that chance makes.

    Parameters
    ----------
    run
        Its table ``sizes`` is drawn; a size without a collision is a hollow marker at the upper
        bound of 95 %.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = style.axes(ax)
    sizes = run.table("sizes")
    paths, expected = sizes["paths"], sizes["expected"]
    # Two standard deviations of a count that is Poisson distributed.
    low, high = expected - 2 * np.sqrt(expected), expected + 2 * np.sqrt(expected)
    ax.fill_between(
        paths, low.clip(0.01), high, color=style.GREY, alpha=0.2, lw=0, label="two deviations"
    )
    ax.plot(paths, expected, color=style.GREY, label="by chance: n² / 2³³")
    some = sizes[sizes["collisions"] > 0]
    none = sizes[sizes["collisions"] == 0]
    look = style.VARIANT["broken"]
    ax.plot(some["paths"], some["collisions"], **look.points(), label="in the map")
    ax.plot(
        none["paths"], np.full(len(none), 3.0), **look.points(), mfc="white",
        label="none (bound at 95 %)",
    )  # fmt: skip
    ax.axvline(77_163, color=style.BLACK, lw=0.8, ls=":")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(0.02, max(40.0, 2 * float(high.max())))
    ax.set_xlabel("paths in the table\n(dotted: 77,163, a collision in every second table)")
    ax.set_ylabel("paths with another's policy")
    ax.legend(loc="upper left", fontsize=6)
    return ax
