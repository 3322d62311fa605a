"""An array holds zeros that nobody wrote: to find a key is not to find a value."""

from __future__ import annotations

import errno

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.failures.experiment import Tables, experiment
from labkit.kernel.libbpf import MapKind, UpdateFlag
from labkit.kernel.maps import PER_CPU, Map, MapError

_ARRAYS = (MapKind.ARRAY, MapKind.PERCPU_ARRAY)
_HASHES = (MapKind.HASH, MapKind.PERCPU_HASH, MapKind.LRU_HASH)
_POLICY = np.dtype([("version", "u4"), ("action", "u4")])
_ALLOW = 1


@experiment(
    "untouched-entries",
    number=55,
    family="kernel-facts",
    question="Does finding a key in a map mean that somebody has written it?",
    claims=("1.11",),
    needs=("bpf", "hash", "percpu", "lru"),
    quick={"keys": 1_000},
    full={"keys": 20_000},
)
def untouched_entries(*, keys: int) -> Tables:
    """Write every second key of maps of each kind, and judge by a lookup which were written.

    All entries of an array exist, as zeros, from its creation to its end
    (kernel/bpf/arraymap.c): they cannot be deleted, and NOEXIST is answered EEXIST. A hash has
    what was put into it.

    Parameters
    ----------
    keys : int
        Keys of each map, of which every second is written with a version from 1 on.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a key that is looked up, an anomaly one that is taken for
        written and is not, or the other way round. ``kinds``: ``kind``, ``keys``,
        ``written``, ``found``, ``zeros`` (found with all bytes zero), ``noexist`` (the answer
        to NOEXIST on a key that nobody wrote, 0 or minus the errno).
    """
    triad, rows = Triad("wrong about being written"), []
    wrong = {"found": {"arrays": 0, "hashes": 0}, "version": {"arrays": 0, "hashes": 0}}
    for family, kinds in (("arrays", _ARRAYS), ("hashes", _HASHES)):
        for kind in kinds:
            # An LRU map with room to spare: what it evicts is another experiment's subject.
            with Map.create(kind, key="u4", value=_POLICY, max_entries=4 * keys) as table:
                for key in range(0, keys, 2):
                    table.update(key, (key + 1, _ALLOW))
                read = [table.get(key) for key in range(keys)]
                versions = np.array([_version(kind, value) for value in read])
                found = np.array([value is not None for value in read])
                noexist = _noexist(table)
            written = np.arange(keys) % 2 == 0
            wrong["found"][family] += int((found != written).sum())
            wrong["version"][family] += int(((versions > 0) != written).sum())
            rows.append(
                {
                    "kind": kind.name.lower(),
                    "keys": keys,
                    "written": int(written.sum()),
                    "found": int(found.sum()),
                    "zeros": int((found & (versions == 0)).sum()),
                    "noexist": noexist,
                }
            )
    for variant, case, way, family in (
        ("broken", "arrays, found means written", "found", "arrays"),
        ("control", "hashes, found means written", "found", "hashes"),
        ("fixed", "arrays, a version in the value", "version", "arrays"),
        ("fixed", "hashes, a version in the value", "version", "hashes"),
    ):
        operations = keys * len(_ARRAYS if family == "arrays" else _HASHES)
        triad.add(variant, case=case, operations=operations, anomalies=wrong[way][family])
    return {"counts": triad.table(), "kinds": pd.DataFrame(rows)}


def _version(kind: MapKind, value: object) -> int:
    """Version in a looked-up value, in whichever CPU's slot; 0 where there is none."""
    if value is None:
        return 0
    versions = np.asarray(value)["version"]
    return int(versions.max()) if kind in PER_CPU else int(versions)


def _noexist(table: Map) -> int:
    """What NOEXIST answers on a key that nobody wrote; the map is not used after that."""
    try:
        table.update(1, (1, _ALLOW), UpdateFlag.NOEXIST)
        return 0
    except MapError as refused:
        return -int(refused.errno or errno.EIO)
