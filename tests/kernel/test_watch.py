"""Watching a live map: every change is shown once, whoever made it and however it was found."""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labkit.errors import BadInput
from labkit.inspect import watch_hooks
from labkit.inspect.watch import MapEvent, Watch, in_words
from labkit.inspect.watch_output import Output, Wanted, shown_as
from labkit.inspect.watch_targets import which_maps
from labkit.kernel import libbpf, programs
from labkit.kernel.compiler import LoadFailed
from labkit.kernel.libbpf import MapFlag, MapKind, UpdateFlag
from labkit.kernel.maps import (
    KeyAbsent,
    KeyExists,
    Map,
    MapError,
    MapFull,
    NotPermitted,
    PartialBatch,
)
from labkit.kernel.parallel import Child
from labkit.sync import trace_hook
from labkit.sync.ring_events import Channel

KEYS = 20
PULL_S = 0.05


@pytest.fixture
def table() -> Iterator[Map]:
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=64, name="watched") as made:
        yield made


def collected(watch: Watch, count: int, within_s: float = 20.0) -> list[MapEvent]:
    """So many events, and whatever comes within four readings after them."""
    found: list[MapEvent] = []
    deadline = time.monotonic() + within_s
    while len(found) < count and time.monotonic() < deadline:
        found += watch.poll(0.1)
    quiet = time.monotonic() + 4 * PULL_S
    while (left := quiet - time.monotonic()) > 0:
        found += watch.poll(left)
    return found


def test_changes_by_system_call_are_told_once(table: Map) -> None:
    table.update(1, 10)
    with Watch(table, pull_s=PULL_S) as watch:
        table.update(1, 11)
        table.update(2, 20)
        table.delete(1)
        found = collected(watch, 3)
        assert [(one.what, int(one.key), one.value) for one in found] == [
            ("update", 1, 11), ("update", 2, 20), ("delete", 1, None),
        ]  # fmt: skip
        assert (watch.seen, watch.found, watch.dropped) == (3, 0, 0)
        assert all(one.at_ns <= time.monotonic_ns() for one in found)


def test_what_a_program_writes_is_told_or_found(table: Map) -> None:
    with programs.load("ignored_answers", TABLE_FD=table.fd, KEYS=KEYS) as unit:
        store = unit.program("store")
        with Watch(table, pull_s=PULL_S) as watch:
            store.test_run(repeat=KEYS)
            found = collected(watch, KEYS)
            told = watch.mechanism == "functions"
            assert sorted(int(one.key) for one in found) == list(range(KEYS))
            assert {one.what for one in found} == {"update" if told else "found"}
            assert all(int(one.value) == int(one.key) for one in found)
            assert watch.found == (0 if told else KEYS)


def test_a_store_through_a_pointer_is_found_however_often_it_is_repeated() -> None:
    with programs.load("lost_updates", INCREMENTS=1) as unit:
        increment = unit.program("plain_increment")
        with Watch(unit.map("counter"), pull_s=PULL_S) as watch:
            found: list[MapEvent] = []
            deadline = time.monotonic() + 60
            while len(found) < 2 and time.monotonic() < deadline:
                increment.test_run()
                found += watch.poll(PULL_S / 5)
            assert [one.what for one in found] == ["found", "found"]
            assert 0 < int(found[0].value) < int(found[1].value)
            assert watch.seen == 0


def test_writes_while_the_map_is_read_are_not_found_as_well(table: Map) -> None:
    with Watch(table, pull_s=0.002) as watch:
        found: list[MapEvent] = []
        for version in range(1, 2_001):
            table.update(version % 8, version)
            if version % 50 == 0:
                found += watch.poll(0.0)
        found += collected(watch, 2_000 - len(found))
        assert [int(one.value) for one in found if one.what == "update"] == [*range(1, 2_001)]
        assert (watch.found, watch.dropped) == (0, 0)


def test_in_the_end_all_that_was_told_is_handed_out(table: Map) -> None:
    with Watch(table, pull_s=PULL_S) as watch:
        for version in range(1, 5_001):
            table.update(version % 8, version)
        assert [int(one.value) for one in watch.end()] == [*range(1, 5_001)]
        table.update(1, 0)  # nobody watches any more
        assert watch.end() == []
        assert (watch.seen, watch.dropped) == (5_000, 0)


