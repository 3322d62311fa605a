"""A program that runs for long keeps what it looked up: a copy, a pointer, an inner map."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from labkit.errors import TimedOut
from labkit.figures import Axes, stacked, style
from labkit.judge import history
from labkit.judge.checkers import stale, unwritten
from labkit.judge.history import Op
from labkit.kernel import programs
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import together
from labkit.kernel.programs import BpfObject
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment
from labkit.runs import Run

_READS = 40  # of each program run, evenly spaced
_PATIENCE_MS = 2_000  # how long a sleepable program waits for the update to return, at most
_START_LIMIT_S = 10.0
_WRITER, _PROGRAM = 0, 1
_MS = 1e6


def _judged(tables: Tables) -> Tables:
    """Every read of the history with what the checkers say of it, and the counts of them."""
    saved = tables["history"]
    whole = history.from_frame(saved)
    reads = saved.assign(reads=1, stale=stale(whole), written=~unwritten(whole))
    reads = reads.assign(read_ns=(reads["end_ns"] - reads["start_ns"]).astype(float))
    reads = reads[reads["op"] == Op.READ]
    counted = Counted("stale", operations="reads", anomalies="stale", cost_ns="read_ns")
    return {"counts": counted.table(reads), "reads": reads}


def _draw_reads(run: Run, ax: Axes) -> None:
    """The reads of one run of each case."""
    rounds, reads = run.table("rounds"), run.table("reads")
    longest = rounds[rounds["program_ms"] == rounds["program_ms"].max()]
    one_each = longest.drop_duplicates("case")
    for row, update in enumerate(one_each.itertuples()):
        blocked_ms = max(update.blocked_ns / _MS, 0.5)
        ax.barh(row, blocked_ms, height=0.75, color=style.YELLOW, zorder=0)
        of_run = reads[reads["key"] == update.key]
        new = of_run["version"] == 2
        for chosen, look in (
            (of_run[~new & ~of_run["stale"]], {"color": style.GREY, "marker": "o"}),
            (of_run[of_run["stale"]], style.VARIANT["broken"].points()),
            (of_run[new], style.VARIANT["fixed"].points()),
        ):
            at = (chosen["start_ns"].astype(np.int64) - update.start_ns) / _MS
            ax.plot(at, [row] * len(at), **{**look, "linestyle": "none"}, ms=2.5)
    ax.plot([], [], "o", color=style.GREY, ms=2.5, label="old, update not returned")
    ax.plot([], [], **style.VARIANT["broken"].points(), ms=2.5, label="old, update returned")
    ax.plot([], [], **style.VARIANT["fixed"].points(), ms=2.5, label="new")
    ax.barh([0], [0], color=style.YELLOW, label="update under way")
    labels = [run.label(case).replace(", ", ",\n") for case in one_each["case"]]
    ax.set_yticks(range(len(one_each)), labels)
    ax.set_ylim(len(one_each) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.set_xlabel("read, ms after the update began")
    style.legend_above(ax, 2, columnspacing=1)


def _draw_blocked(run: Run, ax: Axes) -> None:
    """Blocked time against time left."""
    rounds = run.table("rounds")
    highest = 0.0
    for case, number in (("held-ordinary", 1), ("held-sleepable", 0)):
        rows = rounds[rounds["case"] == case]
        left, blocked = rows["left_ns"] / _MS, rows["blocked_ns"] / _MS
        highest = max(highest, left.max(), blocked.max())
        ax.plot(left, blocked, **style.look(number).points(), label=run.label(case), alpha=0.8)
    ax.plot([0, highest], [0, highest], color=style.GREY, lw=0.8, label="the program's end")
    ax.set_xlabel("time the program had left, ms")
    ax.set_ylabel("update blocked, ms")
    style.legend_above(ax)


@experiment(
    "copied-value",
    number=6,
    family="stale-reads",
    question="Does a program that is running already see an update that has returned?",
    claims=("1.4b", "1.4c", "4.3"),
    needs=("bpf", "compile", "test_run", "two_cpus", "syscall_program", "map_in_map"),
    quick={"program_ms": [60, 240], "rounds": 1},
    full={"program_ms": [50, 100, 200, 400], "rounds": 4},
    cases=(
        Case("broken", "copy", "value copied to the stack", function="copy_held"),
        Case("broken", "held-sleepable", "inner map held, sleepable program",
             function="inner_held", outer=True, sleepable=True),
        Case("control", "pointer", "element held by pointer", function="pointer_held"),
        Case("control", "held-ordinary", "inner map held, ordinary program",
             function="inner_held", outer=True),
        Case("fixed", "looked-up", "value looked up for each read", function="looked_up"),
        Case("fixed", "inner-looked-up", "inner map looked up, sleepable program",
             function="inner_looked_up", outer=True, sleepable=True),
    ),
    derive=_judged,
    statements=(
        # Under load a program makes few reads, and none may fall behind the return.
        Statement("what is kept is old after the update has returned", "some(broken, like=0.05)"),
        Statement("a copy on the stack stays old to the end",
                  'all(reads(case="copy").version == 1)'),
        Statement("the switch returns while a sleepable program still runs",
                  'some(rounds(case="held-sleepable").blocked_ns '
                  '< rounds(case="held-sleepable").left_ns)'),
        Statement("the switch never returns while an ordinary program holds the old inner map",
                  'all(0 < rounds(case="held-ordinary").left_ns '
                  '<= rounds(case="held-ordinary").blocked_ns)'),
        Statement("a pointer, and an inner map held by an ordinary program, are never old",
                  "none(control)"),
        Statement("a lookup for each read is a cure", "none(fixed)"),
        Statement("no version comes from nowhere", "all(reads.written)"),
    ),
    sentence="After the update had returned, a running program used the old version in "
    '{broken["copy"]} reads of a copy on its stack, and in {broken["held-sleepable"]} through an '
    "inner map that a sleepable program held. The switch of an outer map waited for the ordinary "
    'program in {rows(rounds(blocked_ns >= left_ns, case="held-ordinary"))} of '
    '{rows(rounds(case="held-ordinary"))} runs (median {median(rounds(case="held-ordinary")'
    '.blocked_ns / rounds(case="held-ordinary").left_ns)} of the time that the program had left) '
    "and returned before the sleepable one ended in "
    '{rows(rounds(blocked_ns < left_ns, case="held-sleepable"))} of '
    '{rows(rounds(case="held-sleepable"))} ({median(rounds(case="held-sleepable").blocked_ns / '
    'rounds(case="held-sleepable").left_ns)}). A pointer to the element missed nothing '
    '({control["pointer"]}), nor did a lookup for each read ({fixed}).',
    figure=stacked(_draw_reads, _draw_blocked, height=5.2, ratios=(1.3, 1)),
)  # fmt: skip
def copied_value(case: Case, *, program_ms: list[int]) -> list[dict[str, Any]]:
    """Update the policy of a program in the middle of its run, and see which version it uses.

    An array's element is written in place, so a pointer to it sees the update, and a copy on
    the stack never does. An outer map is switched by user space alone; that update then
    waits until every program that may still hold the old inner map has ended
    (kernel/bpf/syscall.c, ``maybe_wait_bpf_programs``: ``synchronize_rcu``). It does not
    wait for sleepable programs, which another kind of RCU protects: they may use the old
    inner map long after the update returned, so it must not be filled anew then.

    Parameters
    ----------
    case : Case
        What the program keeps, and of what.
    program_ms : list of int
        How long a program runs, milliseconds. The update begins after a quarter of it. A
        sleepable program whose update has not returned by the end runs on until it has, 2 s
        at most.

    Returns
    -------
    list of dict
        For each program run ``key`` (its own among all runs: the time at which its first
        version was written), ``program_ms``, ``began_ns`` (of the program), ``start_ns`` (of
        the update; both CLOCK_MONOTONIC), ``blocked_ns`` (that the update took) and
        ``left_ns`` (from the update's start to the program's end; all int64). ``history``:
        columns of :data:`labkit.judge.history.HISTORY`, whole; the key is that of the
        program run, version 1 is what it began with, 2 the update.
    """
    kind = ProgramKind.SYSCALL if case.get("sleepable", False) else ProgramKind.TC
    with programs.load("copied_value") as loaded:
        function = loaded.program(case.function, kind)
        return [_measure(loaded, function, case, length_ms) for length_ms in program_ms]


def _measure(
    loaded: BpfObject, function: programs.Program, case: Case, length_ms: int
) -> dict[str, Any]:
    """History of one program run, and when program and update began and ended."""
    switched, sleepable = case.get("outer", False), case.get("sleepable", False)
    policy, course, outer = loaded.map("policy"), loaded.map("course"), loaded.map("outer")
    returned = loaded.map("returned")
    # The inner maps of both versions, filled before they are switched.
    inner = [
        Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=1, name="inner")
        for _ in range(2)
    ]
    writes: list[tuple[int, int]] = []

    def write(version: int) -> None:
        inner[version - 1].update(0, version)
        begun = time.monotonic_ns()
        if switched:
            outer.update(0, inner[version - 1].fd)
        else:
            policy.update(0, version)
        writes.append((begun, time.monotonic_ns()))

    plan = {
        "period_ns": length_ms * 1_000_000 // _READS,
        "least_ns": length_ms * 1_000_000,
        "longest_ns": (length_ms + _PATIENCE_MS) * 1_000_000 if sleepable else 0,
        "began_ns": 0,
        "ended_ns": 0,
        "reads": 0,
    }

    def switch() -> None:
        _wait_for_start(course)
        time.sleep(length_ms / 4_000)
        write(2)
        if sleepable:
            time.sleep(length_ms / _READS * 3 / 1_000)  # for some reads after the return
            returned.update(0, 1)

    try:
        write(1)
        course.update(0, plan)
        returned.update(0, 0)
        together(function.test_run, switch, timeout_s=30.0)
        ended = course.lookup(0)
        taken = loaded.map("reads").snapshot().values[: int(ended["reads"])]
    finally:
        if switched:
            outer.delete(0)
        for one in inner:
            one.close()
    start_ns, end_ns = zip(*writes, strict=True)
    key = start_ns[0]
    written = history.build(
        [Op.WRITE, Op.WRITE],
        actor=_WRITER, key=key, version=[1, 2], start_ns=start_ns, end_ns=end_ns,
    )  # fmt: skip
    seen = history.build(
        [Op.READ] * len(taken),
        actor=_PROGRAM, key=key, version=taken["version"],
        start_ns=taken["start_ns"], end_ns=taken["end_ns"],
    )  # fmt: skip
    return {
        "key": key,
        "program_ms": length_ms,
        "began_ns": int(ended["began_ns"]),
        "start_ns": start_ns[1],
        "blocked_ns": end_ns[1] - start_ns[1],
        "left_ns": int(ended["ended_ns"]) - start_ns[1],
        "history": history.to_frame(history.concatenate(written, seen)),
    }


def _wait_for_start(course: Map) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while not course.lookup(0)["began_ns"]:
        if time.monotonic() > deadline:
            raise TimedOut(f"The program did not begin within {_START_LIMIT_S:g} s.")
        time.sleep(0.000_2)
