"""The notebooks of the lab: built alike, complete and clean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from labkit.lab.catalogue import catalogue
from labkit.lab.report import NOTEBOOKS

FILES = sorted(NOTEBOOKS.glob("*.ipynb"))
MOST_LINES = 10
MEASURED = re.compile(r'lab\.measure\("([a-z0-9-]+)"\)')

each_notebook = pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])


def cells(file: Path, kind: str = "code") -> list[Any]:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if kind in ("", cell.cell_type)]


@each_notebook
def test_it_is_clean(file: Path) -> None:
    for cell in cells(file):
        assert cell.outputs == [] and cell.execution_count is None
        assert len(cell.source.splitlines()) <= MOST_LINES, cell.source
    ids = [cell.id for cell in cells(file, "")]
    assert len(ids) == len(set(ids))
    assert not [id for id in ids if id.isdigit()], "a cell's id says which section it is of"
    assert nbformat.read(file, as_version=4).metadata.kernelspec.name == "python3"


@each_notebook
def test_its_parameters_say_their_units(file: Path) -> None:
    (parameters,) = [c for c in cells(file) if "parameters" in c.metadata.get("tags", [])]
    lines = parameters.source.splitlines()
    assert [line.split(" = ")[0] for line in lines] == [
        "profile", "runs_folder", "changes", "time_limit_s",
    ]  # fmt: skip
    assert all("#" in line for line in lines)


@each_notebook
def test_it_begins_with_a_question_and_ends_with_provenance(file: Path) -> None:
    first = cells(file, "")[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "?" in first.source
    assert [cell.source for cell in cells(file)[-2:]] == [
        "lab.assert_findings()", "lab.provenance()",
    ]  # fmt: skip


@each_notebook
def test_every_section_measures_and_concludes_in_order(file: Path) -> None:
    source = "\n".join(cell.source for cell in cells(file))
    measured = MEASURED.findall(source)
    assert source.count("lab.conclude(") == len(measured)
    numbers = [catalogue()[id].number for id in measured]
    assert numbers == sorted(numbers)
    for before, cell in zip(cells(file, ""), cells(file, "")[1:], strict=False):
        if MEASURED.search(cell.source):
            assert before.cell_type == "markdown", f"no prose before {cell.source!r}"
            assert len(before.source) > 300


def test_every_experiment_is_in_one_notebook() -> None:
    measured = [
        id for file in FILES for cell in cells(file) for id in MEASURED.findall(cell.source)
    ]
    assert sorted(measured) == sorted(catalogue())
