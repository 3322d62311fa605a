"""JupyterLab's front door: copies of the notebooks to work in, and a page that leads to them.

The copies are the user's: whatever is saved in them leaves the checkout as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from labkit import runs
from labkit.errors import LabError
from labkit.figures import as_png
from labkit.judge.findings import FAILS, HOLDS, UNDECIDED
from labkit.lab.catalogue import catalogue, draw, judge, latest, recorded
from labkit.lab.pages import render
from labkit.runs import Run

START: Final = "start.md"
"""The page that is opened first."""

_COPIED: Final = ".copied.json"  # the digest of each original as it was when it was copied
_FIGURES: Final = "figures"
_WORDS: Final = {HOLDS: "hold", UNDECIDED: "undecided", FAILS: "FAIL"}


@dataclass(frozen=True)
class Card:
    """What the first page tells of a notebook.

    Attributes
    ----------
    file, title, question
        Its file name, and what stands at its head.
    state
        What the newest runs come to, and where they were measured; empty where that is not known.
    duration_s
        What its experiments took, seconds; 0 where that is not known.
    figure
        File of a picture below the page's folder; empty without one.
    offered
        File of the newer original beside a copy that was worked in; empty without one.
    """

    file: str
    title: str
    question: str
    state: str = ""
    duration_s: float = 0.0
    figure: str = ""
    offered: str = ""


def copy(originals: Path, folder: Path) -> None:
    """Put copies of the notebooks into a folder, and leave alone what was worked in.

    A copy that is as it was made follows its original. Beside one that was changed the newer
    original is put, as ``<name>.new.ipynb``.

    Parameters
    ----------
    originals : Path
        Folder of ``*.ipynb``.
    folder : Path
        Made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = _known(folder)
    for original in sorted(originals.glob("*.ipynb")):
        content = original.read_bytes()
        target, newer = folder / original.name, folder / f"{original.stem}.new.ipynb"
        digest = hashlib.sha256(content).hexdigest()
        worked_in = target.exists() and _digest(target) != known.get(original.name)
        if worked_in and known.get(original.name) != digest and _digest(target) != digest:
            _write(newer, content)
            continue
        if not worked_in:
            _write(target, content)
        newer.unlink(missing_ok=True)
        known[original.name] = digest
    _write(folder / _COPIED, json.dumps(known, indent=1).encode())


def prepare(originals: Path, folder: Path, runs_folder: Path) -> list[str]:
    """Copy the notebooks, and write a first page without states and figures.

    Parameters
    ----------
    originals, folder
        As for `copy`.
    runs_folder : Path
        Where runs of here are.

    Returns
    -------
    list of str
        The command that writes the whole page, which takes some seconds.
    """
    copy(originals, folder)
    write(folder, None)
    return [sys.executable, "-m", "labkit.lab.front", str(folder), str(runs_folder)]


def write(folder: Path, runs_folder: Path | None) -> None:
    """Write the first page.

    Parameters
    ----------
    folder : Path
        Of the copies.
    runs_folder : Path or None
        Where runs of here are; None writes a page without states and figures, which is at once.
    """
    cards = [_card(file, folder, runs_folder) for file in _notebooks(folder)]
    _write(folder / START, render("start.md", cards=cards, whole=runs_folder is not None).encode())


def _notebooks(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.glob("[0-9][0-9]-*.ipynb")):
        if not file.name.endswith(".new.ipynb"):
            yield file


def _card(file: Path, folder: Path, runs_folder: Path | None) -> Card:
    from labkit.lab.report import measured_by

    try:
        cells: list[Any] = json.loads(file.read_bytes())["cells"]
        head = "".join(cells[0]["source"]).splitlines()
    except (ValueError, KeyError, IndexError, TypeError):  # half a file, or somebody else's
        return Card(file.name, file.stem, "This file is no notebook that can be read.")
    title = next((line[2:] for line in head if line.startswith("# ")), file.stem)
    question = next((line.strip("* ") for line in head if line.startswith("**")), "")
    newer = f"{file.stem}.new.ipynb"
    offered = newer if (folder / newer).exists() else ""
    if runs_folder is None:
        return Card(file.name, title, question, offered=offered)
    found = list(_newest(measured_by(file), runs_folder))
    return Card(
        file.name,
        title,
        question,
        _state(found),
        sum(float(str(run.provenance.get("duration_s") or 0)) for run in found),
        _figure(file.stem, found, folder),
        offered,
    )


def _newest(experiments: list[str], runs_folder: Path) -> Iterator[Run]:
    """The newest run of each experiment: of here, or else a recorded one."""
    for id in experiments:
        if id not in catalogue():
            continue
        try:
            run = latest(runs_folder, id)
            known = recorded(id, profile="quick") if run is None else [run]
        except LabError:  # a damaged run is told where it is judged
            continue
        yield from known[-1:]


def _state(found: list[Run]) -> str:
    states: dict[str, int] = {}
    for run in found:
        try:
            state = _WORDS[judge(run).state]
        except LabError:
            state = "cannot be judged"
        states[state] = states.get(state, 0) + 1
    if not states:
        return ""
    here = sum(not run.recorded for run in found)
    told = "findings: " + ", ".join(f"{count} {state}" for state, count in states.items())
    kernels = sorted({runs.series(run.kernel) for run in found if run.recorded})
    where = f"recorded on {' and '.join(kernels)}" if kernels else ""
    never = "never run here" if here == 0 else f"{here} run here"
    return "; ".join(filter(None, [told, never, where]))


def _figure(stem: str, found: list[Run], folder: Path) -> str:
    """Draw the first figure that one of the runs has."""
    for run in found:
        if "" in catalogue()[run.experiment].figures:
            try:
                picture = as_png(draw(run))
            except LabError:
                continue
            (folder / _FIGURES).mkdir(exist_ok=True)
            _write(folder / _FIGURES / f"{stem}.png", picture)
            return f"{_FIGURES}/{stem}.png"
    return ""


def _known(folder: Path) -> dict[str, str]:
    try:
        known = json.loads((folder / _COPIED).read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _write(file: Path, content: bytes) -> None:
    """Write a file whole, or not at all."""
    partial = file.with_name(f".partial-{file.name}-{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
