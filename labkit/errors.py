"""The lab's errors: each says in one sentence what was wrong and what to do.

Each kind has the exit status of a command that ends with it.
"""

from __future__ import annotations

from typing import Final

CAUSE_FOUND: Final = 1
"""Exit status of a diagnosis that found a cause."""

FALLS_SHORT: Final = 5
"""Exit status of a command whose work was done, and came to less than was demanded."""


class LabError(Exception):
    """Base of everything that the lab reports to its user without a traceback."""

    status = 4

    def _render_traceback_(self) -> list[str]:
        # IPython shows this in place of a traceback.
        return [f"{type(self).__name__}: {self}"]


class BadInput(LabError, ValueError):
    """An argument was refused before anything touched the kernel."""

    status = 2


class Unavailable(LabError):
    """This machine or kernel lacks something; the sentence says what, and how to get it."""

    status = 3


class TimedOut(LabError, TimeoutError):
    """Something did not finish within its bound and was stopped."""
