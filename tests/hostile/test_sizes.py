"""Maps that promise more than there is: what is asked for follows the content, not max_entries."""

from __future__ import annotations

import resource

import pytest

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
