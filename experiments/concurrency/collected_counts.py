"""Counts are lost between reading and clearing them."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from ctypes import byref, c_uint32
from threading import Event
from typing import Any

import numpy as np

from labkit.figures import anomaly_rates
from labkit.kernel import libbpf, programs
from labkit.kernel.maps import KeyAbsent, Map
from labkit.kernel.parallel import together
from labkit.kernel.programs import BccObject, BpfObject
from labkit.lab.experiment import Case, Counted, Statement, experiment

Collect = Callable[[], int]


def _items_and_clear(loaded: BccObject, keys: int) -> Collect:
    table = loaded.table("counts")

    def collect() -> int:
        total: int = sum(leaf.value for _, leaf in table.items())
        table.clear()
        return total

    return collect


def _read_then_delete(loaded: BpfObject, keys: int) -> Collect:
    table = loaded.map("counts")

    def collect() -> int:
        total = 0
        for key in range(keys):
            count = table.get(key)
            if count is not None:
                total += int(count)
                table.delete(key)
        return total

    return collect


def _lookup_and_delete(loaded: BpfObject, keys: int) -> Collect:
    table = loaded.map("counts")

    def collect() -> int:
        total = 0
        for key in range(keys):
            try:
                total += int(table.lookup_and_delete(key))
            except KeyAbsent:
                continue
        return total

    return collect


def _lookup_and_delete_batch(loaded: BpfObject, keys: int) -> Collect:
    table = loaded.map("counts")

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
    if result != -2:  # the iteration ends with ENOENT, having filled the arrays
        libbpf.checked(result, "taking counts out by batch")
    return int(values[: count.value].sum())


def _differences(loaded: BpfObject, keys: int) -> Collect:
    table = loaded.map("counts")
    before = 0

    def collect() -> int:
        nonlocal before
        now = int(table.snapshot().values.sum())
        gained, before = now - before, now
        return gained

    return collect


def _loses_less(case: str) -> str:
    """In a round that way loses fewer events than read-then-delete does; all have as many."""
    lost = "rounds(case={0!r}).events - rounds(case={0!r}).collected"
    return f"ratio({lost.format(case)}, {lost.format('read-delete')}) < 1"


@experiment(
    "collected-counts",
    number=18,
    family="concurrency",
    question="Which ways to collect and clear counters lose events that arrive meanwhile?",
    claims=(),
    needs=("bpf", "compile", "test_run", "two_cpus", "batch_hash"),
    quick={"keys": 64, "events": 400_000, "pause_ms": 1.0, "rounds": 7},
    full={"keys": 64, "events": 3_000_000, "pause_ms": 1.0, "rounds": 6},
    cases=(
        Case("broken", "items-clear", "bcc items(), then clear()", way=_items_and_clear),
        Case("broken", "read-delete", "read a key, then delete it", way=_read_then_delete),
        Case("control", "afterwards", "read once the counting is over", way=_read_then_delete,
             afterwards=True),
        Case("fixed", "by-key", "lookup and delete, key by key", way=_lookup_and_delete),
        Case("fixed", "by-batch", "lookup and delete by batch", way=_lookup_and_delete_batch),
        Case("fixed", "differences", "never delete, take differences", way=_differences),
    ),
    counted=Counted("lost", operations="events", anomalies="events - collected", cost_ns="key_ns"),
    statements=(
        Statement("loses events", "some(broken, like=4e-4)"),
        Statement("nothing is lost once counting is over",
                  'none(control, like=broken["read-delete"])'),
        Statement("lookup and delete, key by key, loses fewer than read-then-delete does",
                  _loses_less("by-key")),
        Statement("lookup and delete by batch loses fewer than read-then-delete does",
                  _loses_less("by-batch")),
        Statement("counters that are never deleted lose nothing",
                  'none(fixed["differences"], like=broken["read-delete"])'),
    ),
    sentence="Reading and then deleting lost {broken} events; lookup-and-delete closes the gap "
    'between the two calls and lost {fixed["by-key", "by-batch"].anomalies}, those that a program '
    "was adding to an element that had just been taken; counters that are never deleted lost "
    '{fixed["differences"].anomalies}.',
    figure=anomaly_rates,
)  # fmt: skip
def collected_counts(case: Case, *, keys: int, events: int, pause_ms: float) -> dict[str, Any]:
    """Count events in a program on one CPU while user space collects from the other.

    What was counted between the read of a key and its deletion is deleted unread
    (iovisor/bcc#3173). Lookup-and-delete closes that gap: it reads and unlinks under the
    bucket's lock (kernel/bpf/hashtab.c, ``__htab_map_lookup_and_delete_elem``). What
    remains is a program that looked the element up before and adds to it after; only
    counters that are never deleted are exact.

    Parameters
    ----------
    case : Case
        How the counters are collected.
    keys : int
        Counters.
    events : int
        Events that the program counts in a round, at full speed.
    pause_ms : float
        Pause between two collections, milliseconds.

    Returns
    -------
    dict
        ``events``, ``collected`` (of them), ``collections`` (int64), ``key_ns`` (float64, of a
        collection per key).
    """
    by_bcc = case.way is _items_and_clear
    make = programs.load_by_bcc if by_bcc else programs.load
    with make("event_counts", KEYS=keys) as loaded:
        program, counted = loaded.program("count_event"), Event()
        collect: Collect = case.way(loaded, keys)

        def count() -> None:
            program.test_run(repeat=events)
            counted.set()

        def gather() -> tuple[int, list[int]]:
            total, spent = 0, []
            while not counted.is_set():
                time.sleep(pause_ms / 1000)
                if not case.get("afterwards", False):
                    begun = time.monotonic_ns()
                    total += collect()
                    spent.append(time.monotonic_ns() - begun)
            return total, spent

        _, (total, spent) = together(count, gather)
        begun = time.monotonic_ns()
        total += collect()  # what was left when the last event had been counted
        spent.append(time.monotonic_ns() - begun)
    return {
        "events": events,
        "collected": total,
        "collections": len(spent),
        "key_ns": float(np.median(spent)) / keys,
    }
