"""Figures made of coloured cells with words in them: who sees what, and who is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

from labkit.figures import Axes, style

REFUSED: Final = "#D9D9D9"
EMPTY: Final = "white"
_INK: Final = {style.GREEN: "white", style.VERMILLION: "white"}

Cell = tuple[str, str]
"""Colour and words."""


def share(seen: int, of: int) -> Cell:
    """The cell for so many seen of so many: all, some, none, or more than there were.

    Parameters
    ----------
    seen, of
        Counts; nothing of nothing is an empty cell.
    """
    if not of:
        return (EMPTY, "–") if not seen else (style.VERMILLION, f"{seen:,} of 0")
    if seen == of:
        return style.GREEN, f"all {of:,}"
    return (style.YELLOW if 0 < seen < of else style.VERMILLION), f"{seen:,} of {of:,}"


def refusal(answer: str) -> Cell:
    """The cell for what the kernel refuses: the name of its errno, where it gives one."""
    name = re.search(r"\bE[A-Z]{3,}\b", answer)
    return REFUSED, name.group() if name else "ENOENT" if "No such file" in answer else "refused"


def draw_cells(
    ax: Axes,
    columns: Sequence[str],
    rows: Sequence[str],
    cell: Callable[[int, int], Cell],
    *,
    size: float = 6.5,
    label_size: float = 6.5,
) -> None:
    """Draw one cell for each column and row, the rows from above.

    Parameters
    ----------
    ax
        Where to draw; its axes become those of the cells.
    columns, rows
        Their names.
    cell
        From column and row, by their numbers, to colour and words.
    size, label_size
        Of the words in the cells, and of the rows' names; points.
    """
    from matplotlib.patches import Rectangle

    for x in range(len(columns)):
        for y in range(len(rows)):
            colour, words = cell(x, y)
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
            ink = _INK.get(colour, "black")
            ax.text(x, y, words, ha="center", va="center", fontsize=size, color=ink)
    ax.set_xlim(-0.5, len(columns) - 0.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xticks(range(len(columns)), list(columns), fontsize=6.5)
    ax.set_yticks(range(len(rows)), list(rows), fontsize=label_size)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
