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

from labkit.errors import TimedOut
from labkit.figures import Axes, rate_point, stacked, style
from labkit.judge.statistics import bootstrap
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import MapKind, ProgramKind, UpdateFlag
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, another_cpu, shared_array, together
from labkit.kernel.programs import Program
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment
from labkit.lab.progress import Meter
from labkit.runs import Run

_PER_RUN = 64  # increments in one run of a program
_STRETCH_NS = 1_000_000  # a program runs about that long between two meetings of the CPUs
_CALIBRATION = 200  # runs that tell how many make a stretch
_OURS = 0.8  # of a stretch: all CPUs ran at once for that long, and nobody else on them
_TURNS = 50  # increments of a process between two reads of what the others did
_LIMIT_S = 60.0

Step = Callable[[], int]


_ALONE = "-alone"  # ends the id of a control: the same by a single writer


def derive(tables: Tables) -> Tables:
    """Count lost increments; a cure is judged where it is needed: under contention.

    ``cost_ns`` is that of one increment, its loop included.
    """
    rounds = tables["rounds"]
    judged = rounds[(rounds["variant"] != "fixed") | (rounds["load"] == "contended")]
    counted = Counted("lost increment", operations="increments", anomalies="lost", cost_ns="ns")
    return {"counts": counted.table(judged)}


def _lost(run: Run, ax: Axes) -> None:
    """For every way, the share of increments lost."""
    for y, case in enumerate(_DRAWN):
        variant = "broken" if case in run.cases("broken") else "fixed"
        count, look = run.count(variant, case), style.VARIANT[variant]
        rate_point(ax, y, count.anomalies, count.operations, look, per=100)
    style.logarithmic(ax, ticks=6)
    ax.set_yticks(range(len(_DRAWN)), [run.label(case) for case in _DRAWN])
    ax.set_ylim(len(_DRAWN) - 0.5, -0.5)
    ax.set_xlabel(
        "increments lost under contention, %\n(hollow: none seen, bound at 95 %)", loc="right"
    )


def _cost(run: Run, ax: Axes) -> None:
    """For every way, the time of one increment."""
    rounds = run.table("rounds")
    looks = {
        "alone": style.Look(style.BLUE, "o", "none"),
        "contended": style.Look(style.VERMILLION, "D", "none"),
    }
    for shift, (load, look) in zip((-0.17, 0.17), looks.items(), strict=True):
        for y, case in enumerate(_DRAWN):
            alone = f"{case}{_ALONE}" if case in run.cases("broken") else case
            of = alone if load == "alone" else case
            rows = rounds[(rounds["case"] == of) & (rounds["load"] == load)]
            ns = bootstrap(rows["ns"])
            # Too few rounds for an interval: the range of all of them.
            low = rows["ns"].min() if math.isnan(ns.low) else ns.low
            high = rows["ns"].max() if math.isnan(ns.high) else ns.high
            ax.errorbar(
                ns.estimate, y + shift, xerr=[[ns.estimate - low], [high - ns.estimate]],
                **look.points(), mfc="white" if load == "alone" else look.color,
                label=load if y == 0 else None,
            )  # fmt: skip
            ax.plot(
                rows["floor_ns"].median(), y + shift, "|", color=style.GREY, ms=6,
                label="loop alone" if y == 0 and load == "contended" else None,
            )  # fmt: skip
    style.logarithmic(ax, ticks=6)
    ax.set_xlabel(
        "ns per increment, loop included\n(median over rounds, 95 % interval)", loc="right"
    )
    style.legend_above(ax, 3, columnspacing=0.8, handletextpad=0.1)


_CASES = (
    Case("broken", "add", "program: (*v)++", program="plain_increment"),
    Case("broken", "write-back", "program: lookup, update", program="look_up_and_update"),
    Case("fixed", "atomic", "program: atomic add", program="atomic_add"),
    Case("fixed", "per-cpu", "program: per-CPU value", program="per_cpu_increment",
         table="counter_per_cpu"),
    Case("fixed", "spin-lock", "program: bpf_spin_lock", program="locked_increment",
         table="counter_locked"),
    Case("broken", "process", "process: lookup, update", way="plain"),
    Case("broken", "process-lock", "process: the same, BPF_F_LOCK", way="locked",
         table="counter_locked"),
    Case("fixed", "own-key", "process: a key each", way="own key", table="keys"),
    Case("fixed", "file-lock", "process: under a file lock", way="file lock"),
    Case("fixed", "process-program", "process: a program adds", way="program"),
    Case("control", "add-alone", "program: (*v)++, alone", beside="add"),
    Case("control", "write-back-alone", "program: lookup, update, alone", beside="write-back"),
    Case("control", "process-alone", "process: lookup, update, alone", beside="process"),
    Case("control", "process-lock-alone", "process: the same, BPF_F_LOCK, alone",
         beside="process-lock"),
)  # fmt: skip
_DRAWN = [case.id for case in _CASES if case.variant != "control"]


