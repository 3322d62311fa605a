"""The schedule of changes that pollers follow."""

from __future__ import annotations

import numpy as np

from labkit.judge.statistics import uniform_fit
from labkit.load import open_loop


def test_moments_are_uniform_on_every_period_that_fills_the_window() -> None:
    rounds = [open_loop.schedule(25, 4.0, seed) / 1e6 for seed in range(40)]
    assert all((np.diff(one) >= 0).all() and one[0] >= 0 and one[-1] < 100 for one in rounds)
    moments = np.concatenate(rounds)
    for period in (100.0, 50.0, 2.0):
        # From where the poller begins, which is the same in every round.
        assert uniform_fit((30 - moments) % period, period).p_value > 0.001
    gaps = np.concatenate([np.diff(one) for one in rounds])
    assert abs(gaps.mean() - 100 / 26) < 0.3 and abs(gaps.std() / gaps.mean() - 1) < 0.1


def test_a_seed_gives_its_moments_again() -> None:
    assert (open_loop.schedule(9, 1.0, 3) == open_loop.schedule(9, 1.0, 3)).all()
    assert (open_loop.schedule(9, 1.0, 3) != open_loop.schedule(9, 1.0, 4)).any()
