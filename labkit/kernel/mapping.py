"""A map's memory in our own address space: only for arrays made with BPF_F_MMAPABLE."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.kernel.maps import Map, map_error

MS_ASYNC, MS_INVALIDATE, MS_SYNC = 1, 2, 4
"""Flags of msync(2)."""


class Mapping:
    """A writable, shared mapping of an array map; made by :func:`mapped`.

    Attributes
    ----------
    values : numpy.ndarray
        The live entries, shape ``(max_entries,)``: storing here is writing the map.
    """

    def __init__(self, memory: mmap.mmap, values: npt.NDArray[Any]) -> None:
        self._memory = memory
        self.values = values

    def msync(self, flags: int) -> int:
        """Call msync(2) on the mapping; answers 0 or minus the errno."""
        libc = ctypes.CDLL(None, use_errno=True)
        whole = (ctypes.c_uint8 * len(self._memory)).from_buffer(self._memory)
        if libc.msync(ctypes.byref(whole), ctypes.c_size_t(len(self._memory)), flags) == 0:
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
        Unmapped at the end of the block, or with the last view of its values that is kept.

    Raises
    ------
    NotSupported
        The type has no mmap (kernel/bpf/syscall.c, ``bpf_map_mmap``: ENOTSUPP).
    MapError
        EINVAL: an array made without the flag.
    """
    stride = -(-table.value_size // 8) * 8
    size = -(-stride * table.max_entries // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        memory = mmap.mmap(table.fd, size)
    except OSError as error:
        raise map_error(error.errno or 0, f"Mapping {table!r} into memory") from error
    # By frombuffer: it alone keeps the mapping from being closed under a view.
    rows = np.frombuffer(memory, np.uint8)[: stride * table.max_entries].reshape(-1, stride)
    mapping = Mapping(memory, rows[:, : table.value_size].view(table.value_dtype)[:, 0])
    del rows
    try:
        yield mapping
    finally:
        del mapping.values
        with suppress(BufferError):  # somebody keeps a view: the memory goes with it
            memory.close()
