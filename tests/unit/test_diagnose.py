"""Diagnostics of maps, from facts that are made up: each is where it should be, and only there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from labkit.errors import BadInput
from labkit.inspect.code import Call, Code
from labkit.inspect.diagnose import Diagnosis, MapState, diagnostics, map_ids, padding
from labkit.inspect.diagnostic import Diagnostic
from labkit.kernel import libbpf
from labkit.kernel.attachments import Attachment, Standing, Survey
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


def running(*attachments: Attachment, nowhere: tuple[int, ...] = (), **more: Any) -> Survey:
    """A machine on which everything was seen; programs are of XDP."""
    programs = {one.program_id for one in attachments} | {*nowhere}
    return Survey(attachments, kinds=dict.fromkeys(programs, "xdp"), **more)


def at(program_id: int, target: str = "dev eth0", hook: str = "tc ingress") -> Attachment:
    return Attachment(program_id, hook, target)


def said(of: MapState) -> dict[str, str]:
    """Weight of each diagnostic, by the experiment that it names."""
    return {one.experiment: one.weight for one in diagnostics(of)}


def test_a_map_that_a_program_reads_and_nothing_is_wrong_with() -> None:
    assert said(facts(made(1), programs=(program(9, 1),))) == {}


def test_a_map_without_a_program_has_a_diagnostic() -> None:
    assert said(facts(made(1))) == {"second-map-after-reload": "risk"}


@pytest.mark.parametrize("mine", [(), (8,)])
def test_the_program_reads_another_map_of_that_name(mine: tuple[int, ...]) -> None:
    users = (program(7, 1), *(program(one, 2) for one in mine))
    where = running(at(7), *map(at, mine))
    found = list(diagnostics(facts(made(2, pids=(44,)), made(1), programs=users, survey=where)))
    cause = next(one for one in found if one.weight == "cause")
    assert cause.experiment == "second-map-after-reload"
    assert "The older map 1 is called policy too, and program 7 filter uses it" in cause.says


def test_another_process_with_a_map_of_that_name_is_but_a_risk() -> None:
    users = (program(7, 1), program(8, 2))
    where = running(at(7), at(8))
    apart = facts(made(2, pids=(45,)), made(1, pids=(44,)), programs=users, survey=where)
    assert said(apart) == {"second-map-after-reload": "risk"}
    shared = facts(made(2, pids=(44, 45)), made(1, pids=(44,)), programs=users, survey=where)
    assert said(shared) == {"second-map-after-reload": "cause"}


def of_twins(mine: MapObject, *others: MapObject | ProgramObject, **more: Any) -> Diagnostic:
    """The one diagnostic about the twin, the first of the others."""
    twin, *maps = (one for one in others if isinstance(one, MapObject))
    programs = tuple(one for one in others if isinstance(one, ProgramObject))
    state = facts(mine, twin, *maps, programs=programs, **more)
    (found,) = (one for one in diagnostics(state) if f"map {twin.id} is called" in one.says)
    return found


def test_programs_at_one_hook_make_a_cause_whichever_map_is_asked() -> None:
    users = (program(7, 1), program(8, 2))
    where = running(
        Attachment(7, "tc ingress", "dev eth0", priority=1, detach="tc filter del old"),
        Attachment(8, "tcx ingress", "dev eth0", detach="bpftool link detach id 5"),
    )
    for mine, twin in ((2, 1), (1, 2)):
        found = of_twins(made(mine), made(twin), *users, survey=where)
        assert found.weight == "cause" and "one hook, tc ingress of dev eth0" in found.says
        assert "tc filter del old" in found.do and "link detach" not in found.do


@pytest.mark.parametrize(
    "places",
    [
        (at(7, "dev eth0"), at(8, "dev eth1")),
        (at(7, hook="tc ingress"), at(8, hook="tc egress")),
        (Attachment(7, "tc ingress", "dev eth0"), Attachment(8, "tc ingress", "dev eth0", "b")),
        (at(7, "softirq_entry", "tracepoint"), at(8, "softirq_entry", "tracepoint")),
    ],
)
def test_maps_of_one_name_that_run_apart_are_a_risk(places: tuple[Attachment, ...]) -> None:
    users = (program(7, 1), program(8, 2))
    for mine, twin in ((2, 1), (1, 2)):
        found = of_twins(made(mine), made(twin), *users, survey=running(*places))
        assert found.weight == "risk"
        assert "detach" not in (found.says + found.do).lower()


def test_programs_of_two_names_are_two_loads_where_one_was_left_behind() -> None:
    users = (program(7, 1), replace(program(8, 2), name="other"))
    where = running(at(7), at(8))
    kept = made(1, pids=(44,)), made(2, pids=(44,))
    assert of_twins(*kept, *users, survey=where).weight == "risk"
    left = made(1, pids=(44,)), made(2)
    assert of_twins(*left, *users, survey=where).weight == "cause"


def test_a_pin_for_each_or_one_load_is_no_second_load() -> None:
    where = running(at(7), at(8))
    pinned = made(1, pins=("/sys/fs/bpf/a",)), made(2, pins=("/sys/fs/bpf/b",))
    assert of_twins(*pinned, program(7, 1), program(8, 2), survey=where).weight == "risk"
    load = replace(program(7, 1), btf_id=5), replace(program(8, 2), btf_id=5)
    found = of_twins(made(1), made(2), *load, survey=where)
    assert found.weight == "risk" and "both are of one load" in found.says


def test_one_program_with_both_maps_and_a_name_that_was_cut() -> None:
    name = "libc_malloc_cal"
    found = of_twins(made(1, name), made(2, name), program(7, 1, 2), survey=running(at(7)))
    assert found.weight == "risk"
    assert "program 7 filter uses both of them. The kernel cuts a name to 15 bytes" in found.says
    loads = program(7, 1), program(8, 2)
    where = running(at(7), nowhere=(8,))
    cause = of_twins(made(2, name), made(1, name), *loads, survey=where)
    assert cause.weight == "cause" and "15 bytes" in cause.says


def test_the_program_of_the_new_load_is_attached_nowhere() -> None:
    users = (program(7, 1), program(8, 2))
    where = running(at(7), nowhere=(8,))
    new = list(diagnostics(facts(made(2), made(1), programs=users, survey=where)))
    assert [one.weight for one in new] == ["cause", "cause"]
    assert "what is written here reaches no program that runs" in new[0].says
    assert "8 filter (xdp) is loaded and attached nowhere" in new[1].says
    assert of_twins(made(1), made(2), *users, survey=where).weight == "risk"


def test_a_program_that_is_reached_through_another_one_is_attached() -> None:
    reached = {8: ((7, "tail call by map 3"),), 9: ((8, "redirect by map 4"),), 7: ((9, "loop"),)}
    users = (program(9, 1),)
    where = running(at(7), nowhere=(8, 9), callers=reached)
    assert said(facts(made(1), programs=users, survey=where)) == {}
    assert where.of(9)[0].target == "program 8"
    alone = running(nowhere=(7, 8, 9), callers=reached)
    assert said(facts(made(1), programs=users, survey=alone)) == {
        "second-map-after-reload": "cause"
    }
    assert alone.of(9) == ()


def test_a_program_that_runs_for_a_map_uses_it() -> None:
    place = Attachment(7, "sk_msg_verdict", "map 1", map_id=1)
    found = facts(made(1, kind="sockmap"), programs=(program(7),), survey=running(place))
    assert said(found) == {} and [one.id for one in found.users(1)] == [7]


def test_a_replacement_runs_when_its_program_does() -> None:
    kinds = {7: "xdp", 8: "ext"}
    link = at(8, "function 3 of BTF 7", "tracing")
    callers = {8: ((7, "replacement of a function"),)}
    alone = Survey((link,), callers=callers, kinds=kinds)
    assert alone.standing(8) is Standing.NOWHERE
    assert Survey((link, at(7)), callers=callers, kinds=kinds).standing(8) is Standing.ATTACHED


@pytest.mark.parametrize(
    ("kind", "unseen", "weight"),
    [
        ("socket_filter", {}, None), ("syscall", {}, None), ("type 99", {}, None),
        ("cgroup_skb", {"cgroups": "no cgroups are in sight"}, "risk"),
        ("tc", {"cgroups": "no cgroups are in sight"}, "cause"),
        ("kprobe", {}, "cause"),
    ],
)  # fmt: skip
def test_nowhere_is_said_only_where_all_was_seen(
    kind: str, unseen: dict[str, str], weight: str | None
) -> None:
    where = Survey(kinds={7: kind}, unseen=unseen)
    found = facts(made(1), programs=(program(7, 1),), survey=where)
    assert said(found).get("second-map-after-reload") == weight
    assert ("attached nowhere" in str(Diagnosis(found, ()))) == (weight == "cause")


def test_what_only_its_process_ends_is_perhaps_not_meant_to_run() -> None:
    idle, busy = replace(program(7, 1), btf_id=5), replace(program(8, 2), btf_id=5)
    for kind, weight in (("raw_tracepoint", "risk"), ("tc", "cause")):
        users = replace(idle, kind=kind), replace(busy, kind=kind)
        where = Survey((at(8),), kinds={7: kind, 8: kind})
        found = facts(made(1), made(2, "other"), programs=users, survey=where)
        assert said(found) == {"second-map-after-reload": weight}


def test_a_place_where_nothing_gets_to_is_a_risk() -> None:
    down = replace(at(7), idle="the device is down")
    one, users = made(1), (program(7, 1), program(8, 1))
    (found,) = diagnostics(facts(one, programs=users[:1], survey=running(down)))
    assert found.weight == "risk" and "dev eth0, the device is down" in found.says
    assert not list(diagnostics(facts(one, programs=users, survey=running(down, at(8)))))
    where = running(down, nowhere=(8,), callers={8: ((7, "tail call"),)})
    (found,) = diagnostics(facts(one, programs=(program(8, 1),), survey=where))
    assert "tail call of program 7, the device is down" in found.says


def test_a_map_beside_the_one_that_a_map_of_maps_holds() -> None:
    outer = made(5, "outer", kind="array_of_maps", map_ids=(2,))
    found = of_twins(made(1), made(2), outer, survey=running(at(7)))
    assert "it stands in the map of maps 5, this one does not" in found.says


def test_a_link_that_lost_its_device_is_named() -> None:
    where = running(nowhere=(7,), detached=(LinkObject(5, "xdp", 7, "ifindex=0"),))
    (cause,) = diagnostics(facts(made(1), programs=(program(7, 1),), survey=where))
    assert "its xdp link 5 has lost" in cause.says


def test_constants_are_frozen_by_design() -> None:
    flags = int(MapFlag.RDONLY_PROG)
    constants = made(1, "case.rodata", frozen=True, flags=flags, max_entries=1, value_size=4)
    twin = replace(constants, id=2)
    users = (program(7, 1), program(8, 2))
    found = facts(constants, twin, programs=users, survey=running(at(7), at(8)))
    assert said(found) == {"rodata-folded": "risk"}


@pytest.mark.parametrize("pids", [(), (44,)])
def test_the_next_map_for_a_map_of_maps_is_no_second_load(pids: tuple[int, ...]) -> None:
    outer = made(5, "outer", kind="array_of_maps", map_ids=(2,))
    used, following = made(2, pids=pids), made(1, pids=(44,))
    for mine, twin in ((following, used), (used, following)):
        found = facts(mine, twin, outer, programs=(program(7, 5),), survey=running(at(7)))
        assert "cause" not in said(found).values()


def test_of_many_twins_the_nearest_are_shown_and_the_rest_counted() -> None:
    many = [made(one) for one in range(1, 400)]
    users = tuple(program(1000 + one.id, one.id) for one in many)
    where = running(*(at(user.id, f"dev v{user.id}") for user in users))
    (found,) = diagnostics(facts(many[199], *many, programs=users, survey=where))
    assert found.says.count("is called policy too") == 4
    assert "394 more maps have this name" in found.says


def test_where_nobody_can_write_a_map_nothing_is_written_in_vain() -> None:
    """The kernel keeps some without a holder, such as a program array that was opened too late."""
    left, used = made(1), made(2, pids=(55,))
    assert of_twins(left, used, program(7, 2), survey=running(at(7))).weight == "risk"


def test_programs_of_two_kinds_are_no_loads_of_one() -> None:
    other = replace(program(8, 1), kind="tracing")
    mine, twin, where = made(1, pids=(44,)), made(2, pids=(44,)), running(at(7), nowhere=(8,))
    assert of_twins(mine, twin, program(7, 2), other, survey=where).weight == "risk"
    assert of_twins(mine, twin, program(7, 2), program(8, 1), survey=where).weight == "cause"


def test_a_map_for_which_a_tool_had_no_use_is_no_second_load() -> None:
    """As bpftrace's `printf` and bcc's `start`, which are there whether a script needs them."""
    own = replace(program(8), pids=(44,))
    users = (program(7, 2), own)
    spare, used = made(1, pids=(44,)), made(2, pids=(55,))
    assert of_twins(spare, used, *users, survey=running(at(7), at(8))).weight == "risk"
    # Who runs nothing, or stands beside a load that nobody keeps, has the wrong map.
    idle = running(at(7), nowhere=(8,))
    assert of_twins(spare, used, *users, survey=idle).weight == "cause"
    left = replace(used, pids=())
    assert of_twins(spare, left, *users, survey=running(at(7), at(8))).weight == "cause"


def test_a_generation_of_a_map_of_maps_is_frozen_and_full_by_design() -> None:
    one = made(1, kind="hash", frozen=True)
    outer = made(5, "outer", kind="array_of_maps", map_ids=(1,))
    users = (program(7, 5),)
    found = said(facts(one, outer, programs=users, keys=4))
    assert found["rodata-folded"] == found["ignored-answers"] == "risk"
    alone = said(facts(one, programs=(program(7, 1),), keys=4))
    assert alone["rodata-folded"] == alone["ignored-answers"] == "cause"


def test_a_table_of_one_entry_is_full_by_design() -> None:
    one = made(1, kind="hash", max_entries=1)
    assert "ignored-answers" not in said(facts(one, programs=(program(7, 1),), keys=1))


@pytest.mark.parametrize(
    ("room", "values", "does", "weight"),
    [
        (7, range(7), (), "risk"),  # the addresses of a unit, the elements of a set
        (4, [1] * 4, (), "risk"),
        (4, range(4), (), "cause"),
        (64, [1] * 64, (), "cause"),  # a block list with a bound
        (7, range(7), ("delete",), "risk"),
        (7, range(7), ("update",), "cause"),
    ],
)
def test_a_list_that_was_made_for_what_stands_in_it_is_full_by_design(
    room: int, values: Sequence[int], does: tuple[str, ...], weight: str
) -> None:
    user = program(9, 1)
    code = Code(user, tuple(Call(0, each, 1, heeded=True) for each in does))
    entries = Snapshot(np.arange(room, dtype="u4"), np.array(values, "u8"), True, 0)
    more: dict[str, Any] = {"programs": (user,), "snapshot": entries, "codes": (code,)}
    mine = made(1, kind="hash", max_entries=room)
    state = facts(mine, survey=running(at(9)), **more)
    assert said(state)["ignored-answers"] == weight
    assert said(replace(state, survey=running(nowhere=(9,))))["ignored-answers"] == "cause"


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
        ({"kind": "lru_hash"}, 4, "lru-eviction", "risk"),  # full by design: a cache, connections
        ({"kind": "lru_hash"}, 1, "lru-eviction", "risk"),
        ({"value_size": 16}, 0, "torn-reads", "risk"),
        ({"frozen": True}, 0, "rodata-folded", "cause"),
        ({"flags": int(MapFlag.MMAPABLE)}, 0, "mmap-msync", "risk"),
        ({"kind": "ringbuf"}, 0, "ring-buffer-facts", "risk"),
        ({"kind": "perf_event_array"}, 0, "perf-array-lookup", "risk"),
    ],
)
def test_each_property_has_its_diagnostic(
    changes: dict[str, Any], keys: int, experiment: str, weight: str
) -> None:
    assert (
        said(facts(made(1, **changes), programs=(program(7, 1),), keys=keys))[experiment] == weight
    )


@pytest.mark.parametrize(
    ("changes", "keys", "words"),
    [
        ({"max_entries": 100}, 60, "100 entries for 2 possible CPUs"),
        ({"max_entries": 1000}, 60, "near its end it evicts"),
        ({"max_entries": 1000}, 950, "With 950 of 1,000 entries it evicts"),
        ({"max_entries": 100}, 95, "With 95 of 100 entries it evicts"),
        ({"max_entries": 100}, 95, "100 entries for 2 possible CPUs"),
        ({"max_entries": 100, "flags": int(MapFlag.NO_COMMON_LRU)}, 60, "at a CPU's share"),
    ],
)
def test_an_lru_map_says_when_it_evicts(
    changes: dict[str, Any], keys: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libbpf, "possible_cpus", lambda: 2)
    found = diagnostics(facts(made(1, kind="lru_hash", **changes), layout="u4", keys=keys))
    (one,) = (each for each in found if each.experiment == "lru-eviction")
    assert one.weight == "risk" and words in one.says and "E2BIG" not in one.says


@pytest.mark.parametrize(("size", "told"), [(2, 8), (12, 16), (8, 0), (24, 0)])
def test_a_value_of_each_cpu_that_is_no_multiple_of_eight(size: int, told: int) -> None:
    table = made(1, kind="percpu_array", value_size=size)
    found = said(facts(table, programs=(program(7, 1),), value=f"V{size}"))
    assert ("per-cpu-stride" in found) == bool(told)


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


def test_every_diagnostic_names_an_experiment() -> None:
    known = set(catalogue())
    kinds = ("hash", "lru_hash", "percpu_array", "ringbuf", "perf_event_array", "lpm_trie")
    worst: dict[str, Any] = {"frozen": True, "flags": 0x401, "value_size": 64, "pids": (1,)}
    for kind in kinds:
        outer = made(5, "outer", kind="hash_of_maps", map_ids=(1,))
        twin = made(2, kind=kind)
        found = said(facts(made(1, kind=kind, **worst), twin, outer, programs=(program(7, 2),)))
        assert found and found.keys() <= known


def test_causes_come_first_and_the_text_says_who_uses_it() -> None:
    place = Attachment(7, "xdp native", "dev eth0", link_id=3, detach="bpftool link detach id 3")
    of = facts(made(1, frozen=True, value_size=16, pids=(44,)), programs=(program(7, 1),))
    seen = Objects(of.objects.maps, of.objects.programs, {}, (), {44: "agent"})
    of = MapState(1, seen, of.key_dtype, of.value_dtype, survey=running(place))
    diagnosis = Diagnosis(of, tuple(sorted(diagnostics(of), key=lambda one: one.weight)))
    text = str(diagnosis)
    assert diagnosis.has_cause and text.index("cause") < text.index("risk")
    assert "held by  agent[44]" in text
    assert "program 7 filter (xdp)\n           at  xdp native of dev eth0, link 3\n" in text
    assert "ends by  bpftool link detach id 3\n" in text
    (user,) = diagnosis.as_json()["used_by"]
    assert user["standing"] == "attached"
    assert [(one["hook"], one["link_id"]) for one in user["attached"]] == [("xdp native", 3)]
    told = diagnosis.as_json()
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
