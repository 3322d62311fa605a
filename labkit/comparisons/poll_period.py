"""Poll and compare versions: what the period costs in delay, missed versions and CPU."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.failures import open_loop
from labkit.failures.experiment import Tables, experiment, say
from labkit.failures.open_loop import OpenLoopWriter
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.sync.event_writer import EventWriter, updates
from labkit.sync.poll import Poll
from labkit.sync.ring_events import Channel, RingEvents
from labkit.sync.strategy import Strategy

_RING_BYTES = 1 << 16
_PATIENCE_S = 1.0  # of one call of `Strategy.poll`


@experiment(
    "poll-period",
    number=41,
    family="sync",
    question="Which poll period buys which delay, at how many missed versions and how much CPU?",
    claims=("3.2", "5.2"),
    needs=("bpf", "compile", "batch_hash", "ringbuf", "two_cpus"),
    quick={
        "periods_ms": [0.1, 1.0, 10.0, 100.0], "control_ms": 10.0, "gap_ms": 4.0, "changes": 100,
        "seed": 4,
    },
    full={
        "periods_ms": [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0],
        "control_ms": 10.0, "gap_ms": 4.0, "changes": 800, "seed": 4,
    },
)  # fmt: skip
def poll_period(
    *, periods_ms: list[float], control_ms: float, gap_ms: float, changes: int, seed: int
) -> Tables:
    """Follow one key by the strategy `Poll` with each period, and by ring buffer events.

    A change comes at a moment that has nothing to do with the poller's clock: it waits half a
    period in the mean. Of the changes within one period only the last is seen. With exponential
    gaps of mean g, the share that is missed is 1 - (g / T) (1 - exp(-T / g)). What a poll costs
    does not depend on whether anything changed, so CPU goes with 1 / T.

    Parameters
    ----------
    periods_ms : list of float
        Poll periods, milliseconds.
    control_ms : float
        The period of the control, in which the writer waits until its last change was seen.
    gap_ms : float
        Mean gap between two changes, exponentially distributed, milliseconds; open loop.
    changes : int
        Changes for every way of following; a fifth of them for the control.
    seed : int
        Of the schedule; all ways follow the same one.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a change, an anomaly one that was never seen as such;
        ``cost_ns`` is the follower's CPU time per change, the interpreter's share included.
        ``follows``: ``variant``, ``case``, ``period_ms`` (NaN without one), ``changes``,
        ``produced``, ``delivered``, ``coalesced``, ``dropped`` (by the strategy's own account),
        ``missed`` (by what it handed out), ``looks`` (int64; polls, or batches of events),
        ``cpu_ns`` and ``elapsed_ns`` of the follower. ``delays``: ``case``, ``period_ms``,
        ``version``, ``delay_ms`` from the intended moment to that at which the change, or a newer
        one, stood in the replica.
    """
    moments = open_loop.schedule(changes, gap_ms, seed)
    ways = [("broken", f"poll every {period:g} ms", period) for period in periods_ms]
    ways.append(("control", f"poll every {control_ms:g} ms, the writer waits", control_ms))
    ways.append(("fixed", "ring buffer events", math.nan))
    triad, follows, delays = Triad("missed"), [], []
    for variant, case, period_ms in ways:
        say(case)
        closed_loop = variant == "control"
        some = moments[: max(1, changes // 5)] if closed_loop else moments
        follow, late_ms = _follow(some, period_ms, closed_loop=closed_loop)
        follows.append({"variant": variant, "case": case, "period_ms": period_ms, **follow})
        delays.append(
            pd.DataFrame(
                {
                    "case": case,
                    "period_ms": period_ms,
                    "version": np.arange(1, len(some) + 1),
                    "delay_ms": late_ms,
                }
            )
        )
        triad.add(
            variant, case=case, operations=len(some), anomalies=follow["missed"],
            cost_ns=follow["cpu_ns"] / len(some),
        )  # fmt: skip
    return {
        "counts": triad.table(),
        "follows": pd.DataFrame(follows),
        "delays": pd.concat(delays, ignore_index=True),
    }


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
        looks = 0
        wait_ms = period_ms if closed_loop else 0.0
        with OpenLoopWriter(
            moments, lambda version: program.write(1), closed_loop_ms=wait_ms
        ) as writer:
            began, cpu_began = time.monotonic_ns(), time.thread_time_ns()
            while not writer.all_seen():
                some = strategy.poll(_PATIENCE_S)
                looks += 1
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
        "looks": stats.resyncs if isinstance(strategy, Poll) else looks,
        "cpu_ns": spent,
        "elapsed_ns": elapsed,
    }
    return follow, ((at - writer.intended_ns) / 1e6).astype(np.float32)
