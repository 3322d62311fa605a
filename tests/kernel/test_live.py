"""What the panel runs: every strategy, for two windows, accounted for exactly."""

from __future__ import annotations

import json
from itertools import count

import numpy as np
import pytest

from labkit.lab import live
from labkit.load.strategies import DOUBLE_MAP

pytestmark = [
    pytest.mark.usefixtures("kernel"),
    pytest.mark.outside_vm("asks nothing of the kernel that differs between kernels"),
]


@pytest.mark.parametrize("strategy", live.CHOICES)
def test_windows_add_up_and_are_told(strategy: str, capfd: pytest.CaptureFixture[str]) -> None:
    asked = count()
    tables = live.windows(
        strategy=strategy, rate=10_000, value_bytes=64, ring_bytes=1 << 16, seconds=30,
        stopped=lambda: next(asked) == 2,
    )  # fmt: skip
    rows = tables["windows"]
    assert len(rows) == 2 and (rows["operations"] >= 2_400).all()
    assert (rows["operations"] == rows["produced"]).all()
    told = rows["delivered"] + rows["dropped"] + rows["coalesced"]
    assert (told == rows["produced"]).all() and not rows["unseen"].any()
    assert np.all(np.diff(tables["tail"]["ns"]) <= 0)
    progress = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "{" in line]
    assert [one["produced"] for one in progress] == rows["produced"].cumsum().tolist()
    if strategy == DOUBLE_MAP:
        assert (rows["operations"] % 200 == 0).all()
