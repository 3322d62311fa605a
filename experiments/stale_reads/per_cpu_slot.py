"""Per-CPU maps: what one CPU wrote is not what another one reads, or what user space puts back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.figures import Axes, stacked, style
from labkit.kernel import programs
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.parallel import ahead_of_others, cpus, together
from labkit.kernel.programs import BpfObject
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment
from labkit.runs import Run

_CHUNK = 100_000  # events of one call, long enough for many additions to fall into it
_CHUNKS = 3  # calls during which user space adds, at the least
_SAMPLES = 200  # reads of each measurement that are saved, evenly spaced


def _counts(tables: Tables) -> Tables:
    """Reads that were stale, and counts that the slots lack."""
    rounds, slots = tables["rounds"], tables["slots"]
    stale = Counted("stale", operations="versions", anomalies="stale", cost_ns="operation_ns")
    lost = Counted("lost", operations="counted", anomalies="lost", cost_ns="operation_ns")
    by = slots.assign(lost=slots["counted"] - slots["found"]).groupby(
        ["variant", "case", "round"], sort=False
    )
    counted = by[["counted", "lost"]].sum().reset_index()
    counted = counted.merge(rounds[["case", "round", "operation_ns"]], on=["case", "round"])
    read = rounds[~rounds["case"].isin(counted["case"])]
    return {"counts": pd.concat([stale.table(read), lost.table(counted)], ignore_index=True)}


def _draw_reads(run: Run, ax: Axes) -> None:
    """Versions read against versions written."""
    reads = run.table("reads")
    reads = reads[reads["round"] == 0]
    for number, (case, group) in enumerate(reads.groupby("case", sort=False)):
        # Cases that lie on one line show by markers at different places of it.
        step = max(len(group) // 8, 1)
        look = style.look(number).line() | {"markevery": (number * step // 4, step)}
        ax.plot(group["written"], group["read"], **look, label=run.label(str(case)))
    ax.set_xlabel("version written on one CPU")
    ax.set_ylabel("version read")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1))


def _draw_slots(run: Run, ax: Axes) -> None:
    """Counts kept against counts made."""
    slots = run.table("slots")
    slots = slots[slots["counted"] > 0]  # a slot in which nobody counted keeps no share
    cases = list(slots["case"].unique())
    for number, (who, group) in enumerate(slots.groupby("counted_by", sort=False)):
        rows = group["case"].map(cases.index) + 0.3 * (number - 0.5)
        kept, look = 100 * group["found"] / group["counted"], style.look(number).points()
        ax.plot(kept, rows, **look, alpha=0.7, label=f"counted by {who}")
    labels = [run.label(case).replace("user space ", "") for case in cases]
    style.rows(ax, [label.replace(" the ", " the\n", 1) for label in labels])
    ax.set_xlim(-3, 103)
    ax.set_xlabel("counts kept, % (one point a round)")
    ax.legend(loc="lower left")


@experiment(
    "per-cpu-slot",
    number=7,
    family="stale-reads",
    question="Does a value of a per-CPU map that one CPU wrote reach the others, and survive them?",
    claims=("1.3e", "1.4d"),
    needs=("bpf", "compile", "test_run", "two_cpus", "syscall_program", "percpu"),
    quick={"versions": 500, "additions": 5_000, "rounds": 3},
    full={"versions": 4_000, "additions": 20_000, "rounds": 6},
    cases=(
        Case("broken", "other-cpu", "per-CPU array, read on another CPU"),
        Case("control", "same-cpu", "per-CPU array, read on the same CPU", same_cpu=True),
        Case("control", "plain-array", "array, read on another CPU", kind="array"),
        Case("fixed", "all-slots", "per-CPU array, newest of all slots", every_slot=True),
        Case("broken", "vector", "user space writes the whole vector back", adds="vector"),
        Case("control", "only-reads", "user space only reads", adds="none"),
        Case("fixed", "own-slot", "user space adds by a program, in the slot of its CPU",
             adds="own slot"),
    ),
    derive=_counts,
    statements=(
        Statement("another CPU never reads what this CPU wrote", 'all(broken["other-cpu"])'),
        Statement("the writer's CPU always does, and every CPU in an ordinary array",
                  'none(control["same-cpu", "plain-array"])'),
        Statement("cured by reading all slots", 'none(fixed["all-slots"])'),
        Statement("writing the vector back erases what programs counted",
                  'some(broken["vector"])'),
        Statement("nothing is lost while user space only reads", 'none(control["only-reads"])'),
        Statement("cured by adding in the slot of its own CPU", 'none(fixed["own-slot"])'),
    ),
    sentence="A program on another CPU read an older version than the one written in "
    '{broken["other-cpu"]} reads of a per-CPU array; on the writer\'s CPU in '
    '{control["same-cpu"]}, from an ordinary array in {control["plain-array"]}, and from the '
    'newest of all slots in {fixed["all-slots"]}. User space that added its own count and wrote '
    'the vector back erased {broken["vector"]} counts, {broken["vector"].anomalies / '
    'sum(slots(case="vector", counted_by="user space").counted)} for each of its additions; '
    'adding by a program in its own slot lost {fixed["own-slot"]}, for '
    '{us(fixed["own-slot"].cost_ns)} instead of {us(broken["vector"].cost_ns)} an addition.',
    figure=stacked(_draw_reads, _draw_slots, height=4.6, ratios=(1.2, 1)),
)  # fmt: skip
def per_cpu_slot(case: Case, *, versions: int, additions: int) -> dict[str, Any]:
    """Write here and read there; then count here while user space adds its own there.

    A program's lookup or update reaches the slot of the CPU that it runs on
    (kernel/bpf/arraymap.c, ``percpu_array_map_lookup_elem``). User space gets all slots as
    one vector and can only write all of them (``bpf_percpu_array_update``): what programs
    counted between its read and its write is overwritten with what it had read.

    Parameters
    ----------
    case : Case
        Map, and who reads where; or how user space adds its own counts.
    versions : int
        Writes by a program on one CPU, each followed by one read.
    additions : int
        Counts that user space adds, at the least, while a program counts events on another
        CPU the whole time.

    Returns
    -------
    dict
        ``versions`` that were written, each read once, and how many of these reads were
        ``stale`` (int64; 0 where there is counting), ``operation_ns`` (float64: of a read, the
        median; of an addition by user space, the mean). ``reads``: a sample of them, with
        ``written`` and ``read`` (versions). ``slots``: for each CPU ``cpu``, ``counted_by``
        (``program`` or ``user space``, one on each CPU), ``counted``, ``found`` (in that CPU's
        slot at the end).
    """
    with programs.load("per_cpu_slot", KIND=case.get("kind", "percpu_array")) as loaded:
        if case.get("adds", ""):
            slots, addition_ns = _count_here(loaded, case.adds, additions)
            return {"versions": 0, "stale": 0, "operation_ns": addition_ns, "slots": slots}
        seen, read_ns = _read_there(
            loaded, versions, case.get("same_cpu", False), case.get("every_slot", False)
        )
    written = np.arange(1, versions + 1)
    kept = np.unique(np.linspace(0, versions - 1, _SAMPLES).astype(int))
    return {
        "versions": versions,
        "stale": int(np.count_nonzero(seen < written)),
        "operation_ns": read_ns,
        "reads": pd.DataFrame({"written": written[kept], "read": seen[kept]}),
    }


def _read_there(
    loaded: BpfObject, versions: int, same_cpu: bool, every_slot: bool
) -> tuple[npt.NDArray[np.int64], float]:
    """Version that was read after each write, and the median time of a read."""
    writer = loaded.program("write_version", ProgramKind.SYSCALL)
    reader = loaded.program("read_version", ProgramKind.SYSCALL)
    table = loaded.map("versions")
    here, there = cpus()[:2]
    version, answer = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
    seen, spent_ns = np.zeros(versions, np.int64), np.zeros(versions, np.int64)
    allowed = os.sched_getaffinity(0)
    try:
        for turn in range(versions):
            os.sched_setaffinity(0, {here})
            version[0] = turn + 1
            writer.test_run(context=version)
            if not same_cpu:
                os.sched_setaffinity(0, {there})
            begun = time.monotonic_ns()
            if every_slot:
                seen[turn] = table.lookup(0).max()
            else:
                reader.test_run(context=answer)
                seen[turn] = answer[0]
            spent_ns[turn] = time.monotonic_ns() - begun
    finally:
        os.sched_setaffinity(0, allowed)
    return seen, float(np.median(spent_ns))


def _count_here(loaded: BpfObject, way: str, additions: int) -> tuple[pd.DataFrame, float]:
    """Both slots, who counted there and what is found; mean time of an addition by user space."""
    source = loaded.program("count_event")
    adder = loaded.program("count_here", ProgramKind.SYSCALL)
    table = loaded.map("counts")
    here, there = cpus()[:2]
    vector = np.zeros(table.value_buffer().nbytes // 8, np.uint64)
    read, write = table.reader(0, vector), table.updater(0, vector)
    argument = np.zeros(1, np.uint64)
    counting, overlapped, added = Event(), Event(), Event()

    def by_vector() -> None:
        read()
        vector[here] += 1
        write()

    def by_own_slot() -> None:
        adder.test_run(context=argument)

    ways: dict[str, Callable[[], object]] = {
        "vector": by_vector,
        "none": read,
        "own slot": by_own_slot,
    }

    def add() -> tuple[int, float]:
        counting.wait(10)
        done, begun = 0, time.monotonic_ns()
        while done < additions or not overlapped.is_set():
            ways[way]()
            done += 1
        spent = time.monotonic_ns() - begun
        added.set()
        return done, spent / done

    def count_events() -> int:
        events = 0
        while not added.is_set():
            counting.set()
            source.test_run(repeat=_CHUNK)
            events += _CHUNK
            if events == _CHUNKS * _CHUNK:
                overlapped.set()
        return events

    with ahead_of_others():
        (done, addition_ns), events = together(add, count_events)
    found = table.lookup(0)
    slots = pd.DataFrame(
        {
            "cpu": [here, there],
            "counted_by": ["user space", "program"],
            "counted": [0 if way == "none" else done, events],
            "found": [int(found[here]), int(found[there])],
        }
    )
    return slots, addition_ns
