"""Figures: drawn from a saved run alone, in one style, and signed with its provenance.

An experiment names the function that draws its runs: ``figure(run, *, ax=None)``. It draws on
``ax``, or on `style.axes`, and returns the axes; a figure of several axes returns the `Figure`
that it made. `anomaly_rates` serves all whose result is how often something goes wrong.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from labkit.errors import BadInput
from labkit.figures import style
from labkit.figures.style import Axes as Axes
from labkit.figures.style import Figure as Figure
from labkit.judge.statistics import wilson, zero_bound
from labkit.runs import VARIANTS, Run

Drawing = Callable[..., Any]
"""Takes a run, and answers the axes or the figure that it drew on."""


def draw(drawing: Drawing, run: Run) -> Figure:
    """Draw a run by a function, in the lab's style, and sign it with its provenance.

    With empty counts, nothing is drawn on the axes. The figure is closed for pyplot, so that a
    notebook shows it once and nothing stays in memory.
    """
    from matplotlib import pyplot

    before = set(pyplot.get_fignums())
    try:
        with style.applied():
            drawn = style.axes(None) if run.counts.empty else drawing(run)
            figure = _figure(drawn, run)
            style.sign(figure, run)
            return figure
    finally:
        for number in set(pyplot.get_fignums()) - before:
            pyplot.close(number)


def stacked(
    *parts: Callable[[Run, Axes], object],
    height: float,
    ratios: Sequence[float] | None = None,
    share: str = "",
) -> Drawing:
    """Make a figure of several axes, one above the other.

    Parameters
    ----------
    *parts
        Each draws a run on one of the axes, from above.
    height
        Of the whole, inches.
    ratios
        Of the heights of the axes; all alike, if left out.
    share
        The axis that they have in common, ``x`` or ``y``.
    """

    def drawing(run: Run) -> Figure:
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(
            len(parts), 1, figsize=(style.HALF_PAGE[0], height), height_ratios=ratios,
            sharex=share == "x", sharey=share == "y",
        )  # fmt: skip
        for part, ax in zip(parts, axes, strict=True):
            part(run, ax)
        return figure

    return drawing


def as_png(figure: Figure) -> bytes:
    """A figure as a PNG picture."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200)
    return file.getvalue()


