"""A lookup misses a key that is overwritten at that moment, though nobody deletes it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from threading import Event

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import programs
from labkit.kernel.libbpf import MapFlag, UpdateFlag
from labkit.kernel.parallel import together

_CHUNK = 1_000  # program runs between two looks at whether the writer has done its part


@dataclass(frozen=True)
class _Setting:
    variant: str
    case: str
    kind: str
    flags: MapFlag = MapFlag.NONE
    locked: bool = False  # the value carries a bpf_spin_lock
    update: UpdateFlag | None = UpdateFlag.ANY  # None: nobody writes


_SETTINGS = (
    _Setting("broken", "hash", "hash"),
    _Setting("broken", "hash, NO_PREALLOC", "hash", MapFlag.NO_PREALLOC),
    _Setting("broken", "hash with lock, plain update", "hash", locked=True),
    _Setting("control", "hash, nobody writes", "hash", update=None),
    _Setting("fixed", "hash with lock, BPF_F_LOCK update", "hash", locked=True,
             update=UpdateFlag.LOCK),
    _Setting("fixed", "array", "array"),
)  # fmt: skip


@experiment(
    "transient-null",
    number=5,
    family="stale-reads",
    question="Can a lookup miss a key that is only ever overwritten, never deleted?",
    claims=("1.2b",),
    needs=("bpf", "compile", "test_run", "two_cpus", "spin_lock", "batch_hash"),
    quick={"keys": 64, "sweeps": 30_000, "batches": 3_000, "rounds": 3},
    full={"keys": 64, "sweeps": 100_000, "batches": 10_000, "rounds": 8},
)
def transient_null(*, keys: int, sweeps: int, batches: int, rounds: int) -> Tables:
    """Read every key in a program on one CPU while another CPU overwrites them.

    The update of a hash element links the new element and unlinks the old one in two
    steps, and a freed element is used again at once (kernel/bpf/hashtab.c,
    ``htab_map_update_elem``): a reader on the bucket's list can pass both by. An update
    with ``BPF_F_LOCK``, and every update of an array, writes in place. A retry finds the
    key.

    Parameters
    ----------
    keys : int
        Keys in the map; all stay in it for the whole run.
    sweeps : int
        Program runs in a round, at the least; each looks every key up once.
    batches : int
        Batch updates in a round, at the least; each overwrites every key once.
    rounds : int
        Rounds of every setting, in turns, so that a burst of other load hits all alike.

    Returns
    -------
    dict of DataFrame
        ``counts``, with ``cost_ns`` of a lookup, and ``rounds``: one row per setting and
        round with columns ``variant``, ``case``, ``round``, ``lookups``, ``absent``,
        ``absent_again``, ``updates`` (int64), ``lookup_ns`` and ``update_ns`` (float64,
        nanoseconds per element; NaN where nobody writes).
    """
    rows = []
    for turn in range(rounds):
        for setting in _SETTINGS:
            say(f"round {turn + 1} of {rounds}: {setting.case}")
            rows.append({"round": turn, **_measure(setting, keys, sweeps, batches)})
    table = pd.DataFrame(rows)
    triad = Triad("null read")
    for (variant, case), group in table.groupby(["variant", "case"], sort=False):
        triad.add(
            str(variant),
            case=str(case),
            operations=int(group["lookups"].sum()),
            anomalies=int(group["absent"].sum()),
            cost_ns=float(group["lookup_ns"].median()),
        )
    retried = table[table["case"] == "hash"]
    triad.add(
        "fixed",
        case="hash, one retry in the program",
        operations=int(retried["lookups"].sum()),
        anomalies=int(retried["absent_again"].sum()),
        cost_ns=float(retried["lookup_ns"].median()),
    )
    return {"counts": triad.table(), "rounds": table}


def _measure(setting: _Setting, keys: int, sweeps: int, batches: int) -> dict[str, object]:
    constants: dict[str, int | str] = {
        "KIND": setting.kind,
        "KEYS": keys,
        "FLAGS": int(setting.flags),
    }
    if setting.locked:
        constants["LOCKED"] = 1
    with programs.load("transient_null", **constants) as unit:
        table, reader = unit.map("table"), unit.function("read_all")
        every_key = np.arange(keys, dtype=np.uint32)
        values = np.zeros(keys, table.value_dtype)
        table.update_many(every_key, values)
        written, read = Event(), Event()

        def read_all() -> tuple[int, float]:
            swept, nanoseconds = 0, []
            while swept < sweeps or not written.is_set():
                nanoseconds.append(reader.test_run(repeat=_CHUNK).mean_ns / keys)
                swept += _CHUNK
            read.set()
            return swept, float(np.mean(nanoseconds))

        def write_all() -> tuple[int, float]:
            done, begun = 0, time.monotonic_ns()
            while setting.update is not None and (done < batches or not read.is_set()):
                values["version"] += 1
                table.update_many(every_key, values, setting.update)
                done += 1
                if done == batches:
                    written.set()
            written.set()
            spent = time.monotonic_ns() - begun
            return done * keys, spent / (done * keys) if done else math.nan

        (swept, lookup_ns), (updates, update_ns) = together(read_all, write_all)
        seen = unit.map("counts").lookup(0)
    return {
        "variant": setting.variant,
        "case": setting.case,
        "lookups": swept * keys,
        "absent": int(seen["absent"]),
        "absent_again": int(seen["absent_again"]),
        "updates": updates,
        "lookup_ns": lookup_ns,
        "update_ns": update_ns,
    }
