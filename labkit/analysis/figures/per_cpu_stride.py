"""Draws experiment 25: what a per-CPU lookup writes, against what its readers made room for."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run


@draws("per-cpu-stride")
def per_cpu_stride(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the bytes that one lookup writes and the buffers of two readers, by value size.

    Parameters
    ----------
    run
        Its table ``readers`` is drawn.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = style.axes(ax)
    readers = run.table("readers")
    readers = readers[readers["kind"] == readers["kind"].iloc[0]].sort_values("value_bytes")
    written = readers[readers["variant"] == "fixed"]
    cpus = int(readers["cpus"].iloc[0])
    ax.plot(
        written["value_bytes"], written["written_bytes"], **style.VARIANT["fixed"].line(),
        label="the kernel writes, labkit provides", drawstyle="steps-pre",
    )  # fmt: skip
    for case, number, label in (
        ("buffer for an array of values", 3, "an array of values"),
        ("buffer for one value", 1, "one value"),
    ):
        rows = readers[readers["case"] == case]
        ax.plot(
            rows["value_bytes"], rows["buffer_bytes"], **style.look(number).line(),
            label=f"room for {label}",
        )  # fmt: skip
    ax.xaxis.set_major_locator(MultipleLocator(8))
    ax.set_xlabel("value size, bytes")
    ax.set_ylabel(f"bytes per lookup ({cpus} possible CPUs)")
    ax.set_ylim(0, 1.4 * float(written["written_bytes"].max()))
    ax.legend(loc="upper left")
    return ax
