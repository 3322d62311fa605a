"""Trace hook: what it sees of writers that know nothing of it, and what it does about the rest."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from labkit.errors import BadInput, Unavailable
from labkit.kernel import libbpf, probe
from labkit.kernel.libbpf import MapKind, UpdateFlag
from labkit.kernel.maps import KeyExists, Map, PartialBatch
from labkit.kernel.parallel import Child
from labkit.sync.changes import ChangeKind, Changes
from labkit.sync.ring_events import Channel
from labkit.sync.trace_hook import MECHANISMS, Hooks, TraceHook

UPDATE, DELETE = int(ChangeKind.UPDATE), int(ChangeKind.DELETE)
VALUE = np.dtype([("label", "u4"), ("spare", "u4"), ("version", "u8")])


@pytest.fixture(autouse=True)
def _hooks(require_feature: Callable[[str], None]) -> None:
    require_feature("tp_btf")
    require_feature("compile")


@pytest.fixture
def table() -> Iterator[Map]:
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=1_024) as made:
        yield made


def blind(table: Map, **settings: Any) -> TraceHook:
    """A follower of the return of bpf(2) that never reads the map of its own accord."""
    strategy = TraceHook(mechanism="syscalls", pull_s=None, **settings)
    strategy.attach(table)
    return strategy


def rows(changes: Changes) -> list[tuple[int, int, int]]:
    return [(int(one["kind"]), int(one["key"]), int(one["version"])) for one in changes]


def gathered(strategy: TraceHook, count: int, within_s: float = 5.0) -> list[tuple[int, int, int]]:
    """As many changes as are due, and those that come although they are not."""
    found: list[tuple[int, int, int]] = []
    deadline = time.monotonic() + within_s
    while len(found) < count and time.monotonic() < deadline:
        found += rows(strategy.poll(0.1))
    return found + rows(strategy.poll(0))


def test_each_command_of_another_process_is_seen_once_and_in_order(table: Map) -> None:
    def write() -> None:
        theirs = Map.from_id(table.id)
        theirs.update(1, 10)
        theirs.update(1, 11, UpdateFlag.EXIST)
        with suppress(KeyExists):
            theirs.update(1, 99, UpdateFlag.NOEXIST)
        theirs.update_many(np.arange(2, 5, dtype="u4"), np.arange(20, 23, dtype="u8"))
        theirs.delete(1)
        theirs.lookup_and_delete(2)
        theirs.delete_many(np.array([3], "u4"))
        keys, values = np.zeros(8, "u4"), np.zeros(8, "u8")
        place, count = np.zeros(8, "u1"), ctypes.c_uint32(8)
        libbpf.api().bpf_map_lookup_and_delete_batch(
            theirs.fd, None, place.ctypes.data, keys.ctypes.data, values.ctypes.data,
            ctypes.byref(count), ctypes.byref(libbpf.BatchOpts()),
        )  # fmt: skip

    with blind(table) as strategy:
        with Child(write) as child:
            child.result()
        assert gathered(strategy, 9) == [
            (UPDATE, 1, 10), (UPDATE, 1, 11), (UPDATE, 2, 20), (UPDATE, 3, 21), (UPDATE, 4, 22),
            (DELETE, 1, 11), (DELETE, 2, 20), (DELETE, 3, 21), (DELETE, 4, 22),
        ]  # fmt: skip
        stats = strategy.stats()
        assert (stats.produced, stats.delivered, stats.dropped) == (9, 9, 0)
        assert stats.resyncs == 0
        assert len(strategy.replica) == 0


def test_other_maps_and_failed_writes_are_not_seen(table: Map) -> None:
    with (
        Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8) as other,
        blind(table) as strategy,
    ):
        for version in range(1, 102):
            other.update(1, version)
        table.update(7, 1)
        with pytest.raises(KeyExists):
            table.update(7, 2, UpdateFlag.NOEXIST)
        assert gathered(strategy, 1) == [(UPDATE, 7, 1)]
        assert strategy.stats().produced == 1


def test_the_version_comes_from_its_field_and_the_value_is_whole() -> None:
    with (
        Map.create(MapKind.ARRAY, key="u4", value=VALUE, max_entries=4) as array,
        blind(array) as strategy,
    ):
        array.update(3, (7, 8, 9))
        (change,) = strategy.poll(5)
        assert (change["version"], change["value"].tolist()) == (9, (7, 8, 9))
        reading = strategy.replica.get(3)
        assert reading is not None and reading.value["label"] == 7


def test_a_batch_that_is_too_long_or_failed_is_dropped_and_repaired(table: Map) -> None:
    keys = np.arange(1_000, dtype="u4")
    with blind(table) as strategy:
        table.update_many(keys, np.ones(1_000, "u8"))
        deadline = time.monotonic() + 5
        while strategy.replica.differs(table.snapshot()) and time.monotonic() < deadline:
            strategy.poll(0.1)
        assert strategy.replica.differs(table.snapshot()) == 0
        stats = strategy.stats()
        assert (stats.produced, stats.dropped) == (1_000, 1_000 - 512)
        assert stats.resyncs >= 1
        with pytest.raises(PartialBatch):
            table.update_many(keys + 900, np.full(1_000, 2, "u8"))
        deadline = time.monotonic() + 5
        while strategy.replica.differs(table.snapshot()) and time.monotonic() < deadline:
            strategy.poll(0.1)
        assert strategy.replica.differs(table.snapshot()) == 0
        stats = strategy.stats()
        # 100 keys were there, 24 found room.
        assert (stats.produced, stats.dropped) == (1_124, 1_124 - 512)
        assert stats.produced == stats.delivered + stats.dropped + stats.coalesced


def test_a_burst_past_the_ring_is_counted_and_repaired(table: Map) -> None:
    written = 5_000
    with blind(table, ring_bytes=4096) as strategy:
        for version in range(1, written + 1):
            table.update(version % 100, version)
        deadline = time.monotonic() + 5
        while strategy.replica.differs(table.snapshot()) and time.monotonic() < deadline:
            strategy.poll(0.1)
        assert strategy.replica.differs(table.snapshot()) == 0
        stats = strategy.stats()
        assert stats.dropped > 0 and stats.resyncs > 0
        assert stats.produced == written == stats.delivered + stats.dropped + stats.coalesced


def test_a_key_that_is_deleted_and_inserted_all_the_time_ends_right(table: Map) -> None:
    """Snapshots are taken meanwhile: no delete hits what was inserted behind it."""

    def write() -> int:
        theirs = Map.from_id(table.id)
        until, version = time.monotonic() + 1.0, 0
        while time.monotonic() < until:
            for key in range(5):
                version += 1
                theirs.update(key, version)
                if version % 3:
                    theirs.delete(key)
        return version

    with TraceHook(mechanism="syscalls", pull_s=0.01) as strategy:
        replica = strategy.attach(table)
        with Child(write) as child:
            while not child.ended():
                strategy.poll(0.05)
            assert child.result() > 0
        gathered(strategy, 1, within_s=0.3)
        assert replica.differs(table.snapshot()) == 0
        assert strategy.stats().resyncs > 1


def test_a_pull_finds_what_no_hook_sees() -> None:
    from labkit.kernel.libbpf import MapFlag
    from labkit.kernel.mapping import mapped

    with (
        Map.create(
            MapKind.ARRAY, key="u4", value="u8", max_entries=4, flags=MapFlag.MMAPABLE
        ) as array,
        TraceHook(mechanism="syscalls", pull_s=0.05) as strategy,
        mapped(array) as memory,
    ):
        strategy.attach(array)
        memory.values[2] = 5
        assert gathered(strategy, 1) == [(UPDATE, 2, 5)]
        stats = strategy.stats()
        assert (stats.produced, stats.repaired) == (0, 1)


@pytest.mark.parametrize(("mechanism", "feature"), [("functions", "fexit"), ("kprobes", "kprobe")])
def test_a_mechanism_that_this_kernel_refuses_says_so(
    table: Map, mechanism: str, feature: str
) -> None:
    if probe.probe(feature).works:
        pytest.skip(f"this kernel lacks nothing: {feature} works")
    with (
        TraceHook(mechanism=mechanism) as strategy,
        pytest.raises(Unavailable, match=r"refuses the hook on htab_map_update_elem") as refused,
    ):
        strategy.attach(table)
    assert str(refused.value).count(". ") == 0
    if mechanism == "functions":
        assert "EPERM" in str(refused.value)


@pytest.mark.parametrize("kind", [MapKind.HASH, MapKind.LRU_HASH, MapKind.ARRAY, MapKind.LPM_TRIE])
def test_functions_see_system_calls_and_programs(
    kind: MapKind, require_feature: Callable[[str], None]
) -> None:
    require_feature("fexit")
    from labkit.kernel.libbpf import MapFlag

    flags = MapFlag.NO_PREALLOC if kind is MapKind.LPM_TRIE else MapFlag.NONE
    key = "u8" if kind is MapKind.LPM_TRIE else "u4"
    with (
        Map.create(kind, key=key, value="u8", max_entries=8, flags=flags) as table,
        TraceHook(mechanism="functions", pull_s=None) as strategy,
    ):
        strategy.attach(table)
        for version in range(1, 102):
            table.update(1, version)
        assert gathered(strategy, 101) == [(UPDATE, 1, version) for version in range(1, 102)]


def test_hooks_that_stand_already_follow_again_and_again(table: Map) -> None:
    with Channel.create(1 << 16) as channel, Hooks(table, channel) as hooks:
        hooks.detach()
        for turn in range(3):
            table.update(1, 10 * turn + 1)  # nobody is hooked
            with TraceHook(pull_s=None, hooks=hooks) as strategy:
                replica = strategy.attach(table)
                assert len(replica) == 1
                table.update(1, 10 * turn + 2)
                assert gathered(strategy, 1) == [(UPDATE, 1, 10 * turn + 2)]
                assert strategy.stats().produced == strategy.stats().delivered == 1
        assert channel.counts.lookup(0)["emitted"].sum() == 3
        with (
            Map.create(MapKind.HASH, key="u4", value="u8", max_entries=1) as other,
            TraceHook(hooks=hooks) as strategy,
            pytest.raises(BadInput, match="not on this"),
        ):
            strategy.attach(other)


def test_every_hooked_function_is_one_of_this_kernel(table: Map) -> None:
    """The names come from one list for all kernels; each type's update must be among this one's."""
    from labkit.kernel.libbpf import AttachType
    from labkit.sync import trace_hook

    for functions in trace_hook.FUNCTIONS.values():
        for name, program in functions.items():
            if program.startswith("on_update"):
                libbpf.vmlinux_function_id(name, AttachType.TRACE_FEXIT)


@pytest.mark.parametrize(
    "settings", [{"mechanism": "magic"}, {"pull_s": 0.0}, {"wakeup": "sometimes"}]
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        TraceHook(**settings)
    assert "magic" not in MECHANISMS


@pytest.mark.parametrize("kind", [MapKind.PERCPU_HASH, MapKind.PERCPU_ARRAY])
def test_per_cpu_maps_are_watched_but_not_copied(kind: MapKind) -> None:
    with (
        Map.create(kind, key="u4", value="u8", max_entries=8) as table,
        Channel.create(1 << 16) as channel,
    ):
        with TraceHook() as strategy, pytest.raises(BadInput, match="no single value"):
            strategy.attach(table)
        with Hooks(table, channel, mechanism="syscalls") as hooks:
            table.update(1, 5)
            assert hooks.hooked == ("sys_exit",)
            assert hooks.missed() == 0
            emitted = channel.counts.lookup(0)["emitted"]
        assert emitted.sum() == 1


def test_a_ring_has_no_changes_to_hook() -> None:
    with (
        Map.create(MapKind.RINGBUF, key=None, value=None, max_entries=4096) as ring,
        Channel.create(4096) as channel,
        pytest.raises(BadInput, match="cannot be hooked"),
    ):
        Hooks(ring, channel)