def test_a_per_cpu_map_shows_the_slot_of_each_cpu() -> None:
    with (
        Map.create(MapKind.PERCPU_ARRAY, key="u4", value="u8", max_entries=4) as slots,
        Watch(slots, pull_s=PULL_S) as watch,
    ):
        expected = [10 + cpu for cpu in range(libbpf.possible_cpus())]
        slots.update(3, expected)
        (one,) = collected(watch, 1)
        assert (one.what, int(one.key)) == ("update", 3)
        assert [int(slot) for slot in one.value] == expected
        assert [int(slot) for slot in one.old] == [0] * len(expected)


@pytest.mark.outside_vm("asks nothing of the kernel that differs between kernels")
@pytest.mark.parametrize("size", [1_024, 1_032, 65_536])
def test_a_value_may_be_large(size: int) -> None:
    value = bytes(range(256)) * (size // 256) + bytes(size % 256)
    with (
        Map.create(MapKind.HASH, key="u4", value=f"V{size}", max_entries=4) as large,
        Watch(large, pull_s=PULL_S) as watch,
    ):
        large.update(1, value)
        large.delete(1)
        told, gone = collected(watch, 2)
        assert (told.what, told.value.tobytes(), gone.what) == ("update", value, "delete")


def test_what_cannot_be_watched_is_one_sentence(table: Map) -> None:
    with (
        Map.create(MapKind.RINGBUF, key=None, value=None, max_entries=4096) as ring,
        pytest.raises(BadInput, match="ringbuf cannot be hooked"),
    ):
        Watch(ring)
    with pytest.raises(BadInput, match="give more"):
        Watch(table, pull_s=0.0)


def test_who_asked_and_what_was_refused_is_told(table: Map) -> None:
    def write() -> int:
        theirs = Map.from_id(table.id)
        theirs.update(1, 10)
        with suppress(KeyExists):
            theirs.update(1, 11, UpdateFlag.NOEXIST)
        with suppress(KeyAbsent):
            theirs.update(2, 20, UpdateFlag.EXIST)
        with suppress(KeyAbsent):
            theirs.delete(3)
        theirs.update_many(np.arange(64, dtype="u4"), np.arange(64, dtype="u8"))
        with suppress(MapFull):
            theirs.update(99, 1)
        theirs.freeze()
        with suppress(NotPermitted):
            theirs.update(1, 12)
        return os.getpid()

    with Watch(table, pull_s=PULL_S) as watch:
        with Child(write) as child:
            writer = child.result()
        told = [one for one in collected(watch, 70) if one.key not in range(4, 64) or one.error]
        counts = (watch.seen, watch.refused, watch.dropped)
    by_function = watch.mechanism == "functions"  # what is refused before the map is not seen there
    assert [(one.what, one.key, one.value, one.error, one.old) for one in told] == [
        ("update", 1, 10, "", None),
        ("update", 1, 11, "EEXIST", 10),
        ("update", 2, 20, "ENOENT", None),
        ("delete", 3, None, "ENOENT", None),
        ("update", 0, 0, "", None),
        ("update", 1, 1, "", 10),
        ("update", 2, 2, "", None),
        ("update", 3, 3, "", None),
        ("update", 99, 1, "E2BIG", None),
    ] + [("update", 1, 12, "EPERM", 1)] * (not by_function)
    assert counts == (65, 4 + (not by_function), 0)
    for one in told:
        assert one.writer is not None
        assert one.writer.pid == writer and one.writer.comm
        assert (one.writer.program_id, one.writer.program) == (0, "")
        assert one.writer.cgroup > 0


def test_the_name_of_a_writer_is_shown_as_it_may_be(
    table: Map, capsys: pytest.CaptureFixture[str]
) -> None:
    def write() -> None:
        Path("/proc/self/comm").write_bytes(b"a\n\xff\x1b[2J")
        Map.from_id(table.id).update(1, 1)

    with Watch(table, pull_s=PULL_S) as watch:
        with Child(write) as child:
            child.result()
        events = collected(watch, 1)
    assert [one.writer.comm for one in events if one.writer] == ["a\\n\\xff\\x1b[2J"]
    with Output() as out:
        out.write(events)
    assert capsys.readouterr().out.removesuffix("\n").isprintable()


def test_a_program_that_writes_is_named_where_its_stack_can_be_seen(
    table: Map, require_feature: Callable[[str], None]
) -> None:
    require_feature("fexit")
    with programs.load("ignored_answers", TABLE_FD=table.fd, KEYS=KEYS) as unit:
        store = unit.program("store")
        with Watch(table, pull_s=PULL_S) as watch:
            store.test_run(repeat=KEYS)
            table.update(0, 7)
            found = collected(watch, KEYS + 1)
        writers = [one.writer for one in found]
        assert all(who is not None and who.pid == os.getpid() for who in writers)
        assert [who.program_id for who in writers if who] == [store.id] * KEYS + [0]


def test_told_and_dropped_and_refused_is_made() -> None:
    """Single calls and batches of any size, more of them than the ring and its reader take."""
    keys = np.arange(6_000, dtype="u4")

    def write(map_id: int) -> tuple[int, int]:
        theirs, made, refused = Map.from_id(map_id), 0, 0
        for turn in range(20):
            for count in (1_800, 513, 6_000):
                theirs.update_many(keys[:count], np.full(count, turn, "u8"))
                made += count
            for key in range(500):
                theirs.update(key, turn)
                with suppress(KeyExists):
                    theirs.update(key, turn, UpdateFlag.NOEXIST)
                made += 1
                refused += 1
            theirs.delete_many(keys[5_500:])
            made += 500
        with pytest.raises(PartialBatch) as stopped:
            theirs.update_many(keys + 5_000, np.full(6_000, 99, "u8"))
        # 500 of these keys were there, and 2,500 found room; the one behind them was refused.
        assert stopped.value.applied == 3_000
        return made + 3_000, refused + 1

    with (
        Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8_000, name="watched") as table,
        Watch(table, pull_s=PULL_S) as watch,
    ):
        known: dict[int, int] = {}
        events: list[MapEvent] = []
        with Child(functools.partial(write, table.id)) as child:
            while not child.ended():
                events += watch.poll(0.05)
            made, refused = child.result()
        events += collected(watch, 0) + watch.end()
        assert watch.seen + watch.refused + watch.dropped == made + refused
        assert watch.refused <= refused
        told = [one for one in events if one.what in ("update", "delete")]
        assert len(told) == watch.seen + watch.refused
        # A batch of 6,000 is longer than what bpf(2)'s hook tells of; fexit has each element.
        assert watch.dropped > 0 or watch.mechanism == "functions"
        for one in events:
            if not one.error:
                known[int(one.key)] = -1 if one.value is None else int(one.value)
        # What was dropped is found by reading: the last word on each key is what the map holds.
        snapshot = table.snapshot()
        there = {key: value for key, value in known.items() if value >= 0}
        assert there == dict(zip(snapshot.keys.tolist(), snapshot.values.tolist(), strict=True))


