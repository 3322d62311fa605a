"""Measures an experiment here and now: rounds, turns, progress, and more rounds where they decide.

Every case is measured once a round, and all rounds take turns, so that a burst of other load meets
all alike. Where the spread of the rounds leaves a statement undecided, the experiment is measured
again, as long as the profile's budget lasts; then undecided is its result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

import numpy as np
import pandas as pd

from labkit.errors import BadInput
from labkit.judge.findings import UNDECIDED, conclude
from labkit.kernel import probe
from labkit.kernel.provenance import provenance, usage, usage_since
from labkit.lab.experiment import Case, Experiment, Tables, case_table
from labkit.lab.parts import Parts
from labkit.lab.progress import Meter, say
from labkit.runs import Run

MORE_S: Final = {"quick": 20.0, "full": 120.0}
"""Budget of a profile for measuring again what is undecided, seconds."""

MOST_AGAIN: Final = 4
"""So often an experiment is measured again, at the most."""

Thing = TypeVar("Thing")


def missing(experiment: Experiment) -> list[probe.Feature]:
    """The features that this kernel lacks for an experiment; empty when it can run."""
    return [feature for name in experiment.needs if not (feature := probe.probe(name)).works]


def measured(
    experiment: Experiment,
    profile: str = "quick",
    changed: Mapping[str, Any] | None = None,
    *,
    parts: Parts | None = None,
) -> Run:
    """Measure an experiment in this process.

    Parameters
    ----------
    experiment : Experiment
        From the catalogue.
    profile : str
        ``quick`` or ``full``.
    changed : mapping, optional
        Parameters that differ from the profile's.
    parts : Parts, optional
        What is done of this measurement, where it is one in parts. The run's provenance then
        has ``continued``: when it was begun, and how many parts were done by then.

    Returns
    -------
    Run
        Complete, and not saved yet. Its provenance has ``duration_s``, ``meanwhile`` (the load of
        the machine) and ``measured_again``: how often, where statements were undecided.

    Raises
    ------
    BadInput
        Before anything touches the kernel.
    Unavailable
        A feature is missing; the sentence says which and how to get it.
    """
    parameters = experiment.parameters(profile, changed)
    probe.require(*experiment.needs)
    facts, before, begun = provenance(), usage(), time.monotonic()
    if experiment.in_parts:
        parts = Parts() if parts is None else parts
        begun -= parts.spent_s
        if parts.before:
            facts["continued"] = {"begun_at": parts.begun_at, "parts_before": parts.before}
        tables = experiment.measure(**parameters, parts=parts)
    else:
        tables = _tables(experiment, parameters)
    if experiment.cases:
        tables["cases"] = case_table(experiment.cases)
    run = experiment.complete(Run(experiment.id, profile, parameters, facts, tables))
    if not experiment.in_parts:
        run, again = _decided(experiment, run, MORE_S[profile])
        facts["measured_again"] = again
    facts["duration_s"] = round(time.monotonic() - begun, 3)
    facts["meanwhile"] = usage_since(before)
    return run


def in_turns(things: Sequence[Thing], rounds: int, *, seed: int = 0) -> Iterator[tuple[int, Thing]]:
    """Every thing once a round, each round in another order.

    Parameters
    ----------
    things : sequence
        What is compared.
    rounds : int
        Repetitions.
    seed : int
        Of the order.

    Yields
    ------
    tuple of (int, thing)
        The round, from 0 on.
    """
    rng = np.random.default_rng(seed)
    for turn in range(rounds):
        for i in rng.permutation(len(things)):
            yield turn, things[i]


def _tables(experiment: Experiment, parameters: Mapping[str, Any], first: int = 0) -> Tables:
    """What one measurement observed; its rounds follow on so many before them."""
    if not experiment.by_case:
        tables: Tables = experiment.measure(**parameters)
        return tables
    given = {name: value for name, value in parameters.items() if name != "rounds"}
    cases = [case for case in experiment.cases if not case.beside]
    order = {case.id: place for place, case in enumerate(experiment.cases)}
    variants = {case.id: case.variant for case in experiment.cases}
    rows: dict[str, list[pd.DataFrame]] = {}
    with Meter(len(cases) * parameters["rounds"], unit="measurement") as meter:
        for turn, case in in_turns(cases, parameters["rounds"]):
            if experiment.by_turn:
                given["turn"] = first + turn
            observed = experiment.measure(case, **given)
            for row in [observed] if isinstance(observed, Mapping) else observed:
                _keep(rows, turn, case, row, variants, experiment.id)
            meter.step()
    tables = {name: pd.concat(frames, ignore_index=True) for name, frames in rows.items()}
    return {
        name: table.sort_values(
            ["round", "case"],
            key=lambda column: column.map(order) if column.name == "case" else column,
            kind="stable",
            ignore_index=True,
        )
        for name, table in tables.items()
    }


def _keep(
    rows: dict[str, list[pd.DataFrame]],
    turn: int,
    case: Case,
    observed: Mapping[str, Any],
    variants: Mapping[str, str],
    id: str,
) -> None:
    """Put what one measurement observed into the tables it belongs to."""
    named = str(observed.get("case", case.id))
    if named not in variants:
        raise BadInput(f"{id} measured a case {named!r}, which its table of cases does not have.")
    about: dict[str, Any] = {"variant": variants[named], "case": named, "round": turn}
    row = {name: value for name, value in observed.items() if name != "case"}
    for name, value in row.items():
        if isinstance(value, pd.DataFrame):
            rows.setdefault(name, []).append(value.assign(**about))
    plain = {name: value for name, value in row.items() if not isinstance(value, pd.DataFrame)}
    rows.setdefault("rounds", []).append(pd.DataFrame([about | plain]))


def _decided(experiment: Experiment, run: Run, budget_s: float) -> tuple[Run, int]:
    """Measure again while a statement is undecided and the budget lasts; the run, and how often."""
    end, again = time.monotonic() + budget_s, 0
    took_s = 0.0
    while again < MOST_AGAIN and _is_undecided(experiment, run) and _can_grow(experiment, run):
        begun = time.monotonic()
        if begun + took_s > end:
            break
        say(f"{experiment.id} is undecided so far: measuring more rounds")
        first = int(run.tables["rounds"]["round"].max()) + 1
        tables = _joined(run.tables, _tables(experiment, run.parameters, first), first)
        run = experiment.complete(replace(run, tables=tables, derived_tables=frozenset()))
        again, took_s = again + 1, time.monotonic() - begun
    return run, again


def _is_undecided(experiment: Experiment, run: Run) -> bool:
    if not experiment.statements:
        return False
    return conclude(run, experiment.statements, experiment.sentence).state == UNDECIDED


def _can_grow(experiment: Experiment, run: Run) -> bool:
    """Whether more rounds can join: what is counted must follow from tables that have rounds."""
    return experiment.derive is not None and "round" in run.tables.get("rounds", {})


def _joined(tables: Mapping[str, pd.DataFrame], more: Tables, first: int) -> Tables:
    """Tables with more rounds behind those that they have; others as they were."""
    return {
        name: pd.concat(
            [table, more[name].assign(round=more[name]["round"] + first)], ignore_index=True
        )
        if name in more and "round" in table
        else table
        for name, table in tables.items()
    }
