"""Maps that promise more than there is: what is asked for follows the content, not max_entries."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest

from labkit.inspect import watch as watch_module
from labkit.inspect.diagnose import diagnose
from labkit.inspect.watch import Watch
from labkit.kernel import libbpf
from labkit.kernel.libbpf import MapFlag, MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("kernel")]

ENTRIES, SIZE = 1 << 20, 1 << 16  # 64 GiB, if they were all there
SPARE_BYTES = 1 << 30


def test_a_snapshot_asks_for_what_is_in_the_map() -> None:
    def read() -> list[int]:
        with Map.create(MapKind.HASH, key="u4", value=f"V{SIZE}", max_entries=ENTRIES,
                        flags=MapFlag.NO_PREALLOC) as table:  # fmt: skip
            for key in range(2_000):  # 125 MiB: more than is asked for at first
                table.update(key, bytes([key % 256]) * SIZE)
            with open("/proc/self/statm") as file:
                now = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + SPARE_BYTES, now + SPARE_BYTES))
            snapshot = table.snapshot()
            whole = all(
                value.tobytes() == bytes([key % 256]) * SIZE
                for key, value in zip(snapshot.keys.tolist(), snapshot.values, strict=True)
            )
            return [len(snapshot), int(snapshot.complete), int(whole)]

    with Child(read) as child:
        assert child.result(60) == [2_000, 1, 1]


def diagnosed(table: Map) -> int:
    return len(diagnose(str(table.id)))


def watched(table: Map) -> int:
    with Watch(table) as watch:
        assert table.id in watch.unread
        table.update(1, bytes(SIZE))
        return len(watch.poll(10))


@pytest.mark.parametrize("look", [diagnosed, watched])
@pytest.mark.parametrize("kind", [MapKind.HASH, MapKind.LRU_HASH])
def test_whoever_looks_asks_for_no_more(look: Callable[[Map], int], kind: MapKind) -> None:
    flags = MapFlag.NO_PREALLOC if kind == MapKind.HASH else MapFlag.NONE
    entries = ENTRIES if kind == MapKind.HASH else 2_048

    def bounded() -> int:
        with Map.create(kind, key="u4", value=f"V{SIZE}", max_entries=entries, flags=flags,
                        name="promises") as table:  # fmt: skip
            with open("/proc/self/statm") as file:
                now = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + SPARE_BYTES, now + SPARE_BYTES))
            return look(table)

    with Child(bounded) as child:
        assert child.result(120) == 1


@pytest.mark.parametrize("kind", [MapKind.HASH, MapKind.PERCPU_HASH])
def test_a_watch_remembers_a_bounded_number_of_keys(
    kind: MapKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "_MOST_REMEMBERED", 8)
    with (
        Map.create(kind, key="u4", value="V1024", max_entries=1 << 17,
                   flags=MapFlag.NO_PREALLOC, name="many") as table,
        Watch(table) as watch,
    ):  # fmt: skip
        assert "has room for more" in watch.unread[table.id]
        value = bytes(1024) if kind == MapKind.HASH else [bytes(1024)] * libbpf.possible_cpus()
        for key in range(100):
            table.update(key, value)
        assert len(watch.end()) == watch.seen == 100 and watch.dropped == 0
        assert len(watch._followed[table.id].latest) <= 8
