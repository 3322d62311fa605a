"""Diagnostics of maps, from facts that are made up: each is where it should be, and only there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from labkit.errors import BadInput
from labkit.inspect.diagnose import Diagnosis, Diagnostic, MapState, diagnostics, map_ids, padding
from labkit.kernel.libbpf import MapFlag
from labkit.kernel.maps import Snapshot
from labkit.kernel.objects import LinkObject, MapObject, Objects, ProgramObject
from labkit.lab.catalogue import catalogue

PADDED = np.dtype([("protocol", "u1"), ("address", "u4")], align=True)


def made(map_id: int, name: str = "policy", **changes: Any) -> MapObject:
    usual: dict[str, Any] = {
        "kind": "array", "key_size": 4, "value_size": 8, "max_entries": 4, "flags": 0,
        "memlock_bytes": 64, "frozen": False, "map_ids": (), "program_ids": (),
        "elements_complete": True,
    }  # fmt: skip
    return MapObject(id=map_id, name=name, **{**usual, **changes})


def program(program_id: int, *map_ids: int) -> ProgramObject:
    return ProgramObject(program_id, "filter", "xdp", "", 0, 0, map_ids)


def facts(
    *maps: MapObject, programs: tuple[ProgramObject, ...] = (), layout: str | np.dtype[Any] = "u4",
    value: str = "u8", keys: int = 0, **more: Any,
) -> MapState:  # fmt: skip
    """State of the first of the maps."""
    seen = Objects({one.id: one for one in maps}, {one.id: one for one in programs})
    entries = Snapshot(np.zeros(keys, layout), np.zeros(keys, value), True, 0)
    usual = {"snapshot": entries, **more}
    return MapState(maps[0].id, seen, np.dtype(layout), np.dtype(value), **usual)


def said(of: MapState) -> dict[str, str]:
    """Weight of each diagnostic, by the experiment that it names."""
    return {one.experiment: one.weight for one in diagnostics(of)}


def test_a_map_that_a_program_reads_and_nothing_is_wrong_with() -> None:
    assert said(facts(made(1), programs=(program(9, 1),))) == {}


def test_a_map_without_a_program_is_remarked_on() -> None:
    assert said(facts(made(1))) == {"second-map-after-reload": "risk"}


@pytest.mark.parametrize("mine", [(), (8,)])
def test_the_program_reads_another_map_of_that_name(mine: tuple[int, ...]) -> None:
    users = (program(7, 1), *(program(one, 2) for one in mine))
    found = list(diagnostics(facts(made(2), made(1), programs=users)))
    cause = next(one for one in found if one.weight == "cause")
    assert cause.experiment == "second-map-after-reload"
    assert "The older map 1 is called policy too, and program 7 filter uses it" in cause.says


def test_another_process_with_a_map_of_that_name_is_but_a_risk() -> None:
    users = (program(7, 1), program(8, 2))
    apart = facts(made(2, pids=(45,)), made(1, pids=(44,)), programs=users)
    assert said(apart) == {"second-map-after-reload": "risk"}
    shared = facts(made(2, pids=(44, 45)), made(1, pids=(44,)), programs=users)
    assert said(shared) == {"second-map-after-reload": "cause"}


def test_somebody_holds_an_old_map_that_no_program_reads() -> None:
    old = made(1, pids=(44,))
    assert said(facts(made(2), old, programs=(program(7, 2),))) == {"cached-handle": "cause"}


@pytest.mark.parametrize("changes", [{"kind": "ringbuf"}, {"key_size": 8}, {"value_size": 4}])
def test_another_shape_of_map_with_that_name_is_no_twin(changes: dict[str, Any]) -> None:
    other = made(2, pids=(44,), **changes)
    assert said(facts(made(1), other, programs=(program(7, 1),))) == {}


def test_a_program_that_reaches_it_through_an_outer_map_reads_it() -> None:
    outer = made(5, "outer", kind="array_of_maps", map_ids=(1,))
    found = facts(made(1), outer, programs=(program(7, 5),))
    assert [one.id for one in found.users(1)] == [7]
    assert said(found) == {"switch-cost": "risk"}


def test_left_over_bytes_in_the_padding_of_keys_are_counted() -> None:
    raw = np.zeros((3, 8), np.uint8)
    raw[:, 0], raw[1, 2] = 6, 0xAA  # the second differs from the others in its padding alone
    keys = np.frombuffer(raw.tobytes(), PADDED)
    entries = Snapshot(keys, np.zeros(3, "u8"), True, 0)
    table = made(1, kind="hash", key_size=8)
    with_dirt = facts(table, programs=(program(7, 1),), layout=PADDED, snapshot=entries)
    (cause,) = (one for one in diagnostics(with_dirt) if one.experiment == "padded-key")
    assert cause.weight == "cause"
    assert "1 of 3 keys have left-over bytes in the 3 bytes of padding" in cause.says
    assert said(facts(table, layout=PADDED, keys=3))["padded-key"] == "risk"
    assert "padded-key" not in said(facts(table, layout="u8", keys=3))


@pytest.mark.parametrize(
    ("changes", "keys", "experiment", "weight"),
    [
        ({"kind": "hash"}, 4, "ignored-answers", "cause"),
        ({"kind": "hash"}, 3, "transient-null", "risk"),
        ({"kind": "hash", "flags": int(MapFlag.NO_PREALLOC)}, 0, "no-prealloc", "risk"),
        ({"kind": "lru_hash"}, 4, "lru-eviction", "cause"),
        ({"kind": "lru_hash"}, 1, "lru-eviction", "risk"),
        ({"value_size": 16}, 0, "torn-reads", "risk"),
        ({"frozen": True}, 0, "rodata-folded", "cause"),
        ({"flags": int(MapFlag.MMAPABLE)}, 0, "mmap-msync", "risk"),
        ({"kind": "ringbuf"}, 0, "ring-buffer-facts", "risk"),
        ({"kind": "perf_event_array"}, 0, "perf-array-lookup", "risk"),
    ],
)
def test_each_property_has_its_remark(
    changes: dict[str, Any], keys: int, experiment: str, weight: str
) -> None:
    assert (
        said(facts(made(1, **changes), programs=(program(7, 1),), keys=keys))[experiment] == weight
    )


def test_slots_of_cpus_that_differ_are_counted() -> None:
    values = np.array([[1, 1], [1, 2]], "u8")
    entries = Snapshot(np.arange(2, dtype="u4"), values, True, 0)
    table = made(1, kind="percpu_array")
    (one,) = diagnostics(facts(table, programs=(program(7, 1),), snapshot=entries))
    assert "not alike in 1 of 2 entries" in one.says


def test_a_lock_in_the_value_takes_the_place_of_torn_values() -> None:
    found = facts(made(1, value_size=64), programs=(program(7, 1),), locked=True)
    (one,) = diagnostics(found)
    assert "BPF_F_LOCK" in one.do and "lock" in one.says


def test_every_remark_names_an_experiment() -> None:
    known = set(catalogue())
    kinds = ("hash", "lru_hash", "percpu_array", "ringbuf", "perf_event_array", "lpm_trie")
    worst: dict[str, Any] = {"frozen": True, "flags": 0x401, "value_size": 64, "pids": (1,)}
    for kind in kinds:
        outer = made(5, "outer", kind="hash_of_maps", map_ids=(1,))
        twin = made(2, kind=kind)
        found = said(facts(made(1, kind=kind, **worst), twin, outer, programs=(program(7, 2),)))
        assert found and found.keys() <= known


def test_causes_come_first_and_the_text_says_who_uses_it() -> None:
    link = LinkObject(3, "xdp", 7, "ifindex=2")
    of = facts(made(1, frozen=True, value_size=16, pids=(44,)), programs=(program(7, 1),))
    seen = Objects(of.objects.maps, of.objects.programs, {3: link}, (), {44: "agent"})
    of = MapState(1, seen, of.key_dtype, of.value_dtype)
    diagnosis = Diagnosis(of, tuple(sorted(diagnostics(of), key=lambda one: one.weight)))
    text = str(diagnosis)
    assert diagnosis.has_cause and text.index("cause") < text.index("risk")
    assert "held by  agent[44]" in text
    assert "program 7 filter (xdp), attached: xdp ifindex=2" in text
    told = diagnosis.as_json()
    assert list(told["used_by"][0]["attached"]) == ["xdp ifindex=2"]
    assert Diagnostic(**told["diagnostics"][0]).weight == "cause"
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("which", ["3", "nothing"])
def test_a_map_that_is_not_there_is_one_sentence(which: str) -> None:
    with pytest.raises(BadInput, match="bpftool map show lists them"):
        map_ids(which, Objects({1: made(1)}))


def test_no_name_at_all_is_none() -> None:
    with pytest.raises(BadInput, match="Name a map"):
        map_ids("", Objects({1: made(1, "")}))


def test_a_name_means_all_maps_that_have_it() -> None:
    seen = Objects({one: made(one) for one in (1, 2)} | {3: made(3, "other")})
    assert map_ids("policy", seen) == [1, 2]
    assert map_ids("3", seen) == [3]


def test_padding_is_found_in_nested_layouts() -> None:
    nested = np.dtype([("inner", PADDED, (2,)), ("end", "u2")], align=True)
    gaps = padding(nested)
    assert gaps.tolist() == [False, True, True, True, False, False, False, False] * 2 + [
        False, False, True, True,
    ]  # fmt: skip
    assert not padding(np.dtype("u8")).any()
