"""An iteration by key skips and repeats keys that stay in the map all the time."""

from __future__ import annotations

import time
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.figures import anomaly_rates
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import together
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment

Keys = npt.NDArray[np.uint32]


def _by_key(table: Map) -> tuple[Keys, bool]:
    keys = np.fromiter(table.keys(), np.uint32)
    return keys, len(keys) < 2 * table.max_entries


def _by_batch(table: Map) -> tuple[Keys, bool]:
    snapshot = table.snapshot()
    return snapshot.keys, snapshot.complete


def _overwrite(table: Map, staying: Keys, passing: Keys) -> None:
    table.update_many(staying, staying)


def _churn(table: Map, staying: Keys, passing: Keys) -> None:
    table.update_many(passing, passing)
    table.delete_many(passing)


def _derived(tables: Tables) -> Tables:
    """The counts: keys that an iteration should show, and those it skipped or showed again."""
    iterations = tables["iterations"]
    wrong = (iterations["skipped"] + iterations["repeated"]).clip(upper=iterations["residents"])
    counted = Counted(
        "skipped or repeated", operations="residents", anomalies="wrong", cost_ns="key_ns"
    )
    return {"counts": counted.table(iterations.assign(wrong=wrong))}


@experiment(
    "skipped-keys",
    number=17,
    family="concurrency",
    question="Does an iteration over a map show every key that is in it, and each one once?",
    claims=(),
    needs=("bpf", "two_cpus", "batch_hash"),
    quick={"residents": 4_000, "churned": 4_000, "iterations": 12, "rounds": 2},
    full={"residents": 4_000, "churned": 4_000, "iterations": 40, "rounds": 5},
    cases=(
        Case("broken", "overwrite", "iteration by key, others overwrite", read=_by_key,
             disturb=_overwrite),
        Case("broken", "churn", "iteration by key, others insert and delete", read=_by_key,
             disturb=_churn),
        Case("control", "quiet", "iteration by key, nobody writes", read=_by_key),
        Case("fixed", "batch-overwrite", "read by batch, others overwrite", read=_by_batch,
             disturb=_overwrite),
        Case("fixed", "batch-churn", "read by batch, others insert and delete", read=_by_batch,
             disturb=_churn),
    ),
    derive=_derived,
    statements=(
        Statement("keys are skipped or repeated while others write", "some(broken, like=3e-4)"),
        Statement("every key shows once while nobody writes",
                  'none(control, like=broken["overwrite"])'),
        Statement("a read by batch shows every key once", 'none(fixed, like=broken["overwrite"])'),
        Statement("a read by batch always ends by itself",
                  'all(iterations(variant="fixed").finished)'),
    ),
    sentence="Of the keys that never left the map, an iteration by key skipped or repeated "
    '{broken}; {rows(iterations(case="churn", finished=0))} of {rows(iterations(case="churn"))} '
    "iterations were sent back to the start until their bound ended them. A read by batch, under "
    "the same writes: {fixed}.",
    figure=anomaly_rates,
)  # fmt: skip
def skipped_keys(case: Case, *, residents: int, churned: int, iterations: int) -> dict[str, Any]:
    """Iterate over a hash while others overwrite its keys, or insert and delete other keys.

    ``BPF_MAP_GET_NEXT_KEY`` finds the current key and answers its neighbour in the
    bucket's list (kernel/bpf/hashtab.c, ``htab_map_get_next_key``). An overwritten key
    moves to the head of its bucket, behind a reader who has passed the head: skipped. A
    current key that somebody has deleted is not found, and the iteration begins again: repeated.
    A batch reads each bucket whole, under its lock.

    Parameters
    ----------
    case : Case
        How the map is read, and what others do to it meanwhile.
    residents : int
        Keys that are in the map from the first to the last moment.
    churned : int
        Other keys, inserted and deleted meanwhile.
    iterations : int
        Reads of the whole map in a round.

    Returns
    -------
    dict
        ``iterations``: a DataFrame of one row for each with ``residents``, ``shown``, ``skipped``,
        ``repeated`` (int64), ``finished`` (bool: it came to an end by itself) and ``key_ns``
        (float64, per key shown).
    """
    staying = np.arange(residents, dtype=np.uint32)
    passing = np.arange(residents, residents + churned, dtype=np.uint32)
    with Map.create(
        MapKind.HASH, key="u4", value="u8", max_entries=residents + churned, name="iterated"
    ) as table:
        table.update_many(staying, staying)
        done = Event()

        def iterate() -> list[dict[str, Any]]:
            rows = []
            try:
                for _ in range(iterations):
                    begun = time.monotonic_ns()
                    keys, finished = case.read(table)
                    spent = time.monotonic_ns() - begun
                    times = np.bincount(keys, minlength=residents)[:residents]
                    rows.append(
                        {
                            "residents": residents,
                            "shown": len(keys),
                            "skipped": int((times == 0).sum()),
                            "repeated": int((times > 1).sum()),
                            "finished": finished,
                            "key_ns": spent / max(len(keys), 1),
                        }
                    )
            finally:
                done.set()
            return rows

        disturb = case.get("disturb", None)

        def write() -> None:
            while not done.is_set():
                if disturb is None:
                    time.sleep(0.001)
                else:
                    disturb(table, staying, passing)

        return {"iterations": pd.DataFrame(together(iterate, write)[0])}
