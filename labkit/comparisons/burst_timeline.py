"""A burst past the ring's capacity: its fill, the drops, and what repairs them, over time."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import TimedOut
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, another_cpu, shared_array
from labkit.sync.changes import Changes
from labkit.sync.event_writer import EventWriter, updates
from labkit.sync.hybrid import Hybrid
from labkit.sync.ring_events import Channel
from labkit.sync.strategy import Strategy
from labkit.workload import keys_behind, seen_at, undisturbed

_STREAM_KEYS = 50
_ROUND = 500  # writes of the stream between two looks at whether it may end
_POINTS = 1_500  # of a timeline
_WAIT_S = 0.02
_LIMIT_S = 20.0


def _events_alone(channel: Channel) -> Strategy:
    """Events and nothing else: what was dropped is known, and never repaired."""
    return Hybrid(channel, on_loss=False, pull_every_s=None, idle_s=1e6)


_WAYS = (
    ("broken", "events alone, burst past the ring", _events_alone, False),
    ("control", "events alone, burst fits", _events_alone, True),
    ("fixed", "hybrid, burst past the ring", Hybrid, False),
)


@experiment(
    "burst-timeline",
    number=51,
    family="sync",
    question="What happens in a ring that a burst overruns, and when is the copy right again?",
    claims=("4.4",),
    needs=("bpf", "compile", "test_run", "two_cpus", "hash", "batch_hash", "ringbuf",
           "mmapable_array"),
    quick={
        "burst": 20_000, "rate": 5_000, "after": 4, "rounds": 3,
        "ring_bytes": 1 << 15, "large_ring_bytes": 1 << 22,
    },
    full={
        "burst": 40_000, "rate": 5_000, "after": 6, "rounds": 20,
        "ring_bytes": 1 << 15, "large_ring_bytes": 1 << 22,
    },
)  # fmt: skip
def burst_timeline(
    *,
    burst: int,
    rate: int,
    after: int,
    rounds: int,
    ring_bytes: int,
    large_ring_bytes: int,
) -> Tables:
    """Write a steady stream, a burst in it, and the stream again, and watch ring and replica.

    The program that writes notes beside each operation what ``bpf_ringbuf_query`` tells of the
    ring and how many events found no room, so that what is drawn comes from the writer's own side.
    The burst has keys of its own, each written once: no later event heals them.

    Parameters
    ----------
    burst : int
        Writes at once, each of another key.
    rate : int
        Of the stream, writes per second.
    after : int
        The stream goes on for at least so many times 500 writes, and for as long as the follower
        has a repair before it.
    rounds : int
        Repetitions of each variant, in turns.
    ring_bytes, large_ring_bytes : int
        A ring that is too small for the burst, and one that holds it.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a key of the burst, an anomaly one that the replica had not at
        its newest version when the stream ended. ``bursts``: one row per ``variant`` and
        ``round``: ``ring_bytes``, ``written``, ``produced``, ``delivered``, ``dropped``,
        ``coalesced``, ``repaired``, ``resyncs``, ``fullest_bytes`` (most that was unread),
        ``behind_most`` (keys of the burst), ``behind_at_end`` (of the stream), ``burst_ns`` (first
        to last write of it), ``repaired_ns`` (from the last write of the burst until its keys were
        right for good; NaN: never while the stream went on), ``left`` (writes of the stream after
        that), ``read_ns`` (one reading of the whole map). ``timeline``, of the first round:
        ``variant``, ``at_ns`` from the burst's first write on, ``unread_bytes``, ``dropped`` (so
        far), ``behind`` (keys of the burst).
    """
    triad, rows, timelines = Triad("key behind"), [], []
    for turn in range(rounds):
        for variant, _, follower, fits in _WAYS:
            say(f"round {turn + 1} of {rounds}, {variant}")
            size = large_ring_bytes if fits else ring_bytes
            with ExitStack() as stack:
                stage = _Stage(stack, burst, rate, size)
                strategy = stack.enter_context(follower(stage.channel))
                row, timeline = _watch(stage, strategy, after, repairs=variant == "fixed")
            rows.append({"variant": variant, "round": turn, "ring_bytes": size, **row})
            if turn == 0:
                timelines.append(timeline.assign(variant=variant))
    bursts = pd.DataFrame(rows)
    behind = bursts.groupby("variant")["behind_at_end"].sum()
    for variant, case, _, _ in _WAYS:
        triad.add(variant, case=case, operations=rounds * burst, anomalies=behind[variant])
    return {
        "counts": triad.table(),
        "bursts": bursts,
        "timeline": pd.concat(timelines, ignore_index=True),
    }


class _Stage:
    """The table with version 1 of all keys, the ring, and the two scripts that share them."""

    def __init__(self, stack: ExitStack, burst: int, rate: int, ring_bytes: int) -> None:
        self.keys = burst
        entries = burst + _STREAM_KEYS
        self.table = stack.enter_context(
            Map.create(MapKind.HASH, key="u8", value="u8", max_entries=entries, name="followed")
        )
        self.table.update_many(np.arange(entries, dtype=np.uint64), np.ones(entries, np.uint64))
        self.channel = stack.enter_context(Channel.create(ring_bytes, programs=2))
        stream = updates(_STREAM_KEYS, _ROUND // _STREAM_KEYS, per_second=rate, first_version=2)
        stream["key"] += burst
        self.stream = stack.enter_context(
            EventWriter(
                self.table, self.channel, stream, watched=True,
                round_versions=_ROUND // _STREAM_KEYS, round_ns=int(_ROUND / rate * 1e9),
            )
        )  # fmt: skip
        self.burst = stack.enter_context(
            EventWriter(
                self.table, self.channel, updates(burst, 1, first_version=2),
                program=1, watched=True,
            )
        )  # fmt: skip


def _watch(
    stage: _Stage, strategy: Strategy, after: int, *, repairs: bool
) -> tuple[dict[str, float], pd.DataFrame]:
    """What the writer noted, and what the follower had, by time."""
    strategy.attach(stage.table)
    begun = time.monotonic_ns()
    stage.table.snapshot()
    read_ns = time.monotonic_ns() - begun
    passed, enough = shared_array(1, np.int64), shared_array(1, np.int64)

    def write() -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
        start_ns, stream = time.monotonic_ns() + 1_000_000, []
        deadline = time.monotonic() + _LIMIT_S
        while not enough[0] and time.monotonic() < deadline:
            stage.stream.write(_ROUND, start_ns=start_ns)
            stream.append(stage.stream.script.copy())
            if len(stream) == 1:
                stage.burst.write(len(stage.burst.script))
            passed[0] += 1
        return np.concatenate(stream), stage.burst.script.copy()

    news: list[Changes] = []
    with undisturbed(), Child(write, cpu=another_cpu(0)) as child:
        os.sched_setaffinity(0, {another_cpu(1)})
        deadline, right_at = time.monotonic() + _LIMIT_S, 0
        while not child.ended():
            some = strategy.poll(_WAIT_S)
            if len(some):
                news.append(some)
            if repairs and strategy.behind:
                right_at = int(passed[0])
            # A whole turn of the stream after the repair, which thus is one in its middle.
            enough[0] = passed[0] > max(after, right_at + 1)
            if time.monotonic() > deadline:
                raise TimedOut("The stream of burst-timeline did not end.")
        stream, burst = child.result()
    while len(some := strategy.poll(_WAIT_S)) and time.monotonic() < deadline:
        news.append(some)
    return _figures(stage, strategy, stream, burst, news, read_ns)


def _figures(
    stage: _Stage,
    strategy: Strategy,
    stream: npt.NDArray[np.void],
    burst: npt.NDArray[np.void],
    news: list[Changes],
    read_ns: int,
) -> tuple[dict[str, float], pd.DataFrame]:
    ours = [some[some["key"] < stage.keys] for some in news]
    key, version, end_ns = burst["key"], burst["version"], burst["end_ns"]
    seen_ns = seen_at(ours, key, version, stage.keys, 2)
    first, last = int(burst["start_ns"].min()), int(end_ns.max())
    stream_end = int(stream["end_ns"].max())
    moments = _moments(stream["end_ns"], end_ns)
    behind = keys_behind(moments, key, end_ns, seen_ns)
    at_end = int(keys_behind(np.array([stream_end]), key, end_ns, seen_ns)[0])
    right = max(last, int(seen_ns.max()))
    stats = strategy.stats()
    row = {
        "written": len(stream) + len(burst),
        "produced": stats.produced,
        "delivered": stats.delivered,
        "dropped": stats.dropped,
        "coalesced": stats.coalesced,
        "repaired": stats.repaired,
        "resyncs": stats.resyncs,
        "fullest_bytes": int(max(stream["unread"].max(), burst["unread"].max())),
        "behind_most": int(behind.max()),
        "behind_at_end": at_end,
        "burst_ns": last - first,
        "repaired_ns": float("nan") if at_end else float(right - last),
        "left": 0 if at_end else int((stream["end_ns"] > right).sum()),
        "read_ns": read_ns,
    }
    both = np.concatenate([stream, burst])
    both = both[np.argsort(both["end_ns"])]
    place = np.searchsorted(both["end_ns"].astype(np.int64), moments, side="right") - 1
    # Each of the two programs counts its own.
    dropped = sum(
        np.append(0, one["dropped"])[
            np.searchsorted(one["end_ns"].astype(np.int64), moments, side="right")
        ].astype(np.int64)
        for one in (stream, burst)
    )
    timeline = pd.DataFrame(
        {
            "at_ns": moments - first,
            "unread_bytes": both["unread"][place].astype(np.int64),
            "dropped": dropped,
            "behind": behind,
        }
    )
    return row, timeline


def _moments(
    stream_ns: npt.NDArray[np.uint64], burst_ns: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """When operations ended: a sample of them, half of it in the burst."""
    return np.sort(
        np.concatenate(
            [
                some[np.linspace(0, len(some) - 1, min(len(some), _POINTS // 2)).astype(np.int64)]
                for some in (stream_ns, burst_ns)
            ]
        )
    ).astype(np.int64)
