"""Measure an experiment in a worker process, which hands over the directory of the saved run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labkit import runs
from labkit.errors import BadInput
from labkit.kernel import tools
from labkit.kernel.provenance import emulated, provenance
from labkit.lab import parts, progress
from labkit.lab.catalogue import find, load
from labkit.lab.driver import measured
from labkit.lab.parts import Parts
from labkit.lab.worker import Say, Worker
from labkit.runs import Run

RUNS = (tools.CHECKOUT or Path.cwd()) / "runs"
"""Where runs are saved unless the caller says otherwise."""

TIME_LIMIT_S = {"quick": 120.0, "full": 900.0}
"""Bound for one experiment, seconds."""


def measure(
    experiment: str,
    profile: str = "quick",
    changed: Mapping[str, Any] | None = None,
    *,
    folder: Path = RUNS,
    time_limit_s: float | None = None,
    say: Say | None = None,
    worker: Worker | None = None,
) -> Run:
    """Run an experiment in a worker, save the run, and load it back from disk.

    One that measures in parts and was stopped, however that came about, goes on where it stood,
    if code, kernel, machine and parameters are the same.

    Parameters
    ----------
    experiment : str
        Id, as ``python -m labkit list`` shows it.
    profile : str
        ``quick`` or ``full``.
    changed : mapping, optional
        Parameters that differ from the profile's.
    folder : Path
        Folder of runs.
    time_limit_s : float, optional
        Seconds until the worker is killed, by default `TIME_LIMIT_S` of the profile; times
        `patience`.
    say : callable, optional
        Gets each line of progress; without it they go to standard error.
    worker : Worker, optional
        One that is ready; without it one is started.

    Returns
    -------
    Run
        As it stands on disk.

    Raises
    ------
    BadInput
        Before a worker is started.
    SaveFailed
        The folder of runs cannot be written, or the disk is full.
    Unavailable
        The kernel lacks a feature.
    TimedOut
        The time limit passed; the worker and all its children were killed.
    LabError
        The worker failed; the sentence says how.
    """
    subject = find(experiment)
    parameters = subject.parameters(profile, changed)
    limit = TIME_LIMIT_S[profile] if time_limit_s is None else time_limit_s
    if not limit > 0:
        raise BadInput(f"A time limit is a number of seconds above 0, not {limit!r}.")
    limit *= patience()
    check_writable(Path(folder))
    order = {
        "experiment": experiment,
        "profile": profile,
        "changed": dict(changed or {}),
        "folder": str(Path(folder).absolute()),
    }
    try:
        with worker or Worker() as working:
            path = working.answer(
                f"{__name__}:saved", order, name=experiment, limit_s=limit, say=say
            )
            return load(Path(path))
    except BaseException:
        if kept := parts.waiting(folder, experiment, profile, parameters):
            words = f"{kept} parts of {experiment} are kept: run it again, and it goes on there."
            (say or progress.say)(progress.KEPT + words)
        raise


def patience() -> int:
    """How many times as long as usual work may take: 10 where the CPU is emulated, else 1."""
    return runs.SLOWER if emulated() else 1


def saved(experiment: str, profile: str, changed: Mapping[str, Any], folder: str) -> str:
    """Measure in this very process, as a worker does, and save the run.

    Parameters
    ----------
    experiment, profile, changed, folder
        As for `measure`.

    Returns
    -------
    str
        The directory of the run.
    """
    subject = find(experiment)
    if not subject.in_parts:
        return str(runs.save(measured(subject, profile, changed), Path(folder)))
    parameters = subject.parameters(profile, changed)
    with Parts(Path(folder), experiment, profile, parameters, provenance()) as done:
        path = runs.save(measured(subject, profile, changed, parts=done), Path(folder))
        done.forget()
    return str(path)


def check_writable(folder: Path) -> None:
    """Refuse at once what would only show when the run is saved."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise runs.SaveFailed(
            f"Runs cannot be saved in {folder} ({error.strerror or error}); free some space or "
            "name a folder that can be written."
        ) from None
