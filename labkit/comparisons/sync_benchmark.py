"""The strategies side by side: how late, how lossy and how dear, by rate, size and wakeup."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.analysis.statistics import percentiles
from labkit.failures.experiment import Tables, experiment, say
from labkit.failures.parts import Parts
from labkit.failures.progress import Meter
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.sync.double_map import DoubleMap
from labkit.sync.hybrid import Hybrid
from labkit.sync.poll import Poll
from labkit.sync.ring_events import Channel, RingEvents
from labkit.sync.strategy import Strategy
from labkit.sync.trace_hook import Hooks, TraceHook
from labkit.workload import Generations, Load, Trace, median_ns, since, write_by_calls

_TAIL_POINTS = 60
_LEAST_ROUNDS = 2
_ROWS_KEPT = 1_200  # of the history of a cell
_PROCESS_MOST = 200_000  # writes per second: what a process in Python may still keep up with
# What decides when the follower is woken, and the timer by which it looks anyway, seconds.
_WAKEUPS = {
    "default": (1, 0.1),
    "always": (1, 0.1),
    "every-n": (64, 0.01),
    "adaptive": (4096, 0.01),
    "never": (1, 0.001),
}


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
        As `labkit.workload.WRITERS`; ``publisher``: a process that switches generations.
    """

    strategy: str
    rate: int
    value_bytes: int = 8
    wakeup: str = "default"
    writer: str = "program"


# A strategy joins the benchmark by a line here and its cells in `matrix`.
STRATEGIES: dict[str, Callable[[Channel, float], Strategy]] = {
    "poll 1 ms": lambda channel, timer_s: Poll(0.001),
    "poll 10 ms": lambda channel, timer_s: Poll(0.01),
    "events": lambda channel, timer_s: RingEvents(channel, timer_s=timer_s),
    "events, gathered 1 ms": lambda channel, timer_s: RingEvents(
        channel, timer_s=timer_s, gather_s=0.001
    ),
    "hybrid": lambda channel, timer_s: Hybrid(channel, timer_s=timer_s),
    "hook": lambda channel, timer_s: TraceHook(pull_s=None),
}
"""By name, with the channel and the follower's timer: followers of one map that are compared."""

DOUBLE_MAP = "double map"
"""The follower of a table that is published whole; it looks every millisecond for a switch."""

