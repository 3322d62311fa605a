"""A power cut: a run is on the disk before it has its name, and so is the name when it is told."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

from labkit import runs
from labkit.runs import Run, SaveFailed, disk


def run() -> Run:
    facts: dict[str, object] = {"kernel": "6.18.44", "recorded_at": "2026-11-22T22:00:00+00:00"}
    tables = {"rounds": pd.DataFrame({"reads": [1, 2, 3]}), "keys": pd.DataFrame({"key": [1]})}
    return Run("torn-reads", "quick", {}, facts, tables)


@pytest.mark.parametrize("again", [False, True])
def test_content_comes_before_the_name(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data" / "runs"
    if again:
        runs.record(run(), data)
    happened: list[str] = []
    fsync, replace = os.fsync, disk.put_in_place

    def named(partial: Path, target: Path) -> None:
        happened.append("named")
        replace(partial, target)

    def synced(fd: int) -> None:
        happened.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(disk, "put_in_place", named)
    target = runs.record(run(), data)
    at = happened.index("named")
    before, after = happened[:at], happened[at + 1 :]
    files = {"run.json", "rounds.parquet", "keys.parquet"}
    assert {Path(path).name for path in before[:-1]} == files
    assert Path(before[-1]).name.startswith(".partial-")
    made = [str(path) for path in target.parents if path.is_relative_to(tmp_path)]
    assert after == (made[:1] if again else made)


def test_a_disk_that_cannot_keep_it_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(SaveFailed, match="Input/output error"):
        runs.save(run(), tmp_path)
    assert not any(tmp_path.rglob("*.parquet"))
