"""One diagnostic of a map: what is so, how much it matters, and what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Diagnostic:
    """One thing to know about a map.

    Attributes
    ----------
    weight : str
        ``cause``: it keeps somebody from the newest value as things stand. ``risk``: it will,
        when the map is used in a certain way.
    says, do : str
        What is so, and what to do about it.
    experiment : str
        Id of the experiment that shows it; empty where the lab has none.
    usual : bool
        Every map of this kind and layout has it: it says nothing of how this one fares.
    """

    weight: Literal["cause", "risk"]
    says: str
    do: str
    experiment: str = ""
    usual: bool = False


def listed(items: Sequence[Any], most: int = sys.maxsize) -> str:
    """Join words as a sentence does: ``1, 2 and 3``; those behind ``most`` are counted."""
    words = [str(item) for item in items[:most]]
    if more := len(items) - len(words):
        words.append(f"{more:,} more")
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
