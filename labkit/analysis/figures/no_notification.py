"""Draws experiment 31: when each wait on a descriptor was answered, and what the answer was."""

from __future__ import annotations

import select

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run

_ANSWERS = (
    ("POLLERR", select.POLLERR, style.VARIANT["broken"]),
    ("no answer", 0, style.VARIANT["control"]),
    ("POLLIN", select.POLLIN, style.VARIANT["fixed"]),
)


@draws("no-notification")
def no_notification(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw how long each wait took, by descriptor and answer.

    Parameters
    ----------
    run
        Its table ``polls`` is drawn: waits with a change above, without one below the line
        of each descriptor.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = style.axes(ax, height=4.2)
    polls = run.table("polls")
    cases = list(polls["case"].unique())
    row = polls["case"].map(cases.index) + polls["changed"].map({True: -0.17, False: 0.17})
    for label, events, look in _ANSWERS:
        chosen = polls["events"] == events
        ax.plot(polls.loc[chosen, "waited_ms"], row[chosen], **look.points(), markersize=3.5,
                alpha=0.6, label=label)  # fmt: skip
    changed = float(polls["change_ms"].median())
    ax.axvline(changed, color=style.BLACK, linewidth=1, linestyle=":")
    ax.annotate(
        "the change", (changed, -0.75), xytext=(-3, 0), textcoords="offset points", ha="right",
        va="center", fontsize=7,
    )  # fmt: skip
    labels = [case.replace(", edges only on ", " for edges\nalone, on ") for case in cases]
    ax.set_yticks(range(len(cases)), labels)
    ax.set_ylim(len(cases) - 0.5, -1.1)
    ax.grid(False, axis="y")
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(numticks=7))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("answered after, ms\n(upper row: changed; lower: not)", loc="right")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, columnspacing=1,
              handletextpad=0.2)  # fmt: skip
    return ax
