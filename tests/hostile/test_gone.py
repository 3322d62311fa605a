"""A map that goes while it is watched, whoever gave it up: it is said, and the watch goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from labkit.kernel import libbpf
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, shared_array
from labkit.kernel.pins import PinFolder

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("kernel")]

STUCK_S = 60.0
Owned = tuple[int, Callable[[], None]]
"""The id of a map that somebody holds, and how it is given up."""


def _made(name: str = "going") -> Map:
    return Map.create(MapKind.HASH, key="u4", value="u8", max_entries=4, name=name)


@contextmanager
def closed_by_its_owner() -> Iterator[Owned]:
    with _made() as table:
        yield table.id, table.close


@contextmanager
def lost_with_its_owner() -> Iterator[Owned]:
    known = shared_array(1, "u4")

    def own() -> None:
        with _made() as table:
            known[0] = table.id
            signal.pause()

    with Child(own) as owner:
        while not known[0]:
            assert not owner.ended()
        yield int(known[0]), owner.close


@contextmanager
def unpinned() -> Iterator[Owned]:
    with PinFolder() as pins:
        path = pins.path("going")
        with _made() as table:
            id = table.id
            libbpf.pin(table.fd, path)
        yield id, lambda: os.unlink(path)


@pytest.mark.parametrize("owned", [closed_by_its_owner, lost_with_its_owner, unpinned])
@pytest.mark.parametrize("beside", [False, True])
def test_a_watch_says_that_its_map_is_gone(
    owned: Callable[[], AbstractContextManager[Owned]], beside: bool
) -> None:
    with owned() as (id, give_up), _made("stays") as other:
        words = ["watch", str(id), *([str(other.id)] if beside else [])]
        watch = subprocess.Popen(
            [sys.executable, "-m", "labkit", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with watch:
            try:
                assert watch.stderr is not None
                assert watch.stderr.readline().startswith("Watching")
                give_up()
                told = watch.stderr.readline()  # while it goes on
                assert told.startswith(f"Map {id} is not read (it is gone)"), told
                other.update(1, 2)
                watch.send_signal(signal.SIGINT)
                said, told = watch.communicate(timeout=STUCK_S)
            finally:
                watch.kill()
    assert watch.returncode == 0 and "is gone" not in told
    assert told.startswith(f"{int(beside)} changes were told by hooks, 0 were dropped")
    assert said.count("\n") == int(beside)
