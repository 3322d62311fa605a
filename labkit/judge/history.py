"""Histories: one row per operation on a map, by whomever, on one clock.

A write *commits* at some moment between its ``start_ns`` and its ``end_ns``, and a read takes its
value at some moment between its own two; which moments, nobody outside the kernel can know. A
checker therefore calls anomalous only what no choice of moments explains.

Versions belong to a key. Every write and every delete of a key has a version of its own, larger
than those before it in the key's order (one writer per key numbers them; several writers must
agree on the order first). A read has the version of the value that it saw, or 0 where the key was
absent: ``version`` 0 with ``outcome`` 0 or ``-ENOENT``. A follower that is told of changes has a
read for each, with the version of the change, deletes included.

A write whose writer died before the kernel answered has ``end_ns`` `PENDING`: it may have been
applied and may show in any later read, but nobody may rely on it.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from labkit.errors import BadInput

HISTORY: Final = np.dtype(
    [
        ("op", np.uint8),
        ("actor", np.uint16),
        ("key", np.uint64),
        ("version", np.uint64),
        ("intended_ns", np.uint64),
        ("start_ns", np.uint64),
        ("end_ns", np.uint64),
        ("outcome", np.int32),
        ("intact", np.bool_),
        ("length", np.uint32),
    ]
)
"""One operation. op: `Op`; actor: who did it, a number; key; version; intended_ns, start_ns,
end_ns: when the schedule wanted it, when it began, when the kernel had answered, CLOCK_MONOTONIC
nanoseconds; outcome: 0 or -errno; intact: the value is of one version throughout (not torn);
length: bytes of the value that were valid."""

PENDING: Final = 2**64 - 1
"""``end_ns`` of a write that was begun and never answered; in a column beside other numbers, name
the dtype (``np.array(..., np.uint64)``), since NumPy makes floats of such a list."""

History = NDArray[np.void]
Mask = NDArray[np.bool_]


class Op(IntEnum):
    """What an operation does. 0 is none of them, so that a row never filled in is noticed."""

    WRITE = 1
    READ = 2
    DELETE = 3


def build(
    op: ArrayLike,
    *,
    key: ArrayLike,
    version: ArrayLike,
    start_ns: ArrayLike,
    end_ns: ArrayLike,
    intended_ns: ArrayLike | None = None,
    actor: ArrayLike = 0,
    outcome: ArrayLike = 0,
    intact: ArrayLike = True,
    length: ArrayLike = 0,
) -> History:
    """Put columns together into a valid history.

    Parameters
    ----------
    op, key, version, start_ns, end_ns, intended_ns, actor, outcome, intact, length
        Columns of `HISTORY`, integers of shape (n,) or one value for all rows; ``intended_ns`` is
        ``start_ns`` if left out.

    Returns
    -------
    numpy.ndarray
        Of dtype `HISTORY`, shape (n,).

    Raises
    ------
    BadInput
        When lengths differ, a number does not fit its column, or `validate` refuses the rows.
    """
    columns = {
        "op": op,
        "actor": actor,
        "key": key,
        "version": version,
        "intended_ns": start_ns if intended_ns is None else intended_ns,
        "start_ns": start_ns,
        "end_ns": end_ns,
        "outcome": outcome,
        "intact": intact,
        "length": length,
    }
    arrays = {name: np.asarray(column) for name, column in columns.items()}
    sizes = sorted({array.size for array in arrays.values() if array.ndim == 1})
    if len(sizes) > 1 or any(array.ndim > 1 for array in arrays.values()):
        raise BadInput(
            f"The columns of a history must be of one length, not {' and '.join(map(str, sizes))}."
        )
    history = np.zeros(sizes[0] if sizes else 1, HISTORY)
    for name, array in arrays.items():
        history[name] = _fitting(name, array)
    return validate(history)


def concatenate(*histories: History) -> History:
    """Join histories of several actors into one, ordered by start (stable).

    Raises
    ------
    BadInput
        When one of them is not of dtype `HISTORY`, or the whole is not valid.
    """
    for history in histories:
        _require_dtype(history)
    whole = np.concatenate([np.empty(0, HISTORY), *histories])
    return validate(whole[np.argsort(whole["start_ns"], kind="stable")])


def validate(history: History) -> History:
    """Return the history itself, or refuse it with the first row that cannot have happened.

    Raises
    ------
    BadInput
        For another dtype, an unknown operation, an end before its start, a start before it was
        intended, a positive outcome, a read that failed or found nothing and yet has a version,
        a write or delete that succeeded with version 0 or with the version of another one of its
        key, or a read without an end.
    """
    _require_dtype(history)
    op, version, outcome = history["op"], history["version"], history["outcome"]
    reads = op == Op.READ
    applied = ~reads & (outcome == 0)
    for wrong, what in (
        (~np.isin(op, list(Op)), "has an unknown operation; fill in every row"),
        (history["end_ns"] < history["start_ns"], "ends before it starts"),
        (history["start_ns"] < history["intended_ns"], "starts before it was intended"),
        (outcome > 0, "has a positive outcome; it is 0 or -errno"),
        (reads & (outcome != 0) & (version != 0), "failed and yet read a version"),
        (reads & (history["end_ns"] == PENDING), "is a read without an end; leave it out"),
        (applied & (version == 0), "changed a key to version 0, which means absent"),
        (_repeated(history, applied), "has the version of another write to its key"),
    ):
        if wrong.any():
            row = int(np.argmax(wrong))
            raise BadInput(f"Row {row} of the history {what}: {_row(history[row])}.")
    return history


def committed(history: History) -> Mask:
    """Mark the writes and deletes that the kernel acknowledged: in force from ``end_ns`` on."""
    mask: Mask = applied(history) & (history["end_ns"] != PENDING)
    return mask


def applied(history: History) -> Mask:
    """Mark the writes and deletes that did or may take effect: all but the refused ones."""
    mask: Mask = (history["op"] != Op.READ) & (history["outcome"] == 0)
    return mask


def placeable(history: History) -> Mask:
    """Mark the reads that have a place in the key's order: answered, and not torn."""
    answered = np.isin(history["outcome"], (0, -errno.ENOENT))
    mask: Mask = (history["op"] == Op.READ) & answered & history["intact"]
    return mask


