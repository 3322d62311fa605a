"""Sizes and layouts are refused before any call reaches the kernel."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.errors import BadInput
from labkit.kernel.maps import encode, to_bytes

PADDED = np.dtype({"names": ["a", "b"], "formats": ["u1", "u4"], "offsets": [0, 4], "itemsize": 8})
NESTED = np.dtype([("head", PADDED), ("words", "u8", (2,))])


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_integers_survive(numbers: list[int]) -> None:
    packed = encode(numbers, np.dtype("u4"), "key")
    assert packed.tolist() == numbers


@given(st.binary(min_size=8, max_size=8))
def test_padding_of_a_given_array_is_zeroed(raw: bytes) -> None:
    dirty = np.frombuffer(raw, PADDED)
    packed = encode(dirty, PADDED, "key")
    assert packed["a"] == dirty["a"] and packed["b"] == dirty["b"]
    assert packed.tobytes()[1:4] == b"\0\0\0"


def test_padding_of_nested_structs_is_zeroed() -> None:
    dirty = np.frombuffer(b"\xaa" * NESTED.itemsize, NESTED)
    assert encode(dirty, NESTED, "value").tobytes()[1:4] == b"\0\0\0"


@pytest.mark.parametrize(
    "dtype",
    ["u1", "i4", ">u4", "u8", ">i8", [("a", ">u2"), ("b", "i4")], [("a", "u1"), ("b", "u8")]],
)
@given(data=st.data())
def test_a_single_item_is_packed_as_in_an_array(dtype: Any, data: st.DataObject) -> None:
    layout = np.dtype(dtype)
    fields = [layout[name] for name in layout.names or ()] or [layout]
    numbers = [
        data.draw(st.integers(int(np.iinfo(one).min), int(np.iinfo(one).max))) for one in fields
    ]
    expected = np.zeros(1, layout)
    for name, number in zip(layout.names or (...,), numbers, strict=True):
        expected[name] = number
    item = tuple(numbers) if layout.names else numbers[0]
    assert to_bytes(item, layout, "key") == expected.tobytes()
    with pytest.raises(BadInput, match="does not fit"):
        to_bytes((1 << 64, 0) if layout.names else 1 << 64, layout, "key")


def test_raw_bytes_are_taken_as_they_are() -> None:
    # The caller who gives bytes has said what every byte is, padding too.
    assert encode([b"\xaa" * 8], PADDED, "key").tobytes() == b"\xaa" * 8


def test_a_struct_is_given_as_tuple_dict_or_scalar() -> None:
    wanted = encode([(1, 2)], PADDED, "key")
    assert encode([{"b": 2, "a": 1}], PADDED, "key").tobytes() == wanted.tobytes()
    assert encode([wanted[0]], PADDED, "key").tobytes() == wanted.tobytes()


class Leaf(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint64)]


@pytest.mark.parametrize(
    ("items", "dtype", "word"),
    [
        ([-1], "u8", "must be 0 to"),
        ([1 << 32], "u4", "must be 0 to"),
        (np.array([1 << 40]), "u4", "must be 0 to"),
        ([1.5], "u4", "no whole number"),
        (np.array([1.5]), "u4", "float64"),
        ([b"1234"], "u8", "4 bytes"),
        ([b"123456789"], "V8", "9 bytes"),
        ([5], "V16", "raw bytes"),
        ([(1, 2, 3)], PADDED, "fields"),
        ([()], NESTED, "fields"),
        ([{"a": 1}], PADDED, "fields"),
        ([7], PADDED, "tuple or a dict"),
        ([Leaf(1)], "u8", "ctypes"),
        ([[1, 2, 3]], np.dtype(("u8", (2,))), "shape"),
        (np.zeros(1, [("other", "u4")]), PADDED, "fields"),
        (np.zeros(1, [("a", "u2"), ("b", "u4")]), PADDED, "Field a"),
    ],
)
def test_what_does_not_fit_is_refused(items: Any, dtype: Any, word: str) -> None:
    with pytest.raises(BadInput, match=word) as refused:
        encode(items, np.dtype(dtype), "value")
    assert "\n" not in str(refused.value)
