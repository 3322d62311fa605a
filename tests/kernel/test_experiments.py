"""Every experiment of the catalogue on this kernel; its finding must hold, and nothing be left.

They are measured in this very process. A worker's death would take away whatever an experiment
forgot to close; here the fixture that looks for what a test left finds it.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from labkit.lab import driver
from labkit.lab.catalogue import catalogue, find, judge, load
from labkit.lab.measure import saved

pytestmark = pytest.mark.outside_vm(
    "takes an hour on an emulated CPU; make vm-report runs every experiment"
)

LACKS = "this kernel lacks "
SMALLER: dict[str, dict[str, Any]] = {
    "sync-benchmark": {"sizes": [8], "rounds": 2},
    "no-staleness": {"updates": 5_000, "copied": 1_000, "packets": 50},
    "coverage-matrix": {"writes": 31, "calls": 500},
    "recycled-element": {"reads": 30_000, "writes": 10_000},
    "coverage-by-type": {"writes": 7, "switches": 3},
    "foreign-writer": {"writes": 503},
    "switch-cost": {"sweeps": 4, "keys": [64], "switches": 3},
    "torn-reads": {"sizes": [8, 256, 4096]},
    "outer-map-null": {"switches": 60, "lookups": 100_000},
    "hybrid-idle-only": {"seconds": 0.5},
    "go-map": {"processes": 3},
    "nested-update": {"insertions": 5_000},
    "hot-swap": {"events": 10_000, "swaps": 4},
    "two-collectors": {"processes": 20, "stall_s": 1.5},
}


def smaller(experiment: str) -> dict[str, Any]:
    """Parameters for one round, and little of it: what decides is the report's."""
    rounds = {"rounds": 1} if "rounds" in find(experiment).parameters("quick") else {}
    return rounds | SMALLER.get(experiment, {})


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("experiment", list(catalogue()))
def test_it_holds_on_this_kernel(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What one round leaves undecided, the report decides by more.
    monkeypatch.setattr(driver, "MOST_AGAIN", 0)
    if lacking := driver.missing(find(experiment)):
        pytest.skip(LACKS + ", ".join(f"{one.name} ({one.answer})" for one in lacking))
    before = _process()
    run = load(Path(saved(experiment, "quick", smaller(experiment), str(tmp_path))))
    assert _process() == before
    judge(run).require()
    assert run.kernel and not run.recorded
    # Recorded runs of all experiments together must stay under 10 MiB.
    assert run.path is not None
    assert sum(file.stat().st_size for file in run.path.iterdir()) < 300_000


def _process() -> tuple[object, ...]:
    """What an experiment may change of its process for a while: CPUs, signals, the folder."""
    handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return os.sched_getaffinity(0), handlers, masked, os.getcwd()