def to_frame(history: History) -> pd.DataFrame:
    """Return the history as a data frame with the columns and dtypes of `HISTORY`."""
    _require_dtype(history)
    return pd.DataFrame({name: history[name] for name in HISTORY.names or ()})


def from_frame(frame: pd.DataFrame) -> History:
    """Return a valid history from a data frame that has the columns of `HISTORY`.

    Raises
    ------
    BadInput
        When a column is missing, a number does not fit, or `validate` refuses the rows.
    """
    names = HISTORY.names or ()
    if missing := [name for name in names if name not in frame.columns]:
        raise BadInput(f"The history lacks the column {' and '.join(missing)}.")
    history = np.zeros(len(frame), HISTORY)
    for name in names:
        history[name] = _fitting(name, frame[name].to_numpy())
    return validate(history)


def _fitting(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Convert one column, refusing what would change by it."""
    target = HISTORY[name]
    if target == np.bool_:
        if array.dtype != np.bool_:
            raise BadInput(f"The column {name} of a history is true or false, not {array.dtype}.")
        return array
    if array.size == 0:
        return array.astype(target)
    if array.dtype.kind not in "iu":
        raise BadInput(f"The column {name} of a history is {target}, not {array.dtype}.")
    limits = np.iinfo(target)
    low, high = int(array.min()), int(array.max())
    if low < limits.min or high > limits.max:
        raise BadInput(
            f"The column {name} of a history is {target}, {low if low < limits.min else high} "
            f"does not fit."
        )
    return array.astype(target)


def _repeated(history: History, rows: Mask) -> Mask:
    """Mark, among the given rows, those whose key and version an earlier row has."""
    chosen = np.flatnonzero(rows)
    order = chosen[np.lexsort((history["version"][chosen], history["key"][chosen]))]
    key, version = history["key"][order], history["version"][order]
    mask = np.zeros(len(history), np.bool_)
    mask[order[1:][(key[1:] == key[:-1]) & (version[1:] == version[:-1])]] = True
    return mask


def _require_dtype(history: History) -> None:
    if getattr(history, "dtype", None) != HISTORY or history.ndim != 1:
        raise BadInput("A history is a one-dimensional array of dtype HISTORY; see history.build.")


def _row(row: Any) -> str:
    return ", ".join(f"{name} {row[name]}" for name in HISTORY.names or ())
