"""Layouts from BTF: a map's key and value as NumPy dtypes, and the kernel's own structs."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from labkit.errors import Unavailable
from labkit.kernel import libbpf

_INT, _ARRAY, _STRUCT, _UNION, _ENUM, _TYPEDEF = 1, 3, 4, 5, 6, 8
_PASSED_THROUGH = {_TYPEDEF, 9, 10, 11, 18}  # typedef, volatile, const, restrict, type tag
_FLOAT = 16
_HEADER = struct.Struct("=HBBIIIII")
# Bytes behind the common head of a type, by BTF kind (Documentation/bpf/btf.rst).
_TAIL_BYTES = {1: 4, 3: 12, 14: 4, 17: 4}
_MEMBER_BYTES = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}


class _BtfInfo(ctypes.Structure):
    _fields_ = [
        ("btf", ctypes.c_uint64),
        ("btf_size", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("name", ctypes.c_uint64),
        ("name_len", ctypes.c_uint32),
        ("kernel_btf", ctypes.c_uint32),
    ]


@dataclass(frozen=True)
class _Type:
    name: str
    kind: int
    size: int  # or the id of the type that it refers to
    kflag: bool
    tail: bytes


def dtype_of(btf_id: int, type_id: int) -> np.dtype[np.void] | None:
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
        None where the map has no BTF, or the type has no NumPy counterpart
        (unions, bit fields).
    """
    if not btf_id or not type_id:
        return None
    try:
        return _layout(_types(btf_id), type_id)
    except (OSError, NotImplementedError):
        return None


def has_member_of(btf_id: int, type_id: int, struct_name: str) -> bool:
    """Whether a struct has a member that is a struct of this name, such as ``bpf_spin_lock``.

    Parameters
    ----------
    btf_id, type_id : int
        As for `dtype_of`; False where either is 0.
    struct_name : str
        Of the member's type.
    """
    if not btf_id or not type_id:
        return False
    try:
        types = _types(btf_id)
    except OSError:
        return False
    while types[type_id].kind in _PASSED_THROUGH:
        type_id = types[type_id].size
    one = types[type_id]
    return isinstance(one, _Struct) and any(
        types[member].name == struct_name for _, member, _ in one.members
    )


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
    lib = libbpf.api()
    kernel = _kernel_btf()
    type_id = lib.btf__find_by_name_kind(kernel, struct_name.encode(), _STRUCT)
    bits = None if type_id < 0 else _member_bits(lib, kernel, type_id, member)
    if bits is None:
        raise Unavailable(
            f"This kernel's BTF has no member {member} in struct {struct_name}: what needs it "
            "was written for another kernel."
        )
    return bits // 8


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


def _member_bits(lib: ctypes.CDLL, kernel: int, type_id: int, member: str) -> int | None:
    at = lib.btf__type_by_id(kernel, type_id)
    _, bits, _ = struct.unpack("=III", ctypes.string_at(at, 12))
    for i in range(bits & 0xFFFF):
        name, inner, place = struct.unpack("=III", ctypes.string_at(at + 12 + 12 * i, 12))
        if bits >> 31:
            place &= 0xFFFFFF  # the upper byte is the width of a bit field
        if name:
            if lib.btf__name_by_offset(kernel, name) == member.encode():
                return int(place)
        elif (below := _member_bits(lib, kernel, inner, member)) is not None:
            return int(place + below)
    return None


def _types(btf_id: int) -> list[_Type]:
    get = libbpf.api().bpf_btf_get_fd_by_id
    fd = libbpf.checked(get(ctypes.c_uint32(btf_id)), f"opening BTF {btf_id}")
    try:
        info = _BtfInfo()
        libbpf.object_info(fd, info)
        raw = ctypes.create_string_buffer(info.btf_size)
        info = _BtfInfo(btf=ctypes.addressof(raw), btf_size=len(raw))
        libbpf.object_info(fd, info)
    finally:
        libbpf.close(fd)
    return _parsed(raw.raw)


@functools.lru_cache(maxsize=64)
def _parsed(raw: bytes) -> list[_Type]:
    _, _, _, header_size, type_at, type_size, string_at, _ = _HEADER.unpack_from(raw)
    strings = header_size + string_at

    def name(offset: int) -> str:
        start = strings + offset
        return raw[start : raw.index(b"\0", start)].decode()

    types = [_Type("void", 0, 0, False, b"")]
    at, end = header_size + type_at, header_size + type_at + type_size
    while at < end:
        name_offset, bits, size = struct.unpack_from("=III", raw, at)
        kind, count = bits >> 24 & 0x1F, bits & 0xFFFF
        length = _TAIL_BYTES.get(kind, 0) + _MEMBER_BYTES.get(kind, 0) * count
        types.append(
            _Type(name(name_offset), kind, size, bool(bits >> 31), raw[at + 12 : at + 12 + length])
        )
        at += 12 + length
    return [
        _with_member_names(one, name) if one.kind in (_STRUCT, _UNION) else one for one in types
    ]


@dataclass(frozen=True)
class _Struct(_Type):
    members: tuple[tuple[str, int, int], ...] = ()  # name, type id, bit offset


def _with_member_names(one: _Type, name: Callable[[int], str]) -> _Type:
    members = tuple(
        (name(name_offset), type_id, offset)
        for name_offset, type_id, offset in struct.iter_unpack("=III", one.tail)
    )
    return _Struct(one.name, one.kind, one.size, one.kflag, one.tail, members)


def _layout(types: list[_Type], type_id: int) -> np.dtype[np.void]:
    one = types[type_id]
    if one.kind in _PASSED_THROUGH:
        return _layout(types, one.size)
    if one.kind == _INT:
        (encoding,) = struct.unpack("=I", one.tail)
        signed = "i" if encoding >> 24 & 1 else "u"
        if one.size > 8:
            return np.dtype(f"V{one.size}")
        return np.dtype(f"{signed}{one.size}")
    if one.kind == _ENUM:
        return np.dtype(f"u{one.size}")
    if one.kind == _FLOAT:
        return np.dtype(f"f{one.size}")
    if one.kind == _ARRAY:
        element, _, count = struct.unpack("=III", one.tail)
        return np.dtype((_layout(types, element), (count,)))
    if isinstance(one, _Struct) and one.kind == _STRUCT:
        if one.kflag or any(offset % 8 for _, _, offset in one.members):
            raise NotImplementedError("bit fields")
        named = [(label or f"_anonymous{i}", t, o) for i, (label, t, o) in enumerate(one.members)]
        return np.dtype(
            {
                "names": [label for label, _, _ in named],
                "formats": [_layout(types, t) for _, t, _ in named],
                "offsets": [o // 8 for _, _, o in named],
                "itemsize": one.size,
            }
        )
    raise NotImplementedError(f"BTF kind {one.kind}")
