"""Statements about a run, in a language that can count, compute and compare, and nothing else.

``none(control)`` or ``ratio(rounds(case="lock").ns, rounds(case="own").ns) > 1``: what an
experiment states of its runs and what the ledger writes beside each claim, so that a reader sees
in one line what decides. The syntax is Python's, the meaning is this module's: the parsed text is
read node by node, and a node that has no meaning here is refused. Nothing is handed to the
interpreter.

A statement *holds*, *fails*, or is *undecided*: the spread of this run, or the number of its
operations, does not allow an answer. `and`, `or` and `not` go on with these three as Kleene's
logic does.

============================================  =====================================================
``broken``, ``control``, ``fixed``            the cases of a variant; ``broken["id"]``,
                                              ``broken["id", "id"]`` some of them;
                                              ``broken(size=8)`` those with that setting.
                                              ``.anomalies``, ``.operations``, ``.rate``,
                                              ``.cost_ns`` add them up
``none(cases)``, ``none(cases, like=...)``    no anomaly, in enough operations of each case
``some(cases)``, ``some(cases, like=...)``    an anomaly at least in each case
``all(cases)``                                every operation of each case is an anomaly
``none(rows.a > 0)``, ``some``, ``all``       of the rows of a table, of which there must be some
``name``, ``name(column=value, a > b)``       the rows of a table that are so; ``.column`` is the
                                              value that all of them have in common
``min max sum mean median first last``        one number for the values of several rows
``rows(name(...))``                           how many rows there are; may be none
``share(rows.a > 0)``                         of rows that are so
``ratio(rows.a, rows.b)``, ``spread(rows.a)``  an interval for the median over repetitions, of the
                                              ratio in each or of the value: comparing it with a
                                              number is undecided where the interval holds it
``between(a, b)``                             an interval from one value to the other, of which
                                              the truth is one
``parameters.name``                           a parameter of the run
``machine.name``                              a fact of its machine: ``cpus``, ``emulated``,
                                              ``architecture``
``chapter_5(...)``                            rows of the article's figures, of its chapter 5
``+ - * /  < <= == != >= >  and or not``      as ever, with numbers, words and columns
``percent ms us(number)``                     words for a reader, of a share or of nanoseconds
============================================  =====================================================

``like`` is the rate at which the anomaly would show if it were there: a number, or cases that have
it; of `none` by default that of all broken cases. Where so many operations would not have shown it
for certain (a chance above e^-10 of none, that of ten that were expected), `none` is undecided,
and so is `some` that saw none. Without ``like``, `some` that saw none fails.

What is missing is an error, never a zero: no such case, no row with such values, no value there, no
operation. None of it holds.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from labkit.errors import BadInput, LabError
from labkit.judge.statistics import Interval, sign_interval
from labkit.runs import VARIANTS, Count, Run

REFERENCE: Final = Path(__file__).resolve().parents[2] / "data" / "reference"
"""The figures that the article published, a table for each place in which it has some."""

EXPECTED: Final = 10.0
"""So many anomalies must have been expected before their absence decides."""

Tables = Mapping[str, pd.DataFrame]
Truth = bool | None
"""Holds, fails, or undecided (None)."""


class BadPredicate(BadInput):
    """A statement cannot be read, or the run has nothing that it speaks of."""


@dataclass(frozen=True)
class Answer:
    """What a statement comes to for one run.

    Attributes
    ----------
    holds
        Whether the run shows what the statement says; None where it is undecided.
    figures
        The figures that were compared: what the statement calls them, and their values in words.
    why
        Why it is undecided; empty where it is not.
    """

    holds: Truth
    figures: tuple[tuple[str, str], ...]
    why: str = ""

    def __str__(self) -> str:
        return "; ".join(f"{name} = {value}" for name, value in self.figures)


@functools.cache
def reference(folder: Path = REFERENCE) -> Tables:
    """Read the article's figures.

    By the name of the CSV file in the folder, with underscores for hyphens: ``chapter_5``.
    """
    return {file.stem.replace("-", "_"): pd.read_csv(file) for file in sorted(folder.glob("*.csv"))}


def decide(statement: str, run: Run | None) -> Answer:
    """Evaluate a statement.

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
    if not _is_truth(value):
        raise BadPredicate(
            f"{statement!r} is no statement: it comes to {value}, not true or false."
        )
    holds = None if value is None else bool(value)
    return Answer(holds, tuple(reader.compared.items()), "" if holds is not None else reader.why)


