"""What a user of the strategies meets: examples, ways to attach, refusals, bounds."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import labkit.sync
from labkit.errors import BadInput
from labkit.kernel import native, programs
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, another_cpu
from labkit.kernel.pins import PinFolder
from labkit.kernel.ringbuf import WAKEUPS
from labkit.load.event_writer import EventWriter, updates
from labkit.load.steady_writer import SteadyWriter
from labkit.sync.changes import ChangeKind
from labkit.sync.hybrid import Hybrid
from labkit.sync.poll import Poll
from labkit.sync.replica import Replica
from labkit.sync.ring_events import COUNTS, Channel, RingEvents
from labkit.sync.strategy import Strategy

pytestmark = pytest.mark.outside_vm("asks nothing of the kernel that differs between kernels")

MODULES = [module.name for module in pkgutil.iter_modules(labkit.sync.__path__, "labkit.sync.")]


@pytest.fixture
def table(kernel: None) -> Iterator[Map]:
    with Map.create(MapKind.HASH, key="u8", value="u8", max_entries=2_000) as made:
        yield made


@pytest.fixture
def channel(kernel: None) -> Iterator[Channel]:
    with Channel.create(1 << 20) as made:
        yield made


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_docstrings_run(name: str, kernel: None) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", ["poll", "ring_events", "trace_hook", "double_map", "hybrid"])
def test_every_strategy_has_an_example(name: str) -> None:
    module = importlib.import_module(f"labkit.sync.{name}")
    assert any(test.examples for test in doctest.DocTestFinder().find(module))


# -- attaching ------------------------------------------------------------------------------


def test_a_map_is_attached_to_by_id_by_pin_and_as_a_table_of_bcc(kernel: None) -> None:
    with programs.load_by_bcc("ring_table", ENTRIES=8) as unit, PinFolder() as pins:
        table = unit.map("table")
        table.pin(pins.path("policy"))
        table.update(80, 1)
        for opened in (
            Map.from_id(table.id),
            Map.from_pin(pins.path("policy")),
            Map.from_fd(unit.table("table").map_fd),
        ):
            with Poll(0.001) as strategy:
                replica = strategy.attach(opened)
                opened.close()  # ours to close: the strategy has its own descriptor
                version = int(table.lookup(80)) + 1
                table.update(80, version)
                assert [int(row["version"]) for row in strategy.poll(5)] == [version]
                reading = replica.get(80)
                assert reading is not None and reading.version == version


def test_a_channel_is_opened_by_pin(table: Map, channel: Channel) -> None:
    with PinFolder() as pins, EventWriter(table, channel, updates(4, 1)) as writer:
        channel.ring.pin(pins.path("ring"))
        channel.counts.pin(pins.path("counts"))
        with (
            Channel(
                Map.from_pin(pins.path("ring")), Map.from_pin(pins.path("counts"), value=COUNTS)
            ) as theirs,
            RingEvents(theirs) as strategy,
        ):
            strategy.attach(table)
            writer.write(4)
            assert len(strategy.poll(5)) == 4


def test_an_array_is_followed_too(kernel: None) -> None:
    with Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=4) as table:
        table.update(2, 5)
        with Poll(0.001) as strategy:
            replica = strategy.attach(table)
            assert len(replica) == 4
            table.update(3, 1)
            rows = strategy.poll(5)
            assert [(int(row["key"]), int(row["version"])) for row in rows] == [(3, 1)]


# -- refusals -------------------------------------------------------------------------------


def test_use_before_attaching_and_after_closing_is_refused(table: Map, channel: Channel) -> None:
    def acts(strategy: Strategy) -> list[Callable[[], object]]:
        return [
            lambda: strategy.poll(0),
            lambda: strategy.replica,
            lambda: strategy.table,
            lambda: list(strategy.changes(1)),
        ]

    for strategy in (Poll(), RingEvents(channel), Hybrid(channel)):
        for act in acts(strategy):
            with pytest.raises(BadInput, match="follows no map yet: attach one"):
                act()
        strategy.attach(table)
        with pytest.raises(BadInput, match="already: make another one"):
            strategy.attach(table)
        strategy.close()
        strategy.close()
        for act in acts(strategy):
            with pytest.raises(BadInput, match="closed: make a new one"):
                act()
        with pytest.raises(BadInput, match="closed: make a new one"):
            strategy.attach(table)


def test_arguments_are_checked(table: Map, channel: Channel) -> None:
    for interval_s in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(BadInput, match="poll interval is more than 0"):
            Poll(interval_s)
        with pytest.raises(BadInput, match="idle_s is more than 0"):
            Hybrid(channel, idle_s=interval_s)
        with pytest.raises(BadInput, match="pull_every_s is more than 0"):
            Hybrid(channel, pull_every_s=interval_s)
    with pytest.raises(BadInput, match="timer of 0 s"):
        RingEvents(channel, timer_s=0)
    with pytest.raises(BadInput, match="A wait is bounded"):
        RingEvents(channel, gather_s=float("inf"))
    with pytest.raises(BadInput, match="gathered for 1 s at most"):
        RingEvents(channel, gather_s=1.5)
    with Poll() as strategy:
        strategy.attach(table)
        for timeout_s in (-1.0, float("inf"), float("nan")):
            with pytest.raises(BadInput, match="A wait is bounded"):
                strategy.poll(timeout_s)
            with pytest.raises(BadInput, match="A wait is bounded"):
                list(strategy.changes(timeout_s))


def test_what_cannot_be_followed_is_refused(table: Map, channel: Channel) -> None:
    value = np.dtype([("action", "u4"), ("count", "i8")])
    with (
        Map.create(MapKind.HASH, key="u4", value=value, max_entries=8) as unversioned,
        Poll() as strategy,
        pytest.raises(BadInput, match="carry no version: name an unsigned integer field"),
    ):
        strategy.attach(unversioned)
    with pytest.raises(BadInput, match="open it with value=COUNTS"):
        RingEvents(Channel(channel.ring, table))
    with (
        RingEvents(Channel(table, channel.counts)) as mistaken,
        pytest.raises(BadInput, match="takes a ring buffer map"),
    ):
        mistaken.attach(table)
    with RingEvents(channel) as first, RingEvents(channel) as second:
        first.attach(table)
        with pytest.raises(BadInput, match="has a reader already"):
            second.attach(table)


def test_a_writers_script_is_checked(table: Map, channel: Channel) -> None:
    with pytest.raises(BadInput, match="non-empty array of dtype OPERATION"):
        EventWriter(table, channel, np.zeros(4, "u8"))
    with pytest.raises(BadInput, match="number 1 is none of them"):
        EventWriter(table, channel, updates(1, 1), program=1)
    with (
        Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8) as narrow,
        pytest.raises(BadInput, match="wants keys of 8 bytes"),
    ):
        EventWriter(narrow, channel, updates(1, 1))


def test_a_steady_writer_writes_all_in_turns_and_not_before_it_is_due(kernel: None) -> None:
    with (
        Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=7) as array,
        Channel.create(1 << 20) as channel,
        SteadyWriter(array, channel) as writer,
        RingEvents(channel, timer_s=0.001) as strategy,
    ):
        strategy.attach(array)
        begun_ns, news = time.monotonic_ns(), []
        for changes in (500, 503):  # it goes on with the key behind the last one
            writer.write(changes, per_second=100_000)
            news.append(strategy.poll(1))
        took_ns = int(writer.control["end_ns"][0]) - begun_ns
        place = np.arange(1_003)
        assert np.array_equal(np.concatenate(news)["key"], place % 7)
        assert np.array_equal(np.concatenate(news)["version"], 1 + place // 7)
        assert took_ns >= (499 + 502) * 10_000
        assert strategy.stats().delivered == 1_003


def test_a_steady_writer_refuses_what_it_cannot_do(table: Map, channel: Channel) -> None:
    with pytest.raises(BadInput, match="wants an array of u8"):
        SteadyWriter(table, channel)
    with (
        Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=2) as array,
        SteadyWriter(array, channel) as writer,
        pytest.raises(BadInput, match="at least one change"),
    ):
        writer.write(0, per_second=5)


# -- bounds ---------------------------------------------------------------------------------


def test_iterating_ends(table: Map, channel: Channel) -> None:
    for strategy in (Poll(0.005), RingEvents(channel)):
        with strategy:
            strategy.attach(table)
            assert list(strategy.changes(0.03)) == []


def test_a_late_poller_skips_looks(table: Map) -> None:
    with Poll(interval_s=0.2) as strategy:
        strategy.attach(table)
        time.sleep(1.3)  # six looks are missed
        begun = time.monotonic()
        for _ in range(6):
            strategy.poll(0)
        due = (time.monotonic() - begun) / 0.2
        assert 1 <= strategy.stats().resyncs <= 2 + due, "it makes up for looks that it missed"


@pytest.mark.parametrize("wakeup", list(WAKEUPS))
def test_every_wakeup_policy_delivers_all(table: Map, channel: Channel, wakeup: str) -> None:
    script = updates(50, 20, per_second=20_000)
    with (
        EventWriter(table, channel, script, wakeup=wakeup, wakeup_at=64) as writer,
        RingEvents(channel, timer_s=0.01, gather_s=0.0005) as strategy,
    ):
        strategy.attach(table)
        with Child(lambda: writer.write(1_000), cpu=another_cpu(1)) as child:
            rows = [strategy.poll(0.01)]
            while not child.ended() or len(rows[-1]):
                rows.append(strategy.poll(0.02))
            child.result()
        versions = np.concatenate(rows)["version"]
        assert np.array_equal(versions, script["version"])


@pytest.mark.parametrize("off", [False, True])
def test_the_replica_has_a_change_before_gathered_ones_are_handed_out(
    table: Map, channel: Channel, monkeypatch: pytest.MonkeyPatch, off: bool
) -> None:
    if off:
        monkeypatch.setenv(native.SWITCH, "0")
    with (
        EventWriter(table, channel, updates(3, 2)) as writer,
        RingEvents(channel, gather_s=1.0) as strategy,
        ThreadPoolExecutor(1) as pool,
    ):
        replica = strategy.attach(table)
        polled = pool.submit(strategy.poll, 10)
        for written in range(6):
            writer.write(1)
            deadline = time.monotonic() + 5
            while (found := replica.get(written % 3)) is None or found.version < 1 + written // 3:
                assert time.monotonic() < deadline, "the replica never had it"
            if written == 0:
                assert len(replica) == 1 and not polled.done()
        assert polled.result()["version"].tolist() == [1, 1, 1, 2, 2, 2]


def test_a_signal_ends_the_gathering(table: Map, channel: Channel) -> None:
    class Alarm(Exception):
        pass

    def ring(*_: object) -> None:
        raise Alarm

    with (
        EventWriter(table, channel, updates(1, 1)) as writer,
        RingEvents(channel, gather_s=1.0) as strategy,
    ):
        strategy.attach(table)
        writer.write(1)
        usual = signal.signal(signal.SIGALRM, ring)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            begun = time.monotonic()
            with pytest.raises(Alarm):
                strategy.poll(10)
        finally:
            signal.signal(signal.SIGALRM, usual)
        assert time.monotonic() - begun < 0.9


def test_a_schedule_is_kept_from_round_to_round(table: Map, channel: Channel) -> None:
    script = updates(10, 5, per_second=10_000)
    with (
        EventWriter(table, channel, script, round_versions=5, round_ns=5_000_000) as writer,
        RingEvents(channel) as strategy,
    ):
        strategy.attach(table)
        begun_ns = time.monotonic_ns()
        writer.write(200, start_ns=begun_ns)
        assert writer.done == 200
        last = writer.script[-1]
        assert last["start_ns"] >= begun_ns + 3 * 5_000_000 + last["due_ns"]
        assert int(strategy.poll(1)["version"].max()) == 20


# -- hybrid's pulls -------------------------------------------------------------------------


def test_hybrid_pulls_when_the_stream_idles(table: Map, channel: Channel) -> None:
    with Hybrid(channel, idle_s=0.05, pull_every_s=None) as strategy:
        strategy.attach(table)
        table.update(7, 1)  # by somebody who emits no event
        for changes in strategy.changes(for_s=30):
            assert changes["key"].tolist() == [7]
            break
        assert strategy.stats().repaired == 1


def test_hybrid_finds_foreign_writes_in_a_busy_stream(table: Map, channel: Channel) -> None:
    script = updates(50, 20, per_second=5_000)
    with (
        EventWriter(table, channel, script, round_versions=20, round_ns=200_000_000) as writer,
        Hybrid(channel, idle_s=60, pull_every_s=0.1) as strategy,
    ):
        replica = strategy.attach(table)
        with Child(lambda: writer.write(10_000_000), cpu=another_cpu(1)) as child:
            table.update(1_999, 1)
            deadline = time.monotonic() + 30
            while replica.get(1_999) is None:
                strategy.poll(0.05)
                assert time.monotonic() < deadline
            assert not child.ended()
            writer.stop()
            child.result()


# -- a writer that is watched, and one that loses events ------------------------------------


def test_a_watched_writer_notes_how_full_the_ring_was_and_what_was_dropped(table: Map) -> None:
    with (
        Channel.create(4096) as ring,  # some 70 events
        EventWriter(table, ring, updates(100, 1), watched=True) as writer,
        RingEvents(ring) as strategy,
    ):
        strategy.attach(table)
        writer.write(100)
        unread, dropped = writer.script["unread"], writer.script["dropped"]
        fits = int((dropped == 0).sum())
        assert unread[:fits].tolist() == [56 * (at + 1) for at in range(fits)]
        assert dropped[fits:].tolist() == list(range(1, 100 - fits + 1)) and 0 < fits < 100
        assert strategy.stats().dropped == 100 - fits


def test_a_known_share_of_events_is_lost_and_counted(table: Map, channel: Channel) -> None:
    with (
        EventWriter(table, channel, updates(10, 3), lose_every=7) as writer,
        Hybrid(channel, on_loss=False, pull_every_s=None, idle_s=600) as strategy,
    ):
        strategy.attach(table)
        writer.write(30)
        versions = strategy.poll(5)["version"]
        assert len(versions) == 26
        stats = strategy.stats()
        assert (stats.produced, stats.delivered, stats.dropped) == (30, 26, 4)
        assert strategy.behind and not writer.script["unread"].any()
    with pytest.raises(BadInput, match="lose_every"):
        EventWriter(table, channel, updates(1, 1), lose_every=-1)


# -- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", ["1", "0"], ids=["native", "numpy"])
@pytest.mark.parametrize("strategy", [RingEvents, Hybrid])
def test_keys_that_are_gone_are_forgotten(
    table: Map,
    channel: Channel,
    strategy: type[RingEvents],
    switch: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(native.SWITCH, switch)
    turns, keys = 8, 3_000
    with (
        EventWriter(table, channel, coming_and_going(turns * keys)) as writer,
        strategy(channel, timer_s=0.01, resync_gap_s=0.01) as follower,
    ):
        replica, most = follower.attach(table), 0
        for _ in range(turns):
            writer.write(2 * keys)
            deadline = time.monotonic() + 60
            while follower.stats().unread_bytes or replica.crowded:
                follower.poll(0.02)
                assert time.monotonic() < deadline, "it never forgets"
            most = max(most, replica.nbytes)
        stats = follower.stats()
        assert stats.produced == stats.delivered == 2 * turns * keys
        assert 0 < stats.resyncs <= turns * 4 and len(replica) == 0
    remembering = Replica(table)
    everything = np.zeros(turns * keys, remembering.change_dtype)
    everything["key"], everything["kind"] = np.arange(len(everything)), ChangeKind.DELETE
    everything["version"] = 2
    remembering.apply(everything)
    assert most < remembering.nbytes / 2


def coming_and_going(keys: int) -> npt.NDArray[Any]:
    """Each key comes once and goes at once."""
    script = np.repeat(updates(keys, 1), 2)
    script["version"][1::2], script["kind"][1::2] = 2, ChangeKind.DELETE
    return script