def test_a_batch_of_thousands_is_told_whole_and_a_longer_one_is_found() -> None:
    with (
        Map.create(MapKind.HASH, key="u4", value="u8", max_entries=9_000, name="watched") as table,
        Watch(table, pull_s=PULL_S) as watch,
    ):
        table.update_many(np.arange(1_800, dtype="u4"), np.ones(1_800, "u8"))
        assert len(collected(watch, 1_800)) == watch.seen == 1_800
        assert watch.dropped == 0
        table.update_many(np.arange(9_000, dtype="u4"), np.full(9_000, 2, "u8"))
        found = collected(watch, 9_000)
        assert watch.seen + watch.dropped == 1_800 + 9_000
        assert watch.seen + watch.found == 1_800 + 9_000
        assert watch.mechanism == "functions" or watch.found > 0
        assert sorted(int(one.key) for one in found) == list(range(9_000))
        assert all(0 < one.after_ns < one.at_ns for one in found if one.what == "found")


def test_a_batch_that_never_began_is_refused_and_one_in_doubt_counts_as_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace_hook, "best_mechanism", lambda: "syscalls")
    prefix = np.dtype([("length", "u4"), ("bits", "u4")])
    count, keys = ctypes.c_uint32(4), np.array([(32, 1), (32, 2), (33, 3), (32, 4)], prefix)
    values, lib = np.arange(4, dtype="u8"), libbpf.api()
    with (
        Map.create(
            MapKind.LPM_TRIE, key=prefix, value="u8", max_entries=8, flags=MapFlag.NO_PREALLOC
        ) as table,
        Watch(table, pull_s=PULL_S) as watch,
    ):
        for options in (libbpf.BatchOpts(elem_flags=1), libbpf.BatchOpts()):
            assert lib.bpf_map_update_batch(
                table.fd, keys.ctypes.data, values.ctypes.data, ctypes.byref(count),
                ctypes.byref(options),
            ) == -errno.EINVAL  # fmt: skip
        events = collected(watch, 4)
        assert count.value == 2
        told = [(one.what, one.error, one.key is None) for one in events if one.error]
        assert told == [("update", "EINVAL", False), ("update", "EINVAL", True)]
        assert sorted(int(one.value) for one in events if one.what == "found") == [0, 1]
        assert (watch.seen, watch.refused, watch.dropped) == (0, 2, 2)


