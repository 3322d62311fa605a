"""Pins that cannot outlive us: a bpffs of our own that is mounted nowhere.

``fsopen`` and ``fsmount`` give a bpffs whose only reference is a file descriptor. Paths
in it go through ``/proc/<pid>/fd``, so libbpf, bcc and bpftool can use them, and the
kernel drops the file system with every pin in it when the process ends, however it ends.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from labkit.errors import Unavailable
from labkit.kernel import libbpf
from labkit.kernel.closing import Closing

# System call numbers are the same on every architecture since Linux 5.2.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC = 1
_CONFIG_CREATE = 6


class PinFolder(Closing):
    """A private, detached bpffs.

    Raises
    ------
    Unavailable
        The kernel refuses (not root, or older than 5.2).

    Examples
    --------
    >>> from labkit.kernel.maps import Map, MapKind
    >>> with PinFolder() as pins, Map.create(
    ...     MapKind.ARRAY, key="u4", value="u8", max_entries=1
    ... ) as table:
    ...     table.pin(pins.path("policy"))
    ...     pins.names()
    ['policy']
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)

        def call(*arguments: object) -> int:
            result = int(libc.syscall(*arguments))
            if result < 0:
                name = libbpf.error_name(ctypes.get_errno())
                raise Unavailable(
                    f"This kernel refuses a private bpffs ({name}): run as root on Linux 5.2 "
                    "or later."
                )
            return result

        context = call(_FSOPEN, b"bpf", _CLOEXEC)
        try:
            call(_FSCONFIG, context, _CONFIG_CREATE, None, None, 0)
            self._fd = call(_FSMOUNT, context, _CLOEXEC, 0)
        finally:
            os.close(context)

    def path(self, name: str) -> str:
        """Path of a pin, valid in every process of root while this folder is open."""
        return f"/proc/{os.getpid()}/fd/{self._fd}/{name}"

    def names(self) -> list[str]:
        """Names of the pins that stand in the folder."""
        # The kernel puts two iterators into every bpffs.
        return sorted(set(os.listdir(self.path(""))) - {"maps.debug", "progs.debug"})

    def unpin(self, name: str) -> None:
        """Remove a pin; what it held lives on while somebody else refers to it."""
        Path(self.path(name)).unlink()

    def close(self) -> None:
        """Drop the file system and every pin in it; safe to call twice."""
        fd, self._fd = self._fd, -1
        libbpf.close(fd)
