"""The strategies side by side: how late, how lossy and how costly, by rate, size and wakeup."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from labkit.figures import Axes, Figure, style
from labkit.judge import checkers, history
from labkit.judge.statistics import LEAST_REPETITIONS, bootstrap, percentiles
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.lab.experiment import Case, Statement, Tables, experiment, say
from labkit.lab.parts import Parts
from labkit.lab.progress import Meter
from labkit.load.strategies import DOUBLE_MAP, STRATEGIES
from labkit.load.workload import Generations, Load, Trace, median_ns, since, write_by_calls
from labkit.runs import BadRun, Run, Triad
from labkit.sync.double_map import DoubleMap
from labkit.sync.poll import Poll
from labkit.sync.ring_events import Channel, RingEvents
from labkit.sync.trace_hook import Hooks, TraceHook

_TAIL_POINTS = 60
_ROWS_KEPT = 1_200  # of the history of a cell
_IN_TIME = 0.97  # of the rate that was asked for: else the writer is the limit
_PROCESS_MOST = 200_000  # writes per second: what a process in Python may still keep up with
# What decides when the follower is woken, and the timer by which it polls anyway, seconds.
_WAKEUPS = {
    "always": (1, 0.1),
    "default": (1, 0.1),
    "every-n": (64, 0.01),
    "adaptive": (4096, 0.01),
    "never": (1, 0.001),
}
_PLAIN = ("poll 1 ms", "poll 10 ms", "events", "events, gathered 1 ms", "hybrid")
_TIMED = ("poll 10 ms", "events", "hybrid")  # whose times are compared, by statements and claims
_WRITERS = {"hook": "process", DOUBLE_MAP: "publisher"}  # of the others: the program
_READS = 50_000  # of the replica, at random moments, for a figure
_REPLICA = 1
_WIDE = 2 * style.HALF_PAGE[0]

_CASES = (
    Case("broken", "poll-overrun", "poll 10 ms at the highest rate", strategy="poll 10 ms",
         load="highest"),
    Case("control", "events-slow", "events at the lowest rate", strategy="events", load="lowest"),
    Case("fixed", "events", "events", strategy="events"),
    Case("fixed", "poll-10ms", "poll 10 ms", strategy="poll 10 ms"),
    Case("fixed", "hybrid", "hybrid", strategy="hybrid"),
    Case("fixed", "poll-1ms", "poll 1 ms", strategy="poll 1 ms"),
    Case("fixed", "gathered", "events, gathered 1 ms", strategy="events, gathered 1 ms"),
    Case("fixed", "double-map", DOUBLE_MAP, strategy=DOUBLE_MAP),
    Case("fixed", "hook", "hook", strategy="hook"),
)  # fmt: skip
_NAMES = tuple(case.strategy for case in _CASES if case.variant == "fixed")


@dataclass(frozen=True)
class Cell:
    """One place of the matrix.

    Attributes
    ----------
    strategy : str
        One of `STRATEGIES`, or `DOUBLE_MAP`.
    rate : int
        Intended changes per second. With `DOUBLE_MAP` they come as generations, each of which
        changes every key: with 200 keys 10,000 changes a second are 50 switches a second, and
        100,000 would be 500, more than a writer that waits for a grace period each time reaches.
    value_bytes : int
        Size of a value.
    wakeup : str
        As `labkit.kernel.ringbuf.WAKEUPS`; a poll does not wait to be woken.
    writer : str
        As `labkit.load.workload.WRITERS`; ``publisher``: a process that switches generations.
    """

    strategy: str
    rate: int
    value_bytes: int = 8
    wakeup: str = "default"
    writer: str = "program"


def matrix(
    rates: list[int],
    sizes: list[int],
    saturation: list[int],
    *,
    wakeups: list[str],
    switched: list[int],
) -> list[Cell]:
    """The cells that are measured.

    Parameters
    ----------
    rates : list of int
        Changes per second, ascending; the second one is the base at which the other axes vary.
    sizes : list of int
        Of values, bytes; the first one, the smallest, is the base.
    saturation : list of int
        Rates beyond, by which the knee is found.
    wakeups : list of str
        Policies for the hybrid and the hook; events are measured with all of them.
    switched : list of int
        Changes per second of the double map, multiples of what one switch changes.

    Returns
    -------
    list of Cell
        Every strategy at every rate (the double map at its own) and the first size; every
        strategy with the largest size at the base rate, and events at the highest; some with the
        sizes between; those who are
        woken with wakeup policies, at the highest rate; a process as writer, whom nobody but a
        poll and a hook sees, up to 200,000 a second, and by batches at the base rate; the
        saturation search.
    """
    first, *others = sizes
    base, highest = rates[min(1, len(rates) - 1)], rates[-1]
    cells = [Cell(name, rate, first) for name in _PLAIN for rate in rates]
    cells += [
        Cell(name, rate, first, writer="process")
        for name, at in (("hook", [*rates, _PROCESS_MOST]), ("poll 10 ms", [base, _PROCESS_MOST]))
        for rate in at
    ]
    cells += [Cell(name, base, first, writer="batches") for name in ("hook", "poll 10 ms")]
    cells += [Cell(DOUBLE_MAP, rate, first, writer="publisher") for rate in switched]
    for size in others[:-1]:
        cells += [Cell(name, base, size) for name in _TIMED]
        cells.append(Cell("hook", base, size, writer="process"))
    for size in others[-1:]:
        cells += [Cell(name, base, size) for name in _PLAIN]
        cells += [
            Cell("hook", base, size, writer="process"),
            Cell(DOUBLE_MAP, min(switched, key=lambda rate: abs(rate - base)), size,
                 writer="publisher"),
            Cell("events", highest, size),
        ]  # fmt: skip
    for wakeup in [name for name in _WAKEUPS if name != "default"]:
        cells.append(Cell("events", highest, first, wakeup))
        if wakeup in wakeups:
            cells += [
                Cell("hybrid", highest, first, wakeup),
                Cell("hook", highest, first, wakeup, "process"),
            ]
    cells += [
        Cell(name, rate, first)
        for name in ("poll 10 ms", "events", "hybrid")
        for rate in saturation
    ]
    return list(dict.fromkeys(cells))


class _Grounds:
    """What cells are measured on, each made once, since compiling takes longer than a cell."""

    def __init__(self, keys: int, longest: int, ring_bytes: int) -> None:
        self._keys, self._longest, self._ring_bytes = keys, longest, ring_bytes
        self._open = ExitStack()
        self._loads: dict[tuple[int, str], Load] = {}
        self._hooks: dict[tuple[int, str], Hooks] = {}
        self._generations: dict[int, Generations] = {}

    def prepare(self, cell: Cell) -> None:
        """Make what is missing for a cell."""
        # Who writes by system calls emits nothing: the wakeup is the hook's.
        size, wakeup = cell.value_bytes, cell.wakeup
        if cell.writer == "publisher":
            if size not in self._generations:
                made = Generations(size, keys=self._keys)
                self._generations[size] = self._open.enter_context(made)
            return
        place = size, "default" if cell.strategy == "hook" else wakeup
        if place not in self._loads:
            self._loads[place] = self._open.enter_context(
                Load(
                    size,
                    wakeup=place[1],
                    wakeup_at=_WAKEUPS[place[1]][0],
                    keys=self._keys,
                    most_operations=self._longest,
                    ring_bytes=self._ring_bytes,
                )
            )
        if cell.strategy == "hook" and (size, wakeup) not in self._hooks:
            channel = self._open.enter_context(Channel.create(self._ring_bytes))
            hooks = self._open.enter_context(
                Hooks(
                    self._loads[place].table,
                    channel,
                    wakeup=wakeup,
                    wakeup_at=_WAKEUPS[wakeup][0],
                )
            )
            hooks.detach()  # the others' writes do not pass them
            self._hooks[size, wakeup] = hooks

    def run(self, cell: Cell, seconds: float, switches: int) -> Trace:
        """One repetition of a cell that was prepared."""
        size, timer_s = cell.value_bytes, _WAKEUPS[cell.wakeup][1]
        if cell.writer == "publisher":
            generations = self._generations[size]
            with DoubleMap(0.001, layout=generations.layout) as strategy:
                return generations.run(strategy, rate=cell.rate, switches=switches)
        load = self._loads[size, "default" if cell.strategy == "hook" else cell.wakeup]
        follower = (
            TraceHook(pull_s=None, hooks=self._hooks[size, cell.wakeup], timer_s=timer_s)
            if cell.strategy == "hook"
            else STRATEGIES[cell.strategy](load.channel, timer_s)
        )
        with follower:
            return load.run(follower, rate=cell.rate, seconds=seconds, writer=cell.writer)

    def __enter__(self) -> _Grounds:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def _figures(trace: Trace, rate: int, warm_up_s: float) -> tuple[dict[str, object], pd.DataFrame]:
    """A row of the table, and the tail of the latencies."""
    count, stats = len(trace), trace.stats
    # A schedule that is cut short is warmed up by its first fifth.
    judged = np.arange(count) >= min(warm_up_s * rate / trace.changes, count // 5)
    seen = trace.seen_ns > 0
    kept = judged & seen
    latency = np.sort(since(trace.seen_ns, trace.intended_ns)[kept])
    # A poll may read an update before the call that made it has returned.
    after = np.maximum(0, since(trace.seen_ns, trace.end_ns)[kept])
    late = np.maximum(0, since(trace.start_ns, trace.intended_ns)[judged])
    of = percentiles(latency)
    span = int(trace.end_ns.max()) - int(trace.start_ns.min())
    row: dict[str, object] = {
        "operations": count * trace.changes,
        "produced": stats.produced,
        "delivered": stats.delivered,
        "dropped": stats.dropped,
        "coalesced": stats.coalesced,
        "repaired": stats.repaired,
        "resyncs": stats.resyncs,
        "unseen": int((~seen).sum()) * trace.changes,
        "reads": trace.reads,
        "mixed": trace.mixed,
        "measured": int(judged.sum()),
        "mean_ns": float(latency.mean()),
        "p50_ns": of["p50"],
        "p99_ns": of["p99"],
        "p99.9_ns": of["p99.9"],
        "max_ns": float(latency.max()),
        "commit_mean_ns": float(after.mean()),
        "commit_p50_ns": float(np.median(after)),
        "commit_p99_ns": percentiles(after)["p99"],
        "late_p50_ns": float(np.median(late)),
        "late_p99_ns": float(np.percentile(late, 99)),
        "achieved": (count - 1) * trace.changes / span * 1e9,
        "writer_ns": float(np.median(since(trace.end_ns, trace.start_ns))) / trace.changes,
        "follower_cpu": trace.follower_cpu_ns / trace.follower_wall_ns,
        "follower_ns": trace.follower_cpu_ns / (count * trace.changes),
        "map_bytes": trace.map_bytes,
        "replica_bytes": trace.replica_bytes,
    }
    share = np.geomspace(1 / len(latency), 1, _TAIL_POINTS)
    place = np.clip(len(latency) - np.round(share * len(latency)), 0, len(latency) - 1)
    return row, pd.DataFrame({"share": share, "ns": latency[place.astype(np.int64)]})


def _history(trace: Trace) -> pd.DataFrame:
    """Every write to the first keys, as many as make some thousand rows."""
    start = trace.intended_ns[0]
    per_key = 1 + int(trace.version.max() - trace.version.min())
    kept = trace.key < max(1, _ROWS_KEPT // per_key)
    names = ("intended_ns", "start_ns", "end_ns", "seen_ns")
    return pd.DataFrame(
        {
            "key": trace.key[kept],
            "version": trace.version[kept] - trace.version.min() + 1,
            **{name: since(getattr(trace, name)[kept], start) for name in names},
        }
    )


def _floor(ring_bytes: int) -> list[dict[str, object]]:
    """What the harness takes for nothing: a call, a poll that finds nothing, an update."""
    with (
        Map.create(MapKind.HASH, key="u8", value="u8", max_entries=1) as table,
        Channel.create(ring_bytes) as channel,
        RingEvents(channel) as events,
        Poll(1e-9) as poll,
    ):
        table.update(0, 1)
        events.attach(table)
        poll.attach(table)
        rows: list[dict[str, object]] = [
            {"what": what, "ns": median_ns(call)}
            for what, call in (
                ("empty call", lambda: None),
                ("poll of an empty ring", lambda: events.poll(0)),
                ("poll of an unchanged map", lambda: poll.poll(0)),
            )
        ]
        order = np.zeros(20_000, [("key", "u8"), ("version", "u8")])
        times, progress = np.zeros((len(order), 2), np.uint64), np.zeros(1, np.uint64)
        begun = time.monotonic_ns()
        write_by_calls(table, order, np.zeros(len(order), np.uint64), times, progress)
        apart = (time.monotonic_ns() - begun) / len(order)
        rows.append({"what": "write by a process, unpaced", "ns": apart})
        return rows


def _derive(tables: Tables) -> Tables:
    """Counts, and the cells in which each strategy has the writer it is for.

    ``usual`` has the rows of ``cells`` with that writer, the first size and the usual wakeup, and
    in ``load`` which rate it is: middle, lowest, highest, or other. ``ends`` tells how far those
    went that were searched for their saturation: ``strategy``, ``rate`` (the lowest one at which
    somebody ended, else the highest that was tried) and ``ended``: follower (events found no room,
    in most rounds), writer (it did not reach the rate), nobody.
    """
    cells = tables["cells"]
    usual = cells[
        (cells["writer"] == cells["strategy"].map(_WRITERS).fillna("program"))
        & (cells["wakeup"] == "default")
        & (cells["value_bytes"] == cells["value_bytes"].min())
    ]
    rates = _loads(usual)
    # Where one rate is several of them, it is the middle one.
    load = usual["rate"].map({rates[name]: name for name in ("lowest", "highest", "middle")})
    usual = usual.assign(load=load.fillna("other"))
    triad = Triad("write never seen")
    for case in _CASES:
        of = usual[usual["rate"] == rates[case.load]] if "load" in case.settings else cells
        rows = of[of["strategy"] == case.strategy]
        passed_over = (rows["operations"] - rows["delivered"]).clip(lower=0)
        fixed = case.variant == "fixed"
        triad.add(
            case.variant,
            case=case.id,
            operations=int(rows["operations"].sum()),
            anomalies=int((rows["unseen"] if fixed else passed_over).sum()),
            cost_ns=float(np.average(rows["follower_ns"], weights=rows["operations"])),
            anomaly=None if fixed else "version passed over",
        )
    return {"counts": triad.table(), "usual": usual, "ends": _ends(usual, rates["highest"])}


def _ends(usual: pd.DataFrame, highest: int) -> pd.DataFrame:
    rows = []
    searched = usual[usual["rate"] > highest]
    for name, of in searched.groupby("strategy", sort=False):
        ends = []
        for rate, rounds in of.groupby("rate"):
            drops = rounds["dropped"].gt(0).mean() > 0.5
            late = (rounds["achieved"] / rounds["rate"]).median() < _IN_TIME
            ends.append((name, rate, "follower" if drops else "writer" if late else "nobody"))
        rows.append(next((end for end in ends if end[2] != "nobody"), ends[-1]))
    return pd.DataFrame(rows, columns=["strategy", "rate", "ended"])


def _loads(usual: pd.DataFrame) -> dict[str, int]:
    """The rates at which everything is measured: the lowest, the second, and the highest."""
    # The saturation search goes beyond, without this one.
    rates = sorted(usual.loc[usual["strategy"] == "poll 1 ms", "rate"].unique().tolist())
    return {"lowest": rates[0], "middle": rates[min(1, len(rates) - 1)], "highest": rates[-1]}


def rate_of(run: Run, load: str) -> int:
    """The rate that a run has as its lowest, middle or highest; changes per second.

    Parameters
    ----------
    run : Run
        Of sync-benchmark, completed.
    load : str
        ``lowest``, ``middle`` or ``highest``.
    """
    return _loads(run.table("usual"))[load]


def rows_of(run: Run, strategy: str, rate: int | None = None) -> pd.DataFrame:
    """Runs of a strategy with the writer it is for, the first size, and the usual wakeup.

    Parameters
    ----------
    run : Run
        Of sync-benchmark, completed.
    strategy : str
        Its name.
    rate : int, optional
        Only this one, per second.

    Raises
    ------
    BadRun
        There are none.
    """
    usual = run.table("usual")
    kept = usual[usual["strategy"] == strategy]
    if rate is not None:
        kept = kept[kept["rate"] == rate]
    if kept.empty:
        raise BadRun(f"The run has no cell of {strategy} at {rate} writes per second.")
    return kept


def _latency(run: Run) -> Figure:
    """Draw the latency of changes: its distribution and tail at every rate, and percentiles.

    Parameters
    ----------
    run
        Its tables ``tails`` and ``cells`` are drawn: the program as writer, the first size.

    Returns
    -------
    matplotlib.figure.Figure
        For the lowest, the second and the highest rate, the share of changes that were seen by a
        time, and below it, on two logarithmic axes, the share that was later, pooled over the
        rounds; then p50, p99 and p99.9 against the rate, medians with 95 % intervals over the
        rounds (their range where there are too few).
    """
    from matplotlib import pyplot

    cells = run.table("usual")
    rates = sorted(set(_loads(cells).values()))
    figure = pyplot.figure(figsize=(_WIDE, 7.2))
    grid = figure.add_gridspec(3, 6)
    first: tuple[Axes | None, Axes | None] = (None, None)
    for i, rate in enumerate(rates):
        columns = slice(2 * i, 2 * i + 2)
        above = figure.add_subplot(grid[0, columns], sharex=first[0], sharey=first[0])
        below = figure.add_subplot(grid[1, columns], sharex=above, sharey=first[1])
        _tails(above, below, run, cells[cells["rate"] == rate])
        above.set_title(f"{rate:,} changes/s")
        if first[0] is None:
            first = above, below
            above.set_ylabel("share seen by then")
            below.set_ylabel("share seen later")
        below.set_xlabel("latency (ms)", loc="right")
    for i, name in enumerate(("p50_ns", "p99_ns", "p99.9_ns")):
        ax = figure.add_subplot(grid[2, 2 * i : 2 * i + 2])
        _against_rate(ax, cells[cells["rate"] <= rates[-1]], name, 1e6)
        ax.set_title(f"{name[:-3]} against the rate")
        if i == 0:
            ax.set_ylabel("latency (ms)")
    _legend(figure)
    return figure


def _cost(run: Run) -> Figure:
    """Draw where each strategy ends and what it costs.

    Parameters
    ----------
    run
        Its table ``cells`` is drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Changes handed out against changes offered, with the share dropped; the follower's CPU
        time per million changes against the rate; latency and CPU by wakeup policy.
    """
    from matplotlib import pyplot

    cells = run.table("usual")
    figure, axes = pyplot.subplots(2, 2, figsize=(_WIDE, 5.2))
    _throughput(axes[0, 0], axes[1, 0], cells)
    for end in run.table("ends").query("strategy == 'events'").itertuples():
        axes[0, 0].set_title(f"events, up to {end.rate:,}/s: {end.ended} ended", loc="right",
                             fontsize=6.5, fontweight="normal")  # fmt: skip
    _against_rate(axes[0, 1], cells, "follower_ns", 1e3)
    axes[0, 1].set_ylabel("follower's CPU\n(s per million changes)")
    _wakeups(axes[1, 1], run)
    _legend(figure)
    return figure


def _freshness(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw t-visibility: how probably the replica is fresh, by the time since the last commit.

    A line for each strategy: the share of reads of the replica, at random moments of one round at
    the second rate, that return the newest committed version (`checkers.t_visibility`).
    """
    ax = style.axes(ax, height=3.0)
    cells = run.table("cells").drop_duplicates("cell")
    names = dict(zip(cells["cell"], cells["strategy"], strict=True))
    edges = np.geomspace(1e4, 1e8, 25).astype(np.int64)
    for number, rows in run.table("history").groupby("cell"):
        name = str(names[number])
        of = checkers.t_visibility(_of_rows(rows), np.concatenate([[0], edges]))
        of = of[of["reads"] >= 20]
        middle = np.sqrt(np.maximum(of["from_ns"], 5e3) * of["to_ns"].astype(float))
        look = style.look(_NAMES.index(name))
        ax.plot(middle / 1e6, of["probability"], **look.line(), label=name, ms=3)
    ax.set_xscale("log")
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("time since the newest commit of the key (ms)", loc="right")
    ax.set_ylabel("replica is fresh (probability)")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1.01), ncols=2, fontsize=6)
    return ax


