"""Layouts of maps by their BTF, however foreign; offsets in the running kernel's structs."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy as np
import pytest

from labkit.errors import Unavailable
from labkit.kernel import libbpf
from labkit.kernel.btf import has_member_of, member_offset
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map

pytestmark = pytest.mark.usefixtures("kernel")


def test_members_stand_where_the_kernel_has_them() -> None:
    # The first member of a file's table is a counter, and the fd table comes behind it.
    assert member_offset("files_struct", "count") == 0
    assert member_offset("files_struct", "fdt") > 0
    assert member_offset("list_head", "prev") == 8


def test_a_member_of_an_anonymous_union_counts_as_the_structs_own() -> None:
    assert member_offset("bpf_insn", "imm") == 4
    assert member_offset("sk_buff", "next") == 0  # inside a union of a struct


@pytest.mark.parametrize("names", [("bpf_map", "nonesuch"), ("nonesuch", "id")])
def test_what_this_kernel_has_not_is_told_in_a_sentence(names: tuple[str, str]) -> None:
    with pytest.raises(Unavailable, match="BTF has no member"):
        member_offset(*names)


SIGNED, BOOL, WIDTHS = 1 << 24, 4 << 24, 1 << 31
POINTER, ENUM, VOLATILE, CONST, FLOAT, ENUM64 = 2, 6, 9, 10, 16, 19


class Types:
    """Writes BTF by hand (Documentation/bpf/btf.rst); each method answers the type's id."""

    def __init__(self) -> None:
        self._types: list[bytes] = []
        self._names = b"\0"

    def add(self, kind: int, size: int, *behind: int, name: str = "", info: int = 0) -> int:
        words = [self._name(name), kind << 24 | info, size, *behind]
        self._types.append(struct.pack(f"={len(words)}I", *words))
        return len(self._types)

    def integer(self, size: int, encoding: int = 0, bits: int | None = None) -> int:
        encoding |= size * 8 if bits is None else bits
        return self.add(1, size, encoding, name=f"int{size}")

    def array(self, element: int, count: int) -> int:
        return self.add(3, 0, element, self.integer(4), count)

    def struct(
        self, size: int, *members: tuple[str, int, int], name: str = "s", kind: int = 4,
        widths: int = 0,
    ) -> int:  # fmt: skip
        """Members are name, type and offset in bits."""
        words = [word for label, of, at in members for word in (self._name(label), of, at)]
        return self.add(kind, size, *words, name=name, info=len(members) | widths)

    def _name(self, text: str) -> int:
        if not text:
            return 0
        self._names += text.encode() + b"\0"
        return len(self._names) - len(text) - 1

    def raw(self) -> bytes:
        types = b"".join(self._types)
        ends = (0, len(types), len(types), len(self._names))
        return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, *ends) + types + self._names


def value_of(types: Types, type_id: int, size: int) -> tuple[np.dtype[Any], bool]:
    """Layout of a map's value by such BTF, and whether it says that there is a lock in it."""
    key = types.integer(4)
    raw = types.raw()
    load = libbpf.api().bpf_btf_load
    load.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]
    held = libbpf.checked(load(raw, len(raw), None), "loading BTF")
    try:
        fd = libbpf.map_create(
            MapKind.ARRAY, name="labkit_btf", key_size=4, value_size=size, max_entries=2,
            btf=(held, key, type_id),
        )  # fmt: skip
    finally:
        libbpf.close(held)
    try:
        info = libbpf.map_info(fd)
        assert info.btf_value_type_id == type_id
        with Map.from_fd(fd) as table:
            assert table.key_dtype == np.dtype("u4")
            assert table.snapshot().values.dtype == table.value_dtype
            return table.value_dtype, has_member_of(info.btf_id, type_id, "inner")
    finally:
        libbpf.close(fd)


def test_a_value_has_the_fields_sizes_and_offsets_of_its_struct() -> None:
    types = Types()
    inner = types.struct(
        8, ("small", types.integer(2, SIGNED), 0), ("yes", types.integer(1, BOOL), 32), name="inner"
    )
    members = [
        ("counts", types.array(types.array(types.integer(4), 3), 2), 0),
        ("", types.struct(4, ("hidden", types.integer(4), 0), name=""), 192),
        ("level", types.add(ENUM, 4, name="level"), 224),
        ("ratio", types.add(FLOAT, 8, name="double"), 256),
        ("wide", types.integer(16), 384),
        ("nested", types.add(VOLATILE, types.add(CONST, inner)), 512),
        ("locked", inner, 576),
    ]
    layout, has_inner = value_of(types, types.struct(80, *members), 80)
    nested = np.dtype(
        {"names": ["small", "yes"], "formats": ["i2", "u1"], "offsets": [0, 4], "itemsize": 8}
    )
    formats = [(("u4", 3), 2), [("hidden", "u4")], "u4", "f8", "V16", nested, nested]
    assert layout == np.dtype(
        {
            "names": ["counts", "_anonymous1", "level", "ratio", "wide", "nested", "locked"],
            "formats": formats,
            "offsets": [0, 24, 28, 32, 48, 64, 72],
            "itemsize": 80,
        }
    )
    assert has_inner


def test_a_plain_value_and_a_typedef_have_no_fields() -> None:
    types = Types()
    typedef = types.add(8, types.integer(8, SIGNED), name="s64")
    assert value_of(types, typedef, 8) == (np.dtype("i8"), False)


def test_numbers_that_numpy_does_not_have_are_bytes_among_the_other_fields() -> None:
    types = Types()
    members = [
        ("three", types.integer(3), 0),
        ("twelve", types.add(FLOAT, 12, name="x87"), 64),
        ("last", types.integer(4), 160),
    ]
    layout, _ = value_of(types, types.struct(24, *members), 24)
    assert layout == np.dtype(
        {
            "names": ["three", "twelve", "last"],
            "formats": ["V3", "V12", "u4"],
            "offsets": [0, 8, 20],
            "itemsize": 24,
        }
    )


@pytest.mark.parametrize(
    "what",
    ["one name twice", "bit field", "old bit field", "union", "pointer", "enum64", "made-up name"],
)
def test_what_numpy_cannot_express_is_bytes(what: str) -> None:
    types = Types()
    word = types.integer(4)
    members, widths, kind = [("a", word, 0), ("b", word, 32), ("c", word, 64)], 0, 4
    if what == "one name twice":
        members[2] = ("a", word, 64)
    elif what == "bit field":
        members[1], widths = ("b", word, 5 << 24 | 32), WIDTHS
    elif what == "old bit field":
        members[1] = ("b", types.integer(4, bits=5), 32)
    elif what == "union":
        members, kind = [("a", word, 0), ("b", types.array(word, 3), 0)], 5
    elif what == "pointer":
        members = [("a", word, 0), ("b", types.add(POINTER, word), 32)]
    elif what == "enum64":
        members[1:] = [("b", types.add(ENUM64, 8, name="wide"), 32)]
    else:  # the name that we would give the second field
        members[:2] = [("_anonymous1", word, 0), ("", types.struct(4, ("x", word, 0), name=""), 32)]
    layout, _ = value_of(types, types.struct(12, *members, kind=kind, widths=widths), 12)
    assert layout == np.dtype("V12")
