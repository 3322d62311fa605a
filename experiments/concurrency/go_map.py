"""The Go map that many control planes keep beside the BPF map: who may read it, and when."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pandas as pd

from experiments import go_program
from labkit.errors import TimedOut
from labkit.kernel import leftovers
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say

_SOURCE = Path(__file__).with_suffix(".go")
_FATAL_STATUS = 2  # exit status of a program that Go's runtime ends by a fatal error
_RACE_STATUS = 66  # ... and of one in which the race detector found something
_FATAL, _REPORT = "fatal error: concurrent map", "WARNING: DATA RACE"


_PLAIN = (
    Case("broken", "writer", "bare map, one writer", guard="bare", writers=1, detector=False),
    Case("control", "readers", "bare map, readers only", guard="bare", writers=0, detector=False),
    Case("fixed", "rwmutex", "RWMutex, one writer", guard="rwmutex", writers=1, detector=False),
    Case("fixed", "syncmap", "sync.Map, one writer", guard="syncmap", writers=1, detector=False),
)
_CASES = _PLAIN + tuple(
    Case(one.variant, f"{one.id}-detector", f"{one.label}, race detector",
         **{**one.settings, "detector": True})
    for one in _PLAIN
)  # fmt: skip


def _derived(tables: Tables) -> Tables:
    """The counts, and whether each process survived or ended by what is counted."""
    processes = tables["processes"]
    detector = processes["detector"]
    counted = Counted("race found", operations="processes", anomalies="found", cost_ns="read_ns")
    known = (
        ((processes["status"] == 0) & (processes["reads"] > 0))
        | ((processes["status"] == _FATAL_STATUS) & processes["fatal"])
        | ((processes["status"] == _RACE_STATUS) & processes["reported"])
    )
    return {
        "counts": counted.table(
            processes.assign(
                processes=1,
                found=processes["fatal"] | processes["reported"],
                read_ns=processes["read_ns"].where(~detector),
            )
        ),
        "ends": processes[["variant", "case"]].assign(explained=known),
    }


@experiment(
    "go-map",
    number=20,
    family="concurrency",
    question="Does concurrent reading of a Go map ever end the process?",
    claims=("2.3",),
    needs=("go",),
    quick={"readers": 4, "run_ms": 150, "processes": 8},
    full={"readers": 4, "run_ms": 500, "processes": 20},
    cases=_CASES,
    derive=_derived,
    statements=(
        Statement("readers alone never end the process, nor does the race detector report them",
                  "none(control)"),
        Statement("one writer ends it", 'some(broken["writer"], like=0.1)'),
        Statement("with the race detector every process is reported or ended",
                  'all(broken["writer-detector"])'),
        Statement("recover() never catches it", "none(processes(fatal).recovered)"),
        Statement("a lock or a sync.Map cures it", "none(fixed)"),
        Statement("no process died of anything else", "all(ends.explained)"),
    ),
    sentence="Readers alone: {control} processes ended. With one writer the runtime ended "
    '{broken["writer"]}, and recover() caught {sum(processes(fatal).recovered)} of these. A lock '
    "or a sync.Map: {fixed}.",
)  # fmt: skip
def go_map(*, readers: int, run_ms: int, processes: int) -> Tables:
    """Read a Go map from many goroutines, with and without one that writes.

    The runtime checks a flag that only a writer sets (``fatal("concurrent map read and map
    write")``, internal/runtime/maps), so readers alone are safe. The end is a fatal error,
    which no ``recover`` catches; the program tries.

    Parameters
    ----------
    readers : int
        Goroutines that read.
    run_ms : int
        Time that each process runs, milliseconds, and until each goroutine has been through all
        keys once.
    processes : int
        Processes of every kind, with and without the race detector.

    Returns
    -------
    dict of DataFrame
        ``processes``: one row for each with ``variant``, ``case``, ``detector`` (bool),
        ``status`` (of its exit, minus the signal that ended it), ``fatal`` (the runtime's own
        fatal error of a concurrent map), ``reported`` (by the race detector), ``recovered``
        (bool), ``last_words`` (text, the first line of its standard error), ``reads`` (int64) and
        ``read_ns`` (float64, over all readers; NaN where it did not come to an end).
    """
    rows = []
    with leftovers.temporary_folder() as folder:
        for detector in (False, True):
            say("building with the race detector" if detector else "building")
            program = go_program.build(_SOURCE, folder, detector=detector)
            for turn in range(processes):
                say(f"process {turn + 1} of {processes}{', race detector' * detector}")
                for case in _CASES:
                    if case.detector == detector:
                        seen = _run(program, case.guard, readers, case.writers, run_ms)
                        rows.append(
                            {
                                "variant": case.variant,
                                "case": case.id,
                                "detector": detector,
                                **seen,
                            }
                        )
    return {"processes": pd.DataFrame(rows)}


def _run(program: Path, guard: str, readers: int, writers: int, run_ms: int) -> dict[str, object]:
    command = [str(program), guard, str(readers), str(writers), str(run_ms)]
    # The race detector sleeps a second at exit by default, for reports that still come.
    environment = {**os.environ, "GORACE": "atexit_sleep_ms=0"}
    ended = _bounded(command, run_ms / 1000 + 30, environment)
    words, said = ended.stdout.split(), ended.stderr.splitlines()
    survived = words[:1] == ["survived"]
    reads = int(words[1]) if survived else 0
    return {
        "status": ended.returncode,
        "fatal": any(line.startswith(_FATAL) for line in said),
        "reported": _REPORT in said,
        "recovered": "recovered" in ended.stdout,
        "last_words": said[0] if said else "",
        "reads": reads,
        "read_ns": int(words[2]) / reads if reads else float("nan"),
    }


def _bounded(
    command: list[str], limit_s: float, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise TimedOut(f"{Path(command[0]).name} did not end within {limit_s:g} s.") from None
