"""BTF that nobody checked: any bytes are read, or refused in a sentence; never a traceback."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.errors import BadInput, Unavailable
from labkit.kernel import libbpf
from labkit.kernel.btf import Field, dtype_in, fields_in, opened

SIGNED, WIDTHS = 1 << 24, 1 << 31
INT, POINTER, ARRAY, STRUCT, UNION, ENUM, FORWARD, TYPEDEF, FLOAT = 1, 2, 3, 4, 5, 6, 7, 8, 16


@pytest.fixture(autouse=True, scope="module")
def libbpf_is_there() -> None:
    try:
        libbpf.api()
    except Unavailable as reason:
        pytest.skip(str(reason))


def blob(types: list[tuple[int, int, int, tuple[int, ...]]], names: bytes) -> bytes:
    """BTF of types (name, info, size, words behind the head) and their names."""
    raw = b"".join(
        struct.pack(f"={3 + len(behind)}I", name, info, size, *behind)
        for name, info, size, behind in types
    )
    head = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(raw), len(raw), len(names))
    return head + raw + names


def read(raw: bytes, most: int = 24) -> int:
    """Read every type of a blob, and its fields; how many there were, 0 where it was refused."""
    count = 0
    try:
        with opened(raw) as types:
            for type_id in range(1, most):
                layout, fields = dtype_in(types, type_id), fields_in(types, type_id)
                assert layout is None or isinstance(layout, np.dtype)
                assert len(fields) <= 256
                count += layout is not None
    except BadInput as error:
        assert "are no BTF" in str(error)
    return count


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_any_bytes_are_refused_or_read(raw: bytes) -> None:
    read(raw)


SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, 12, 16, 17, 1 << 20, 0xFFFFFFFF])
IDS = st.integers(0, 12)
NAMES = b"\0a\0char\0field\0\xff\n\0"
NAME = st.sampled_from([0, 1, 3, 8, 14, 5000])
OFFSET = st.one_of(st.sampled_from([0, 8, 32, 64]), st.integers(0, 0xFFFFFFFF))


@st.composite
def one_type(draw: st.DrawFn) -> tuple[int, int, int, tuple[int, ...]]:
    kind = draw(st.sampled_from([INT, POINTER, ARRAY, STRUCT, STRUCT, STRUCT, UNION, ENUM, FORWARD,
                                 TYPEDEF, FLOAT]))  # fmt: skip
    name, info = draw(NAME), kind << 24
    if kind == INT:
        bits = draw(st.sampled_from([1, 5, 8, 24, 32, 64, 128, 255]))
        return name, info, draw(SIZES), (draw(st.sampled_from([0, SIGNED])) | bits,)
    if kind == ARRAY:
        count = draw(st.one_of(st.integers(0, 4), st.sampled_from([1 << 16, 0xFFFFFFFF])))
        return name, info, 0, (draw(IDS), draw(IDS), count)
    if kind in (STRUCT, UNION):
        members = draw(st.lists(st.tuples(NAME, IDS, OFFSET), max_size=4))
        widths = draw(st.sampled_from([0, WIDTHS]))
        return name, info | widths | len(members), draw(SIZES), tuple(sum(members, ()))
    if kind in (POINTER, TYPEDEF):
        return name, info, draw(IDS), ()
    return name, info, draw(SIZES), ()


@given(st.lists(one_type(), min_size=1, max_size=12))
@settings(max_examples=600)
def test_types_that_contradict_themselves_or_each_other(
    types: list[tuple[int, int, int, tuple[int, ...]]],
) -> None:
    read(blob(types, NAMES))


@given(st.data())
@settings(max_examples=300)
def test_a_sound_blob_of_which_some_bytes_were_changed(data: st.DataObject) -> None:
    raw = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    read(bytes(raw))


_S = b"\0char\0u32\0comm\0dev\0inner\0ends\0"
_AT = {name: _S.index(b"\0" + name.encode() + b"\0") + 1 for name in
       ("char", "u32", "comm", "dev", "inner", "ends")}  # fmt: skip
SOUND = blob(
    [
        (_AT["char"], INT << 24, 1, (SIGNED | 8,)),  # 1
        (_AT["u32"], INT << 24, 4, (32,)),  # 2
        (0, ARRAY << 24, 0, (1, 2, 8)),  # 3: char[8]
        (0, STRUCT << 24 | 2, 12, (_AT["comm"], 3, 0, _AT["dev"], 2, 64)),  # 4
        (0, ARRAY << 24, 0, (4, 2, 2)),  # 5: two of them
        (0, STRUCT << 24 | 2, 28, (_AT["ends"], 5, 0, _AT["dev"], 2, 192)),  # 6
        (0, STRUCT << 24 | 2, 8, (_AT["dev"], 2, 0, _AT["dev"], 2, 32)),  # 7: one name twice
        (0, STRUCT << 24 | WIDTHS | 1, 4, (_AT["dev"], 2, 5 << 24 | 3)),  # 8: a bit field
        (0, UNION << 24 | 1, 4, (_AT["dev"], 2, 0)),  # 9
    ],
    _S,
)


def test_fields_of_nested_structs_have_their_path_type_and_place() -> None:
    with opened(SOUND) as types:
        assert fields_in(types, 2) == (Field("", "u32", 0, 4, False, True),)
        assert fields_in(types, 6) == (
            Field("ends[0].comm", "char[8]", 0, 8, True, False),
            Field("ends[0].dev", "u32", 8, 4, False, True),
            Field("ends[1].comm", "char[8]", 12, 8, True, False),
            Field("ends[1].dev", "u32", 20, 4, False, True),
            Field("dev", "u32", 24, 4, False, True),
        )
        assert fields_in(types, 8) == (Field("dev", "bytes[1]", 0, 1, False, False),)
        assert fields_in(types, 9) == (Field("", "bytes[4]", 0, 4, False, False),)
        assert dtype_in(types, 7) is None and len(fields_in(types, 7)) == 2


def test_a_struct_within_itself_and_one_of_empty_arrays_end() -> None:
    itself = (0, STRUCT << 24 | 2, 8, (0, 1, 0, 0, 1, 0))
    empty = (0, ARRAY << 24, 0, (3, 3, 0))
    many = (0, STRUCT << 24 | 60_000, 8, (0, 2, 0) * 60_000)
    outer = (0, STRUCT << 24 | 60_000, 8, (0, 3, 0) * 60_000)
    assert read(blob([itself, empty, many, outer], b"\0"), most=5) == 0
