"""Increments that vanish: read-modify-write by programs and by processes, and what cures it."""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from threading import Barrier

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import TimedOut
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import MapKind, ProgramKind, UpdateFlag
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, another_cpu, shared_array, together
from labkit.kernel.programs import Function

_PER_RUN = 64  # increments in one run of a program
_STRETCH_NS = 1_000_000  # a program runs about that long between two meetings of the CPUs
_CALIBRATION = 200  # runs that tell how many make a stretch
_OURS = 0.8  # of a stretch: all CPUs ran at once for that long, and nobody else on them
_TURNS = 50  # increments of a process between two looks at the others
_LIMIT_S = 60.0

Step = Callable[[], int]


@dataclass(frozen=True)
class _Way:
    case: str
    cure: bool
    function: str  # what runs on each CPU: a program, or a way of `_steps`
    table: str = "counter"


_BY_PROGRAM = (
    _Way("program: (*v)++", False, "plain_increment"),
    _Way("program: lookup, update", False, "look_up_and_update"),
    _Way("program: atomic add", True, "atomic_add"),
    _Way("program: per-CPU value", True, "per_cpu_increment", "counter_per_cpu"),
    _Way("program: bpf_spin_lock", True, "locked_increment", "counter_locked"),
)
_BY_PROCESS = (
    _Way("process: lookup, update", False, "plain"),
    _Way("process: the same, BPF_F_LOCK", False, "locked", "counter_locked"),
    _Way("process: a key each", True, "own key", "keys"),
    _Way("process: under a file lock", True, "file lock"),
    _Way("process: a program adds", True, "program"),
)


@experiment(
    "lost-updates",
    number=13,
    family="concurrency",
    question="Which ways to increment a shared counter lose increments, and what does a cure cost?",
    claims=("1.3a",),
    needs=("bpf", "compile", "test_run", "two_cpus", "spin_lock"),
    quick={"program_ms": 12, "process_increments": 3_000, "processes": 2, "rounds": 5},
    full={"program_ms": 30, "process_increments": 20_000, "processes": 2, "rounds": 12},
)
def lost_updates(
    *, program_ms: int, process_increments: int, processes: int, rounds: int
) -> Tables:
    """Increment one counter from two CPUs at once, and alone, and see what it lacks.

    Read, add one, write back is three steps however it is spelled: what another writer
    stored in between is overwritten, and no call fails. ``BPF_F_LOCK`` guards each copy of
    the value, not the time between the lookup and the update, so it does not help here; an
    atomic add, a lock around all three steps, or a counter that nobody shares does.

    Parameters
    ----------
    program_ms : int
        Milliseconds for which a program increments on each CPU in a round; longer where
        the CPUs get into each other's way.
    process_increments : int
        Increments by each process in a round, on average.
    processes : int
        Processes that share the counter, spread over the CPUs.
    rounds : int
        Rounds of every way, in turns, so that a burst of other load hits all alike.

    Returns
    -------
    dict of DataFrame
        ``counts``, with ``cost_ns`` of one increment less its floor, and ``rounds``: one row
        per way, load and round with columns ``case``, ``variant``, ``by`` (program or
        process), ``load`` (contended or alone), ``round``, ``increments``, ``lost`` (int64),
        ``ns`` and ``floor_ns`` (float64): nanoseconds of one increment as one writer sees
        them (median stretch, so that a CPU lent to others does not count; a long wait for a
        lock does not either), and of the same loop without the change (a program that only
        looks the counter up; a process whose calls stay in user space, which is the
        interpreter's share), and ``ours`` (float64, 0 to 1, programs only): the share of
        stretches during which other load took no CPU away; ``ns`` is of those, unless 0.
    """
    rows: list[dict[str, object]] = []
    with programs.load("lost_updates", INCREMENTS=_PER_RUN) as unit, ExitStack() as stack:
        keys = stack.enter_context(
            Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=processes)
        )
        tables = {
            way.table: keys if way.table == "keys" else unit.map(way.table)
            for way in _BY_PROGRAM + _BY_PROCESS
        }
        functions = {way.function: unit.function(way.function) for way in _BY_PROGRAM}
        floor = unit.function("look_up_only")
        adder = unit.function("add_one", ProgramKind.SYSCALL)
        gate = os.memfd_create("labkit-gate")
        stack.callback(os.close, gate)
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            for alone in (False, True):
                floor_ns = _race_programs(floor, 1 if alone else 2, program_ms)[1]
                for way in _BY_PROGRAM + _BY_PROCESS:
                    table = tables[way.table]
                    _reset(table)
                    if way in _BY_PROGRAM:
                        function, writers = functions[way.function], 1 if alone else 2
                        done, ns, ours = _race_programs(function, writers, program_ms)
                        idle_ns = floor_ns
                    else:
                        make = partial(_steps, way.function, table, adder, gate)
                        writers = 1 if alone else processes
                        done, ns, idle_ns = _race_processes(make, writers, process_increments)
                        ours = math.nan
                    rows.append(
                        {
                            "case": way.case,
                            "variant": "fixed" if way.cure else "control" if alone else "broken",
                            "by": "program" if way in _BY_PROGRAM else "process",
                            "load": "alone" if alone else "contended",
                            "round": turn,
                            "increments": done,
                            "lost": done - _total(table),
                            "ns": ns,
                            "floor_ns": idle_ns,
                            "ours": ours,
                        }
                    )
    measured = pd.DataFrame(rows)
    return {"counts": _counts(measured), "rounds": measured}


