"""Double map: whole generations or none, whoever races, dies or reads slowly."""

from __future__ import annotations

import doctest
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import numpy as np
import pytest

from labkit.errors import BadInput
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.maps import Map, NotPermitted, PartialBatch
from labkit.kernel.parallel import Child, another_cpu, shared_array, together
from labkit.kernel.programs import BpfObject
from labkit.lab.measure import patience
from labkit.sync import double_map
from labkit.sync.double_map import (
    DoubleMap,
    DoubleMapWriter,
    IndexFlipWriter,
    Layout,
    VersionMismatch,
    published,
)

LIMIT_S = 60.0 * patience()
KEYS = 64
TABLE = Layout(key="u4", value="u8", max_entries=KEYS)
ALL = np.arange(KEYS, dtype=np.uint32)


@pytest.fixture(autouse=True)
def _map_in_map(require_feature: Callable[[str], None]) -> None:
    require_feature("map_in_map")


@pytest.fixture
def outer() -> Iterator[Map]:
    with TABLE.outer() as made:
        yield made


def every(number: int, keys: int = KEYS) -> np.ndarray[Any, Any]:
    return np.full(keys, number, np.uint64)


def ids_of_generations() -> set[int]:
    found = set()
    for identifier in libbpf.ids("map"):
        try:
            with Map.from_id(identifier) as one:
                if one.name.startswith("gen_"):
                    found.add(identifier)
        except OSError:
            continue
    return found


def test_the_docstring_example() -> None:
    assert doctest.testmod(double_map).failed == 0


# -- the writer -----------------------------------------------------------------------------


def test_of_two_processes_that_race_exactly_one_wins(outer: Map) -> None:
    rounds = 25
    barrier = shared_array(2, np.int64)

    def race(mine: int) -> Callable[[], list[int]]:
        def work() -> list[int]:
            writer, won, deadline = DoubleMapWriter(outer, TABLE), [], time.monotonic() + LIMIT_S
            for turn in range(rounds):
                barrier[mine] = turn + 1
                while barrier[1 - mine] <= turn and time.monotonic() < deadline:
                    time.sleep(0)
                try:
                    # The value tells whose it is; the loser's must be seen nowhere.
                    writer.publish(ALL, every(2 * turn + mine), expected=turn)
                except VersionMismatch as refused:
                    assert (refused.expected, refused.current) == (turn, turn + 1)
                else:
                    won.append(turn)
                # Both have tried: what is in force now stays until the next turn.
                barrier[mine] = turn + 1
                generation, inner = published(outer)
                assert inner is not None
                with inner:
                    if generation == turn + 1:
                        values = inner.snapshot().values
                        assert (values == values[0]).all()
                        assert (int(values[0]) == 2 * turn + mine) == (turn in won)
            return won

        return work

    with Child(race(0)) as one, Child(race(1), cpu=another_cpu(1)) as other:
        first, second = one.result(LIMIT_S), other.result(LIMIT_S)
    assert sorted(first + second) == list(range(rounds))
    assert DoubleMapWriter(outer, TABLE).read()[0] == rounds


def test_writers_that_read_again_when_refused_lose_nothing(outer: Map) -> None:
    each = 15
    DoubleMapWriter(outer, TABLE).publish(ALL[:2], every(0, 2), expected=0)

    def add(mine: int) -> Callable[[], int]:
        def work() -> int:
            writer, refused, done = DoubleMapWriter(outer, TABLE), 0, 0
            deadline = time.monotonic() + LIMIT_S
            while done < each and time.monotonic() < deadline:
                generation, table = writer.read()
                values = table.values.copy()
                values[table.keys == mine] += 1
                try:
                    writer.publish(table.keys, values, expected=generation)
                except VersionMismatch:
                    refused += 1
                else:
                    done += 1
            return refused

        return work

    with Child(add(0)) as one, Child(add(1), cpu=another_cpu(1)) as other:
        refused = one.result(LIMIT_S) + other.result(LIMIT_S)
    generation, table = DoubleMapWriter(outer, TABLE).read()
    assert dict(zip(table.keys.tolist(), table.values.tolist(), strict=True)) == {0: each, 1: each}
    assert generation == 1 + 2 * each
    assert refused > 0, "they never raced"


