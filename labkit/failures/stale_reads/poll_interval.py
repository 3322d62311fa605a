"""The poll interval as a source of staleness: how late, and how much is missed."""

from __future__ import annotations

import resource
import time

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis import checkers, history
from labkit.analysis.history import Op
from labkit.analysis.runs import Triad
from labkit.failures import open_loop
from labkit.failures.experiment import Tables, experiment, say
from labkit.failures.open_loop import OpenLoopWriter
from labkit.kernel import programs
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.programs import Unit
from labkit.kernel.ringbuf import RingReader

_WRITER, _FOLLOWER = 0, 1
_CHANGE = np.dtype([("version", "u8"), ("committed_ns", "u8")])

Reads = list[tuple[int, int, int]]  # version, start and end in nanoseconds


@experiment(
    "poll-interval",
    number=12,
    family="stale-reads",
    question="How late does a poller see a change, and which changes does it never see?",
    claims=("3.2", "5.2"),
    needs=("bpf", "compile", "syscall_program", "ringbuf", "two_cpus"),
    quick={"periods_ms": [2.0, 10.0, 40.0], "gap_ms": 4.0, "changes": 200, "seed": 1},
    full={
        "periods_ms": [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0],
        "gap_ms": 4.0,
        "changes": 1_000,
        "seed": 1,
    },
)
def poll_interval(*, periods_ms: list[float], gap_ms: float, changes: int, seed: int) -> Tables:
    """Change a version at random moments, and follow it by polls and by events.

    A change comes at a moment that has nothing to do with the poller's clock, so it waits
    uniformly between 0 and the period: half of it in the mean. Of the changes within one
    period only the last is seen. A ring buffer event carries every change.

    Parameters
    ----------
    periods_ms : list of float
        Poll intervals, milliseconds.
    gap_ms : float
        Mean gap between two changes, exponentially distributed, milliseconds. The schedule
        is open loop: a late writer does not shift the changes behind it.
    changes : int
        Changes for every way of following.
    seed : int
        Of the schedule; all ways follow the same one.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a change, an anomaly one that the follower never saw as
        such; ``cost_ns`` is the follower's CPU time per change. ``follows``: ``variant``,
        ``case``, ``period_ms`` (NaN without one), ``changes``, ``missed``, ``looks``
        (int64), ``cpu_ns``. ``delays``: ``case``, ``period_ms``, ``version``, ``delay_ms``
        from the moment at which the change was intended to that at which it, or a newer
        one, was seen.
    """
    moments = open_loop.schedule(changes, gap_ms, seed)
    ways: list[tuple[str, str, float]] = [
        ("broken", f"poll every {period:g} ms", period) for period in periods_ms
    ]
    ways.append(("control", "the writer waits for the poller", min(periods_ms)))
    ways.append(("fixed", "ring buffer events", float("nan")))
    triad, follows, delays = Triad("missed"), [], []
    for variant, case, period_ms in ways:
        say(case)
        whole, looks, cpu_ns = _follow(moments, period_ms, closed_loop=variant == "control")
        written = (whole["op"] == Op.WRITE) & (whole["version"] > 0)
        missed = int(checkers.missed(whole, _FOLLOWER).sum())
        seen = checkers.first_seen(whole, _FOLLOWER)[written].astype(np.int64)
        late = (seen - whole["intended_ns"][written].astype(np.int64)) / 1e6
        follows.append(
            {
                "variant": variant,
                "case": case,
                "period_ms": period_ms,
                "changes": changes,
                "missed": missed,
                "looks": looks,
                "cpu_ns": cpu_ns,
            }
        )
        delays.append(
            pd.DataFrame(
                {
                    "case": case,
                    "period_ms": period_ms,
                    "version": whole["version"][written].astype(np.int64),
                    "delay_ms": np.where(seen > 0, late, np.nan).astype(np.float32),
                }
            )
        )
        triad.add(
            variant, case=case, operations=changes, anomalies=missed, cost_ns=cpu_ns / changes
        )
    return {
        "counts": triad.table(),
        "follows": pd.DataFrame(follows),
        "delays": pd.concat(delays, ignore_index=True),
    }


def _follow(
    moments: npt.NDArray[np.int64], period_ms: float, *, closed_loop: bool
) -> tuple[history.History, int, int]:
    """History of one writer and one follower, the follower's looks and its CPU time."""
    with programs.load("versioned_write") as unit:
        program = unit.function("write_version", ProgramKind.SYSCALL)
        context = np.zeros(1, np.uint64)

        def write(version: int) -> None:
            context[0] = version
            program.test_run(context=context)

        wait_ms = period_ms if closed_loop else 0.0
        with OpenLoopWriter(moments, write, closed_loop_ms=wait_ms) as writer:
            before = _cpu_ns()
            follow = _events if np.isnan(period_ms) else _polls
            reads = follow(unit, period_ms, writer)
            spent = _cpu_ns() - before
    return _history(writer.intended_ns, writer.times, reads), len(reads), spent


def _polls(unit: Unit, period_ms: float, writer: OpenLoopWriter) -> Reads:
    value = np.zeros(1, _CHANGE)
    look = unit.map("current", value=_CHANGE).reader(0, value)
    period_ns, reads = round(period_ms * 1e6), []
    moment = time.monotonic_ns()
    while not writer.all_seen():
        begun = time.monotonic_ns()
        look()
        reads.append((int(value["version"][0]), begun, time.monotonic_ns()))
        writer.saw(reads[-1][0])
        moment = open_loop.next_look(moment, period_ns)
    return reads


def _events(unit: Unit, period_ms: float, writer: OpenLoopWriter) -> Reads:
    reads = [(0, time.monotonic_ns(), time.monotonic_ns())]
    with RingReader(unit.map("changes"), _CHANGE) as ring:
        while not writer.all_seen():
            begun = time.monotonic_ns()
            changes = ring.poll(0.05)
            at = time.monotonic_ns()
            reads += [(int(version), begun, at) for version in changes["version"]]
            writer.saw(reads[-1][0])
    reads.append((reads[-1][0], time.monotonic_ns(), time.monotonic_ns()))
    return reads


def _history(
    intended: npt.NDArray[np.int64], times: npt.NDArray[np.int64], reads: Reads
) -> history.History:
    writes = history.build(
        Op.WRITE,
        key=0,
        actor=_WRITER,
        version=np.arange(1, len(times) + 1),
        intended_ns=intended,
        start_ns=times[:, 0],
        end_ns=times[:, 1],
    )
    version, begun, at = np.array(reads, np.int64).T
    looks = history.build(
        Op.READ, key=0, actor=_FOLLOWER, version=version, start_ns=begun, end_ns=at
    )
    return history.concatenate(writes, looks)


def _cpu_ns() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return round((used.ru_utime + used.ru_stime) * 1e9)
