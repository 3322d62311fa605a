"""The ring buffer reader on the running kernel."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

import numpy as np
import pytest

from experiments.bench.bench_kernel import EVENT, Produced, Producer
from labkit.errors import BadInput
from labkit.kernel import libbpf, native, programs
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, another_cpu, shared_array, together
from labkit.kernel.ringbuf import (
    WAKEUPS,
    Consumer,
    Records,
    RingReader,
    RingStats,
    slot_bytes,
)

BYTES = 64 << 10
SLOT = slot_bytes(EVENT.itemsize)
ROOM = (BYTES - 1) // SLOT  # the kernel never fills the last byte

pytestmark = pytest.mark.outside_vm("asks nothing of the kernel that differs between kernels")

CONSUMERS: list[Consumer]
CONSUMERS = ["numpy", "libbpf"] if native.compiled() is None else ["native", "numpy", "libbpf"]
each_consumer = pytest.mark.parametrize("consumer", CONSUMERS)


@contextmanager
def new_ring(size: int = BYTES) -> Iterator[Map]:
    with Map.create(MapKind.RINGBUF, key=None, value=None, max_entries=size, name="t_ring") as made:
        yield made


@pytest.fixture
def ring() -> Iterator[Map]:
    with new_ring() as made:
        yield made


@each_consumer
def test_every_event_is_delivered_once_and_in_order(ring: Map, consumer: Consumer) -> None:
    # 40-byte slots do not divide the ring: batches run over its end again and again.
    with RingReader(ring, EVENT, consumer=consumer) as reader, Producer(ring.fd) as producer:
        following = 0
        for events in [1, 7, ROOM, 1000, ROOM, 3, ROOM - 1] * 3:
            producer.flood(events)
            batch = reader.read()
            assert np.array_equal(batch["seq"], np.arange(following, following + events))
            assert np.array_equal(batch["value"], batch["seq"] & 0xFF)
            following += events
        stats = reader.stats()
        assert (stats.consumed, stats.discarded, stats.unread_bytes) == (following, 0, 0)
        assert stats.free_bytes == stats.capacity_bytes == BYTES
        assert producer.counts().dropped == 0


@each_consumer
def test_an_overflow_is_accounted_exactly(ring: Map, consumer: Consumer) -> None:
    with RingReader(ring, EVENT, consumer=consumer) as reader, Producer(ring.fd) as producer:
        producer.flood(10_007)
        assert reader.stats().unread_bytes == ROOM * SLOT
        delivered = len(reader.read())
        counts = producer.counts()
        assert delivered == ROOM
        assert (counts.produced, counts.dropped) == (10_007, 10_007 - ROOM)
        producer.flood(1)
        assert reader.read()["seq"].tolist() == [10_007]


@each_consumer
def test_discarded_records_are_counted_and_not_delivered(ring: Map, consumer: Consumer) -> None:
    with (
        RingReader(ring, EVENT, consumer=consumer) as reader,
        Producer(ring.fd, discard_every=3) as producer,
    ):
        seen = []
        for _ in range(10):
            producer.flood(997)
            seen += reader.read()["seq"].tolist()
        counts, stats = producer.counts(), reader.stats()
        assert seen == [seq for seq in range(9_970) if seq % 3 != 2]
        assert counts.produced == stats.consumed + stats.discarded
        assert counts.discarded == stats.discarded > 0


@each_consumer
def test_a_limit_and_a_given_array_bound_a_batch(ring: Map, consumer: Consumer) -> None:
    out = np.zeros(10, EVENT)
    with RingReader(ring, EVENT, consumer=consumer, batch=4) as reader:
        with Producer(ring.fd) as producer:
            producer.flood(20)
        assert len(reader.read()) == 4
        assert len(reader.read(limit=2)) == 2
        assert len(reader.read(out)) == 10
        assert out["seq"].tolist() == list(range(6, 16))
        assert len(reader.read(out, limit=3)) == 3
        assert len(reader.read(out)) == 1


def test_all_consumers_take_the_same() -> None:
    def taken(consumer: Consumer) -> tuple[list[int], RingStats, Produced]:
        with (
            new_ring() as ring,
            Producer(ring.fd, discard_every=5) as producer,
            RingReader(ring, EVENT, consumer=consumer, batch=100) as reader,
        ):
            batches = []
            for events in (50, 1000, 3000):
                producer.flood(events)
                batches += [reader.read().copy() for _ in range(events // 100 + 1)]
            return np.concatenate(batches)["seq"].tolist(), reader.stats(), producer.counts()

    first, *others = map(taken, CONSUMERS)
    assert all(other == first for other in others)


@each_consumer
def test_a_busy_record_holds_back_those_behind_it(ring: Map, consumer: Consumer) -> None:
    pairs, held_for = 500, 2_000  # held for longer than a reader in Python takes to look again
    with (
        programs.load("ring_hold", RING_FD=ring.fd, HELD_FOR=held_for) as unit,
        RingReader(ring, EVENT, consumer=consumer) as reader,
    ):
        hold, state, ended = unit.program("hold"), unit.map("state"), shared_array(1, "i8")
        met = Event()

        def produce() -> None:
            deadline = time.monotonic() + 60
            try:
                while not met.is_set() and time.monotonic() < deadline:
                    hold.test_run(repeat=pairs)
            finally:
                ended[0] = 1

        def consume() -> tuple[list[int], bool]:
            seen: list[int] = []
            whole = True
            while True:
                last = bool(ended[0])
                batch = reader.read()
                if len(batch):
                    seen += batch["seq"].tolist()
                    first = batch["intended_ns"] == 0
                    whole &= bool((batch["value"][first] == held_for).all())
                elif last:
                    return seen, whole
                elif reader.stats().unread_bytes > 0:
                    met.set()

        _, (seen, whole) = together(produce, consume)
        produced = int(state.lookup(0)["seq"])
    assert seen == list(range(produced)), "in the order of the reserves, nothing lost or twice"
    assert whole, "a record was taken before its producer had written all of it"
    assert met.is_set(), "the reader never met a busy record: the test shows nothing"


@each_consumer
def test_a_producer_on_the_other_cpu_loses_nothing_that_fits(consumer: Consumer) -> None:
    events = 100_000
    with (
        new_ring(8 << 20) as ring,
        RingReader(ring, EVENT, consumer=consumer) as reader,
        Producer(ring.fd, "default") as producer,
        Child(lambda: producer.flood(events), cpu=another_cpu(1)) as child,
    ):
        following = 0
        while following < events:
            batch = reader.poll(20)
            assert len(batch), "no record came for a long time"
            assert np.array_equal(batch["seq"], following + np.arange(len(batch)))
            following += len(batch)
        assert child.result().dropped == 0


@each_consumer
@pytest.mark.parametrize("wakeup", ["default", "always"])
def test_no_wakeup_is_lost_in_ping_pong(ring: Map, consumer: Consumer, wakeup: str) -> None:
    # The producer sends one record as soon as the last one was read, which is when a reader
    # goes to sleep. A lost wakeup would show as a wait until the timeout.
    rounds, timeout_s = 3_000, 20.0
    with (
        RingReader(ring, EVENT, consumer=consumer) as reader,
        Producer(ring.fd, wakeup) as producer,
    ):
        read = shared_array(1, np.int64)

        def produce() -> None:
            deadline = time.monotonic() + 60
            for i in range(rounds):
                while read[0] < i and time.monotonic() < deadline:
                    pass
                producer.flood(1)

        longest = 0.0
        with Child(produce, cpu=another_cpu(1)) as child:
            for i in range(rounds):
                begun = time.monotonic()
                assert reader.wait(timeout_s)
                longest = max(longest, time.monotonic() - begun)
                assert reader.read()["seq"].tolist() == [i]
                read[0] = i + 1
            child.result()
        assert longest < timeout_s / 2


@each_consumer
def test_a_wait_is_bounded_and_looks_again(ring: Map, consumer: Consumer) -> None:
    with RingReader(ring, EVENT, consumer=consumer) as reader, Producer(ring.fd) as producer:
        assert not reader.wait(0)
        assert not reader.wait(0.02)
        assert len(reader.poll(0.002)) == 0
        assert list(reader.batches(0.02)) == []

        # The program wakes nobody: the record is found when the time is over.
        def produce_later() -> None:
            time.sleep(0.05)
            producer.flood(1)

        with Child(produce_later) as child:
            assert reader.wait(1.0)
            child.result()
        assert len(reader.poll(0)) == 1


@each_consumer
def test_ctrl_c_ends_a_wait(consumer: Consumer) -> None:
    script = f"""
