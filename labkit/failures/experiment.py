"""What an experiment is, and the catalogue of all of them."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from labkit.analysis.runs import PROFILES, Run
from labkit.errors import BadInput
from labkit.failures.parts import Parts
from labkit.failures.progress import say as say
from labkit.kernel import probe
from labkit.kernel.provenance import provenance, usage, usage_since

FAMILIES = {
    "kernel-facts": "How a map lives, and what reaches the kernel",
    "stale-reads": "Stale reads",
    "concurrency": "Lost, torn and skipped",
    "value-size": "Truncated and overrun",
    "sync": "Ways to keep a copy in sync",
}
"""The families in the order of the notebooks, with their titles."""

_PACKAGES = ("labkit.failures", "labkit.comparisons")

Tables = dict[str, pd.DataFrame]
Value = int | float | str | bool | list[int] | list[float] | list[str]


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
        Does the work and returns the tables of the run, ``counts`` among them. Its
        docstring gives the parameters with their units.
    in_parts
        ``measure`` takes `Parts` as ``parts``: a run that was stopped can be continued.
    """

    id: str
    number: int
    family: str
    question: str
    claims: tuple[str, ...]
    needs: tuple[str, ...]
    profiles: Mapping[str, Mapping[str, Value]]
    measure: Callable[..., Tables]
    in_parts: bool = False

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

    def missing(self) -> list[probe.Feature]:
        """The features that this kernel lacks for the experiment; empty when it can run."""
        return [feature for name in self.needs if not (feature := probe.probe(name)).works]

    def run(
        self,
        profile: str = "quick",
        changed: Mapping[str, Any] | None = None,
        *,
        parts: Parts | None = None,
    ) -> Run:
        """Measure here and now, in this process.

        Parameters
        ----------
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
            Not saved yet.

        Raises
        ------
        BadInput
            Before anything touches the kernel.
        Unavailable
            A feature is missing; the sentence says which and how to get it.
        """
        parameters = self.parameters(profile, changed)
        probe.require(*self.needs)
        facts, before, begun = provenance(), usage(), time.monotonic()
        if self.in_parts:
            parts = Parts() if parts is None else parts
            parameters_and = {**parameters, "parts": parts}
            begun -= parts.spent_s
            if parts.before:
                facts["continued"] = {"begun_at": parts.begun_at, "parts_before": parts.before}
        else:
            parameters_and = parameters
        tables = self.measure(**parameters_and)
        facts["duration_s"] = round(time.monotonic() - begun, 3)
        facts["meanwhile"] = usage_since(before)
        return Run(self.id, profile, parameters, facts, tables)


_registered: dict[str, Experiment] = {}


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
) -> Callable[[Callable[..., Tables]], Callable[..., Tables]]:
    """Register the function that measures one experiment.

    Parameters
    ----------
    id, number, family, question, claims, needs
        As `Experiment` describes them.
    quick, full : mapping
        A value for every keyword parameter of the function, but ``parts``: one that has it
        measures in parts, so that a run that was stopped can be continued.

    Returns
    -------
    callable
        A decorator that gives the function back unchanged.

    Raises
    ------
    BadInput
        When the function is decorated: a profile that names other parameters, an unknown
        family, an id that another function has.
    """

    def register(function: Callable[..., Tables]) -> Callable[..., Tables]:
        wanted = set(inspect.signature(function).parameters) - {"parts"}
        for profile, given in (("quick", quick), ("full", full)):
            if set(given) != wanted:
                raise BadInput(f"The {profile} profile of {id} must name {sorted(wanted)}.")
        if family not in FAMILIES:
            raise BadInput(f"{id} names the family {family!r}; there are {', '.join(FAMILIES)}.")
        known = _registered.get(id)
        if known is not None and known.measure.__module__ != function.__module__:
            raise BadInput(f"Two experiments call themselves {id}.")
        _registered[id] = Experiment(
            id=id,
            number=number,
            family=family,
            question=question,
            claims=claims,
            needs=needs,
            profiles={"quick": dict(quick), "full": dict(full)},
            measure=function,
            in_parts="parts" in inspect.signature(function).parameters,
        )
        return function

    return register


@functools.cache
def catalogue() -> dict[str, Experiment]:
    """All experiments by id, in the order of their numbers."""
    # By name, as the packages stand above this module or beside it.
    for name in _PACKAGES:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            importlib.import_module(module.name)
    return {one.id: one for one in sorted(_registered.values(), key=lambda one: one.number)}


def find(id: str) -> Experiment:
    """One experiment by its id; BadInput lists the near ones when there is none."""
    known = catalogue()
    if id not in known:
        near = difflib.get_close_matches(id, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see python -m labkit list."
        raise BadInput(f"There is no experiment {id!r}: {hint}")
    return known[id]


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
