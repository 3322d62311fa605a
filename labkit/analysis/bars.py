"""Figures of the benchmarks that are held against a bar: one line for each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from labkit.analysis.findings import Check


@dataclass(frozen=True)
class Figure:
    """One line of a benchmark.

    Attributes
    ----------
    name
        What was measured.
    value
        The median over the repetitions, or the only value.
    unit
        Of the value.
    low, high
        Least and greatest repetition; NaN for an only value.
    bar
        What it is held against, as words; empty where there is none.
    holds
        Whether the bar is reached; None where there is none.
    """

    name: str
    value: float
    unit: str
    low: float = math.nan
    high: float = math.nan
    bar: str = ""
    holds: bool | None = None

    def __str__(self) -> str:
        spread = "" if math.isnan(self.low) else f" ({short(self.low)} to {short(self.high)})"
        word = "holds" if self.holds else "falls short"
        verdict = "no bar" if self.holds is None else f"bar {self.bar}, {word}"
        return f"{self.name}: {short(self.value)} {self.unit}{spread}, {verdict}"


def spread(name: str, values: pd.Series[float], unit: str) -> Figure:
    """A figure without a bar: the median over repetitions, and their range.

    Parameters
    ----------
    name : str
        What was measured.
    values : pandas.Series
        One for each repetition.
    unit : str
        Of the values.
    """
    return Figure(name, float(values.median()), unit, float(values.min()), float(values.max()))


def at_least(name: str, values: pd.Series[float], bar: float, unit: str = "times") -> Figure:
    """A figure whose median over the repetitions must reach a bar.

    Parameters
    ----------
    name : str
        What was measured.
    values : pandas.Series
        One for each repetition.
    bar : float
        In the unit of the values.
    unit : str
        Of the values.
    """
    one = spread(name, values, unit)
    return _held(one, f"at least {bar:,g}", one.value >= bar)


def at_most(name: str, values: pd.Series[float], bar: float, unit: str = "times") -> Figure:
    """A figure whose median over the repetitions must not exceed a bar.

    Parameters
    ----------
    name : str
        What was measured.
    values : pandas.Series
        One for each repetition.
    bar : float
        In the unit of the values.
    unit : str
        Of the values.
    """
    one = spread(name, values, unit)
    return _held(one, f"at most {bar:,g}", one.value <= bar)


def checks(figures: Iterable[Figure]) -> tuple[Check, ...]:
    """A check for each figure that has a bar."""
    return tuple(
        Check(f"{one.name}, {one.bar}", one.holds, f"{short(one.value)} {one.unit}")
        for one in figures
        if one.holds is not None
    )


def short(value: float) -> str:
    """Three significant digits, or whole thousands with their commas."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _held(one: Figure, bar: str, holds: bool) -> Figure:
    return Figure(one.name, one.value, one.unit, one.low, one.high, bar, holds)
