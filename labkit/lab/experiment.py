"""What an experiment is: one record, in one file below ``experiments/``.

It may be imported anywhere, and nothing is measured by that. `labkit.lab.driver` measures it,
`labkit.lab.catalogue` finds it, judges its runs and draws them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pandas as pd

from labkit.errors import BadInput
from labkit.figures import Drawing
from labkit.judge.findings import Statement as Statement
from labkit.lab.progress import say as say
from labkit.runs import PROFILES, VARIANTS, Run, Triad

FAMILIES = {
    "kernel-facts": "How a map lives, and what reaches the kernel",
    "stale-reads": "Stale reads",
    "concurrency": "Lost, torn and skipped",
    "value-size": "Truncated and overrun",
    "sync": "Ways to keep a copy in sync",
    "production": "Stories from production",
    "go": "The Go side",
}
"""The families in the order of the notebooks, with their titles."""

Tables = dict[str, pd.DataFrame]
Value = int | float | str | bool | list[int] | list[float] | list[str]


class Case:
    """One setting within a variant.

    Parameters
    ----------
    variant : str
        ``broken``, ``control`` or ``fixed``.
    id : str
        Names it in statements, claims and saved runs, and never changes.
    label : str
        Names it to readers, and may change at any time.
    beside : str
        Id of the case whose measurement tells of this one too; by default it has its own.
    **settings
        What is set otherwise than in other cases: attributes of the case. Numbers, words and
        members of enumerations stand in the run's table of cases as well.
    """

    def __init__(
        self, variant: str, id: str, label: str, *, beside: str = "", **settings: Any
    ) -> None:
        if variant not in VARIANTS:
            raise BadInput(f"A variant is one of {', '.join(VARIANTS)}, not {variant!r}.")
        self.variant, self.id, self.label, self.beside = variant, id, label, beside
        self.settings = settings

    def __getattr__(self, name: str) -> Any:
        # Only what is no attribute otherwise comes here.
        try:
            return self.__dict__["settings"][name]
        except KeyError:
            raise AttributeError(f"The case has no setting {name!r}.") from None

    def get(self, name: str, usual: Any) -> Any:
        """A setting, or what is usual where the case does not set it."""
        return self.settings.get(name, usual)

    def __repr__(self) -> str:
        return f"<Case {self.variant} {self.id}>"


def case_table(cases: Sequence[Case]) -> pd.DataFrame:
    """The cases of an experiment as the table that its runs keep.

    A row has ``variant``, ``case``, ``label``, and a column for each setting that is a number, a
    word or a member of an enumeration (its name); None where a case does not have it.
    """
    return pd.DataFrame(
        [
            {"variant": case.variant, "case": case.id, "label": case.label}
            | {name: _kept(value) for name, value in case.settings.items() if _is_kept(value)}
            for case in cases
        ]
    )


@dataclass(frozen=True)
class Counted:
    """How the counts of a run come from what was observed.

    Attributes
    ----------
    anomaly
        The word for what goes wrong, singular: ``"torn read"``.
    operations, anomalies
        Columns whose sums they are, or what is computed of columns: ``"written - found"``
        (`pandas.DataFrame.eval`).
    cost_ns
        The same, whose median is the cost of an operation, nanoseconds; empty where none is timed.
    of
        The table that has these columns.
    """

    anomaly: str
    operations: str
    anomalies: str
    cost_ns: str = ""
    of: str = "rounds"

    def table(self, rounds: pd.DataFrame) -> pd.DataFrame:
        """The counts of all cases that were measured."""
        triad = Triad(self.anomaly)
        for (variant, case), group in rounds.groupby(["variant", "case"], sort=False):
            of_group: Callable[[str], Any] = group.eval
            triad.add(
                str(variant),
                case=str(case),
                operations=int(of_group(self.operations).sum()),
                anomalies=int(of_group(self.anomalies).sum()),
                cost_ns=float(of_group(self.cost_ns).median()) if self.cost_ns else math.nan,
            )
        return triad.table()


@dataclass(frozen=True)
class Experiment:
    """One question put to the kernel in three variants: broken, control, fixed.

    Attributes
    ----------
    id
        Names the experiment everywhere: ``"transient-null"``.
    number
        Place in the catalogue.
    family
        One of `FAMILIES`.
    question
        What it asks, as a sentence with a question mark.
    claims
        The article's claims that it bears on: ``("1.2b",)``.
    needs
        Kernel features, by their names in :mod:`labkit.kernel.probe`.
    profiles
        Parameters of the profiles ``quick`` and ``full``; both name the same ones.
    measure
        Measures one case, or all, and answers what was observed; see `experiment`.
    cases
        What is measured, in the order of showing.
    derive
        From the tables of a run to those that follow from them, ``counts`` among them; they are
        made anew whenever the run is judged. None where the run's own counts are all there is.
    statements
        What is stated of every run.
    sentence
        The result, with figures of the run in braces.
    figures
        How a run is drawn: the experiment's own figure under an empty name, others by theirs.
    """

    id: str
    number: int
    family: str
    question: str
    claims: tuple[str, ...]
    needs: tuple[str, ...]
    profiles: Mapping[str, Mapping[str, Value]]
    measure: Callable[..., Any]
    cases: tuple[Case, ...] = ()
    derive: Callable[[Tables], Tables] | None = None
    statements: tuple[Statement, ...] = ()
    sentence: str = ""
    figures: Mapping[str, Drawing] = field(default_factory=dict)

    @property
    def in_parts(self) -> bool:
        """Whether ``measure`` takes `Parts`: a run that was stopped can be continued."""
        return "parts" in inspect.signature(self.measure).parameters

    @property
    def by_case(self) -> bool:
        """Whether ``measure`` measures one case, and the driver takes the turns."""
        return "case" in inspect.signature(self.measure).parameters

    @property
    def by_turn(self) -> bool:
        """Whether ``measure`` is told which round it is in."""
        return "turn" in inspect.signature(self.measure).parameters

    def parameters(self, profile: str, changed: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Parameters of a profile, with the caller's changes checked.

        Raises
        ------
        BadInput
            Unknown profile or parameter, or a value that cannot be meant.
        """
        if profile not in PROFILES:
            raise BadInput(f"A profile is {' or '.join(PROFILES)}, not {profile!r}.")
        chosen = dict(self.profiles[profile])
        for name, value in (changed or {}).items():
            if name not in chosen:
                raise BadInput(
                    f"{self.id} has no parameter {name!r}; it has {', '.join(chosen) or 'none'}."
                )
            chosen[name] = _checked(self.id, name, chosen[name], value)
        return chosen

    def complete(self, run: Run) -> Run:
        """A run with what follows from its tables; the run itself where nothing does."""
        return run if self.derive is None else run.derived(self.derive(run.tables))


