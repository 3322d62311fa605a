"""All experiments: found, and their runs read, judged and drawn as each experiment says."""

from __future__ import annotations

import difflib
import functools
import importlib
import itertools
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit import figures, runs
from labkit.errors import BadInput
from labkit.judge.findings import Finding, conclude
from labkit.lab.experiment import Experiment, registered
from labkit.runs import RECORDED, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PACKAGE = "experiments"


@functools.cache
def catalogue() -> dict[str, Experiment]:
    """All experiments by id, in the order of their numbers.

    Raises
    ------
    BadInput
        Two experiments have one number.
    """
    for module in _modules():
        importlib.import_module(module)
    ordered = sorted(registered().values(), key=lambda one: one.number)
    for one, next_one in itertools.pairwise(ordered):
        if one.number == next_one.number:
            raise BadInput(f"{one.id} and {next_one.id} both have the number {one.number}.")
    return {one.id: one for one in ordered}


def find(id: str) -> Experiment:
    """One experiment by its id; BadInput lists the near ones when there is none."""
    known = _known(id)
    if known is None:
        near = difflib.get_close_matches(id, catalogue(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see python -m labkit list."
        raise BadInput(f"There is no experiment {id!r}: {hint}")
    return known


def _modules() -> list[str]:
    """The names of all modules of experiments, by discovery: they stand above this one."""
    package = importlib.import_module(_PACKAGE)
    return [one.name for one in pkgutil.walk_packages(package.__path__, f"{_PACKAGE}.")]


def _known(id: str) -> Experiment | None:
    """An experiment from the file of its name, which saves a worker the import of all others."""
    if id not in registered():
        for module in _modules():
            if module.rpartition(".")[2] == id.replace("-", "_"):
                importlib.import_module(module)
    return registered().get(id) or catalogue().get(id)


def complete(run: Run) -> Run:
    """A run with what follows from its tables, its counts among them.

    One of a benchmark, which is no experiment, is complete.

    Raises
    ------
    BadRun
        It lacks a table that something follows from.
    """
    known = _known(run.experiment)
    return run if known is None else known.complete(run)


def usual_parameters(experiment: str, profile: str) -> Mapping[str, Any] | None:
    """The parameters of an experiment's profile; None for what is no experiment."""
    known = _known(experiment)
    return None if known is None else dict(known.profiles[profile])


def load(path: Path) -> Run:
    """Read a run from its directory, and complete it."""
    return complete(runs.load(path))


def latest(folder: Path, experiment: str, profile: str | None = None) -> Run | None:
    """The newest run of an ``experiment``, completed; None where there is none.

    ``folder`` and ``profile`` are as `labkit.runs.latest` takes them.
    """
    run = runs.latest(folder, experiment, profile)
    return None if run is None else complete(run)


def recorded(experiment: str, *, profile: str, data: Path = RECORDED) -> list[Run]:
    """The recorded runs of an ``experiment``, completed, ordered by kernel release.

    ``profile`` and ``data`` are as `labkit.runs.recorded` takes them.
    """
    return [complete(run) for run in runs.recorded(experiment, profile=profile, data=data)]


def judge(run: Run) -> Finding:
    """Judge a run as its experiment says.

    Raises
    ------
    BadInput
        There is no experiment of that name, or it states nothing.
    """
    known = find(run.experiment)
    return conclude(run, known.statements, known.sentence)


def draw(run: Run, of: str = "") -> Figure:
    """Draw a figure of a run and sign it with its provenance.

    Parameters
    ----------
    run : Run
        With its counts.
    of : str
        Another figure than the experiment's own, where its runs have several.

    Raises
    ------
    BadInput
        There is no such figure.
    """
    known = find(run.experiment)
    if of not in known.figures:
        raise BadInput(f"{known.id} has no figure {of!r}." if of else f"{known.id} has no figure.")
    return figures.draw(known.figures[of], run)


def drawn() -> tuple[str, ...]:
    """The ids of all experiments that have a figure, sorted."""
    return tuple(sorted(id for id, one in catalogue().items() if "" in one.figures))
