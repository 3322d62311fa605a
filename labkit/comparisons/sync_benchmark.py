"""The strategies side by side: how late, how lossy and how dear, by rate, size and wakeup."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.analysis.statistics import percentiles
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.sync.hybrid import Hybrid
from labkit.sync.poll import Poll
from labkit.sync.ring_events import Channel, RingEvents
from labkit.sync.strategy import Strategy
from labkit.sync.trace_hook import TraceHook
from labkit.workload import Load, Trace, median_ns, since, write_by_calls

_TAIL_POINTS = 60
_ROWS_KEPT = 1_200  # of the history of a cell
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
        One of `STRATEGIES`.
    rate : int
        Intended writes per second.
    value_bytes : int
        Size of a value.
    wakeup : str
        As `labkit.kernel.ringbuf.WAKEUPS`; the poll does not wait to be woken.
    writer : str
        As `labkit.workload.WRITERS`.
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
"""By name, with the channel and the follower's timer: followers that are compared."""

_PLAIN = ("poll 1 ms", "poll 10 ms", "events", "events, gathered 1 ms", "hybrid")


def matrix(rates: list[int], sizes: list[int], saturation: list[int]) -> list[Cell]:
    """The cells that are measured.

    Parameters
    ----------
    rates : list of int
        Writes per second, ascending.
    sizes : list of int
        Of values, bytes; the first one, the smallest, is that of the further comparisons.
    saturation : list of int
        Rates beyond, by which the knee is found.

    Returns
    -------
    list of Cell
        Every strategy at every rate and the first size; events and a poll with the others, and
        wakeup policies, at the two highest rates; a process as writer, whom nobody but a
        poll and a hook sees, at all rates but the highest; the saturation search.
    """
    first, *others = sizes
    cells = [Cell(name, rate, first) for name in _PLAIN for rate in rates]
    cells += [
        Cell(name, rate, size)
        for name in ("poll 10 ms", "events")
        for rate in rates[-2:]
        for size in others
    ]
    cells += [
        Cell("events", rate, first, wakeup)
        for wakeup in _WAKEUPS
        if wakeup != "default"
        for rate in rates[-2:]
    ]
    cells += [
        Cell(name, rate, first, writer="process")
        for name in ("poll 10 ms", "hook")
        for rate in rates[:-1] or rates
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
           "mmapable_array"),
    quick={
        "rates": [1_000, 10_000, 100_000], "sizes": [8, 64], "saturation": [1_000_000],
        "repetitions": 5, "seconds": 0.15, "warm_up_s": 0.03, "keys": 200,
        "most_operations": 100_000, "ring_bytes": 1 << 22, "seed": 1,
    },
    full={
        "rates": [1_000, 10_000, 100_000], "sizes": [8, 64, 1024],
        "saturation": [200_000, 500_000, 1_000_000, 2_000_000],
        "repetitions": 7, "seconds": 1.2, "warm_up_s": 0.1, "keys": 200,
        "most_operations": 400_000, "ring_bytes": 1 << 22, "seed": 1,
    },
)  # fmt: skip
def sync_benchmark(
    *,
    rates: list[int],
    sizes: list[int],
    saturation: list[int],
    repetitions: int,
    seconds: float,
    warm_up_s: float,
    keys: int,
    most_operations: int,
    ring_bytes: int,
    seed: int,
) -> Tables:
    """Run every cell of the matrix in an order of its own per repetition, and keep its figures.

    The writer has CPU 0 and the follower CPU 1. Writes have intended times, an open loop: the
    latency of a write is the moment at which the follower's replica first could return its
    version or a newer one, less its intended time. A write is known by key and version, which the
    value carries, and so is its intended time.

    Parameters
    ----------
    rates, sizes, saturation : list of int
        As `matrix` takes them.
    repetitions : int
        Rounds; each runs all cells in a new random order.
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

    Returns
    -------
    dict of DataFrame
        ``cells``: one row per cell and repetition, with the columns of `Cell`, ``cell`` and
        ``repetition`` (numbers), ``operations`` (writes), ``produced``, ``delivered``,
        ``dropped``, ``coalesced``, ``repaired``, ``resyncs`` (as
        `labkit.sync.strategy.Stats`), ``unseen`` (writes of which neither that version nor a
        newer one was ever seen), ``measured`` (writes after the warm-up), ``mean_ns``,
        ``p50_ns``, ``p99_ns``, ``p99.9_ns`` and ``max_ns`` of their latency,
        ``commit_mean_ns``, ``commit_p50_ns`` and ``commit_p99_ns`` of the same from the moment of
        the commit on,
        ``late_p50_ns`` and ``late_p99_ns`` (the writer behind its schedule), ``achieved``
        (writes per second), ``writer_ns`` (a write with its event, median), ``follower_cpu``
        (CPUs), ``follower_ns`` (CPU per write), ``map_bytes``, ``replica_bytes``. Percentiles
        with fewer than ten writes beyond them are NaN. ``tails``: ``cell``, ``repetition``,
        ``share`` of the writes that were later than ``ns``. ``history``: the writes to the first
        keys of one repetition at the second rate, with ``cell``, ``key``, ``version`` and times in
        nanoseconds from the first intended one. ``floor``: the harness's own time per call in ns,
        by ``what`` and ``repetition``. ``counts``: in broken (the 10 ms poll at the highest rate)
        an anomaly is a change that was passed over; in control (events at the lowest rate) one
        not handed out; in fixed (all strategies, all cells) a write whose version, or a newer one,
        the follower never had; ``cost_ns`` is the follower's CPU per write.
    """
    cells = matrix(rates, sizes, saturation)
    remembered = [Cell(name, rates[min(1, len(rates) - 1)], sizes[0]) for name in _PLAIN]
    rng = np.random.default_rng(seed)
    table: list[dict[str, object]] = []
    tails: list[pd.DataFrame] = []
    histories: list[pd.DataFrame] = []
    floor: list[dict[str, object]] = []
    begun, every = time.monotonic(), repetitions * len(cells)
    with ExitStack() as stack:
        longest = min(most_operations, round(seconds * max([*rates, *saturation])))
        loads = {
            (cell.value_bytes, cell.wakeup): stack.enter_context(
                Load(
                    cell.value_bytes,
                    wakeup=cell.wakeup,
                    wakeup_at=_WAKEUPS[cell.wakeup][0],
                    keys=keys,
                    most_operations=longest,
                    ring_bytes=ring_bytes,
                )
            )
            for cell in {(c.value_bytes, c.wakeup): c for c in cells}.values()
        }
        for repetition in range(repetitions):
            floor += [{"repetition": repetition, **row} for row in _floor(ring_bytes)]
            for place, number in enumerate(rng.permutation(len(cells)).tolist()):
                done = repetition * len(cells) + place
                if done and done % 10 == 0:
                    left = (time.monotonic() - begun) / done * (every - done)
                    say(f"{done} of {every} runs, {left:.0f} s left")
                cell = cells[number]
                load = loads[cell.value_bytes, cell.wakeup]
                with STRATEGIES[cell.strategy](load.channel, _WAKEUPS[cell.wakeup][1]) as strategy:
                    trace = load.run(strategy, rate=cell.rate, seconds=seconds, writer=cell.writer)
                    row, tail = _figures(trace, cell.rate, warm_up_s)
                where = {"cell": number, "repetition": repetition}
                table.append({**where, **asdict(cell), **row})
                tails.append(tail.assign(**where))
                if repetition == 0 and cell in remembered:
                    histories.append(_history(trace).assign(cell=number))
    frame = pd.DataFrame(table).sort_values(["cell", "repetition"], ignore_index=True)
    return {
        "counts": _counts(frame, rates, sizes[0]),
        "cells": frame,
        "tails": pd.concat(tails, ignore_index=True).astype(
            {"cell": "int16", "repetition": "int16", "share": "float32", "ns": "float32"}
        ),
        "history": pd.concat(histories, ignore_index=True),
        "floor": pd.DataFrame(floor),
    }