@pytest.mark.parametrize("kind", [MapKind.ARRAY_OF_MAPS, MapKind.HASH_OF_MAPS, MapKind.PROG_ARRAY])
def test_what_a_map_of_objects_is_switched_to_is_told_by_its_id(kind: MapKind) -> None:
    with ExitStack() as stack:
        inner = [
            stack.enter_context(Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=1))
            for _ in range(2)
        ]
        put: list[Any] = list(inner)
        if kind is MapKind.PROG_ARRAY:
            unit = stack.enter_context(
                programs.load("ignored_answers", TABLE_FD=inner[0].fd, KEYS=1)
            )
            put = [unit.program("store"), unit.program("store")]
        outer = stack.enter_context(
            Map.create(
                kind, key="u4", value="u4", max_entries=4,
                inner=None if kind is MapKind.PROG_ARRAY else inner[0],
            )
        )  # fmt: skip
        watch = stack.enter_context(Watch(outer, pull_s=PULL_S))
        outer.update(1, put[0].fd)
        outer.update(1, put[1].fd)
        outer.delete(1)
        with pytest.raises(MapError):
            outer.delete(3)
        events = collected(watch, 4)
        first, second = put[0].id, put[1].id
        assert [(one.what, one.key, one.value, one.old, one.error) for one in events] == [
            ("update", 1, first, None, ""),
            ("update", 1, second, first, ""),
            ("delete", 1, None, second, ""),
            ("delete", 3, None, None, "ENOENT"),
        ]


@pytest.mark.parametrize(
    ("kind", "key", "room", "error"),
    [
        (MapKind.LPM_TRIE, np.dtype([("bits", "u4"), ("ip", "u1", (4,))]), 2, "ENOSPC"),
        (MapKind.PERCPU_HASH, np.dtype("u4"), 2, "E2BIG"),
        (MapKind.ARRAY, np.dtype("u4"), 2, "E2BIG"),
    ],
)
def test_each_kind_says_that_it_is_full(
    kind: MapKind, key: np.dtype[Any], room: int, error: str
) -> None:
    flags = MapFlag.NO_PREALLOC if kind is MapKind.LPM_TRIE else MapFlag.NONE
    with (
        Map.create(kind, key=key, value="u8", max_entries=room, flags=flags) as full,
        Watch(full, pull_s=PULL_S) as watch,
    ):
        for i in range(room):
            full.update((24, [10, 0, i, 0]) if key.names else i, 1)
        with pytest.raises(MapError):
            full.update((24, [10, 9, 9, 0]) if key.names else room, 1)
        assert [one.error for one in collected(watch, 3)] == ["", "", error]


def test_a_queue_has_no_keys() -> None:
    with Map.create(MapKind.QUEUE, key=None, value="u8", max_entries=1) as queue:
        lib, value = libbpf.api(), ctypes.c_uint64(5)
        with Watch(queue, pull_s=PULL_S) as watch:
            assert list(watch.unread) == [queue.id]
            for _ in range(2):
                lib.bpf_map_update_elem(queue.fd, None, ctypes.byref(value), 0)
            for _ in range(2):
                lib.bpf_map_lookup_and_delete_elem_flags(queue.fd, None, ctypes.byref(value), 0)
            assert [(one.what, one.key, one.value, one.old, one.error) for one in
                    collected(watch, 4)] == [
                ("update", None, 5, None, ""), ("update", None, 5, None, "E2BIG"),
                ("delete", None, None, 5, ""), ("delete", None, None, None, "ENOENT"),
            ]  # fmt: skip


def test_a_watch_keeps_no_map_alive() -> None:
    with (
        Map.create(MapKind.HASH, key="u4", value="u8", max_entries=4) as table,
        Watch(table, pull_s=PULL_S) as watch,
    ):
        table.update(1, 1)
        table.close()
        assert len(collected(watch, 1)) == 1
        assert watch.unread == {table.id: "it is gone"}
        assert watch.end() == []


