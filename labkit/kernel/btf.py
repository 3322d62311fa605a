"""Layouts from BTF: a map's key and value as NumPy dtypes, and the kernel's own structs.

libbpf fetches and checks the BTF; the fields of its types are those of ``linux/btf.h``.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np

from labkit.errors import BadInput, Unavailable
from labkit.kernel import libbpf

_INT, _POINTER, _ARRAY, _STRUCT, _ENUM, _FUNCTION, _FLOAT = 1, 2, 3, 4, 6, 12, 16
_WORDS = struct.Struct("=III")  # the head of every type, each member, and an array
_SIGNED: Final = 1 << 24
_DEEPEST: Final = 32  # the kernel takes no deeper nesting (kernel/bpf/btf.c, MAX_RESOLVE_DEPTH)
_MOST_FIELDS: Final = 256
_MOST_MEMBERS: Final = 4096


class _Inexpressible(Exception):
    """NumPy has no dtype for this type, or the BTF contradicts itself."""


class Field(NamedTuple):
    """One field of a type, nested structs opened.

    Attributes
    ----------
    path : str
        As in C: ``inner.name``, ``ends[1].port``; empty where the type is no struct.
    type_name : str
        ``u32``, ``char[8]``; ``bytes[12]`` for what is not opened (a union, bit fields).
    offset, size : int
        Bytes, from the start of the type.
    is_text : bool
        An array of ``char``.
    is_integer : bool
        One integer, no bit field.
    """

    path: str
    type_name: str
    offset: int
    size: int
    is_text: bool
    is_integer: bool


class _Type(NamedTuple):
    name: str
    kind: int
    size: int
    behind: int  # address of what follows the head
    members: int  # how many follow the head
    has_widths: bool  # each member's place has the width of a bit field in its upper byte


class _Layout(NamedTuple):
    dtype: np.dtype[Any]
    scalars: int = 1  # that are shown, those of nested structs and arrays among them


class _Member(NamedTuple):
    name: str
    type_id: int
    offset: int  # bits
    width: int  # bits of a bit field; 0 where it is none


def dtype_of(btf_id: int, type_id: int) -> np.dtype[Any] | None:
    """Layout of a BTF type as a NumPy dtype, with the offsets of the C struct.

    Parameters
    ----------
    btf_id : int
        Id of the BTF object that the map carries (``bpf_map_info.btf_id``).
    type_id : int
        Type id within it (``btf_key_type_id`` or ``btf_value_type_id``).

    Returns
    -------
    numpy.dtype or None
        Integers and floats that NumPy does not have are raw bytes. None where the map has no
        BTF, or the type has no NumPy counterpart (a union, bit fields, a pointer, two fields of
        one name, more than 4,096 fields).
    """
    with _of_map(btf_id, type_id) as types:
        return dtype_in(types, type_id) if types else None


def dtype_in(types: int, type_id: int) -> np.dtype[Any] | None:
    """Layout of a type in BTF that is open: see `dtype_of` and `opened`."""
    try:
        return _layout(types, type_id, {}).dtype
    except _Inexpressible:
        return None


def fields_of(btf_id: int, type_id: int) -> tuple[Field, ...]:
    """Fields of a BTF type, in the order of the C struct.

    Parameters
    ----------
    btf_id, type_id : int
        As for `dtype_of`.

    Returns
    -------
    tuple of Field
        256 at most. Empty where the map has no BTF, or its BTF contradicts itself.
    """
    with _of_map(btf_id, type_id) as types:
        return fields_in(types, type_id) if types else ()


def fields_in(types: int, type_id: int) -> tuple[Field, ...]:
    """Fields of a type in BTF that is open: see `fields_of` and `opened`."""
    found: list[Field] = []
    try:
        for one in _fields(types, type_id, "", 0, 0):
            found.append(one)
            if len(found) == _MOST_FIELDS:
                break
    except _Inexpressible:
        return ()
    return tuple(found)


@contextmanager
def opened(raw: bytes) -> Iterator[int]:
    """Open BTF that stands in memory, as an object file or ``/sys/kernel/btf`` has it.

    Parameters
    ----------
    raw : bytes
        Header, types and strings.

    Yields
    ------
    int
        libbpf's handle, for `dtype_in` and `fields_in`.

    Raises
    ------
    BadInput
        These bytes are no BTF.
    """
    lib = libbpf.api()
    types = lib.btf__new(raw, len(raw))
    if not types:
        raise BadInput(
            f"These {len(raw):,} bytes are no BTF: give the section .BTF of an object file."
        )
    try:
        yield types
    finally:
        lib.btf__free(types)


def has_member_of(btf_id: int, type_id: int, struct_name: str) -> bool:
    """Whether a struct has a member that is a struct of this name, such as ``bpf_spin_lock``.

    Parameters
    ----------
    btf_id, type_id : int
        As for `dtype_of`; False where either is 0.
    struct_name : str
        Of the member's type.
    """
    with _of_map(btf_id, type_id) as types:
        if not types:
            return False
        try:
            one = _resolved(types, type_id)
            members = _members(types, one) if one.kind == _STRUCT else ()
            return any(_type(types, of.type_id).name == struct_name for of in members)
        except _Inexpressible:
            return False


@functools.cache
def member_offset(struct_name: str, member: str) -> int:
    """Where a member stands in a struct of the running kernel.

    Parameters
    ----------
    struct_name, member : str
        As in the kernel's C: ``"bpf_map"``, ``"id"``. Members of anonymous structs and unions
        inside it count as its own.

    Returns
    -------
    int
        Offset in bytes.

    Raises
    ------
    Unavailable
        The kernel shows no BTF, or it has no such member.
    """
    kernel = _kernel_btf()
    type_id = libbpf.api().btf__find_by_name_kind(kernel, struct_name.encode(), _STRUCT)
    bits = None if type_id < 0 else _member_bits(kernel, type_id, member)
    if bits is None:
        raise Unavailable(
            f"This kernel's BTF has no member {member} in struct {struct_name}: what needs it "
            "was written for another kernel."
        )
    return bits // 8


def kernel_function(type_id: int) -> str:
    """Name of a function in the kernel's own BTF.

    Parameters
    ----------
    type_id : int
        Such as ``attach_btf_id`` of a program.

    Returns
    -------
    str
        Empty where that is no function.

    Raises
    ------
    Unavailable
        The kernel shows no BTF.
    """
    kernel = _kernel_btf()
    known = type_id > 0 and libbpf.api().btf__type_by_id(kernel, type_id)
    one = _type(kernel, type_id) if known else None
    return one.name if one and one.kind == _FUNCTION else ""


@functools.cache
def _kernel_btf() -> int:
    # Kept for the life of the process: it is parsed once, and every answer comes from it.
    found = libbpf.api().btf__load_vmlinux_btf()
    if not found:
        raise Unavailable(
            "This kernel shows no BTF (/sys/kernel/btf/vmlinux): it must be built with "
            "CONFIG_DEBUG_INFO_BTF."
        )
    return int(found)


def _member_bits(kernel: int, type_id: int, name: str) -> int | None:
    for one in _members(kernel, _type(kernel, type_id)):
        if one.name == name:
            return one.offset
        if not one.name and (below := _member_bits(kernel, one.type_id, name)) is not None:
            return one.offset + below
    return None


@contextmanager
def _of_map(btf_id: int, type_id: int) -> Iterator[int | None]:
    """The BTF that a map carries, as libbpf holds it; None where there is none to be had."""
    lib = libbpf.api()
    types = lib.btf__load_from_kernel_by_id(btf_id) if btf_id and type_id else None
    try:
        yield types
    finally:
        lib.btf__free(types)


def _type(types: int, type_id: int) -> _Type:
    at = libbpf.api().btf__type_by_id(types, type_id)
    if not at:
        raise _Inexpressible(f"there is no type {type_id}")
    name, info, size = _WORDS.unpack(ctypes.string_at(at, _WORDS.size))
    return _Type(
        _name(types, name),
        kind=info >> 24 & 0x1F,
        size=size,
        behind=at + _WORDS.size,
        members=info & 0xFFFF,
        has_widths=bool(info >> 31),
    )


def _resolved(types: int, type_id: int) -> _Type:
    """A type behind its typedefs and qualifiers; type 0 is void, which resolves to nothing."""
    found = libbpf.api().btf__resolve_type(types, type_id)
    return _type(types, found if found > 0 else 0)


def _members(types: int, one: _Type) -> Iterator[_Member]:
    """Members of a struct or union."""
    raw = ctypes.string_at(one.behind, one.members * _WORDS.size)
    for name, type_id, place in _WORDS.iter_unpack(raw):
        offset, width = (place & 0xFFFFFF, place >> 24) if one.has_widths else (place, 0)
        yield _Member(_name(types, name), type_id, offset, width)


def _name(types: int, offset: int) -> str:
    found = libbpf.api().btf__name_by_offset(types, offset)
    if found is None:
        raise _Inexpressible(f"there is no name at {offset}")
    return libbpf.shown(found)


def _layout(types: int, type_id: int, known: dict[int, _Layout], depth: int = 0) -> _Layout:
    """Layout of a type; ``known`` has those that were met before, however often they are nested."""
    if type_id not in known:
        if depth > _DEEPEST:
            raise _Inexpressible("nested too deep, or within itself")
        try:
            found = _new_layout(types, type_id, known, depth)
        except (ValueError, TypeError, OverflowError, MemoryError) as error:
            raise _Inexpressible(str(error)) from None  # a member outside, a size beyond an int
        # The kernel lets members overlap: a few nested structs of one byte have fields without end.
        if found.scalars > max(found.dtype.itemsize, _MOST_MEMBERS):
            raise _Inexpressible("more fields than bytes")
        known[type_id] = found
    return known[type_id]


def _new_layout(types: int, type_id: int, known: dict[int, _Layout], depth: int) -> _Layout:
    one = _resolved(types, type_id)
    if one.kind == _INT:
        encoding = _integer_encoding(one)
        if encoding & 0xFF != one.size * 8:
            raise _Inexpressible("an integer with some bits of its bytes: an old bit field")
        return _Layout(_number("i" if encoding & _SIGNED else "u", one.size))
    if one.kind == _ENUM:
        return _Layout(_number("u", one.size))
    if one.kind == _FLOAT:
        return _Layout(_number("f", one.size))
    if one.kind == _ARRAY:
        element, count = _element(one)
        each = _layout(types, element, known, depth + 1)
        return _Layout(np.dtype((each.dtype, (count,))), each.scalars * count)
    if one.kind != _STRUCT:
        raise _Inexpressible(f"BTF kind {one.kind}")
    if one.members > _MOST_MEMBERS:
        raise _Inexpressible("more members than any table has columns")
    if one.size == 0:  # a few that contain each other twice would take for ever to be shown
        raise _Inexpressible("a struct without bytes")
    members = list(_members(types, one))
    names = [member.name or f"_anonymous{i}" for i, member in enumerate(members)]
    if len(set(names)) < len(names) or any(of.width or of.offset % 8 for of in members):
        raise _Inexpressible("two fields of one name, or bit fields")
    inner = [_layout(types, member.type_id, known, depth + 1) for member in members]
    dtype = np.dtype(
        {
            "names": names,
            "formats": [each.dtype for each in inner],
            "offsets": [member.offset // 8 for member in members],
            "itemsize": one.size,
        }
    )
    # Each member is shown, also an array without elements.
    return _Layout(dtype, sum(max(1, each.scalars) for each in inner))


def _number(kind: str, size: int) -> np.dtype[Any]:
    try:
        return np.dtype(f"{kind}{size}")
    except TypeError:  # an integer of 3 or 16 bytes, a float of 12
        return np.dtype(f"V{size}")


def _integer_encoding(one: _Type) -> int:
    return ctypes.c_uint32.from_address(one.behind).value


def _element(one: _Type) -> tuple[int, int]:
    """Type of an array's elements, and how many there are."""
    element, _, count = _WORDS.unpack(ctypes.string_at(one.behind, _WORDS.size))
    return element, count


