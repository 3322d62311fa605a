"""A batch that fails has been applied in part."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import LabError
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map, PartialBatch
from labkit.lab.experiment import Case, Counted, Statement, experiment

Keys = npt.NDArray[np.uint32]


def _both(id: str, words: str, kind: MapKind, *, deletes: bool = False) -> tuple[Case, Case]:
    """A batch that must fail, of a caller who ignores the count, and of one who goes by it."""
    batch: dict[str, Any] = {"kind": kind, "deletes": deletes}
    return (
        Case("broken", f"{id}-ignored", f"{words}, count ignored", counts=False, **batch),
        Case("fixed", f"{id}-counted", f"{words}, count counted", counts=True, **batch),
    )


@experiment(
    "partial-batch",
    number=21,
    family="concurrency",
    question="When a batch update fails, is the map as it was before?",
    claims=("1.3c", "1.3f"),
    needs=("bpf", "batch_hash", "batch_array"),
    quick={"entries": 100, "batches": 200, "rounds": 1},
    full={"entries": 100, "batches": 2_000, "rounds": 1},
    cases=(
        *_both("hash-full", "update of a hash too small (E2BIG)", MapKind.HASH),
        *_both("array-full", "update of an array too small (E2BIG)", MapKind.ARRAY),
        # Of keys that are there, but for one in the middle.
        *_both("delete", "delete meets an absent key (ENOENT)", MapKind.HASH, deletes=True),
        Case("control", "fits", "the batch fits"),
    ),
    counted=Counted("unexpected element", operations="elements", anomalies="unexpected",
                    cost_ns="element_ns"),
    statements=(
        Statement("a batch that fails leaves elements behind", "some(broken)"),
        Statement("a batch that fits is applied whole", "none(control)"),
        Statement("the kernel's count is what stands in the map",
                  "all(answers.said == answers.applied) and some(answers.applied > 0)"),
        Statement("nothing is left once the count is taken back", "none(fixed)"),
    ),
    sentence="A batch update that failed had been applied in part: {broken} elements stood in the "
    "map although the call returned an error. The count that the call hands back was exact every "
    "time; a caller who takes those elements back is left with {fixed.anomalies}.",
)  # fmt: skip
def partial_batch(case: Case, *, entries: int, batches: int) -> dict[str, Any]:
    """Send batches that must fail in the middle, and read what stands in the map.

    ``BPF_MAP_UPDATE_BATCH`` applies element by element and stops at the first refusal
    (kernel/bpf/syscall.c, ``generic_map_update_batch``); it undoes nothing and says in
    ``count`` how many it applied.

    Parameters
    ----------
    case : Case
        The batch, and whether its caller goes by the count.
    entries : int
        Room in the map.
    batches : int
        Batches in a round.

    Returns
    -------
    dict
        ``elements`` (of batches whose call failed, in the control of those that fit),
        ``unexpected`` (elements whose state in the map is not what the caller believes: the
        broken one believes that a failed call changed nothing, the fixed one reads ``count`` and
        takes back what was applied; int64), ``element_ns`` (float64, the taking back included).
        For the broken caller ``answers``: each kind of answer once with ``errno``, ``sent``,
        ``said`` (the kernel's count), ``applied`` (found in the map), ``batches`` (how many were
        answered so).
    """
    if case.variant == "control":
        wrong = sum(_wrong_in_a_fitting_batch(entries) for _ in range(batches))
        return {"elements": entries * batches, "unexpected": wrong, "element_ns": math.nan}
    sent = entries if case.deletes else entries * 2
    keys = np.arange(sent, dtype=np.uint32)
    found, spent, answers = 0, 0, []
    for _ in range(batches):
        with _prepared(case, entries) as table:
            before = _contents(table)
            begun = time.monotonic_ns()
            stopped = _send(table, keys, case.deletes)
            if case.counts:
                _take_back(table, keys[: stopped.applied], case.deletes)
            spent += time.monotonic_ns() - begun
            changed = _differences(before, _contents(table))
            found += changed
            answers.append((stopped.errno, sent, stopped.applied, changed))
    observed = {
        "elements": sent * batches,
        "unexpected": found,
        "element_ns": spent / (sent * batches),
    }
    if case.counts:
        return observed
    told = pd.DataFrame(answers, columns=["errno", "sent", "said", "applied"])
    return {**observed, "answers": told.value_counts(sort=False).reset_index(name="batches")}


@contextmanager
def _prepared(case: Case, entries: int) -> Iterator[Map]:
    with Map.create(case.kind, key="u4", value="u8", max_entries=entries, name="batched") as table:
        if case.deletes:
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