def test_a_socket_that_goes_is_found_to_be_gone() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        Map.create(MapKind.SOCKMAP, key="u4", value="u8", max_entries=2) as sockets,
        Watch(sockets, pull_s=PULL_S) as watch,
    ):
        sockets.update(1, client.fileno())
        (told,) = collected(watch, 1)  # and the socket's cookie, which is read, is no other change
        assert (told.what, told.key, told.value) == ("update", 1, None)
        client.close()
        (gone,) = collected(watch, 1)
        assert (gone.what, gone.key, watch.found) == ("gone", 1, 1)


def test_several_maps_of_different_layouts_are_watched_at_once(table: Map) -> None:
    layout = np.dtype([("a", "u8"), ("b", "u8"), ("c", "u4"), ("d", "u4")])
    with (
        Map.create(MapKind.ARRAY, key="u4", value=layout, max_entries=4, name="other") as other,
        Map.create(MapKind.HASH, key="u8", value="u2", max_entries=4, name="third") as third,
        Map.create(MapKind.HASH, key="u8", value="u2", max_entries=4, name="unwatched") as fourth,
        Watch(table, other, third, pull_s=PULL_S) as watch,
    ):
        table.update(1, 10)
        other.update(2, (1, 2, 3, 4))
        fourth.update(1 << 40, 1)
        third.update(1 << 40, 7)
        third.delete(1 << 40)
        assert [
            (one.map_id, one.what, int(one.key), None if one.value is None else one.value.tolist())
            for one in collected(watch, 4)
        ] == [
            (table.id, "update", 1, 10), (other.id, "update", 2, (1, 2, 3, 4)),
            (third.id, "update", 1 << 40, 7), (third.id, "delete", 1 << 40, None),
        ]  # fmt: skip


def test_all_maps_are_watched_without_payload(table: Map) -> None:
    with (
        Watch() as watch,
        Map.create(MapKind.HASH, key="u4", value="u8", max_entries=1, name="younger") as young,
    ):
        young.update(1, 1)
        with pytest.raises(MapFull):
            young.update(2, 1)
        table.update(5, 5)
        told = [
            one
            for one in watch.poll(5) + watch.end()
            if one.writer is not None and one.writer.pid == os.getpid()
        ]
        assert [(one.map_id, one.what, one.key, one.error) for one in told] == [
            (young.id, "update", None, ""), (young.id, "update", None, "E2BIG"),
            (table.id, "update", None, ""),
        ]  # fmt: skip


def test_a_name_of_several_maps_is_refused_with_who_holds_them() -> None:
    name = f"twins{os.getpid()}"  # nobody else's

    def made() -> Map:
        return Map.create(MapKind.HASH, key="u4", value="u8", max_entries=1, name=name)

    with made() as one, made() as twin:
        with pytest.raises(BadInput) as refused:
            which_maps([name])
        sentence = str(refused.value)
        assert sentence.startswith(f"2 maps are called {name!r}, name one by its id: ")
        for each in (one, twin):
            held = rf"\b{each.id} \(hash, held by \S+\[{os.getpid()}\], age unknown"
            assert re.search(held, sentence)
        assert which_maps([str(twin.id), str(one.id), str(twin.id)]) == [twin.id, one.id]
        with programs.load("ignored_answers", TABLE_FD=one.fd, KEYS=1) as unit:
            store = unit.program("store")
            assert one.id in which_maps([], store.id)
            with pytest.raises(BadInput, match=rf"{one.id} \(hash, [^;]*at least \d+ s old"):
                which_maps([name])
    with pytest.raises(BadInput, match="no program with id"):
        which_maps([], store.id)