def _named(cells: pd.DataFrame) -> list[str]:
    return [name for name in _NAMES if (cells["strategy"] == name).any()]


def _tails(above: Axes, below: Axes, run: Run, cells: pd.DataFrame) -> None:
    tails = run.table("tails")
    for name in _named(cells):
        number = cells[cells["strategy"] == name]["cell"].iloc[0]
        # Every round has the same shares: their median is the pooled tail at its quantile.
        rows = tails[tails["cell"] == number].sort_values(["round", "share"])
        pooled = rows.assign(place=rows.groupby("round").cumcount()).groupby("place").median()
        look = style.look(_NAMES.index(name))
        for ax, share in ((above, 1 - pooled["share"]), (below, pooled["share"])):
            ax.plot(pooled["ns"] / 1e6, share, color=look.color, ls=look.linestyle)
    above.set_xscale("log")
    above.set_ylim(0, 1.02)
    above.tick_params(labelbottom=False)
    below.set_yscale("log")
    style.logarithmic(below, ticks=6)


def _against_rate(ax: Axes, cells: pd.DataFrame, column: str, unit: float) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    for name in _named(cells):
        of = cells[cells["strategy"] == name].dropna(subset=[column])
        look = style.look(_NAMES.index(name))
        rates = np.unique(of["rate"])
        middles, low, high = [], [], []
        for rate in rates:
            values = of[of["rate"] == rate][column].to_numpy() / unit
            spread = bootstrap(values)
            known = len(values) >= LEAST_REPETITIONS
            middles.append(spread.estimate)
            low.append(spread.estimate - (spread.low if known else values.min()))
            high.append((spread.high if known else values.max()) - spread.estimate)
        if len(rates):
            ax.errorbar(rates, middles, yerr=np.clip([low, high], 0, None), **look.line(), ms=3.5)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(cells["rate"].min() / 2, cells["rate"].max() * 2)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("changes/s, intended", loc="right")


