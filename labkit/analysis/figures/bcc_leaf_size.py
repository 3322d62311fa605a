"""Draws experiment 22: bytes lost and foreign bytes stored, against the size of the leaf."""

from __future__ import annotations

from matplotlib.axes import Axes

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run


@draws("bcc-leaf-size")
def bcc_leaf_size(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw how many bytes of each write went wrong, for every size of the leaf.

    Parameters
    ----------
    run
        Its table ``sizes`` is drawn.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = style.axes(ax)
    value_bytes = int(str(run.parameters["value_bytes"]))
    sizes = run.table("sizes")
    broken = sizes[sizes["variant"] == "broken"]
    for column, label, side, number in (
        ("foreign_bytes", "neighbouring memory stored", broken["leaf_bytes"] < value_bytes, 3),
        ("lost_bytes", "tail lost", broken["leaf_bytes"] > value_bytes, 1),
    ):
        rows = broken[side]
        per_write = rows[column] / rows["writes"]
        ax.plot(rows["leaf_bytes"], per_write, **style.look(number).line(), label=f"bcc: {label}")
    control = sizes[sizes["variant"] == "control"]
    wrong = (control["lost_bytes"] + control["foreign_bytes"]) / control["writes"]
    ax.plot(
        control["leaf_bytes"], wrong, **style.VARIANT["control"].points(), label="exact leaf",
        zorder=3,
    )  # fmt: skip
    refused = sizes[(sizes["case"] == "labkit Map") & (sizes["refused"] == sizes["writes"])]
    stored_wrongly = refused["wrong"] / refused["writes"]
    ax.plot(
        refused["leaf_bytes"], stored_wrongly, **style.VARIANT["fixed"].points(), mfc="white",
        label="labkit Map: refused",
    )  # fmt: skip
    ax.axvline(value_bytes, color=style.GREY, linewidth=0.8, linestyle=":")
    ax.set_xlabel(f"size of the leaf, bytes (value size of the map: {value_bytes})")
    ax.set_ylabel("wrong bytes per write")
    ax.set_ylim(top=1.55 * max(1.0, ax.get_ylim()[1]))
    ax.legend(loc="upper right", handlelength=2.4)
    return ax
