"""The hash and the expectation that experiment 35 counts by."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments.kernel_facts import path_hash


def plain_fnv1a(text: bytes) -> int:
    hashed = 0x811C9DC5
    for byte in text:
        hashed = ((hashed ^ byte) * 0x01000193) % 2**32
    return hashed


def test_the_reference_is_fnv1a() -> None:
    assert plain_fnv1a(b"foobar") == 0xBF9CF968  # of the authors' own test vectors


def test_all_paths_are_hashed_as_one_by_one() -> None:
    paths = path_hash._random_paths(np.random.default_rng(1), 500)
    assert len(set(paths.tolist())) == 500
    assert all(path.startswith(b"/v1/") for path in paths)
    assert path_hash._hashed(paths).tolist() == [plain_fnv1a(path) for path in paths.tolist()]
    assert path_hash._hashed(paths[100:200]).tolist() == path_hash._hashed(paths)[100:200].tolist()


@pytest.mark.parametrize("paths", [1_000, 77_163, 2_000_000])
def test_the_expectation_is_the_birthday_rule(paths: int) -> None:
    (taken,) = path_hash._taken(pd.Series([paths]))
    assert taken == pytest.approx(paths * (paths - 1) / 2**33, rel=1e-3)
