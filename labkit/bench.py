"""What the benchmarks with bars share: turns, priority, and their command line.

Everything that is compared runs in turns within one run, in another order at every
repetition, so that other load on the machine meets all alike; what counts are the ratios.
The run is saved, loaded again and judged: one line per figure, exit status 0 only where
every bar holds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np

from labkit.analysis import runs
from labkit.analysis.bars import Figure
from labkit.analysis.findings import judge
from labkit.analysis.runs import Run
from labkit.errors import BadInput, LabError, Unavailable
from labkit.kernel.parallel import Child
from labkit.measure import RUNS, check_writable

Thing = TypeVar("Thing")


def in_turns(things: Sequence[Thing], rounds: int) -> Iterator[tuple[int, Thing]]:
    """Every thing once a round, each round in another order.

    Parameters
    ----------
    things : sequence
        What is compared.
    rounds : int
        Repetitions.

    Yields
    ------
    tuple of (int, thing)
        The round, from 0 on.
    """
    rng = np.random.default_rng(0)
    for turn in range(rounds):
        for i in rng.permutation(len(things)):
            yield turn, things[i]


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


def main(
    name: str,
    what: str,
    measure: Callable[[str], Run],
    figures: Callable[[Run], list[Figure]],
    time_limit_s: Mapping[str, float],
    arguments: Sequence[str] | None = None,
) -> int:
    """Measure, save, load again, judge and print; the exit status.

    Parameters
    ----------
    name, what : str
        The module that is run, and one sentence about it.
    measure : callable
        Gets the profile, ``quick`` or ``full``; answers the run, not saved yet.
    figures : callable
        Gets the run as it stands on disk; answers its lines.
    time_limit_s : mapping of str to float
        Seconds for each profile.
    arguments : sequence of str, optional
        By default those of the process.

    Returns
    -------
    int
        0 every bar holds; 1 one falls short, or measuring failed; 2 this machine lacks
        what is needed; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=what)
    parser.add_argument("--profile", default="quick", choices=tuple(time_limit_s))
    parser.add_argument("--folder", type=Path, default=RUNS, help="folder of runs")
    parser.add_argument(
        "--record", action="store_true", help="keep the run in data/runs as this kernel's"
    )
    chosen = parser.parse_args(arguments)
    try:
        check_writable(chosen.folder)
        # In a child: bounded in time, and what it holds in the kernel goes with it.
        with Child(lambda: measure(chosen.profile)) as worker:
            run = worker.result(time_limit_s[chosen.profile])
        run = runs.load(runs.save(run, chosen.folder))
        for figure in figures(run):
            print(figure)
        holds = judge(run).holds
        print(f"saved as {run.path}")
        if chosen.record and holds:
            print(f"recorded as {runs.record(run)}")
        elif chosen.record:
            print("not recorded: a bar falls short", file=sys.stderr)
        return 0 if holds else 1
    except LabError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, BadInput | Unavailable) else 1
    except KeyboardInterrupt:
        print("\nInterrupted; what was running has been removed.", file=sys.stderr)
        return 130
