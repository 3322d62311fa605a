"""Run the quick experiments again and again, quiet and under load, and see what flips.

A finding that holds on a quiet machine and fails beside a busy one says something of the machine.
Here every experiment is measured several times in both conditions; each decision, of its statements
and of the claims that rest on it, is held against those of the recorded runs. A decision that came
out otherwise is *wrong*; one that was not made is *undecided*.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pandas as pd

from labkit.errors import LabError, Unavailable
from labkit.judge import claims
from labkit.judge.language import BadPredicate, decide
from labkit.kernel import leftovers
from labkit.kernel.parallel import Child
from labkit.kernel.provenance import provenance
from labkit.lab.catalogue import catalogue, complete, judge
from labkit.lab.experiment import Experiment
from labkit.lab.measure import measure
from labkit.lab.parts import Parts
from labkit.lab.progress import say
from labkit.runs import Run, RunIndex, series

QUIET, LOADED = "quiet", "loaded"
WRONG, UNDECIDED, AS_RECORDED, ERROR = "wrong", "undecided", "as recorded", "error"

_BY_TIMES: Final = ("ratio(", "spread(")
_BUSY_LOOPS: Final = 2
_BLOCK: Final = 1 << 20
_BLOCKS: Final = 64


@contextmanager
def load(folder: Path) -> Iterator[None]:
    """Two busy loops and a writer to the disk, while the block lasts.

    It writes 64 MiB into the folder, over and over.
    """
    with ExitStack() as stack:
        for _ in range(_BUSY_LOOPS):
            stack.enter_context(Child(_spin))
        stack.enter_context(Child(lambda: _write_on(folder / "written")))
        yield


def _spin() -> None:
    while True:
        pass


def _write_on(path: Path) -> None:
    block = os.urandom(_BLOCK)
    while True:
        with path.open("wb") as file:
            for _ in range(_BLOCKS):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())


def by_times(experiment: Experiment) -> bool:
    """Whether an experiment, or a claim that rests on it, decides by times or rates."""
    stated = [one.holds for one in experiment.statements]
    stated += [case.holds for claim in claims.read() for case in claim.cases
               if case.experiment == experiment.id]  # fmt: skip
    return any(word in one for one in stated for word in _BY_TIMES)


def soak(
    ids: Sequence[str],
    folder: Path,
    *,
    times: int = 3,
    times_by_times: int = 20,
) -> Run:
    """Measure experiments again and again, and keep every decision.

    It may be stopped, and goes on where it stood: each measurement is kept as it is done.

    Parameters
    ----------
    ids : sequence of str
        Experiments; those that this kernel cannot run are left out.
    folder : Path
        Folder of runs. The measured runs themselves are not kept.
    times : int
        Measurements of each experiment in each condition.
    times_by_times : int
        The same of one that decides by times or rates.

    Returns
    -------
    Run
        Not saved yet. ``decisions``: one row for each measurement and each thing decided:
        ``experiment``, ``condition`` (``quiet`` or ``loaded``), ``turn`` (from 0), ``subject``
        (``finding`` or a claim's id and case), ``came_to`` (`WRONG`, `UNDECIDED`, `AS_RECORDED` or
        `ERROR`), ``measured`` (in words, where it is wrong, undecided or an error).
    """
    wanted = [catalogue()[id] for id in ids]
    parameters = {"experiments": list(ids), "times": times, "times_by_times": times_by_times}
    rows: list[dict[str, Any]] = []
    facts = provenance()
    with Parts(folder, "soak", "quick", parameters, facts) as parts:
        for one, condition, turn in _order(wanted, times, times_by_times):
            name = f"{one.id}-{condition}-{turn}"
            say(f"{len(parts)} done; now {one.id}, {condition}, turn {turn + 1}")
            rows += parts.measure(name, functools.partial(_once, one, condition, turn))
        parts.forget()
    return Run("soak", "quick", parameters, facts, {"decisions": pd.DataFrame(rows)})


def summary(run: Run) -> pd.DataFrame:
    """Count the decisions of a soak.

    One row for each experiment and condition, and one for all together in each: ``experiment``,
    ``condition``, ``decisions``, and how many of them were ``as recorded``, ``undecided``,
    ``wrong``, ``error``.
    """
    decisions = run.table("decisions")
    every = pd.concat([decisions, decisions.assign(experiment="all")])
    table = (
        every.groupby(["experiment", "condition"], sort=False)["came_to"]
        .value_counts()
        .unstack(fill_value=0)
        .reindex(columns=[AS_RECORDED, UNDECIDED, WRONG, ERROR], fill_value=0)
    )
    table.insert(0, "decisions", table.sum(axis=1))
    return table.reset_index()


def as_text(run: Run) -> str:
    """Tell a soak for a terminal: the counts, then what came out otherwise, by name."""
    decisions = run.table("decisions")
    lines = [summary(run).to_string(index=False)]
    for _, row in decisions[decisions["came_to"] != AS_RECORDED].iterrows():
        lines.append(
            f"{row['came_to']}: {row['experiment']}, {row['subject']}, {row['condition']}, "
            f"turn {row['turn']}: {row['measured']}"
        )
    return "\n".join(lines)


def _order(
    wanted: Sequence[Experiment], times: int, times_by_times: int
) -> Iterator[tuple[Experiment, str, int]]:
    """Every measurement, both conditions in turns, so that the day's load meets all alike."""
    most = {one.id: times_by_times if by_times(one) else times for one in wanted}
    for turn in range(max(most.values(), default=0)):
        for condition in (QUIET, LOADED):
            for one in wanted:
                if turn < most[one.id]:
                    yield one, condition, turn


def _once(one: Experiment, condition: str, turn: int) -> list[dict[str, Any]]:
    about = {"experiment": one.id, "condition": condition, "turn": turn}
    with leftovers.temporary_folder() as folder, ExitStack() as stack:
        if condition == LOADED:
            stack.enter_context(load(folder))
        try:
            run = measure(one.id, "quick", folder=folder, say=lambda words: None)
        except Unavailable:
            return []
        except LabError as error:
            return [{**about, "subject": "finding", "came_to": ERROR, "measured": str(error)}]
        return [{**about, **row} for row in _decisions(run)]


def _decisions(run: Run) -> Iterator[dict[str, str]]:
    finding = judge(run)
    came_to = {"holds": AS_RECORDED, "undecided": UNDECIDED, "fails": WRONG}[finding.state]
    told = "; ".join(str(check) for check in finding.checks if check.holds is not True)
    yield {"subject": "finding", "came_to": came_to, "measured": told}
    for claim in claims.read():
        for case in claim.cases:
            if case.experiment == run.experiment:
                yield {"subject": f"{claim.id} {case.when}".strip(), **_claimed(case, run)}


@functools.cache
def _recorded() -> RunIndex:
    return RunIndex(complete=complete)


def _claimed(case: claims.Case, run: Run) -> dict[str, str]:
    known = claims.recorded_outcome(case, series(run.kernel), _recorded())
    try:
        answer = decide(case.holds, run)
    except BadPredicate as error:
        return {"came_to": ERROR, "measured": str(error)}
    if answer.holds is None:
        return {"came_to": UNDECIDED, "measured": f"{answer}; {answer.why}"}
    if known.holds in (None, answer.holds):
        return {"came_to": AS_RECORDED, "measured": ""}
    return {"came_to": WRONG, "measured": f"{case.holds}: {answer}"}