import signal
from labkit.kernel.maps import Map, MapKind
from labkit.kernel.ringbuf import RingReader
signal.signal(signal.SIGINT, signal.default_int_handler)
ring = Map.create(MapKind.RINGBUF, key=None, value=None, max_entries=65536, name="t_ring")
reader = RingReader(ring, "u8", consumer="{consumer}")
try:
    print("waits", flush=True)
    reader.wait(600)
except KeyboardInterrupt:
    print("ended")
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stdout is not None and waiting.stdout.readline() == "waits\n"
        time.sleep(0.1)
        waiting.send_signal(signal.SIGINT)
        try:
            assert waiting.communicate(timeout=60)[0] == "ended\n"
        finally:
            waiting.kill()


@each_consumer
def test_a_wait_goes_on_after_a_signal_that_is_dealt_with(ring: Map, consumer: Consumer) -> None:
    came = []
    before = signal.signal(signal.SIGALRM, lambda *_: came.append(time.monotonic()))
    try:
        with RingReader(ring, EVENT, consumer=consumer) as reader:
            signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
            begun = time.monotonic()
            assert not reader.wait(0.3)
            assert time.monotonic() - begun >= 0.3 and len(came) > 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_iterating_ends(ring: Map) -> None:
    with RingReader(ring, EVENT) as reader, Producer(ring.fd, "default") as producer:
        with Child(lambda: [producer.flood(10) for _ in range(5)]) as child:
            delivered = sum(len(batch) for batch in reader.batches(1.0))
            child.result()
        assert delivered == 50


