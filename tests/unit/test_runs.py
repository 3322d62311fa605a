"""Runs on disk: whole or not at all, and refused with a sentence when damaged."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from labkit import runs
from labkit.errors import BadInput
from labkit.runs import BadRun, Run, SaveFailed, Triad


def triad(broken: int = 3) -> Triad:
    triad = Triad("torn")
    triad.add("broken", case="array", operations=10, anomalies=broken, cost_ns=10.0)
    triad.add("broken", case="hash", operations=30, anomalies=1, cost_ns=20.0)
    triad.add("control", operations=10, anomalies=0)
    triad.add("fixed", operations=10, anomalies=0, cost_ns=84.5)
    return triad


def run(**changes: Any) -> Run:
    return replace(
        Run(
            experiment="torn-reads",
            profile="quick",
            parameters={"sizes": [8, 64], "seconds": 0.5},
            provenance={"kernel": "6.18.44", "recorded_at": "2026-11-22T22:00:00+00:00"},
            tables={
                "counts": triad().table(),
                "history": pd.DataFrame({"key": np.array([1, 2**64 - 1], np.uint64)}),
            },
        ),
        **changes,
    )


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_run_comes_back_as_it_went(tmp_path: Path) -> None:
    saved = run()
    path = runs.save(saved, tmp_path)
    loaded = runs.load(path)
    assert (loaded.experiment, loaded.profile) == (saved.experiment, saved.profile)
    assert loaded.parameters == saved.parameters
    assert loaded.provenance == saved.provenance
    assert loaded.tables.keys() == saved.tables.keys()
    for name, table in saved.tables.items():
        pd.testing.assert_frame_equal(loaded.tables[name], table)
    assert loaded.path == path and path.parent == tmp_path / "torn-reads"
    assert loaded.kernel == "6.18.44" and not loaded.recorded


def test_numpy_numbers_in_parameters_become_json(tmp_path: Path) -> None:
    path = runs.save(run(parameters={"n": np.int64(3), "sizes": np.array([1, 2])}), tmp_path)
    assert runs.load(path).parameters == {"n": 3, "sizes": [1, 2]}


def test_counts_are_added_up_and_never_invented() -> None:
    both = run().count("broken")
    assert (both.operations, both.anomalies, both.rate) == (40, 4, 0.1)
    assert both.cost_ns == 17.5
    assert str(both) == "4 of 40"
    assert run().count("broken", "array").anomalies == 3
    assert math.isnan(run().count("control").cost_ns)
    assert run().cases() == ["array", "hash", ""]
    assert run().cases("fixed") == [""]
    with pytest.raises(BadRun, match="no counts for fixed, case 'array'"):
        run().count("fixed", "array")
    with pytest.raises(BadRun, match="no table 'times', it has counts, history"):
        run().table("times")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"variant": "cured"}, "broken, control, fixed, not 'cured'"),
        ({"anomalies": -1}, "negative"),
        ({"anomalies": 11}, "more than operations.*11 anomalies in 10"),
        ({"cost_ns": -1.0}, "nanoseconds"),
    ],
)
def test_impossible_counts_are_refused(row: dict[str, Any], sentence: str) -> None:
    good: dict[str, Any] = {"variant": "broken", "operations": 10, "anomalies": 1}
    with pytest.raises(BadInput, match=sentence):
        one = Triad("torn")
        one.add(**(good | row))
        one.table()


def test_all_three_variants_are_demanded() -> None:
    only = Triad("torn")
    only.add("broken", operations=1, anomalies=1)
    with pytest.raises(BadInput, match="variant control and fixed"):
        only.table()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"experiment": "../up"}, "experiment id"),
        ({"profile": "fast"}, "quick or full"),
        ({"provenance": {"kernel": "6.18"}}, "'recorded_at'"),
        ({"provenance": {"kernel": "../..", "recorded_at": "now"}}, "kernel release"),
        ({"parameters": {"path": Path()}}, "JSON values"),
        ({"parameters": {"rate": math.nan}}, "JSON values"),
        ({"tables": {}}, "at least one table"),
        ({"tables": {"counts": triad().table(), "../x": pd.DataFrame()}}, "table's name"),
        ({"tables": {"counts": triad().table().drop(columns="case")}}, "column case"),
        ({"tables": {"counts": triad().table().astype({"anomalies": float})}}, "is int64"),
        ({"tables": {"counts": triad().table().assign(anomalies=99)}}, "more than operations"),
        (
            {"tables": {"counts": triad().table(), "odd": pd.DataFrame({"x": [1, "a"]})}},
            "does not fit into Parquet",
        ),
    ],
)
def test_what_breaks_the_contract_is_refused_and_leaves_nothing(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=sentence):
        runs.save(run(**changes), tmp_path / "runs")
    assert not [name for name in everything_in(tmp_path) if runs.PARTIAL in name or "json" in name]


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(SaveFailed, match=r"could not be saved .* free some space or name a folder"):
        runs.save(run(), file)
    assert everything_in(tmp_path) == ["file"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    script = """
