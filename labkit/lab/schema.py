"""What an experiment can be told: its parameters with units and bounds, as it declares them."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Final

from labkit.lab.experiment import Experiment, Value

_ENTRY: Final = re.compile(r"^([a-z_0-9]+(?:, [a-z_0-9]+)*) : .+\n((?:    .+\n?)+)", re.MULTILINE)
_ROUNDS: Final = "How often each case is measured, all in turns."


@dataclass(frozen=True)
class Parameter:
    """One parameter of an experiment.

    Attributes
    ----------
    name
        As the measuring function has it.
    about
        What it is, with its unit.
    quick, full
        Its values in the two profiles.
    """

    name: str
    about: str
    quick: Value
    full: Value

    @property
    def bounds(self) -> str:
        """What it may be, in words."""
        given = self.quick or self.full  # a profile may leave a list empty
        one = given[0] if isinstance(given, list) else given
        kind = {bool: "true or false", str: "text", int: "whole number above 0"}
        words = kind.get(type(one), "number above 0")
        return f"list, each a {words}" if isinstance(given, list) else words


def parameters(experiment: Experiment) -> list[Parameter]:
    """List the parameters of an experiment, in the order of its profile.

    Parameters
    ----------
    experiment : Experiment
        Its measuring function's docstring says what they are.
    """
    text = inspect.getdoc(experiment.measure) or ""
    about = {"rounds": _ROUNDS}
    for names, words in _ENTRY.findall(text):
        about |= dict.fromkeys(names.split(", "), " ".join(words.split()))
    quick, full = experiment.profiles["quick"], experiment.profiles["full"]
    return [Parameter(name, about.get(name, ""), quick[name], full[name]) for name in quick]