@pytest.mark.parametrize("wakeup", list(WAKEUPS))
def test_every_wakeup_policy_delivers_all(ring: Map, wakeup: str) -> None:
    with RingReader(ring, EVENT) as reader, Producer(ring.fd, wakeup, 64) as producer:
        start_ns = time.monotonic_ns()
        with Child(lambda: producer.keep_schedule(300, 20_000, start_ns)) as child:
            events = np.zeros(0, EVENT)
            while len(events) < 300:
                events = np.concatenate([events, reader.poll(0.005)])
                assert time.monotonic_ns() < start_ns + 60 * 10**9
            child.result()
    assert np.array_equal(events["intended_ns"], start_ns + 20_000 * np.arange(300))
    assert (events["committed_ns"] >= events["intended_ns"]).all()


@pytest.mark.parametrize("consumer", [one for one in CONSUMERS if one != "libbpf"])
@pytest.mark.parametrize("other", [8, 24, 40, 64])
def test_records_of_any_size_are_taken(ring: Map, consumer: Consumer, other: int) -> None:
    with (
        programs.load("ring_sizes", RING_FD=ring.fd, OTHER_BYTES=other) as unit,
        RingReader(ring, EVENT, consumer=consumer) as reader,
    ):
        for _ in range(1_000):  # over the end of the ring
            unit.program("emit").test_run()
            records = reader.read_any(room=256)
            sizes = records.places["size"].tolist()
            assert sorted(set(sizes)) == sorted({32, other}) and sizes.count(other) == 1
            ends = records.places["start"] + -(-records.places["size"] // 8) * 8
            assert records.places["start"].tolist() == [0, *ends[:-1].tolist()]
            assert reader.stats().unread_bytes == 0
        unit.program("emit").test_run()
        with pytest.raises(BadInput, match="has 32 bytes, and there is room for 31"):
            reader.read_any(room=31)
        mine = Records(np.zeros(256, np.uint8), np.zeros(1, native.PLACE))
        with pytest.raises(BadInput, match="out is Records of contiguous"):
            reader.read_any(out=mine._replace(data=mine.data[::2]))
        taken = reader.read_any(out=mine)
        assert len(taken.places) == 1 and taken.data is mine.data
        assert np.shares_memory(taken.places, mine.places)


def test_libbpf_takes_one_size(ring: Map) -> None:
    with RingReader(ring, EVENT, consumer="libbpf") as reader:
        with pytest.raises(BadInput, match="records of one size"):
            reader.read_any()
        with pytest.raises(BadInput, match="want room, less than 4 GiB, and a limit"):
            reader.read_any(room=0)


@each_consumer
@pytest.mark.parametrize("other", [8, 24, 40, 64])
def test_another_size_is_refused_behind_what_is_right(
    ring: Map, consumer: Consumer, other: int
) -> None:
    with programs.load("ring_sizes", RING_FD=ring.fd, OTHER_BYTES=other) as unit:
        unit.program("emit").test_run()
        with RingReader(ring, EVENT, consumer=consumer) as reader:
            assert len(reader.read()) == 2
            for _ in range(2):
                with pytest.raises(BadInput, match=f"a record of {other} bytes .* has 32"):
                    reader.read()


def test_what_is_no_ring_or_no_record_is_refused(ring: Map) -> None:
    with (
        Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=1) as array,
        pytest.raises(BadInput, match="is a array: a RingReader takes a ring"),
    ):
        RingReader(array, EVENT)
    with pytest.raises(BadInput, match="never fits into a ring of 65536"):
        RingReader(ring, f"V{BYTES}")
    with pytest.raises(BadInput, match="plain bytes of a fixed size"):
        RingReader(ring, object)
    with pytest.raises(BadInput, match="plain bytes of a fixed size"):
        RingReader(ring, "S0")
    with pytest.raises(BadInput, match="at least 1 record"):
        RingReader(ring, EVENT, batch=0)
    with pytest.raises(BadInput, match="'numpy' or 'libbpf'"):
        RingReader(ring, EVENT, consumer="bcc")  # type: ignore[arg-type]


