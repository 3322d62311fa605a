"""The graph of maps, programs and links, on the kernel that runs here."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from labkit.kernel import libbpf, objects, tools, trials
from labkit.kernel.attachments import Standing, survey
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.objects import Objects, difference, family, snapshot
from labkit.kernel.parallel import Child
from labkit.kernel.perf_events import perf_event
from labkit.kernel.pins import PinFolder

RETURN_ZERO = bytes([0xB7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0])
FREED_WITHIN_S = 10.0


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def make_map(
    closing: ExitStack, name: str, kind: MapKind = MapKind.ARRAY, inner_fd: int | None = None
) -> int:
    fd = libbpf.map_create(
        kind,
        name=name,
        key_size=4,
        value_size=8 if inner_fd is None else 4,
        max_entries=2,
        inner_fd=inner_fd,
    )
    closing.callback(libbpf.close, fd)
    return fd


def close_unseen(program_array: int) -> None:
    """Close it, and wait until it is gone without a look at it, which might keep it: `snapshot`."""
    identifier = libbpf.map_info(program_array).id
    libbpf.close(program_array)
    deadline = time.monotonic() + FREED_WITHIN_S
    while identifier in libbpf.ids("map") and time.monotonic() < deadline:
        time.sleep(0.005)


def make_program(closing: ExitStack, map_fd: int | None = None) -> int:
    # BPF_LD_MAP_FD into r1 makes the program refer to the map.
    load_map = b"" if map_fd is None else b"\x18\x11\0\0" + map_fd.to_bytes(4, "little") + bytes(8)
    fd = libbpf.prog_load(ProgramKind.RAW_TRACEPOINT, load_map + RETURN_ZERO, name="labkit_obj")
    closing.callback(libbpf.close, fd)
    return fd


def put(outer: int, index: int, fd: int) -> None:
    key, value = ctypes.c_uint32(index), ctypes.c_uint32(fd)
    result = libbpf.api().bpf_map_update_elem(outer, ctypes.byref(key), ctypes.byref(value), 0)
    libbpf.checked(result, "placing an element")


def ours(before: Objects) -> Objects:
    return difference(before, snapshot()).added.owned_by([os.getpid()])


def wait_until_gone(ids: set[int]) -> Objects:
    deadline = time.monotonic() + FREED_WITHIN_S
    while (now := snapshot()).maps.keys() & ids and time.monotonic() < deadline:
        time.sleep(0.02)
    return now


def test_a_map_is_listed_with_its_shape_and_its_holder(closing: ExitStack) -> None:
    before = snapshot()
    fd = make_map(closing, "labkit_one")
    found = ours(before)
    (one,) = found.maps.values()
    assert one.id == libbpf.map_info(fd).id
    assert (one.name, one.kind, one.key_size, one.value_size, one.max_entries) == (
        "labkit_one", "array", 4, 8, 2,
    )  # fmt: skip
    assert one.memlock_bytes >= 16
    assert one.pids == (os.getpid(),)
    assert not one.frozen
    assert os.getpid() in found.processes


def test_what_goes_away_is_in_the_difference() -> None:
    fd = libbpf.map_create(
        MapKind.ARRAY, name="labkit_gone", key_size=4, value_size=8, max_entries=1
    )
    identifier = libbpf.map_info(fd).id
    before = snapshot()
    os.close(fd)
    after = wait_until_gone({identifier})
    assert identifier in difference(before, after).removed.maps


def test_a_program_keeps_its_map_and_a_link_its_program() -> None:
    with ExitStack() as closing:
        before = snapshot()
        with ExitStack() as early:
            map_fd = make_map(early, "labkit_kept")
            program = make_program(early, map_fd)
            map_id, program_id = libbpf.map_info(map_fd).id, libbpf.prog_info(program).id
            link = libbpf.checked(
                libbpf.api().bpf_raw_tracepoint_open(b"sys_enter", program), "attaching"
            )
            closing.callback(libbpf.close, link)
        found = ours(before)
        assert found.programs[program_id].map_ids == (map_id,)
        assert found.programs[program_id].pids == ()
        assert map_id in found.maps and found.maps[map_id].pids == ()
        (one,) = found.links.values()
        assert (one.kind, one.program_id, one.pids) == (
            "raw_tracepoint", program_id, (os.getpid(),),
        )  # fmt: skip
        assert "sys_enter" in one.target
        assert len(found.orphans()) == 0
        assert "held through another object" in str(found)


def test_elements_of_an_outer_map_and_of_a_program_array_are_reached(closing: ExitStack) -> None:
    before = snapshot()
    with ExitStack() as early:
        inner = make_map(early, "labkit_inner")
        outer = make_map(closing, "labkit_outer", MapKind.ARRAY_OF_MAPS, inner_fd=inner)
        put(outer, 1, inner)
        program = make_program(early)
        calls = libbpf.map_create(
            MapKind.PROG_ARRAY, name="labkit_calls", key_size=4, value_size=4, max_entries=2
        )
        closing.callback(close_unseen, calls)
        put(calls, 0, program)
        inner_id, program_id = libbpf.map_info(inner).id, libbpf.prog_info(program).id
    found = ours(before)
    by_name = {one.name: one for one in found.maps.values()}
    assert by_name["labkit_outer"].map_ids == (inner_id,)
    assert by_name["labkit_outer"].elements_complete
    assert by_name["labkit_calls"].program_ids == (program_id,)
    assert inner_id in found.maps and program_id in found.programs


@pytest.mark.parametrize("kind", [MapKind.ARRAY_OF_MAPS, MapKind.HASH_OF_MAPS])
def test_all_elements_together_are_read_in_a_bounded_time(
    kind: MapKind, closing: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = make_map(closing, "labkit_inner")
    outer = make_map(closing, "labkit_outer", kind, inner_fd=inner)
    put(outer, 1, inner)
    outer_id, inner_id = libbpf.map_info(outer).id, libbpf.map_info(inner).id
    found = snapshot().maps[outer_id]
    assert found.elements_complete and found.map_ids == (inner_id,)
    monkeypatch.setattr(objects, "_FULL_READS", 0)
    assert not snapshot().maps[outer_id].elements_complete


def test_a_pin_in_a_private_bpffs_belongs_to_the_process_that_holds_it(closing: ExitStack) -> None:
    before = snapshot()
    folder = closing.enter_context(PinFolder())
    with ExitStack() as early:
        fd = make_map(early, "labkit_pinned")
        identifier = libbpf.map_info(fd).id
        libbpf.pin(fd, folder.path("policy"))
    found = ours(before)
    assert found.maps[identifier].pids == (os.getpid(),)
    assert [os.path.basename(pin) for pin in found.maps[identifier].pins] == ["policy"]


def test_a_child_is_a_holder_and_of_the_family(closing: ExitStack) -> None:
    before = snapshot()
    fd = make_map(closing, "labkit_child")
    with Child(lambda: time.sleep(30)) as child:
        assert {os.getpid(), child.pid} <= family(os.getpid())
        (one,) = difference(before, snapshot()).added.owned_by([child.pid]).maps.values()
        assert one.id == libbpf.map_info(fd).id
        assert set(one.pids) == {os.getpid(), child.pid}


def test_objects_that_vanish_meanwhile_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    vanished, read = 0, objects._read_map

    def counted(*given: Any) -> objects.MapObject | None:
        nonlocal vanished
        found = read(*given)
        vanished += found is None
        return found

    def churn() -> None:
        while True:
            with ExitStack() as closing:
                make_program(closing, make_map(closing, "labkit_churn"))

    monkeypatch.setattr(objects, "_read_map", counted)
    deadline = time.monotonic() + 60
    with Child(churn) as child:
        while vanished < 3:
            assert not child.ended() and time.monotonic() < deadline
            now = snapshot()
            assert all(one.id == identifier for identifier, one in now.maps.items())


def test_a_program_on_a_perf_event_is_attached_without_a_link(
    closing: ExitStack, require_feature: Callable[[str], None]
) -> None:
    require_feature("tracepoint")
    event = tools.tracefs_folder() / "events" / "syscalls" / "sys_enter_getppid" / "id"
    before = snapshot()
    program = libbpf.prog_load(ProgramKind.TRACEPOINT, RETURN_ZERO, name="labkit_perf")
    program_id = libbpf.prog_info(program).id
    perf = perf_event(2, int(event.read_text()))
    closing.callback(libbpf.close, perf)
    trials._run_on(perf, program)
    libbpf.close(program)
    found = ours(before)
    (attachment,) = found.perf_attachments
    assert (attachment.pid, attachment.program_id) == (os.getpid(), program_id)
    assert (attachment.kind, attachment.target) == ("tracepoint", "sys_enter_getppid")
    (place,) = survey(found).of(program_id)
    assert str(place) == "tracepoint of sys_enter_getppid"
    assert survey(found).standing(program_id) is Standing.ATTACHED
