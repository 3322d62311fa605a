"""Ways to keep a copy of a map in sync, behind one interface, and the copy that they feed.

docs/sync.md has an example of each.
"""

from labkit.sync.double_map import DoubleMap
from labkit.sync.hybrid import Hybrid
from labkit.sync.poll import Poll
from labkit.sync.replica import Replica
from labkit.sync.ring_events import Channel, RingEvents
from labkit.sync.trace_hook import TraceHook

__all__ = ["Channel", "DoubleMap", "Hybrid", "Poll", "Replica", "RingEvents", "TraceHook"]
