"""Measurements in parts: stopped anywhere they go on, and nothing that differs is mixed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_notebook

from labkit.errors import TimedOut
from labkit.kernel.parallel import Child
from labkit.lab import parts
from labkit.lab.measure import measure
from labkit.lab.parts import UNFINISHED, Parts
from labkit.lab.progress import Meter
from labkit.runs import SaveFailed

FACTS = {"kernel": "6.18.44", "recorded_at": "now", "load": [1.0], "code": {"digest": "abc"}}
NAPS = 12
WITHIN_S = 60.0


def opened(folder: Path, *, seed: int = 1, **facts: object) -> Parts:
    return Parts(folder, "naps", "quick", {"seed": seed}, {**FACTS, **facts})


def fill(folder: Path, names: str = "ab") -> None:
    with opened(folder) as some:
        for name in names:
            some.measure(name, partial(dict, {"is": name}))


def forbidden() -> None:
    raise AssertionError("it was done already")


def test_what_is_done_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    assert parts.waiting(tmp_path, "naps", "quick", {"seed": 1}) == 2
    assert capsys.readouterr().err == ""
    with opened(tmp_path, recorded_at="later", load=[9.0]) as again:
        assert "Continuing the run of naps" in (said := capsys.readouterr().err)
        assert "2 parts are done and stay" in said and said.count("\n") == 1
        assert again.before == len(again) == 2 and "a" in again and "c" not in again
        assert again.measure("a", forbidden) == {"is": "a"}
        assert again.measure("c", lambda: (1, 2)) == [1, 2]
        again.forget()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["kernel", "code", "cpu"])
def test_parts_of_other_conditions_are_dropped_and_it_is_said(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path)
    others: dict[str, Any] = {
        "kernel": "6.1.0", "code": {"digest": "abd"}, "cpu": {"count": 2}
    }  # fmt: skip
    other: dict[str, Any] = {name: others[name]}
    with opened(tmp_path, **other) as fresh:
        said = capsys.readouterr().err
        assert f"other conditions ({name}): its 2 parts are dropped" in said
        assert fresh.before == 0 and "a" not in fresh
        fresh.measure("a", lambda: 7)
    with opened(tmp_path, **other) as again:
        assert again.measure("a", forbidden) == 7 and again.before == 1


def test_a_commit_that_changes_no_code_does_not_count(tmp_path: Path) -> None:
    fill(tmp_path)
    with opened(tmp_path, code={"digest": "abc", "commit": "other"}) as again:
        assert again.before == 2


def test_other_parameters_have_parts_of_their_own(tmp_path: Path) -> None:
    fill(tmp_path)
    with opened(tmp_path, seed=2) as other:
        assert other.before == 0
    with opened(tmp_path) as again:
        assert again.before == 2


def test_a_part_that_was_cut_is_measured_again(tmp_path: Path) -> None:
    fill(tmp_path)
    (path,) = tmp_path.rglob("part-a.json")
    path.write_text(path.read_text()[:-3])
    with opened(tmp_path) as again:
        assert again.before == 1 and again.measure("a", lambda: 8) == 8
        assert again.measure("b", forbidden) == {"is": "b"}


def test_two_at_a_time_do_not_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_WAIT_S", 0.1)
    fill(tmp_path)
    with opened(tmp_path):

        def second() -> int:
            with opened(tmp_path) as other:
                other.measure("c", lambda: 1)
                other.forget()
                return other.before

        with Child(second) as child:
            assert child.result(WITHIN_S) == 0
        assert parts.forget_all(tmp_path, print) == 0
    assert parts.waiting(tmp_path, "naps", "quick", {"seed": 1}) == 2
    assert parts.forget_all(tmp_path, print) == 1
    assert "naps-" in (said := capsys.readouterr().out) and "2 parts" in said
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveFailed, match="name a folder that can be written"):
        opened(tmp_path / "file")


def test_the_bar_is_lines_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter(8, done=4, unit="nap") as meter:
        for _ in range(4):
            time.sleep(0.2)
            meter.step()
    lines = capsys.readouterr().err.splitlines()
    assert "4 of 8 naps" in lines[0] and lines[-1].endswith("8 of 8 naps, 00:00 left")
    assert all("left" in line and "\r" not in line for line in lines)
    assert len(lines) == len(set(lines)) < 6, "a line for every step would flood a report"


# -- a whole run, stopped in every way -------------------------------------------------------


def naps(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "labkit", "run", "toy-in-parts", "--folder", str(folder)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_parts(running: subprocess.Popen[str], folder: Path, least: int) -> None:
    deadline = time.monotonic() + WITHIN_S
    while len(list(folder.rglob("part-*.json"))) < least:
        assert running.poll() is None, "it was over too soon"
        assert time.monotonic() < deadline, "no part was kept"
        time.sleep(0.01)


@pytest.mark.parametrize("stop", ["kill -9", "ctrl-c", "kill -9 of the worker"])
def test_a_run_that_is_stopped_goes_on_where_it_stood(
    stop: str, toys: None, tmp_path: Path
) -> None:
    running = naps(tmp_path)
    try:
        wait_for_parts(running, tmp_path, 3)
        if stop == "ctrl-c":
            os.killpg(running.pid, signal.SIGINT)
        elif stop == "kill -9":
            running.kill()
        else:
            worker = subprocess.run(
                ["pgrep", "-P", str(running.pid)], capture_output=True, text=True, check=True
            )
            os.kill(int(worker.stdout.split()[0]), signal.SIGKILL)
        said = running.communicate(timeout=WITHIN_S)[1]
    finally:
        running.kill()
        running.communicate()
    assert not list(tmp_path.rglob("run.json"))
    kept = parts.waiting(tmp_path, "toy-in-parts", "quick", {"pauses": NAPS, "seconds": 0.1})
    assert 3 <= kept < NAPS
    if stop != "kill -9":
        assert f"{kept} parts of toy-in-parts are kept: run it again" in said
    lines: list[str] = []
    run = measure("toy-in-parts", folder=tmp_path, say=lines.append)
    assert sum("Continuing the run of toy-in-parts" in line for line in lines) == 1
    assert any(f"{kept} parts are done and stay" in line for line in lines)
    done = run.table("naps")
    assert list(done["nap"]) == list(range(NAPS)) and done["depth"].isna().all()
    # The first ones are those of the process that was stopped, and nobody did them again.
    assert done["worker"].nunique() == 2
    assert (done["worker"] == done["worker"].iloc[0]).sum() == kept
    continued = run.provenance["continued"]
    assert isinstance(continued, dict) and continued["parts_before"] == kept
    duration = run.provenance["duration_s"]
    assert isinstance(duration, float) and duration >= NAPS * 0.1
    assert not (tmp_path / UNFINISHED).exists()
    assert "continued" not in measure("toy-in-parts", folder=tmp_path, say=lines.append).provenance


def test_a_run_that_takes_too_long_is_continued_as_well(toys: None, tmp_path: Path) -> None:
    lines: list[str] = []
    changed = {"seconds": 0.4}
    with pytest.raises(TimedOut):
        measure("toy-in-parts", changed=changed, folder=tmp_path, time_limit_s=4, say=lines.append)
    run = measure("toy-in-parts", changed=changed, folder=tmp_path, say=lines.append)
    assert len(run.table("naps")) == NAPS


def test_a_notebook_says_what_was_continued_and_keeps_no_bar(toys: None, tmp_path: Path) -> None:
    running = naps(tmp_path / "runs")
    wait_for_parts(running, tmp_path / "runs", 2)
    running.kill()
    running.communicate()
    code = (
        "from labkit.lab.notebook import Investigation\n"
        f"lab = Investigation('toys', profile='quick', runs_folder={str(tmp_path / 'runs')!r})\n"
        "run = lab.measure('toy-in-parts')"
    )
    notebook = new_notebook(
        cells=[new_code_cell(code)],
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}},
    )
    nbformat.write(notebook, tmp_path / "naps.ipynb")
    papermill.execute_notebook(
        str(tmp_path / "naps.ipynb"), str(tmp_path / "done.ipynb"), progress_bar=False
    )
    html, _ = HTMLExporter().from_filename(str(tmp_path / "done.ipynb"))
    body = re.sub(r"<style>.*?</style>", "", html[html.index("<main") :], flags=re.S)
    assert "and continued after" in body and "Measured in" in body
    assert " left" not in body and "\u2588" not in body and "Traceback" not in body
