"""The article's switch between two sync.Maps, made to compile: what its readers in Go see."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pandas as pd

from experiments.go.programs import built
from labkit.errors import LabError, TimedOut
from labkit.figures import anomaly_rates
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say

_LIMIT_S = 60.0
_REPORT = "WARNING: DATA RACE"
_SEEN = ("sweeps", "stale", "mixed", "newest", "panicked", "lost", "late")
_WAYS = {"forced": "broken", "pointers": "broken", "quiet": "control", "immutable": "fixed"}


def _derived(tables: Tables) -> Tables:
    processes = tables["processes"]
    sweeps = processes.assign(case=processes["way"], operations=processes["sweeps"],
                              anomalies=processes[["stale", "mixed"]].max(axis=1))  # fmt: skip
    written = processes[processes["way"] != "quiet"]
    keys = [
        written.assign(case=written["way"] + f"-{column}", operations=written["generations"],
                       anomalies=written[column])
        for column in ("lost", "late")
    ]  # fmt: skip
    counted = Counted("table not whole", operations="operations", anomalies="anomalies")
    return {"counts": counted.table(pd.concat([sweeps, *keys]))}


@experiment(
    "go-double-map",
    number=84,
    family="go",
    question="Do readers in Go see whole generations through the article's double sync.Map?",
    claims=("4.3a",),
    needs=("go", "cilium_ebpf"),
    quick={"keys": 256, "generations": 500, "readers": 2, "rounds": 2},
    full={"keys": 512, "generations": 5_000, "readers": 4, "rounds": 5},
    cases=(
        Case("broken", "forced", "as printed, forced to compile"),
        Case("broken", "forced-lost", "as printed: keys"),
        Case("broken", "forced-late", "as printed: stale versions"),
        Case("broken", "pointers", "pointers swapped"),
        Case("broken", "pointers-lost", "pointers swapped: keys"),
        Case("broken", "pointers-late", "pointers swapped: stale versions"),
        Case("control", "quiet", "pointers, nobody writes"),
        Case("fixed", "immutable", "immutable map, CompareAndSwap"),
        Case("fixed", "immutable-lost", "immutable map: keys"),
        Case("fixed", "immutable-late", "immutable map: stale versions"),
    ),
    derive=_derived,
    statements=(
        Statement("forced to compile, it puts no generation into force",
                  'some(broken["forced"]) and all(processes(way="forced").newest '
                  '< processes(way="forced").stale / processes(way="forced").sweeps)'),
        Statement("a reader that comes after the swap panics, and recovers",
                  'all(0 == processes(way="forced").status '
                  '< processes(way="forced").panicked)'),
        Statement("with pointers swapped, generations are mixed", 'some(broken["pointers"])'),
        Statement("half of the keys are lost, since each table gets every second generation",
                  'all(0 < 2 * processes(way="pointers").lost '
                  '== processes(way="pointers").generations)'),
        Statement("every stale version passes", 'all(broken["forced-late", "pointers-late"])'),
        Statement("nothing is mixed where nobody writes", "none(control)"),
        Statement("an immutable map that is put into force by its version is whole, complete, and "
                  "refuses stale versions",
                  'none(fixed) and all(processes(way="immutable").newest > 0)'),
        Statement("the race detector reports none of it, in processes that ran to their end",
                  "none(processes(sweeps > 0, detector=True).reported)"),
    ),
    figure=anomaly_rates,
    sentence="Forced to compile, the swap put generation {max(processes(way='forced').newest)} "
    "into force at most, and {sum(processes(way='forced').panicked)} reads panicked. With pointers "
    'swapped {broken["pointers"]} sweeps were not whole, {broken["pointers-lost"]} keys were lost, '
    'and {broken["pointers-late"]} stale versions passed. With an immutable map and '
    "CompareAndSwap: {fixed} of all of these. The race detector reported "
    "{sum(processes.reported)} processes.",
)  # fmt: skip
def go_double_map(*, keys: int, generations: int, readers: int, rounds: int) -> Tables:
    """Sweep over tables in Go while a writer puts generation after generation into force.

    As printed, the code does not compile (``go-snippets``). *forced* adds the one conversion that
    lets it: the first word of ``active`` is then overwritten by an address, and that word is the
    flag of a ``sync.Map`` (internal/sync, ``HashTrieMap``) that says it was made ready. *pointers*
    swaps pointers to two maps, as it was meant: the writer goes on in the map that readers may
    still be in, and each map gets every second generation alone.

    Parameters
    ----------
    keys : int
        Each generation sets all of them, for the sweeps.
    generations : int
        Versions that are put into force, one after the other.
    readers : int
        Goroutines that sweep.
    rounds : int
        Processes of each way, with and without the race detector.

    Returns
    -------
    dict of DataFrame
        ``processes``: ``variant``, ``way``, ``detector`` (bool), ``status`` (of its exit),
        ``reported`` (bool, by the race detector), ``generations``, ``sweeps``, of which ``stale``
        (older than what was in force before) and ``mixed`` (of several generations); ``newest``
        (generation that a sweep saw), ``panicked`` (reads, recovered), ``lost`` (keys, of one a
        generation), ``late`` (older versions that passed, of as many).
    """
    rows = []
    for detector in (False, True):
        with built("doublemap", detector=detector) as program:
            for turn in range(rounds):
                say(f"round {turn + 1} of {rounds}{', race detector' * detector}")
                rows += [
                    {"variant": variant, "way": way, "detector": detector,
                     "generations": generations,
                     **_run(program, way, keys, generations, readers)}
                    for way, variant in _WAYS.items()
                ]  # fmt: skip
    return {"processes": pd.DataFrame(rows)}


def _run(program: Path, *arguments: object) -> dict[str, object]:
    # The race detector sleeps a second at exit by default, for reports that still come.
    environment = {**os.environ, "GORACE": "atexit_sleep_ms=0"}
    try:
        ended = subprocess.run(
            [str(program), *map(str, arguments)], env=environment, capture_output=True, text=True,
            timeout=_LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TimedOut(f"{program.name} did not end within {_LIMIT_S:g} s.") from None
    words = ended.stdout.split()
    if len(words) != len(_SEEN):
        raise LabError(f"{program.name} ended before its time: {ended.stderr.strip()[:300]}")
    return {"status": ended.returncode, "reported": _REPORT in ended.stderr,
            **dict(zip(_SEEN, map(int, words), strict=True))}  # fmt: skip