@pytest.mark.parametrize("payload", [True, False])
def test_the_verifier_accepts_the_program_of_each_function(payload: bool) -> None:
    """Also where this kernel lets nobody attach there, which it says with EPERM in the end."""
    rooms = {"KEY_ROOM": 4, "VALUE_ROOM": 16} if payload else {"KEY_ROOM": 0, "VALUE_ROOM": 0}
    constants = {
        **trace_hook.way_to_map(), **rooms, "PROG_AUX_AT": 0, "AUX_ID_AT": 0, "MAP_TYPE_AT": 0,
        "WITH_STACK": 1,
    }  # fmt: skip
    functions = {name: to for each in watch_hooks.FUNCTIONS.values() for name, to in each.items()}
    with (
        Channel.create(4096, programs=2) as channel,
        Map.create(MapKind.HASH, key="u4", value=watch_hooks.TARGET, max_entries=1) as targets,
        programs.load(
            "watch_functions",
            **constants,
            **({"TARGETS_FD": targets.fd} if payload else {}),
            RING_FD=channel.ring.fd,
            COUNTS_FD=channel.counts.fd,
        ) as unit,
    ):
        said = {}
        for program in dict.fromkeys(functions.values()):
            name = next(name for name, to in functions.items() if to == program)
            try:
                unit.program(program, hook=f"fexit:{name}")
            except LoadFailed as error:
                said[program] = str(error)
    assert all(words.endswith(": EPERM.") for words in said.values()), said


@pytest.mark.outside_vm("starts the command anew, and asks nothing else of the kernel")
def test_what_the_command_counts_it_has_shown_even_where_sigint_was_ignored(table: Map) -> None:
    command = [sys.executable, "-m", "labkit", "watch", str(table.id)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    ) as process:  # fmt: skip
        assert process.stderr is not None and process.stdout is not None
        assert "Watching" in process.stderr.readline()
        stop = time.monotonic() + 0.5
        while time.monotonic() < stop:
            for version in range(1_000):
                table.update(version % 8, version)
        process.send_signal(signal.SIGINT)
        shown, said = process.communicate(timeout=60)
        assert process.returncode == 0
    told = int(re.findall(r"([\d,]+) changes were told", said)[0].replace(",", ""))
    assert told > 0 and shown.count("  update  ") == told
    assert "Traceback" not in said


