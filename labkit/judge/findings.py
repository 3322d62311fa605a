"""Findings: what a saved run shows, as statements that hold, fail, or are undecided."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from labkit.errors import BadInput, LabError
from labkit.judge.language import BadPredicate, Truth, decide, each_case, figure
from labkit.judge.plainly import plainly
from labkit.runs import Run

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
"""What a statement, and a finding, comes to."""

_FIGURE: Final = re.compile(r"\{([^{}]+)\}")


class FindingFailed(LabError, AssertionError):
    """A run does not show what its experiment expects of a kernel."""


@dataclass(frozen=True)
class Statement:
    """What an experiment states of its runs.

    Attributes
    ----------
    words
        What is expected, as a sentence's worth of words: ``"the control loses nothing"``.
    holds
        The same in the language of :mod:`labkit.judge.language`.
    """

    words: str
    holds: str


@dataclass(frozen=True)
class Check:
    """One statement, decided for one run.

    Attributes
    ----------
    statement
        In words.
    holds
        Whether the run shows it; None where it is undecided.
    measured
        The figures that decide: ``"0 of 800,000"``.
    predicate
        The statement in the language of :mod:`labkit.judge.language`.
    """

    statement: str
    holds: Truth
    measured: str
    predicate: str = ""

    @property
    def state(self) -> str:
        """`HOLDS`, `FAILS` or `UNDECIDED`."""
        return UNDECIDED if self.holds is None else HOLDS if self.holds else FAILS

    @property
    def shown(self) -> str:
        """The state as it is shown."""
        return shown(self.state)

    def __str__(self) -> str:
        return f"[{self.shown}] {self.statement}: {self.measured}"


@dataclass(frozen=True)
class Finding:
    """What one run shows.

    Attributes
    ----------
    experiment
        Id of the experiment.
    sentence
        The result with its figures, for a reader who reads nothing else.
    checks
        The statements that it rests on; at least one.
    """

    experiment: str
    sentence: str
    checks: tuple[Check, ...]

    def __post_init__(self) -> None:
        if not self.checks:
            raise BadInput(f"The finding of {self.experiment} checks nothing; add a check to it.")

    @property
    def state(self) -> str:
        """`FAILS` where a check does, else `UNDECIDED` where one is, else `HOLDS`."""
        states = {check.state for check in self.checks}
        return next(state for state in (FAILS, UNDECIDED, HOLDS) if state in states)

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return self.state == HOLDS

    def require(self) -> Finding:
        """Return the finding itself, or raise FindingFailed that names the checks that fail."""
        failed = [
            f"{check.statement} ({check.measured})" for check in self.checks if check.state == FAILS
        ]
        if failed:
            raise FindingFailed(f"{self.experiment} does not hold: {'; '.join(failed)}.")
        return self

    @property
    def shown(self) -> str:
        """The state as it is shown."""
        return shown(self.state)

    def __str__(self) -> str:
        lines = [f"{self.experiment} {self.shown}: {self.sentence}"]
        return "\n".join(lines + [f"  {check}" for check in self.checks])


def shown(state: str) -> str:
    """The word for a state, as it is shown: a failure is not to be overlooked."""
    return state.upper() if state == FAILS else state


def conclude(run: Run, statements: Sequence[Statement], sentence: str) -> Finding:
    """Decide every statement of an experiment for one run.

    Parameters
    ----------
    run
        With its counts.
    statements
        Of its experiment. One quantifier over several cases becomes a check for each.
    sentence
        The result, with expressions of the language in braces: ``"{broken} were lost"``.

    Returns
    -------
    Finding
        A statement that speaks of what the run does not have fails, with the reason.
    """
    checks = [
        _check(f"{one.words}: {label}" if label else one.words, holds, run)
        for one in statements
        for holds, label in _by_case(one, run)
    ]
    return Finding(run.experiment, fill(sentence, run), tuple(checks))


def fill(text: str, run: Run) -> str:
    """Fill the figures of a run into prose; what it does not have is told as not measured."""

    def told(found: re.Match[str]) -> str:
        try:
            return figure(found[1], run)
        except BadPredicate:
            return "(not measured)"

    return _FIGURE.sub(told, text)


def _by_case(statement: Statement, run: Run) -> list[tuple[str, str]]:
    try:
        return each_case(statement.holds, run)
    except LabError:
        return [(statement.holds, "")]  # which cannot be decided either, and is told so


def _check(words: str, holds: str, run: Run) -> Check:
    try:
        answer = decide(holds, run)
    except BadPredicate as error:
        return Check(words, False, str(error), holds)
    measured = answer.figures[0][1] if len(answer.figures) == 1 else plainly(answer.figures, run)
    return Check(words, answer.holds, "; ".join(filter(None, [measured, answer.why])), holds)