def figure(expression: str, run: Run | None) -> str:
    """Evaluate an expression and put it into words.

    The arguments and what it raises are those of `decide`.
    """
    return in_words(_one(_Reader(expression, run).read()))


def reads(statement: str, run: Run | None) -> tuple[tuple[str, str], ...]:
    """The tables and columns that a statement reads of a run, for those who plant mutants.

    Each once, in the order of reading; the arguments are those of `decide`.
    """
    reader = _Reader(statement, run)
    reader.read()
    return tuple(reader.touched)


def each_case(statement: str, run: Run) -> list[tuple[str, str]]:
    """A quantified statement about several cases, as one about each.

    The statement about one case, and the case's label; the statement itself, with an empty label,
    where it is not one quantifier over more than one case.
    """
    reader = _Reader(statement, run)
    tree = reader.parsed()
    if not (isinstance(tree, ast.Call) and _called(tree) in _QUANTIFIERS and len(tree.args) == 1):
        return [(statement, "")]
    subject = reader._rowwise(tree.args[0])
    if isinstance(subject, _Cases) and len(subject.ids) > 1:
        rest = "".join(f", {word.arg}={ast.unparse(word.value)}" for word in tree.keywords)
        return [
            (f"{_called(tree)}({subject.variant}[{id!r}]{rest})", run.label(id))
            for id in subject.ids
        ]
    return [(statement, "")]