@pytest.mark.outside_vm("starts the command anew, and asks nothing else of the kernel")
def test_the_command_shows_lines_and_ends_by_ctrl_c(table: Map) -> None:
    command = [sys.executable, "-m", "labkit", "watch", str(table.id)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        assert "Watching <Map watched" in process.stderr.readline()
        table.update(80, 443)
        line = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        moment = r"\d\d:\d\d:\d\d\.\d{6}[+-]\d\d:\d\d"
        who = rf"\S+\[{os.getpid()}\]"
        assert re.fullmatch(rf"{moment}  update  80 = 443 \(new\)  by {who}\n", line), line
        assert "1 changes were told by hooks, 0 were dropped" in process.stderr.read()


@pytest.mark.outside_vm("starts the command anew, and asks nothing else of the kernel")
def test_the_command_writes_what_is_asked_for(table: Map, tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    ask = [sys.executable, "-m", "labkit", "watch"]

    def watched(*more: str) -> tuple[str, str]:
        with subprocess.Popen(
            [*ask, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            assert "Watching" in process.stderr.readline()
            for value in range(3):
                table.update(1, value)
                table.update(2, value)
            process.send_signal(signal.SIGINT)
            shown, said = process.communicate(timeout=60)
            assert process.returncode == 0
        return shown, said

    shown, said = watched(str(table.id), "--json", "--key", "2")
    assert [json.loads(line)["value"] for line in shown.splitlines()] == [0, 1, 2]
    assert "6 changes were told" in said and "3 of these 6 met the filters" in said
    shown, said = watched("--all", "--kind", "update", "--pid", str(os.getpid()))
    assert shown.count(f"watched id {table.id}  update  by ") == len(shown.splitlines()) == 6
    assert watched(str(table.id), "--parquet", str(path))[0] == ""
    assert path.stat().st_size > 0
    for wrong in (
        [],
        ["--all", "1"],
        ["1", "--program", "1"],
        [str(table.id), "--parquet", "/x/y"],
    ):
        done = subprocess.run([*ask, *wrong], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


@pytest.mark.outside_vm("starts the command anew, and asks nothing else of the kernel")
def test_nothing_is_left_of_a_watch_that_is_killed(table: Map, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "labkit", "watch", str(table.id)]
    with subprocess.Popen(
        [*command, "--parquet", str(tmp_path / "events.parquet")],
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert "Watching" in process.stderr.readline()
        table.update(1, 1)
        process.kill()
    assert list(tmp_path.iterdir()) == []  # and conftest.py looks for maps, programs and links


@pytest.mark.outside_vm("starts the command anew, and asks nothing else of the kernel")
def test_who_may_have_written_what_was_found_is_said() -> None:
    with programs.load("lost_updates", INCREMENTS=1) as unit:
        increment = unit.program("plain_increment")
        command = [sys.executable, "-m", "labkit", "watch", str(unit.map("counter").id)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            assert "invisible" in process.stderr.readline()
            increment.test_run()
            process.send_signal(signal.SIGINT)
            shown, said = process.communicate(timeout=60)
    assert re.search(r"found   0 = \d+ \(was 0\)  after ", shown)
    assert f"may have been written by program {increment.id} {increment.name}." in said


def test_items_of_any_layout_are_words() -> None:
    layout = np.dtype([("port", "u2"), ("address", "V4"), ("rates", "u4", (2,))])
    item = np.array([(80, b"\x0a\x00\x00\x01", [1, 2])], layout)[0]
    assert in_words(item) == "{port: 80, address: 0a000001, rates: [1, 2]}"
    assert in_words(np.uint64(7)) == "7"


def test_items_are_shown_as_they_are_asked_for() -> None:
    address = np.frombuffer(bytes([10, 0, 0, 1]), "u4")[0]
    assert shown_as(address, "ip") == "10.0.0.1"
    assert shown_as(address, "hex") == "0a 00 00 01"
    layout = np.dtype([("ip", "u4"), ("port", "u2")])
    assert shown_as(np.array([(address, 80)], layout)[0], "ip") == "{ip: 10.0.0.1, port: 80}"
    name = np.frombuffer(b"eth0".ljust(16, b"\0"), "i1")
    assert in_words(name) == '"eth0"'
    assert in_words(np.frombuffer(b"eth0\0x", "i1")) == "[101, 116, 104, 48, 0, 120]"
    assert shown_as(np.frombuffer(b"e\n\0\xff", "V4")[0], "text") == "e\\n"


def test_events_are_filtered_and_written_as_json_and_parquet(
    table: Map, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "events.parquet"
    with Watch(table, pull_s=PULL_S) as watch:
        table.update(1, 10)
        table.update(1, 11)
        with pytest.raises(KeyExists):
            table.update(1, 12, UpdateFlag.NOEXIST)
        table.delete(1)
        table.update(2, 20)
        events = collected(watch, 5)
    assert len(Wanted(keys=frozenset({"2"})).of(events)) == 1
    assert len(Wanted(keys=frozenset({"0x01000000"})).of(events)) == 4
    assert len(Wanted(keys=frozenset({"2.0.0.0"}), shown="ip").of(events)) == 1
    assert [one.error for one in Wanted(kinds=frozenset({"refused"})).of(events)] == ["EEXIST"]
    assert len(Wanted(pids=frozenset({os.getpid()})).of(events)) == 5
    assert Wanted(pids=frozenset({1})).of(events) == []
    with Output(as_json=True) as out:
        assert out.write(events) == 5
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["what"], one["key"], one["value"], one["old"], one["error"]) for one in lines] == [
        ("update", 1, 10, None, None), ("update", 1, 11, 10, None), ("update", 1, 12, 11, "EEXIST"),
        ("delete", 1, None, 11, None), ("update", 2, 20, None, None),
    ]  # fmt: skip
    assert {one["pid"] for one in lines} == {os.getpid()}
    assert all(re.search(r"[+-]\d\d:\d\d$", one["time"]) for one in lines)
    with Output() as out:
        out.write(events)
    shown = [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert [line.partition("  by ")[0] for line in shown] == [
        "update  1 = 10 (new)", "update  1 = 11 (was 10)",
        "update  1 = 12 refused: EEXIST (last seen 11)", "delete  1 (was 11)",
        "update  2 = 20 (new)",
    ]  # fmt: skip
    with Output(parquet=path) as out:
        out.write(events)
        assert not path.exists()
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    from pyarrow.parquet import read_table

    rows = read_table(path).to_pylist()
    assert [(one["what"], one["key"], one["value"], one["error"]) for one in rows][2:4] == [
        ("update", "1", "12", "EEXIST"), ("delete", "1", None, None),
    ]  # fmt: skip
    with pytest.raises(BadInput, match="One of btf, hex, ip, text is meant, not 'octal'"):
        Output(keys="octal")
    with pytest.raises(BadInput, match="not 'written'"):
        Wanted(kinds=frozenset({"written"}))
    with pytest.raises(BadInput, match="cannot be written"):
        Output(parquet=tmp_path / "missing" / "events.parquet")
