"""A key of an outer map that is absent for a moment, while its inner map is switched."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput, Unavailable
from labkit.figures import Axes, style
from labkit.kernel import programs
from labkit.kernel.libbpf import MapFlag, MapKind
from labkit.kernel.maps import OF_MAPS, Map
from labkit.kernel.parallel import together
from labkit.lab.experiment import Case, Statement, Tables, experiment
from labkit.runs import Run, Triad

_KEYS: Final = 64  # all in one bucket: a reader goes a long way to the one that is written
_CHUNK: Final = 10_000  # program runs in one call; between two the reader waits for its turn
_MORE: Final = 20
_PAUSE_S: Final = 1e-4
_LIMIT_S: Final = 600.0
_START = np.uint32(0xDEADBEEF + 4)  # JHASH_INITVAL and the key's length (include/linux/jhash.h)


_CURE: Final = "htab_map_update_elem_in_place"
"""Exchanges an inner map within the element of a hash, in a kernel that has it."""


def _counts(tables: Tables) -> Tables:
    """An operation is a write, after which one lookup at most can miss; a lookup without writes."""
    triad = Triad("null read")
    for (variant, case), rows in tables["rounds"].groupby(["variant", "case"], sort=False):
        absent, writes = int(rows["absent"].sum()), int(rows["writes"].sum())
        lookups = int(rows["lookups"].sum())
        triad.add(
            str(variant), case=str(case), anomalies=absent,
            # A key that stayed away would be missed more often than it was written.
            operations=max(writes, absent) if writes else lookups,
        )  # fmt: skip
    return {"counts": triad.table()}


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw NULL answers per 100 writes, and those of maps that nobody writes as they are."""
    ax = style.axes(ax, height=1.8)
    found = run.table("rounds").groupby("case", sort=False)[["absent", "writes"]].sum()
    absents, writings = (found[name].to_numpy(np.int64) for name in ("absent", "writes"))
    written = writings > 0
    per_100 = np.divide(100 * absents, writings, out=absents.astype(float), where=written)
    ax.barh([run.label(str(case)) for case in found.index], per_100, 0.6, color=style.VERMILLION)
    for y, (absent, writes, x) in enumerate(zip(absents, writings, per_100, strict=True)):
        ax.text(x, y, f" {absent:,} in {writes:,} writes", va="center", fontsize=6.5)
    ax.set_xlim(0, 2.2 * max(per_100.max(), 1))
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel("NULL lookups per 100 writes", loc="right")
    return ax


