"""Mutants of a run: every statement must turn when what it reads is spoilt.

A statement that holds for a run whose figures were zeroed, swapped or taken away says nothing of
the run. Here each column that a statement reads is spoilt in every way that its kind allows, one at
a time; a column that the statement does not mind is a survivor, named so that somebody mends it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from labkit.errors import LabError
from labkit.judge.findings import Statement
from labkit.judge.language import Truth, decide, reads
from labkit.runs import VARIANTS, Run

_GROUPS = {"counts": ("operations", "anomalies")}  # what is zero where nothing was done


@dataclass(frozen=True)
class Mutation:
    """What became of the mutants of one column, or table, that a statement reads.

    Attributes
    ----------
    statement
        In words.
    spoilt
        ``table.column``, or what was done to the table.
    planted, turned
        Mutants, and those for which the statement did not hold.
    """

    statement: str
    spoilt: str
    planted: int
    turned: int

    @property
    def survived(self) -> bool:
        """Whether the statement holds for every mutant."""
        return not self.turned

    def __str__(self) -> str:
        return f"{self.statement!r} does not mind {self.spoilt}"


def mutate(run: Run, statements: Sequence[Statement]) -> list[Mutation]:
    """Plant mutants for every statement that holds for a run.

    Parameters
    ----------
    run
        Complete, with its counts.
    statements
        Of its experiment. One that does not hold for the run is passed over.

    Returns
    -------
    list of Mutation
        For each statement one for each column that it reads; one for each table without rows, one
        for each in which nothing was done; and one that says whether any mutant made it fail, and
        not only undecided.
    """
    found = []
    for statement in statements:
        if _decided(statement.holds, run) is not True:
            continue
        answers: list[Truth] = []
        for spoilt, mutants in _mutants(run, statement.holds):
            some = [_decided(statement.holds, mutant) for mutant in mutants]
            turned = sum(answer is not True for answer in some)
            found.append(Mutation(statement.words, spoilt, len(some), turned))
            answers += some
        failed = sum(answer is False for answer in answers)
        found.append(Mutation(statement.words, "any mutant enough to fail", len(answers), failed))
    return found


def _decided(statement: str, run: Run) -> Truth:
    try:
        return decide(statement, run).holds
    except LabError:
        return False


def _mutants(run: Run, statement: str) -> Iterator[tuple[str, list[Run]]]:
    touched = reads(statement, run)
    for name, column in touched:
        if column:
            table = run.table(name)
            yield (
                f"{name}.{column}",
                [
                    _with(run, name, table.assign(**{column: values}))
                    for values in _spoilt(table, column)
                ],
            )
    for name in dict.fromkeys(name for name, _ in touched):
        table = run.table(name)
        yield f"{name} without rows", [_with(run, name, table.iloc[:0])]
        numbers = dict.fromkeys(_counted(name, table, {of for at, of in touched if at == name}), 0)
        if numbers:
            yield f"{name} in which nothing was done", [_with(run, name, table.assign(**numbers))]


def _counted(name: str, table: pd.DataFrame, read: set[str]) -> list[str]:
    """The columns that are zero where nothing was done: of those that are read, the numbers."""
    if name in _GROUPS:
        return list(_GROUPS[name])
    # A filter chooses by number too (a size, a period): those stay.
    return [one for one in sorted(read) if one and pd.api.types.is_numeric_dtype(table[one])]


def _spoilt(table: pd.DataFrame, column: str) -> Iterator[Any]:
    values = table[column]
    if pd.api.types.is_bool_dtype(values):
        yield from (~values, False, True)
    elif pd.api.types.is_numeric_dtype(values):
        yield 0
        yield values.to_numpy()[::-1]
        yield values.max()
        yield values.min()
        yield (values * 1000 + 1).astype(values.dtype)
        yield -values - 1
        if column == "anomalies":
            yield table["operations"]
        if "variant" in table:
            yield _swapped(table, column)
    else:
        words = list(dict.fromkeys(values.astype(str)))
        yield "?"
        yield values.astype(str).map(dict(zip(words, words[1:] + words[:1], strict=True)))


def _swapped(table: pd.DataFrame, column: str) -> np.ndarray[Any, Any]:
    """Each row gets a value of the next variant."""
    of: Mapping[str, Any] = {
        variant: table.loc[table["variant"] == variant, column].to_numpy() for variant in VARIANTS
    }
    values = table[column].to_numpy().copy()
    for variant, other in zip(VARIANTS, (*VARIANTS[1:], VARIANTS[0]), strict=True):
        rows = (table["variant"] == variant).to_numpy()
        if len(of[other]):
            values[rows] = np.resize(of[other], int(rows.sum()))
    return values


def _with(run: Run, name: str, table: pd.DataFrame) -> Run:
    return replace(run, tables={**run.tables, name: table})
