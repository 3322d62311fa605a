"""Saved runs at the command line: listed, shown, compared; what an experiment can be told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from labkit import runs
from labkit.__main__ import main
from labkit.lab.catalogue import catalogue
from labkit.lab.schema import parameters
from labkit.runs import RECORDED

LRU = "lru-eviction"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give two runs of one experiment, on two kernels, and a damaged one."""
    known = [path.parent for path in sorted(RECORDED.glob(f"*/quick/{LRU}/run.json"))]
    for place, path in enumerate(known[:2]):
        shutil.copytree(path, tmp_path / LRU / f"run-{place}")
    shutil.copytree(known[0], tmp_path / "damaged" / "run-x")
    (tmp_path / "damaged" / "run-x" / "run.json").write_text("\x1b[31m")
    return tmp_path


@pytest.fixture(autouse=True)
def own_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave this process's signals alone."""
    monkeypatch.setattr("signal.signal", lambda *arguments: None)


def test_runs_are_listed_newest_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--folder", str(folder), "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["experiment"] for one in told].count(LRU) == 2
    assert told[0]["recorded_at"] >= told[1]["recorded_at"]
    assert "problem" in told[2]
    assert main(["runs", "lru", "--folder", str(folder)]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    assert main(["runs", "--folder", str(folder)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_run_is_shown_with_its_finding(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", LRU, "--folder", str(folder)]) == 0
    text = capsys.readouterr().out
    assert f"{LRU} holds: " in text and "entries = 1024" in text
    assert main(["show", str(folder / LRU / "run-0"), "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == "holds" and told["parameters"]["entries"] == 1024
    assert main(["show", "nothing", "--folder", str(folder)]) == 2


def test_two_runs_are_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was edited in between is told: a parameter, a statement that turned, the kernel."""
    one = runs.load(folder / LRU / "run-0")
    rounds = one.tables["rounds"]
    rounds.loc[rounds["variant"] == "control", "kept"] -= 1
    one.parameters["entries"] = 2048
    other = runs.save(one, folder)
    assert main(["compare", str(folder / LRU / "run-0"), str(other), "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == {"entries": [1024, 2048]} and told["provenance"] == {}
    assert ("holds", "fails") in [(turned["was"], turned["is"]) for turned in told["statements"]]
    assert main(["compare", str(folder / LRU / "run-0"), str(folder / LRU / "run-1")]) == 0
    text = capsys.readouterr().out
    assert "kernel: 6.1" in text and "no parameters differ" in text
    foreign = next(RECORDED.glob("*/quick/padded-key"))
    assert main(["compare", str(foreign), str(other)]) == 2
    assert "give two runs of one experiment" in capsys.readouterr().err


def test_help_tells_the_parameters_of_an_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", LRU, "--help"])
    text = capsys.readouterr().out
    assert "entries  whole number above 0; quick 1024" in text and "examples:" in text


def test_every_parameter_says_what_it_is() -> None:
    for one in catalogue().values():
        for parameter in parameters(one):
            assert parameter.about and parameter.bounds, (one.id, parameter.name)


def test_list_takes_a_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "lru", "-o", "json"]) == 0
    found = [entry["id"] for entry in json.loads(capsys.readouterr().out)]
    assert LRU in found and len(found) < len(catalogue())
    assert main(["list", "no such thing"]) == 2
    assert "No experiment has 'no such thing'" in capsys.readouterr().err
