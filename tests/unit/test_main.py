"""The commands as a user meets them: one sentence for an error, and the exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from labkit.kernel import probe
from labkit.lab.catalogue import catalogue

COMMAND = [sys.executable, "-m", "labkit"]


def labkit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def in_process(toys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave this process's signals alone."""
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)


def main(*arguments: str) -> int:
    from labkit.__main__ import main

    return main(arguments)


@pytest.mark.usefixtures("in_process")
def test_run_prints_counts_finding_and_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("run", "toy-counts", "--set", "lost=3", "--folder", str(tmp_path)) == 0
    said = capsys.readouterr()
    assert "toy-counts holds: 3 <lost>." in said.out
    assert "broken" in said.out and "saved as" in said.out
    assert "losing 3" in said.err
    assert len(list(tmp_path.glob("toy-counts/*/run.json"))) == 1


@pytest.mark.usefixtures("in_process")
def test_a_finding_that_fails_is_status_5(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--set", "lost=9", "--folder", str(tmp_path))
    assert main("run", "toy-counts", "--record", *arguments) == 5
    said = capsys.readouterr()
    assert "toy-counts FAILS" in said.out
    assert "not recorded: the finding fails" in said.err


@pytest.mark.usefixtures("in_process")
def test_several_are_run_and_the_worst_status_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("run", "toy-lacks", "toy-counts", "--folder", str(tmp_path)) == 3
    said = capsys.readouterr()
    assert "toy-lacks: This kernel lacks toys: use one that has some." in said.err
    assert "toy-counts holds" in said.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("toy-count",), "There is no experiment 'toy-count'"),
        (("toy-counts", "--set", "loss=1"), "has no parameter 'loss'; it has lost"),
        (("toy-counts", "--set", "lost"), "--set takes name=value"),
        (("toy-counts", "--set", "lost=few"), "is of type int such as 7, not 'few'"),
        (("toy-counts", "--set", "lost=-1"), "must be greater than 0"),
        (("toy-counts", "--time-limit", "-1"), "above 0"),
    ],
)
@pytest.mark.usefixtures("in_process")
def test_misuse_is_one_sentence_and_status_2(
    arguments: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("run", *arguments, "--folder", str(tmp_path)) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1
    assert said.out == ""
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.usefixtures("toys")
def test_no_traceback_reaches_the_user(tmp_path: Path) -> None:
    ended = labkit("run", "toy-lacks", "--folder", str(tmp_path))
    assert (ended.returncode, ended.stdout) == (3, "")
    assert ended.stderr == "toy-lacks: This kernel lacks toys: use one that has some.\n"
    assert labkit("run", "toy-counts", "--profile", "slow").returncode == 2


def test_an_error_of_the_lab_itself_is_a_sentence_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> None:
        raise KeyError("no\nsuch")

    monkeypatch.setattr(probe, "probe", broken)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    assert main("doctor") == 70
    said = capsys.readouterr().err
    assert said.startswith("This is an error of the lab itself (KeyError") and said.count("\n") == 1
    monkeypatch.setenv("LABKIT_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main("doctor")


@pytest.mark.usefixtures("toys")
def test_ctrl_c_is_one_line_and_status_130(tmp_path: Path) -> None:
    command = [*COMMAND, "run", "toy-sleeps", "--folder", str(tmp_path)]
    running = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ
    )
    assert running.stderr is not None
    assert "helper" in running.stderr.readline()
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    _, said = running.communicate(timeout=30)
    assert running.returncode == 130
    assert said.strip() == "Interrupted; what was running has been stopped and removed."


def test_list_tells_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    ended = labkit("list", "--json")
    assert ended.returncode == 0 and ended.stderr == ""
    entries = {entry["id"]: entry for entry in json.loads(ended.stdout)}
    assert list(entries) == list(catalogue())
    for id, entry in entries.items():
        assert entry["features"] == list(catalogue()[id].needs)
        assert (entry["state"] == "runs") == (entry["lacks"] == [])


def test_list_names_what_is_lacking(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = probe.Feature("bpf", False, "EPERM", "run as root")
    monkeypatch.setattr(probe, "probe", lambda name: lacking)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    assert main("list") == 0
    said = capsys.readouterr().out
    assert "transient-null" in said and "lacks: bpf" in said


def test_a_reader_may_stop_reading() -> None:
    listing = subprocess.Popen([*COMMAND, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert listing.stdout is not None and listing.stderr is not None
    listing.stdout.close()
    assert listing.wait(60) == 0
    assert listing.stderr.read() == b""
    listing.stderr.close()


def test_sigterm_ends_by_way_of_the_clean_up(toys: None, tmp_path: Path) -> None:
    command = [*COMMAND, "run", "toy-sleeps", "--folder", str(tmp_path)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    said = running.stderr.readline().split()
    running.terminate()
    assert running.wait(30) == 128 + signal.SIGTERM
    running.stderr.close()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/exe").exists() for pid in said if pid.isdigit()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
