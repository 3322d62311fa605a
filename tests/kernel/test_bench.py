"""The open-loop load on a real kernel: every write accounted for and seen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from experiments.bench import bench_watch, watch_bars
from labkit.errors import BadInput
from labkit.judge.checkers import accounting
from labkit.kernel.parallel import cpus
from labkit.lab.measure import measure
from labkit.load.workload import WRITERS, Generations, Load
from labkit.sync.double_map import DoubleMap
from labkit.sync.hybrid import Hybrid
from labkit.sync.poll import Poll
from labkit.sync.ring_events import RingEvents
from labkit.sync.trace_hook import TraceHook

pytestmark = [
    pytest.mark.usefixtures("kernel"),
    pytest.mark.outside_vm("compares speeds, which an emulated CPU distorts"),
]


@pytest.mark.parametrize("value_bytes", [8, 64, 1024])
def test_each_follower_accounts_for_every_write(value_bytes: int) -> None:
    """One load, followers in turns: what one left unread is no change of the next."""
    before = os.sched_getaffinity(0)
    with Load(value_bytes, keys=7, most_operations=1_009, ring_bytes=1 << 16) as load:
        for writer in WRITERS:
            followers = [Poll(0.001), TraceHook(pull_s=None)]
            if writer == "program":
                followers = [
                    Poll(0.001), RingEvents(load.channel), Poll(0.01), Hybrid(load.channel),
                ]  # fmt: skip
            for strategy in followers:
                with strategy:
                    trace = load.run(strategy, rate=50_021, seconds=1, writer=writer)
                stats = trace.stats
                assert len(trace) == stats.produced == 1_009
                unaccounted = accounting(
                    produced=stats.produced, delivered=stats.delivered,
                    dropped=stats.dropped, coalesced=stats.coalesced,
                )  # fmt: skip
                assert unaccounted == 0
                assert (trace.seen_ns > 0).all() and (trace.end_ns >= trace.start_ns).all()
                assert (trace.start_ns >= trace.intended_ns).all(), "nothing is written early"
                assert (np.diff(trace.intended_ns.astype(np.int64)) > 0).all()
                if writer == "program" and not isinstance(strategy, Poll):
                    assert (trace.seen_ns >= trace.start_ns).all()
                assert trace.map_bytes > 0 and trace.replica_bytes == 7 * (16 + value_bytes)
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("value_bytes", [8, 1024])
def test_generations_are_accounted_for_and_come_whole(
    value_bytes: int, require_feature: Callable[[str], None]
) -> None:
    require_feature("map_in_map")
    with Generations(value_bytes, keys=7) as load:
        for interval_s in (0.001, 0.03):
            with DoubleMap(interval_s, layout=load.layout) as strategy:
                trace = load.run(strategy, rate=7 * 200, switches=12)
            stats = trace.stats
            assert len(trace) * trace.changes == stats.produced == 12 * 7
            assert stats.delivered + stats.coalesced == stats.produced and not stats.dropped
            assert (trace.seen_ns >= trace.start_ns).all()
            assert (trace.start_ns >= trace.intended_ns).all(), "nothing is published early"
            assert trace.reads > 0 and trace.mixed == 0
            assert trace.map_bytes > 0 and trace.replica_bytes == 7 * (16 + value_bytes)
    with pytest.raises(BadInput, match="at least one switch"), Generations(8, keys=1) as load:
        load.run(DoubleMap(), rate=1, switches=0)


def test_a_ring_that_is_too_small_drops_and_every_write_is_seen_all_the_same() -> None:
    with Load(1024, wakeup="never", keys=11, most_operations=997, ring_bytes=4096) as load:
        with RingEvents(load.channel, timer_s=0.05) as strategy:
            trace = load.run(strategy, rate=1e6, seconds=1)
        assert trace.stats.dropped > 0
        assert (trace.seen_ns > 0).all()


def test_bad_orders_are_refused() -> None:
    with pytest.raises(BadInput, match="8 to 1024"):
        Load(12, keys=1, most_operations=1, ring_bytes=4096)
    with Load(8, keys=1, most_operations=1, ring_bytes=4096) as load:
        for rate, seconds, writer in ((0.0, 1.0, "program"), (1.0, 0.0, "program"), (1, 1, "me")):
            with pytest.raises(BadInput, match="A load has"), Poll() as strategy:
                load.run(strategy, rate=rate, seconds=seconds, writer=writer)


@pytest.mark.timeout(300)
def test_a_benchmark_that_was_killed_goes_on_with_what_it_had(tmp_path: Path) -> None:
    changed = {
        "rates": [20_000], "sizes": [8], "saturation": [100_000], "switched": [4_000],
        "switches": 5, "rounds": 2, "others_every": 1, "seconds": 0.02,
        "warm_up_s": 0.005, "keys": 40,
    }  # fmt: skip
    order = f"measure('sync-benchmark', changed={changed!r}, folder=Path({str(tmp_path)!r}))"
    script = f"from pathlib import Path; from labkit.lab.measure import measure; {order}"
    running = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.rglob("part-*.json"))) < 5:
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        running.kill()
        running.wait()
    said: list[str] = []
    run = measure(
        "sync-benchmark", changed=changed, folder=tmp_path, time_limit_s=240, say=said.append
    )
    assert sum("Continuing the run of sync-benchmark" in words for words in said) == 1
    continued = run.provenance["continued"]
    assert isinstance(continued, dict) and continued["parts_before"] >= 5
    cells = run.table("cells")
    assert (cells.groupby("cell")["round"].nunique() == 2).all()
    assert not cells.duplicated(["cell", "round"]).any()
    assert (cells["produced"] == cells["operations"]).all() and (cells["unseen"] == 0).all()
    assert set(run.table("floor")["round"]) == {0, 1}


def test_each_way_to_watch_accounts_for_every_update() -> None:
    table = bench_watch.updates(500, 1, writer_cpu=cpus()[0], watcher_cpu=cpus()[-1])
    told = table.set_index("way")[["produced", "delivered", "dropped"]]
    assert told["produced"].to_dict() == {
        watch_bars.NOBODY: 0, watch_bars.WATCHED: 550, watch_bars.UNWATCHED: 0,
        watch_bars.PEER: 1_100,
    }  # fmt: skip
    assert (told["delivered"] + told["dropped"] == told["produced"]).all()
