"""A key of an outer map that is absent for a moment, while its inner map is switched."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from threading import Event
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import programs
from labkit.kernel.libbpf import MapFlag, MapKind
from labkit.kernel.maps import OF_MAPS, Map
from labkit.kernel.parallel import together

_KEYS: Final = 64  # all in one bucket: a reader walks long to the one that is written
_CHUNK: Final = 10_000  # program runs in one call; between two the reader waits for its turn
_MORE: Final = 20
_LIMIT_S: Final = 600.0
_START = np.uint32(0xDEADBEEF + 4)  # JHASH_INITVAL and the key's length (include/linux/jhash.h)


@dataclass(frozen=True)
class _Setting:
    variant: str  # "" where the kernel decides what it is
    case: str
    kind: MapKind
    writes: bool = True


_SETTINGS = (
    _Setting("broken", "hash, overwritten", MapKind.HASH),
    _Setting("control", "hash of maps, nobody switches", MapKind.HASH_OF_MAPS, writes=False),
    _Setting("", "hash of maps, switched", MapKind.HASH_OF_MAPS),
    _Setting("fixed", "array of maps, switched", MapKind.ARRAY_OF_MAPS),
)


@experiment(
    "outer-map-null",
    number=49,
    family="kernel-facts",
    question="Does a program ever find no inner map under a key that always has one?",
    claims=("1.2b", "4.3"),
    needs=("bpf", "compile", "test_run", "two_cpus", "hash", "map_in_map"),
    quick={"switches": 100, "lookups": 500_000},
    full={"switches": 1_000, "lookups": 5_000_000},
)
def outer_map_null(*, switches: int, lookups: int) -> Tables:
    """Switch the inner maps of an outer map under a program that looks them up.

    The update of a hash's element puts a new element at the head of the bucket's list, then takes
    the old one out; a reader that is past the head and not yet at the old one sees neither. Until
    Linux 6.16 (2c304172e031) that was so for inner maps too; since then the pointer within the
    element is exchanged, as it always was in an array of maps. To make it happen at nearly every
    write, 64 keys are chosen that share a bucket (a map made with ``BPF_F_ZERO_SEED`` has a known
    hash), the one at the end of the list is always written next, and the reader is told which.

    Parameters
    ----------
    switches : int
        Switches in each outer map, each waiting for the kernel's readers, at the least; and 20
        times as many writes of the plain hash, which wait for nobody.
    lookups : int
        Lookups in each map, at the least.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a lookup by the program, an anomaly one that answered NULL; a
        plain hash in broken, an outer hash that nobody switches in control, an outer array in
        fixed. ``lookups``: one row per setting, also the outer hash whose inner maps are
        switched, with columns ``case``, ``writes``, ``lookups`` and ``absent`` (int64).
    """
    triad, rows = Triad("null read"), []
    for setting in _SETTINGS:
        writes = switches if setting.kind in OF_MAPS else _MORE * switches
        say(f"{writes:,} writes at least: {setting.case}")
        row = {"case": setting.case, **_measure(setting, writes, lookups)}
        rows.append(row)
        if setting.variant:
            triad.add(
                setting.variant, case=setting.case, operations=row["lookups"],
                anomalies=row["absent"],
            )  # fmt: skip
    return {"counts": triad.table(), "lookups": pd.DataFrame(rows)}


def _measure(setting: _Setting, writes: int, lookups: int) -> dict[str, Any]:
    by_index = setting.kind is MapKind.ARRAY_OF_MAPS
    keys = np.arange(_KEYS, dtype=np.uint32) if by_index else _one_bucket()
    with ExitStack() as stack:
        inners = [
            stack.enter_context(Map.create(MapKind.ARRAY, key="u4", value="u4", max_entries=1))
            for _ in range(2)
        ]
        of_maps = setting.kind in OF_MAPS
        table = stack.enter_context(
            Map.create(
                setting.kind,
                key="u4",
                value="u4",
                max_entries=_KEYS,
                flags=MapFlag.NONE if by_index else MapFlag.ZERO_SEED,
                inner=inners[0] if of_maps else None,
            )
        )
        unit = stack.enter_context(programs.load("outer_map_null", TABLE_FD=table.fd))
        values = [inner.fd for inner in inners] if of_maps else [0, 1]
        for key in keys:
            table.update(key, values[0])
        following, reader = unit.map("next"), unit.function("look")
        read, written = Event(), Event()

        def read_all() -> None:
            done = 0
            while done < lookups or not written.is_set():
                done += _CHUNK
                reader.test_run(repeat=_CHUNK)
                if done >= lookups:
                    read.set()

        def write_all() -> int:
            turn = 0
            while setting.writes and not (turn >= writes and read.is_set()):
                key = keys[turn % _KEYS]  # written longest ago: at the end of the list
                following.update(0, key)
                table.update(key, values[(turn // _KEYS + 1) % 2])
                turn += 1
                if turn >= writes:
                    written.set()
            written.set()
            return turn

        following.update(0, keys[0])
        _, turns = together(read_all, write_all, timeout_s=_LIMIT_S)
        seen = unit.map("counts").lookup(0)
    return {"writes": turns, "lookups": int(seen["lookups"]), "absent": int(seen["absent"])}


def _one_bucket() -> npt.NDArray[np.uint32]:
    """Keys that a hash of `_KEYS` entries made with ZERO_SEED keeps in its first bucket."""
    candidates = np.arange(_KEYS * _KEYS * 4, dtype=np.uint32)
    found: npt.NDArray[np.uint32] = candidates[_jhash(candidates) % _KEYS == 0][:_KEYS]
    if len(found) < _KEYS:
        raise BadInput("The hash function is not that of the kernel.")
    return found


def _jhash(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """``jhash`` of keys of 4 bytes, with the seed 0 (include/linux/jhash.h, ``__jhash_final``)."""

    def rotated(word: npt.NDArray[np.uint32], by: int) -> npt.NDArray[np.uint32]:
        return word << np.uint32(by) | word >> np.uint32(32 - by)

    other = words + _START
    target = source = np.full_like(words, _START)
    for by in (14, 11, 25, 16, 4, 14, 24):
        target = (target ^ source) - rotated(source, by)
        target, source, other = other, target, source
    return source
