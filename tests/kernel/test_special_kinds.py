"""Every kind of map says what is in it, or what nobody sees; none ends in a traceback."""

from __future__ import annotations

import ctypes
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from labkit.inspect import code, content, kinds
from labkit.inspect.diagnose import Diagnosis, diagnose
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import MapFlag, MapKind, ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.programs import Program

pytestmark = pytest.mark.usefixtures("kernel")

CREATED = {
    MapKind.LPM_TRIE: (8, 8, 4, 1, "0 of 4 entries"),
    MapKind.ARRAY: (4, 8, 4, 0, "4 of 4 entries"),
    MapKind.PERCPU_ARRAY: (4, 3, 4, 0, "its slot takes 8 bytes for each CPU"),
    MapKind.PERCPU_HASH: (4, 8, 4, 0, "0 of 4 entries"),
    MapKind.LRU_PERCPU_HASH: (4, 8, 4, 0, "It is small, 4 entries for"),
    MapKind.PROG_ARRAY: (4, 4, 4, 0, "It is empty: none of its 4 indices holds a program"),
    MapKind.PERF_EVENT_ARRAY: (4, 4, 4, 0, "which events stand in it"),
    MapKind.STACK_TRACE: (4, 1016, 4, 0, "0 of 4 buckets"),
    MapKind.CGROUP_ARRAY: (4, 4, 4, 0, "which cgroups stand in it"),
    MapKind.DEVMAP: (4, 4, 4, 0, "0 of 4 entries"),
    MapKind.DEVMAP_HASH: (4, 8, 4, 0, "0 of 4 entries"),
    MapKind.CPUMAP: (4, 4, 4, 0, "0 of 4 entries"),
    MapKind.XSKMAP: (4, 4, 4, 0, "which sockets stand in it"),
    MapKind.SOCKMAP: (4, 8, 4, 0, "0 of 4 entries"),
    MapKind.SOCKHASH: (4, 8, 4, 0, "0 of 4 entries"),
    MapKind.REUSEPORT_SOCKARRAY: (4, 8, 4, 0, "0 of 4 entries"),
    MapKind.CGROUP_STORAGE: (8, 8, 0, 0, "0 cgroups, no fixed room"),
    MapKind.PERCPU_CGROUP_STORAGE: (8, 8, 0, 0, "0 cgroups, no fixed room"),
    MapKind.QUEUE: (0, 8, 4, 0, "nothing waits"),
    MapKind.STACK: (0, 8, 4, 0, "nothing waits"),
    MapKind.SK_STORAGE: (4, 4, 0, 1, "stands at its socket"),
    MapKind.INODE_STORAGE: (4, 4, 0, 1, "stands at its inode"),
    MapKind.TASK_STORAGE: (4, 4, 0, 1, "stands at its task"),
    MapKind.CGRP_STORAGE: (4, 4, 0, 1, "stands at its cgroup"),
    MapKind.RINGBUF: (0, 0, 4096, 0, "0 of 4,096 bytes"),
    MapKind.USER_RINGBUF: (0, 0, 4096, 0, "0 of 4,096 bytes"),
    MapKind.BLOOM_FILTER: (0, 8, 4, 0, "what was put in"),
    MapKind.ARENA: (0, 0, 4, int(MapFlag.MMAPABLE), "its memory: to read a page"),
}
WITH_BTF = {
    MapKind.SK_STORAGE, MapKind.INODE_STORAGE, MapKind.TASK_STORAGE, MapKind.CGRP_STORAGE,
}  # fmt: skip


def one_integer() -> bytes:
    """BTF of one type, a u32."""
    types, names = struct.pack("=IIII", 1, 1 << 24, 4, 32), b"\0u32\0"
    ends = (0, len(types), len(types), len(names))
    return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, *ends) + types + names


@contextmanager
def created(kind: MapKind, more: int = 0) -> Iterator[Map]:
    key, value, room, flags, _ = CREATED[kind]
    types = libbpf.btf_load(one_integer()) if kind in WITH_BTF else -1
    try:
        fd = libbpf.map_create(
            kind, name="labkit_kind", key_size=key, value_size=value, max_entries=room,
            flags=flags | more, btf=(types, 1, 1) if kind in WITH_BTF else None,
        )  # fmt: skip
    except OSError as error:
        pytest.skip(f"this kernel lacks maps of type {kind.name}: {error}")
    finally:
        libbpf.close(types)
    with Map(fd) as table:
        yield table


