"""The Go map that many control planes keep beside the BPF map: who may read it, and when."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import LabError, TimedOut
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel.tools import go_command

_SOURCE = Path(__file__).with_suffix(".go")
_CACHE = Path(__file__).resolve().parents[3] / ".lab" / "go-cache"
_BUILD_LIMIT_S = 600.0  # the first compiles Go's own library: minutes on an emulated CPU
_RACE_STATUS = 66  # exit status of a program in which the race detector found something

_WAYS = (
    # variant, case, guard, writers
    ("broken", "bare map, one writer", "bare", 1),
    ("control", "bare map, readers only", "bare", 0),
    ("fixed", "RWMutex, one writer", "rwmutex", 1),
    ("fixed", "sync.Map, one writer", "syncmap", 1),
)


@experiment(
    "go-map",
    number=20,
    family="concurrency",
    question="Does concurrent reading of a Go map ever end the process?",
    claims=("2.3",),
    needs=("go",),
    quick={"readers": 4, "run_ms": 150, "processes": 4},
    full={"readers": 4, "run_ms": 500, "processes": 20},
)
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
        ``counts``: an operation is a process, an anomaly one that died or that the race
        detector reported; ``cost_ns`` is the time per read over all readers, without the
        detector. ``processes``: ``variant``, ``case``, ``detector`` (bool), ``status``,
        ``fatal``, ``recovered``, ``reported`` (bool), ``reads`` (int64), ``read_ns``.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="labkit-go-") as folder:
        for detector in (False, True):
            say("building with the race detector" if detector else "building")
            program = _build(Path(folder), detector)
            for turn in range(processes):
                say(f"process {turn + 1} of {processes}{', race detector' * detector}")
                for variant, case, guard, writers in _WAYS:
                    row = _run(program, guard, readers, writers, run_ms)
                    rows.append({"variant": variant, "case": case, "detector": detector, **row})
    table = pd.DataFrame(rows)
    triad = Triad("ended by the runtime")
    for variant, case, _, _ in _WAYS:
        for detector in (False, True):
            group = table[(table["case"] == case) & (table["detector"] == detector)]
            triad.add(
                variant,
                case=f"{case}, race detector" if detector else case,
                operations=len(group),
                anomalies=int((group["fatal"] | group["reported"]).sum()),
                anomaly="data race reported" if detector else None,
                cost_ns=float("nan") if detector else float(group["read_ns"].median()),
            )
    return {"counts": triad.table(), "processes": table}


def _build(folder: Path, detector: bool) -> Path:
    go = go_command()
    program = folder / ("go_map_race" if detector else "go_map")
    _CACHE.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "GOCACHE": str(_CACHE),
        "GOPROXY": "off",  # one file, no module: nothing is to be fetched
        "GOTOOLCHAIN": "local",
        "GO111MODULE": "off",
        "CGO_ENABLED": "1" if detector else "0",
    }
    command = [go, "build", *(["-race"] if detector else []), "-o", str(program), str(_SOURCE)]
    built = _bounded(command, _BUILD_LIMIT_S, environment)
    if built.returncode:
        raise LabError(f"go build failed: {built.stderr.strip().splitlines()[-1]}")
    return program


def _run(program: Path, guard: str, readers: int, writers: int, run_ms: int) -> dict[str, object]:
    command = [str(program), guard, str(readers), str(writers), str(run_ms)]
    # The race detector sleeps a second at exit by default, for reports that still come.
    environment = {**os.environ, "GORACE": "atexit_sleep_ms=0"}
    ended = _bounded(command, run_ms / 1000 + 30, environment)
    words = ended.stdout.split()
    survived = words[:1] == ["survived"]
    reads = int(words[1]) if survived else 0
    return {
        "status": ended.returncode,
        "fatal": "fatal error: concurrent map" in ended.stderr,
        "recovered": "recovered" in ended.stdout,
        "reported": ended.returncode == _RACE_STATUS or "WARNING: DATA RACE" in ended.stderr,
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
