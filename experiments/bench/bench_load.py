"""What each command takes beside ten thousand maps of somebody else: ``labkit bench load``.

Judged by :mod:`experiments.bench.load_bars`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Final

import pandas as pd

from experiments.bench import load_bars as bars
from experiments.bench.crowd import BY_HUNDRED, MAPS, NAME, PINS, PROGRAMS, SHARED, Crowd, crowd
from labkit.errors import TimedOut
from labkit.kernel import probe
from labkit.kernel.provenance import provenance, usage, usage_since
from labkit.lab import bench
from labkit.lab.experiment import say
from labkit.runs import Run

_STUCK_S: Final = 120.0  # waiting for a CPU that others use is no fault of a command
# A process's own peak, since what it inherits from the one that starts it counts for rusage.
_MEASURED: Final = """
import os, resource, sys
from labkit.__main__ import main
status = main(sys.argv[2:])
sys.stdout.flush()
self, others = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
cpu_s = sum(one.ru_utime + one.ru_stime for one in (self, others))
os.write(int(sys.argv[1]), f"{cpu_s} {max(peak, others.ru_maxrss) / 1024}".encode())
sys.exit(status)
"""


@dataclass(frozen=True)
class Measured:
    """What a command said and took.

    Attributes
    ----------
    command : str
        Its words; ids of maps by what they are.
    status : int
        With which it ended.
    said, told : str
        On standard output and on standard error.
    cpu_s, wall_s : float
        Seconds of CPU, with its children, and from its start to its end.
    peak_mib : float
        Of its memory, or of that of its largest child.
    """

    command: str
    status: int
    said: str
    told: str
    cpu_s: float
    wall_s: float
    peak_mib: float


def commands(of: Crowd) -> dict[str, list[str]]:
    """Words of every command that looks at maps and programs, by what they mean.

    Parameters
    ----------
    of : Crowd
        Ids of some of the maps.
    """
    return {
        "diagnose ONE": ["diagnose", str(of.alone)],
        "diagnose SHARED": ["diagnose", SHARED],
        "diagnose NAMESAKE": ["diagnose", str(of.namesake)],
        "diagnose HUNDRED": ["diagnose", BY_HUNDRED],
        "diagnose THOUSAND": ["diagnose", NAME],
        "watch THOUSAND": ["watch", NAME, "--seconds", "1"],
        "watch ONE": ["watch", str(of.alone), "--seconds", "1"],
        "watch --all": ["watch", "--all", "--seconds", "1"],
        "list": ["list"],
        "list --json": ["list", "--json"],
        "doctor": ["doctor"],
    }


def measured(name: str, words: list[str]) -> Measured:
    """Run a command.

    Parameters
    ----------
    name : str
        What it is called.
    words : list of str
        Of ``python -m labkit``.

    Raises
    ------
    TimedOut
        It did not end.
    """
    begun = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", _MEASURED, "2", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as command:  # fmt: skip
        try:
            said, told = command.communicate(timeout=_STUCK_S)
        except BaseException as error:
            command.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimedOut(f"{name} did not end within {_STUCK_S:g} s.") from None
            raise
    told, _, figures = told.rpartition("\n")
    cpu_s, peak_mib = map(float, figures.split())
    say(f"{name}: {cpu_s:.1f} s of CPU, {peak_mib:.0f} MiB, {len(said) + len(told):,} B")
    return Measured(name, command.returncode, said, told, cpu_s, time.monotonic() - begun, peak_mib)


def as_table(all_of_them: list[Measured]) -> pd.DataFrame:
    """One row for each command.

    Parameters
    ----------
    all_of_them : list of Measured
        In their order.

    Returns
    -------
    DataFrame
        ``command``, ``status``, ``cpu_s``, ``wall_s``, ``peak_mib``, ``text_bytes``.
    """
    return pd.DataFrame(
        [(one.command, one.status, one.cpu_s, one.wall_s, one.peak_mib,
          len((one.said + one.told).encode())) for one in all_of_them],
        columns=["command", "status", "cpu_s", "wall_s", "peak_mib", "text_bytes"],
    )  # fmt: skip


def measure(profile: str) -> Run:
    """Measure every command here and now.

    Parameters
    ----------
    profile : str
        ``quick`` or ``full``: the same.

    Returns
    -------
    Run
        Not saved yet. ``commands``: as `as_table` answers.

    Raises
    ------
    Unavailable
        The machine lacks something; the sentence says what.
    """
    probe.require("bpf", "hash")
    facts, ticks = provenance(), usage()
    with crowd() as of:
        table = as_table([measured(name, words) for name, words in commands(of).items()])
    facts["during"] = usage_since(ticks)
    parameters: dict[str, object] = {"maps": MAPS, "programs": PROGRAMS, "pins": PINS}
    return Run(bars.EXPERIMENT, profile, parameters, facts, {"commands": table})


BENCHMARK: Final = bench.Benchmark(measure, bars.results, bars.judge)
