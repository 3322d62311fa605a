"""Ten thousand maps, two thousand programs and a thousand pins, of a process that dies with us."""

from __future__ import annotations

import resource
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from labkit.kernel import libbpf
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.parallel import Child, shared_array
from labkit.kernel.pins import PinFolder

MAPS, NAMESAKES, HUNDRED, PROGRAMS, PINS = 10_000, 1_000, 100, 2_000, 1_000
NAME, SHARED, BY_HUNDRED = "crowd", "crowd_shared", "crowd_100"
MADE_WITHIN_S = 120.0
_LOAD_MAP, _ZERO, _EXIT = 0x18, 0xB7, 0x95
_MAP_FD = 1  # the pseudo source register


class Crowd(NamedTuple):
    """Ids of what the process holds.

    Attributes
    ----------
    alone, namesake, shared : int
        A map like no other, one of a thousand with one name, and one that a thousand programs
        refer to.
    """

    alone: int
    namesake: int
    shared: int


def instructions(map_fd: int) -> bytes:
    """A program that refers to a map, and returns 0."""
    words = [(_LOAD_MAP, 1 | _MAP_FD << 4, map_fd), (0, 0, 0), (_ZERO, 0, 0), (_EXIT, 0, 0)]
    return b"".join(struct.pack("=BBhi", code, registers, 0, value)
                    for code, registers, value in words)  # fmt: skip


def _map(name: str) -> int:
    return libbpf.map_create(MapKind.HASH, name=name, key_size=4, value_size=8, max_entries=4)


@contextmanager
def crowd() -> Iterator[Crowd]:
    """Have them made by a child, and hand out ids; they go with the block."""
    said = shared_array(4, "i8")

    def make() -> None:
        most = MAPS + PROGRAMS + 100
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        with PinFolder() as pins:
            shared = _map(SHARED)
            names = [NAME] * NAMESAKES + [BY_HUNDRED] * HUNDRED
            names += [f"{NAME}{i}" for i in range(MAPS - len(names))]
            maps = list(map(_map, names))
            for i in range(PROGRAMS):
                # One half use one map, the other one each of the namesakes.
                fd = shared if i % 2 else maps[i // 2 % NAMESAKES]
                libbpf.prog_load(ProgramKind.SOCKET_FILTER, instructions(fd), name=NAME)
            for i in range(PINS):
                libbpf.pin(maps[i], pins.path(f"{NAME}{i}"))
            said[:3] = [libbpf.map_info(fd).id for fd in (maps[-1], maps[NAMESAKES // 2], shared)]
            said[3] = 1
            while True:
                time.sleep(3600)

    with Child(make) as child:
        deadline = time.monotonic() + MADE_WITHIN_S
        while not said[3]:
            assert time.monotonic() < deadline, "the crowd was not made in time"
            if child.ended():
                child.result(1)
            time.sleep(0.1)
        yield Crowd(*said[:3].tolist())
