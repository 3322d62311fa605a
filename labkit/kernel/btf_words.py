"""Values in words by their BTF, where NumPy has none: names of enumerators, bit fields, unions.

They are shown as bpftool shows them (tools/bpf/bpftool/btf_dumper.c): an enumerator by its name, or
its number where it has none; a bit field as a hexadecimal number without a sign.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Final

from labkit.kernel import btf

Words = Callable[[bytes], str]

_INT, _ARRAY, _STRUCT, _UNION, _ENUM, _FLOAT, _ENUM64 = 1, 3, 4, 5, 6, 16, 19
_ENUMERATOR: Final = struct.Struct("=Ii")
_ENUMERATOR64: Final = struct.Struct("=IIi")
_DEEPEST: Final = 32  # nested types; the kernel accepts no more than that (MAX_RESOLVE_DEPTH)
_MOST_ELEMENTS: Final = 64  # of an array that are shown
_MOST_SHOWN: Final = 8192  # of all parts: a few types that contain each other twice are very many


def words_of(btf_id: int, type_id: int) -> Words | None:
    """How to say a value of a BTF type that has an enumeration, bit fields or a union in it.

    Parameters
    ----------
    btf_id, type_id : int
        As for `labkit.kernel.btf.dtype_of`.

    Returns
    -------
    callable or None
        Takes the value's bytes, all of them, and answers one line. None where there is no BTF, or
        where a NumPy dtype says as much.
    """
    with btf._of_map(btf_id, type_id) as types:
        if not types:
            return None
        reader = _Reader(types)
        words = reader.words(type_id, 0)
        return words if reader.needed else None


class _Reader:
    """Makes the words of a type; afterwards the BTF is not needed any more."""

    def __init__(self, types: int) -> None:
        self._types = types
        self.needed = False
        self._shown = 0

    def words(self, type_id: int, depth: int, times: int = 1) -> Words:
        one = btf._resolved(self._types, type_id)
        self._shown += times
        if depth > _DEEPEST or self._shown > _MOST_SHOWN:
            return lambda raw: "..."
        if one.kind in (_ENUM, _ENUM64):
            self.needed = True
            return self._enumeration(one)
        if one.kind in (_STRUCT, _UNION):
            self.needed |= one.kind == _UNION
            return self._struct(one, depth, times)
        if one.kind == _ARRAY:
            return self._array(one, depth, times)
        if one.kind == _INT:
            encoding = ctypes.c_uint32.from_address(one.behind).value
            if (width := encoding & 0xFF) != one.size * 8:
                self.needed = True
                return _bits(encoding >> 16 & 0xFF, width)
            signed = bool(encoding >> 24 & 1)
            return lambda raw: str(int.from_bytes(raw[: one.size], "little", signed=signed))
        if one.kind == _FLOAT and one.size in (4, 8):
            form = struct.Struct("=f" if one.size == 4 else "=d")
            return lambda raw: repr(form.unpack_from(raw)[0])
        size = self._size(type_id)
        return lambda raw: raw[:size].hex()

    def _enumeration(self, one: btf._Type) -> Words:
        wide = one.kind == _ENUM64
        form = _ENUMERATOR64 if wide else _ENUMERATOR
        raw = ctypes.string_at(one.behind, one.members * form.size)
        names: dict[int, str] = {}
        for name, *number in form.iter_unpack(raw):
            value = number[0] if not wide else number[0] | number[1] << 32
            names.setdefault(value % (1 << 8 * one.size), btf._name(self._types, name))

        def words(raw: bytes) -> str:
            # Without a sign only where 64 bits are declared so.
            number = int.from_bytes(raw[: one.size], "little", signed=one.has_widths or not wide)
            return names.get(number % (1 << 8 * one.size), str(number))

        return words

    def _struct(self, one: btf._Type, depth: int, times: int) -> Words:
        members: list[tuple[str, int, Words]] = []
        for i, of in enumerate(btf._members(self._types, one)):
            at, within = divmod(of.offset, 8)
            if self._shown > _MOST_SHOWN:
                members.append(("more", at, lambda raw: "..."))
                break
            if of.width:
                self.needed = True
                words = _bits(within, of.width)
                self._shown += times
            else:
                words = self.words(of.type_id, depth + 1, times)
            members.append((of.name or f"_anonymous{i}", at, words))
        return lambda raw: (
            "{" + ", ".join(f"{name}: {words(raw[at:])}" for name, at, words in members) + "}"
        )

    def _array(self, one: btf._Type, depth: int, times: int) -> Words:
        element, count = btf._element(one)
        size = self._size(element)
        shown = range(min(count, _MOST_ELEMENTS) if size else 0)
        words = self.words(element, depth + 1, times * max(1, len(shown)))
        more = ", ..." if count > _MOST_ELEMENTS else ""
        return lambda raw: "[" + ", ".join(words(raw[i * size :]) for i in shown) + more + "]"

    def _size(self, type_id: int) -> int:
        return btf._size(self._types, type_id, 0)


def _bits(at: int, width: int) -> Words:
    """Say bits of a little-endian number, from bit ``at`` on."""
    size, mask = -(-(at + width) // 8), (1 << width) - 1
    return lambda raw: hex(int.from_bytes(raw[:size], "little") >> at & mask)
