"""Counts are lost between reading and clearing them."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from ctypes import byref, c_uint32
from threading import Event

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import libbpf, programs
from labkit.kernel.maps import KeyAbsent, Map
from labkit.kernel.parallel import together
from labkit.kernel.programs import Unit

Collect = Callable[[], int]


@experiment(
    "collected-counts",
    number=18,
    family="concurrency",
    question="Which ways to collect and clear counters lose events that arrive meanwhile?",
    claims=(),
    needs=("bpf", "compile", "test_run", "two_cpus", "batch_hash"),
    quick={"keys": 64, "events": 600_000, "pause_ms": 1.0, "rounds": 2},
    full={"keys": 64, "events": 3_000_000, "pause_ms": 1.0, "rounds": 6},
)
def collected_counts(*, keys: int, events: int, pause_ms: float, rounds: int) -> Tables:
    """Count events in a program on one CPU while user space collects from the other.

    What was counted between the read of a key and its deletion is deleted unread
    (iovisor/bcc#3173). Lookup-and-delete closes that gap: it reads and unlinks under the
    bucket's lock (kernel/bpf/hashtab.c, ``__htab_map_lookup_and_delete_elem``). What
    remains is a program that looked the element up before and adds to it after; only
    counters that are never deleted are exact.

    Parameters
    ----------
    keys : int
        Counters.
    events : int
        Events that the program counts in a round, at full speed.
    pause_ms : float
        Pause between two collections, milliseconds.
    rounds : int
        Rounds of every way, in turns.

    Returns
    -------
    dict of DataFrame
        ``counts`` (an anomaly is an event that was counted and never collected;
        ``cost_ns`` is the time of a collection per key) and ``rounds``: columns
        ``variant``, ``case``, ``round``, ``events``, ``collected``, ``collections``
        (int64), ``key_ns`` (float64).
    """
    rows = []
    for turn in range(rounds):
        for variant, case, way, while_counting in _WAYS:
            say(f"round {turn + 1} of {rounds}: {case}")
            with programs.load("event_counts", KEYS=keys) as unit:
                collected, collections, key_ns = _collect(
                    unit, way(unit, keys), events, pause_ms, keys, while_counting
                )
            rows.append(
                {
                    "variant": variant,
                    "case": case,
                    "round": turn,
                    "events": events,
                    "collected": collected,
                    "collections": collections,
                    "key_ns": key_ns,
                }
            )
    table = pd.DataFrame(rows)
    triad = Triad("lost")
    for (name, label), group in table.groupby(["variant", "case"], sort=False):
        produced, got = int(group["events"].sum()), int(group["collected"].sum())
        triad.add(
            str(name),
            case=str(label),
            operations=produced,
            anomalies=produced - got,
            cost_ns=float(group["key_ns"].median()),
        )
    return {"counts": triad.table(), "rounds": table}


def _collect(
    unit: Unit, collect: Collect, events: int, pause_ms: float, keys: int, while_counting: bool
) -> tuple[int, int, float]:
    """Events collected, collections made, nanoseconds per key of a collection."""
    program, counted = unit.function("count_event"), Event()

    def count() -> None:
        program.test_run(repeat=events)
        counted.set()

    def gather() -> tuple[int, list[int]]:
        total, spent = 0, []
        while not counted.is_set():
            time.sleep(pause_ms / 1000)
            if while_counting:
                begun = time.monotonic_ns()
                total += collect()
                spent.append(time.monotonic_ns() - begun)
        return total, spent

    _, (total, spent) = together(count, gather)
    begun = time.monotonic_ns()
    total += collect()  # what was left when the last event had been counted
    spent.append(time.monotonic_ns() - begun)
    return total, len(spent), float(np.median(spent)) / keys


def _items_and_clear(unit: Unit, keys: int) -> Collect:
    table = unit.table("counts")

    def collect() -> int:
        total: int = sum(leaf.value for _, leaf in table.items())
        table.clear()
        return total

    return collect


def _read_then_delete(unit: Unit, keys: int) -> Collect:
    table = unit.map("counts")

    def collect() -> int:
        total = 0
        for key in range(keys):
            count = table.get(key)
            if count is not None:
                total += int(count)
                table.delete(key)
        return total

    return collect


def _lookup_and_delete(unit: Unit, keys: int) -> Collect:
    table = unit.map("counts")

    def collect() -> int:
        total = 0
        for key in range(keys):
            try:
                total += int(table.lookup_and_delete(key))
            except KeyAbsent:
                continue
        return total

    return collect


def _lookup_and_delete_batch(unit: Unit, keys: int) -> Collect:
    table = unit.map("counts")

    def collect() -> int:
        return _taken_out(table)

    return collect


def _taken_out(table: Map) -> int:
    values = np.zeros(table.max_entries, np.uint64)
    keys = np.zeros(table.max_entries, np.uint32)
    place, count, options = ctypes.c_uint64(), c_uint32(table.max_entries), libbpf.BatchOpts()
    result = libbpf.api().bpf_map_lookup_and_delete_batch(
        table.fd, None, byref(place), keys.ctypes.data, values.ctypes.data,
        byref(count), byref(options),
    )  # fmt: skip
    if result != -2:  # the walk ends with ENOENT, having filled the arrays
        libbpf.checked(result, "taking counts out by batch")
    return int(values[: count.value].sum())


def _differences(unit: Unit, keys: int) -> Collect:
    table = unit.map("counts")
    before = 0

    def collect() -> int:
        nonlocal before
        now = int(table.snapshot().values.sum())
        gained, before = now - before, now
        return gained

    return collect


_WAYS = (
    ("broken", "bcc items(), then clear()", _items_and_clear, True),
    ("broken", "read a key, then delete it", _read_then_delete, True),
    ("control", "read once the counting is over", _read_then_delete, False),
    ("fixed", "lookup and delete, key by key", _lookup_and_delete, True),
    ("fixed", "lookup and delete by batch", _lookup_and_delete_batch, True),
    ("fixed", "never delete, take differences", _differences, True),
)