def _counts(rounds: pd.DataFrame) -> pd.DataFrame:
    triad = Triad("lost increment")
    # A cure is judged where it is needed: under contention.
    judged = rounds[(rounds["variant"] != "fixed") | (rounds["load"] == "contended")]
    for (variant, case), group in judged.groupby(["variant", "case"], sort=False):
        triad.add(
            str(variant),
            case=str(case),
            operations=int(group["increments"].sum()),
            anomalies=int(group["lost"].sum()),
            cost_ns=max(0.0, float((group["ns"] - group["floor_ns"]).median())),
        )
    return triad.table()


def _reset(table: Map) -> None:
    entries = table.snapshot()
    table.update_many(entries.keys, np.zeros_like(entries.values))


def _total(table: Map) -> int:
    values = table.snapshot().values
    return int((values["count"] if values.dtype.names else values).sum())


def _race_programs(function: Function, writers: int, milliseconds: int) -> tuple[int, float, float]:
    """Run a program on that many CPUs, in stretches that all of them begin together.

    Returns all increments, the nanoseconds of one by the kernel's own clock, and the share of
    stretches that they are taken from: those during which every CPU was ours, if there were any.
    """
    # Together: a lock takes several times as long where two want it.
    calibrated = together(*[lambda: function.test_run(repeat=_CALIBRATION).mean_ns] * writers)
    runs = max(1, _STRETCH_NS // max(1, *calibrated))
    stretches = max(1, milliseconds * 1_000_000 // _STRETCH_NS)
    # A CPU that other load took away would leave the rest uncontended for long: wait for it.
    begin = Barrier(writers)

    def work() -> list[tuple[int, int, int]]:
        rows = []
        for _ in range(stretches):
            begin.wait(_LIMIT_S)
            begun = time.monotonic_ns()
            mean_ns = function.test_run(repeat=runs).mean_ns
            rows.append((begun, time.monotonic_ns(), mean_ns))
        return rows

    begun, ended, mean_ns = np.moveaxis(np.array(together(*[work] * writers)), -1, 0)
    took = ended - begun
    # The kernel's clock of a test run stands still while the CPU is lent to others.
    ours = (runs * mean_ns >= _OURS * took).all(axis=0)
    ours &= ended.min(axis=0) - begun.max(axis=0) >= _OURS * took.max(axis=0)
    counted = mean_ns[:, ours] if ours.any() else mean_ns
    increments = writers * (_CALIBRATION + stretches * runs) * _PER_RUN
    return increments, float(np.median(counted)) / _PER_RUN, float(ours.mean())


@dataclass(frozen=True)
class _Steps:
    """One increment by a process: calls before the addition, calls after it, its buffer."""

    before: tuple[Step, ...]
    after: tuple[Step, ...]
    value: npt.NDArray[np.uint64]

    def repeat(self, times: int) -> int:
        """Do it so often; returns the nanoseconds that it took."""
        before, after, value = self.before, self.after, self.value
        begun = time.monotonic_ns()
        for _ in range(times):
            for step in before:
                step()
            value[-1] += 1
            for step in after:
                step()
        return time.monotonic_ns() - begun

    def without_kernel(self) -> _Steps:
        """The same number of calls, each of which copies a word in user space instead."""
        copied = np.zeros(2, np.uint64)
        at, call = copied.ctypes.data, ctypes.memmove

        def copy() -> int:
            return int(call(at + 8, at, 8) != 0)

        return _Steps((copy,) * len(self.before), (copy,) * len(self.after), copied)


def _steps(way: str, table: Map, adder: Function, gate: int, me: int) -> _Steps:
    flags = UpdateFlag.LOCK if way == "locked" else UpdateFlag.ANY
    value = np.zeros(table.value_size // 8, np.uint64)
    key = me if way == "own key" else 0
    read, write = table.reader(key, value, flags), table.updater(key, value, flags)
    if way == "file lock":

        def lock() -> int:
            fcntl.lockf(gate, fcntl.LOCK_EX)
            return 0

        def unlock() -> int:
            fcntl.lockf(gate, fcntl.LOCK_UN)
            return 0

        return _Steps((lock, read), (write, unlock), value)
    if way == "program":
        options = libbpf.TestRunOpts()
        call, fd, at = libbpf.api().bpf_prog_test_run_opts, adder.fd, ctypes.byref(options)
        return _Steps((lambda: int(call(fd, at)),), (), value)
    return _Steps((read,), (write,), value)


def _race_processes(
    make: Callable[[int], _Steps], writers: int, increments: int
) -> tuple[int, float, float]:
    """Let processes increment until they have done their part between them.

    Returns all increments, nanoseconds of one, and of one without kernel.
    """
    done = shared_array(writers, np.int64)
    ready = shared_array(writers, np.int64)

    def work(me: int) -> tuple[list[int], float]:
        steps = make(me)
        idle = steps.without_kernel()
        idle_ns = min(idle.repeat(_TURNS) for _ in range(10)) / _TURNS
        ready[me] = 1
        deadline = time.monotonic() + _LIMIT_S
        while not ready.all():
            if time.monotonic() > deadline:
                raise TimedOut("A process of lost-updates waited in vain for the others.")
        spent = []
        # Together, not each: whoever gets a file lock late may get it seldom.
        while int(done.sum()) < writers * increments:
            spent.append(steps.repeat(_TURNS))
            done[me] += _TURNS
        return spent, idle_ns

    with ExitStack() as stack:
        children = [
            stack.enter_context(Child(partial(work, me), cpu=another_cpu(me)))
            for me in range(writers)
        ]
        costs = [child.result(_LIMIT_S) for child in children]
    ns = float(np.median(np.concatenate([spent for spent, _ in costs]))) / _TURNS
    return int(done.sum()), ns, float(np.mean([idle_ns for _, idle_ns in costs]))
