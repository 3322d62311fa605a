"""Statistics of measured times and counts, with the spread that a sentence may claim.

The unit of repetition is the repetition, never the operation: a million operations of one
repetition share one machine state, so they are one sample of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from labkit.errors import BadInput

Floats = NDArray[np.float64]

LEAST_REPETITIONS: Final = 5
"""Fewer repetitions cannot give a 95 % interval: the range of n values holds their median with
probability 1 - 2 / 2**n, which is 88 % for four and 94 % for five."""

_RESAMPLES: Final = 10_000


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval that holds the truth with the given confidence.

    ``low`` and ``high`` are NaN where there were too few repetitions to tell.
    """

    estimate: float
    low: float
    high: float
    confidence: float = 0.95

    def holds(self, value: float) -> bool:
        """Whether the interval holds a value; False where the interval is unknown."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.estimate:.4g} (too few repetitions for an interval)"
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class UniformFit:
    """How far measured delays are from the uniform law on (0, period).

    Attributes
    ----------
    distance
        Kolmogorov-Smirnov distance, 0 to 1: the largest gap between the two distributions.
    p_value
        Probability of a distance that is more than ``beyond`` by so much, if every delay were a
        uniform wait and what its poll was late by, and the waits were independent.
    p_least
        The same if no poll had been late: where many were, the truth lies anywhere between the two.
    samples
        Number of delays.
    beyond
        Share of delays longer than the period.
    """

    distance: float
    p_value: float
    p_least: float
    samples: int
    beyond: float


def percentiles(
    ns: ArrayLike, points: Sequence[float] = (50.0, 99.0, 99.9), *, beyond: int = 10
) -> pd.Series[float]:
    """Percentiles of raw times, by nearest rank: every answer is a time that was measured.

    Parameters
    ----------
    ns
        Times in nanoseconds, any shape.
    points
        Percentiles in percent, 0 to 100, both excluded.
    beyond
        A percentile with fewer samples than this on its thinner side is NaN: p99.9 needs 10,000
        samples for ten beyond it.

    Returns
    -------
    pandas.Series
        Nanoseconds (float64), indexed by ``p50``, ``p99``, ``p99.9``.

    Raises
    ------
    BadInput
        For a percentile out of range or a time that is negative or not finite.
    """
    times = np.asarray(ns, dtype=np.float64).ravel()
    _finite(times, "Times")
    if times.size and times.min() < 0:
        raise BadInput("Times cannot be negative; subtract the earlier clock from the later one.")
    answers = {}
    for point in points:
        if not 0 < point < 100:
            raise BadInput(f"A percentile lies between 0 and 100, not at {point}.")
        thin = times.size * min(point, 100 - point) / 100
        # The small allowance is for 100 - 99.9, which is a little less than 0.1 in binary.
        enough = times.size > 0 and thin * (1 + 1e-9) >= beyond
        answers[f"p{point:g}"] = (
            float(np.percentile(times, point, method="inverted_cdf")) if enough else math.nan
        )
    return pd.Series(answers, dtype="float64")


def bootstrap(
    repetitions: ArrayLike,
    *,
    statistic: Callable[..., Any] = np.median,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Estimate over repetitions, with an interval by resampling the repetitions.

    The percentile interval is widened for small samples as the t distribution is against the
    normal one (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 4.1);
    without that, five repetitions give 84 % where 95 % is claimed.

    Parameters
    ----------
    repetitions
        One number per repetition (its p99, its rate, its cost), shape (n,).
    statistic
        `numpy.median`, `numpy.mean` or another function that takes ``axis``.
    confidence
        0 to 1, both excluded.
    seed
        Of the resampling: the same numbers give the same interval.

    Returns
    -------
    Interval
        In the unit of the repetitions; NaN bounds below `LEAST_REPETITIONS`.

    Raises
    ------
    BadInput
        For no repetitions or a number that is not finite.
    """
    values = _repetitions(repetitions)
    estimate = float(statistic(values, axis=0))
    if values.size < LEAST_REPETITIONS:
        return Interval(estimate, math.nan, math.nan, confidence)
    resampled = statistic(_resample(values, np.random.default_rng(seed)), axis=1)
    low, high = np.quantile(resampled, _tails(values.size, confidence))
    return Interval(estimate, float(low), float(high), confidence)


