"""Draws experiment 23: bytes past the end of the buffer, against its size."""

from __future__ import annotations

from matplotlib.axes import Axes

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run


@draws("short-read-buffer")
def short_read_buffer(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw how far lookups and updates run over buffers of many sizes.

    Parameters
    ----------
    run
        Its table ``buffers`` is drawn.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = style.axes(ax)
    buffers = run.table("buffers")
    plain = buffers[buffers["case"] == "plain call"]
    for number, (size, rows) in enumerate(plain.groupby("value_bytes")):
        look = style.look(number)
        read, write = (rows[rows["direction"] == way] for way in ("read", "write"))
        ax.plot(
            read["buffer_bytes"] / read["value_bytes"], read["overrun_bytes"] / read["calls"],
            **look.line(), label=f"value of {size:,} B",
        )  # fmt: skip
        ax.plot(
            write["buffer_bytes"] / write["value_bytes"], write["overrun_bytes"] / write["calls"],
            **look.points(), mfc="none", markersize=8, markeredgewidth=0.8,
        )  # fmt: skip
    ax.plot([], [], color=style.GREY, marker="o", markersize=8, mfc="none", linestyle="none",
            label="large, hollow: update")  # fmt: skip
    bounced = buffers[(buffers["case"] == "bounce buffer") & (buffers["direction"] == "read")]
    ax.plot(
        bounced["buffer_bytes"] / bounced["value_bytes"],
        bounced["overrun_bytes"] / bounced["calls"],
        color=style.BLACK, marker=".", linestyle="none", markersize=3, label="bounce buffer",
    )  # fmt: skip
    ax.set_yscale("symlog", base=2, linthresh=4)
    ax.set_yticks([0, *(4**power for power in range(1, 7))])
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.set_ylim(-1, 4 * float(plain["value_bytes"].max()))
    ax.set_xlabel("size of the buffer / size of the value")
    ax.set_ylabel("bytes past its end per call")
    ax.legend(loc="upper right")
    return ax
