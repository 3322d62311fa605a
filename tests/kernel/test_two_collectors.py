"""The two collectors: who is killed takes all of it along, and the highest rate is what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from experiments.production import two_collectors

CHECKOUT = Path(two_collectors.__file__).resolve().parents[2]
GONE_WITHIN_S = 20.0

STALLED = """
from experiments.production.two_collectors import two_collectors
from labkit.lab.catalogue import find

(case,) = [case for case in find("two-collectors").cases if case.id == "ring-spill"]
print("begins", flush=True)
two_collectors(
    case, rates=[], step_s=1.0, base_rate=1_000, period_ms=200.0, processes=1, stall_s=20.0, turn=0
)
"""


def descendants(pid: int) -> set[int]:
    children: dict[int, set[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, set()).add(int(folder.name))
    found, waiting = set[int](), [pid]
    while waiting:
        new = children.get(waiting.pop(), set())
        found |= new
        waiting += new
    return found


def state(pid: int) -> str:
    """One letter; empty for a process that is gone, or waits to be collected by init."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if letter == "Z" else letter


@pytest.mark.usefixtures("kernel")
@pytest.mark.outside_vm("a process ends in the same ways on every kernel")
def test_broker_load_and_collector_die_with_a_killed_measurement() -> None:
    """While the broker stands still, a signal to end would wait in it."""
    with subprocess.Popen(
        [sys.executable, "-c", STALLED], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *sys.path])},
    ) as owner:  # fmt: skip
        try:
            deadline = time.monotonic() + GONE_WITHIN_S
            started = set[int]()
            # The collector, the load and its worker, and the broker, which is stopped.
            while len(started) < 4 or "T" not in map(state, started):
                assert owner.poll() is None and time.monotonic() < deadline, started
                time.sleep(0.02)
                started = descendants(owner.pid)
        finally:
            owner.send_signal(signal.SIGKILL)
            owner.wait()
    deadline = time.monotonic() + GONE_WITHIN_S
    while left := [pid for pid in started if state(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def steps(*rows: tuple[int, int]) -> pd.DataFrame:
    """Of made and lost connections in two seconds."""
    return pd.DataFrame(rows, columns=["made", "lost"]).assign(
        case="batch", round=0, seconds=2.0, produced=lambda table: table["made"]
    )


@pytest.mark.parametrize(
    ("tried", "rate", "reached"),
    [
        (steps((2000, 0), (3900, 0), (8000, 8)), 1950.0, 1),
        (steps((2000, 1), (4000, 5)), 1000.0, 1),
        (steps((2000, 0), (3000, 0)), 1500.0, 0),
        (steps((2000, 2)), 0.0, 1),
    ],
    ids=["until too many are lost", "a few may be lost", "none was lost", "already the lowest"],
)
def test_the_highest_rate_is_the_last_that_loses_little(
    tried: pd.DataFrame, rate: float, reached: int
) -> None:
    (knee,) = two_collectors.knees(tried).to_dict("records")
    assert (knee["rate"], knee["reached"]) == (rate, reached)
