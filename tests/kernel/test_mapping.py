"""A map's memory in our own address space."""

from __future__ import annotations

import pytest

from labkit.kernel.libbpf import MapFlag, MapKind
from labkit.kernel.mapping import MS_ASYNC, MS_SYNC, mapped
from labkit.kernel.maps import Map, MapError, NotSupported


def array(flags: MapFlag) -> Map:
    return Map.create(MapKind.ARRAY, key="u4", value="u4", max_entries=3, flags=flags)


def test_a_store_is_a_write_of_the_map() -> None:
    with array(MapFlag.MMAPABLE) as table, mapped(table) as mapping:
        mapping.values[2] = 7  # entries stand eight bytes apart, whatever their size
        assert table.lookup(2) == 7
        table.update(1, 5)
        assert mapping.values.tolist() == [0, 5, 7]
        assert mapping.msync(MS_ASYNC) == 0
        assert mapping.msync(MS_SYNC) == -22


def test_a_view_that_is_kept_stays_valid() -> None:
    with array(MapFlag.MMAPABLE) as table:
        with mapped(table) as mapping:
            kept = mapping.values
        kept[0] = 9
        assert table.lookup(0) == 9


def test_other_maps_refuse() -> None:
    with array(MapFlag.NONE) as table, pytest.raises(MapError, match="EINVAL"), mapped(table):
        pass
    with (
        Map.create(MapKind.HASH, key="u4", value="u4", max_entries=3) as table,
        pytest.raises(NotSupported, match="ENOTSUPP"),
        mapped(table),
    ):
        pass