_PLAIN = ("poll 1 ms", "poll 10 ms", "events", "events, gathered 1 ms", "hybrid")


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
        strategy with the other sizes at the base rate, and events at the highest; those who are
        woken with wakeup policies, at the highest rate; a process as writer, whom nobody but a
        poll and a hook sees, up to 200,000 a second; the saturation search.
    """
    first, *others = sizes
    base, highest = rates[min(1, len(rates) - 1)], rates[-1]
    cells = [Cell(name, rate, first) for name in _PLAIN for rate in rates]
    cells += [
        Cell(name, rate, first, writer="process")
        for name, at in (("hook", [*rates, _PROCESS_MOST]), ("poll 10 ms", [base, _PROCESS_MOST]))
        for rate in at
    ]
    cells += [Cell(DOUBLE_MAP, rate, first, writer="publisher") for rate in switched]
    for size in others:
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


@experiment(
    "sync-benchmark",
    number=50,
    family="sync",
    question="Which way to keep a copy in sync is how late, how lossy and how dear?",
    claims=("4.4",),
    needs=("bpf", "compile", "test_run", "two_cpus", "hash", "batch_hash", "ringbuf",
           "mmapable_array", "map_in_map"),
    quick={
        "rates": [1_000, 10_000, 100_000], "sizes": [8, 1024], "saturation": [1_000_000],
        "wakeups": ["never"], "switched": [10_000, 100_000], "switches": 24,
        "repetitions": 5, "within_s": 50.0, "seconds": 0.13, "warm_up_s": 0.02, "keys": 200,
        "most_operations": 100_000, "ring_bytes": 1 << 22, "seed": 1,
    },
    full={
        "rates": [1_000, 10_000, 100_000], "sizes": [8, 64, 1024],
        "saturation": [200_000, 500_000, 1_000_000, 2_000_000],
        "wakeups": ["always", "every-n", "adaptive", "never"],
        "switched": [1_000, 5_000, 10_000, 100_000], "switches": 40,
        "repetitions": 7, "within_s": 700.0, "seconds": 1.0, "warm_up_s": 0.1, "keys": 200,
        "most_operations": 400_000, "ring_bytes": 1 << 22, "seed": 1,
    },
)  # fmt: skip
def sync_benchmark(
    *,
    rates: list[int],
    sizes: list[int],
    saturation: list[int],
    wakeups: list[str],
    switched: list[int],
    switches: int,
    repetitions: int,
    within_s: float,
    seconds: float,
    warm_up_s: float,
    keys: int,
    most_operations: int,
    ring_bytes: int,
    seed: int,
    parts: Parts,
) -> Tables:
    """Run every cell of the matrix in an order of its own per repetition, and keep its figures.

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
    repetitions : int
        Rounds; each runs all cells in a new random order.
    within_s : float
        Begin no round, after the second, that would not end within so many seconds: on a busy
        machine there are fewer of them, and no interval over repetitions.
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
        What is done already: a part is one repetition of one cell.

    Returns
    -------
    dict of DataFrame
        ``cells``: one row per cell and repetition, with the columns of `Cell`, ``cell`` and
        ``repetition`` (numbers), ``operations`` (changes that were written), ``produced``,
        ``delivered``, ``dropped``, ``coalesced``, ``repaired``, ``resyncs`` (as
        `labkit.sync.strategy.Stats`), ``unseen`` (changes of which neither that version nor a
        newer one was ever seen), ``looks`` and ``mixed`` (as `labkit.workload.Trace`),
        ``measured`` (writes after the warm-up; a switch is one), ``mean_ns``, ``p50_ns``,
        ``p99_ns``, ``p99.9_ns`` and ``max_ns`` of their latency, ``commit_mean_ns``,
        ``commit_p50_ns`` and ``commit_p99_ns`` of the same from the moment of the commit on (a
        switch shows before its call returns, which waits: 0), ``late_p50_ns`` and
        ``late_p99_ns`` (the writer behind its schedule), ``achieved`` (changes per second),
        ``writer_ns`` (a change with its event, median; of a switch the share of each change),
        ``follower_cpu`` (CPUs), ``follower_ns`` (CPU per change), ``map_bytes``,
        ``replica_bytes``. Percentiles with fewer than ten writes beyond them are NaN.
        ``tails``: ``cell``, ``repetition``,
        ``share`` of the writes that were later than ``ns``. ``history``: the writes to the first
        keys of one repetition at the second rate, with ``cell``, ``key``, ``version`` and times in
        nanoseconds from the first intended one. ``floor``: the harness's own time per call in ns,
        by ``what`` and ``repetition``. ``counts``: in broken (the 10 ms poll at the highest rate)
        an anomaly is a change that was passed over; in control (events at the lowest rate) one
        not handed out; in fixed (all strategies, all cells) a write whose version, or a newer one,
        the follower never had; ``cost_ns`` is the follower's CPU per change.
    """
    cells = matrix(rates, sizes, saturation, wakeups=wakeups, switched=switched)
    base = rates[min(1, len(rates) - 1)]
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

        meter = stack.enter_context(
            Meter(repetitions * (1 + len(cells)), done=parts.before, unit="part")
        )

        def measured(name: str, measure: Callable[[], object]) -> Any:
            known = name in parts
            value = parts.measure(name, measure)
            if not known:
                meter.step()
            return value

        for repetition in range(repetitions):
            a_round = parts.spent_s / max(1, repetition)
            if repetition >= _LEAST_ROUNDS and (repetition + 1) * a_round > within_s:
                say(f"no time for round {repetition + 1} of {repetitions}")
                break
            rows = measured(f"{repetition:03}-floor", lambda: _floor(ring_bytes))
            floor += [{"repetition": repetition, **row} for row in rows]
            for number in rng.permutation(len(cells)).tolist():
                cell = cells[number]
                remember = repetition == 0 and cell in remembered
                part = measured(f"{repetition:03}-{number:03}", partial(one, cell, remember))
                where = {"cell": number, "repetition": repetition}
                table.append({**where, **asdict(cell), **part["row"]})
                tails.append(pd.DataFrame(part["tail"]).assign(**where))
                if remember:
                    histories.append(pd.DataFrame(part["history"]).assign(cell=number))
    frame = pd.DataFrame(table).sort_values(["cell", "repetition"], ignore_index=True)
    return {
        "counts": _counts(frame, rates, sizes[0]),
        "cells": frame,
        "tails": pd.concat(tails, ignore_index=True).astype(
            {"cell": "int16", "repetition": "int16", "share": "float32", "ns": "float32"}
        ),
        "history": pd.concat(histories, ignore_index=True).astype(
            {"key": "uint16", "version": "uint32"}
        ),
        "floor": pd.DataFrame(floor),
    }


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
        "looks": trace.looks,
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
                ("look at an unchanged map", lambda: poll.poll(0)),
            )
        ]
        order = np.zeros(20_000, [("key", "u8"), ("version", "u8")])
        times, progress = np.zeros((len(order), 2), np.uint64), np.zeros(1, np.uint64)
        begun = time.monotonic_ns()
        write_by_calls(table, order, np.zeros(len(order), np.uint64), times, progress)
        apart = (time.monotonic_ns() - begun) / len(order)
        rows.append({"what": "write by a process, unpaced", "ns": apart})
        return rows


def _counts(cells: pd.DataFrame, rates: list[int], size: int) -> pd.DataFrame:
    triad = Triad("write never seen")
    plain = cells[(cells["writer"] == "program") & (cells["value_bytes"] == size)]
    plain = plain[plain["wakeup"] == "default"]

    def cost(rows: pd.DataFrame) -> float:
        return float(np.average(rows["follower_ns"], weights=rows["operations"]))

    for variant, strategy, rate in (
        ("broken", "poll 10 ms", max(rates)),
        ("control", "events", min(rates)),
    ):
        rows = plain[(plain["strategy"] == strategy) & (plain["rate"] == rate)]
        passed = (rows["operations"] - rows["delivered"]).clip(lower=0)
        triad.add(
            variant, case=f"{strategy}, {rate:,}/s", operations=int(rows["operations"].sum()),
            anomalies=int(passed.sum()), cost_ns=cost(rows), anomaly="version passed over",
        )  # fmt: skip
    for name in cells["strategy"].unique():
        rows = cells[cells["strategy"] == name]
        triad.add(
            "fixed", case=name, operations=int(rows["operations"].sum()),
            anomalies=int(rows["unseen"].sum()), cost_ns=cost(rows),
        )  # fmt: skip
    return triad.table()