import resource, signal, sys
from pathlib import Path
import numpy as np, pandas as pd
from labkit import runs
from labkit.errors import LabError
old = runs.load(Path(sys.argv[1]))
old.tables["noise"] = pd.DataFrame({"x": np.random.default_rng(0).random(100_000)})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (runs.save, runs.record):
    try:
        write(old, Path(sys.argv[2]))
    except runs.SaveFailed as error:
        print(error)
"""
    assert resource.RLIMIT_FSIZE  # a file size limit stands in for a disk without space
    source = runs.save(run(), tmp_path / "source")
    target = tmp_path / "target"
    done = subprocess.run(
        [sys.executable, "-c", script, source, target],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.count("File too large") == 2
    assert not [path for path in target.rglob("*") if path.is_file() or runs.PARTIAL in path.name]


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyarrow.parquet.write_table", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runs.save(run(), tmp_path)
    assert everything_in(tmp_path) == ["torn-reads"]


def damage_version(path: Path) -> None:
    meta = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(meta | {"schema_version": 99}))


def damage_content(path: Path) -> None:
    data = bytearray((path / "history.parquet").read_bytes())
    data[10] ^= 0xFF
    data[20] ^= 0xFF
    (path / "history.parquet").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: (path / "run.json").unlink(), "no run in"),
        (lambda path: (path / "run.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "run.json").write_text("[]"), "schema version None"),
        (lambda path: (path / "run.json").write_text('{"schema_version": 2}'), "lacks"),
        (damage_version, "schema version 99, this lab reads 2"),
        (lambda path: (path / "counts.parquet").unlink(), "lacks its table 'counts'"),
        (lambda path: (path / "counts.parquet").write_bytes(b"PAR1"), "is not what was saved"),
        (damage_content, "is not what was saved"),
        (
            lambda path: pd.DataFrame({"key": [1]}).to_parquet(path / "history.parquet"),
            "is not what was saved",
        ),
    ],
)
def test_a_damaged_run_is_one_sentence(
    damage: Callable[[Path], object], sentence: str, tmp_path: Path
) -> None:
    path = runs.save(run(), tmp_path)
    damage(path)
    with pytest.raises(BadRun, match=sentence) as caught:
        runs.load(path)
    assert "\n" not in str(caught.value)


def test_a_run_without_counts_loads_and_says_so_when_asked(tmp_path: Path) -> None:
    observed = {"rounds": pd.DataFrame({"lookups": [10], "absent": [1]})}
    again = runs.load(runs.save(run(tables=observed), tmp_path))
    with pytest.raises(BadRun, match="no table 'counts'"):
        again.count("broken")
    complete = again.derived({"counts": run().counts})
    assert complete.count("broken").operations > 0
    # What follows from other tables is not saved a second time.
    assert list(runs.load(runs.save(complete, tmp_path)).tables) == ["rounds"]


def test_the_latest_of_a_profile(tmp_path: Path) -> None:
    assert runs.latest(tmp_path, "torn-reads") is None
    full = runs.save(run(profile="full"), tmp_path)
    first = runs.save(run(), tmp_path)
    second = runs.save(run(), tmp_path)
    assert first != second
    (tmp_path / "torn-reads" / f"{runs.PARTIAL}99991231T000000-1").mkdir()
    for profile, path in ((None, second), ("quick", second), ("full", full)):
        found = runs.latest(tmp_path, "torn-reads", profile)
        assert found is not None and found.path == path


def test_recorded_runs_by_kernel(tmp_path: Path) -> None:
    for kernel in ("6.18.44", "6.1.0-25-amd64", "6.9.1"):
        runs.record(run(provenance=run().provenance | {"kernel": kernel}), tmp_path)
    found = runs.recorded("torn-reads", profile="quick", data=tmp_path)
    assert [one.kernel for one in found] == ["6.1.0-25-amd64", "6.9.1", "6.18.44"]
    assert all(one.recorded for one in found)
    assert runs.recorded("torn-reads", profile="full", data=tmp_path) == []
    assert runs.recorded("torn-reads", profile="quick", data=tmp_path / "none") == []


def test_recording_again_replaces_what_was_there(tmp_path: Path) -> None:
    runs.record(run(), tmp_path)
    again = run()
    del again.tables["history"]
    path = runs.record(again, tmp_path)
    assert sorted(file.name for file in path.iterdir()) == ["counts.parquet", "run.json"]
    assert everything_in(tmp_path / "6.18.44" / "quick") == [
        "torn-reads", "torn-reads/counts.parquet", "torn-reads/run.json",
    ]  # fmt: skip


def test_a_failure_while_replacing_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = runs.record(run(), tmp_path)
    rename = Path.rename
    monkeypatch.setattr("labkit.runs.disk._exchange", lambda one, other: False)

    def fail_once(self: Path, target: Path) -> Path:
        if self.name.startswith(runs.PARTIAL):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(SaveFailed, match="No space left"):
        runs.record(run(parameters={}), tmp_path)
    assert runs.load(path).parameters == run().parameters
    assert [entry.name for entry in path.parent.iterdir()] == ["torn-reads"]