def in_words(value: Any) -> str:
    """A value for a reader: thousands apart, three figures of a fraction."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if isinstance(value, Interval):
        if math.isnan(value.low):
            return f"{in_words(value.estimate)} (too few repetitions for an interval)"
        return f"{in_words(value.estimate)} [{in_words(value.low)} to {in_words(value.high)}]"
    if not isinstance(value, float | np.floating):
        return str(value)
    number = float(value)
    if math.isinf(number) or math.isnan(number):
        return str(number)
    if number.is_integer() or abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.3g}" if abs(number) >= 0.001 else f"{number:.1e}"


@dataclass(frozen=True)
class _Cases:
    """Cases of one variant."""

    run: Run
    variant: str
    ids: tuple[str, ...]

    def count(self) -> Count:
        """All of them added up."""
        return self.run.count(self.variant, self.ids)

    def each(self) -> Iterator[tuple[str, Count]]:
        for id in self.ids:
            yield id, self.run.count(self.variant, (id,))

    def __str__(self) -> str:
        return str(self.count())


@dataclass(frozen=True)
class _Rows:
    """Rows of a table, and what they are called in a message."""

    frame: pd.DataFrame
    table: str
    name: str


@dataclass(frozen=True)
class _Column:
    """Values of some rows, with the repetition that each of them is from, if they have one."""

    values: NDArray[Any]
    rounds: NDArray[Any] | None
    name: str

    def with_values(self, values: NDArray[Any], name: str) -> _Column:
        return _Column(values, self.rounds, name)


_COMPARE: Final[dict[type[ast.cmpop], Callable[[Any, Any], Any]]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.GtE: operator.ge,
    ast.Gt: operator.gt,
}
_SWAPPED: Final = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
_COMPUTE: Final[dict[type[ast.operator], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_REDUCE: Final[dict[str, Callable[[NDArray[Any]], Any]]] = {
    "min": lambda values: values.min(),
    "max": lambda values: values.max(),
    "sum": lambda values: values.sum(),
    "mean": lambda values: values.mean(),
    "median": lambda values: np.median(values),
    "first": lambda values: values[0],
    "last": lambda values: values[-1],
}
_WORDS: Final[dict[str, Callable[[float], str]]] = {
    "percent": lambda share: f"{100 * share:.3g} %",
    "ms": lambda ns: f"{in_words(round(ns / 1e6, 3))} ms",
    "us": lambda ns: f"{in_words(round(ns / 1e3, 3))} µs",
}
_QUANTIFIERS: Final = ("none", "some", "all")
_COUNTED: Final = ("operations", "anomalies", "rate", "cost_ns")
_OF_COUNTS: Final = {
    "rate": ("anomalies", "operations"),
    "cost_ns": ("cost_ns", "operations"),
    "operations": ("operations",),
    "anomalies": ("anomalies",),
}


@dataclass
class _Reader:
    """Reads one statement; `compared` collects what it compared with what."""

    text: str
    run: Run | None
    compared: dict[str, str] = field(default_factory=dict)
    touched: dict[tuple[str, str], None] = field(default_factory=dict)
    why: str = ""
    _columns: list[_Rows] = field(default_factory=list)  # whose columns a bare name may mean
    _by_row: bool = False  # comparisons answer for each row

    def parsed(self) -> ast.expr:
        try:
            return ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError) as error:
            raise BadPredicate(f"{self.text!r} cannot be read: {error}.") from None

    def read(self) -> Any:
        tree = self.parsed()
        try:
            return self.value(tree)
        except BadPredicate:
            raise
        except (LabError, TypeError, ZeroDivisionError) as error:
            raise BadPredicate(f"{self.text!r} cannot be decided: {error}") from None

    def value(self, node: ast.expr) -> Any:
        name = type(node).__name__
        read: Callable[[Any], Any] | None = getattr(self, f"_of_{name.lower()}", None)
        if read is None:
            raise BadPredicate(f"{self.text!r}: {ast.unparse(node)!r} means nothing here ({name}).")
        return read(node)

    # -- logic -----------------------------------------------------------------------------

    def _of_constant(self, node: ast.Constant) -> Any:
        if not isinstance(node.value, int | float | str):
            raise BadPredicate(f"{self.text!r}: {node.value!r} is neither a number nor a word.")
        return node.value

    def _of_tuple(self, node: ast.Tuple) -> Any:
        return tuple(self.value(part) for part in node.elts)

    def _of_boolop(self, node: ast.BoolOp) -> Any:
        # All parts are evaluated: a reader wants every figure, and a missing one is an error.
        parts = [self._truth(part) for part in node.values]
        conjunction = isinstance(node.op, ast.And)
        if any(isinstance(part, _Column) for part in parts):
            merge = np.logical_and if conjunction else np.logical_or
            return functools.reduce(lambda a, b: _broadcast(merge, a, b, self.text), parts)
        if (not conjunction) in parts:
            return not conjunction
        return None if None in parts else conjunction

    def _of_unaryop(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not):
            truth = self._truth(node.operand)
            if isinstance(truth, _Column):
                return truth.with_values(~truth.values.astype(bool), f"not {truth.name}")
            return None if truth is None else not truth
        if isinstance(node.op, ast.USub):
            return _broadcast(lambda a, b: a - b, 0, self._number(node.operand), self.text)
        raise BadPredicate(f"{self.text!r}: {ast.unparse(node)!r} means nothing here.")

    def _of_binop(self, node: ast.BinOp) -> Any:
        if type(node.op) not in _COMPUTE:
            raise BadPredicate(f"{self.text!r}: {ast.unparse(node)!r} means nothing here.")
        left, right = self._number(node.left), self._number(node.right)
        return _broadcast(_COMPUTE[type(node.op)], left, right, self.text)

    def _number(self, node: ast.expr) -> Any:
        value = self.value(node)
        if isinstance(value, Interval):
            raise BadPredicate(f"{self.text!r}: an interval is compared, not computed with.")
        return value if isinstance(value, _Column) else _one(value)

    def _of_compare(self, node: ast.Compare) -> Any:
        sides = [node.left, *node.comparators]
        values = [self.value(side) for side in sides]
        if self._by_row and any(isinstance(value, _Column) for value in values):
            values = [value if isinstance(value, _Column) else _one(value) for value in values]
        else:
            values = [value if isinstance(value, Interval) else _one(value) for value in values]
            for side, value in zip(sides, values, strict=True):
                if not all(isinstance(part, _PLAIN) for part in ast.walk(side)):
                    self.compared[ast.unparse(side)] = self._told(side, value)
        answers = [
            self._compared(sign, left, right, node)
            for sign, left, right in zip(node.ops, values, values[1:], strict=False)
        ]
        if any(isinstance(one, _Column) for one in answers):
            return functools.reduce(
                lambda a, b: _broadcast(np.logical_and, a, b, self.text), answers
            )
        if False in answers:
            return False
        return None if None in answers else True

    def _compared(self, sign: ast.cmpop, left: Any, right: Any, node: ast.Compare) -> Any:
        if type(sign) not in _COMPARE:
            raise BadPredicate(f"{self.text!r}: {ast.unparse(node)!r} means nothing here.")
        if isinstance(left, _Column) or isinstance(right, _Column):
            return _broadcast(_COMPARE[type(sign)], left, right, self.text)
        if not isinstance(left, Interval) and not isinstance(right, Interval):
            return bool(_COMPARE[type(sign)](left, right))
        if isinstance(right, Interval):
            left, right, kind = right, left, _SWAPPED.get(type(sign))
        else:
            kind = type(sign) if type(sign) in _SWAPPED else None
        if kind is None or isinstance(right, Interval):
            raise BadPredicate(f"{self.text!r}: an interval is more or less than a number.")
        compare = _COMPARE[kind]
        at_ends = {bool(compare(left.low, right)), bool(compare(left.high, right))}
        if math.isnan(left.low) or len(at_ends) == 2:
            self._undecided(f"{in_words(left)} does not decide against {in_words(right)}")
            return None
        return at_ends.pop()

    def _undecided(self, why: str) -> None:
        self.why = self.why or why

    def _told(self, side: ast.expr, value: object) -> str:
        """Anomalies are told with the operations among which they were."""
        if isinstance(side, ast.Attribute) and side.attr == "anomalies":
            counted = self.value(side.value)
            if isinstance(counted, _Cases):
                return str(counted)
        return in_words(value)

    def _truth(self, node: ast.expr) -> Any:
        value = self.value(node)
        if not _is_truth(value) and not (self._by_row and isinstance(value, _Column)):
            raise BadPredicate(f"{self.text!r}: {ast.unparse(node)!r} is neither true nor false.")
        return value

    # -- what there is ---------------------------------------------------------------------

    def _of_name(self, node: ast.Name) -> Any:
        for rows in reversed(self._columns):
            if node.id in rows.frame.columns:
                return self._column(rows, node.id)
        if node.id in VARIANTS:
            run = self._run(node.id)
            return _Cases(run, node.id, tuple(run.cases(node.id)))
        if node.id == "parameters":
            return self._run(node.id).parameters
        if node.id == "machine":
            run = self._run(node.id)
            told = {k: v for k, v in run.provenance.items() if k == "architecture"}
            return {"cpus": run.cpus, "emulated": run.emulated, "kernel": run.kernel, **told}
        if node.id in reference():
            return _Rows(reference()[node.id], node.id, node.id)
        return _Rows(self._run(node.id).table(node.id), node.id, node.id)

    def _run(self, name: str) -> Run:
        if self.run is None:
            raise BadPredicate(f"{self.text!r} speaks of {name}, and has no run to look at.")
        return self.run

    def _of_subscript(self, node: ast.Subscript) -> Any:
        subject, key = self.value(node.value), self.value(node.slice)
        ids = key if isinstance(key, tuple) else (key,)
        if not isinstance(subject, _Cases) or not all(isinstance(id, str) for id in ids):
            raise BadPredicate(f'{self.text!r}: a case is named as in broken["case"].')
        if unknown := [id for id in ids if id not in subject.ids]:
            raise BadPredicate(
                f"{self.text!r}: {subject.variant} has no case {unknown[0]!r}; it has "
                f"{', '.join(map(repr, subject.ids)) or 'none'}."
            )
        return _Cases(subject.run, subject.variant, ids)

    def _of_attribute(self, node: ast.Attribute) -> Any:
        subject, name = self.value(node.value), node.attr
        if isinstance(subject, _Cases) and name in _COUNTED:
            self._touch("counts", *_OF_COUNTS[name])
            return getattr(subject.count(), name)
        if isinstance(subject, dict) and name in subject:
            return subject[name]
        if isinstance(subject, _Rows) and name in subject.frame.columns:
            return self._column(subject, name)
        raise BadPredicate(f"{self.text!r}: there is no {ast.unparse(node)!r}.")

    def _column(self, rows: _Rows, name: str) -> _Column:
        if rows.frame.empty:
            raise BadPredicate(f"{self.text!r}: no row of {rows.name} is so.")
        self._touch(rows.table, name)
        rounds = rows.frame["round"].to_numpy() if "round" in rows.frame.columns else None
        return _Column(rows.frame[name].to_numpy(), rounds, name)

    def _touch(self, table: str, *columns: str) -> None:
        if table not in reference():
            self.touched.update(dict.fromkeys((table, column) for column in columns))

    # -- calls -----------------------------------------------------------------------------

    def _of_call(self, node: ast.Call) -> Any:
        if not isinstance(node.func, ast.Name):
            raise BadPredicate(f"{self.text!r}: {ast.unparse(node)!r} means nothing here.")
        function = node.func.id
        if function in _QUANTIFIERS:
            return self._quantified(function, node)
        if function in ("ratio", "spread"):
            return self._interval(function, node)
        if function == "between":
            return self._between(node)
        if function in _REDUCE or function in _WORDS or function in ("rows", "share"):
            return self._reduced(function, node)
        subject = self._of_name(node.func)
        if isinstance(subject, _Cases):
            return self._chosen_cases(subject, node)
        return self._chosen_rows(_as(_Rows, subject, self.text), node)

    def _reduced(self, function: str, node: ast.Call) -> Any:
        if len(node.args) != 1 or node.keywords:
            raise BadPredicate(f"{self.text!r}: {function} takes one value.")
        subject = self._rowwise(node.args[0]) if function == "share" else self.value(node.args[0])
        if function == "rows":
            rows = _as(_Rows, subject, self.text)
            self._touch(rows.table, "")
            return len(rows.frame)
        if function == "share":
            return float(_as(_Column, subject, self.text).values.astype(bool).mean())
        if function in _WORDS:
            return _WORDS[function](float(_one(subject)))
        if isinstance(subject, list):
            subject = _Column(np.array(subject), None, ast.unparse(node.args[0]))
        values = _as(_Column, subject, self.text).values
        return _known(_plain(_REDUCE[function](values)), self.text)

    def _rowwise(self, node: ast.expr) -> Any:
        before, self._by_row = self._by_row, True
        try:
            return self.value(node)
        finally:
            self._by_row = before

    def _chosen_cases(self, subject: _Cases, node: ast.Call) -> _Cases:
        if node.args:
            raise BadPredicate(
                f"{self.text!r}: cases are chosen by {subject.variant}(setting=...)."
            )
        table = subject.run.case_table
        rows = table[table["variant"] == subject.variant]
        for wanted in node.keywords:
            rows = self._equal(rows, wanted, subject.variant)
        ids = tuple(id for id in subject.ids if id in set(rows["case"]))
        if not ids:
            raise BadPredicate(f"{self.text!r}: no case of {subject.variant} is so.")
        return _Cases(subject.run, subject.variant, ids)

    def _chosen_rows(self, subject: _Rows, node: ast.Call) -> _Rows:
        frame = subject.frame
        for condition in node.args:
            self._columns.append(_Rows(frame, subject.table, subject.name))
            try:
                kept = self._rowwise(condition) if len(frame) else None
            finally:
                self._columns.pop()
            if kept is not None:
                frame = frame[_as(_Column, kept, self.text).values.astype(bool)]
        for wanted in node.keywords:
            self._touch(subject.table, str(wanted.arg))
            frame = self._equal(frame, wanted, subject.name)
        return _Rows(frame, subject.table, ast.unparse(node))

    def _equal(self, frame: pd.DataFrame, wanted: ast.keyword, name: str) -> pd.DataFrame:
        if wanted.arg not in frame.columns:
            raise BadPredicate(f"{self.text!r}: {name} has no column {wanted.arg!r}.")
        value = self.value(wanted.value)
        values = value if isinstance(value, tuple) else (_one(value),)
        kept: pd.DataFrame = frame[frame[wanted.arg].isin(values)]
        return kept

    def _interval(self, function: str, node: ast.Call) -> Interval:
        wanted = 2 if function == "ratio" else 1
        if len(node.args) != wanted or node.keywords:
            raise BadPredicate(f"{self.text!r}: {function} takes {wanted} columns.")
        columns = [self._repetitions(one) for one in node.args]
        values = [_by_repetition(one) for one in columns]
        if wanted == 2:
            if len(values[0]) != len(values[1]):
                lengths = f"{len(values[0])} and {len(values[1])}"
                raise BadPredicate(f"{self.text!r}: {lengths} repetitions are no pairs.")
            with np.errstate(divide="ignore", invalid="ignore"):
                pairs = values[0] / values[1]
            # Nothing on either side says nothing about the ratio: no pair.
            values = [pairs[~np.isnan(pairs)]]
        if not len(values[0]):
            raise BadPredicate(f"{self.text!r}: no repetition was measured.")
        return sign_interval(values[0])

    def _between(self, node: ast.Call) -> Interval:
        if len(node.args) != 2 or node.keywords:
            raise BadPredicate(f"{self.text!r}: between takes 2 values.")
        ends = [float(_one(self._number(one))) for one in node.args]
        return Interval(ends[1], min(ends), max(ends))

    def _repetitions(self, node: ast.expr) -> _Column:
        value = self._number(node)
        if isinstance(value, int | float):  # of a single row: one repetition, too few to decide
            return _Column(np.array([value]), None, ast.unparse(node))
        column: _Column = _as(_Column, value, self.text)
        return column

    # -- quantifiers -----------------------------------------------------------------------

    def _quantified(self, function: str, node: ast.Call) -> Truth:
        if len(node.args) != 1 or any(word.arg != "like" for word in node.keywords):
            raise BadPredicate(f"{self.text!r}: {function} takes cases or rows, and like=.")
        subject = self._rowwise(node.args[0])
        if isinstance(subject, _Column):
            return self._of_rows(function, subject, node)
        cases = _as(_Cases, subject, self.text)
        self._touch("counts", "anomalies", "operations")
        like = self._like(function, cases, node.keywords)
        answers = [
            self._of_case(function, cases.run.label(id), count, like) for id, count in cases.each()
        ]
        self.compared[ast.unparse(node.args[0])] = str(cases)
        if False in answers:
            return False
        return None if None in answers else True

    def _of_rows(self, function: str, subject: _Column, node: ast.Call) -> bool:
        hits, total = int(subject.values.astype(bool).sum()), len(subject.values)
        self.compared[ast.unparse(node.args[0])] = f"{hits:,} of {total:,} rows"
        return {"none": hits == 0, "some": hits > 0, "all": hits == total}[function]

    def _like(self, function: str, cases: _Cases, keywords: Sequence[ast.keyword]) -> float | None:
        """The rate at which the anomaly would show; None where nothing tells."""
        if keywords:
            given = self.value(keywords[0].value)
            rate = given.count().rate if isinstance(given, _Cases) else float(_one(given))
            if not 0 <= rate <= 1:
                raise BadPredicate(f"{self.text!r}: a rate lies from 0 to 1, not at {rate}.")
            return rate
        if function != "none" or cases.variant == "broken":
            return None
        return cases.run.count("broken").rate

    def _of_case(self, function: str, label: str, count: Count, like: float | None) -> Truth:
        if not count.operations:
            raise BadPredicate(f"{self.text!r}: {label} did no operation, which shows nothing.")
        if function == "all":
            return count.anomalies == count.operations
        if count.anomalies:
            return function == "some"
        if like is None:
            return function == "none"
        if not _would_have_shown(like, count.operations):
            self._undecided(
                f"{label}: none seen in {count.operations:,} operations, too few to tell at a rate "
                f"of {in_words(like)}"
            )
            return None
        return function == "none"


# A side of a comparison that is made of these alone is no figure of the run.
_PLAIN: Final = (ast.Constant, ast.UnaryOp, ast.USub, ast.BinOp, ast.operator)


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _would_have_shown(rate: float, operations: int) -> bool:
    """Whether so many operations show an anomaly of that rate but for a chance of e^-10.

    For a small rate that is `EXPECTED` anomalies; one that shows in every operation needs one.
    """
    if rate >= 1:
        return True
    return -operations * math.log1p(-rate) >= EXPECTED


def _is_truth(value: Any) -> bool:
    return value is None or isinstance(value, bool | np.bool_)


def _by_repetition(column: _Column) -> NDArray[np.float64]:
    """One value for each repetition: the median where it has several."""
    values = column.values.astype(np.float64)
    if column.rounds is None:
        return values
    return np.array([np.median(values[column.rounds == one]) for one in np.unique(column.rounds)])


def _broadcast(function: Callable[[Any, Any], Any], left: Any, right: Any, text: str) -> Any:
    """Apply a function to numbers, or row by row where one side or both are columns."""
    columns = [one for one in (left, right) if isinstance(one, _Column)]
    if len({len(one.values) for one in columns}) > 1:
        # What all rows of one side have in common stands beside each row of the other.
        left, right = (_common(one) for one in (left, right))
        columns = [one for one in (left, right) if isinstance(one, _Column)]
    if len({len(one.values) for one in columns}) > 1:
        lengths = " and ".join(str(len(one.values)) for one in columns)
        raise BadPredicate(f"{text!r}: columns of {lengths} rows are no pairs.")
    sides = [one.values if isinstance(one, _Column) else one for one in (left, right)]
    if not columns:
        return function(*sides)
    with np.errstate(divide="ignore", invalid="ignore"):
        return columns[0].with_values(function(*sides), columns[0].name)


def _common(value: Any) -> Any:
    """The one value of a column that has no other; else the column."""
    if isinstance(value, _Column) and len(pd.unique(pd.Series(value.values))) == 1:
        return _one(value)
    return value


def _as(kind: type[Any], value: Any, text: str) -> Any:
    if not isinstance(value, kind):
        what = {_Rows: "a table", _Cases: "cases"}.get(kind, "a column of a table")
        raise BadPredicate(f"{text!r} needs {what}, where it has {value}.")
    return value


def _one(value: Any) -> Any:
    """The one value of a column; anything else is one already."""
    if isinstance(value, _Rows):
        raise BadPredicate(f"{value.name} is a table; name one of its columns.")
    if not isinstance(value, _Column):
        return _known(value, str(value))
    distinct = pd.unique(pd.Series(value.values))
    if len(distinct) != 1:
        raise BadPredicate(
            f"The rows have {len(distinct)} values of {value.name}; "
            "use min, max, sum, mean or median."
        )
    return _known(_plain(distinct[0]), value.name)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _known(value: Any, name: str) -> Any:
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        raise BadPredicate(f"{name} was not measured.")
    return value