def kill_a_writer_in(step: str, outer: Map) -> None:
    """Let a writer stand still at a step of its own, and kill it there."""

    def stand(self: Map, *arguments: Any) -> None:
        if step == "update_many":  # in the middle of the fill
            filled(self, arguments[0][: KEYS // 2], arguments[1][: KEYS // 2])
        reached[0] = 1
        time.sleep(LIMIT_S)

    filled = Map.update_many
    reached = shared_array(1, np.int64)

    def work() -> None:
        setattr(Map, step, stand)
        DoubleMapWriter(outer, TABLE).publish(ALL, every(666), expected=1)

    with Child(work) as victim:
        deadline = time.monotonic() + LIMIT_S
        while not reached[0]:
            assert not victim.ended() and time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(victim.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "step", ["update_many", "freeze", "update"], ids=["fill", "before-the-lock", "under-the-lock"]
)
def test_a_writer_killed_before_its_switch_leaves_the_old_generation(outer: Map, step: str) -> None:
    writer = DoubleMapWriter(outer, TABLE)
    writer.publish(ALL, every(1), expected=0)
    kill_a_writer_in(step, outer)
    generation, table = writer.read()
    assert generation == 1 and (table.values == 1).all()
    # Nobody has to clean up after the dead one, its lock included.
    assert writer.publish(ALL, every(2), expected=1) == 2
    assert (writer.read()[1].values == 2).all()


def test_a_writer_killed_at_any_moment_leaves_a_whole_generation(outer: Map) -> None:
    DoubleMapWriter(outer, TABLE).publish(ALL, every(1), expected=0)
    generation, written = 1, shared_array(1, np.int64)
    random = np.random.default_rng(3)

    def publish_for_ever() -> None:
        writer = DoubleMapWriter(outer, TABLE)
        for number in range(generation, generation + 10_000):
            writer.publish(ALL, every(number + 1), expected=number)
            written[0] = number + 1

    for _ in range(12):
        with Child(publish_for_ever) as victim:
            deadline = time.monotonic() + LIMIT_S
            while written[0] <= generation and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.05))
            os.kill(victim.pid, signal.SIGKILL)
        found, table = DoubleMapWriter(outer, TABLE).read()
        assert len(table) == KEYS and (table.values == found).all()
        assert found > generation, "no writer came so far as to switch"
        generation = found


def test_too_many_keys_leave_the_old_generation(outer: Map) -> None:
    writer = DoubleMapWriter(outer, TABLE)
    writer.publish(ALL, every(1), expected=0)
    with pytest.raises(PartialBatch, match="E2BIG"):
        writer.publish(np.arange(2 * KEYS), every(2, 2 * KEYS), expected=1)
    generation, table = writer.read()
    assert generation == 1 and (table.values == 1).all() and len(table) == KEYS


def test_no_process_writes_into_a_generation(outer: Map) -> None:
    DoubleMapWriter(outer, TABLE).publish(ALL, every(1), expected=0)
    _, inner = published(outer)
    assert inner is not None
    with inner, pytest.raises(NotPermitted):
        inner.update(0, 2)


def test_old_generations_are_freed(outer: Map) -> None:
    before = ids_of_generations()
    writer = DoubleMapWriter(outer, TABLE)
    mine = set()
    for number in range(10):
        writer.publish(ALL, every(number), expected=number)
        mine |= {int(outer.lookup(0))}
    assert len(mine) == 10
    assert (ids_of_generations() - before) & mine == {int(outer.lookup(0))}


