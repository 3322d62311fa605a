"""A map's memory in our own address space: only for arrays made with BPF_F_MMAPABLE."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.kernel.maps import Map, map_error

_MAP_FAILED = ctypes.c_void_p(-1).value
MS_ASYNC, MS_INVALIDATE, MS_SYNC = 1, 2, 4
"""Flags of msync(2)."""


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    ]  # fmt: skip
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


class Mapping:
    """A writable, shared mapping of an array map; made by :func:`mapped`.

    Attributes
    ----------
    values : numpy.ndarray
        The live entries, shape ``(max_entries,)``: storing here is writing the map.
    """

    def __init__(self, address: int, size: int, values: npt.NDArray[Any]) -> None:
        self._address = address
        self._size = size
        self.values = values

    def msync(self, flags: int) -> int:
        """Call msync(2) on the mapping; answers 0 or minus the errno."""
        libc = _libc()
        if libc.msync(self._address, self._size, flags) == 0:
            return 0
        return -ctypes.get_errno()


@contextmanager
def mapped(table: Map) -> Iterator[Mapping]:
    """Map an array into memory.

    Parameters
    ----------
    table : Map
        An array made with ``MapFlag.MMAPABLE``.

    Yields
    ------
    Mapping
        Valid inside the block; no view of its values may be used after it.

    Raises
    ------
    NotSupported
        The type has no mmap (kernel/bpf/syscall.c, ``bpf_map_mmap``: ENOTSUPP).
    MapError
        EINVAL: an array made without the flag.
    """
    stride = -(-table.value_size // 8) * 8
    size = -(-stride * table.max_entries // mmap.PAGESIZE) * mmap.PAGESIZE
    libc = _libc()
    address = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, table.fd, 0)
    if address == _MAP_FAILED:
        raise map_error(ctypes.get_errno(), f"Mapping {table!r} into memory")
    try:
        memory = (ctypes.c_uint8 * size).from_address(address)
        slots = np.frombuffer(memoryview(memory), np.uint8)
        values = np.ndarray(table.max_entries, table.value_dtype, slots.data, strides=(stride,))
        yield Mapping(address, size, values)
    finally:
        libc.munmap(address, size)
