"""The poll interval as a source of staleness: how late, and how much is missed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import BadInput
from labkit.figures import Axes, shares_missed, stacked, style
from labkit.judge import checkers, history
from labkit.judge.history import Op
from labkit.judge.statistics import uniform_fits
from labkit.kernel import programs
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.programs import BpfObject
from labkit.kernel.ringbuf import RingReader
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment
from labkit.load import open_loop
from labkit.load.open_loop import OpenLoopWriter
from labkit.runs import Run

_WRITER, _FOLLOWER = 0, 1
_CHANGE = np.dtype([("version", "u8"), ("committed_ns", "u8")])
_LONGER = 4.0  # times: what late polls add to both delays must not hide the difference
_PERIODS_MS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 50.0, 100.0, 200.0)

Reads = list[tuple[int, int, int]]  # version, start and end in nanoseconds


def derive(tables: Tables) -> Tables:
    """What the statements compare: delays with the uniform law, and medians with each other.

    From ``delays``. ``fits``: see `uniform_fits`. ``longest``: the delays by the longest period.
    ``growth``: ``round``, ``least``: of the factors from each period to the next that is four times
    as long at least.
    """
    delays = tables["delays"]
    polled = delays[delays["variant"] == "broken"]
    medians = polled.pivot_table("delay_ms", "round", "period_ms", aggfunc="median")
    periods = medians.columns.to_numpy()
    longer = np.searchsorted(periods, _LONGER * periods)  # the next that is so much longer
    there = longer < len(periods)
    grown = medians.to_numpy()[:, longer[there]] / medians.to_numpy()[:, there]
    least = pd.DataFrame(grown, index=medians.index).min(axis=1).rename("least").reset_index()
    return {
        "fits": uniform_fits(polled),
        "longest": polled[polled["period_ms"] == polled["period_ms"].max()],
        "growth": least,
    }


def _delays(run: Run, ax: Axes) -> None:
    """The distribution of delay over period, with the uniform law."""
    delays = run.table("delays")
    polled = delays[delays["variant"] == "broken"]
    periods = np.sort(polled["period_ms"].unique())
    most = 5  # periods drawn as distributions; more would hide each other
    if len(periods) > most:
        periods = periods[np.linspace(0, len(periods) - 1, most).round().astype(int)]
    for i, period in enumerate(periods):
        waits = polled[polled["period_ms"] == period]["delay_ms"] / period
        look = style.look(i)
        ax.ecdf(waits, color=look.color, ls=look.linestyle, label=f"T = {period:g} ms")
    ax.plot([0, 1], [0, 1], color=style.BLACK, lw=2.5, alpha=0.25, label="uniform law")
    ax.set_xlim(0, 1.5)
    ax.set_xlabel("delay of a change, from its intended time (periods T)", loc="right")
    ax.set_ylabel("share of changes seen by then")
    ax.legend(loc="lower right")


def _missed(run: Run, ax: Axes) -> None:
    """The changes that were never seen."""
    from matplotlib.ticker import NullLocator

    rounds = run.table("rounds")
    polled = rounds[rounds["variant"] == "broken"].groupby("period_ms", as_index=False)
    shares = polled[["missed", "changes"]].sum()
    shares_missed(ax, shares, style.VARIANT["broken"].line(), "poll")
    events = run.count("fixed")
    ax.axhline(events.rate, color=style.GREEN, ls="-.", label="ring buffer events")
    ax.set_xscale("log")
    ax.set_ylim(-0.05, 1)
    gap = float(str(run.parameters["gap_ms"]))
    ax.axvline(gap, color=style.GREY, lw=0.8, ls=":")
    ax.annotate("mean gap", (gap, 0.9), xytext=(2, 0), textcoords="offset points", fontsize=6)
    ax.set_xticks(shares["period_ms"], [f"{period:g}" for period in shares["period_ms"]])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("poll interval T (ms)")
    ax.set_ylabel("changes never seen")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 0.08))


@experiment(
    "poll-interval",
    number=12,
    family="stale-reads",
    question="How late does a poller see a change, and which changes does it never see?",
    claims=("3.2", "5.2"),
    needs=("bpf", "compile", "syscall_program", "ringbuf", "two_cpus"),
    # Changes times their gap: whole periods, or delays would not be uniform on them.
    quick={"periods_ms": [2.0, 10.0, 40.0], "gap_ms": 4.0, "changes": 30, "seed": 1, "rounds": 6},
    full={
        "periods_ms": [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0],
        "gap_ms": 4.0, "changes": 100, "seed": 1, "rounds": 10,
    },
    cases=(
        *(Case("broken", f"poll-{ms:g}ms".replace(".", "-"), f"poll every {ms:g} ms", period_ms=ms)
          for ms in _PERIODS_MS),
        Case("control", "waits", "the writer waits for the poller", period_ms=2.0),
        Case("fixed", "events", "ring buffer events"),
    ),
    counted=Counted("missed", operations="changes", anomalies="missed", cost_ns="change_cpu_ns"),
    derive=derive,
    statements=(
        # One in 10,000 such runs would have so little by chance, for each period.
        Statement("a change waits uniformly over every period, but for polls that are late",
                  "all(fits.p_value > 0.0001)"),
        Statement("and over the longest also where no poll counts as late",
                  "between(fits(period_ms=max(parameters.periods_ms)).p_least, "
                  "fits(period_ms=max(parameters.periods_ms)).p_value) > 0.0001"),
        Statement("the median delay grows from every period to one that is four times as long",
                  "spread(growth.least) > 1"),
        Statement("the longest period misses more than the shortest",
                  'ratio(rounds(variant="broken", period_ms=max(parameters.periods_ms)).missed, '
                  'rounds(variant="broken", period_ms=min(parameters.periods_ms)).missed) > 1'),
        Statement("a writer that waits for the poller hides it", "none(control)"),
        Statement("events miss no change", "none(fixed)"),
        Statement("and are seen sooner than by the longest poll",
                  '0 < ratio(delays(case="events").delay_ms, longest.delay_ms) < 1'),
    ),
    sentence="Polled every {longest.period_ms} ms, half of the changes were seen more than "
    "{median(longest.delay_ms)} ms late, and {sum(rounds(period_ms=longest.period_ms).missed)} of "
    "{sum(rounds(period_ms=longest.period_ms).changes)} changes were never seen. Ring buffer "
    'events missed {fixed}, at a median of {median(delays(case="events").delay_ms)} ms.',
    figure=stacked(_delays, _missed, height=4.6),
)  # fmt: skip
def poll_interval(
    case: Case, *, periods_ms: list[float], gap_ms: float, changes: int, seed: int, turn: int
) -> list[dict[str, Any]]:
    """Change a version at random moments, and follow it by polls or by events.

    A change comes at a moment that has nothing to do with the poller's clock, so it waits
    uniformly between 0 and the period: half of it in the mean. Of the changes within one
    period only the last is seen. A ring buffer event carries every change.

    Parameters
    ----------
    case : Case
        Way to follow, and its period.
    periods_ms : list of float
        Poll intervals that are measured, milliseconds; of those that have a case.
    gap_ms : float
        Mean gap between two changes, milliseconds. The schedule
        is open loop: a late writer does not shift the changes behind it.
    changes : int
        Changes in a round.
    seed : int
        Of the schedule; all ways follow the same one in a round, and another in the next.
    turn : int
        The round.

    Returns
    -------
    list of dict
        ``period_ms`` (NaN without one), ``changes``, ``missed``: those that the follower never
        saw as such, ``reads`` (int64), ``change_cpu_ns``: the follower's CPU time per change.
        ``delays``: ``period_ms``, ``version``, ``delay_ms`` from the moment at which the change
        was intended to that at which it, or a newer one, was seen. Nothing for a period that is
        not measured.

    Raises
    ------
    BadInput
        A period has no case.
    """
    if unknown := sorted(set(periods_ms) - set(_PERIODS_MS)):
        raise BadInput(f"poll-interval has no case for a period of {unknown[0]:g} ms.")
    period_ms = float(case.get("period_ms", np.nan))
    if case.variant == "broken" and period_ms not in periods_ms:
        return []
    moments = open_loop.schedule(changes, gap_ms, seed + turn)
    whole, reads, cpu_ns = _follow(moments, period_ms, closed_loop=case.variant == "control")
    written = (whole["op"] == Op.WRITE) & (whole["version"] > 0)
    seen = checkers.first_seen(whole, _FOLLOWER)[written].astype(np.int64)
    late = (seen - whole["intended_ns"][written].astype(np.int64)) / 1e6
    return [
        {
            "period_ms": period_ms,
            "changes": changes,
            "missed": int(checkers.missed(whole, _FOLLOWER).sum()),
            "reads": reads,
            "change_cpu_ns": cpu_ns / changes,
            "delays": pd.DataFrame(
                {
                    "period_ms": period_ms,
                    "version": whole["version"][written].astype(np.int64),
                    "delay_ms": late.astype(np.float32),
                }
            ),
        }
    ]


def _follow(
    moments: npt.NDArray[np.int64], period_ms: float, *, closed_loop: bool
) -> tuple[history.History, int, int]:
    """History of one writer and one follower, the follower's reads and its CPU time."""
    with programs.load("versioned_write") as loaded:
        program = loaded.program("write_version", ProgramKind.SYSCALL)
        context = np.zeros(1, np.uint64)

        def write(version: int) -> None:
            context[0] = version
            program.test_run(context=context)

        wait_ms = period_ms if closed_loop else 0.0
        with OpenLoopWriter(moments, write, closed_loop_ms=wait_ms) as writer:
            before = time.process_time_ns()
            follow = _events if np.isnan(period_ms) else _polls
            reads = follow(loaded, period_ms, writer)
            spent = time.process_time_ns() - before
    return _history(writer.intended_ns, writer.times, reads), len(reads), spent


def _polls(loaded: BpfObject, period_ms: float, writer: OpenLoopWriter) -> Reads:
    value = np.zeros(1, _CHANGE)
    read = loaded.map("current", value=_CHANGE).reader(0, value)
    period_ns, reads = round(period_ms * 1e6), []
    moment = time.monotonic_ns()
    while not writer.all_seen():
        begun = time.monotonic_ns()
        read()
        reads.append((int(value["version"][0]), begun, time.monotonic_ns()))
        writer.saw(reads[-1][0])
        moment = open_loop.next_poll(moment, period_ns)
    return reads


def _events(loaded: BpfObject, period_ms: float, writer: OpenLoopWriter) -> Reads:
    reads = [(0, time.monotonic_ns(), time.monotonic_ns())]
    with RingReader(loaded.map("changes"), _CHANGE) as ring:
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
    read = history.build(
        Op.READ, key=0, actor=_FOLLOWER, version=version, start_ns=begun, end_ns=at
    )
    return history.concatenate(writes, read)
