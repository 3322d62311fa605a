"""How every figure looks: colours, markers, sizes, and the line that says where it comes from.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), told apart with every common
colour blindness; a marker and a line style say the same again, for print in grey.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from labkit.errors import BadInput
from labkit.runs import Run

# matplotlib takes half a second to import, and whoever only measures draws nothing: here and in
# the experiments it is imported where something is drawn. These names are for annotations.
if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:
    Axes = Figure = Any

BLACK: Final = "#000000"
ORANGE: Final = "#E69F00"
SKY: Final = "#56B4E9"
GREEN: Final = "#009E73"
YELLOW: Final = "#F0E442"
BLUE: Final = "#0072B2"
VERMILLION: Final = "#D55E00"
PURPLE: Final = "#CC79A7"
GREY: Final = "#6E6E6E"

HALF_PAGE: Final = (3.4, 2.6)
"""Inches; text of 8 points stays readable when two figures share the width of a page."""

_NOTE_SIZE: Final = 5.5


@dataclass(frozen=True)
class Look:
    """Colour, marker and line style of one series."""

    color: str
    marker: str
    linestyle: str | tuple[int, tuple[int, ...]]

    def line(self) -> dict[str, Any]:
        """Return keyword arguments for ``Axes.plot`` and ``Axes.errorbar``."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.linestyle}

    def points(self) -> dict[str, Any]:
        """Return the same without a line between the points."""
        return {"color": self.color, "marker": self.marker, "linestyle": "none"}


VARIANT: Final = {
    "broken": Look(VERMILLION, "X", "-"),
    "control": Look(BLUE, "o", "--"),
    "fixed": Look(GREEN, "s", "-."),
}
"""The three variants look the same in every figure."""

_SERIES: Final = (
    Look(BLUE, "o", "-"),
    Look(VERMILLION, "X", "--"),
    Look(GREEN, "s", "-."),
    Look(ORANGE, "^", ":"),
    Look(PURPLE, "D", (0, (5, 1, 1, 1, 1, 1))),
    Look(SKY, "v", (0, (3, 1))),
    Look(BLACK, "P", (0, (1, 1))),
)

_RC: Final[Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "errorbar.capsize": 2,
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
    "figure.figsize": HALF_PAGE,
    "font.size": 8,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "savefig.dpi": 200,
    "svg.hashsalt": "map-freshness-lab",
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}


def look(series: int) -> Look:
    """Return the look of the series with this number, for what is not a variant.

    Raises
    ------
    BadInput
        Beyond the seventh series, where colours would repeat: draw several axes instead.
    """
    if not 0 <= series < len(_SERIES):
        raise BadInput(f"One axes shows at most {len(_SERIES)} series; spread them over several.")
    return _SERIES[series]


def applied() -> AbstractContextManager[None]:
    """Return a context in which matplotlib draws in the lab's style."""
    import matplotlib

    return matplotlib.rc_context(_RC)


def axes(ax: Axes | None, *, height: float = HALF_PAGE[1]) -> Axes:
    """Return the axes to draw on: the given ones, or those of a new figure of half a page's width.

    ``height`` of the new figure is in inches.
    """
    if ax is not None:
        return ax
    from matplotlib import pyplot

    made: Axes = pyplot.subplots(figsize=(HALF_PAGE[0], height))[1]
    return made


def logarithmic(ax: Axes, of: str = "x", *, ticks: int = 7) -> None:
    """Make one axis ``of`` ``ax``, x or y, logarithmic, with so many ``ticks`` at the most."""
    from matplotlib.ticker import LogLocator, NullFormatter

    (ax.set_xscale if of == "x" else ax.set_yscale)("log")
    axis = ax.xaxis if of == "x" else ax.yaxis
    axis.set_major_locator(LogLocator(numticks=ticks))
    axis.set_minor_formatter(NullFormatter())


def rows(ax: Axes, labels: Iterable[str], **text: Any) -> None:
    """Name the places 0, 1, ... of the vertical axis of ``ax`` from above, and take away its grid.

    ``labels`` are the names, and ``text`` says how they look.
    """
    names = list(labels)
    ax.set_yticks(range(len(names)), names, **text)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(False, axis="y")


def legend_above(ax: Axes, columns: int = 1, **more: Any) -> None:
    """Set the legend of ``ax`` above it, in ``columns``; ``more`` is for ``Axes.legend``."""
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=columns, **more)


def sign(figure: Figure, run: Run) -> None:
    """Write under a figure where its data come from, and above it what limits them.

    The line under it has experiment, profile, kernel, CPUs and date. A mark above it is set for a
    recorded run, and for a run in an emulated machine, whose times compare with nothing outside it.
    """
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    facts = [run.experiment, f"{run.profile} profile", f"kernel {run.kernel}"]
    if run.cpus:
        facts.append(f"{run.cpus} CPUs")
    facts.append(str(run.provenance["recorded_at"])[:10])
    marks = []
    if run.recorded:
        marks.append(f"recorded on {run.kernel}")
    if run.emulated:
        marks.append("emulated machine: times compare within it only")
    strip = (_NOTE_SIZE + 4) / 72 / figure.get_figheight()
    if isinstance(engine := figure.get_layout_engine(), ConstrainedLayoutEngine):
        height = 1 - strip * (1 + len(marks))
        # The engine keeps axes clear of the mark, and of a legend above them, but no legend.
        for legend in figure.legends:
            legend.set_bbox_to_anchor((0, strip, 1, height), figure.transFigure)
            height -= legend.get_window_extent().height / figure.bbox.height
        engine.set(rect=(0, strip, 1, height))
    figure.text(
        0.995, 0.01, " · ".join(facts), ha="right", va="bottom", fontsize=_NOTE_SIZE, color=GREY
    )
    if marks:
        figure.text(
            0.995, 0.99, "\n".join(marks), ha="right", va="top", fontsize=_NOTE_SIZE + 0.5,
            color=BLACK, bbox={"facecolor": YELLOW, "edgecolor": BLACK, "lw": 0.4, "pad": 1.2},
        )  # fmt: skip
