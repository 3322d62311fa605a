"""Versions that a follower tells of: which of them the foreign process wrote."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.sync.foreign_writer import _VALUE, figures
from labkit.sync.changes import ChangeKind, Changes, change_dtype

KEYS, WRITES = 4, 10  # keys 0 and 1 reach version 3, the others version 2


def told(*versions: tuple[int, int]) -> Changes:
    rows = np.zeros(len(versions), change_dtype("u4", _VALUE))
    for row, (key, version) in zip(rows, versions, strict=True):
        row["key"], row["version"], row["kind"] = key, version, ChangeKind.UPDATE
        row["value"]["version"], row["value"]["written_ns"] = version, 100
        row["seen_ns"] = 300
    return rows


ALL = [(i % KEYS, i // KEYS + 1) for i in range(WRITES)]


def test_all_that_was_written_and_no_more_is_right() -> None:
    row = figures(told(*ALL), WRITES, KEYS)
    assert (row["changes"], row["wrong"], row["told"], row["seen"]) == (10, 0, 10, 10)
    assert row["delay_ns"] == 200


@pytest.mark.parametrize("more", [(2, 3), (4, 1), (0, 0), (1, 2)])
def test_what_was_not_written_or_is_told_twice_is_wrong(more: tuple[int, int]) -> None:
    row = figures(told(*ALL, more), WRITES, KEYS)
    assert (row["changes"], row["wrong"], row["told"], row["seen"]) == (11, 1, 11, 10)


def test_a_version_that_was_never_written_stands_for_none_that_was() -> None:
    row = figures(told(*ALL[:-1], (3, 9)), WRITES, KEYS)
    assert (row["changes"], row["wrong"], row["seen"]) == (11, 2, 9)


def test_a_value_at_another_version_or_a_delete_is_wrong() -> None:
    rows = told(*ALL)
    rows["version"][0] += 1
    rows["kind"][1] = ChangeKind.DELETE
    assert figures(rows, WRITES, KEYS)["wrong"] == 4


def test_of_a_map_that_nobody_wrote_whatever_is_told_is_wrong() -> None:
    assert figures(told(), 0, KEYS)["wrong"] == 0
    assert figures(told((0, 1)), 0, KEYS)["wrong"] == 1
