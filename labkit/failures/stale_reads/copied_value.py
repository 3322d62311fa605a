"""A program that runs for long keeps what it looked up: a copy, a pointer, an inner map."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pandas as pd

from labkit.analysis import history
from labkit.analysis.checkers import stale
from labkit.analysis.history import Op
from labkit.analysis.runs import Triad
from labkit.errors import TimedOut
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import programs
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import together
from labkit.kernel.programs import Unit

_READS = 40  # of each program run, evenly spaced
_PATIENCE_MS = 2_000  # how long a sleepable program waits for the update to return, at most
_START_LIMIT_S = 10.0
_WRITER, _PROGRAM = 0, 1


@dataclass(frozen=True)
class _Setting:
    variant: str
    case: str
    function: str
    outer: bool = False  # the update switches the inner map of an outer one
    sleepable: bool = False

    @property
    def kind(self) -> ProgramKind:
        return ProgramKind.SYSCALL if self.sleepable else ProgramKind.TC


_SETTINGS = (
    _Setting("broken", "value copied to the stack", "copy_held"),
    _Setting("broken", "inner map held, sleepable program", "inner_held", True, True),
    _Setting("control", "element held by pointer", "pointer_held"),
    _Setting("control", "inner map held, ordinary program", "inner_held", True),
    _Setting("fixed", "value looked up for each read", "looked_up"),
    _Setting("fixed", "inner map looked up, sleepable program", "inner_looked_up", True, True),
)


@experiment(
    "copied-value",
    number=6,
    family="stale-reads",
    question="Does a program that is running already see an update that has returned?",
    claims=("1.4b", "1.4c", "4.3"),
    needs=("bpf", "compile", "test_run", "two_cpus", "syscall_program", "map_in_map"),
    quick={"program_ms": [60, 240], "rounds": 1},
    full={"program_ms": [50, 100, 200, 400], "rounds": 4},
)
def copied_value(*, program_ms: list[int], rounds: int) -> Tables:
    """Update the policy of a program in the middle of its run, and see which version it uses.

    An array's element is written in place, so a pointer to it sees the update, and a copy on
    the stack never does. An outer map is switched by user space alone; that update then
    waits until every program that may still hold the old inner map has ended
    (kernel/bpf/syscall.c, ``maybe_wait_bpf_programs``: ``synchronize_rcu``). It does not
    wait for sleepable programs, which another kind of RCU protects: they may use the old
    inner map long after the update returned, so it must not be filled anew then.

    Parameters
    ----------
    program_ms : list of int
        How long a program runs, milliseconds. The update begins after a quarter of it. A
        sleepable program whose update has not returned by the end runs on until it has, 2 s
        at most.
    rounds : int
        Rounds of every setting and time, in turns.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a read by the program, an anomaly one that began after
        the update had returned and used the old version; ``cost_ns`` is the median time of
        one read. ``updates``: per program run ``variant``, ``case``, ``key`` (number of the
        run), ``program_ms``, ``round``, ``sleepable``, ``outer`` (bool), ``reads``,
        ``stale_reads``, ``began_ns`` and ``ended_ns`` (of the program), ``start_ns`` and
        ``end_ns`` (of the update; int64, CLOCK_MONOTONIC). ``history``: columns of
        :data:`labkit.analysis.history.HISTORY`; the key is the number of the run, version 1
        is what it began with, 2 the update.
    """
    updates: list[dict[str, object]] = []
    histories = []
    with programs.load("copied_value") as unit:
        functions = {one.case: unit.function(one.function, one.kind) for one in _SETTINGS}
        for turn in range(rounds):
            for length_ms in program_ms:
                for setting in _SETTINGS:
                    say(f"round {turn + 1} of {rounds}, {length_ms} ms: {setting.case}")
                    seen, times = _measure(
                        unit, functions[setting.case], setting, length_ms, key=len(updates)
                    )
                    histories.append(seen)
                    updates.append(
                        {
                            "variant": setting.variant,
                            "case": setting.case,
                            "key": len(updates),
                            "program_ms": length_ms,
                            "round": turn,
                            "sleepable": setting.sleepable,
                            "outer": setting.outer,
                            "reads": int(np.count_nonzero(seen["op"] == Op.READ)),
                            "stale_reads": int(stale(seen).sum()),
                            **times,
                        }
                    )
    table = pd.DataFrame(updates)
    whole = history.concatenate(*histories)
    triad = Triad("stale")
    for setting in _SETTINGS:
        group = table[table["case"] == setting.case]
        reads = whole[(whole["op"] == Op.READ) & np.isin(whole["key"], group["key"])]
        triad.add(
            setting.variant,
            case=setting.case,
            operations=int(group["reads"].sum()),
            anomalies=int(group["stale_reads"].sum()),
            cost_ns=float(np.median(reads["end_ns"] - reads["start_ns"])),
        )
    return {"counts": triad.table(), "updates": table, "history": history.to_frame(whole)}


def _measure(
    unit: Unit, function: programs.Function, setting: _Setting, length_ms: int, key: int
) -> tuple[history.History, dict[str, int]]:
    """History of one program run, and when program and update began and ended."""
    policy, course, outer = unit.map("policy"), unit.map("course"), unit.map("outer")
    returned = unit.map("returned")
    # The inner maps of both versions, filled before they are switched.
    inner = [
        Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=1, name="inner")
        for _ in range(2)
    ]
    writes: list[tuple[int, int]] = []

    def write(version: int) -> None:
        inner[version - 1].update(0, version)
        begun = time.monotonic_ns()
        if setting.outer:
            outer.update(0, inner[version - 1].fd)
        else:
            policy.update(0, version)
        writes.append((begun, time.monotonic_ns()))

    plan = {
        "period_ns": length_ms * 1_000_000 // _READS,
        "least_ns": length_ms * 1_000_000,
        "longest_ns": (length_ms + _PATIENCE_MS) * 1_000_000 if setting.sleepable else 0,
        "began_ns": 0,
        "ended_ns": 0,
        "reads": 0,
    }

    def switch() -> None:
        _wait_for_start(course)
        time.sleep(length_ms / 4_000)
        write(2)
        if setting.sleepable:
            time.sleep(length_ms / _READS * 3 / 1_000)  # for some reads after the return
            returned.update(0, 1)

    try:
        write(1)
        course.update(0, plan)
        returned.update(0, 0)
        together(function.test_run, switch, timeout_s=30.0)
        ended = course.lookup(0)
        taken = unit.map("reads").snapshot().values[: int(ended["reads"])]
    finally:
        if setting.outer:
            outer.delete(0)
        for one in inner:
            one.close()
    start_ns, end_ns = zip(*writes, strict=True)
    written = history.build(
        [Op.WRITE, Op.WRITE],
        actor=_WRITER, key=key, version=[1, 2], start_ns=start_ns, end_ns=end_ns,
    )  # fmt: skip
    seen = history.build(
        [Op.READ] * len(taken),
        actor=_PROGRAM, key=key, version=taken["version"],
        start_ns=taken["start_ns"], end_ns=taken["end_ns"],
    )  # fmt: skip
    times = {
        "began_ns": int(ended["began_ns"]),
        "ended_ns": int(ended["ended_ns"]),
        "start_ns": start_ns[1],
        "end_ns": end_ns[1],
    }
    return history.concatenate(written, seen), times


def _wait_for_start(course: Map) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while not course.lookup(0)["began_ns"]:
        if time.monotonic() > deadline:
            raise TimedOut(f"The program did not begin within {_START_LIMIT_S:g} s.")
        time.sleep(0.000_2)
