"""Maps of every kind, and of kinds that came after this lab: named, looked at, refused in words."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.errors import LabError
from labkit.inspect.diagnose import diagnose
from labkit.inspect.watch import Watch
from labkit.kernel import libbpf, objects
from labkit.kernel.libbpf import MapFlag, MapKind
from labkit.kernel.maps import Map

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("kernel")]

KINDS: list[tuple[MapKind, int, int, int, MapFlag]] = [
    (MapKind.PROG_ARRAY, 4, 4, 4, MapFlag.NONE),
    (MapKind.PERF_EVENT_ARRAY, 4, 4, 4, MapFlag.NONE),
    (MapKind.STACK_TRACE, 4, 80, 4, MapFlag.NONE),
    (MapKind.CGROUP_ARRAY, 4, 4, 4, MapFlag.NONE),
    (MapKind.LPM_TRIE, 8, 3, 4, MapFlag.NO_PREALLOC),
    (MapKind.DEVMAP, 4, 4, 4, MapFlag.NONE),
    (MapKind.DEVMAP_HASH, 4, 4, 4, MapFlag.NONE),
    (MapKind.SOCKMAP, 4, 4, 4, MapFlag.NONE),
    (MapKind.SOCKHASH, 4, 4, 4, MapFlag.NONE),
    (MapKind.CPUMAP, 4, 4, 1, MapFlag.NONE),
    (MapKind.XSKMAP, 4, 4, 4, MapFlag.NONE),
    (MapKind.QUEUE, 0, 3, 4, MapFlag.NONE),
    (MapKind.STACK, 0, 4, 4, MapFlag.NONE),
    (MapKind.BLOOM_FILTER, 0, 4, 4, MapFlag.NONE),
    (MapKind.RINGBUF, 0, 0, 4096, MapFlag.NONE),
    (MapKind.USER_RINGBUF, 0, 0, 4096, MapFlag.NONE),
    (MapKind.ARENA, 0, 0, 1, MapFlag.MMAPABLE),
    (MapKind.HASH, 3, 5, 4, MapFlag.NONE),
    (MapKind.LRU_PERCPU_HASH, 4, 12, 4, MapFlag.NO_COMMON_LRU),
]


@pytest.mark.parametrize("one", KINDS, ids=lambda one: one[0].name.lower())
def test_every_kind_is_looked_at_and_watched_or_refused(
    one: tuple[MapKind, int, int, int, MapFlag],
) -> None:
    kind, key, value, entries, flags = one
    key_dtype, value_dtype = (np.dtype(f"V{size}") if size else None for size in (key, value))
    try:
        table = Map.create(
            kind, key=key_dtype, value=value_dtype, max_entries=entries, flags=flags, name="kinds"
        )
    except LabError as refusal:
        pytest.skip(f"this kernel lacks such maps: {refusal}")
    with table:
        (found,) = diagnose(str(table.id))
        assert f"kinds: {kind.name.lower()}, " in str(found).splitlines()[0]
        found.as_json()
        try:
            with Watch(table) as watch:
                watch.poll(0.0)
        except LabError as refusal:
            assert "\n" not in str(refusal)


@pytest.mark.parametrize("number", [0, 99, 2**32 - 1])
def test_a_kind_that_this_lab_does_not_know_has_its_number(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=4, name="later") as table:
        asked = libbpf.map_info

        def later(fd: int) -> libbpf.MapInfo:
            info = asked(fd)
            if info.id == table.id:
                info.type = number
            return info

        monkeypatch.setattr(libbpf, "map_info", later)
        assert objects.snapshot().maps[table.id].kind == f"type {number}"
        (found,) = diagnose(str(table.id))
        assert f"later: type {number}, key 4 B, value 8 B" in str(found)
        with Map.from_name("later") as opened:
            assert opened.kind == number and opened.kind.name == f"type {number}"
            try:
                with Watch(opened) as watch:
                    watch.poll(0.0)
            except LabError as refusal:
                assert "\n" not in str(refusal)
    with pytest.raises(ValueError):
        MapKind(-1)
    assert MapKind(number) not in list(MapKind)
