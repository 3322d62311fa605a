"""The benchmark's own measurements, in small: every account adds up, and ratios point right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments.bench import bench_kernel
from experiments.bench.kernel_bars import LIBBPF, LIBBPF_COPY, OURS
from experiments.bench.sync_bars import C
from labkit.kernel.parallel import cpus

pytestmark = pytest.mark.outside_vm("compares speeds, which an emulated CPU distorts")

Bench = tuple[subprocess.Popen[str], list[int]]


@pytest.fixture
def producer_cpu(require_feature: Callable[[str], None]) -> Iterator[int]:
    """Pin the reader, as the benchmark does, and tell the producer's CPU."""
    for feature in ("two_cpus", "ringbuf", "batch_hash", "gcc"):
        require_feature(feature)
    usable = cpus()
    os.sched_setaffinity(0, {usable[0]})
    yield usable[1]
    os.sched_setaffinity(0, usable)


def test_a_filled_ring_is_drained_far_faster_than_by_bcc(producer_cpu: int) -> None:
    table = bench_kernel.drain(1 << 20, rounds=3)
    rate = (table["events"] / table["ns"]).groupby(table["consumer"]).median()
    assert (table["repetition"].value_counts() == len(rate)).all()
    assert {"RingReader, any size", LIBBPF, LIBBPF_COPY} < set(rate.index)
    assert rate["RingReader"] > 20 * rate["bcc, ctypes cast"]


def test_live_events_are_accounted_exactly(producer_cpu: int) -> None:
    table = bench_kernel.live(1 << 20, 300_000, 1, producer_cpu)
    assert (table["produced"] == 300_000).all()
    assert (table["produced"] == table["delivered"] + table["dropped"]).all()
    lost = table.set_index("consumer")["dropped"].to_dict()
    assert lost["bcc, ctypes cast"] > lost["RingReader"]


def test_latency_is_measured_for_every_policy_and_rate(producer_cpu: int) -> None:
    repetitions, pooled = bench_kernel.latency(1, 0.05, (1_000, 50_000), producer_cpu)
    readers = set(repetitions["reader"])
    assert {OURS, C} <= readers
    assert len(repetitions) == len(pooled) == 6 * 2 * len(readers)
    assert (repetitions["produced"] == repetitions["delivered"] + repetitions["dropped"]).all()
    assert (pooled["max_ns"] > 0).all()
    # A wakeup every 64 records at 1,000 a second comes later than one for each.
    ours = pooled[pooled["reader"] == OURS]
    median = ours.set_index(["policy", "rate"])["p50_ns"].fillna(pooled["max_ns"].max())
    assert median["every 64 records", 1000] > median["always", 1000]


def test_maps_are_read_and_written_the_same_by_all_ways() -> None:
    table = bench_kernel.maps(2_000, rounds=1)
    rate = (table["entries"] / table["ns"]).groupby(table["way"]).median()
    assert {"batch, libbpf in C, fill", "batch, libbpf in C, lookup"} < set(rate.index)
    assert rate["snapshot()"] > 5 * rate["items()"]


def test_a_map_is_timed_as_it_grows() -> None:
    table = bench_kernel.large(2_000, rounds=2)
    assert table["entries"].tolist() == [200, 200, 2_000, 2_000] and (table["ns"] > 0).all()


@pytest.fixture
def bench(require_feature: Callable[[str], None], tmp_path: Path) -> Iterator[Bench]:
    """A benchmark that has begun to measure, saving into the test's folder."""
    for feature in ("two_cpus", "ringbuf", "batch_hash", "gcc"):
        require_feature(feature)
    with subprocess.Popen(
        [sys.executable, "-m", "labkit", "bench", "kernel", "--folder", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr is not None
        while "round 1" not in (line := running.stderr.readline()):
            assert line, "the benchmark ended before it measured anything"
        children = _descendants(running.pid)
        assert len(children) >= 2, "the worker and its C consumer"
        yield running, children
        running.kill()


def test_kill_9_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    running, children = bench
    running.kill()
    running.wait(30)
    _all_gone(children)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_it_with_one_sentence(bench: Bench, tmp_path: Path) -> None:
    running, children = bench
    running.send_signal(signal.SIGINT)
    assert running.wait(30) == 130
    assert running.stderr is not None
    said = running.stderr.read()
    assert "Interrupted" in said and "Traceback" not in said
    _all_gone(children)
    assert list(tmp_path.iterdir()) == []


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *_descendants(int(child))]
    return found


def _all_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while alive := [pid for pid in pids if _alive(pid)]:
        assert time.monotonic() < deadline, f"processes {alive} outlived the benchmark"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