@experiment(
    "lost-updates",
    number=13,
    family="concurrency",
    question="Which ways to increment a shared counter lose increments, and what does a cure cost?",
    claims=("1.3a",),
    needs=("bpf", "compile", "test_run", "two_cpus", "spin_lock"),
    quick={"program_ms": 12, "process_increments": 3_000, "processes": 2, "rounds": 6},
    full={"program_ms": 30, "process_increments": 20_000, "processes": 2, "rounds": 12},
    cases=_CASES,
    derive=derive,
    statements=(
        Statement("increments are lost under contention", "some(broken, like=0.001)"),
        Statement("a single writer loses none", "none(control)"),
        Statement("no cure loses any", "none(fixed)"),
        Statement("a lock that two CPUs want costs more than a counter that they do not share",
                  'ratio(rounds(case="spin-lock", load="contended").ns, '
                  'rounds(case="per-cpu", load="contended").ns) > 1 '
                  'and min(rounds(case="per-cpu", load="contended").ns) > 0'),
    ),
    sentence='Two CPUs that increment one counter lost {percent(broken["add"].rate)} by (*v)++ and '
    '{percent(broken["write-back"].rate)} by lookup and update; processes lost '
    '{percent(broken["process"].rate)}, and {percent(broken["process-lock"].rate)} with '
    "BPF_F_LOCK, which guards the copy and not the sum. Under contention an increment took "
    '{fixed["atomic"].cost_ns} ns by an atomic add, {fixed["per-cpu"].cost_ns} by a per-CPU value '
    'and {fixed["spin-lock"].cost_ns} under bpf_spin_lock, loop included, and these lost none; nor '
    "did processes with a key each, a file lock, or a program that adds for them.",
    figure=stacked(_lost, _cost, height=4.9, share="y"),
)  # fmt: skip
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
        Rounds of every way, in turns, so that a burst of other load hits all alike. All of
        them use one compiled object, whose making takes longer than a round.

    Returns
    -------
    dict of DataFrame
        ``rounds``: one row per way, load and round with columns ``variant``, ``case``, ``load``
        (contended or alone), ``round``, ``increments``, ``lost`` (int64), ``ns`` and ``floor_ns``
        (float64): nanoseconds of one increment as one writer sees them (median stretch, so that
        a CPU lent to others does not count; a long wait for a lock does not either), and of the
        same loop without the change (a program that only looks the counter up; a process whose
        calls stay in user space, which is the interpreter's share), and ``ours`` (float64, 0 to
        1, programs only): the share of stretches during which other load took no CPU away;
        ``ns`` is of those, unless 0.
    """
    rows: list[dict[str, object]] = []
    ways = [case for case in _CASES if not case.beside]
    with (
        programs.load("lost_updates", INCREMENTS=_PER_RUN) as loaded,
        Meter(2 * len(ways) * rounds, unit="race") as meter,
        ExitStack() as stack,
    ):
        keys = stack.enter_context(
            Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=processes)
        )
        names = {case.get("table", "counter") for case in ways} - {"keys"}
        tables = {"keys": keys} | {name: loaded.map(name) for name in names}
        functions = {
            case.id: loaded.program(case.program) for case in ways if case.get("program", "")
        }
        floor = loaded.program("look_up_only")
        adder = loaded.program("add_one", ProgramKind.SYSCALL)
        gate = os.memfd_create("labkit-gate")
        stack.callback(os.close, gate)
        for turn in range(rounds):
            for alone in (False, True):
                floor_ns = _race_programs(floor, 1 if alone else 2, program_ms)[1]
                for case in ways:
                    table = tables[case.get("table", "counter")]
                    _reset(table)
                    if case.id in functions:
                        writers = 1 if alone else 2
                        done, ns, ours = _race_programs(functions[case.id], writers, program_ms)
                        idle_ns = floor_ns
                    else:
                        make = partial(_steps, case.way, table, adder, gate)
                        writers = 1 if alone else processes
                        done, ns, idle_ns = _race_processes(make, writers, process_increments)
                        ours = math.nan
                    control = alone and case.variant == "broken"
                    rows.append(
                        {
                            "variant": "control" if control else case.variant,
                            "case": case.id + _ALONE if control else case.id,
                            "load": "alone" if alone else "contended",
                            "round": turn,
                            "increments": done,
                            "lost": done - _total(table),
                            "ns": ns,
                            "floor_ns": idle_ns,
                            "ours": ours,
                        }
                    )
                    meter.step()
    return {"rounds": pd.DataFrame(rows)}


def _reset(table: Map) -> None:
    entries = table.snapshot()
    table.update_many(entries.keys, np.zeros_like(entries.values))


def _total(table: Map) -> int:
    values = table.snapshot().values
    return int((values["count"] if values.dtype.names else values).sum())


def _race_programs(function: Program, writers: int, milliseconds: int) -> tuple[int, float, float]:
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


def _steps(way: str, table: Map, adder: Program, gate: int, me: int) -> _Steps:
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
