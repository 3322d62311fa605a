"""Poll and compare versions: what the period costs in delay, missed versions and CPU."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import BadInput
from labkit.figures import Axes, shares_missed, stacked, style
from labkit.judge.statistics import uniform_fits
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment
from labkit.load import open_loop
from labkit.load.event_writer import EventWriter, updates
from labkit.load.open_loop import OpenLoopWriter
from labkit.runs import Run
from labkit.sync.poll import Poll
from labkit.sync.ring_events import Channel, RingEvents
from labkit.sync.strategy import Strategy

_RING_BYTES = 1 << 16
_PATIENCE_S = 1.0  # of one call of `Strategy.poll`
_PERIODS_MS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)


def derive(tables: Tables) -> Tables:
    """What the statements compare: delays with the uniform law, and the ends of the scale.

    ``fits``: see `uniform_fits`. ``shortest``, ``longest`` (period) and ``events``: their rounds,
    with ``mean_ms``, the mean delay of a round, and ``cpu``, the follower's share of a CPU.
    """
    rounds, delays = tables["rounds"], tables["delays"]
    means = delays.groupby(["case", "round"])["delay_ms"].mean().rename("mean_ms")
    followed = rounds.merge(means.reset_index(), on=["case", "round"])
    followed["cpu"] = followed["cpu_ns"] / followed["elapsed_ns"]
    polled = followed[followed["variant"] == "broken"]
    return {
        "fits": uniform_fits(delays[delays["variant"] == "broken"]),
        "shortest": polled[polled["period_ms"] == polled["period_ms"].min()],
        "longest": polled[polled["period_ms"] == polled["period_ms"].max()],
        "events": followed[followed["variant"] == "fixed"],
    }


# Events, which have no period, are a level line in all three parts of the figure.


def _delay(run: Run, ax: Axes) -> None:
    """The delay of a change."""
    delays = run.table("delays")
    polled = delays[delays["variant"] == "broken"].groupby("period_ms")["delay_ms"]
    events = delays[delays["variant"] == "fixed"]["delay_ms"]
    for i, (share, name) in enumerate(((0.5, "p50"), (0.99, "p99"))):
        by_period = polled.quantile(share)
        ax.plot(by_period.index, by_period, **style.look(i).line(), label=f"poll, {name}")
        ax.axhline(float(events.quantile(share)), color=style.GREEN, ls=("-.", ":")[i],
                   label=f"events, {name}")  # fmt: skip
    periods = polled.mean().index.to_numpy()
    ax.plot(periods, periods / 2, color=style.GREY, lw=2.5, alpha=0.35, label="T / 2")
    ax.set_yscale("log")
    ax.set_ylabel("delay of a change (ms)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, columnspacing=1.0)


def _missed(run: Run, ax: Axes) -> None:
    """The share of versions missed, with the law for exponential gaps."""
    rows = _by_period(run)
    shares_missed(ax, rows, style.look(0).line(), "poll")
    gap = float(str(run.parameters["gap_ms"]))
    period = np.geomspace(rows["period_ms"].min(), rows["period_ms"].max(), 200)
    law = 1 - gap / period * (1 - np.exp(-period / gap))
    ax.plot(period, law, color=style.GREY, lw=2.5, alpha=0.35, label=f"law, mean gap {gap:g} ms")
    ax.axhline(run.count("fixed").rate, color=style.GREEN, ls="-.", label="events")
    ax.set_ylim(-0.05, 1.05)
    ax.set_ylabel("versions never seen")
    ax.legend(loc="upper left")


def _cpu(run: Run, ax: Axes) -> None:
    """The CPU of the follower, with the interpreter's share in it."""
    from matplotlib.ticker import NullFormatter

    rows, events = _by_period(run), run.table("events")["cpu"].mean()
    ax.plot(
        rows["period_ms"], rows["cpu_ns"] / rows["elapsed_ns"], **style.look(0).line(), label="poll"
    )
    gap = float(str(run.parameters["gap_ms"]))
    ax.axhline(float(events), color=style.GREEN, ls="-.",
               label=f"events, {1e3 / gap:g} changes/s")  # fmt: skip
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:.6%}".rstrip("0%").rstrip(".") + "%")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel("follower, of one CPU")
    ax.set_xscale("log")
    ax.set_xlabel("poll period T (ms)")
    ax.legend(loc="best")


