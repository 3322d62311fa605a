"""An array holds zeros that nobody wrote: to find a key is not to find a value."""

from __future__ import annotations

import errno

import numpy as np
import pandas as pd

from labkit.kernel.libbpf import MapKind, UpdateFlag
from labkit.kernel.maps import PER_CPU, Map, MapError
from labkit.lab.experiment import Case, Statement, Tables, experiment
from labkit.runs import Triad

_ARRAYS = (MapKind.ARRAY, MapKind.PERCPU_ARRAY)
_HASHES = (MapKind.HASH, MapKind.PERCPU_HASH, MapKind.LRU_HASH)
_POLICY = np.dtype([("version", "u4"), ("action", "u4")])
_ALLOW = 1


_CASES = (
    Case("broken", "arrays-found", "arrays, found means written", family="arrays"),
    Case("control", "hashes-found", "hashes, found means written", family="hashes"),
    Case("fixed", "arrays-version", "arrays, a version in the value", family="arrays"),
    Case("fixed", "hashes-version", "hashes, a version in the value", family="hashes"),
)


def _counted(tables: Tables) -> Tables:
    """Keys that are taken for written and are not, or the other way round."""
    kinds, triad = tables["kinds"], Triad("wrong about being written")
    for case in _CASES:
        rows = kinds[kinds["family"] == case.family]
        way = "wrong_by_version" if case.variant == "fixed" else "wrong_by_found"
        triad.add(case.variant, case=case.id, operations=int(rows["keys"].sum()),
                  anomalies=int(rows[way].sum()))  # fmt: skip
    return {"counts": triad.table()}


@experiment(
    "untouched-entries",
    number=55,
    family="kernel-facts",
    question="Does finding a key in a map mean that somebody has written it?",
    claims=("1.11",),
    needs=("bpf", "hash", "percpu", "lru"),
    quick={"keys": 1_000},
    full={"keys": 20_000},
    cases=_CASES,
    derive=_counted,
    statements=(
        Statement("an array finds all its keys, and as zeros those that nobody wrote",
                  "some(broken) and broken.anomalies == sum(kinds(family='arrays').zeros)"
                  " and all(kinds(family='arrays').found == kinds(family='arrays').keys)"),
        Statement("it answers EEXIST to NOEXIST on them",
                  "all(kinds(family='arrays').noexist == -17)"),
        Statement("a hash finds what was written and no more",
                  "none(control) and all(0 == kinds(family='hashes').zeros"
                  " == kinds(family='hashes').noexist < kinds(family='hashes').found)"),
        Statement("a version in the value tells", "none(fixed)"),
    ),
    sentence="Judged by whether a lookup finds them, {broken} keys of arrays were taken for "
    "written and were not, and {control} of hashes. By a version in the value, "
    "{fixed['arrays-version']} and {fixed['hashes-version']}.",
)  # fmt: skip
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
        ``kinds``: ``family`` (arrays or hashes), ``kind``, ``keys``, ``written``, ``found``,
        ``zeros`` (found with all bytes zero), ``noexist`` (the answer to NOEXIST on a key that
        nobody wrote, 0 or minus the errno), ``wrong_by_found`` and ``wrong_by_version`` (keys that
        are taken for written and are not, or the other way round).
    """
    rows = []
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
            rows.append(
                {
                    "family": family,
                    "kind": kind.name.lower(),
                    "keys": keys,
                    "written": int(written.sum()),
                    "found": int(found.sum()),
                    "zeros": int((found & (versions == 0)).sum()),
                    "noexist": noexist,
                    "wrong_by_found": int((found != written).sum()),
                    "wrong_by_version": int(((versions > 0) != written).sum()),
                }
            )
    return {"kinds": pd.DataFrame(rows)}


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
