"""Every sort of map that keeps what is written into it, and how one of each is made and written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from labkit.kernel.libbpf import MapFlag, MapKind
from labkit.kernel.maps import OF_MAPS, Map

_PREFIX_BITS: Final = 32  # of an LPM trie's key: then come as many bits of data


@dataclass(frozen=True)
class MapSort:
    """One sort of map.

    Attributes
    ----------
    name
        As tables call it: ``"LRU hash"``.
    kind, flags
        How it is made.
    """

    name: str
    kind: MapKind
    flags: MapFlag = MapFlag.NONE

    @property
    def deletes(self) -> bool:
        """Whether an element can be deleted; an array's cannot."""
        return self.kind not in (MapKind.ARRAY, MapKind.PERCPU_ARRAY)

    @property
    def evicts(self) -> bool:
        """Whether a new key may push an old one out."""
        return self.kind in (MapKind.LRU_HASH, MapKind.LRU_PERCPU_HASH)

    @property
    def key_form(self) -> dict[str, int]:
        """How programs make the i-th key: ``i << KEY_SHIFT | KEY_LOW``, cut to the key's size."""
        trie = self.kind is MapKind.LPM_TRIE
        return (
            {"KEY_SHIFT": 32, "KEY_LOW": _PREFIX_BITS} if trie else {"KEY_SHIFT": 0, "KEY_LOW": 0}
        )

    def keys(self, count: int) -> npt.NDArray[Any]:
        """The first keys, of 4 bytes; of 8 in an LPM trie, where the length stands in front."""
        numbers = np.arange(count, dtype=np.uint64)
        form = {name: np.uint64(value) for name, value in self.key_form.items()}
        return (numbers << form["KEY_SHIFT"] | form["KEY_LOW"]).astype(self.key_type)

    @property
    def key_type(self) -> str:
        """NumPy's name of the key's type."""
        return "u8" if self.kind is MapKind.LPM_TRIE else "u4"


SORTS: Final = (
    MapSort("hash", MapKind.HASH),
    MapSort("hash, NO_PREALLOC", MapKind.HASH, MapFlag.NO_PREALLOC),
    MapSort("LRU hash", MapKind.LRU_HASH),
    MapSort("per-CPU hash", MapKind.PERCPU_HASH),
    MapSort("LRU per-CPU hash", MapKind.LRU_PERCPU_HASH),
    MapSort("array", MapKind.ARRAY),
    MapSort("per-CPU array", MapKind.PERCPU_ARRAY),
    MapSort("LPM trie", MapKind.LPM_TRIE, MapFlag.NO_PREALLOC),
    MapSort("array of maps", MapKind.ARRAY_OF_MAPS),
    MapSort("hash of maps", MapKind.HASH_OF_MAPS),
)
"""The sorts; each has functions of its own in the kernel, the first two share theirs."""


@contextmanager
def made(sort: MapSort, entries: int) -> Iterator[tuple[Map, tuple[int, int]]]:
    """Make a map of that sort, for as long as the block lasts.

    Parameters
    ----------
    sort : MapSort
        Of `SORTS`.
    entries : int
        How many it has room for.

    Yields
    ------
    Map
        Its values are of 8 bytes, or descriptors of inner maps of 4.
    tuple of int
        Two values that it takes: numbers, or descriptors of maps that are made with it.
    """
    with ExitStack() as stack:

        def inner() -> Map:
            return stack.enter_context(
                Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=1)
            )

        inners = [inner(), inner()] if sort.kind in OF_MAPS else []
        table = stack.enter_context(
            Map.create(
                sort.kind,
                key=sort.key_type,
                value="u4" if inners else "u8",
                max_entries=entries,
                flags=sort.flags,
                inner=inners[0] if inners else None,
            )
        )
        yield table, (inners[0].fd, inners[1].fd) if inners else (1, 2)
