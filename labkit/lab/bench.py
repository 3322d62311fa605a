"""What the benchmarks with bars share: their priority, and how they are run and judged.

Everything that is compared runs in turns within one run, in another order at every
repetition, so that other load on the machine meets all alike; what counts are the ratios.
The run is saved, loaded again and judged: one line per result.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from labkit import runs
from labkit.judge.bars import Result
from labkit.judge.findings import Finding
from labkit.kernel.parallel import Child
from labkit.lab.measure import check_writable
from labkit.runs import Run

TIME_LIMIT_S: Final = {"quick": 300.0, "full": 2400.0}
"""Bound for one benchmark, seconds."""


def ahead_of_all() -> int:
    """Raise the priority of this process and those that it makes; the nice value reached.

    Who writes and who reads share it. Without it, another busy process keeps a reader from its
    CPU for longer than any ring lasts, and that loss is not the reader's.
    """
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    # Where the kernel groups processes by session, a nice value counts within the group only, and
    # the group has one of its own: sched(7), "The autogroup feature".
    with suppress(OSError):
        os.setsid()
        Path("/proc/self/autogroup").write_text("-20")
    return os.getpriority(os.PRIO_PROCESS, 0)


@dataclass(frozen=True)
class Benchmark:
    """What is measured and held against bars; a module of ``experiments.bench`` names it BENCHMARK.

    Attributes
    ----------
    measure : callable
        Gets the profile, ``quick`` or ``full``, and parameters that differ from it; answers the
        run, not saved yet.
    results : callable
        Gets the run as it stands on disk; answers its lines.
    judge : callable
        Gets the same; answers whether its bars hold.
    apart : bool
        It is measured in a child, bounded in time; else it sees to that itself.
    """

    measure: Callable[..., Run]
    results: Callable[[Run], list[Result]]
    judge: Callable[[Run], Finding]
    apart: bool = True


def run(
    name: str, profile: str, folder: Path, changed: Mapping[str, Any]
) -> tuple[Run, list[Result], Finding]:
    """Measure a benchmark, save the run, load it again and judge it.

    Parameters
    ----------
    name : str
        That of a module ``bench_<name>`` of ``experiments.bench``, such as ``kernel``.
    profile : str
        ``quick`` or ``full``.
    folder : Path
        Folder of runs.
    changed : mapping
        Parameters that differ from the profile's.

    Returns
    -------
    tuple of (Run, list of Result, Finding)
        The run as it stands on disk, a line for each result, and whether all bars hold.

    Raises
    ------
    Unavailable
        This machine lacks what is needed.
    LabError
        Measuring failed, or the folder cannot be written.
    """
    known: Benchmark = importlib.import_module(f"experiments.bench.bench_{name}").BENCHMARK
    check_writable(folder)
    if known.apart:  # what it holds in the kernel goes with the child
        with Child(lambda: known.measure(profile, **changed)) as worker:
            measured = worker.result(TIME_LIMIT_S[profile])
    else:
        measured = known.measure(profile, **changed)
    saved = runs.load(runs.save(measured, folder))
    return saved, known.results(saved), known.judge(saved)