def sign_interval(repetitions: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """The median of repetitions, with the interval of the sign test.

    Its ends are repetitions themselves: the k-th least and the k-th greatest, with the largest k
    for which they hold the median of all repetitions that might be measured with the confidence
    asked for, whatever these are distributed like (Thompson, "On Confidence Ranges for the Median",
    Annals of Mathematical Statistics 1936). One stall of the machine moves one repetition: it
    widens the interval of six, and leaves that of nine where it was.

    Parameters
    ----------
    repetitions
        One number per repetition, shape (n,), infinity allowed.
    confidence
        0 to 1, both excluded.

    Returns
    -------
    Interval
        In the unit of the repetitions; NaN bounds where there are too few, at 95 % less than six.

    Raises
    ------
    BadInput
        For no repetitions, or one that is not a number.
    """
    values = np.sort(np.asarray(repetitions, dtype=np.float64))
    if values.ndim != 1 or not values.size or np.isnan(values).any():
        raise BadInput(f"One number per repetition was expected, not {values!r}.")
    estimate, outside = float(np.median(values)), 0.0
    n, k = values.size, 0
    # k repetitions may lie beyond an end while the chance that the median does stays below.
    while k < n // 2 and 2 * (outside + math.comb(n, k) / 2**n) <= 1 - _confidence(confidence):
        outside += math.comb(n, k) / 2**n
        k += 1
    if not k:
        return Interval(estimate, math.nan, math.nan, confidence)
    return Interval(estimate, float(values[k - 1]), float(values[n - k]), confidence)


def zero_bound(operations: int, confidence: float = 0.95) -> float:
    """Upper bound of the rate of an anomaly that was not seen once ("rule of three").

    Exactly ``1 - (1 - confidence) ** (1 / operations)``, which is close to 3 / operations at 95 %
    (Hanley and Lippman-Hand, JAMA 1983). It takes the operations as independent.

    Parameters
    ----------
    operations
        How many went without the anomaly.
    confidence
        0 to 1, both excluded.

    Returns
    -------
    float
        Anomalies per operation.
    """
    if operations < 1:
        raise BadInput(f"A bound needs at least one operation, not {operations}.")
    return -math.expm1(math.log1p(-_confidence(confidence)) / operations)


def wilson(anomalies: int, operations: int, confidence: float = 0.95) -> Interval:
    """Rate of an anomaly with its score interval (Wilson, JASA 1927).

    It takes the operations as independent; anomalies of races come in bursts, so the spread
    between repetitions (`bootstrap`) may be wider.

    Parameters
    ----------
    anomalies, operations
        Counts, with ``0 <= anomalies <= operations`` and at least one operation.
    confidence
        0 to 1, both excluded.

    Returns
    -------
    Interval
        Anomalies per operation.
    """
    if not 0 <= anomalies <= operations or operations < 1:
        raise BadInput(
            f"A rate needs anomalies within operations, not {anomalies} of {operations}."
        )
    z = NormalDist().inv_cdf((1 + _confidence(confidence)) / 2)
    rate = anomalies / operations
    scale = 1 + z * z / operations
    centre = (rate + z * z / (2 * operations)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / operations + (z / (2 * operations)) ** 2)
    return Interval(
        rate,
        0.0 if anomalies == 0 else centre - half,
        1.0 if anomalies == operations else centre + half,
        confidence,
    )


def uniform_fit(delays: ArrayLike, period: float) -> UniformFit:
    """Compare delays with the uniform law on (0, period).

    A change at a time unrelated to a poll of period T waits U(0, T), with mean T / 2, and then for
    what the poll is late by and takes itself: some L that is not negative. Below T the distribution
    of the sum lies under the uniform one, by E[min(L, x)] / T at x, which is the share beyond T
    where x is T. So late polls move it by that share at the most, and only more speaks against the
    law. The distance is Kolmogorov's; its probability uses Stephens' correction for finite samples
    (JRSS B 1970).

    Parameters
    ----------
    delays
        Waits, shape (n,), in the unit of the period.
    period
        The poll interval, above 0.

    Returns
    -------
    UniformFit

    Raises
    ------
    BadInput
        For no delays, a negative one, or a period that is not positive.
    """
    values = np.sort(_repetitions(delays))
    if not period > 0 or values[0] < 0:
        raise BadInput("The uniform law needs a positive period and delays that are not negative.")
    law = np.clip(values / period, 0, 1)
    steps = np.arange(values.size + 1) / values.size
    distance = float(max((steps[1:] - law).max(), (law - steps[:-1]).max()))
    root = math.sqrt(values.size)
    scale = root + 0.12 + 0.11 / root
    beyond = float((values > period).mean())
    return UniformFit(
        distance=distance,
        p_value=_kolmogorov((distance - beyond) * scale),
        p_least=_kolmogorov(distance * scale),
        samples=values.size,
        beyond=beyond,
    )


def uniform_fits(delays: pd.DataFrame, delay: str = "delay_ms") -> pd.DataFrame:
    """`uniform_fit` of the delays of each case that polls.

    Parameters
    ----------
    delays
        One row for each change: ``case``, ``period_ms`` (NaN where nobody polls: left out) and the
        delay.
    delay
        Name of its column, which is in milliseconds.

    Returns
    -------
    pandas.DataFrame
        ``case``, ``period_ms``, and what `UniformFit` has; by period.
    """
    rows = [
        {"case": case, "period_ms": period, **asdict(uniform_fit(group[delay], float(str(period))))}
        for case, polled in delays.groupby("case", sort=False)
        for period, group in polled.groupby("period_ms", sort=False)
    ]
    columns = ["case", "period_ms", *UniformFit.__dataclass_fields__]
    return pd.DataFrame(rows, columns=columns).sort_values("period_ms", ignore_index=True)


def _kolmogorov(x: float) -> float:
    """Probability that Kolmogorov's limit distribution exceeds x."""
    if x < 0.2:  # the series needs ever more terms there, and its sum is 1 to 12 digits
        return 1.0
    j = np.arange(1, 101)
    return float(np.clip(2 * ((-1.0) ** (j - 1) * np.exp(-2 * (j * x) ** 2)).sum(), 0, 1))


def _resample(values: Floats, rng: np.random.Generator) -> Floats:
    return values[rng.integers(0, values.size, (_RESAMPLES, values.size))]


def _tails(repetitions: int, confidence: float) -> tuple[float, float]:
    """Quantiles of the resampled statistic that bound the widened interval."""
    z = NormalDist().inv_cdf((1 + _confidence(confidence)) / 2)
    dof = repetitions - 1
    # Quantile of Student's t by the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5).
    t = (
        z
        + (z**3 + z) / (4 * dof)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * dof**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * dof**3)
    )
    tail = NormalDist().cdf(-t * math.sqrt(repetitions / dof))
    return tail, 1 - tail


def _confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise BadInput(f"A confidence lies between 0 and 1, not at {confidence}.")
    return confidence


def _repetitions(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise BadInput(f"One number per repetition was expected, not the shape {array.shape}.")
    _finite(array, "Repetitions")
    return array


def _finite(values: Floats, what: str) -> None:
    if not np.isfinite(values).all():
        raise BadInput(f"{what} must be finite numbers; leave out what was not measured.")