def told(table: Map) -> tuple[Diagnosis, str]:
    (found,) = diagnose(str(table.id))
    return found, re.sub(r"\s+", " ", str(found))


@pytest.mark.parametrize("kind", CREATED, ids=lambda kind: kind.name.lower())
def test_each_kind_says_what_is_in_it_or_what_nobody_sees(kind: MapKind) -> None:
    with created(kind) as table:
        found, text = told(table)
        assert CREATED[kind][-1] in text
        assert "checked its type" in text
        assert not found.has_cause
        assert found.as_json()["checked"]


def cause(found: Diagnosis, words: str) -> bool:
    """Whether a cause says this; that a program runs nowhere is another one."""
    return any(words in one.says for one in found.diagnostics if one.weight == "cause")


def instruction(code: int, target: int = 0, source: int = 0, offset: int = 0, by: int = 0) -> bytes:
    return struct.pack("=BBhi", code, target | source << 4, offset, by)


def map_in(register: int, table: Map) -> bytes:
    return instruction(0x18, register, 1, 0, table.fd) + instruction(0)


@contextmanager
def loaded(kind: ProgramKind, *body: bytes) -> Iterator[int]:
    """A program of these instructions, which answers 0."""
    code = b"".join([*body, instruction(0xB7), instruction(0x95)])
    fd = libbpf.prog_load(kind, code, name="labkit_kinds")
    try:
        yield fd
    finally:
        libbpf.close(fd)


def tail_call(table: Map) -> tuple[bytes, ...]:
    return map_in(2, table), instruction(0xB7, 3), instruction(0x85, by=12)


def test_a_program_array_loses_its_programs_with_its_last_holder() -> None:
    with created(MapKind.PROG_ARRAY) as table, loaded(
        ProgramKind.RAW_TRACEPOINT, *tail_call(table)
    ), loaded(ProgramKind.RAW_TRACEPOINT) as target:  # fmt: skip
        table.update(2, target)
        found, text = told(table)
        assert "1 of 4 entries" in text and re.search(r"2: program \d+ labkit_kinds", text)
        assert "takes programs of type raw_tracepoint alone" in text
        assert not cause(found, "It is empty")
        assert "jumps to index 0 (instruction" in text
        table.delete(2)
        assert "another one is answered EINVAL" in told(table)[1]
        table.update(2, target)
        map_id = table.id
        table.close()
        # Whoever opens it before the kernel has cleared it disturbs that, and whoever looks at all
        # maps of the machine holds it for that moment.
        for _ in range(20):
            time.sleep(0.5)
            (found,) = diagnose(str(map_id))
            if cause(found, "It is empty"):
                break
        assert cause(found, "neither a process nor a pin in sight holds it")


def test_a_map_of_devices_says_which_and_an_empty_one_is_a_cause() -> None:
    with created(MapKind.DEVMAP) as table:
        redirect = (map_in(1, table), instruction(0xB7, 2), instruction(0xB7, 3))
        with loaded(ProgramKind.XDP, *redirect, instruction(0x85, by=51)):
            table.update(1, socket.if_nametoindex("lo"))
            found, text = told(table)
            assert "1: ifindex 1 (lo here)" in text and "1 of 4 entries" in text
            assert not cause(found, "It is empty")
            table.delete(1)
            assert cause(told(table)[0], "none of its 4 entries is a device")


GONE = """
import struct
import subprocess
from socket import if_nametoindex

from labkit.inspect.diagnose import diagnose
from labkit.kernel import libbpf
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.network import ENDS, enter_own_network
from labkit.kernel.tools import find_tool


def instruction(code, target=0, source=0, by=0):
    return struct.pack("=BBhi", code, target | source << 4, 0, by)


enter_own_network()
table = Map.create(MapKind.DEVMAP_HASH, key="u4", value="u4", max_entries=4, name="labkit_tx")
redirect = [
    instruction(0x18, 1, 1, table.fd), instruction(0), instruction(0xB7, 2),
    instruction(0xB7, 3), instruction(0x85, by=51), instruction(0x95),
]
program = libbpf.prog_load(ProgramKind.XDP, b"".join(redirect), name="labkit_tx")
table.update(7, if_nametoindex(ENDS[0]))
(before,) = diagnose(str(table.id))
subprocess.run([find_tool("ip"), "link", "del", ENDS[0]], check=True)
(after,) = diagnose(str(table.id))
assert f"({ENDS[0]} here)" in str(before), before
empty = "none of its 4 entries is a device"
assert empty not in " ".join(str(before).split()), before
assert after.has_cause and empty in " ".join(str(after).split()), after
"""


