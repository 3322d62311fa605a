"""Maps on the running kernel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from labkit.errors import BadInput
from labkit.kernel import libbpf
from labkit.kernel.libbpf import MapFlag, MapKind, UpdateFlag
from labkit.kernel.maps import (
    KeyAbsent,
    KeyExists,
    Map,
    MapFull,
    NotPermitted,
    NotSupported,
    PartialBatch,
)
from labkit.kernel.parallel import together
from labkit.kernel.pins import PinFolder


@pytest.fixture
def table() -> Iterator[Map]:
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=64, name="t_hash") as one:
        yield one


def test_one_element(table: Map) -> None:
    table.update(1, 10)
    assert table.lookup(1) == 10
    assert table.get(2) is None
    table.delete(1)
    with pytest.raises(KeyAbsent, match="ENOENT"):
        table.lookup(1)


def test_flags_answer_with_types(table: Map) -> None:
    table.update(1, 10, UpdateFlag.NOEXIST)
    with pytest.raises(KeyExists):
        table.update(1, 11, UpdateFlag.NOEXIST)
    with pytest.raises(KeyAbsent):
        table.update(2, 11, UpdateFlag.EXIST)
    assert table.lookup_and_delete(1) == 10


def test_a_full_map_refuses_new_keys_only(table: Map) -> None:
    table.update_many(np.arange(64), np.arange(64))
    with pytest.raises(MapFull):
        table.update(64, 1)
    table.update(63, 1)


def test_a_batch_says_how_much_of_it_was_applied(table: Map) -> None:
    with pytest.raises(PartialBatch) as stopped:
        table.update_many(np.arange(100), np.arange(100))
    assert stopped.value.applied == 64 == len(table.snapshot())
    with pytest.raises(PartialBatch) as stopped:
        table.delete_many([0, 1, 99, 2])
    assert stopped.value.applied == 2
    assert table.delete_many([2, 3]) == 2


def test_nothing_is_called_for_nothing(table: Map) -> None:
    assert table.update_many(np.zeros(0, "u4"), np.zeros(0, "u8")) == 0
    assert table.delete_many(np.zeros(0, "u4")) == 0
    snapshot = table.snapshot()
    assert len(snapshot) == 0 and snapshot.complete


@pytest.mark.parametrize("kind", [MapKind.HASH, MapKind.ARRAY, MapKind.LPM_TRIE])
def test_snapshot_and_batch_agree(kind: MapKind) -> None:
    flags = MapFlag.NO_PREALLOC if kind is MapKind.LPM_TRIE else MapFlag.NONE
    key = np.dtype([("length", "u4"), ("prefix", "u4")]) if kind is MapKind.LPM_TRIE else "u4"
    with Map.create(kind, key=key, value="u8", max_entries=1000, flags=flags) as one:
        keys = np.arange(1000, dtype=np.uint32)
        if kind is MapKind.LPM_TRIE:
            keys = np.array([(32, k << 8) for k in range(1000)], key)
        one.update_many(keys, np.arange(1000) * 3)
        snapshot = one.snapshot()
        found = dict(zip(snapshot.keys.tolist(), snapshot.values.tolist(), strict=True))
        assert found == dict(zip(keys.tolist(), range(0, 3000, 3), strict=True))


@pytest.mark.parametrize("kind", [MapKind.PERCPU_HASH, MapKind.PERCPU_ARRAY])
def test_per_cpu_values_keep_their_slots(kind: MapKind) -> None:
    cpus = libbpf.possible_cpus()
    with Map.create(kind, key="u4", value="u4", max_entries=8) as one:
        values = np.arange(8 * cpus).reshape(8, cpus)
        for k in range(8):
            one.update(k, values[k])
        assert one.lookup(3).tolist() == values[3].tolist()
        snapshot = one.snapshot()
        order = np.argsort(snapshot.keys)
        assert snapshot.values[order].tolist() == values.tolist()
        with pytest.raises(BadInput, match="possible CPUs"):
            one.update(0, list(range(cpus + 1)))


def test_snapshot_holds_no_key_twice_and_every_resident_while_others_churn() -> None:
    residents = np.arange(2_000, dtype=np.uint32)
    churned = np.arange(10_000, 12_000, dtype=np.uint32)
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8_000) as one:
        one.update_many(residents, residents)
        done = False

        def churn() -> int:
            turns = 0
            while not done:
                one.update_many(churned, churned)
                one.delete_many(churned)
                turns += 1
            return turns

        def read() -> list[tuple[int, int, int]]:
            nonlocal done
            seen = []
            try:
                for _ in range(100):
                    snapshot = one.snapshot()
                    assert snapshot.complete
                    unique = np.unique(snapshot.keys)
                    missing = len(residents) - int(np.isin(residents, unique).sum())
                    wrong = int((snapshot.keys != snapshot.values).sum())
                    seen.append((len(snapshot) - len(unique), missing, wrong))
            finally:
                done = True
            return seen

        seen, turns = together(read, churn)
        assert set(seen) == {(0, 0, 0)}
        assert turns > 10


def test_a_snapshot_grows_when_others_insert_behind_it() -> None:
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=4) as one:
        one.update_many(np.arange(4), np.arange(4))
        assert len(one.snapshot()) == 4


def test_open_by_id_pin_and_name(table: Map) -> None:
    table.update(5, 50)
    with PinFolder() as pins:
        table.pin(pins.path("policy"))
        assert pins.names() == ["policy"]
        with Map.from_pin(pins.path("policy")) as pinned, Map.from_id(table.id) as same:
            assert pinned.id == same.id == table.id
            assert same.lookup(5) == 50
        pins.unpin("policy")
        assert pins.names() == []
    with (
        Map.create(MapKind.ARRAY, key="u4", value="u4", max_entries=1, name="t_hash"),
        pytest.raises(BadInput, match="name one by id"),
    ):
        Map.from_name("t_hash")
    with pytest.raises(BadInput, match="no map has it"):
        Map.from_name("no_such_map_xyz")


def test_wrong_layouts_and_sizes_are_refused(table: Map) -> None:
    with pytest.raises(BadInput, match="key dtype has 8 bytes"):
        Map.from_fd(table.fd, key="u8")
    with pytest.raises(BadInput, match="max_entries"):
        Map.create(MapKind.HASH, key="u4", value="u4", max_entries=0)
    with pytest.raises(BadInput, match="template"):
        Map.create(MapKind.ARRAY_OF_MAPS, key="u4", value="u4", max_entries=1)
    with pytest.raises(BadInput, match="15 bytes"):
        Map.create(MapKind.HASH, key="u4", value="u4", max_entries=1, name="x" * 16)
    with pytest.raises(BadInput, match="8 bytes"):
        table.updater(1, np.zeros(2, np.uint64))
    with pytest.raises(BadInput, match="LOCK alone"):
        table.update_many([1], [1], UpdateFlag.NOEXIST)
    with pytest.raises(BadInput, match="need 2 values"):
        table.update_many([1, 2], [1])


def test_refusals_of_the_kernel_have_types(table: Map) -> None:
    table.freeze()
    with pytest.raises(NotPermitted, match="EPERM"):
        table.update(1, 1)
    with (
        Map.create(MapKind.RINGBUF, key=None, value=None, max_entries=4096) as ring,
        pytest.raises(NotSupported),
    ):
        ring.snapshot()


def test_inner_maps_are_written_by_descriptor_and_read_by_id() -> None:
    inner = [
        Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=1)
        for _ in itertools.repeat(0, 2)
    ]
    with Map.create(
        MapKind.ARRAY_OF_MAPS, key="u4", value="u4", max_entries=1, inner=inner[0]
    ) as outer:
        for one in inner:
            outer.update(0, one.fd)
            assert outer.lookup(0) == one.id
    for one in inner:
        one.close()


def test_prepared_calls_work_on_the_callers_buffer(table: Map) -> None:
    value = np.zeros(1, np.uint64)
    update, read = table.updater(7, value), table.reader(7, back := np.zeros(1, np.uint64))
    for version in range(1, 100):
        value[0] = version
        assert update() == 0 and read() == 0
        assert back[0] == version
    table.delete(7)
    assert read() == -2


@pytest.mark.parametrize("kind", [MapKind.HASH, MapKind.PERCPU_HASH])
def test_values_that_are_arrays_come_back_as_arrays(kind: MapKind) -> None:
    layout = np.dtype(("u4", (3,)))  # 12 bytes: a per-CPU slot has 16
    with Map.create(kind, key="u4", value=layout, max_entries=4) as table:
        table.update(1, np.array([7, 8, 9], np.uint32))
        cpus = (libbpf.possible_cpus(),) if kind is MapKind.PERCPU_HASH else ()
        assert table.lookup(1).shape == (*cpus, 3)
        assert (table.lookup(1) == [7, 8, 9]).all()
        assert (table.snapshot().values == [7, 8, 9]).all()
