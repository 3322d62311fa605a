"""The experiment that CONTRIBUTING.md shows, added as it stands there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import experiments
from labkit import figures, runs
from labkit.judge.findings import HOLDS
from labkit.judge.mutants import mutate
from labkit.lab import catalogue, driver, experiment

ROOT = Path(__file__).parents[2]


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Put the file where experiments are discovered."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    (tmp_path / "refused_insert.py").write_text(code)
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(tmp_path)])
    catalogue.catalogue.cache_clear()
    yield "refused-insert"
    catalogue.catalogue.cache_clear()
    sys.modules.pop("experiments.refused_insert", None)
    experiment._registered.pop("refused-insert", None)


@pytest.mark.outside_vm("asks nothing of the kernel that differs between kernels")
def test_it_is_found_measured_saved_judged_and_drawn(added: str, tmp_path: Path) -> None:
    one = catalogue.find(added)
    path = runs.save(driver.measured(one), tmp_path / "runs")
    assert sorted(file.name for file in path.iterdir()) == [
        "cases.parquet", "rounds.parquet", "run.json",
    ]  # fmt: skip
    run = catalogue.load(path)
    assert catalogue.judge(run).require().state == HOLDS
    assert run.count("broken").anomalies == 3_000
    assert [str(found) for found in mutate(run, one.statements) if found.survived] == []
    assert figures.as_png(catalogue.draw(run)).startswith(b"\x89PNG")
