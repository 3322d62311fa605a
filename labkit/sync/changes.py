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

    It is the layout of ``struct change_event`` (bpf/change_event.h) under other names, so that
    events become changes by one copy; key and value stand eight bytes aligned.

    Parameters
    ----------
    key, value : dtype-like
        Layouts of the map.

    Returns
    -------
    numpy.dtype
        Fields ``seen_ns`` (uint64, when the follower's replica first could return it),
        ``version`` (uint64, only grows per key), ``committed_ns`` (uint64, when the kernel had
        applied it; 0 where the strategy cannot know), both times CLOCK_MONOTONIC nanoseconds,
        ``kind`` (uint8, `ChangeKind`), ``key``, and ``value`` (zeros for a delete).
    """
    key, value = np.dtype(key), np.dtype(value)
    at = 32 + _words(key)
    return np.dtype(
        {
            "names": ["seen_ns", "version", "committed_ns", "kind", "key", "value"],
            "formats": [np.uint64, np.uint64, np.uint64, np.uint8, key, value],
            "offsets": [0, 8, 16, 24, 32, at],
            "itemsize": at + _words(value),
        }
    )


def event_dtype(key: npt.DTypeLike, value: npt.DTypeLike) -> np.dtype[np.void]:
    """Layout of ``struct change_event`` in bpf/change_event.h, as it stands in a ring.

    Parameters
    ----------
    key, value : dtype-like
        Layouts of the map.

    Returns
    -------
    numpy.dtype
        ``seq`` (uint64, how many changes the source had produced before this one), ``version``,
        ``committed_ns``, ``kind`` as in `change_dtype`, ``program`` (uint8) and ``cpu`` (uint16)
        which together are the source, ``dropped`` (uint32, how many of the source's changes had
        found no room before this one, modulo 2**32), ``key`` and ``value``.
    """
    key, value = np.dtype(key), np.dtype(value)
    at = 32 + _words(key)
    u1, u2, u4, u8 = (np.dtype(f"u{size}") for size in (1, 2, 4, 8))
    return np.dtype(
        {
            "names": [
                "seq", "version", "committed_ns", "kind", "program", "cpu", "dropped",
                "key", "value",
            ],
            "formats": [u8, u8, u8, u1, u1, u2, u4, key, value],
            "offsets": [0, 8, 16, 24, 25, 26, 28, 32, at],
            "itemsize": at + _words(value),
        }
    )  # fmt: skip


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
            f"integer field of {dtype} that only grows with each write of a key, or version=None."
        )


def _words(dtype: np.dtype[Any]) -> int:
    """Bytes of the dtype, rounded up to whole words."""
    return -(-dtype.itemsize // 8) * 8