def anomaly_rates(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw anomalies per operation for every case, with 95 % intervals, on a logarithmic axis.

    A case without an anomaly is a hollow marker at the upper bound of its rate, with an arrow
    towards zero: not seen is not the same as never. The intervals take operations as independent
    (see `statistics.wilson`).
    """
    rows = run.counts[run.counts["operations"] > 0]
    ax = style.axes(ax, height=max(style.HALF_PAGE[1], 1.2 + 0.2 * len(rows)))
    if rows.empty:
        return ax
    rows = rows.assign(order=rows["variant"].map(VARIANTS.index)).sort_values(
        "order", kind="stable"
    )
    labels = []
    for y, (variant, case, operations, anomalies) in enumerate(
        zip(rows["variant"], rows["case"], rows["operations"], rows["anomalies"], strict=True)
    ):
        labels.append(run.label(case) if case else variant)
        rate_point(ax, y, int(anomalies), int(operations), style.VARIANT[variant])
    for variant in VARIANTS:
        if (rows["variant"] == variant).any():
            ax.plot([], [], **style.VARIANT[variant].points(), label=variant)
    style.logarithmic(ax)
    style.rows(ax, labels)
    words = " or ".join(dict.fromkeys(map(str, rows["anomaly"])))
    ax.set_xlabel(f"{words} per operation\n(hollow: none seen, bound at 95 %)", loc="right")
    style.legend_above(ax, len(VARIANTS), columnspacing=1.2, handletextpad=0.2)
    return ax


def rate_point(
    ax: Axes, y: float, anomalies: int, operations: int, look: style.Look, *, per: float = 1.0
) -> None:
    """Draw a rate with its 95 % interval, or the bound of one that was not seen.

    Of ``ax`` at ``y``, in the ``look``: ``anomalies`` in ``per`` of so many ``operations``.
    """
    if anomalies:
        rate = wilson(anomalies, operations)
        spread = [[per * (rate.estimate - rate.low)], [per * (rate.high - rate.estimate)]]
        ax.errorbar(per * rate.estimate, y, xerr=spread, **look.points())
    else:
        bound = per * zero_bound(operations)
        ax.errorbar(bound, y, xerr=bound / 2, xuplims=True, **look.points(), mfc="white")


def rates_against(
    ax: Axes, anomalies: pd.Series[int], operations: pd.Series[int], look: style.Look,
    label: str | None, *, x: Any,
) -> None:  # fmt: skip
    """Draw rates per million with their 95 % intervals as a line, and the bounds of those unseen.

    Of ``ax`` at each of ``x``, in the ``look`` and under the ``label``: ``anomalies`` in
    ``operations``. The line breaks where none was seen.
    """
    rates = [wilson(int(a), int(n)) for a, n in zip(anomalies, operations, strict=True)]
    ax.errorbar(
        x, [1e6 * rate.estimate or math.nan for rate in rates],
        yerr=[[1e6 * (rate.estimate - rate.low) for rate in rates],
              [1e6 * (rate.high - rate.estimate) for rate in rates]],
        label=label, **look.line(),
    )  # fmt: skip
    clean = anomalies == 0
    bounds = [1e6 * zero_bound(int(n)) for n in operations[clean]]
    ax.errorbar(x[clean], bounds, yerr=[0.4 * bound for bound in bounds], uplims=True,
                mfc="white", **look.points())  # fmt: skip


def times_of_changes(ax: Axes, costs: pd.DataFrame, *, unit: str, unit_ns: float) -> None:
    """Draw how long changes took: the median, and from 5 % to 95 %, on a logarithmic axis.

    Parameters
    ----------
    ax
        Where to draw.
    costs
        One row for each change that was timed: ``change`` and ``series`` (text; a row of the axes,
        and a look of its own), ``ns``.
    unit
        Of the axis, in words: ``"µs per change"``.
    unit_ns
        The same in nanoseconds.
    """
    changes, several = list(costs["change"].unique()), list(costs["series"].unique())
    for place, series in enumerate(several):
        look = style.look(place)
        shift = 0.8 / (len(several) + 1) * (place - (len(several) - 1) / 2)
        some = costs[costs["series"] == series]
        for y, change in enumerate(changes):
            low, middle, high = np.percentile(
                some.loc[some["change"] == change, "ns"] / unit_ns, [5, 50, 95]
            )
            ax.errorbar(
                middle, y + shift, xerr=[[middle - low], [high - middle]],
                label=series if y == 0 else None, **look.points(),
            )  # fmt: skip
    style.logarithmic(ax, ticks=8)
    ax.set_yticks(range(len(changes)), [one.replace(", ", ",\n", 1) for one in changes], fontsize=6)
    ax.set_ylim(len(changes) - 0.5, -0.5)
    ax.set_xlabel(f"{unit}: median, 5 % to 95 %", loc="right")
    style.legend_above(ax, 2, columnspacing=0.8, handletextpad=0.1)


def shares_missed(ax: Axes, follows: pd.DataFrame, look: dict[str, Any], label: str) -> None:
    """Draw the share of changes that was never seen against the period, with 95 % intervals.

    Parameters
    ----------
    ax
        Where to draw.
    follows
        One row for each period: ``period_ms``, ``missed``, ``changes``.
    look
        Of the line.
    label
        Its name in the legend.
    """
    from matplotlib.ticker import PercentFormatter

    rates = [
        wilson(int(missed), int(changes))
        for missed, changes in zip(follows["missed"], follows["changes"], strict=True)
    ]
    estimate = np.array([rate.estimate for rate in rates])
    spread = [estimate - [one.low for one in rates], [one.high for one in rates] - estimate]
    ax.errorbar(follows["period_ms"], estimate, yerr=np.clip(spread, 0, None), label=label, **look)
    ax.yaxis.set_major_formatter(PercentFormatter(1))


def mixed_readings(run: Run, ax: Axes) -> None:
    """Draw `anomaly_rates` of readings of several generations, with long labels in two lines."""
    anomaly_rates(run, ax=ax)
    labels = [label.get_text().replace(", ", ",\n", 1) for label in ax.get_yticklabels()]
    ax.set_yticks(range(len(labels)), labels, fontsize=6)
    ax.set_xlabel("mixed readings per reading\n(hollow: none seen, bound at 95 %)", loc="right")


def _figure(drawn: Axes | Sequence[Axes] | Figure, run: Run) -> Figure:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    if isinstance(drawn, Figure):
        return drawn
    first = drawn if isinstance(drawn, Axes) else np.ravel(np.asarray(drawn, dtype=object))[0]
    if not isinstance(first, Axes):
        raise BadInput(f"The figure of {run.experiment} must return axes or a figure.")
    figure = first.get_figure(root=True)
    assert figure is not None
    return figure