def test_what_cannot_be_had_here_is_refused(ring: Map, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    with pytest.raises(BadInput, match=r"no native consumer here \(NumPy: LABKIT_NATIVE=0\)"):
        RingReader(ring, EVENT, consumer="native")


def test_a_ring_has_one_reader(ring: Map) -> None:
    with RingReader(ring, EVENT), pytest.raises(BadInput, match="has a reader already"):
        RingReader(ring, EVENT)
    with RingReader(ring.fd, EVENT) as again:
        assert len(again.read()) == 0


def test_a_weakly_ordered_cpu_gets_the_fallback(ring: Map, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with RingReader(ring, EVENT) as reader:
        assert reader.consumer == ("libbpf" if native.compiled() is None else "native")
    monkeypatch.setenv(native.SWITCH, "0")
    with RingReader(ring, EVENT) as reader:
        assert reader.consumer == "libbpf"
    with pytest.raises(BadInput, match="On aarch64 memory is weakly ordered"):
        RingReader(ring, EVENT, consumer="numpy")


def test_arguments_of_a_read_are_checked(ring: Map) -> None:
    with RingReader(ring, EVENT) as reader:
        frozen = np.zeros(4, EVENT)
        frozen.flags.writeable = False
        for out in (np.zeros(4, "u8"), np.zeros((2, 2), EVENT), frozen, np.zeros(4, EVENT)[::2]):
            with pytest.raises(BadInput, match="out must be"):
                reader.read(out)
        with pytest.raises(BadInput, match="make it longer"):
            reader.read(np.zeros(0, EVENT))
        with pytest.raises(BadInput, match="at least 1 record"):
            reader.read(limit=0)
        for timeout in (-1.0, float("inf"), float("nan")):
            with pytest.raises(BadInput, match="A wait is bounded"):
                reader.wait(timeout)


@each_consumer
def test_a_closed_reader_says_so(ring: Map, consumer: Consumer) -> None:
    reader = RingReader(ring, EVENT, consumer=consumer)
    reader.close()
    reader.close()
    for act in (reader.read, reader.stats, lambda: reader.wait(1), lambda: reader.poll(1)):
        with pytest.raises(BadInput, match="RingReader is closed"):
            act()


def test_a_batch_outlives_its_reader(ring: Map) -> None:
    with RingReader(ring, EVENT) as reader, Producer(ring.fd) as producer:
        producer.flood(3)
        batch = reader.read()
    assert batch["seq"].tolist() == [0, 1, 2]


def test_the_ring_is_gone_after_kill_9() -> None:
    script = """
import sys, time
from labkit.kernel.maps import Map, MapKind
from labkit.kernel.ringbuf import RingReader
ring = Map.create(MapKind.RINGBUF, key=None, value=None, max_entries=65536, name="t_killed")
reader = RingReader(ring, "u8")
print(ring.id, flush=True)
reader.wait(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as victim:
        assert victim.stdout is not None
        identifier = int(victim.stdout.readline())
        os.close(libbpf.fd_by_id("map", identifier))
        victim.send_signal(signal.SIGKILL)
        victim.wait(30)
    deadline = time.monotonic() + 30
    while identifier in libbpf.ids("map"):
        assert time.monotonic() < deadline, "the ring outlived its reader"
        time.sleep(0.02)