def test_what_cannot_be_meant_is_refused_in_a_sentence(outer: Map) -> None:
    with TABLE.new("plain") as plain, DoubleMap() as strategy:
        with pytest.raises(BadInput, match="array of maps"):
            DoubleMapWriter(plain, TABLE)
        with pytest.raises(BadInput, match="array of maps"):
            strategy.attach(plain)
        with pytest.raises(BadInput, match="no generation yet"):
            strategy.attach(outer)
        outer.update(0, plain.fd)
        with pytest.raises(BadInput, match="its name is not gen_NUMBER"):
            strategy.attach(outer)
        with pytest.raises(BadInput, match="its name is not gen_NUMBER"):
            DoubleMapWriter(outer, TABLE).read()
    array = Layout("u4", "u4", 3, MapKind.ARRAY)
    with array.new("odd") as odd, pytest.raises(BadInput, match="two halves"):
        IndexFlipWriter(odd, odd)


# -- the follower ---------------------------------------------------------------------------


def test_the_follower_goes_from_one_whole_generation_to_the_next(outer: Map) -> None:
    last = 60
    DoubleMapWriter(outer, TABLE).publish(ALL, every(1), expected=0)

    def publish() -> None:
        writer = DoubleMapWriter(outer, TABLE)
        for number in range(1, last):
            writer.publish(ALL, every(number + 1), expected=number)

    with DoubleMap(interval_s=0.001) as strategy:
        replica = strategy.attach(outer)
        batches = 0
        with Child(publish, cpu=another_cpu(1)) as child:
            deadline = time.monotonic() + LIMIT_S
            while strategy.generation < last:
                assert time.monotonic() < deadline
                changes = strategy.poll(0.05)
                _, versions, _ = replica.contents()
                assert (versions == strategy.generation).all()
                if len(changes):
                    batches += 1
                    assert len(changes) == KEYS
                    assert (changes["version"] == strategy.generation).all()
            child.result()
        assert len(strategy.poll(0)) == 0
        stats = strategy.stats()
        assert batches + strategy.passed_over == last - 1
        assert stats.produced == (last - 1) * KEYS == stats.delivered + stats.coalesced
        assert stats.coalesced == strategy.passed_over * KEYS


def test_generations_between_two_looks_are_counted(outer: Map) -> None:
    writer = DoubleMapWriter(outer, TABLE)
    writer.publish(ALL[:4], every(1, 4), expected=0)
    with DoubleMap(interval_s=0.001) as strategy:
        replica = strategy.attach(outer)
        for number in range(1, 4):
            writer.publish(ALL[:4], every(number + 1, 4), expected=number)
        writer.publish(ALL[:3], every(5, 3), expected=4)
        changes = strategy.poll(1)
        assert sorted(changes["key"].tolist()) == [0, 1, 2, 3]
        assert (strategy.generation, strategy.passed_over) == (5, 3)
        assert len(replica) == 3 and replica.get(3) is None
        assert len(strategy.poll(0)) == 0


# -- programs that read slowly --------------------------------------------------------------

SLOW_KEYS = 256
SLOW = Layout("u4", "u8", SLOW_KEYS, MapKind.ARRAY)
SLOW_ALL = np.arange(SLOW_KEYS, dtype=np.uint32)
sweeps = pytest.mark.outside_vm("slow readings by the dozen: half a minute each on an emulated CPU")
KINDS = {"ordinary": ProgramKind.TC, "sleepable": ProgramKind.SYSCALL}


@contextmanager
def readers() -> Iterator[BpfObject]:
    """Programs that take some ten milliseconds to read a table: longer than an idle switch."""
    with programs.load("double_map", KEYS=SLOW_KEYS, WORK_BYTES=1 << 22) as unit:
        yield unit


def swept(
    unit: BpfObject,
    function: str,
    kind: ProgramKind,
    change: Callable[[int], object],
    *,
    sweeps: int = 0,
    least: str = "generations",
    between: int = 0,
) -> Any:
    """Counts of sweeps beside a writer that changes the table as fast as it can.

    There are so many sweeps, and some of what is named by ``least``, however long it takes.
    Between two changes ``between`` sweeps end.
    """
    program = unit.program(function, kind)
    counts, ended = unit.map("counts"), Event()
    counts.update(0, (0,) * 5)
    done = 0

    def read() -> None:
        nonlocal done
        deadline = time.monotonic() + LIMIT_S
        try:
            while (seen := counts.lookup(0))["sweeps"] < sweeps or seen[least] < 4:
                assert time.monotonic() < deadline, f"too little came: {seen}"
                program.test_run()
                done += 1
        finally:
            ended.set()

    def write() -> None:
        number = 1
        while not ended.is_set():
            change(number)
            number += 1
            enough = done + between
            while done < enough and not ended.is_set():
                time.sleep(0.001)

    together(read, write)
    return counts.lookup(0)


