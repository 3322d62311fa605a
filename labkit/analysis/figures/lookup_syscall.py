"""Draws experiment 29: system calls per element, by the way that asks for it."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from labkit.analysis import style
from labkit.analysis.figures import draws
from labkit.analysis.runs import Run


@draws("lookup-syscall")
def lookup_syscall(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw how many calls of bpf(2) one element took in each way, by command.

    Parameters
    ----------
    run
        Its tables ``commands`` and ``calls`` are drawn, without the article's procedures.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = style.axes(ax, height=3.2)
    calls = run.table("calls")
    calls = calls[~calls["case"].isin(run.table("refusals")["case"])]
    cases, entries = list(calls["case"]), calls.set_index("case")["entries"]
    commands = run.table("commands")
    commands = commands[commands["case"].isin(cases)]
    aside = 0.25 * commands.groupby("case").cumcount()  # a way that makes two kinds of calls
    commands = commands.assign(row=commands["case"].map(cases.index) + aside)
    for number, (command, group) in enumerate(commands.groupby("command", sort=False)):
        ax.plot(
            group["calls"] / group["case"].map(entries),
            group["row"],
            **style.look(number).points(),
            alpha=0.8,
            label=str(command),
        )
    ax.set_yticks(range(len(cases)), cases)
    ax.set_ylim(len(cases) - 0.5, -0.5)
    ax.grid(False, axis="y")
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(numticks=7))
    ax.xaxis.set_minor_formatter(NullFormatter())
    others = int(calls["mmap"].sum() + calls["msync"].sum())
    ax.set_xlabel(f"bpf() calls per element\n(mmap and msync: {others} in all)", loc="right")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, columnspacing=1, handletextpad=0.2)
    return ax