@experiment(
    "outer-map-null",
    number=49,
    family="kernel-facts",
    question="Does a program ever find no inner map under a key that always has one?",
    claims=("1.2b", "4.3"),
    needs=("bpf", "compile", "test_run", "two_cpus", "hash", "map_in_map"),
    quick={"switches": 260, "lookups": 500_000, "rounds": 1},
    full={"switches": 1_000, "lookups": 5_000_000, "rounds": 1},
    cases=(
        Case("broken", "hash", "hash, overwritten", kind=MapKind.HASH),
        Case("control", "unswitched", "hash of maps, nobody switches",
             kind=MapKind.HASH_OF_MAPS, writes=False),
        # Broken where the kernel has no cure.
        Case("broken", "outer-hash", "hash of maps, switched", kind=MapKind.HASH_OF_MAPS),
        Case("fixed", "outer-array", "array of maps, switched", kind=MapKind.ARRAY_OF_MAPS),
    ),
    derive=_counts,
    statements=(
        Statement("the arrangement finds the gap where it is: a plain hash, overwritten",
                  'some(broken["hash"], like=4e-3)'),
        Statement("no key is absent while nobody switches", "none(control)"),
        Statement("an outer array never lacks a key", 'none(fixed, like=broken["hash"])'),
        Statement("an outer hash lacks keys, unless the kernel exchanges inner maps in place",
                  'all(rounds(writes > 0, case="outer-hash").in_place) and '
                  'none(broken["outer-hash"], like=broken["hash"]) or '
                  'none(rounds(writes > 0, case="outer-hash").in_place) and '
                  'some(broken["outer-hash"], like=4e-3)'),
    ),
    sentence='While {sum(rounds(case="outer-hash").writes)} inner maps of an outer hash were '
    "switched, a program that looked them up found none "
    '{broken["outer-hash"].anomalies} times; this kernel exchanges them in place: '
    "{first(rounds.in_place)}. In an outer array that happened {fixed.anomalies} times, in a plain "
    'hash of the same keys {broken["hash"].anomalies} times.',
    figure=_figure,
)  # fmt: skip
def outer_map_null(case: Case, *, switches: int, lookups: int) -> dict[str, Any]:
    """Switch the inner maps of an outer map under a program that looks them up.

    The update of a hash's element puts a new element at the head of the bucket's list, then takes
    the old one out; a reader that is past the head and not yet at the old one sees neither. Until
    Linux 6.16 (2c304172e031) that was so for inner maps too; since then the pointer within the
    element is exchanged, as it always was in an array of maps. To make it happen at nearly every
    write, 64 keys are chosen that share a bucket (a map made with ``BPF_F_ZERO_SEED`` has a known
    hash), the one at the end of the list is always written next, and the reader is told which.

    Parameters
    ----------
    case : Case
        Kind of map, and whether it is written.
    switches : int
        Switches in a round, each waiting for the kernel's readers, at the least; and 20 times as
        many writes of the plain hash, which wait for nobody.
    lookups : int
        Lookups in a round, at the least.

    Returns
    -------
    dict
        ``writes``, ``lookups``, ``absent`` (lookups that answered NULL) and ``in_place`` (bool:
        the kernel has the function that exchanges inner maps within a hash's element).
    """
    of_maps, by_index = case.kind in OF_MAPS, case.kind is MapKind.ARRAY_OF_MAPS
    writes = switches if of_maps else _MORE * switches
    keys = np.arange(_KEYS, dtype=np.uint32) if by_index else _one_bucket()
    in_place = _exchanges_in_place()
    with ExitStack() as stack:
        inners = [
            stack.enter_context(Map.create(MapKind.ARRAY, key="u4", value="u4", max_entries=1))
            for _ in range(2)
        ]
        table = stack.enter_context(
            Map.create(
                case.kind,
                key="u4",
                value="u4",
                max_entries=_KEYS,
                flags=MapFlag.NONE if by_index else MapFlag.ZERO_SEED,
                inner=inners[0] if of_maps else None,
            )
        )
        loaded = stack.enter_context(programs.load("outer_map_null", TABLE_FD=table.fd))
        values = [inner.fd for inner in inners] if of_maps else [0, 1]
        for key in keys:
            table.update(key, values[0])
        following, reader = loaded.map("next"), loaded.program("look")
        read, written = Event(), Event()

        def read_all() -> None:
            done = 0
            while done < lookups or not written.is_set():
                done += _CHUNK
                reader.test_run(repeat=_CHUNK)
                # A CPU that is idle for a moment ends the wait of whoever switches.
                time.sleep(_PAUSE_S)
                if done >= lookups:
                    read.set()

        def write_all() -> int:
            turn = 0
            while case.get("writes", True) and not (turn >= writes and read.is_set()):
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
        seen = loaded.map("counts").lookup(0)
    return {"writes": turns, "lookups": int(seen["lookups"]), "absent": int(seen["absent"]),
            "in_place": in_place}  # fmt: skip


def _exchanges_in_place() -> bool:
    symbols = (line.split()[2] for line in Path("/proc/kallsyms").read_text().splitlines())
    names = {symbol.partition(".")[0] for symbol in symbols}  # less the compiler's .isra and so on
    if "htab_map_update_elem" not in names:
        raise Unavailable("/proc/kallsyms does not name the kernel's functions: run as root.")
    return _CURE in names


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