def test_a_device_that_is_deleted_leaves_its_map() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GONE], capture_output=True, text=True, timeout=60, check=False
    )
    if "Unavailable" in done.stderr:
        pytest.skip(f"this kernel lacks veth: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def test_a_ring_that_nobody_reads_is_full_and_one_that_waits_is_not() -> None:
    with created(MapKind.RINGBUF) as ring, loaded(
        ProgramKind.TC,
        instruction(0x7A, 10, 0, -8),  # eight bytes of the stack, to be sent
        map_in(1, ring), instruction(0xBF, 2, 10), instruction(0x07, 2, by=-8),
        instruction(0xB7, 3, by=8), instruction(0xB7, 4), instruction(0x85, by=130),
    ) as fd:  # fmt: skip
        send = Program("labkit_kinds", ProgramKind.TC, fd)
        send.test_run(repeat=1)
        found, text = told(ring)
        assert not cause(found, "It is full") and "did not move for 0.2 s" in text
        if code._functions():
            assert "of its 1 calls that write to this map: output at instruction" in text
        send.test_run(repeat=300)
        found, text = told(ring)
        assert cause(found, "It is full, 4,080 of 4,096 bytes")
        assert cause(found, "its consumer did not move")
        inside = kinds.look(ring)
        assert inside.ring is not None and inside.ring.consumer == (0, 0)  # a look takes nothing
        assert (inside.ring.records, inside.ring.largest) == (255, 16)


def test_a_full_trie_answers_enospc_and_a_full_hash_e2big() -> None:
    with created(MapKind.LPM_TRIE) as trie:
        for address in range(4):
            trie.update(struct.pack("=II", 32, address), 1)
        found, text = told(trie)
        assert found.has_cause and "answered ENOSPC" in text and "E2BIG" not in text
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=20) as table:
        for key in range(19):
            table.update(key, key)
        found, text = told(table)
        assert "almost full: 19 of 20 entries" in text and not found.has_cause
        table.update(19, 19)
        assert "answered E2BIG" in told(table)[1]


def test_a_queue_shows_that_something_waits_and_keeps_it() -> None:
    with created(MapKind.QUEUE) as table:
        value = ctypes.create_string_buffer(8)
        assert libbpf.api().bpf_map_update_elem(table.fd, None, value, 0) == 0
        for _ in range(2):
            assert "an element waits" in told(table)[1]


def test_sockets_and_stacks_are_counted() -> None:
    with created(MapKind.SOCKHASH) as table, socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
        table.update(7, client.fileno())
        assert "1 of 4 entries" in told(table)[1]


def struct_of_text() -> tuple[bytes, int, int]:
    """BTF of ``struct { char name[8]; __u32 dev; }``, and the ids of it and of its number."""
    names = b"\0char\0u32\0name\0dev\0key\0"
    at = {word: names.index(b"\0" + word.encode() + b"\0") + 1
          for word in ("char", "u32", "name", "dev", "key")}  # fmt: skip
    types = b"".join(
        struct.pack(f"={len(words)}I", *words)
        for words in (
            (at["char"], 1 << 24, 1, 1 << 24 | 8),
            (at["u32"], 1 << 24, 4, 32),
            (0, 3 << 24, 0, 1, 2, 8),
            (at["key"], 4 << 24 | 2, 12, at["name"], 3, 0, at["dev"], 2, 64),
        )
    )
    ends = (0, len(types), len(types), len(names))
    return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, *ends) + types + names, 4, 2


