"""The four invariants, for every strategy, under everything that may happen to it.

Convergence: once writes stop, the replica equals the map. Monotonic: a key never goes back.
Accounting: produced = delivered + dropped + coalesced, and what was dropped is repaired. Bootstrap:
snapshot and subscription join without a gap or a double.

A strategy takes part by one entry in `CASES`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pytest

from labkit.judge import checkers, history
from labkit.judge.history import Op
from labkit.kernel import libbpf, programs
from labkit.kernel.maps import Map, Snapshot
from labkit.kernel.parallel import Child, another_cpu, shared_array
from labkit.kernel.ringbuf import SharedRing
from labkit.load.event_writer import OPERATION, EventWriter, updates
from labkit.sync.changes import ChangeKind, Changes, change_dtype
from labkit.sync.double_map import DoubleMap, DoubleMapWriter, Layout, VersionMismatch
from labkit.sync.hybrid import Hybrid
from labkit.sync.poll import Poll
from labkit.sync.ring_events import Channel, RingEvents
from labkit.sync.strategy import Strategy
from labkit.sync.trace_hook import TraceHook

pytestmark = pytest.mark.outside_vm(
    "streams for minutes in Python; trace_hook and double_map cover the hooks"
)

Script = npt.NDArray[Any]

SMALL_RING = 64 << 10  # some 1,100 events of 8-byte values
LARGE_RING = 8 << 20
FOLLOWER = 9
LIMIT_S = 60.0  # of everything that is waited for; nothing is asserted about it
LONG = 2_000  # rounds of a stream that is stopped once it has shown enough


# -- the world, and who writes in it --------------------------------------------------------


class Writer(Protocol):
    """Goes through a script and notes beside each operation when it was and what came of it."""

    script: Script

    @property
    def done(self) -> int: ...

    def write(self, operations: int) -> None: ...

    def stop(self) -> None: ...


class SyscallWriter:
    """A process that writes by bpf(2) and knows nothing of followers."""

    def __init__(self, table: Map, script: Script, *, round_versions: int = 0) -> None:
        self.script = shared_array(len(script), OPERATION)
        self.script[:] = script
        self._round_versions = round_versions
        self._table = table
        self._progress = shared_array(2, np.uint64)  # done, limit

    @property
    def done(self) -> int:
        return int(self._progress[0])

    def write(self, operations: int) -> None:
        lib, fd = libbpf.api(), self._table.fd
        key = np.zeros(1, np.uint64)
        value = np.zeros(self._table.value_size // 8, np.uint64)
        at, data = key.ctypes.data, value.ctypes.data
        begun_ns, size = time.monotonic_ns(), len(self.script)
        self._progress[1] = self.done + operations
        while self._progress[0] < self._progress[1]:
            turn, place = divmod(self.done, size)
            op = self.script[place]
            due_ns = begun_ns + int(op["due_ns"])
            while op["due_ns"] and not turn and time.monotonic_ns() < due_ns:
                time.sleep(max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
            if turn:
                time.sleep(1e-4)  # an endless stream, at no certain rate
            key[0], value[:] = op["key"], int(op["version"]) + turn * self._round_versions
            if turn or not op["start_ns"]:  # else the one whom we follow was killed in it
                op["start_ns"] = time.monotonic_ns()
            if op["kind"] == ChangeKind.DELETE:
                op["outcome"] = lib.bpf_map_delete_elem(fd, at)
            else:
                op["outcome"] = lib.bpf_map_update_elem(fd, at, data, 0)
            op["end_ns"] = time.monotonic_ns()
            self._progress[0] += 1

    def stop(self) -> None:
        self._progress[1] = 0


class Published:
    """A table that is published whole through an outer map; a context manager."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.value_dtype = np.dtype(layout.value)
        self.value_size = self.value_dtype.itemsize
        self.outer = layout.outer()
        self.writer = DoubleMapWriter(self.outer, layout)
        self.update_many(np.zeros(0, np.uint64), np.zeros(0, self.value_dtype))

    def snapshot(self) -> Snapshot:
        return self.writer.read()[1]

    def lookup(self, key: int) -> Any:
        table = self.snapshot()
        return table.values[table.keys == key][0]

    def update_many(self, keys: npt.ArrayLike, values: npt.ArrayLike) -> int:
        """The first generations, while nobody else writes: all keys that there are."""
        self.writer.publish(keys, values, expected=self.writer.read()[0])
        return len(np.asarray(keys))

    def __enter__(self) -> Published:
        return self

    def __exit__(self, *_: object) -> None:
        self.outer.close()


