"""Results of the benchmarks, some of which are held against a bar: one line for each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from labkit.judge.findings import Check
from labkit.judge.statistics import sign_interval


@dataclass(frozen=True)
class Result:
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
        Whether the bar is reached; None where there is none, and where the run is too noisy to
        tell: the median falls short of it, and the interval of the median does not.
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
        word = {True: "holds", False: "falls short", None: "undecided"}[self.holds]
        verdict = f"bar {self.bar}, {word}" if self.bar else "no bar"
        return f"{self.name}: {short(self.value)} {self.unit}{spread}, {verdict}"


def result(
    name: str,
    values: pd.Series[float],
    unit: str = "times",
    *,
    least: float = -math.inf,
    most: float = math.inf,
) -> Result:
    """The median over the repetitions and their range, held against a bar where one is given.

    Parameters
    ----------
    name : str
        What was measured.
    values : pandas.Series
        One for each repetition, or the only one.
    unit : str
        Of the values.
    least, most : float
        What the median must reach, or must not exceed; one of them.
    """
    median = float(values.median())
    bar = f"at least {least:,g}" if least > -math.inf else f"at most {most:,g}"
    low, high = (math.nan,) * 2 if len(values) == 1 else (float(values.min()), float(values.max()))
    if math.isinf(least) and math.isinf(most):
        return Result(name, median, unit, low, high)
    holds: bool | None = least <= median <= most
    if not holds and values.notna().all():  # what was not measured falls short
        told = sign_interval(values)
        # Of too few repetitions for an interval their range stands for it.
        ends = (low, high) if math.isnan(told.low) else (told.low, told.high)
        holds = None if ends[1] >= least and ends[0] <= most else False
    return Result(name, median, unit, low, high, bar, holds)


def checks(results: Iterable[Result]) -> tuple[Check, ...]:
    """A check for each result that has a bar."""
    return tuple(
        Check(f"{one.name}, {one.bar}", one.holds, f"{short(one.value)} {one.unit}")
        for one in results
        if one.bar
    )


def short(value: float) -> str:
    """Three significant digits, or whole thousands with their commas."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
