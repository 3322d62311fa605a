"""What programs do with maps, from instructions that are written down here."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.inspect.code import (
    Addition,
    Call,
    Code,
    Jump,
    follow,
    judge,
    judge_jumps,
    unseen,
)  # fmt: skip
from labkit.kernel import libbpf
from labkit.kernel.libbpf import INSTRUCTION
from labkit.kernel.objects import MapObject, ProgramObject

HASH, ARRAY, PER_CPU, OTHER = 1, 2, 3, 4
LOOK_UP, UPDATE, DELETE, LOCK, UNLOCK, UNKNOWN = 100, 101, 102, 103, 104, 105
NAMES = {
    LOOK_UP: "__htab_map_lookup_elem", UPDATE: "htab_map_update_elem",
    DELETE: "array_map_delete_elem", LOCK: "bpf_spin_lock", UNLOCK: "bpf_spin_unlock",
}  # fmt: skip

Instruction = tuple[int, int, int, int]


def made(map_id: int, kind: str, value_size: int = 8) -> MapObject:
    return MapObject(
        map_id, f"map{map_id}", kind, 4, value_size, 4, 0, 64, False, (), (), True
    )  # fmt: skip


MAPS = {
    HASH: made(HASH, "hash"), ARRAY: made(ARRAY, "array"), PER_CPU: made(PER_CPU, "percpu_hash"),
    OTHER: made(OTHER, "hash", 16),
}  # fmt: skip


def at(target: int, source: int = 0) -> int:
    return target | source << 4


def map_in(register: int, map_id: int) -> list[Instruction]:
    return [(0x18, at(register, 1), 0, map_id), (0, 0, 0, 0)]


def call(what: int) -> Instruction:
    return 0x85, 0, 0, what


def move(target: int, source: int) -> Instruction:
    return 0xBF, at(target, source), 0, 0


def constant(target: int, number: int) -> Instruction:
    return 0xB7, at(target), 0, number


def add(target: int, number: int) -> Instruction:
    return 0x07, at(target), 0, number


def load(target: int, source: int, offset: int = 0) -> Instruction:
    return 0x79, at(target, source), offset, 0


def store(target: int, source: int, offset: int = 0) -> Instruction:
    return 0x7B, at(target, source), offset, 0


EXIT: list[Instruction] = [constant(0, 0), (0x95, 0, 0, 0)]
LOOKED_UP = [call(LOOK_UP), (0x15, 0, 1, 0), add(0, 56)]
"""A lookup in a hash, as the verifier writes it: where it found something, behind the key."""


def followed(*parts: list[Instruction]) -> tuple[tuple[Call, ...], tuple[Addition, ...]]:
    code = np.array([one for part in parts for one in part], INSTRUCTION)
    seen = follow(code, MAPS, NAMES.get)
    assert seen.ended
    return seen.calls, seen.additions


def incremented(register: int = 0) -> list[Instruction]:
    """``if (v) (*v)++``, with the pointer in a register."""
    return [
        (0x15, at(register), 3, 0), load(1, register, 8), add(1, 1), store(register, 1, 8),
    ]  # fmt: skip


def test_a_plain_increment_is_found_with_its_instructions() -> None:
    _, additions = followed(map_in(1, HASH), LOOKED_UP, incremented(), EXIT)
    assert additions == (Addition(6, 8, HASH),)


def test_it_is_found_through_a_copy_of_the_pointer_and_a_place_on_the_stack() -> None:
    kept = [move(6, 0), store(10, 6, -8), call(UNKNOWN), load(7, 10, -8)]
    _, additions = followed(map_in(1, HASH), LOOKED_UP, kept, incremented(7), EXIT)
    assert [one.map_id for one in additions] == [HASH]


def test_it_is_found_in_an_array_whose_lookup_was_written_out() -> None:
    looked_up = [
        add(1, 312), (0x61, at(0, 2), 0, 0), (0x35, 0, 3, 64), (0x67, 0, 0, 3),
        (0x0F, at(0, 1), 0, 0), (0x05, 0, 1, 0), constant(0, 0),
    ]  # fmt: skip
    _, additions = followed(map_in(1, ARRAY), looked_up, incremented(), EXIT)
    assert [one.map_id for one in additions] == [ARRAY]


def test_it_is_found_in_a_global_variable() -> None:
    total: list[Instruction] = [(0x18, at(1, 2), 0, ARRAY), (0, 0, 0, 16)]
    again: list[Instruction] = [(0x18, at(3, 2), 0, ARRAY), (0, 0, 0, 16)]
    _, additions = followed(total, [load(2, 1), add(2, 1)], again, [store(3, 2)], EXIT)
    assert [one.map_id for one in additions] == [ARRAY]


@pytest.mark.parametrize(
    "instead",
    [
        [load(1, 0, 8), store(0, 1, 8)],  # stored as it was
        [load(1, 0, 8), add(1, 1), store(0, 1, 16)],  # into another field
        [constant(1, 1), (0xDB, at(0, 1), 8, 0)],  # an atomic addition
        [constant(1, 1), store(0, 1, 8)],  # a plain store
        [load(1, 0, 8), add(1, 1), (0x63, at(0, 1), 8, 0)],  # of another size
    ],
)
def test_what_is_no_increment_is_not_taken_for_one(instead: list[Instruction]) -> None:
    checked = [(0x15, 0, len(instead), 0), *instead]
    assert followed(map_in(1, HASH), LOOKED_UP, checked, EXIT) == ((), ())


def test_a_value_of_each_cpu_and_one_under_its_lock_lose_nothing() -> None:
    assert followed(map_in(1, PER_CPU), LOOKED_UP, incremented(), EXIT)[1] == ()
    locked = [
        (0x15, 0, 7, 0), move(6, 0), move(1, 6), call(LOCK), load(1, 6, 8), add(1, 1),
        store(6, 1, 8), call(UNLOCK),
    ]  # fmt: skip
    assert followed(map_in(1, HASH), LOOKED_UP, locked, EXIT)[1] == ()


def test_an_answer_is_heeded_where_any_branch_reads_it() -> None:
    write = [*map_in(1, HASH), call(UPDATE)]
    assert followed(write, EXIT)[0] == (Call(2, "update", HASH, False),)
    for reads in ([(0x55, 0, 0, 0)], [move(6, 0)], [store(10, 0, -8)]):
        assert followed(write, reads, EXIT)[0][0].heeded
    assert followed(write, [(0x95, 0, 0, 0)])[0][0].heeded  # it is the program's own answer
    assert not followed(write, [call(UNKNOWN)], EXIT)[0][0].heeded
    branches: list[Instruction] = [(0x15, at(7), 1, 0), constant(0, 1), (0x95, 0, 0, 0)]
    assert followed(write, branches)[0][0].heeded


def test_an_output_and_a_push_are_calls_that_write() -> None:
    names = {200: "bpf_ringbuf_output", 202: "bloom_map_push_elem"}
    parts = [*map_in(1, HASH), call(200), *map_in(1, OTHER), call(202), *EXIT]
    seen = follow(np.array(parts, INSTRUCTION), MAPS, names.get)
    assert [(one.does, one.map_id) for one in seen.calls] == [("output", HASH), ("push", OTHER)]


def test_a_call_through_an_unknown_map_or_function_is_left_out() -> None:
    assert followed([call(UPDATE)], map_in(1, HASH), [call(UNKNOWN)], EXIT) == ((), ())


def test_a_copy_from_one_map_to_another_is_found() -> None:
    through = [*map_in(1, HASH), *LOOKED_UP, (0x15, 0, 4, 0), move(3, 0), *map_in(1, OTHER),
               call(UPDATE)]  # fmt: skip
    assert followed(through, EXIT)[0][0].source_id == HASH
    field = [*map_in(1, HASH), *LOOKED_UP, (0x15, 0, 9, 0), load(4, 0), load(5, 0, 8),
             store(10, 4, -16), store(10, 5, -8), move(3, 10), add(3, -16), *map_in(1, OTHER),
             call(UPDATE)]  # fmt: skip
    assert followed(field, EXIT)[0][0].source_id == HASH
    counted = [*map_in(1, HASH), *LOOKED_UP, (0x15, 0, 11, 0), load(4, 0), load(5, 0, 8),
               add(4, 1), add(5, 1), store(10, 4, -16), store(10, 5, -8), move(3, 10),
               add(3, -16), *map_in(1, OTHER), call(UPDATE)]  # fmt: skip
    assert followed(counted, EXIT)[0][0].source_id == 0  # a number that was worked out
    same = [*map_in(1, HASH), *LOOKED_UP, (0x15, 0, 4, 0), move(3, 0), *map_in(1, HASH),
            call(UPDATE)]  # fmt: skip
    assert followed(same, EXIT)[0][0].source_id == 0


def test_a_new_entry_that_begins_with_a_constant_is_no_copy() -> None:
    constant_in: list[Instruction] = [(0x18, at(3, 2), 0, ARRAY), (0, 0, 0, 16)]
    assert followed(constant_in, map_in(1, OTHER), [call(UPDATE)], EXIT)[0][0].source_id == 0


def test_a_loop_ends_and_a_function_that_is_called_is_followed_too() -> None:
    loop: list[Instruction] = [add(6, 8), (0xA5, at(6), -2, 80)]
    called = [*map_in(1, HASH), *LOOKED_UP, *incremented(), *EXIT]
    main: list[Instruction] = [(0x85, at(0, 1), 0, 3), *loop, *EXIT]
    _, additions = followed(main, called)
    assert [one.map_id for one in additions] == [HASH]


@given(
    st.lists(
        st.tuples(st.integers(0, 255), st.integers(0, 0xAA), st.integers(-8, 8),
                  st.sampled_from([0, 1, 2, 3, LOOK_UP, UPDATE, LOCK, 1 << 30])),
        max_size=40,
    )
)  # fmt: skip
@settings(max_examples=500)
def test_any_instructions_are_followed_to_an_end(code: list[tuple[int, int, int, int]]) -> None:
    lowered = [
        (one, at(min(reg & 15, 10), min(reg >> 4, 10)), off, by) for one, reg, off, by in code
    ]
    seen = follow(np.array(lowered, INSTRUCTION), MAPS, NAMES.get, time.monotonic() + 10)
    assert seen.ended


# -- judging -----------------------------------------------------------------------------

PROGRAM = ProgramObject(7, "count", "xdp", "", 0, 0, (HASH, ARRAY))


def said(map_id: int, **does: Any) -> dict[str, str]:
    found = judge(MAPS[map_id], [Code(PROGRAM, **does)], MAPS)
    return {one.experiment: one.says for one in found if one.weight == "risk"}


def test_each_finding_has_its_diagnostic_at_the_right_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libbpf, "possible_cpus", lambda: 2)
    lines = {5: "count.bpf.c:12: (*v)++;"}
    words = said(HASH, additions=(Addition(6, 8, HASH),), lines=lines)["lost-updates"]
    assert "Program 7 count increments" in words and "6 (count.bpf.c:12: (*v)++;) to 8" in words
    assert said(ARRAY, additions=(Addition(6, 8, HASH),)) == {}
    calls = (Call(3, "delete", ARRAY, True), Call(9, "update", ARRAY, False))
    assert list(said(ARRAY, calls=calls)) == ["untouched-entries"]
    ignored = (Call(3, "update", HASH, False), Call(9, "delete", HASH, True))
    assert "the answer of 1 of its 2" in said(HASH, calls=ignored)["ignored-answers"]
    copied = (Call(3, "update", OTHER, True, HASH),)
    assert "copies a value of this map to map 4 map4" in said(HASH, calls=copied)["copied-value"]
    assert "copies values of map 1 map1 into this" in said(OTHER, calls=copied)["copied-value"]
    assert said(ARRAY, calls=copied) == {}


def test_a_tail_call_to_an_index_without_a_program_is_told() -> None:
    jump = [*map_in(2, HASH), constant(3, 5), call(12)]
    jumps: list[Instruction] = [*jump, *map_in(2, HASH), call(12)]
    seen = follow(np.array([*jumps, *EXIT], INSTRUCTION), MAPS, NAMES.get)
    assert seen.jumps == (Jump(3, HASH, 5),)  # the other index is not known
    codes = [Code(PROGRAM, jumps=seen.jumps)]
    (found,) = judge_jumps(MAPS[HASH], codes, {0: 9})
    assert "Program 7 count jumps to index 5 (instruction 3)" in found.says
    assert list(judge_jumps(MAPS[HASH], codes, {5: 9})) == []
    assert list(judge_jumps(MAPS[ARRAY], codes, {})) == []


def test_one_cpu_alone_loses_no_addition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libbpf, "possible_cpus", lambda: 1)
    assert said(HASH, additions=(Addition(6, 8, HASH),)) == {}


def test_what_was_not_followed_is_said() -> None:
    assert unseen([Code(PROGRAM)]) == []
    assert unseen([Code(PROGRAM, followed=False)]) == ["the instructions of program 7"]
    assert "kallsyms" in unseen([Code(PROGRAM, named=False)])[0]