def test_left_over_bytes_behind_the_text_of_a_key_are_found_by_its_btf() -> None:
    raw, key, value = struct_of_text()
    types = libbpf.btf_load(raw)
    try:
        fd = libbpf.map_create(
            MapKind.HASH, name="labkit_text", key_size=12, value_size=4, max_entries=64,
            btf=(types, key, value),
        )  # fmt: skip
    finally:
        libbpf.close(types)
    with Map(fd) as table:
        number = struct.pack("=I", 8)
        for name in (b"eth0", b"eth1", b"eth0\0"):
            table.update(name.ljust(8, b"\0") + number, 1)
        assert "padded-key" not in {one.experiment for one in told(table)[0].diagnostics}
        table.update(b"eth0\0ab\0" + number, 1)
        found, text = told(table)
        assert found.has_cause
        assert "1 of 3 keys have left-over bytes behind the NUL of the text name (char[8])" in text
        assert "'eth0' is there 2 times" in text


def test_the_content_of_a_large_map_is_read_in_part_and_counted_whole() -> None:
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=100_000) as table:
        keys = np.arange(70_000, dtype=np.uint32)
        table.update_many(keys, keys)
        found = content.read(table)
        assert (len(found.snapshot), found.counted, found.whole) == (65_536, 70_000, True)
        assert not found.snapshot.complete
        assert (found.snapshot.keys == found.snapshot.values).all()
        assert "70,000 of 100,000 entries" in told(table)[1]
        some = content.read(table, most_entries=10, most_seconds=0)
        assert 0 < len(some.snapshot) <= 10 and not some.whole


def test_reading_an_lru_map_does_not_keep_what_was_read() -> None:
    # Were an element marked as used by a look, what was looked at would outlive the rest.
    with Map.create(MapKind.LRU_HASH, key="u4", value="u8", max_entries=2048) as table:

        def gone(look: bool) -> int:
            table.delete_many(table.snapshot().keys)
            keys = np.arange(1024, dtype=np.uint32)
            table.update_many(keys, keys)
            if look:
                content.read(table)
            later = np.arange(10_000, 11_700, dtype=np.uint32)
            table.update_many(later, later)
            return int((table.snapshot().keys < 1024).sum())

        before, after = gone(False), gone(True)
        assert abs(before - after) <= 256  # two stocks of a CPU


def test_what_programs_do_is_read_from_their_instructions() -> None:
    if not code._functions():
        pytest.skip("this kernel lacks addresses in /proc/kallsyms")
    with programs.load("lost_updates", INCREMENTS=1) as unit:
        ids = {name: unit.program(name).id for name in (
            "plain_increment", "atomic_add", "look_up_only", "per_cpu_increment")}  # fmt: skip
        found, text = told(unit.map("counter"))
        assert f"Program {ids['plain_increment']} plain_increment increments a value" in text
        assert not any(f"{ids[name]} {name} increments" in text for name in (
            "atomic_add", "look_up_only"))  # fmt: skip
        assert "lost-updates" in {one.experiment for one in found.diagnostics}
        per_cpu, _ = told(unit.map("counter_per_cpu"))
        assert "lost-updates" not in {one.experiment for one in per_cpu.diagnostics}


def test_an_addition_under_the_lock_is_none_that_gets_lost() -> None:
    with programs.load("lost_updates", INCREMENTS=1) as unit:
        unit.program("locked_increment")
        found, _ = told(unit.map("counter_locked"))
        assert "lost-updates" not in {one.experiment for one in found.diagnostics}


def test_a_program_deletes_from_an_array_and_ignores_the_answer_of_a_hash() -> None:
    if not code._functions():
        pytest.skip("this kernel lacks addresses in /proc/kallsyms")
    key = (instruction(0x62, 10, 0, -4), instruction(0xBF, 2, 10), instruction(0x07, 2, by=-4))
    with created(MapKind.ARRAY) as array, Map.create(
        MapKind.HASH, key="u4", value="u4", max_entries=8
    ) as table, loaded(
        ProgramKind.RAW_TRACEPOINT,
        *key, map_in(1, array), instruction(0x85, by=3),
        *key, instruction(0xBF, 3, 10), instruction(0x07, 3, by=-4), instruction(0xB7, 4),
        map_in(1, table), instruction(0x85, by=2),
    ):  # fmt: skip
        assert "the delete is answered EINVAL and the old value stays" in told(array)[1]
        assert "throws away the answer of 1 of its 1 calls that write" in told(table)[1]