def _fields(types: int, type_id: int, path: str, at: int, depth: int) -> Iterator[Field]:
    if depth > _DEEPEST:
        raise _Inexpressible("nested too deep, or within itself")
    one = _resolved(types, type_id)
    # Each step tells of one field at least, so that whoever stops at a number of them ends.
    if one.kind == _STRUCT and one.members:
        for i, member in enumerate(_members(types, one)):
            inner = ".".join(filter(None, (path, member.name or f"_anonymous{i}")))
            start = at + member.offset // 8
            if member.width or member.offset % 8:
                size = -(-(member.offset % 8 + member.width) // 8)
                yield _opaque(inner, start, size)
            else:
                yield from _fields(types, member.type_id, inner, start, depth + 1)
    elif one.kind == _ARRAY:
        yield from _elements(types, one, path, at, depth)
    elif one.kind in (_INT, _ENUM):
        whole = one.kind == _ENUM or _integer_encoding(one) & 0xFF == one.size * 8
        sign = "i" if one.kind == _INT and _integer_encoding(one) & _SIGNED else "u"
        yield Field(path, f"{sign}{8 * one.size}", at, one.size, False, whole)
    elif one.kind == _FLOAT:
        yield Field(path, f"f{8 * one.size}", at, one.size, False, False)
    else:
        yield _opaque(path, at, _size(types, type_id, depth))


def _elements(types: int, one: _Type, path: str, at: int, depth: int) -> Iterator[Field]:
    element, count = _element(one)
    inner, size = _resolved(types, element), _size(types, element, depth + 1)
    if inner.kind == _STRUCT and size and count:
        for i in range(min(count, _MOST_FIELDS)):
            yield from _fields(types, element, f"{path}[{i}]", at + i * size, depth + 1)
    elif inner.kind == _INT and inner.name == "char" and inner.size == 1:
        yield Field(path, f"char[{count}]", at, count, True, False)
    else:
        yield _opaque(path, at, size * count)


def _opaque(path: str, at: int, size: int) -> Field:
    return Field(path, f"bytes[{size}]", at, size, False, False)


def _size(types: int, type_id: int, depth: int) -> int:
    """Bytes of a type; a pointer has eight."""
    if depth > _DEEPEST:
        raise _Inexpressible("nested too deep, or within itself")
    one = _resolved(types, type_id)
    if one.kind == _ARRAY:
        element, count = _element(one)
        return count * _size(types, element, depth + 1)
    return 8 if one.kind == _POINTER else one.size
