"""A batch that fails has been applied in part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import LabError
from labkit.failures.experiment import Tables, experiment
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map, PartialBatch

Keys = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class _Batch:
    case: str
    kind: MapKind
    deletes: bool = False  # of keys that are there, but for one in the middle


_BATCHES = (
    _Batch("update of a hash too small (E2BIG)", MapKind.HASH),
    _Batch("update of an array too small (E2BIG)", MapKind.ARRAY),
    _Batch("delete meets an absent key (ENOENT)", MapKind.HASH, deletes=True),
)


@experiment(
    "partial-batch",
    number=21,
    family="concurrency",
    question="When a batch update fails, is the map as it was before?",
    claims=("1.3c", "1.3f"),
    needs=("bpf", "batch_hash", "batch_array"),
    quick={"entries": 100, "batches": 200},
    full={"entries": 100, "batches": 2_000},
)
def partial_batch(*, entries: int, batches: int) -> Tables:
    """Send batches that must fail in the middle, and read what stands in the map.

    ``BPF_MAP_UPDATE_BATCH`` applies element by element and stops at the first refusal
    (kernel/bpf/syscall.c, ``generic_map_update_batch``); it undoes nothing and says in
    ``count`` how many it applied.

    Parameters
    ----------
    entries : int
        Room in the map.
    batches : int
        Batches of every kind.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is an element of a batch whose call failed; an anomaly is
        one whose state in the map is not what the caller believes. The broken caller
        believes that a failed call changed nothing, the fixed one reads ``count`` and
        takes back what was applied. ``cost_ns`` is per element, the taking back included.
        ``answers``: ``case``, ``errno``, ``sent``, ``said`` (the kernel's count),
        ``applied`` (found in the map).
    """
    triad, answers = Triad("unexpected element"), []
    for batch in _BATCHES:
        sent = entries if batch.deletes else entries * 2
        keys = np.arange(sent, dtype=np.uint32)
        found = {"ignored": 0, "counted": 0}
        spent = {"ignored": 0, "counted": 0}
        for _ in range(batches):
            for caller in found:
                with _prepared(batch, entries) as table:
                    before = _contents(table)
                    begun = time.monotonic_ns()
                    stopped = _send(table, keys, batch.deletes)
                    if caller == "counted":
                        _take_back(table, keys[: stopped.applied], batch.deletes)
                    spent[caller] += time.monotonic_ns() - begun
                    changed = _differences(before, _contents(table))
                    found[caller] += changed
                    if caller == "ignored":
                        answers.append(
                            {
                                "case": batch.case,
                                "errno": stopped.errno,
                                "sent": sent,
                                "said": stopped.applied,
                                "applied": changed,
                            }
                        )
        for variant, caller in (("broken", "ignored"), ("fixed", "counted")):
            triad.add(
                variant,
                case=f"{batch.case}, count {caller}",
                operations=sent * batches,
                anomalies=found[caller],
                cost_ns=spent[caller] / (sent * batches),
            )
    triad.add(
        "control",
        case="the batch fits",
        operations=entries * batches,
        anomalies=sum(_wrong_in_a_fitting_batch(entries) for _ in range(batches)),
    )
    table_of_answers = pd.DataFrame(answers).drop_duplicates(ignore_index=True)
    return {"counts": triad.table(), "answers": table_of_answers}


@contextmanager
def _prepared(batch: _Batch, entries: int) -> Iterator[Map]:
    with Map.create(batch.kind, key="u4", value="u8", max_entries=entries, name="batched") as table:
        if batch.deletes:
            keys = np.delete(np.arange(entries, dtype=np.uint32), entries // 2)
            table.update_many(keys, _values(keys))
        yield table


def _values(keys: Keys) -> npt.NDArray[np.uint64]:
    return keys.astype(np.uint64) + np.uint64(1)


def _contents(table: Map) -> dict[int, int]:
    snapshot = table.snapshot()
    return dict(zip(snapshot.keys.tolist(), snapshot.values.tolist(), strict=True))


def _differences(before: dict[int, int], after: dict[int, int]) -> int:
    return sum(before.get(key) != after.get(key) for key in before.keys() | after.keys())


def _send(table: Map, keys: Keys, deletes: bool) -> PartialBatch:
    try:
        if deletes:
            table.delete_many(keys)
        else:
            table.update_many(keys, _values(keys))
    except PartialBatch as stopped:
        return stopped
    raise LabError("This kernel took a batch that does not fit its map.")


def _take_back(table: Map, keys: Keys, deletes: bool) -> None:
    if deletes:
        table.update_many(keys, _values(keys))
    elif table.kind is MapKind.ARRAY:  # an array has no delete: zero is its absent
        table.update_many(keys, np.zeros(len(keys), np.uint64))
    else:
        table.delete_many(keys)


def _wrong_in_a_fitting_batch(entries: int) -> int:
    keys = np.arange(entries, dtype=np.uint32)
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=entries) as table:
        table.update_many(keys, _values(keys))
        wanted = dict(zip(keys.tolist(), _values(keys).tolist(), strict=True))
        return _differences(wanted, _contents(table))