def _throughput(above: Axes, below: Axes, cells: pd.DataFrame) -> None:
    from matplotlib.ticker import NullLocator

    cells = cells.assign(
        given=cells["achieved"] * cells["delivered"].clip(upper=cells["operations"])
        / cells["operations"],
        lost=100 * (cells["operations"] - cells["delivered"]).clip(lower=0) / cells["operations"],
    )  # fmt: skip
    for name in _named(cells):
        of = cells[cells["strategy"] == name].groupby("rate")[["given", "lost"]].median()
        look = style.look(_NAMES.index(name))
        above.plot(of.index, of["given"], **look.line(), ms=3.5)
        below.plot(of.index, of["lost"], **look.line(), ms=3.5)
    ends = [cells["rate"].min(), cells["rate"].max()]
    above.plot(ends, ends, color=style.BLACK, lw=2.5, alpha=0.2)
    above.set_yscale("log")
    above.set_ylabel("changes/s handed out")
    below.set_ylabel("changes not handed out (%)")
    dropped = int(cells["dropped"].sum())
    below.set_title(f"dropped for want of room: {dropped:,}; the rest: passed over", loc="right",
                    fontsize=6.5, fontweight="normal")  # fmt: skip
    for ax in (above, below):
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("changes/s, intended", loc="right")


