"""Per-CPU maps: what one CPU wrote is not what another one reads, or what user space puts back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from threading import Event

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import programs
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.parallel import ahead_of_others, cpus, together
from labkit.kernel.programs import Unit

_CHUNK = 100_000  # events of one call, long enough for many additions to fall into it
_CHUNKS = 3  # calls during which user space adds, at the least
_SAMPLES = 200  # reads of each case that are saved, evenly spaced

_READS = (
    # variant, case, map type, the reader runs on the writer's CPU, reads every slot
    ("broken", "per-CPU array, read on another CPU", "percpu_array", False, False),
    ("control", "per-CPU array, read on the same CPU", "percpu_array", True, False),
    ("control", "array, read on another CPU", "array", False, False),
    ("fixed", "per-CPU array, newest of all slots", "percpu_array", False, True),
)
_COUNTS = (
    # variant, case, how user space adds its own counts
    ("broken", "user space writes the whole vector back", "vector"),
    ("control", "user space only reads", "none"),
    ("fixed", "user space adds by a program, in the slot of its CPU", "own slot"),
)


@experiment(
    "per-cpu-slot",
    number=7,
    family="stale-reads",
    question="Does a value of a per-CPU map that one CPU wrote reach the others, and survive them?",
    claims=("1.3e", "1.4d"),
    needs=("bpf", "compile", "test_run", "two_cpus", "syscall_program", "percpu"),
    quick={"versions": 500, "additions": 5_000, "rounds": 3},
    full={"versions": 4_000, "additions": 20_000, "rounds": 6},
)
def per_cpu_slot(*, versions: int, additions: int, rounds: int) -> Tables:
    """Write here and read there; then count here while user space adds its own there.

    A program's lookup or update reaches the slot of the CPU that it runs on
    (kernel/bpf/arraymap.c, ``percpu_array_map_lookup_elem``). User space gets all slots as
    one vector and can only write all of them (``bpf_percpu_array_update``): what programs
    counted between its read and its write is overwritten with what it had read.

    Parameters
    ----------
    versions : int
        Writes by a program on one CPU, each followed by one read, in each case.
    additions : int
        Counts that user space adds in a round, at the least, while a program counts events
        on another CPU the whole time.
    rounds : int
        Rounds of the counting cases, in turns.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a read or a count; the anomaly is ``stale`` for a read of
        an older version, ``lost`` for a count that the sum of the slots lacks;
        ``cost_ns`` is the time of one read, or of one addition by user space. ``reads``
        (sampled evenly): ``case``, ``written``, ``read`` (versions). ``slots``: per case,
        round and CPU ``variant``, ``case``, ``round``, ``cpu``, ``counted_by``
        (``program`` or ``user space``, one on each CPU), ``counted``, ``found`` (in that
        CPU's slot at the end).
    """
    triad = Triad("stale")
    reads = []
    for variant, case, kind, same_cpu, every_slot in _READS:
        say(case)
        with programs.load("per_cpu_slot", KIND=kind) as unit:
            seen, read_ns = _read_there(unit, versions, same_cpu, every_slot)
        written = np.arange(1, versions + 1)
        triad.add(
            variant,
            case=case,
            operations=versions,
            anomalies=int(np.count_nonzero(seen < written)),
            cost_ns=read_ns,
        )
        kept = np.unique(np.linspace(0, versions - 1, _SAMPLES).astype(int))
        reads.append(pd.DataFrame({"case": case, "written": written[kept], "read": seen[kept]}))
    slots, costs = [], []
    for turn in range(rounds):
        for variant, case, way in _COUNTS:
            say(f"round {turn + 1} of {rounds}: {case}")
            with programs.load("per_cpu_slot", KIND="percpu_array") as unit:
                counted, addition_ns = _count_here(unit, way, additions)
                found = unit.map("counts").lookup(0)
            costs.append((case, addition_ns))
            slots += [
                {
                    "variant": variant,
                    "case": case,
                    "round": turn,
                    "cpu": cpu,
                    "counted_by": who,
                    "counted": count,
                    "found": int(found[cpu]),
                }
                for cpu, who, count in counted
            ]
    table = pd.DataFrame(slots)
    for variant, case, _ in _COUNTS:
        group = table[table["case"] == case]
        triad.add(
            variant,
            case=case,
            operations=int(group["counted"].sum()),
            anomalies=int((group["counted"] - group["found"]).sum()),
            anomaly="lost",
            cost_ns=float(np.median([ns for named, ns in costs if named == case])),
        )
    return {
        "counts": triad.table(),
        "reads": pd.concat(reads, ignore_index=True),
        "slots": table,
    }


def _read_there(
    unit: Unit, versions: int, same_cpu: bool, every_slot: bool
) -> tuple[npt.NDArray[np.int64], float]:
    """Version that was read after each write, and the median time of a read."""
    writer = unit.function("write_version", ProgramKind.SYSCALL)
    reader = unit.function("read_version", ProgramKind.SYSCALL)
    table = unit.map("versions")
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


def _count_here(unit: Unit, way: str, additions: int) -> tuple[list[tuple[int, str, int]], float]:
    """CPU, who counted there and how much, for both; mean time of an addition by user space."""
    source = unit.function("count_event")
    adder = unit.function("count_here", ProgramKind.SYSCALL)
    table = unit.map("counts")
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
    added_here = 0 if way == "none" else done
    return [(here, "user space", added_here), (there, "program", events)], addition_ns
