"""One function per experiment, found by the experiment's id."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, Generic, TypeVar

from labkit.errors import BadInput

Function = TypeVar("Function", bound=Callable[..., Any])


class Registry(Generic[Function]):
    """Functions by experiment id, spread over the modules of one package.

    Parameters
    ----------
    package
        Name of the package whose modules register their functions when they are imported.
    thing
        What such a function makes, for messages: ``"finding"``.
    """

    def __init__(self, package: str, thing: str) -> None:
        self._package = package
        self._thing = thing
        self._functions: dict[str, Function] = {}

    def register(self, experiment: str) -> Callable[[Function], Function]:
        """Decorate the function of one experiment; BadInput when it has another one already."""

        def decorate(function: Function) -> Function:
            known = self._functions.get(experiment, function)
            # A module that a notebook reloads registers the same function again.
            if _name(known) != _name(function):
                raise BadInput(f"The {self._thing} of {experiment} is {_name(known)} already.")
            self._functions[experiment] = function
            return function

        return decorate

    def find(self, experiment: str) -> Function:
        """Return the function of one experiment; BadInput where there is none."""
        if experiment not in (known := self.ids()):
            raise BadInput(
                f"There is no {self._thing} of {experiment}; there is one of {', '.join(known)}."
            )
        return self._functions[experiment]

    def ids(self) -> tuple[str, ...]:
        """Import the package's modules and return the ids of all experiments, sorted."""
        package: ModuleType = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        return tuple(sorted(self._functions))


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"