@sweeps
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_no_program_sees_a_mixed_generation(
    kind: ProgramKind, require_feature: Callable[[str], None]
) -> None:
    require_feature("syscall_program")
    with readers() as unit:
        outer = unit.map("outer")
        writer = DoubleMapWriter(outer, SLOW)
        writer.publish(SLOW_ALL, every(1, SLOW_KEYS), expected=0)
        seen = swept(
            unit,
            "sweep_published",
            kind,
            lambda number: writer.publish(SLOW_ALL, every(number + 1, SLOW_KEYS), expected=number),
            sweeps=40,
        )
        assert seen["mixed"] == 0


@sweeps
def test_a_spare_that_is_filled_anew_is_mixed_for_sleepable_programs_alone(
    require_feature: Callable[[str], None],
) -> None:
    # Why each generation is a new map: the update's return tells nothing about these programs.
    require_feature("syscall_program")
    with readers() as unit, SLOW.new("one") as one, SLOW.new("other") as other:
        outer, spares = unit.map("outer"), (one, other)

        def reuse(number: int) -> None:
            spares[number % 2].update_many(SLOW_ALL, every(number, SLOW_KEYS))
            outer.update(0, spares[number % 2].fd)

        reuse(0)
        assert swept(unit, "sweep_published", ProgramKind.TC, reuse, sweeps=20)["mixed"] == 0
        swept(unit, "sweep_published", ProgramKind.SYSCALL, reuse, least="mixed")


@sweeps
def test_an_index_flip_that_waits_for_its_readers(require_feature: Callable[[str], None]) -> None:
    require_feature("syscall_program")
    with readers() as unit:
        halves, word = unit.map("halves"), unit.map("word")
        base = 0

        def flip_at_once(number: int) -> None:
            half = SLOW_ALL + number % 2 * SLOW_KEYS
            halves.update_many(half, every(number, SLOW_KEYS))
            word.update(0, number)

        with IndexFlipWriter(halves, word) as writer:

            def flip(number: int) -> None:
                at = base + number
                assert writer.publish(every(at, SLOW_KEYS), expected=at - 1) == at

            swept(unit, "sweep_half", ProgramKind.TC, flip_at_once, least="mixed")
            base = int(word.lookup(0))
            assert swept(unit, "sweep_half", ProgramKind.TC, flip, sweeps=20)["mixed"] == 0
            # It cannot wait for sleepable ones: these have to look again whether it moved.
            base = int(word.lookup(0))
            swept(unit, "sweep_half", ProgramKind.SYSCALL, flip, least="mixed")
            with pytest.raises(VersionMismatch):
                writer.publish(every(0, SLOW_KEYS), expected=base)


@sweeps
def test_a_sleepable_program_that_compares_sees_no_mixed_half(
    require_feature: Callable[[str], None],
) -> None:
    require_feature("syscall_program")
    with programs.load("double_map", KEYS=SLOW_KEYS, WORK_BYTES=1 << 20) as unit:
        halves, word = unit.map("halves"), unit.map("word")

        def flip_twice(number: int) -> None:
            for generation in (2 * number, 2 * number + 1):
                half = SLOW_ALL + generation % 2 * SLOW_KEYS
                halves.update_many(half, every(generation, SLOW_KEYS))
                word.update(0, generation)

        swept(unit, "sweep_half", ProgramKind.SYSCALL, flip_twice, least="mixed")
        seen = swept(
            unit,
            "sweep_half_and_compare",
            ProgramKind.SYSCALL,
            flip_twice,
            sweeps=100,
            least="moved",
            between=2,  # the second finds its generation in force to the end
        )
        assert seen["mixed"] == 0
