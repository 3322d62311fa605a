"""Changes of a map: what every strategy delivers, as NumPy structured arrays."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput
from labkit.kernel.maps import Map

Changes = npt.NDArray[np.void]
"""Rows of `change_dtype`."""


class ChangeKind(IntEnum):
    """What happened to a key. 0 is neither, so that a row never filled in is noticed."""

    UPDATE = 1
    DELETE = 2


def change_dtype(key: npt.DTypeLike, value: npt.DTypeLike) -> np.dtype[np.void]:
    """Layout of one change of a map with these keys and values.

    Parameters
    ----------
    key, value : dtype-like
        Layouts of the map.

    Returns
    -------
    numpy.dtype
        Fields ``kind`` (uint8, `ChangeKind`), ``key``, ``version`` (uint64, only grows per
        key), ``committed_ns`` (uint64, when the kernel had applied it; 0 where the strategy
        cannot know), ``seen_ns`` (uint64, when the follower first could return it), both
        CLOCK_MONOTONIC nanoseconds, and ``value`` (zeros for a delete).
    """
    return np.dtype(
        [
            ("kind", np.uint8),
            ("key", key),
            ("version", np.uint64),
            ("committed_ns", np.uint64),
            ("seen_ns", np.uint64),
            ("value", value),
        ]
    )


def versions_of(values: npt.NDArray[Any], field: str) -> npt.NDArray[np.uint64]:
    """Versions that values carry.

    Parameters
    ----------
    values : numpy.ndarray, shape (n,)
        Of a structured dtype with the field, or plain integers which are the version.
    field : str
        Name of the version field.

    Returns
    -------
    numpy.ndarray
        uint64, shape ``(n,)``.
    """
    column = values[field] if values.dtype.names else values
    return column.astype(np.uint64)


def require_version(table: Map, field: str) -> None:
    """Refuse a map whose values carry no version.

    Raises
    ------
    BadInput
        The value has no unsigned integer field of that name, and is none itself.
    """
    dtype = table.value_dtype
    known = dtype.fields[field][0] if dtype.fields and field in dtype.fields else dtype
    if known.kind != "u" or known.itemsize > 8:
        raise BadInput(
            f"Values of map {table.name} (id {table.id}) carry no version: name an unsigned "
            f"integer field of {dtype} that only grows with each write of a key."
        )