_registered: dict[str, Experiment] = {}


def registered() -> Mapping[str, Experiment]:
    """The experiments whose files have been imported, by id."""
    return _registered


def experiment(
    id: str,
    *,
    number: int,
    family: str,
    question: str,
    claims: tuple[str, ...],
    needs: tuple[str, ...],
    quick: Mapping[str, Value],
    full: Mapping[str, Value],
    cases: Sequence[Case] = (),
    counted: Counted | None = None,
    derive: Callable[[Tables], Tables] | None = None,
    statements: Sequence[Statement] = (),
    sentence: str = "",
    figure: Drawing | None = None,
    figures: Mapping[str, Drawing] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the function that measures one experiment.

    The function measures one case, or all of them:

    ``measure(case, *, keys, ...)``
        The driver calls it for each case in turn, ``rounds`` times, so that a burst of other load
        meets all alike. It answers what it observed, a row for the table ``rounds``: a mapping, or
        several, of which one may name the ``case`` that is measured beside this one. A value that
        is a DataFrame becomes rows of the table of that name. Variant, case and round are added.
        One that has a keyword ``turn`` is told the round, from 0 on and never the same twice in a
        run: for a seed that all cases of a round share.
    ``measure(*, keys, rounds, ...)``
        It answers all tables by itself; where the first form does not fit.

    Parameters
    ----------
    id, number, family, question, claims, needs
        As `Experiment` describes them.
    quick, full : mapping
        A value for every keyword parameter of the function (``rounds`` too), but ``parts``: one
        that has it measures in parts, so that a run that was stopped can be continued.
    cases : sequence of Case
        What is measured.
    counted : Counted, optional
        Where the counts are sums over columns of a table.
    derive : callable, optional
        Where tables follow from those of the run in another way. Without ``counted`` or ``derive``
        the function answers ``counts`` itself.
    statements : sequence of Statement
        What is stated of every run.
    sentence : str
        The result, with figures of the run in braces.
    figure : callable, optional
        Draws a run: ``figure(run, ax=None)``.
    figures : mapping, optional
        More of them, by name.

    Returns
    -------
    callable
        A decorator that gives the function back unchanged.

    Raises
    ------
    BadInput
        When the function is decorated: a profile that names other parameters, an unknown
        family, an id that another function has, two cases of one id.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        wanted = set(inspect.signature(function).parameters) - {"parts"}
        if "case" in wanted:
            wanted = wanted - {"case", "turn"} | {"rounds"}
        for profile, given in (("quick", quick), ("full", full)):
            if set(given) != wanted:
                raise BadInput(f"The {profile} profile of {id} must name {sorted(wanted)}.")
        if family not in FAMILIES:
            raise BadInput(f"{id} names the family {family!r}; there are {', '.join(FAMILIES)}.")
        known = _registered.get(id)
        if known is not None and known.measure.__module__ != function.__module__:
            raise BadInput(f"Two experiments call themselves {id}.")
        ids = [case.id for case in cases]
        if twice := sorted({one for one in ids if ids.count(one) > 1}):
            raise BadInput(f"Two cases of {id} call themselves {twice[0]!r}.")
        _registered[id] = Experiment(
            id=id,
            number=number,
            family=family,
            question=question,
            claims=claims,
            needs=needs,
            profiles={"quick": dict(quick), "full": dict(full)},
            measure=function,
            cases=tuple(cases),
            derive=_derivation(counted, derive),
            statements=tuple(statements),
            sentence=sentence,
            figures=({"": figure} if figure else {}) | dict(figures or {}),
        )
        return function

    return register


def _derivation(
    counted: Counted | None, derive: Callable[[Tables], Tables] | None
) -> Callable[[Tables], Tables] | None:
    if counted is None:
        return derive

    def both(tables: Tables) -> Tables:
        more = {} if derive is None else derive(tables)
        return {"counts": counted.table(tables[counted.of])} | more

    return both


def _is_kept(value: object) -> bool:
    return isinstance(value, int | float | str | Enum)


def _kept(value: Any) -> Any:
    return str(value.name).lower() if isinstance(value, Enum) else value


def _checked(id: str, name: str, usual: Value, value: Any) -> Value:
    """Refuse what is of another type than the profile's value, empty, or not positive."""
    if isinstance(usual, list):
        if not isinstance(value, list) or not value:
            raise BadInput(f"{name} of {id} is a list such as {usual}, not {value!r}.")
        return [_checked(id, name, usual[0], one) for one in value]  # type: ignore[return-value]
    if isinstance(usual, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(usual):
        raise BadInput(
            f"{name} of {id} is of type {type(usual).__name__} such as {usual!r}, not {value!r}."
        )
    if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
        raise BadInput(f"{name} of {id} must be greater than 0, not {value!r}.")
    return value