def _by_period(run: Run) -> pd.DataFrame:
    """All rounds of each period added up."""
    rounds = run.table("rounds")
    added = ["missed", "changes", "cpu_ns", "elapsed_ns"]
    polled = rounds[rounds["variant"] == "broken"]
    return polled.groupby("period_ms", as_index=False)[added].sum()


@experiment(
    "poll-period",
    number=41,
    family="sync",
    question="Which poll period buys which delay, at how many missed versions and how much CPU?",
    claims=("3.2", "5.2"),
    needs=("bpf", "compile", "batch_hash", "ringbuf", "two_cpus"),
    # Changes times their gap: whole periods, or delays would not be uniform on them.
    quick={"periods_ms": [0.1, 1.0, 10.0, 100.0], "gap_ms": 4.0, "changes": 25, "seed": 4,
           "rounds": 6},
    full={"periods_ms": list(_PERIODS_MS), "gap_ms": 4.0, "changes": 250, "seed": 4, "rounds": 6},
    cases=(
        *(Case("broken", f"poll-{ms:g}ms".replace(".", "-"), f"poll every {ms:g} ms", period_ms=ms)
          for ms in _PERIODS_MS),
        Case("control", "waits", "poll every 10 ms, the writer waits", period_ms=10.0),
        Case("fixed", "events", "ring buffer events"),
    ),
    counted=Counted("missed", operations="changes", anomalies="missed", cost_ns="change_cpu_ns"),
    derive=derive,
    statements=(
        # One in 10,000 such runs would have so little by chance, for each period.
        Statement("a change waits uniformly over every period, but for polls that are late",
                  "all(fits.p_value > 0.0001)"),
        Statement("the longest period is seen later than the shortest, in the mean by about half "
                  "of its length",
                  "min(shortest.mean_ms) > 0 and 0.3 < spread((longest.mean_ms - shortest.mean_ms) "
                  "/ longest.period_ms) < 0.75"),
        Statement("and misses more versions",
                  "ratio(longest.missed / longest.changes, shortest.missed / shortest.changes) "
                  "> 1"),
        Statement("and takes less than half of the CPU",
                  "0 < ratio(longest.cpu, shortest.cpu) < 0.5"),
        Statement("produced = delivered + coalesced + dropped, and what was coalesced was missed",
                  "all(rounds.produced == rounds.changes and rounds.changes > 0 "
                  "and rounds.delivered + rounds.coalesced + rounds.dropped == rounds.produced "
                  "and rounds.coalesced + rounds.dropped == rounds.missed)"),
        Statement("a writer that waits for the poller hides it", "none(control)"),
        Statement("events miss no version", "none(fixed)"),
        Statement("and come sooner than by the longest period",
                  "0 < ratio(events.mean_ms, longest.mean_ms) < 1"),
    ),
    sentence="Polled every {longest.period_ms} ms, a change was seen {mean(longest.mean_ms)} ms "
    "late in the mean, and {percent(sum(longest.missed) / sum(longest.changes))} of the versions "
    "never; every {shortest.period_ms} ms it was {mean(shortest.mean_ms)} ms, and the follower "
    "took {percent(median(shortest.cpu))} of a CPU. Events missed {fixed}, {mean(events.mean_ms)} "
    "ms late in the mean.",
    figure=stacked(_delay, _missed, _cpu, height=5.6, share="x"),
)  # fmt: skip
def poll_period(
    case: Case, *, periods_ms: list[float], gap_ms: float, changes: int, seed: int, turn: int
) -> list[dict[str, Any]]:
    """Follow one key by the strategy `Poll` with a period, or by ring buffer events.

    A change comes at a moment that has nothing to do with the poller's clock: it waits half a
    period in the mean. Of the changes within one period only the last is seen. With exponential
    gaps of mean g, the share that is missed is 1 - (g / T) (1 - exp(-T / g)). What a poll costs
    does not depend on whether anything changed, so CPU goes with 1 / T.

    Parameters
    ----------
    case : Case
        Way to follow, and its period. In the control the writer waits until its last change was
        seen.
    periods_ms : list of float
        Poll periods that are measured, milliseconds; of those that have a case.
    gap_ms : float
        Mean gap between two changes, milliseconds; open loop.
    changes : int
        Changes in a round; a fifth of them for the control.
    seed : int
        Of the schedule; all ways follow the same one in a round, and another in the next.
    turn : int
        The round.

    Returns
    -------
    list of dict
        ``period_ms`` (NaN without one), ``changes``, ``produced``, ``delivered``, ``coalesced``,
        ``dropped`` (by the strategy's own account), ``missed`` (by what it handed out), ``reads``
        (int64; polls, or batches of events), ``cpu_ns`` and ``elapsed_ns`` of the follower, the
        interpreter's share included, and ``change_cpu_ns``, that CPU time per change. ``delays``:
        ``period_ms``, ``version``, ``delay_ms`` from the intended moment to that at which the
        change, or a newer one, stood in the replica. Nothing for a period that is not measured.

    Raises
    ------
    BadInput
        A period has no case.
    """
    if unknown := sorted(set(periods_ms) - set(_PERIODS_MS)):
        raise BadInput(f"poll-period has no case for a period of {unknown[0]:g} ms.")
    period_ms = float(case.get("period_ms", math.nan))
    if case.variant == "broken" and period_ms not in periods_ms:
        return []
    closed_loop = case.variant == "control"
    moments = open_loop.schedule(changes, gap_ms, seed + turn)
    some = moments[: max(1, changes // 5)] if closed_loop else moments
    follow, late_ms = _follow(some, period_ms, closed_loop=closed_loop)
    delays = {"period_ms": period_ms, "version": np.arange(1, len(some) + 1), "delay_ms": late_ms}
    return [
        {
            "period_ms": period_ms,
            **follow,
            "change_cpu_ns": follow["cpu_ns"] / len(some),
            "delays": pd.DataFrame(delays),
        }
    ]


def _follow(
    moments: npt.NDArray[np.int64], period_ms: float, *, closed_loop: bool
) -> tuple[dict[str, int], npt.NDArray[np.float32]]:
    """What became of the changes, and the delay of each, milliseconds."""
    with ExitStack() as stack:
        table = stack.enter_context(Map.create(MapKind.HASH, key="u8", value="u8", max_entries=1))
        channel = stack.enter_context(Channel.create(_RING_BYTES))
        program = stack.enter_context(EventWriter(table, channel, updates(1, len(moments))))
        strategy: Strategy = (
            RingEvents(channel) if math.isnan(period_ms) else Poll(interval_s=period_ms / 1e3)
        )
        stack.enter_context(strategy)
        strategy.attach(table)
        versions: list[int] = []
        seen_ns: list[int] = []
        reads = 0
        wait_ms = period_ms if closed_loop else 0.0
        with OpenLoopWriter(
            moments, lambda version: program.write(1), closed_loop_ms=wait_ms
        ) as writer:
            began, cpu_began = time.monotonic_ns(), time.thread_time_ns()
            while not writer.all_seen():
                some = strategy.poll(_PATIENCE_S)
                reads += 1
                versions += some["version"].tolist()
                seen_ns += some["seen_ns"].tolist()
                if versions:
                    writer.saw(versions[-1])
            spent = time.thread_time_ns() - cpu_began
            elapsed = time.monotonic_ns() - began
        stats = strategy.stats()
    every = np.arange(1, len(moments) + 1)
    # The first that was seen of this version or a newer one; versions only grow.
    at = np.array(seen_ns)[np.searchsorted(versions, every)]
    follow = {
        "changes": len(every),
        "produced": stats.produced,
        "delivered": stats.delivered,
        "coalesced": stats.coalesced,
        "dropped": stats.dropped,
        "missed": int((~np.isin(every, versions)).sum()),
        "reads": stats.resyncs if isinstance(strategy, Poll) else reads,
        "cpu_ns": spent,
        "elapsed_ns": elapsed,
    }
    return follow, ((at - writer.intended_ns) / 1e6).astype(np.float32)
