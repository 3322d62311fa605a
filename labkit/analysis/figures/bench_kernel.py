"""Draws the kernel room's benchmark: how fast a ring is drained, and when Python knows."""

from __future__ import annotations

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.findings.bench_kernel import BCC, EXPERIMENT, LIBBPF, OURS
from labkit.analysis.runs import Run

_LABELS = {
    OURS: "RingReader",
    f"{OURS}, adding a field": "RingReader + sum",
    LIBBPF: "libbpf, C callback",
    BCC[1]: "bcc, cast",
    BCC[0]: "bcc, event(data)",
    "bcc, empty callback": "bcc, empty",
}


@draws(EXPERIMENT)
def bench_kernel(run: Run) -> Figure:
    """Draw the drain of a filled ring, and latency percentiles against the rate of events.

    Parameters
    ----------
    run
        Its tables ``drain``, ``latency`` and ``latency_pooled`` are drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Three axes, one above the other: drain, median latency, p99 latency.
    """
    figure, (drain, median, tail) = pyplot.subplots(
        3, 1, figsize=(style.HALF_PAGE[0], 6.6), height_ratios=(1.1, 1, 1)
    )
    _drain(drain, run)
    _latency(median, run, "p50_ns", "median")
    _latency(tail, run, "p99_ns", "p99")
    low, high = zip(median.get_ylim(), tail.get_ylim(), strict=True)
    for ax in (median, tail):
        ax.set_ylim(min(low), max(high))
    tail.set_xlabel("events per second, on a fixed schedule")
    median.legend(
        loc="lower center", bbox_to_anchor=(0.42, 1), ncols=2, columnspacing=0.8,
        handletextpad=0.3, title="who wakes the reader", title_fontsize=7,
    )  # fmt: skip
    return figure


def _drain(ax: Axes, run: Run) -> None:
    table = run.table("drain")
    for y, name in enumerate(_LABELS):
        rate = 1e3 * table["events"] / table["ns"]
        of_this = rate[table["consumer"] == name]
        middle = of_this.median()
        look = style.VARIANT["fixed" if name.startswith(OURS) else "control"]
        look = style.VARIANT["broken"] if name.startswith("bcc") else look
        ax.errorbar(
            middle, y, xerr=[[middle - of_this.min()], [of_this.max() - middle]], **look.points()
        )
        ax.annotate(
            f"{middle:.3g}", (middle, y), (0, 3.5), textcoords="offset points", ha="center",
            fontsize=6.5,
        )  # fmt: skip
    ax.set_yticks(range(len(_LABELS)), list(_LABELS.values()))
    ax.set_ylim(len(_LABELS) - 0.5, -0.7)
    ax.set_xscale("log")
    ax.grid(False, axis="y")
    ax.set_xlabel("filled ring drained, M events/s\n(median, least and greatest repetition)")


def _latency(ax: Axes, run: Run, column: str, name: str) -> None:
    pooled, repetitions = run.table("latency_pooled"), run.table("latency")
    for series, (policy, rows) in enumerate(pooled.groupby("policy", sort=False)):
        spread = repetitions[repetitions["policy"] == policy].groupby("rate")[column]
        middle = rows[column].to_numpy() / 1e3
        # The percentile of all times together may lie outside of those of the repetitions.
        low = (middle - spread.min().to_numpy() / 1e3).clip(min=0)
        high = (spread.max().to_numpy() / 1e3 - middle).clip(min=0)
        # Side by side, so that the bars of two policies do not hide each other.
        x = rows["rate"].to_numpy() * 1.09 ** (series - 2.5)
        ax.errorbar(
            x, middle, yerr=[low, high], **style.look(series).line(), label=policy,
            elinewidth=0.7, capsize=1.5,
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    rates = sorted(pooled["rate"].unique())
    ax.set_xticks(rates, [f"{rate // 1000}k" for rate in rates])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_locator(LogLocator(numticks=8))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_ylabel(f"intended time to\nPython, {name}, µs")
