"""Statistics: known answers, honest refusals, and intervals that hold what they claim to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.errors import BadInput
from labkit.judge import statistics

RNG = np.random.default_rng(20)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=200))
def test_percentiles_are_nearest_rank_where_samples_suffice(times: list[int]) -> None:
    found = statistics.percentiles(times, (50, 90), beyond=10)
    for point, value in ((50, found["p50"]), (90, found["p90"])):
        if len(times) * (100 - point) < 1000:
            assert math.isnan(value)
        else:
            assert value == sorted(times)[math.ceil(len(times) * point / 100) - 1]


def test_a_tail_is_not_read_off_too_few_samples() -> None:
    assert statistics.percentiles(np.arange(9_999)).isna().tolist() == [False, False, True]
    assert statistics.percentiles(np.arange(10_000)).notna().all()
    assert statistics.percentiles([]).isna().all()


def test_the_interval_of_five_repetitions_holds_the_truth_as_often_as_it_says() -> None:
    trials = RNG.normal(100, 10, (400, 5))
    for statistic in (np.mean, np.median):
        held = [statistics.bootstrap(row, statistic=statistic).holds(100) for row in trials]
        assert np.mean(held) > 0.90  # the range of five values holds their median in 93.75 %


def test_more_repetitions_narrow_the_interval_and_few_give_none() -> None:
    width = {}
    for count in (5, 100):
        found = statistics.bootstrap(np.random.default_rng(1).normal(100, 10, count))
        width[count] = found.high - found.low
    assert width[100] < width[5] / 2
    few = statistics.bootstrap([1.0, 2.0, 3.0, 4.0])
    assert few.estimate == 2.5
    assert math.isnan(few.low) and not few.holds(2.5)
    assert "too few repetitions" in str(few)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = RNG.random(20)
    assert statistics.bootstrap(values) == statistics.bootstrap(values)
    other = statistics.bootstrap(values, statistic=np.mean, seed=1)
    assert other != statistics.bootstrap(values, statistic=np.mean)


def test_zero_of_many_has_a_bound_near_three_in_many() -> None:
    assert statistics.zero_bound(50_000) == pytest.approx(3 / 50_000, rel=0.01)
    assert statistics.zero_bound(1) == pytest.approx(0.95)


def test_wilson_agrees_with_known_values() -> None:
    # Newcombe, Statistics in Medicine 1998, table I, method 3.
    for anomalies, operations, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = statistics.wilson(anomalies, operations)
        assert found.low == pytest.approx(low, abs=5e-5)
        assert found.high == pytest.approx(high, abs=5e-5)
    assert statistics.wilson(20, 20).high == 1.0


def test_uniform_delays_fit_and_others_do_not() -> None:
    uniform = statistics.uniform_fit(RNG.uniform(0, 50, 2_000), 50)
    assert uniform.p_value == uniform.p_least > 0.001
    assert uniform.distance < 0.05
    early = statistics.uniform_fit(RNG.uniform(0, 40, 2_000), 50)
    assert early.p_value < 1e-6 and early.beyond == 0
    longer = statistics.uniform_fit(40 + RNG.uniform(0, 12, 2_000), 50)
    assert longer.p_value < 1e-6
    assert statistics.uniform_fit([25.0], 50).distance == 0.5


def test_late_polls_move_the_law_by_the_share_beyond_the_period_and_no_more() -> None:
    for late in (
        np.full(2_000, 5.0),
        RNG.exponential(20.0, 2_000),
        90.0 * (RNG.random(2_000) < 0.1),
    ):
        found = statistics.uniform_fit(RNG.uniform(0, 50, 2_000) + late, 50)
        assert found.beyond > 0.05
        assert found.distance == pytest.approx(found.beyond, abs=0.03)
        assert found.p_value > 0.001
        assert found.p_least < 1e-6


def test_fits_are_made_for_each_case_that_polls() -> None:
    waits = RNG.uniform(0, 10, 1_000)
    delays = pd.DataFrame(
        {
            "case": ["slow"] * 1_000 + ["fast"] * 1_000 + ["events"],
            "period_ms": [10.0] * 1_000 + [2.0] * 1_000 + [np.nan],
            "delay_ms": [*waits, *waits / 10, 0.1],
        }
    )
    fits = statistics.uniform_fits(delays).set_index("case")
    assert list(fits.index) == ["fast", "slow"]
    assert list(fits["p_value"] > 0.001) == [False, True]
    assert statistics.uniform_fits(delays.iloc[:0]).empty


def test_the_p_value_of_true_uniforms_is_uniform() -> None:
    p = [statistics.uniform_fit(row, 1).p_value for row in RNG.random((500, 30))]
    assert np.mean(np.array(p) < 0.1) == pytest.approx(0.1, abs=0.05)
    # Known quantile of Kolmogorov's limit distribution: 1.358 at 5 %.
    assert statistics._kolmogorov(1.358) == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: statistics.percentiles([-1]), "cannot be negative"),
        (lambda: statistics.percentiles([math.nan]), "finite"),
        (lambda: statistics.percentiles([1], (100,)), "between 0 and 100"),
        (lambda: statistics.bootstrap([]), "One number per repetition"),
        (lambda: statistics.bootstrap([[1.0], [2.0]]), "One number per repetition"),
        (lambda: statistics.bootstrap(range(9), confidence=95), "between 0 and 1"),
        (lambda: statistics.zero_bound(0), "at least one"),
        (lambda: statistics.wilson(3, 2), "3 of 2"),
        (lambda: statistics.uniform_fit([1], 0), "positive period"),
    ],
)
def test_bad_numbers_are_refused(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        call()
