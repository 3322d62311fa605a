"""Two kernels side by side: what is found in recorded runs, and what is not let pass."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.across.two_kernels import DIFFERENCES, KERNELS, Pair
from labkit import runs
from labkit.errors import BadInput
from labkit.judge.findings import FAILS, FindingFailed
from labkit.runs import Run


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


@pytest.fixture
def copy(tmp_path: Path, pair: Pair) -> Path:
    """A folder with the runs that decide, to be changed."""
    folder = tmp_path / "runs"
    for experiment in {*(one.experiment for one in DIFFERENCES), "errno-signal"}:
        for run in pair.runs(experiment).values():
            runs.record(run, folder)
    return folder


def as_of(run: Run, kernel: str) -> Run:
    """The same run, as if another kernel had made it."""
    return replace(run, provenance={**run.provenance, "kernel": kernel})


def test_the_recorded_kernels_do_what_their_age_says(pair: Pair) -> None:
    finding = pair.finding()
    assert finding.state != FAILS, finding
    undecided = [check for check in finding.checks if not check.holds]
    assert all(check.statement.startswith("every recorded run") for check in undecided), finding
    table = pair.differences().set_index("what")
    for one in DIFFERENCES:
        assert list(table.loc[one.what, list(KERNELS)]) == [one.before, one.after]


def test_what_the_article_names_is_absent_in_both(pair: Pair) -> None:
    hooks = pair.hook_points()
    named = hooks[hooks["hook"].isin(["tp_btf bpf_map_update_elem"])]
    assert len(named) == 1
    assert all("ENOENT" in str(answer) for answer in named[list(KERNELS)].iloc[0])
    fentry = hooks[hooks["hook"] == "fentry htab_map_update_elem"].iloc[0]
    assert fentry["6.1"] == "passed by bpf(2) and programs"


def test_a_kernel_that_does_not_as_its_age_says_is_named(copy: Path, pair: Pair) -> None:
    old, new = pair.runs("lru-free-target").values()
    for path in copy.glob("*/quick/lru-free-target"):
        shutil.rmtree(path)
    runs.record(as_of(old, new.kernel), copy)
    runs.record(as_of(new, old.kernel), copy)
    with pytest.raises(FindingFailed, match="keys that a full LRU map evicts at once"):
        Pair(recorded=copy).finding().require()


def test_an_error_number_that_differs_is_found(copy: Path, pair: Pair) -> None:
    assert pair.errno().empty
    run = pair.runs("errno-signal")["6.1"]
    table = run.table("errno").copy()
    table.loc[0, "user"] = -71
    runs.record(replace(run, tables={**run.tables, "errno": table}), copy)
    found = Pair(recorded=copy).errno()
    assert sorted(found["kernel"]) == sorted(KERNELS)


def test_a_case_that_goes_wrong_on_one_kernel_alone_is_found(copy: Path, pair: Pair) -> None:
    before = set(map(tuple, Pair(recorded=copy).counts()[["experiment", "case"]].to_numpy()))
    run = pair.runs("outer-map-null")["6.1"]
    rounds = run.table("rounds").copy()
    rounds.loc[rounds["variant"] == "control", "absent"] = 1
    runs.record(replace(run, tables={**run.tables, "rounds": rounds}), copy)
    after = Pair(recorded=copy).counts()
    new = set(map(tuple, after[["experiment", "case"]].to_numpy())) - before
    assert new == {("outer-map-null", "hash of maps, nobody switches")}


def test_without_runs_nothing_holds(tmp_path: Path) -> None:
    pair = Pair(recorded=tmp_path)
    assert pair.both == () and pair.counts().empty
    with pytest.raises(BadInput, match="errno-signal"):
        pair.errno()
