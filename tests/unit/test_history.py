"""Histories: what is refused, and that nothing changes on the way to disk and back."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from labkit.errors import BadInput
from labkit.judge.history import (
    HISTORY,
    PENDING,
    Op,
    applied,
    build,
    committed,
    concatenate,
    from_frame,
    placeable,
    to_frame,
)


def write(**columns: Any) -> Any:
    return build(**{"op": Op.WRITE, "key": 1, "version": 1, "start_ns": 10, "end_ns": 20} | columns)


def test_columns_are_broadcast_and_intended_is_start() -> None:
    history = write(version=[1, 2, 3], start_ns=[10, 20, 30], end_ns=99, actor=7)
    assert history.dtype == HISTORY
    assert history["actor"].tolist() == [7, 7, 7]
    assert history["intended_ns"].tolist() == [10, 20, 30]
    assert history["intact"].all()


def test_one_row_without_any_array() -> None:
    assert len(write()) == 1


def test_joined_histories_are_ordered_by_start() -> None:
    read = build(Op.READ, key=1, version=0, start_ns=5, end_ns=6, outcome=-errno.ENOENT)
    history = concatenate(write(version=[1, 2], start_ns=[10, 2], end_ns=20), read)
    assert history["start_ns"].tolist() == [2, 5, 10]
    assert len(concatenate()) == 0


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: write(version=[1, 2], start_ns=[1, 2, 3]), "one length, not 2 and 3"),
        (lambda: write(version=-1), "-1 does not fit"),
        (lambda: write(actor=70_000), "70000 does not fit"),
        (lambda: write(start_ns=1.5), "not float64"),
        (lambda: write(intact=1), "true or false"),
        (lambda: write(op=0), "unknown operation"),
        (lambda: write(end_ns=9), "ends before it starts"),
        (lambda: write(intended_ns=11), "before it was intended"),
        (lambda: write(outcome=errno.ENOENT), "positive outcome"),
        (lambda: write(op=Op.READ, outcome=-errno.ENOENT), "yet read a version"),
        (lambda: write(op=Op.READ, end_ns=PENDING), "without an end"),
        (lambda: write(version=0), "version 0"),
        (lambda: write(version=[3, 4, 3]), r"Row 2 .* another write to its key"),
        (lambda: concatenate(write(), write()), "another write to its key"),
        (lambda: concatenate(np.zeros(3, np.dtype([("op", np.uint8)]))), "dtype HISTORY"),
        (lambda: from_frame(to_frame(write()).drop(columns="key")), "lacks the column key"),
    ],
)
def test_what_cannot_have_happened_is_refused(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        make()


def test_two_keys_may_have_the_same_version_and_a_refused_write_none_of_its_own() -> None:
    write(key=[1, 2])
    write(outcome=[0, -errno.E2BIG])


def test_a_frame_brings_everything_back() -> None:
    history = concatenate(
        write(version=2**63, end_ns=PENDING, actor=3, length=64),
        build(Op.READ, key=2**64 - 1, version=5, start_ns=1, end_ns=2, intact=False),
    )
    back = from_frame(to_frame(history))
    assert back.dtype == HISTORY
    assert (back == history).all()


def test_who_counts_as_what() -> None:
    history = build(
        [Op.WRITE, Op.WRITE, Op.DELETE, Op.WRITE, Op.READ, Op.READ, Op.READ],
        key=1,
        version=[1, 2, 3, 4, 1, 0, 0],
        start_ns=1,
        end_ns=np.array([2, PENDING, 2, 2, 2, 2, 2], np.uint64),
        outcome=[0, 0, 0, -errno.E2BIG, 0, -errno.ENOENT, -errno.EFAULT],
    )
    assert np.flatnonzero(committed(history)).tolist() == [0, 2]
    assert np.flatnonzero(applied(history)).tolist() == [0, 1, 2]
    assert np.flatnonzero(placeable(history)).tolist() == [4, 5]
