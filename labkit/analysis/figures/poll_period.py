"""Draws experiment 41: delay, missed versions and CPU against the poll period."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from labkit.analysis import style
from labkit.analysis.figures import draws, shares_missed
from labkit.analysis.runs import Run

_EVENTS: dict[str, Any] = {"color": style.GREEN, "ls": "-."}


@draws("poll-period")
def poll_period(run: Run) -> Figure:
    """Draw three parts over one axis of the period.

    Parameters
    ----------
    run
        Its tables ``delays`` and ``follows`` are drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Above, median and 99th percentile of the delay, with half a period in grey; then the
        share of versions missed, with 95 % intervals and the law for exponential gaps; below,
        the follower's CPU, the interpreter's share included. Events, which have no period, are a
        level line.
    """
    figure, parts = pyplot.subplots(3, 1, figsize=(style.HALF_PAGE[0], 5.6), sharex=True)
    _delay(parts[0], run)
    _missed(parts[1], run)
    _cpu(parts[2], run)
    parts[2].set_xscale("log")
    parts[2].set_xlabel("poll period T (ms)")
    return figure


def _delay(ax: Axes, run: Run) -> None:
    delays = run.table("delays")
    polled = delays[delays["case"].isin(run.cases("broken"))].groupby("period_ms")["delay_ms"]
    events = delays[delays["case"].isin(run.cases("fixed"))]["delay_ms"]
    for i, (share, name) in enumerate(((0.5, "p50"), (0.99, "p99"))):
        by_period = polled.quantile(share)
        ax.plot(by_period.index, by_period, **style.look(i).line(), label=f"poll, {name}")
        ax.axhline(float(events.quantile(share)), color=style.GREEN, ls=("-.", ":")[i],
                   label=f"events, {name}")  # fmt: skip
    periods = polled.mean().index.to_numpy()
    ax.plot(periods, periods / 2, color=style.GREY, lw=2.5, alpha=0.35, label="T / 2")
    ax.set_yscale("log")
    ax.set_ylabel("delay of a change (ms)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, columnspacing=1.0)


def _missed(ax: Axes, run: Run) -> None:
    follows = run.table("follows")
    rows = follows[follows["variant"] == "broken"]
    shares_missed(ax, rows, style.look(0).line(), "poll")
    gap = float(str(run.parameters["gap_ms"]))
    period = np.geomspace(rows["period_ms"].min(), rows["period_ms"].max(), 200)
    law = 1 - gap / period * (1 - np.exp(-period / gap))
    ax.plot(period, law, color=style.GREY, lw=2.5, alpha=0.35, label=f"law, mean gap {gap:g} ms")
    events = follows[follows["variant"] == "fixed"]
    ax.axhline(float(events["missed"].sum() / events["changes"].sum()), **_EVENTS, label="events")
    ax.set_ylim(-0.05, 1.05)
    ax.set_ylabel("versions never seen")
    ax.legend(loc="upper left")


def _cpu(ax: Axes, run: Run) -> None:
    follows = run.table("follows")
    follows = follows.assign(share=follows["cpu_ns"] / follows["elapsed_ns"])
    rows = follows[follows["variant"] == "broken"]
    ax.plot(rows["period_ms"], rows["share"], **style.look(0).line(), label="poll")
    events = follows[follows["variant"] == "fixed"]["share"].mean()
    gap = float(str(run.parameters["gap_ms"]))
    ax.axhline(float(events), **_EVENTS, label=f"events, {1e3 / gap:g} changes/s")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:.6%}".rstrip("0%").rstrip(".") + "%")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel("follower, of one CPU")
    ax.legend(loc="best")
