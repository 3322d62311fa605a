"""Findings: what a saved run shows, as statements that hold or fail.

Each family of experiments has a module in this package, with one function per experiment::

    @judges("transient-null")
    def transient_null(run: Run) -> Finding: ...

`judge` imports the families and calls the one function that judges the run's experiment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from labkit.analysis.registry import Registry
from labkit.analysis.runs import Run
from labkit.errors import BadInput, LabError

Judge = Callable[[Run], "Finding"]

_judges: Registry[Judge] = Registry(__name__, "finding")


class FindingFailed(LabError, AssertionError):
    """A run does not show what its experiment expects of a kernel."""


@dataclass(frozen=True)
class Check:
    """One statement about a run.

    Attributes
    ----------
    statement
        What is expected, as a sentence's worth of words: ``"the control loses nothing"``.
    holds
        Whether the run shows it.
    measured
        The figures that decide: ``"0 of 800,000"``.
    """

    statement: str
    holds: bool
    measured: str

    def __str__(self) -> str:
        return f"[{_word(self.holds)}] {self.statement}: {self.measured}"


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
    def holds(self) -> bool:
        """Whether every check holds."""
        return all(check.holds for check in self.checks)

    def require(self) -> Finding:
        """Return the finding itself, or raise FindingFailed that names the checks that fail."""
        failed = [
            f"{check.statement} ({check.measured})" for check in self.checks if not check.holds
        ]
        if failed:
            raise FindingFailed(f"{self.experiment} does not hold: {'; '.join(failed)}.")
        return self

    def __str__(self) -> str:
        lines = [f"{self.experiment} {_word(self.holds)}: {self.sentence}"]
        return "\n".join(lines + [f"  {check}" for check in self.checks])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='color:{_COLOUR[check.holds]}'><b>{_word(check.holds)}</b></td>"
            f"<td style='text-align:left'>{escape(check.statement)}</td>"
            f"<td style='text-align:left'>{escape(check.measured)}</td></tr>"
            for check in self.checks
        )
        return (
            f"<div class='finding' style='border-left:4px solid {_COLOUR[self.holds]};"
            f"padding-left:0.8em'><p><b>{escape(self.experiment)} {_word(self.holds)}.</b> "
            f"{escape(self.sentence)}</p><table>{rows}</table></div>"
        )


# Okabe-Ito's bluish green and vermillion; the word beside them says the same.
_COLOUR = {True: "#009E73", False: "#D55E00"}


def _word(holds: bool) -> str:
    return "holds" if holds else "FAILS"


def judges(experiment: str) -> Callable[[Judge], Judge]:
    """Decorate the function that judges the runs of one experiment.

    Raises
    ------
    BadInput
        When another function judges that experiment already.
    """
    return _judges.register(experiment)


def judge(run: Run) -> Finding:
    """Judge a run.

    Raises
    ------
    BadInput
        When no family judges the run's experiment.
    """
    finding = _judges.find(run.experiment)(run)
    if finding.experiment != run.experiment:
        raise BadInput(f"The finding of {run.experiment} calls itself {finding.experiment!r}.")
    return finding


def judged() -> tuple[str, ...]:
    """Return the ids of all experiments that have a finding, sorted."""
    return _judges.ids()
