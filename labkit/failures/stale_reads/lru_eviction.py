"""Keys of an LRU map that were written, confirmed, and are gone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import libbpf
from labkit.kernel.libbpf import MapFlag, MapKind, UpdateFlag
from labkit.kernel.maps import KeyAbsent, Map, MapFull
from labkit.kernel.parallel import together


@dataclass(frozen=True)
class _Setting:
    case: str
    kind: MapKind
    flags: MapFlag = MapFlag.NONE


_COMMON = _Setting("LRU, common lists", MapKind.LRU_HASH)
_PER_CPU = _Setting("LRU, NO_COMMON_LRU", MapKind.LRU_HASH, MapFlag.NO_COMMON_LRU)
_PLAIN = _Setting("plain hash", MapKind.HASH)


@experiment(
    "lru-eviction",
    number=9,
    family="stale-reads",
    question="Which keys of an LRU map are gone although their updates succeeded?",
    claims=("1.3d", "1.2c"),
    needs=("bpf", "two_cpus"),
    quick={"entries": 1024, "touches": 5_000},
    full={"entries": 4096, "touches": 40_000},
)
def lru_eviction(*, entries: int, touches: int) -> Tables:
    """Fill maps from one CPU, confirm every key, and look which ones are still there.

    An update of an LRU hash takes a free node before it looks for the key
    (kernel/bpf/hashtab.c, ``htab_lru_map_update_elem``). In a full map that evicts
    something every time, be it the very key that is updated. With ``NO_COMMON_LRU`` every
    CPU owns its share of the nodes and never borrows: a map filled from one CPU is full at
    that share (kernel/bpf/bpf_lru_list.c).

    Parameters
    ----------
    entries : int
        ``max_entries`` of every map.
    touches : int
        Updates of one present key in a full map, with ``BPF_EXIST``.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a key whose insertion was confirmed, an anomaly one that
        was gone at the end without anybody having deleted it. ``fill``: ``case``,
        ``inserted``, ``kept``, ``refused`` (int64). ``touch``: ``case``, ``touches``,
        ``answered_absent``, ``gone`` (int64). ``cpus``: ``possible`` (int64).
    """
    triad = Triad("evicted")
    fill = pd.DataFrame(
        [
            {"case": setting.case, **_fill(setting, entries, inserted)}
            for setting in (_COMMON, _PER_CPU, _PLAIN)
            for inserted in (entries * np.arange(1, 13) // 8).tolist()
        ]
    )
    for setting, share, variant, what in (
        (_PER_CPU, 1.0, "broken", "filled to max_entries from one CPU"),
        (_COMMON, 1.125, "broken", "filled an eighth beyond max_entries"),
        (_COMMON, 0.5, "control", "filled to half"),
        (_PLAIN, 1.125, "fixed", "an eighth beyond max_entries is refused"),
    ):
        row = fill[(fill["case"] == setting.case) & (fill["inserted"] == int(entries * share))]
        confirmed = int((row["inserted"] - row["refused"]).iloc[0])
        triad.add(
            variant,
            case=f"{setting.case}, {what}",
            operations=confirmed,
            anomalies=confirmed - int(row["kept"].iloc[0]),
        )
    say("touching one key of full maps")
    touched = []
    for variant, setting in (("broken", _COMMON), ("fixed", _PLAIN)):
        outcome = _touch(setting, entries, touches)
        touched.append({"case": setting.case, **outcome})
        triad.add(
            variant,
            case=f"{setting.case}, full, one key updated with EXIST",
            operations=entries,
            anomalies=outcome["gone"],
        )
    possible = pd.DataFrame({"possible": [libbpf.possible_cpus()]})
    return {"counts": triad.table(), "fill": fill, "touch": pd.DataFrame(touched), "cpus": possible}


def _fill(setting: _Setting, entries: int, inserted: int) -> dict[str, int]:
    """Insert and confirm keys from one CPU; how many are there at the end."""
    with _made(setting, entries) as table:

        def insert() -> int:
            refused = 0
            for key in range(inserted):
                try:
                    table.update(key, key + 1)
                    table.lookup(key)
                except MapFull:
                    refused += 1
            return refused

        (refused,) = together(insert)
        return {"inserted": inserted, "kept": len(table.snapshot()), "refused": refused}


def _touch(setting: _Setting, entries: int, touches: int) -> dict[str, int]:
    """Update one key of a full map over and over; what that does to it and to the others."""
    with _made(setting, entries) as table:

        def fill_and_touch() -> int:
            for key in range(entries):
                table.update(key, key + 1)
            absent = 0
            for version in range(touches):
                try:
                    table.update(0, version, UpdateFlag.EXIST)
                except KeyAbsent:
                    absent += 1
            return absent

        (absent,) = together(fill_and_touch)
        gone = entries - len(table.snapshot())
        return {"touches": touches, "answered_absent": absent, "gone": gone}


def _made(setting: _Setting, entries: int) -> Map:
    return Map.create(
        setting.kind,
        key="u4",
        value="u8",
        max_entries=entries,
        flags=setting.flags,
        name="evicting",
    )
