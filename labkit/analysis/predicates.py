"""Statements about a run in a language that can compute and compare, and do nothing else.

``control.anomalies > 0`` or ``answers(map="array").mmap == 0``: what the ledger of claims writes
beside each claim, so that a reader sees in one line what decides. The syntax is Python's, the
meaning is this module's: the parsed text is walked node by node, and a node that has no meaning
here is refused. Nothing is handed to the interpreter.

========================================  =========================================================
``broken``, ``control``, ``fixed``        the counts of a variant; ``broken["case"]`` those of a
                                          case; ``.anomalies``, ``.operations``, ``.rate``,
                                          ``.cost_ns`` (nanoseconds per operation)
``name``, ``name(column=value)``          the rows of a table, of which the named columns have the
                                          given values; ``.column`` is the value that all of them
                                          have in common
``min max sum mean median(rows.column)``  one number for the values of several rows
``rows(name(...))``                       how many rows there are; may be none
``parameters.name``                       a parameter of the run
``chapter_5(...)``                        rows of the article's figures, ``data/reference/*.csv``
``+ - * /  < <= == != >= >  and or not``  as ever, with numbers and words
``percent ms us(number)``                 words for a reader, from a share or from nanoseconds
========================================  =========================================================

What is missing is an error, never a zero: no such case, no row with such values, no value there.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from labkit.analysis.runs import VARIANTS, Count, Run
from labkit.errors import BadInput, LabError

REFERENCE: Final = Path(__file__).resolve().parents[2] / "data" / "reference"
"""The figures that the article published, a table for each place in which it has some."""

Tables = Mapping[str, pd.DataFrame]


class BadPredicate(BadInput):
    """A statement cannot be read, or the run has nothing that it speaks of."""


@dataclass(frozen=True)
class Answer:
    """What a statement comes to for one run.

    Attributes
    ----------
    holds
        Whether the run shows what the statement says.
    figures
        The figures that were compared: what the statement calls them, and their values in words.
    """

    holds: bool
    figures: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "; ".join(f"{name} = {value}" for name, value in self.figures)


@functools.cache
def reference(folder: Path = REFERENCE) -> Tables:
    """Read the article's figures.

    Parameters
    ----------
    folder
        Holds one CSV file for each table.

    Returns
    -------
    mapping
        Data frames by the file's name, with underscores for hyphens: ``chapter_5``.
    """
    return {file.stem.replace("-", "_"): pd.read_csv(file) for file in sorted(folder.glob("*.csv"))}


def decide(statement: str, run: Run | None) -> Answer:
    """Evaluate a statement that is true or false.

    Parameters
    ----------
    statement
        In the language of this module.
    run
        What it speaks of; None where it speaks of the article's figures alone.

    Raises
    ------
    BadPredicate
        When it cannot be read, speaks of what the run does not have, or is no statement.
    """
    reader = _Reader(statement, run)
    value = reader.read()
    if not isinstance(value, bool | np.bool_):
        raise BadPredicate(
            f"{statement!r} is no statement: it comes to {value}, not true or false."
        )
    return Answer(bool(value), tuple(reader.compared.items()))


def figure(expression: str, run: Run | None) -> str:
    """Evaluate an expression and put it into words.

    Parameters
    ----------
    expression
        In the language of this module.
    run
        What it speaks of; None where it speaks of the article's figures alone.

    Raises
    ------
    BadPredicate
        As `decide`.
    """
    return in_words(_one(_Reader(expression, run).read()))


def in_words(value: Any) -> str:
    """A value for a reader: thousands apart, three figures of a fraction."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if not isinstance(value, float | np.floating):
        return str(value)
    number = float(value)
    if number.is_integer() or abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.3g}" if abs(number) >= 0.001 else f"{number:.1e}"


@dataclass(frozen=True)
class _Variant:
    """Counts that may still be narrowed to a case."""

    run: Run
    name: str
    case: str | None = None

    def count(self) -> Count:
        return self.run.count(self.name, self.case)

    def __str__(self) -> str:
        return str(self.count())


