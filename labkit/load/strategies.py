"""The ways to follow one map that are compared, each with the name that tables and panels use."""

from __future__ import annotations

from collections.abc import Callable

from labkit.sync.hybrid import Hybrid
from labkit.sync.poll import Poll
from labkit.sync.ring_events import Channel, RingEvents
from labkit.sync.strategy import Strategy
from labkit.sync.trace_hook import TraceHook

# A strategy joins the benchmark and the panel by a line here.
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
"""The follower of a table that is published whole; it polls every millisecond for a switch."""
