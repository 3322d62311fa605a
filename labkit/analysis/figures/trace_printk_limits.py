"""Draws experiment 27: bytes that came out of bpf_trace_printk against bytes that went in."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run


@draws("trace-printk-limits")
def trace_printk_limits(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the length of the messages that came out, for three ways to print them.

    Parameters
    ----------
    run
        Its table ``lengths`` is drawn.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = style.axes(ax)
    lengths = run.table("lengths")
    for label, look, chosen in (
        ("in pieces", style.look(2), lengths["variant"] == "fixed"),
        ("as format", style.look(0), lengths["case"].str.startswith("format")),
        ("as %s argument", style.look(1), lengths["case"].str.startswith("string")),
    ):
        rows = lengths[chosen].sort_values("text_bytes")
        ax.plot(rows["text_bytes"], rows["came_out_bytes"], **look.line(), label=label)
    ax.axvline(128, color=style.BLACK, linewidth=1, linestyle=":")
    ax.annotate(
        "the article's\nlimit: 128", (128, 2000), xytext=(-3, 0), textcoords="offset points",
        ha="right", va="center", fontsize=7,
    )  # fmt: skip
    for axis, scale in ((ax.xaxis, ax.set_xscale), (ax.yaxis, ax.set_yscale)):
        scale("log", base=2)
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_locator(NullLocator())
    ticks = [16, 64, 256, 1024, 4096]
    ax.set_xticks(ticks)
    ax.set_yticks(ticks)
    ax.set_xlabel("length of the message, bytes")
    ax.set_ylabel("bytes that came out")
    ax.legend(loc="lower right")
    return ax
