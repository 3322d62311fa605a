"""Watching a live map: every change is shown once, whoever made it and however it was found."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from labkit.errors import BadInput
from labkit.inspect.watch import MapEvent, Watch, in_words
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map

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
        moment = r"\d\d:\d\d:\d\d\.\d{6}[+-]\d{4}"
        who = rf"\S+\[{os.getpid()}\]"
        assert re.fullmatch(rf"{moment}  update  80 = 443 \(new\)  by {who}\n", line), line
        assert "1 changes were told by hooks, 0 were dropped" in process.stderr.read()


def test_items_of_any_layout_are_words() -> None:
    layout = np.dtype([("port", "u2"), ("address", "V4"), ("rates", "u4", (2,))])
    item = np.array([(80, b"\x0a\x00\x00\x01", [1, 2])], layout)[0]
    assert in_words(item) == "{port: 80, address: 0a000001, rates: [1, 2]}"
    assert in_words(np.uint64(7)) == "7"