def _figures(trace: Trace, rate: int, warm_up_s: float) -> tuple[dict[str, object], pd.DataFrame]:
    """A row of the table, and the tail of the latencies."""
    count, stats = len(trace), trace.stats
    # A schedule that is cut short is warmed up by its first fifth.
    judged = np.arange(count) >= min(warm_up_s * rate, count // 5)
    seen = trace.seen_ns > 0
    kept = judged & seen
    latency = np.sort(since(trace.seen_ns, trace.intended_ns)[kept])
    # A poll may read an update before the call that made it has returned.
    after = np.maximum(0, since(trace.seen_ns, trace.end_ns)[kept])
    late = np.maximum(0, since(trace.start_ns, trace.intended_ns)[judged])
    of = percentiles(latency)
    span = int(trace.end_ns.max()) - int(trace.start_ns.min())
    row: dict[str, object] = {
        "operations": count,
        "produced": stats.produced,
        "delivered": stats.delivered,
        "dropped": stats.dropped,
        "coalesced": stats.coalesced,
        "repaired": stats.repaired,
        "resyncs": stats.resyncs,
        "unseen": int((~seen).sum()),
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
        "achieved": (count - 1) / span * 1e9,
        "writer_ns": float(np.median(since(trace.end_ns, trace.start_ns))),
        "follower_cpu": trace.follower_cpu_ns / trace.follower_wall_ns,
        "follower_ns": trace.follower_cpu_ns / count,
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
            "key": trace.key[kept].astype(np.uint16),
            "version": (trace.version[kept] - trace.version.min() + 1).astype(np.uint32),
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
