"""A walk by key skips and repeats keys that stay in the map all the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import together

Keys = npt.NDArray[np.uint32]


@experiment(
    "skipped-keys",
    number=17,
    family="concurrency",
    question="Does a walk over a map show every key that is in it, and each one once?",
    claims=(),
    needs=("bpf", "two_cpus", "batch_hash"),
    quick={"residents": 4_000, "churned": 4_000, "walks": 12, "rounds": 2},
    full={"residents": 4_000, "churned": 4_000, "walks": 40, "rounds": 5},
)
def skipped_keys(*, residents: int, churned: int, walks: int, rounds: int) -> Tables:
    """Walk a hash while others overwrite its keys, or insert and delete other keys.

    ``BPF_MAP_GET_NEXT_KEY`` finds the current key and answers its neighbour in the
    bucket's list (kernel/bpf/hashtab.c, ``htab_map_get_next_key``). An overwritten key
    moves to the head of its bucket, behind a walker who has passed the head: skipped. A
    current key that somebody has deleted is not found, and the walk begins again: repeated.
    A batch reads each bucket whole, under its lock.

    Parameters
    ----------
    residents : int
        Keys that are in the map from the first to the last moment.
    churned : int
        Other keys, inserted and deleted meanwhile.
    walks : int
        Reads of the whole map in a round.
    rounds : int
        Rounds of every setting, in turns.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a resident that one walk should show, an anomaly one
        that it skipped or showed again; ``cost_ns`` is the time per key shown. ``walks``:
        one row a walk with ``variant``, ``case``, ``round``, ``shown``, ``skipped``,
        ``repeated`` (int64) and ``finished`` (bool: it came to an end by itself).
    """
    rows: list[dict[str, object]] = []
    for turn in range(rounds):
        for variant, case, read, disturb in _SETTINGS:
            say(f"round {turn + 1} of {rounds}: {case}")
            for row in _measure(read, disturb, residents, churned, walks):
                rows.append({"variant": variant, "case": case, "round": turn, **row})
    table = pd.DataFrame(rows)
    triad = Triad("skipped or repeated")
    for (name, label), group in table.groupby(["variant", "case"], sort=False):
        wrong = np.minimum(group["skipped"] + group["repeated"], residents)
        triad.add(
            str(name),
            case=str(label),
            operations=residents * len(group),
            anomalies=int(wrong.sum()),
            cost_ns=float((group["spent_ns"] / group["shown"].clip(lower=1)).median()),
        )
    return {"counts": triad.table(), "walks": table.drop(columns="spent_ns")}


def _measure(
    read: Callable[[Map], tuple[Keys, bool]],
    disturb: Callable[[Map, Keys, Keys], None] | None,
    residents: int,
    churned: int,
    walks: int,
) -> list[dict[str, Any]]:
    staying = np.arange(residents, dtype=np.uint32)
    passing = np.arange(residents, residents + churned, dtype=np.uint32)
    with Map.create(
        MapKind.HASH, key="u4", value="u8", max_entries=residents + churned, name="walked"
    ) as table:
        table.update_many(staying, staying)
        done = Event()

        def walk() -> list[dict[str, Any]]:
            rows = []
            try:
                for _ in range(walks):
                    begun = time.monotonic_ns()
                    keys, finished = read(table)
                    spent = time.monotonic_ns() - begun
                    times = np.bincount(keys, minlength=residents)[:residents]
                    rows.append(
                        {
                            "shown": len(keys),
                            "skipped": int((times == 0).sum()),
                            "repeated": int((times > 1).sum()),
                            "finished": finished,
                            "spent_ns": spent,
                        }
                    )
            finally:
                done.set()
            return rows

        def write() -> None:
            while not done.is_set():
                if disturb is None:
                    time.sleep(0.001)
                else:
                    disturb(table, staying, passing)

        rows: list[dict[str, Any]] = together(walk, write)[0]
    return rows


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


_SETTINGS = (
    ("broken", "walk by key, others overwrite", _by_key, _overwrite),
    ("broken", "walk by key, others insert and delete", _by_key, _churn),
    ("control", "walk by key, nobody writes", _by_key, None),
    ("fixed", "read by batch, others overwrite", _by_batch, _overwrite),
    ("fixed", "read by batch, others insert and delete", _by_batch, _churn),
)