def _wakeups(ax: Axes, run: Run) -> None:
    from matplotlib.ticker import NullFormatter

    cells = run.table("cells")
    cells = cells[
        (cells["strategy"] == "events")
        & (cells["writer"] == "program")
        & (cells["value_bytes"] == cells["value_bytes"].min())
    ]
    rate = cells[cells["wakeup"] != "default"]["rate"].max()
    for i, (column, words) in enumerate(
        (("writer_ns", "writer, per change"), ("follower_ns", "follower's CPU, per change"))
    ):
        of = cells[cells["rate"] == rate].groupby("wakeup")[column].median().reindex(list(_WAKEUPS))
        look = style.look(i)
        ax.plot(range(len(of)), of / 1e3, **look.points(), label=words)
    ax.set_yscale("log")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(range(len(_WAKEUPS)), list(_WAKEUPS), fontsize=6.5)
    ax.set_xlim(-0.5, len(_WAKEUPS) - 0.5)
    ax.set_ylabel("time (us)")
    ax.set_xlabel(f"who wakes the follower, at {rate:,} changes/s", loc="right")
    ax.set_ylim(0.1, None)
    style.legend_above(ax, 2, fontsize=6.5)


def _of_rows(rows: pd.DataFrame) -> history.History:
    """The writes of one cell, and reads of the replica at random moments."""
    rng = np.random.default_rng(0)
    rows = rows[rows["seen_ns"] > 0].sort_values(["key", "version"])
    offset = max(0, -int(rows[["intended_ns", "start_ns", "end_ns", "seen_ns"]].min().min()))
    written = history.build(
        int(history.Op.WRITE), key=rows["key"], version=rows["version"],
        intended_ns=rows["intended_ns"] + offset, start_ns=rows["start_ns"] + offset,
        end_ns=rows["end_ns"] + offset,
    )  # fmt: skip
    keys, versions, moments = [], [], []
    for key, of in rows.groupby("key"):
        at = rng.integers(
            of["end_ns"].min(), of["end_ns"].max() + 1, _READS // rows["key"].nunique()
        )
        # What the replica held then: the newest version that was seen by that moment.
        held = np.searchsorted(of["seen_ns"].to_numpy(), at, side="right") - 1
        known = held >= 0
        keys.append(np.full(int(known.sum()), key))
        versions.append(of["version"].to_numpy()[held[known]])
        moments.append(at[known] + offset)
    read = history.build(
        int(history.Op.READ), key=np.concatenate(keys), version=np.concatenate(versions),
        start_ns=np.concatenate(moments), end_ns=np.concatenate(moments), actor=_REPLICA,
    )  # fmt: skip
    return history.concatenate(written, read)


