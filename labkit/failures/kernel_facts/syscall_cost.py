"""What one lookup or update costs, whose cost that is, and what a poll adds to it."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput, LabError
from labkit.failures import open_loop
from labkit.failures.experiment import Tables, experiment, say
from labkit.failures.open_loop import OpenLoopWriter
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import ahead_of_others
from labkit.kernel.programs import Unit

LATE_MS = 47.0
"""What the article gives as the mean duration of a lookup, milliseconds."""

_KEY = 1
_FAST_PERIOD_MS = 1.0
_MOST_CALLS = 100_000
_RUNS = 200_000  # of a program in place
_ROUNDS = 4  # turns in which the ways are measured one after the other

Nanoseconds = npt.NDArray[np.int64]


@experiment(
    "syscall-cost",
    number=34,
    family="kernel-facts",
    question="Is it the lookup that makes a poller late, or the time between two of them?",
    claims=("5.2",),
    needs=("bpf", "compile", "test_run", "tracefs", "tracepoint", "batch_hash"),
    quick={"calls": 2_000, "period_ms": 200.0, "changes": 60, "gap_ms": 40.0, "seed": 34},
    full={"calls": 20_000, "period_ms": 200.0, "changes": 600, "gap_ms": 40.0, "seed": 34},
)
def syscall_cost(*, calls: int, period_ms: float, changes: int, gap_ms: float, seed: int) -> Tables:
    """Time single calls in several ways, and follow changes by a slow and by a fast poll.

    The clock around a call in Python also times the interpreter, so the floor is measured
    beside it: the clock alone, a foreign function that does nothing, a bpf(2) that is refused
    at once. Programs on the entry and the exit of bpf(2) time the same calls without Python.

    Parameters
    ----------
    calls : int
        Calls of each way; 100,000 at most.
    period_ms : float
        Of the slow poll, milliseconds; the article's is 200.
    changes : int
        Changes that are followed by each poll.
    gap_ms : float
        Mean gap between two changes, exponentially distributed, milliseconds; open loop.
    seed : int
        Of the schedule; both polls follow the same one.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a call, or a change that is followed; an anomaly one that
        took 47 ms or longer, of a change from its intended moment until a look showed it or a
        newer one. ``times``: ``way``, ``ns`` (float32), one row per call. ``delays``: ``case``,
        ``period_ms``, ``version``, ``delay_ms``. ``programs``: ``program``, ``mean_ns`` (by the
        kernel's clock, of many runs in place). ``batches``: ``entries``, ``ns_per_entry``.
    """
    if calls > _MOST_CALLS:
        raise BadInput(f"calls of syscall-cost are {_MOST_CALLS:,} at most, not {calls:,}.")
    if period_ms < 2 * LATE_MS:
        raise BadInput(f"period_ms of syscall-cost is at least {2 * LATE_MS:g}.")
    namespace = os.stat("/proc/self/ns/pid")
    with programs.load(
        "syscall_cost",
        CALLS=calls,
        THREAD=threading.get_native_id(),
        NAMESPACE_DEVICE=namespace.st_dev,
        NAMESPACE_INODE=namespace.st_ino,
    ) as unit:
        table = unit.map("table")
        keys = np.arange(table.max_entries, dtype=np.uint32)
        table.update_many(keys, keys)
        say(f"{calls:,} calls in each way")
        times = _in_turns(_ways(unit, table), calls)
        times |= _by_kernel(unit, table, calls)
        batches = _batches(table)
        in_place = [
            {"program": name, "mean_ns": unit.function(name).test_run(repeat=_RUNS).mean_ns}
            for name in ("nothing", "look_up")
        ]
    triad = Triad(f"{LATE_MS:g} ms or longer")
    delays = []
    moments = open_loop.schedule(changes, gap_ms, seed)
    for variant, period in (("broken", period_ms), ("fixed", _FAST_PERIOD_MS)):
        case = f"change, polled for every {period:g} ms"
        say(case)
        late = _followed(moments, period) / 1e6
        triad.add(variant, case=case, operations=changes, anomalies=int((late >= LATE_MS).sum()))
        delays.append(
            pd.DataFrame({"case": case, "period_ms": period,
                          "version": np.arange(1, changes + 1), "delay_ms": late})
        )  # fmt: skip
    for way in ("lookup", "update"):
        spent = times[f"{way}, libbpf"]
        triad.add("control", case=f"one {way}", operations=calls,
                  anomalies=int((spent >= LATE_MS * 1e6).sum()),
                  cost_ns=float(np.median(spent)))  # fmt: skip
    return {
        "counts": triad.table(),
        "times": pd.DataFrame(
            {
                "way": np.repeat(list(times), [len(spent) for spent in times.values()]),
                "ns": np.concatenate(list(times.values())).astype(np.float32),
            }
        ),
        "delays": pd.concat(delays, ignore_index=True),
        "programs": pd.DataFrame(in_place),
        "batches": batches,
    }


def _ways(unit: Unit, table: Map) -> dict[str, Callable[[], Any]]:
    """One call each; the first three are the floor of the measurement."""
    look_up, update = libbpf.api().bpf_map_lookup_elem, libbpf.api().bpf_map_update_elem
    key, value = np.array([_KEY], np.uint32), np.zeros(1, np.uint64)
    key_at, value_at, fd = key.ctypes.data, value.ctypes.data, table.fd
    absolute = ctypes.CDLL(None).labs
    absolute.argtypes, absolute.restype = [ctypes.c_long], ctypes.c_long
    by_bcc = unit.table("table")
    bcc_key = by_bcc.Key(_KEY)

    def nothing(_keep: object = (key, value)) -> None:
        return None

    return {
        "clock alone": nothing,
        "foreign call": lambda: absolute(-1),
        "refused bpf(2)": lambda: look_up(-1, key_at, value_at),
        "lookup, libbpf": lambda: look_up(fd, key_at, value_at),
        "update, libbpf": lambda: update(fd, key_at, value_at, 0),
        "lookup, labkit Map": lambda: table.lookup(_KEY),
        "lookup, bcc t[k]": lambda: by_bcc[bcc_key],
    }


def _in_turns(ways: dict[str, Callable[[], Any]], calls: int) -> dict[str, Nanoseconds]:
    spent: dict[str, list[int]] = {way: [] for way in ways}
    for part in np.array_split(np.arange(calls), _ROUNDS):
        for way, call in ways.items():
            spent[way] += _timed(call, len(part))
    return {way: np.array(ns) for way, ns in spent.items()}


def _timed(call: Callable[[], Any], calls: int) -> list[int]:
    spent = []
    for _ in range(calls):
        begun = time.monotonic_ns()
        call()
        spent.append(time.monotonic_ns() - begun)
    return spent


def _by_kernel(unit: Unit, table: Map, calls: int) -> dict[str, Nanoseconds]:
    """The same calls, timed by programs between the entry and the exit of the system call."""
    value = np.zeros(1, table.value_dtype)
    progress, recorded = unit.map("progress"), unit.map("times")
    found = {}
    for name, call in (
        ("lookup", table.reader(_KEY, value)),
        ("update", table.updater(_KEY, value)),
    ):
        progress.update(0, (0, 0))
        links = [
            unit.attach(unit.function(function, ProgramKind.TRACEPOINT), f"syscalls:{event}")
            for function, event in (("on_exit", "sys_exit_bpf"), ("on_enter", "sys_enter_bpf"))
        ]
        try:
            for _ in range(calls):
                call()
        finally:
            for link in links:
                unit.detach(link)
        seen = int(progress.lookup(0)["calls"])
        if seen != calls:
            raise LabError(f"Of {calls} calls the programs timed {seen}.")
        found[f"{name}, inside the kernel"] = recorded.snapshot().values.astype(np.int64)
    return found


def _batches(table: Map) -> pd.DataFrame:
    rows = []
    for _ in range(_ROUNDS):
        begun = time.monotonic_ns()
        entries = len(table.snapshot())
        rows.append({"entries": entries, "ns_per_entry": (time.monotonic_ns() - begun) / entries})
    return pd.DataFrame(rows)


def _followed(moments: Nanoseconds, period_ms: float) -> npt.NDArray[np.float64]:
    """Nanoseconds from the intended moment of each change until a look showed it or a newer."""
    with Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=1, name="followed") as table:
        written, value = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
        update, look = table.updater(0, written), table.reader(0, value)

        def write(version: int) -> None:
            written[0] = version
            update()

        versions, at = [], []
        # Ahead of other load, or it is the queue for a CPU that both polls would show.
        with ahead_of_others(), OpenLoopWriter(moments, write) as writer:
            moment, period_ns = time.monotonic_ns(), round(period_ms * 1e6)
            while not writer.all_seen():
                look()
                versions.append(int(value[0]))
                at.append(time.monotonic_ns())
                writer.saw(versions[-1])
                moment = open_loop.next_look(moment, period_ns)
            intended = writer.intended_ns
    first = np.searchsorted(versions, np.arange(1, len(moments) + 1))
    return np.array(at)[first] - intended.astype(np.float64)
