"""A lookup misses a key that is overwritten at that moment, though nobody deletes it."""

from __future__ import annotations

import math
import time
from threading import Event
from typing import Any

import numpy as np

from labkit.figures import anomaly_rates
from labkit.kernel import programs
from labkit.kernel.libbpf import MapFlag, UpdateFlag
from labkit.kernel.parallel import together
from labkit.lab.experiment import Case, Counted, Statement, experiment

_CHUNK = 1_000  # program runs between two looks at whether the writer has done its part


@experiment(
    "transient-null",
    number=5,
    family="stale-reads",
    question="Can a lookup miss a key that is only ever overwritten, never deleted?",
    claims=("1.2b",),
    needs=("bpf", "compile", "test_run", "two_cpus", "spin_lock", "batch_hash"),
    quick={"keys": 64, "sweeps": 30_000, "batches": 3_000, "rounds": 3},
    full={"keys": 64, "sweeps": 100_000, "batches": 10_000, "rounds": 8},
    cases=(
        Case("broken", "hash", "hash"),
        Case("broken", "no-prealloc", "hash, NO_PREALLOC", flags=MapFlag.NO_PREALLOC),
        Case("broken", "lock-ignored", "hash with lock, plain update", locked=True),
        Case("control", "quiet", "hash, nobody writes", update=None),
        Case("fixed", "lock", "hash with lock, BPF_F_LOCK update", locked=True,
             update=UpdateFlag.LOCK),
        Case("fixed", "array", "array", kind="array"),
        Case("fixed", "retry", "hash, one retry in the program", beside="hash"),
    ),
    counted=Counted("null read", operations="lookups", anomalies="absent", cost_ns="lookup_ns"),
    statements=(
        Statement("a plain update hides a key for a moment", "some(broken, like=1e-6)"),
        Statement("no key is absent while nobody writes", "none(control)"),
        Statement("an update in place hides none", 'none(fixed["lock", "array"])'),
        # A second miss needs a second update of the same key within nanoseconds: rare, not
        # impossible.
        Statement("one retry finds at least 99 of 100 of the keys that were missed",
                  '100 * fixed["retry"].anomalies <= broken["hash"].anomalies '
                  'and some(broken["hash"])'),
    ),
    sentence="A key that is never deleted was absent in {broken} lookups while it was overwritten "
    "by plain updates, and in {control} while nobody wrote. Updates in place (BPF_F_LOCK, array) "
    'brought it to {fixed["lock", "array"]}, one retry to {fixed["retry"]}.',
    figure=anomaly_rates,
)  # fmt: skip
def transient_null(case: Case, *, keys: int, sweeps: int, batches: int) -> list[dict[str, Any]]:
    """Read every key in a program on one CPU while another CPU overwrites them.

    The update of a hash element links the new element and unlinks the old one in two
    steps, and a freed element is used again at once (kernel/bpf/hashtab.c,
    ``htab_map_update_elem``): a reader on the bucket's list can pass both by. An update
    with ``BPF_F_LOCK``, and every update of an array, writes in place. A retry finds the
    key.

    Parameters
    ----------
    case : Case
        Map and update.
    keys : int
        Keys in the map; all stay in it for the whole run.
    sweeps : int
        Program runs in a round, at the least; each looks every key up once.
    batches : int
        Batch updates in a round, at the least; each overwrites every key once.

    Returns
    -------
    list of dict
        ``lookups``, ``absent``, ``updates`` (int64), ``lookup_ns`` and ``update_ns`` (float64,
        nanoseconds per element; NaN where nobody writes).
    """
    update = case.get("update", UpdateFlag.ANY)
    constants = {"KIND": case.get("kind", "hash"), "FLAGS": int(case.get("flags", MapFlag.NONE))}
    locked = {"LOCKED": 1} if case.get("locked", False) else {}
    with programs.load("transient_null", KEYS=keys, **constants, **locked) as loaded:
        table, reader = loaded.map("table"), loaded.program("read_all")
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
            while update is not None and (done < batches or not read.is_set()):
                values["version"] += 1
                table.update_many(every_key, values, update)
                done += 1
                if done == batches:
                    written.set()
            written.set()
            spent = time.monotonic_ns() - begun
            return done * keys, spent / (done * keys) if done else math.nan

        (swept, lookup_ns), (updates, update_ns) = together(read_all, write_all)
        seen = loaded.map("counts").lookup(0)
    observed = {"lookups": swept * keys, "absent": int(seen["absent"]), "updates": updates,
                "lookup_ns": lookup_ns, "update_ns": update_ns}  # fmt: skip
    if case.id != "hash":
        return [observed]
    return [observed, {**observed, "case": "retry", "absent": int(seen["absent_again"])}]