def _legend(figure: Figure) -> None:
    """One legend for all axes, of the strategies that are drawn in any."""
    from matplotlib.lines import Line2D

    colours = {line.get_color() for ax in figure.axes for line in ax.get_lines()}
    handles = [
        Line2D([], [], **style.look(i).line(), label=name)
        for i, name in enumerate(_NAMES)
        if style.look(i).color in colours
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=6.5)


@experiment(
    "sync-benchmark",
    number=50,
    family="sync",
    question="Which way to keep a copy in sync is how late, how lossy and how costly?",
    claims=("4.4",),
    needs=("bpf", "compile", "test_run", "two_cpus", "hash", "batch_hash", "ringbuf",
           "mmapable_array", "map_in_map"),
    quick={
        "rates": [1_000, 10_000, 20_000, 100_000], "sizes": [8, 64, 1024],
        "saturation": [1_000_000], "wakeups": [], "switched": [10_000, 100_000], "switches": 24,
        "rounds": 9, "others_every": 4, "within_s": 30.0, "seconds": 0.13, "warm_up_s": 0.02,
        "keys": 200, "most_operations": 100_000, "ring_bytes": 1 << 22, "seed": 1,
    },
    full={
        "rates": [1_000, 10_000, 20_000, 100_000], "sizes": [8, 64, 1024],
        "saturation": [200_000, 500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000],
        "wakeups": ["always", "every-n", "adaptive", "never"],
        "switched": [1_000, 5_000, 10_000, 100_000], "switches": 40,
        "rounds": 7, "others_every": 1, "within_s": 700.0, "seconds": 1.0, "warm_up_s": 0.1,
        "keys": 200, "most_operations": 400_000, "ring_bytes": 1 << 22, "seed": 1,
    },
    cases=_CASES,
    derive=_derive,
    statements=(
        Statement("produced = delivered + dropped + coalesced, in every cell",
                  "all(0 < cells.produced == cells.delivered + cells.dropped + cells.coalesced)"),
        Statement("what a follower counts as produced is what was written",
                  "all(0 < cells.produced == cells.operations)"),
        Statement("every write is seen in the end, that version or a newer one",
                  "none(fixed, like=1e-3)"),
        Statement("events hand out every version at the lowest rate", "none(control)"),
        # Each key is written several times between two polls.
        Statement("a poll passes most versions over at the highest rate", "broken.rate > 0.5"),
        Statement("a generation stands in the replica whole, or not at all",
                  'none(cells(strategy="double map").mixed > 0) '
                  'and all(cells(strategy="double map").reads > 0)'),
        Statement("where changes come key by key, keys stand there at different versions",
                  'some(usual(strategy="events").mixed > 0)'),
        # From the commit on: a writer that was late is no strategy's fault. What keeps a follower
        # from its CPU delays both of a pair, and brings their ratio no further than to 1.
        Statement("after the commit, the median of events is below half the mean of a 10 ms poll",
                  'ratio(usual(strategy="events", load="middle").commit_p50_ns, '
                  'usual(strategy="poll 10 ms", load="middle").commit_mean_ns) < 0.5'),
        Statement("and the p99 of events is below that of the poll",
                  'ratio(usual(strategy="events", load="middle").commit_p99_ns, '
                  'usual(strategy="poll 10 ms", load="middle").commit_p99_ns) < 1'),
    ),
    sentence='At {usual(load="middle").rate} changes/s events were seen '
    '{us(median(usual(strategy="events", load="middle").p50_ns))} (p50) and '
    '{us(median(usual(strategy="events", load="middle").p99_ns))} (p99) after their intended time, '
    'those of a 10 ms poll {us(median(usual(strategy="poll 10 ms", load="middle").p50_ns))} and '
    '{us(median(usual(strategy="poll 10 ms", load="middle").p99_ns))}, medians of '
    '{rows(usual(strategy="events", load="middle"))} rounds with a writer that was '
    '{us(median(usual(strategy="events", load="middle").late_p99_ns))} late at its p99. '
    'At {usual(load="highest").rate}/s events dropped '
    '{sum(usual(strategy="events", load="highest").dropped)} of '
    '{sum(usual(strategy="events", load="highest").operations)} and took '
    '{percent(median(usual(strategy="events", load="highest").follower_cpu))} of a CPU. '
    "A poll passed over {broken}; {fixed} writes were never seen by anybody.",
    figure=_latency,
    # By these names the notebooks ask for them.
    figures={"sync-benchmark-cost": _cost, "sync-benchmark-freshness": _freshness},
)  # fmt: skip
def sync_benchmark(
    *,
    rates: list[int],
    sizes: list[int],
    saturation: list[int],
    wakeups: list[str],
    switched: list[int],
    switches: int,
    rounds: int,
    others_every: int,
    within_s: float,
    seconds: float,
    warm_up_s: float,
    keys: int,
    most_operations: int,
    ring_bytes: int,
    seed: int,
    parts: Parts,
) -> Tables:
    """Run the cells of the matrix in turns, each round in an order of its own, and keep figures.

    The writer has CPU 0 and the follower CPU 1. Writes have intended times, an open loop: the
    latency of a write is the moment at which the follower's replica first could return its
    version or a newer one, less its intended time. A write is known by key and version, which the
    value carries, and so is its intended time.

    Parameters
    ----------
    rates, sizes, saturation, wakeups, switched : list
        As `matrix` takes them.
    switches : int
        Generations of one schedule of the double map.
    rounds : int
        Of the cells whose times are compared: the 10 ms poll, events and the hybrid at the second
        rate. They run next to each other in every round, so that other load meets all alike.
    others_every : int
        All other cells are run in every so many-th round,
    within_s : float
        but, after the first, in none that would not end within so many seconds.
    seconds, warm_up_s : float
        Length of a schedule, and how much of its beginning is not judged, seconds.
    keys : int
        Written in turns.
    most_operations : int
        Writes of one schedule at most: a rate beyond is run for a shorter time.
    ring_bytes : int
        Size of the ring, bytes.
    seed : int
        Of the order.
    parts : Parts
        What is done already: a part is one round of one cell.

    Returns
    -------
    dict of DataFrame
        ``cells``: one row per cell and round, with the columns of `Cell`, ``cell`` and ``round``
        (numbers), ``operations`` (changes that were written), ``produced``, ``delivered``,
        ``dropped``, ``coalesced``, ``repaired``, ``resyncs`` (as `labkit.sync.strategy.Stats`),
        ``unseen`` (changes of which neither that version nor a newer one was ever seen), ``reads``
        and ``mixed`` (as `labkit.load.workload.Trace`), ``measured`` (writes after the warm-up; a
        switch is one), ``mean_ns``, ``p50_ns``, ``p99_ns``, ``p99.9_ns`` and ``max_ns`` of their
        latency, ``commit_mean_ns``, ``commit_p50_ns`` and ``commit_p99_ns`` of the same from the
        moment of the commit on (a switch shows before its call returns, which waits: 0),
        ``late_p50_ns`` and ``late_p99_ns`` (the writer behind its schedule), ``achieved`` (changes
        per second), ``writer_ns`` (a change with its event, median; of a switch the share of each
        change), ``follower_cpu`` (CPUs), ``follower_ns`` (CPU per change), ``map_bytes``,
        ``replica_bytes``. Percentiles with fewer than ten writes beyond them are NaN.
        ``tails``: ``cell``, ``round``, ``share`` of the writes that were later than ``ns``.
        ``history``: the writes to the first keys of one round at the second rate, with ``cell``,
        ``key``, ``version`` and times in nanoseconds from the first intended one. ``floor``: the
        harness's own time per call in ns, by ``what`` and ``round``.
    """
    cells = matrix(rates, sizes, saturation, wakeups=wakeups, switched=switched)
    base = rates[min(1, len(rates) - 1)]
    compared = [cells.index(Cell(name, base, sizes[0])) for name in _TIMED]
    others = [number for number in range(len(cells)) if number not in compared]
    remembered = [Cell(name, base, sizes[0]) for name in _PLAIN]
    remembered += [Cell("hook", base, sizes[0], writer="process"),
                   Cell(DOUBLE_MAP, base, sizes[0], writer="publisher")]  # fmt: skip
    rng = np.random.default_rng(seed)
    table: list[dict[str, object]] = []
    tails: list[pd.DataFrame] = []
    histories: list[pd.DataFrame] = []
    floor: list[dict[str, object]] = []
    longest = min(most_operations, round(seconds * max([*rates, *saturation])))
    with ExitStack() as stack:
        grounds = stack.enter_context(_Grounds(keys, longest, ring_bytes))
        say("compiling the writers")
        for cell in cells:
            grounds.prepare(cell)

        def one(cell: Cell, remember: bool) -> dict[str, object]:
            trace = grounds.run(cell, seconds, switches)
            row, tail = _figures(trace, cell.rate, warm_up_s)
            kept = _history(trace).to_dict("list") if remember else {}
            return {"row": row, "tail": tail.to_dict("list"), "history": kept}

        whole = -(-rounds // others_every)
        total = rounds * len(compared) + whole * (1 + len(others))
        meter = stack.enter_context(Meter(total, done=parts.before, unit="part"))

        def measured(name: str, measure: Callable[[], object]) -> Any:
            known = name in parts
            value = parts.measure(name, measure)
            if not known:
                meter.step()
            return value

        done = 0  # rounds of all cells
        for turn in range(rounds):
            order = [*rng.permutation(compared).tolist()]
            ended_s = parts.spent_s / max(1, done) * (done + 1)
            # A round that was begun before a stop is gone on with.
            begun = f"{turn:03}-floor" in parts
            if turn % others_every == 0 and (begun or not done or ended_s <= within_s):
                rows = measured(f"{turn:03}-floor", lambda: _floor(ring_bytes))
                floor += [{"round": turn, **row} for row in rows]
                order += rng.permutation(others).tolist()
                done += 1
            elif turn % others_every == 0:
                say(f"no time for all cells in round {turn + 1} of {rounds}")
            for number in order:
                cell = cells[number]
                remember = turn == 0 and cell in remembered
                part = measured(f"{turn:03}-{number:03}", partial(one, cell, remember))
                where = {"cell": number, "round": turn}
                table.append({**where, **asdict(cell), **part["row"]})
                tails.append(pd.DataFrame(part["tail"]).assign(**where))
                if remember:
                    histories.append(pd.DataFrame(part["history"]).assign(cell=number))
    return {
        "cells": pd.DataFrame(table).sort_values(["cell", "round"], ignore_index=True),
        "tails": pd.concat(tails, ignore_index=True).astype(
            {"cell": "int16", "round": "int16", "share": "float32", "ns": "float32"}
        ),
        "history": pd.concat(histories, ignore_index=True).astype(
            {"key": "uint16", "version": "uint32"}
        ),
        "floor": pd.DataFrame(floor),
    }