class GenerationWriter:
    """A process that puts what is due into the next generation, and does so again when refused."""

    def __init__(self, table: Published, script: Script, *, round_versions: int) -> None:
        self.script = shared_array(len(script), OPERATION)
        self.script[:] = script
        self._round_versions = round_versions
        self._table = table
        self._most = max(500, table.layout.max_entries // 4)  # in one generation
        self._progress = shared_array(2, np.uint64)  # done, limit

    @property
    def done(self) -> int:
        return int(self._progress[0])

    def write(self, operations: int) -> None:
        begun_ns, size = time.monotonic_ns(), len(self.script)
        self._progress[1] = self.done + operations
        while self._progress[0] < self._progress[1]:
            turn, place = divmod(self.done, size)
            left = int(self._progress[1]) - self.done
            ops = self.script[place : place + max(0, min(self._most, left))]
            if not turn:
                wait_ns = begun_ns + int(ops["due_ns"][0]) - time.monotonic_ns()
                time.sleep(max(0.0, wait_ns / 1e9))
                due = begun_ns + ops["due_ns"].astype(np.int64) <= time.monotonic_ns()
                ops = ops[: len(ops) if due.all() else max(1, int(due.argmin()))]
            # Else the one whom we follow was killed in it.
            ops["start_ns"][(ops["start_ns"] == 0) | (turn > 0)] = time.monotonic_ns()
            while not self._publish(ops, turn * self._round_versions):
                pass
            ops["end_ns"] = time.monotonic_ns()
            self._progress[0] += len(ops)

    def _publish(self, ops: Script, add: int) -> bool:
        generation, table = self._table.writer.read()
        versions = dict(
            zip(table.keys.tolist(), words_of(table.values)[:, 0].tolist(), strict=True)
        )
        for op in ops:
            key, op["outcome"] = int(op["key"]), 0
            if op["kind"] == ChangeKind.DELETE:
                if versions.pop(key, None) is None:
                    op["outcome"] = -errno.ENOENT
            elif key in versions or len(versions) < self._table.layout.max_entries:
                versions[key] = int(op["version"]) + add
            else:
                op["outcome"] = -errno.E2BIG
        words = np.repeat(
            np.fromiter(versions.values(), np.uint64, len(versions)), self._table.value_size // 8
        )
        keys = np.fromiter(versions, np.uint64, len(versions))
        try:
            self._table.writer.publish(
                keys, words.view(self._table.value_dtype), expected=generation
            )
        except VersionMismatch:
            return False
        return True

    def stop(self) -> None:
        self._progress[1] = 0


@dataclass
class World:
    """One table, and what belongs to it; all is closed with ``open``."""

    case: Case
    open: ExitStack
    table: Map | Published
    ring_bytes: int

    @property
    def map(self) -> Map:
        """The map that is followed: the table itself, or the outer one that names it."""
        return self.table.outer if isinstance(self.table, Published) else self.table

    @cached_property
    def channel(self) -> Channel:
        return self.open.enter_context(Channel.create(self.ring_bytes, programs=2))

    def writer(self, script: Script, *, program: int = 0, round_versions: int = 0) -> Writer:
        return self.case.write(self, script, program, round_versions)


@dataclass(frozen=True)
class Case:
    """A strategy, and how the map that it follows is written.

    ``tells``: it hands out every change that was not dropped, not only the newest of a key.
    ``whole``: the table is published whole, through an outer map.
    """

    name: str
    follow: Callable[[World], Strategy]
    write: Callable[[World, Script, int, int], Writer]
    tells: bool
    needs: tuple[str, ...] = ()
    whole: bool = False


def by_syscalls(world: World, script: Script, program: int, round_versions: int) -> Writer:
    return SyscallWriter(world.map, script, round_versions=round_versions)


def follow_generations(world: World) -> Strategy:
    assert isinstance(world.table, Published)
    return DoubleMap(interval_s=0.002, layout=world.table.layout)


def by_generations(world: World, script: Script, program: int, round_versions: int) -> Writer:
    assert isinstance(world.table, Published)
    return GenerationWriter(world.table, script, round_versions=round_versions)


def by_events(world: World, script: Script, program: int, round_versions: int) -> Writer:
    return world.open.enter_context(
        EventWriter(
            world.map,
            world.channel,
            script,
            program=program,
            round_versions=round_versions,
            round_ns=int(script["due_ns"][-1]),
        )
    )


CASES = [
    Case("poll", lambda world: Poll(interval_s=0.002), by_syscalls, tells=False),
    Case("ring-events", lambda world: RingEvents(world.channel), by_events, tells=True),
    Case("hybrid", lambda world: Hybrid(world.channel, pull_every_s=0.3), by_events, tells=True),
    Case(
        "trace-hook",
        lambda world: TraceHook(pull_s=0.3, ring_bytes=world.ring_bytes),
        by_syscalls,
        tells=True,
        needs=("tp_btf",),
    ),
    Case(
        "double-map",
        follow_generations,
        by_generations,
        tells=False,
        needs=("map_in_map",),
        whole=True,
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest, require_feature: Callable[[str], None]) -> Case:
    chosen: Case = request.param
    for feature in ("bpf", "compile", "ringbuf", "batch_hash", *chosen.needs):
        require_feature(feature)
    return chosen


@contextmanager
def new_world(
    case: Case, *, entries: int, words: int = 1, ring_bytes: int = SMALL_RING
) -> Iterator[World]:
    value: Any = [("version", "u8"), ("rest", "u8", (words - 1,))] if words > 1 else "u8"
    layout = Layout("u8", value, entries)
    with ExitStack() as open_, Published(layout) if case.whole else layout.new("t_sync") as table:
        yield World(case, open_, table, ring_bytes)


def filled(table: Map | Published, keys: int) -> Script:
    """Version 1 of so many keys, written by batch: the rows as a writer would have noted them."""
    script = updates(keys, 1)
    values = np.ones((keys, table.value_size // 8), np.uint64)
    script["start_ns"] = time.monotonic_ns()
    table.update_many(script["key"], values.reshape(-1).view(table.value_dtype))
    script["end_ns"] = time.monotonic_ns()
    return script


def mixed(keys: int, operations: int, seed: int = 1) -> Script:
    """Updates and deletes of random keys: of each key, every fourth from the third on a delete."""
    script = np.zeros(operations, OPERATION)
    script["key"] = np.random.default_rng(seed).integers(0, keys, operations)
    order = np.argsort(script["key"], kind="stable")
    key = script["key"][order]
    first = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
    script["version"][order] = 1 + np.arange(operations) - np.repeat(
        first, np.diff(np.append(first, operations))
    )  # fmt: skip
    script["kind"] = np.where(script["version"] % 4 == 3, ChangeKind.DELETE, ChangeKind.UPDATE)
    return script


@contextmanager
def writing(*writers: Writer, operations: int | None = None) -> Iterator[list[Child]]:
    """Let writers go through their scripts, each in a process of its own."""
    with ExitStack() as children:
        yield [
            children.enter_context(
                Child(
                    partial(writer.write, operations or len(writer.script)),
                    cpu=another_cpu(1 + place),
                )
            )
            for place, writer in enumerate(writers)
        ]


# -- following ------------------------------------------------------------------------------


class Follower:
    """Polls a strategy, and keeps all that it delivered with the time of each poll."""

    def __init__(self, world: World, strategy: Strategy | None = None) -> None:
        self.strategy = world.open.enter_context(strategy or world.case.follow(world))
        self.replica = self.strategy.attach(world.map)
        self.polls: list[tuple[int, Changes]] = []

    def poll(self, timeout_s: float = 0.02) -> int:
        begun_ns = time.monotonic_ns()
        changes = self.strategy.poll(timeout_s)
        self.polls.append((begun_ns, changes))
        return len(changes)

    def until(self, satisfied: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not satisfied():
            assert time.monotonic() < deadline, "what was waited for did not come"
            self.poll()

    def drain(self, *writers: Child) -> None:
        """Follow to the end of the writers, and until nothing more comes."""
        self.until(lambda: all(writer.ended() for writer in writers))
        for writer in writers:
            writer.result()
        self.until(lambda: not self.poll(0.05) and not self.strategy.behind)

    def delivered(self) -> Changes:
        rows = [changes for _, changes in self.polls]
        return np.concatenate(rows or [np.zeros(0, change_dtype("u8", "u8"))])


def wait_until(satisfied: Callable[[], bool]) -> None:
    """Wait, and follow nothing meanwhile."""
    deadline = time.monotonic() + LIMIT_S
    while not satisfied():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.001)


def goes_on(follower: Follower, writer: Writer, operations: int) -> None:
    """Follow so much more of a stream."""
    at = writer.done
    follower.until(lambda: writer.done > at + operations)


def words_of(values: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    packed = np.ascontiguousarray(values)
    return packed.view(np.uint64).reshape(len(packed), packed.dtype.itemsize // 8)


def written(*scripts: Script) -> history.History:
    """What the writers did; an operation that its writer's death cut short is pending."""
    rows = []
    for actor, script in enumerate(scripts):
        begun = script[script["start_ns"] > 0]
        rows.append(
            history.build(
                np.where(begun["kind"] == ChangeKind.DELETE, int(Op.DELETE), int(Op.WRITE)),
                key=begun["key"],
                version=begun["version"],
                start_ns=begun["start_ns"],
                end_ns=np.where(
                    begun["end_ns"] > 0, begun["end_ns"], np.uint64(history.PENDING)
                ).astype(np.uint64),
                actor=actor,
                outcome=begun["outcome"],
            )
        )
    return history.concatenate(*rows)


def seen(follower: Follower) -> history.History:
    """What the follower was told; a delete that nobody told of is an absence."""
    rows = []
    for begun_ns, changes in follower.polls:
        deletes = changes["kind"] == ChangeKind.DELETE
        inferred = deletes & (changes["committed_ns"] == 0)
        words = words_of(changes["value"])
        rows.append(
            history.build(
                Op.READ,
                key=changes["key"],
                version=np.where(inferred, 0, changes["version"]).astype(np.uint64),
                start_ns=np.full(len(changes), begun_ns, np.uint64),
                end_ns=changes["seen_ns"],
                actor=FOLLOWER,
                intact=~checkers.torn_values(words),
                length=8 * words.shape[1],
            )
        )
    return history.concatenate(*rows)


def check(world: World, follower: Follower, *scripts: Script, exact: bool = True) -> None:
    """All that holds once the writers have stopped and everything was drained.

    ``exact``: the strategy was there from the first of these operations on, so that it must
    have counted each one.
    """
    table, stats = world.table, follower.strategy.stats()
    final = table.snapshot()
    keys, versions, values = follower.replica.contents()

    # Convergence, and of whole values.
    final_versions = words_of(final.values)[:, 0]
    assert checkers.diverged(final.keys, final_versions, keys, versions).size == 0
    assert follower.replica.differs(final) == 0
    assert (words_of(values) == versions[:, None]).all(), "a value is not of its version"

    # What was told, in its order.
    rows = follower.delivered()
    assert (rows["seen_ns"] > 0).all()
    updates_ = rows[rows["kind"] == ChangeKind.UPDATE]
    assert (words_of(updates_["value"]) == updates_["version"][:, None]).all()
    whole = history.concatenate(written(*scripts), seen(follower))
    assert checkers.unwritten(whole).sum() == 0
    assert checkers.torn(whole).sum() == 0
    assert checkers.non_monotonic(whole).sum() == 0
    assert checkers.lost(whole, final.keys, final_versions).sum() == 0, "the writers are wrong"
    told = rows[rows["committed_ns"] > 0]
    assert (told["committed_ns"] <= told["seen_ns"]).all()

    # Accounting.
    assert checkers.accounting(
        produced=stats.produced,
        delivered=stats.delivered,
        dropped=stats.dropped,
        coalesced=stats.coalesced,
    ) == 0  # fmt: skip
    if not stats.dropped and not stats.repaired:
        assert stats.delivered == len(rows)
    made = sum(int(((one["end_ns"] > 0) & (one["outcome"] == 0)).sum()) for one in scripts)
    if exact:
        # Of a key that is missing at the end, a poller does not know how often it was written.
        everybody = np.unique(np.concatenate([one["key"] for one in scripts]))
        if world.case.tells or len(final) == len(everybody):
            assert stats.produced == made
        else:
            assert 0 < stats.produced <= made


# -- what may happen ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 64, 1024])
def test_steady_load(case: Case, size: int) -> None:
    with new_world(case, entries=200, words=size // 8, ring_bytes=LARGE_RING) as world:
        writer = world.writer(updates(100, 20, per_second=8_000))
        follower = Follower(world)
        with writing(writer) as children:
            follower.drain(*children)
        check(world, follower, writer.script)
        stats = follower.strategy.stats()
        assert stats.dropped == 0
        if case.tells:
            # A pull may come between a system call's write and its event.
            assert stats.delivered + stats.repaired == 2_000
            rows = follower.delivered()
            assert np.array_equal(rows["version"], 1 + np.arange(2_000) // 100)
            assert stats.size_bytes == LARGE_RING and stats.free_bytes == LARGE_RING


@pytest.mark.parametrize("size", [8, 1024])
def test_bursts_past_the_rings_capacity(case: Case, size: int) -> None:
    with new_world(case, entries=2_000, words=size // 8) as world:
        writer = world.writer(updates(1_000, 30))
        follower = Follower(world)
        for _ in range(3):
            # Not looked at meanwhile: no ring of this size holds a burst.
            with writing(writer, operations=10_000) as (child,):
                child.result()
                follower.poll()
        follower.drain()
        check(world, follower, writer.script)
        stats = follower.strategy.stats()
        if case.tells:
            assert stats.dropped > 3 * 8_000
            assert stats.resyncs >= 1 and stats.repaired > 0
        else:
            assert stats.coalesced > 0


def test_a_follower_that_stands_still_while_its_ring_runs_over(case: Case) -> None:
    with new_world(case, entries=200) as world:
        writer = world.writer(updates(100, LONG, per_second=10_000))
        follower = Follower(world)
        with writing(writer) as children:
            follower.until(lambda: writer.done > 500)
            at = writer.done
            wait_until(lambda: writer.done > at + 3_000)  # three rings
            assert not children[0].ended(), "the stream was over too early to show anything"
            writer.stop()
            follower.drain(*children)
        check(world, follower, writer.script)
        if case.tells:
            assert follower.strategy.stats().dropped > 0


def test_a_follower_that_is_killed_and_started_again(case: Case) -> None:
    with new_world(case, entries=200) as world:
        before = filled(world.table, 100)
        writer = world.writer(updates(100, LONG, per_second=8_000, first_version=2))
        progress = shared_array(1, np.int64)

        def first_life() -> None:
            with world.case.follow(world) as strategy:
                strategy.attach(world.map)
                while True:
                    progress[0] += len(strategy.poll(0.02))

        with writing(writer) as children:
            with Child(first_life) as victim:
                wait_until(lambda: victim.ended() or progress[0] >= 300)
                assert not victim.ended()
                os.kill(victim.pid, signal.SIGKILL)
            follower = Follower(world)
            goes_on(follower, writer, 2_000)
            assert not children[0].ended(), "the stream was over too early to show anything"
            writer.stop()
            follower.drain(*children)
        check(world, follower, before, writer.script, exact=False)


def test_a_writer_that_is_killed_and_another_takes_over(case: Case) -> None:
    with new_world(case, entries=200, words=8) as world:
        writer = world.writer(updates(100, 60, per_second=10_000))
        follower = Follower(world)
        with writing(writer) as (child,):
            follower.until(lambda: writer.done > 1_500)
            os.kill(child.pid, signal.SIGKILL)
        assert writer.done < len(writer.script)
        with writing(writer, operations=len(writer.script) - writer.done) as children:
            follower.drain(*children)
        check(world, follower, writer.script, exact=False)
        # What it was killed in may have been done, and is done again.
        assert follower.strategy.stats().produced - len(writer.script) in (0, 1)


@pytest.mark.parametrize("step", ["fill", "freeze", "switch", "return"])
def test_a_writer_killed_at_a_step_of_a_switch_and_another_takes_over(
    step: str, require_feature: Callable[[str], None]
) -> None:
    case = next(case for case in CASES if case.name == "double-map")
    for feature in ("bpf", "batch_hash", *case.needs):
        require_feature(feature)
    with new_world(case, entries=200, words=8) as world:
        writer = world.writer(updates(100, 60, per_second=10_000))
        follower = Follower(world)
        stands = shared_array(1, np.int64)
        name = {"fill": "update_many", "freeze": "freeze"}.get(step, "update")
        usual = getattr(Map, name)

        def stand(self: Map, *arguments: Any) -> Any:
            if writer.done < 1_500:
                return usual(self, *arguments)
            if step == "fill":  # half of it is there
                usual(self, arguments[0][:50], arguments[1][:50])
            elif step == "return":  # readers have it, and the writer does not know
                usual(self, *arguments)
            stands[0] = 1
            time.sleep(LIMIT_S)

        def work() -> None:
            setattr(Map, name, stand)
            writer.write(len(writer.script))

        with Child(work, cpu=another_cpu(1)) as child:
            follower.until(lambda: bool(stands[0]))
            os.kill(child.pid, signal.SIGKILL)
        at = writer.done
        follower.until(lambda: not follower.poll(0.05))
        _, versions, _ = follower.replica.contents()
        # What was in force when it died is whole, and so is the copy.
        assert follower.replica.differs(world.table.snapshot()) == 0
        assert len(versions) == 100 and at < len(writer.script)
        with writing(writer, operations=len(writer.script) - at) as children:
            follower.drain(*children)
        check(world, follower, writer.script, exact=False)


def test_two_writers_on_one_key_that_take_turns(case: Case) -> None:
    with new_world(case, entries=16, ring_bytes=LARGE_RING) as world:
        keys, turns = 4, 100
        scripts = [updates(keys, turns), updates(keys, turns)]
        scripts[0]["version"] = 2 * scripts[0]["version"] - 1
        scripts[1]["version"] = 2 * scripts[1]["version"]
        writers = [world.writer(script, program=i) for i, script in enumerate(scripts)]
        turn = shared_array(1, np.int64)

        def take_turns(mine: int) -> Callable[[], None]:
            def work() -> None:
                deadline = time.monotonic() + LIMIT_S
                for _ in range(turns):
                    while turn[0] % 2 != mine and time.monotonic() < deadline:
                        time.sleep(0)
                    writers[mine].write(keys)
                    turn[0] += 1

            return work

        follower = Follower(world)
        with Child(take_turns(0)) as one, Child(take_turns(1), cpu=another_cpu(1)) as other:
            follower.drain(one, other)
        check(world, follower, *(writer.script for writer in writers))
        assert world.table.lookup(0) == 2 * turns


def test_deletes_and_re_inserts(case: Case) -> None:
    with new_world(case, entries=100) as world:
        script = mixed(keys=60, operations=6_000)
        script["due_ns"] = 1 + np.arange(len(script)) * 60_000
        writer = world.writer(script)
        follower = Follower(world)
        with writing(writer) as children:
            follower.drain(*children)
        assert (writer.script["outcome"] == 0).all()
        assert 0 < len(world.table.snapshot()) < 60, "some keys end deleted, some do not"
        check(world, follower, writer.script)
        assert (follower.delivered()["kind"] == ChangeKind.DELETE).any()


def test_a_burst_of_deletes_and_re_inserts(case: Case) -> None:
    with new_world(case, entries=1_000) as world:
        writer = world.writer(mixed(keys=600, operations=12_000, seed=2))
        follower = Follower(world)
        with writing(writer) as (child,):
            child.result()
        follower.drain()
        check(world, follower, writer.script)


def test_a_map_filled_to_its_limit(case: Case) -> None:
    with new_world(case, entries=64, ring_bytes=LARGE_RING) as world:
        fill, free, again, more = (updates(keys, 1) for keys in (128, 32, 128, 64))
        free["kind"], free["version"] = ChangeKind.DELETE, 2
        again["version"][:32] = 3
        again["key"] = np.roll(again["key"], 64)  # those that found no room come first
        again["version"] = np.where(again["key"] < 32, 3, np.where(again["key"] < 64, 2, 1))
        more["key"], more["version"] = 32 + more["key"], np.where(more["key"] < 32, 3, 2)
        writer = world.writer(np.concatenate([fill, free, again, more]))
        follower = Follower(world)
        with writing(writer) as children:
            follower.drain(*children)
        refused = writer.script["outcome"] < 0
        assert refused.sum() > 64, "the map was never full"
        assert len(world.table.snapshot()) == 64
        check(world, follower, writer.script)


def test_a_hundred_thousand_keys(case: Case) -> None:
    keys = 100_000
    with new_world(case, entries=keys, ring_bytes=1 << 20) as world:
        before = filled(world.table, keys)
        writer = world.writer(updates(keys, 1, first_version=2))
        follower = Follower(world)
        assert len(follower.replica) == keys
        with writing(writer) as children:
            follower.drain(*children)
        check(world, follower, writer.script, before, exact=False)
        assert follower.strategy.stats().produced == keys


# -- the joint of snapshot and subscription -------------------------------------------------


def test_bootstrap_joins_a_busy_stream_without_a_gap_or_a_double(case: Case) -> None:
    with new_world(case, entries=600, ring_bytes=LARGE_RING) as world:
        writer = world.writer(updates(500, LONG, per_second=25_000))
        with writing(writer) as children:
            wait_until(lambda: writer.done > 2_000)
            follower = Follower(world)
            keys, versions, _ = follower.replica.contents()
            goes_on(follower, writer, 10_000)
            assert not children[0].ended(), "the stream was over too early to show anything"
            writer.stop()
            follower.drain(*children)
        check(world, follower, writer.script, exact=False)
        rows = follower.delivered()
        first = np.zeros(500, np.uint64)
        first[keys] = versions
        order = np.argsort(rows["key"], kind="stable")
        key, version = rows["key"][order], rows["version"][order]
        begins = np.append(True, key[1:] != key[:-1])
        previous = np.where(begins, first[key], np.append(0, version[:-1]))
        assert (version > previous).all(), "a change was delivered twice"
        stats = follower.strategy.stats()
        if case.tells and not stats.dropped and not stats.repaired:
            assert (version == previous + 1).all(), "a change was not delivered"


# -- repair in the middle of a busy stream ---------------------------------------------------


@contextmanager
def burst_in_a_stream(case: Case, strategy: Callable[[World], Strategy]) -> Iterator[Any]:
    """A stream that does not end, and a burst of other keys in it that overruns the ring.

    Yields the follower, the stream, its process, and whether the burst's keys are right.
    """
    with new_world(case, entries=2_000) as world:
        stream = updates(64, 50, per_second=3_000)
        stream["key"] += 10_000
        streaming = world.writer(stream, program=1, round_versions=50)
        bursting = world.writer(updates(1_000, 10))
        follower = Follower(world, strategy(world))

        def arrived() -> bool:
            keys, versions, _ = follower.replica.contents()
            here = versions[keys < 1_000]
            return len(here) == 1_000 and bool((here == 10).all())

        with writing(streaming, operations=10_000_000) as (child,):
            follower.until(lambda: streaming.done > 300)
            with writing(bursting) as (burst,):
                burst.result()
            yield follower, streaming, child, arrived


def test_a_drop_is_repaired_while_the_stream_goes_on(case: Case) -> None:
    with burst_in_a_stream(case, case.follow) as (follower, streaming, child, arrived):
        follower.until(arrived)
        assert not child.ended()
        stats = follower.strategy.stats()
        if case.tells:
            assert stats.dropped > 0 and stats.resyncs > 0 and stats.repaired > 0
        streaming.stop()
        follower.drain(child)


def test_idle_only_diverges_for_as_long_as_the_stream_is_busy(kernel: None) -> None:
    hybrid = next(case for case in CASES if case.name == "hybrid")

    def idle_only(world: World) -> Strategy:
        return Hybrid(world.channel, idle_s=2.0, pull_every_s=None, on_loss=False)

    with burst_in_a_stream(hybrid, idle_only) as (follower, streaming, child, arrived):
        at = streaming.done
        follower.until(lambda: streaming.done > at + 2_000)
        assert not arrived(), "events were dropped, and it found them without a pull"
        stats = follower.strategy.stats()
        assert stats.dropped > 0 and stats.resyncs == 0
        assert follower.strategy.behind, "it knows, and does nothing"
        streaming.stop()
        child.result()
        follower.until(arrived)
        assert follower.strategy.stats().resyncs > 0


# -- programs that race ---------------------------------------------------------------------

LOCKED = np.dtype([("lock", "u4"), ("spare", "u4"), ("version", "u8")])


@pytest.mark.parametrize("name", ["poll", "ring-events", "hybrid"])
def test_two_programs_that_race_for_one_key(name: str, kernel: None) -> None:
    # The lock in the value orders the writes; their events may still overtake each other.
    case = next(case for case in CASES if case.name == name)
    with ExitStack() as open_:
        unit = open_.enter_context(programs.load("locked_table", ENTRIES=8))
        table = unit.map("table", key="u8", value=LOCKED)
        table.update_many(np.arange(2), np.zeros(2, LOCKED))
        world = World(case, open_, table, LARGE_RING)
        script = updates(2, 15_000)
        writers = [
            open_.enter_context(
                EventWriter(table, world.channel, script, program=program, locked=True)
            )
            for program in range(2)
        ]
        follower = Follower(world)
        ready = shared_array(2, np.int64)

        def race(mine: int) -> None:
            ready[mine] = 1
            deadline = time.monotonic() + LIMIT_S
            while not ready.all() and time.monotonic() < deadline:
                pass
            writers[mine].write(len(script))

        with Child(partial(race, 0)) as one, Child(partial(race, 1), cpu=another_cpu(1)) as other:
            follower.drain(one, other)
        assert [int(table.lookup(key)["version"]) for key in range(2)] == [30_000, 30_000]
        assert follower.replica.differs(table.snapshot()) == 0
        rows = follower.delivered()
        for key in range(2):
            version = rows["version"][rows["key"] == key]
            assert (np.diff(version.astype(np.int64)) > 0).all(), "the key went back"
        stats = follower.strategy.stats()
        assert stats.produced == 60_000
        assert stats.delivered + stats.dropped + stats.coalesced == 60_000
        made = np.concatenate([writer.script for writer in writers])
        assert len(np.unique(made[["key", "version"]])) == 60_000, "the lock did not hold"


@pytest.mark.parametrize("name", ["poll", "trace-hook"])
def test_two_processes_that_race_for_one_key(
    name: str, require_feature: Callable[[str], None], tmp_path: Path
) -> None:
    # A lock orders reading a version and writing the next one; nothing orders who has it.
    case = next(case for case in CASES if case.name == name)
    for feature in ("bpf", "compile", "ringbuf", "batch_hash", *case.needs):
        require_feature(feature)
    each = 2_000
    with new_world(case, entries=8, ring_bytes=LARGE_RING) as world:
        filled(world.table, 1)
        follower = Follower(world)
        ready = shared_array(2, np.int64)

        def race(mine: int) -> None:
            ready[mine] = 1
            deadline = time.monotonic() + LIMIT_S
            while not ready.all() and time.monotonic() < deadline:
                pass
            with open(tmp_path / "lock", "w") as lock:
                for _ in range(each):
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    world.map.update(0, int(world.map.lookup(0)) + 1)
                    fcntl.flock(lock, fcntl.LOCK_UN)

        with Child(partial(race, 0)) as one, Child(partial(race, 1), cpu=another_cpu(1)) as other:
            follower.drain(one, other)
        raced(follower, world.table, 1 + 2 * each, produced=2 * each)
        if case.tells:
            assert follower.strategy.stats().coalesced == 0, "their order was the lock's"


def test_two_publishers_that_race_for_one_key(require_feature: Callable[[str], None]) -> None:
    case = next(case for case in CASES if case.name == "double-map")
    for feature in ("bpf", "batch_hash", *case.needs):
        require_feature(feature)
    each = 30
    with new_world(case, entries=8) as world:
        filled(world.table, 2)
        follower = Follower(world)
        table = world.table
        assert isinstance(table, Published)
        refused = shared_array(2, np.int64)

        def race(mine: int) -> None:
            for _ in range(each):
                while True:
                    generation, here = table.writer.read()
                    try:
                        table.writer.publish(here.keys, here.values + 1, expected=generation)
                        break
                    except VersionMismatch:
                        refused[mine] += 1

        with Child(partial(race, 0)) as one, Child(partial(race, 1), cpu=another_cpu(1)) as other:
            follower.drain(one, other)
        assert refused.sum() > 0, "they never raced"
        raced(follower, table, 1 + 2 * each, produced=2 * 2 * each)
        for _, changes in follower.polls:
            assert len(np.unique(changes["version"])) <= 1, "a generation came in pieces"


def raced(follower: Follower, table: Map | Published, version: int, *, produced: int) -> None:
    """No write was lost, none came back, and all are accounted for."""
    assert int(table.lookup(0)) == version
    assert follower.replica.differs(table.snapshot()) == 0
    rows = follower.delivered()
    rows = rows[rows["key"] == 0]
    assert (np.diff(rows["version"].astype(np.int64)) > 0).all(), "the key went back"
    stats = follower.strategy.stats()
    assert stats.produced == produced
    assert stats.delivered + stats.dropped + stats.coalesced == produced


# -- what else may happen to the ring ---------------------------------------------------------


def test_an_unread_update_does_not_bring_back_what_was_deleted_before(kernel: None) -> None:
    # The ring is full of what an earlier follower left; the delete found no room, long ago.
    case = next(case for case in CASES if case.name == "ring-events")
    with new_world(case, entries=2_000) as world:
        script = updates(2_000, 2)
        script["key"] %= 1_000
        script["version"] = 1 + np.arange(len(script)) // 1_000
        script = np.append(script, script[:1])
        script["kind"][-1], script["version"][-1] = ChangeKind.DELETE, 9
        writer = world.writer(script)
        writer.write(len(script))
        follower = Follower(world)
        follower.drain()
        check(world, follower, writer.script, exact=False)
        stats = follower.strategy.stats()
        assert stats.coalesced > 1_000 and stats.delivered == 0
        assert follower.replica.get(0) is None


def test_a_drop_while_the_map_is_read_is_not_forgotten(kernel: None) -> None:
    case = next(case for case in CASES if case.name == "ring-events")
    with new_world(case, entries=2_000) as world:
        writer = world.writer(updates(1_000, 8))
        follower = Follower(world)
        table, turns = follower.strategy.table, [8_000]
        read = table.snapshot

        def overtaken() -> Snapshot:
            snapshot = read()
            writer.write(turns.pop() if turns else 0)
            return snapshot

        table.snapshot = overtaken  # type: ignore[method-assign]
        follower.strategy._resync_at = 0.0  # type: ignore[attr-defined]
        follower.drain()
        check(world, follower, writer.script)
        assert not turns and follower.strategy.stats().resyncs == 2


def test_somebody_else_reads_the_ring_too(kernel: None) -> None:
    # Events that another consumer took are dropped by nobody: no account is exact any more.
    case = next(case for case in CASES if case.name == "ring-events")
    with new_world(case, entries=2_000, ring_bytes=LARGE_RING) as world:
        writer = world.writer(updates(1_000, 3))
        follower = Follower(world)
        writer.write(1_000)
        follower.poll()
        writer.write(1_000)

        def steal() -> int:
            from labkit.kernel import ringbuf

            ringbuf._being_read.clear()  # of the parent's readers, this process knows nothing
            with ringbuf.RingReader(world.channel.ring, follower.polls[0][1].dtype) as thief:
                return len(thief.read(limit=700))

        with Child(steal) as child:
            assert child.result() == 700
        writer.write(1_000)
        with pytest.raises(SharedRing, match="one consumer"):
            follower.drain()
