"""The replica against a brute-force one, and its index against a dictionary. No kernel is used."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.errors import BadInput
from labkit.kernel import native
from labkit.kernel.maps import Snapshot
from labkit.sync.changes import ChangeKind, Changes, change_dtype, event_dtype, versions_of
from labkit.sync.replica import Replica

KEY, VALUE = np.dtype("u4"), np.dtype([("version", "u8"), ("payload", "u4")])
ROW = tuple[int, int, int, int]  # kind, key, version, committed_ns


def layout(key: Any = KEY, value: Any = VALUE) -> Any:
    """What a replica wants to know of a map."""
    key, value = np.dtype(key), np.dtype(value)
    return SimpleNamespace(
        key_dtype=key, value_dtype=value, key_size=key.itemsize, value_size=value.itemsize
    )


def batch(rows: list[ROW]) -> Changes:
    changes = np.zeros(len(rows), change_dtype(KEY, VALUE))
    for i, (kind, key, version, committed_ns) in enumerate(rows):
        changes[i]["kind"], changes[i]["key"] = kind, key
        changes[i]["version"], changes[i]["committed_ns"] = version, committed_ns
        changes[i]["value"] = (version, key) if kind == ChangeKind.UPDATE else (0, 0)
    return changes


def snapshot(entries: dict[int, int], *, complete: bool = True) -> Snapshot:
    values = np.zeros(len(entries), VALUE)
    values["version"], values["payload"] = list(entries.values()), list(entries)
    return Snapshot(np.array(list(entries), KEY), values, complete=complete, restarts=0)


@dataclass
class Known:
    version: int = -1
    present: bool = False
    missing_ns: int = 0


class Oracle:
    """The same rules, one change at a time."""

    def __init__(self) -> None:
        self.keys: dict[int, Known] = {}
        self.complete_ns = 0

    def apply(self, rows: list[ROW]) -> list[bool]:
        return [self._apply(*row) for row in rows]

    def _apply(self, kind: int, key: int, version: int, committed_ns: int) -> bool:
        known = self.keys.setdefault(key, Known(missing_ns=self.complete_ns))
        if 0 < committed_ns < known.missing_ns:
            return False
        delete = kind == ChangeKind.DELETE
        if delete and version == 0:
            if known.version < 0 or not known.present:
                return False
            version = known.version
        if not (version > known.version or (delete and known.present and version == known.version)):
            return False
        known.version, known.present = version, not delete
        return True

    def resync(self, entries: dict[int, int], complete: bool, now_ns: int) -> set[tuple[int, int]]:
        changed = set()
        for key, version in entries.items():
            known = self.keys.setdefault(key, Known(missing_ns=self.complete_ns))
            if version > known.version or (version == known.version and not known.present):
                known.version, known.present = version, True
                changed.add((key, version))
        if complete:
            self.complete_ns = now_ns
            for key, known in self.keys.items():
                if known.present and key not in entries:
                    known.present, known.missing_ns = False, now_ns
                    changed.add((key, -known.version))
        return changed

    def contents(self) -> dict[int, int]:
        return {key: known.version for key, known in self.keys.items() if known.present}


def contents(replica: Replica) -> dict[int, int]:
    keys, versions, values = replica.contents()
    assert np.array_equal(values["version"], versions)
    assert np.array_equal(values["payload"], keys), "a value stands with another key"
    return dict(zip(keys.tolist(), versions.tolist(), strict=True))


rows = st.lists(
    st.tuples(st.sampled_from([1, 1, 1, 2]), st.integers(0, 5), st.integers(0, 9), st.just(0)),
    max_size=12,
)
steps = st.lists(
    st.one_of(
        rows.map(lambda some: ("apply", some)),
        st.tuples(
            st.dictionaries(st.integers(0, 5), st.integers(1, 9), max_size=5), st.booleans()
        ).map(lambda some: ("resync", *some)),
    ),
    max_size=8,
)


@settings(max_examples=200)
@given(steps=steps, committed=st.randoms(use_true_random=False))
def test_it_does_what_one_change_at_a_time_would_do(steps: list[Any], committed: Any) -> None:
    replica, oracle = Replica(layout()), Oracle()
    far = 2**62  # a clock of our own, ahead of the replica's: what was seen lies before it
    for place, (what, given_rows, *complete) in enumerate(steps):
        if what == "apply":
            timed = [(*row[:3], committed.choice([0, far, far + 2 * place])) for row in given_rows]
            changes = batch(timed)
            assert replica.apply(changes).tolist() == oracle.apply(timed)
        else:
            now_ns = far + 2 * place + 1
            changed = replica.resync(snapshot(given_rows, complete=complete[0]), started_ns=now_ns)
            signed = {
                (int(row["key"]), int(row["version"]) * (1 if row["kind"] == 1 else -1))
                for row in changed.changes
            }
            assert signed == oracle.resync(given_rows, complete[0], now_ns)
        assert contents(replica) == oracle.contents()
        assert len(replica) == len(oracle.contents())


@settings(max_examples=25)
@given(
    key=st.sampled_from(["u1", "u4", "u8", "V3", "V12", "V20", [("a", "u4"), ("b", "u8")]]),
    count=st.integers(1, 2_000),
    seed=st.integers(0, 99),
)
def test_keys_of_any_size_are_found_again(key: Any, count: int, seed: int) -> None:
    dtype = np.dtype(key)
    raw = np.random.default_rng(seed).integers(0, 4, (count, dtype.itemsize), np.uint8)
    keys = np.unique(raw.reshape(-1).view(f"V{dtype.itemsize}")).view(dtype)
    replica = Replica(layout(dtype, "u8"))
    changes = np.zeros(len(keys), change_dtype(dtype, "u8"))
    changes["kind"], changes["key"], changes["version"] = ChangeKind.UPDATE, keys, 7
    half = len(keys) // 2
    assert replica.apply(changes[:half]).all()
    assert replica.apply(changes[half:]).all()
    assert not replica.apply(changes).any()
    held, versions, _ = replica.contents()
    assert sorted(row.tobytes() for row in held) == sorted(row.tobytes() for row in keys)
    assert (versions == 7).all()


def test_a_batch_with_many_changes_of_a_key_keeps_every_newer_one() -> None:
    replica = Replica(layout())
    fresh = replica.apply(batch([(1, 3, 5, 0), (1, 3, 4, 0), (1, 3, 6, 0), (1, 4, 1, 0)]))
    assert fresh.tolist() == [True, False, True, True]
    assert contents(replica) == {3: 6, 4: 1}


def test_a_delete_that_names_no_version_is_of_the_newest_before_it() -> None:
    replica = Replica(layout())
    changes = batch([(1, 3, 5, 0), (2, 3, 0, 0), (1, 3, 4, 0), (1, 3, 6, 0), (2, 8, 0, 0)])
    assert replica.apply(changes).tolist() == [True, True, False, True, False]
    assert changes["version"].tolist() == [5, 5, 4, 6, 0]
    assert contents(replica) == {3: 6}


def test_a_late_change_does_not_bring_back_what_a_snapshot_found_missing() -> None:
    replica = Replica(layout())
    replica.apply(batch([(1, 3, 5, 10)]))
    started_ns = 2**62
    gone = replica.resync(snapshot({}), started_ns=started_ns)
    assert [(row["kind"], row["key"], row["version"]) for row in gone.changes] == [(2, 3, 5)]
    assert not replica.apply(batch([(1, 3, 6, started_ns - 1)])).any()
    assert not replica.apply(batch([(1, 9, 1, started_ns - 1)])).any(), "nor what it never had"
    assert contents(replica) == {}
    assert replica.apply(batch([(1, 3, 8, started_ns + 1)])).all()
    assert contents(replica) == {3: 8}


def test_a_key_inserted_behind_the_reader_survives_the_snapshot() -> None:
    replica = Replica(layout())
    replica.apply(batch([(1, 3, 5, 0)]))  # seen now, after the snapshot began
    assert len(replica.resync(snapshot({}), started_ns=1).changes) == 0
    assert contents(replica) == {3: 5}


def test_a_key_deleted_by_mistake_is_brought_back() -> None:
    # A hook tells of a delete without its version, and a newer update may overtake it.
    replica = Replica(layout())
    replica.apply(batch([(1, 3, 6, 0), (2, 3, 0, 0)]))
    assert contents(replica) == {}
    assert len(replica.resync(snapshot({3: 6}), started_ns=2**62).changes) == 1
    assert contents(replica) == {3: 6}


def test_an_incomplete_snapshot_deletes_nothing() -> None:
    replica = Replica(layout())
    replica.apply(batch([(1, 3, 5, 0)]))
    far = 2**62
    assert len(replica.resync(snapshot({4: 1}, complete=False), started_ns=far).changes) == 1
    assert contents(replica) == {3: 5, 4: 1}


def test_steps_count_each_write_and_delete_once() -> None:
    replica = Replica(layout())
    replica.load(snapshot({1: 3, 2: 1}), started_ns=0)
    far = 2**62
    assert replica.resync(snapshot({1: 7, 2: 1}), started_ns=far).steps == 4
    assert replica.resync(snapshot({2: 1}), started_ns=far).steps == 1, "version 8, a delete"
    assert replica.resync(snapshot({1: 10, 2: 1}), started_ns=far).steps == 2, "9 and 10"


def test_a_load_adopts_and_later_changes_grow_it() -> None:
    replica = Replica(layout())
    replica.load(snapshot(dict.fromkeys(range(5000), 1)), started_ns=0)
    with pytest.raises(BadInput, match="holds keys already"):
        replica.load(snapshot({1: 1}), started_ns=0)
    replica.apply(batch([(1, key, 2, 0) for key in range(4_000, 9_000)]))
    held = contents(replica)
    assert held == {key: 1 + (key >= 4_000) for key in range(9_000)}
    assert replica.differs(snapshot(held)) == 0
    assert replica.differs(snapshot({**held, 1: 5, 10_000: 1})) == 2
    del held[0]
    assert replica.differs(snapshot(held)) == 1
    assert replica.nbytes > 9_000 * (KEY.itemsize + VALUE.itemsize)


def test_a_reading_has_version_and_age() -> None:
    replica = Replica(layout())
    replica.apply(batch([(1, 80, 3, 0)]))
    reading = replica.get(80)
    assert reading is not None
    assert (reading.version, int(reading.value["payload"])) == (3, 80)
    assert 0 <= reading.age_ns < replica.get(80).age_ns  # type: ignore[union-attr]
    assert replica.get(81) is None
    replica.apply(batch([(2, 80, 4, 0)]))
    assert replica.get(80) is None


def test_an_event_is_a_change_under_other_names() -> None:
    for key, value in (("u4", "u8"), ("u8", "V13"), ([("a", "u2")], [("version", "u4")])):
        event, change = event_dtype(key, value), change_dtype(key, value)
        assert event.itemsize == change.itemsize
        assert event.fields is not None and change.fields is not None
        for name in ("version", "committed_ns", "kind", "key", "value"):
            assert event.fields[name][:2] == change.fields[name][:2]


def test_versions_come_from_a_field_or_are_the_value() -> None:
    assert versions_of(np.array([3, 4], "u4"), "version").tolist() == [3, 4]
    assert versions_of(np.array([(3, 0)], VALUE), "version").tolist() == [3]


# -- what is forgotten ----------------------------------------------------------------------

both_paths = pytest.mark.parametrize("switch", ["1", "0"], ids=["native", "numpy"])


@both_paths
def test_memory_follows_the_content_and_not_the_history(
    switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.SWITCH, switch)
    replica, most, batch_keys = Replica(layout("u8", "u8")), [0, 0], 10_000
    held = np.arange(64, dtype=np.uint64)  # the newest keys
    for turn in range(150):  # 3 M inserts and deletes
        keys = held[-1] + 1 + np.arange(batch_keys, dtype=np.uint64)
        gone = np.concatenate([held, keys])[:batch_keys]
        changes = np.zeros(2 * batch_keys, replica.change_dtype)
        changes["key"][::2], changes["key"][1::2] = keys, gone
        changes["kind"] = np.tile([ChangeKind.UPDATE, ChangeKind.DELETE], batch_keys)
        changes["version"] = np.tile([1, 2], batch_keys)
        changes["committed_ns"] = time.monotonic_ns()
        assert replica.apply(changes).all()
        held = keys[-64:]
        if replica.crowded:
            here = Snapshot(held, np.ones(64, np.uint64), complete=True, restarts=0)
            replica.resync(here, started_ns=time.monotonic_ns())
        most[turn >= 10] = max(most[turn >= 10], replica.nbytes)
    assert np.array_equal(np.sort(replica.contents()[0]), held)
    assert most[1] <= most[0], "it grows with what was, not with what is"


@pytest.mark.parametrize("present", [0, 5_000])
def test_few_tombstones_are_no_crowd(present: int) -> None:
    replica = Replica(layout())
    replica.load(snapshot(dict.fromkeys(range(present), 1)), started_ns=0)
    most = max(4_096, 2 * present)
    replica.apply(batch([(2, present + key, 1, 0) for key in range(most)]))
    assert not replica.crowded
    replica.apply(batch([(2, present + most, 1, 0)]))
    assert replica.crowded and len(replica) == present


@both_paths
def test_what_a_snapshot_shows_and_what_came_late_is_remembered(
    switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.SWITCH, switch)
    monkeypatch.setattr(Replica, "crowded", True)
    replica, far = Replica(layout()), 2**62
    # The delete of 3 was announced before it took place.
    replica.apply(batch([(2, 3, 7, 0), (2, 4, 7, 0), (1, 5, 1, 0)]))
    for at in (far, far + 1):
        assert len(replica.resync(snapshot({3: 6, 5: 1}), started_ns=at).changes) == 0
    assert not replica.apply(batch([(1, 3, 7, 0)])).any()
    assert replica.apply(batch([(1, 4, 7, far + 1)])).all(), "committed after it was missing"
    assert not replica.apply(batch([(1, 6, 1, far)])).any()


worlds = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 1), st.sampled_from([1, 2])),
        st.tuples(st.just("arrive"), st.integers(0, 3)),
        st.tuples(st.just("read"), st.just(0)),
    ),
    min_size=5,
    max_size=40,
)


@both_paths
@settings(max_examples=500)
@given(steps=worlds)
def test_nothing_older_comes_back_by_forgetting(switch: str, steps: Any) -> None:
    # Events arrive late and in any order; each snapshot shows what is there at its moment.
    with mock.patch.dict("os.environ", {native.SWITCH: switch}):
        replica = Replica(layout())
    world: dict[int, int] = {}
    versions, on_their_way, shown, shown_ns = dict.fromkeys(range(2), 0), [], dict[int, int](), 0
    committed: dict[tuple[int, int], int] = {}
    for now_ns, (what, *rest) in enumerate(steps, 2**62):
        if what == "write":
            key, kind = rest
            if kind == ChangeKind.DELETE and world.pop(key, None) is None:
                continue
            versions[key] += 1
            if kind == ChangeKind.UPDATE:
                world[key] = versions[key]
            committed[key, versions[key]] = now_ns
            on_their_way.append((kind, key, versions[key], now_ns))
        elif what == "arrive" and on_their_way:
            replica.apply(batch([on_their_way.pop(rest[0] % len(on_their_way))]))
        elif what == "read":
            with mock.patch.object(Replica, "crowded", True):
                replica.resync(snapshot(world), started_ns=now_ns)
            shown, shown_ns = dict(world), now_ns
            assert contents(replica) == world
        for key, version in contents(replica).items():
            if key in shown:
                assert version >= shown[key]
            else:
                assert committed[key, version] >= shown_ns, "it was gone by then"
    for event in on_their_way:
        replica.apply(batch([event]))
    assert contents(replica) == world
