"""Experiments in worker processes: bounded in time, and nothing runs on when one ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from labkit.errors import BadInput, LabError, TimedOut, Unavailable
from labkit.lab.measure import measure
from labkit.runs import SaveFailed

pytestmark = pytest.mark.usefixtures("toys")

GONE_WITHIN_S = 10.0


def numbers(lines: Iterable[str]) -> dict[str, int]:
    """Process ids that a toy told of."""
    return {name: int(pid) for name, pid in re.findall(r"(\w+) (\d+)", " ".join(lines))}


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_until_gone(pids: Iterable[int]) -> None:
    deadline = time.monotonic() + GONE_WITHIN_S
    left = set(pids)
    while left := {pid for pid in left if alive(pid)}:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.02)


def test_a_run_comes_back_from_disk(tmp_path: Path) -> None:
    said: list[str] = []
    run = measure("toy-counts", changed={"lost": 3}, folder=tmp_path, say=said.append)
    assert run.count("broken").anomalies == 3
    assert run.parameters == {"lost": 3}
    assert run.path is not None and run.path.is_relative_to(tmp_path)
    assert said == ["losing 3"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"experiment": "toy-count"}, "did you mean toy-counts"),
        ({"experiment": "toy-counts", "profile": "slow"}, "quick or full"),
        ({"experiment": "toy-counts", "changed": {"loss": 1}}, "no parameter 'loss'"),
        ({"experiment": "toy-counts", "changed": {"lost": "many"}}, "of type int"),
        ({"experiment": "toy-counts", "time_limit_s": 0.0}, "above 0"),
    ],
)
def test_bad_input_starts_no_worker(
    arguments: dict[str, object],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(BadInput, match=words):
        measure(**arguments, folder=tmp_path)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveFailed, match="name a folder that can be written"):
        measure("toy-sleeps", folder=tmp_path / "file" / "runs")


def test_an_emulated_cpu_gets_ten_times_as_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("labkit.lab.measure.emulated", lambda: True)
    with pytest.raises(TimedOut, match="did not end within 1 s"):
        measure("toy-sleeps", folder=tmp_path, time_limit_s=0.1, say=lambda words: None)


@pytest.mark.parametrize("experiment", ["toy-sleeps", "toy-spins"])
def test_what_does_not_end_is_stopped(experiment: str, tmp_path: Path) -> None:
    said: list[str] = []
    for limit_s in (3, 15, 60):  # a busy machine may take long to start it
        begun = time.monotonic()
        with pytest.raises(TimedOut, match=f"did not end within {limit_s} s"):
            measure(experiment, folder=tmp_path, time_limit_s=limit_s, say=said.append)
        assert time.monotonic() - begun < limit_s + 30
        if said:
            break
    assert "worker" in numbers(said)
    wait_until_gone(numbers(said).values())
    assert not list(tmp_path.rglob("*.parquet"))


def test_errors_of_the_worker_keep_their_kind(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="lacks toys"):
        measure("toy-lacks", folder=tmp_path)
    with pytest.raises(LabError, match="status 1 and no answer: ZeroDivisionError: a bug in a toy"):
        measure("toy-raises", folder=tmp_path, say=lambda words: None)
    with pytest.raises(LabError, match=f"status {-signal.SIGABRT} and no answer"):
        measure("toy-aborts", folder=tmp_path, say=lambda words: None)


def test_a_killed_worker_takes_its_helpers_along(tmp_path: Path) -> None:
    said: list[str] = []

    def kill(words: str) -> None:
        said.append(words)
        os.kill(numbers(said)["worker"], signal.SIGKILL)

    with pytest.raises(LabError, match=f"status {-signal.SIGKILL} and no answer"):
        measure("toy-sleeps", folder=tmp_path, say=kill)
    wait_until_gone(numbers(said).values())


def test_an_interrupt_ends_worker_and_helpers(tmp_path: Path) -> None:
    said: list[str] = []

    def interrupt(words: str) -> None:
        said.append(words)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        measure("toy-sleeps", folder=tmp_path, say=interrupt)
    wait_until_gone(numbers(said).values())


def test_nothing_outlives_a_killed_parent(tmp_path: Path) -> None:
    order = json.dumps(str(tmp_path))
    script = (
        "from pathlib import Path; from labkit.lab.measure import measure; "
        f"measure('toy-sleeps', folder=Path({order}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert parent.stderr is not None
    said = numbers([parent.stderr.readline()])
    assert set(said) == {"worker", "helper"}
    parent.kill()
    parent.wait()
    parent.stderr.close()
    wait_until_gone(said.values())
