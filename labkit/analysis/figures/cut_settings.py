"""Draws experiment 26: what becomes of a cut settings value, by its length and format."""

from __future__ import annotations

from matplotlib import pyplot
from matplotlib.figure import Figure

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run

_STEP_BYTES = 64  # of the lengths in the table
_LOOKS = (
    ("intact", "intact", style.GREEN, ""),
    ("error", "parse error", style.YELLOW, "...."),
    ("less", "silently less", style.VERMILLION, "////"),
)


@draws("cut-settings")
def cut_settings(run: Run) -> Figure:
    """Draw the shares of the outcomes in the map of 512 bytes, one axes for each format.

    Parameters
    ----------
    run
        Its table ``outcomes`` is drawn.

    Returns
    -------
    matplotlib.figure.Figure
    """
    outcomes = run.table("outcomes")
    cut = outcomes[outcomes["case"] == "map of 512 B"]
    formats = list(cut["format"].unique())
    figure, grid = pyplot.subplots(2, 2, sharex=True, sharey=True)
    for ax, name in zip(grid.flat, formats, strict=False):
        rows = cut[cut["format"] == name].groupby("above_bytes")
        table = rows[["texts", "intact", "error", "less"]].sum()
        below = 0.0 * table["texts"]
        for column, label, color, hatch in _LOOKS:
            share = 100 * table[column] / table["texts"]
            ax.bar(
                table.index, share, width=_STEP_BYTES, align="edge", bottom=below, color=color,
                hatch=hatch, edgecolor="white", linewidth=0, label=label,
            )  # fmt: skip
            below = below + share
        ax.set_title(name, fontsize=7, fontweight="normal")
        ax.set_xticks([0, 512, 1024])
        ax.set_yticks([0, 50, 100])
    for ax in grid[:, 0]:
        ax.set_ylabel("share, %")
    for ax in grid[1]:
        ax.set_xlabel("length, bytes")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, handlelength=1.4)
    return figure