@dataclass(frozen=True)
class _Rows:
    """Rows of a table, and what they are called in a message."""

    frame: pd.DataFrame
    name: str


_COMPARE: Final[dict[type[ast.cmpop], Callable[[Any, Any], bool]]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.GtE: operator.ge,
    ast.Gt: operator.gt,
}
_COMPUTE: Final[dict[type[ast.operator], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_REDUCE: Final[dict[str, Callable[[pd.Series[Any]], Any]]] = {
    "min": lambda values: values.min(),
    "max": lambda values: values.max(),
    "sum": lambda values: values.sum(),
    "mean": lambda values: values.mean(),
    "median": lambda values: values.median(),
}
_WORDS: Final[dict[str, Callable[[float], str]]] = {
    "percent": lambda share: f"{100 * share:.3g} %",
    "ms": lambda ns: f"{in_words(round(ns / 1e6, 3))} ms",
    "us": lambda ns: f"{in_words(round(ns / 1e3, 3))} µs",
}
_COUNTED: Final = ("operations", "anomalies", "rate", "cost_ns")


class _Reader:
    """Walks one statement; `compared` collects what it compared with what."""

    def __init__(self, text: str, run: Run | None) -> None:
        self.text, self.run = text, run
        self.compared: dict[str, str] = {}

    def read(self) -> object:
        try:
            tree = ast.parse(self.text.strip(), mode="eval")
        except (SyntaxError, ValueError) as error:
            raise BadPredicate(f"{self.text!r} cannot be read: {error}.") from None
        try:
            return self.value(tree.body)
        except BadPredicate:
            raise
        except (LabError, TypeError, ZeroDivisionError) as error:
            raise BadPredicate(f"{self.text!r} cannot be decided: {error}") from None

    def value(self, node: ast.expr) -> Any:
        name = type(node).__name__
        walk: Callable[[Any], Any] | None = getattr(self, f"_of_{name.lower()}", None)
        if walk is None:
            raise BadPredicate(f"{self.text!r}: {ast.unparse(node)!r} means nothing here ({name}).")
        return walk(node)

    def _of_constant(self, node: ast.Constant) -> Any:
        if not isinstance(node.value, int | float | str):
            raise BadPredicate(f"{self.text!r}: {node.value!r} is neither a number nor a word.")
        return node.value

    def _of_boolop(self, node: ast.BoolOp) -> bool:
        # All parts are evaluated: a reader wants every figure, and a missing one is an error.
        parts = [self._truth(part) for part in node.values]
        return all(parts) if isinstance(node.op, ast.And) else any(parts)

    def _of_unaryop(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not):
            return not self._truth(node.operand)
        if isinstance(node.op, ast.USub):
            return -_one(self.value(node.operand))
        raise BadPredicate(f"{self.text!r}: {ast.unparse(node)!r} means nothing here.")

    def _of_binop(self, node: ast.BinOp) -> Any:
        if type(node.op) not in _COMPUTE:
            raise BadPredicate(f"{self.text!r}: {ast.unparse(node)!r} means nothing here.")
        return _COMPUTE[type(node.op)](_one(self.value(node.left)), _one(self.value(node.right)))

    def _of_compare(self, node: ast.Compare) -> bool:
        sides = [node.left, *node.comparators]
        values = [_one(self.value(side)) for side in sides]
        for side, value in zip(sides, values, strict=True):
            if not all(isinstance(part, _PLAIN) for part in ast.walk(side)):
                self.compared[ast.unparse(side)] = self._told(side, value)
        verdicts = []
        for sign, left, right in zip(node.ops, values, values[1:], strict=False):
            if type(sign) not in _COMPARE:
                raise BadPredicate(f"{self.text!r}: {ast.unparse(node)!r} means nothing here.")
            verdicts.append(bool(_COMPARE[type(sign)](left, right)))
        return all(verdicts)

    def _told(self, side: ast.expr, value: object) -> str:
        """Anomalies are told with the operations among which they were."""
        if isinstance(side, ast.Attribute) and side.attr == "anomalies":
            counted = self.value(side.value)
            if isinstance(counted, _Variant):
                return str(counted)
        return in_words(value)

    def _of_name(self, node: ast.Name) -> Any:
        if node.id in VARIANTS or node.id == "parameters":
            run = self._run(node.id)
            return run.parameters if node.id == "parameters" else _Variant(run, node.id)
        if node.id in reference():
            return _Rows(reference()[node.id], node.id)
        return _Rows(self._run(node.id).table(node.id), node.id)

    def _run(self, name: str) -> Run:
        if self.run is None:
            raise BadPredicate(f"{self.text!r} speaks of {name}, and has no run to look at.")
        return self.run

    def _of_subscript(self, node: ast.Subscript) -> Any:
        subject, key = self.value(node.value), self.value(node.slice)
        if not isinstance(subject, _Variant) or not isinstance(key, str):
            raise BadPredicate(f'{self.text!r}: a case is named as in broken["case"].')
        return _Variant(subject.run, subject.name, key)

    def _of_attribute(self, node: ast.Attribute) -> Any:
        subject, name = self.value(node.value), node.attr
        if isinstance(subject, _Variant) and name in _COUNTED:
            return getattr(subject.count(), name)
        if isinstance(subject, dict) and name in subject:
            return subject[name]
        if isinstance(subject, _Rows) and name in subject.frame.columns:
            if subject.frame.empty:
                raise BadPredicate(f"{self.text!r}: no row of {subject.name} is so.")
            return subject.frame[name]
        raise BadPredicate(f"{self.text!r}: there is no {ast.unparse(node)!r}.")

    def _of_call(self, node: ast.Call) -> Any:
        if not isinstance(node.func, ast.Name):
            raise BadPredicate(f"{self.text!r}: {ast.unparse(node)!r} means nothing here.")
        function, known = node.func.id, {**_REDUCE, **_WORDS}
        if function in known or function == "rows":
            if len(node.args) != 1 or node.keywords:
                raise BadPredicate(f"{self.text!r}: {function} takes one value.")
            subject = self.value(node.args[0])
            if function == "rows":
                return len(_as(_Rows, subject, self.text).frame)
            if function in _REDUCE:
                values = pd.Series(subject) if isinstance(subject, list) else subject
                return _known(_REDUCE[function](_as(pd.Series, values, self.text)), self.text)
            return _WORDS[function](float(_one(subject)))
        table = _as(_Rows, self._of_name(node.func), self.text)
        if node.args:
            raise BadPredicate(f"{self.text!r}: rows are chosen by {function}(column=value).")
        frame = table.frame
        for wanted in node.keywords:
            if wanted.arg not in frame.columns:
                raise BadPredicate(f"{self.text!r}: {function} has no column {wanted.arg!r}.")
            frame = frame[frame[wanted.arg] == _one(self.value(wanted.value))]
        return _Rows(frame, ast.unparse(node))

    def _truth(self, node: ast.expr) -> bool:
        value = self.value(node)
        if not isinstance(value, bool | np.bool_):
            raise BadPredicate(f"{self.text!r}: {ast.unparse(node)!r} is neither true nor false.")
        return bool(value)


# A side of a comparison that is made of these alone is no figure of the run.
_PLAIN: Final = (ast.Constant, ast.UnaryOp, ast.USub, ast.BinOp, ast.operator)


def _as(kind: type[Any], value: Any, text: str) -> Any:
    if not isinstance(value, kind):
        what = "a table" if kind is _Rows else "a column of a table"
        raise BadPredicate(f"{text!r} needs {what}, where it has {value}.")
    return value


def _one(value: Any) -> Any:
    """The one value of a column; anything else is one already."""
    if isinstance(value, _Rows):
        raise BadPredicate(f"{value.name} is a table; name one of its columns.")
    if not isinstance(value, pd.Series):
        return _known(value, str(value))
    distinct = value.unique()
    if len(distinct) != 1:
        raise BadPredicate(
            f"The rows have {len(distinct)} values of {value.name}; "
            "use min, max, sum, mean or median."
        )
    return _known(distinct[0], str(value.name))


def _known(value: Any, name: str) -> Any:
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        raise BadPredicate(f"{name} was not measured.")
    return value
