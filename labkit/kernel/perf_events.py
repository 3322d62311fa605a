"""Perf events without perf: kernel events that programs run on, or that are only counted."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct
from pathlib import Path
from typing import Final

from labkit.errors import Unavailable
from labkit.kernel import libbpf
from labkit.kernel.closing import Closing

# perf_event_open, which the C library does not wrap.
_PERF_EVENT_OPEN: Final = {"x86_64": 298, "aarch64": 241, "riscv64": 241}
# include/uapi/linux/perf_event.h
_SOFTWARE, _CPU_CLOCK = 1, 0
_ENABLE, _SET_BPF = 0x2400, 0x40042408


def perf_event(
    kind: int,
    config: int,
    *,
    name: int = 0,
    offset: int = 0,
    pid: int = -1,
    cpu: int = 0,
    frequency: int = 1,
) -> int:
    """Open a perf event and return its file descriptor, which the caller owns.

    Parameters
    ----------
    kind, config : int
        ``type`` and ``config`` of ``struct perf_event_attr``.
    name : int
        Address of a string, where the source of the event takes one (``config1``).
    offset : int
        Bytes from what the string names (``config2``).
    pid, cpu : int
        Whose events: -1 is anybody's, on any CPU; a pid of 0 is this thread.
    frequency : int
        How often a second a clock ticks.

    Raises
    ------
    OSError
        The kernel's errno.
    Unavailable
        The call's number is not known for this CPU.
    """
    number = _PERF_EVENT_OPEN.get(platform.machine())
    if number is None:
        raise Unavailable(
            f"Perf events are not tried on {platform.machine()}: use a machine of another kind."
        )
    # struct perf_event_attr: type, size, config, frequency, ..., flags at 40, of which bit 10 says
    # that it is no period, wakeup at 48, config1 at 56.
    attributes = ctypes.create_string_buffer(112)
    struct.pack_into("=IIQQQ", attributes, 0, kind, len(attributes), config, frequency, 1 << 10)
    struct.pack_into("=IIQQ", attributes, 48, 1, 0, name, offset)
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(
        ctypes.c_long(number), attributes, pid, cpu, -1, ctypes.c_ulong(8)  # close on exec
    )  # fmt: skip
    return libbpf.checked(result if result >= 0 else -ctypes.get_errno(), "opening a perf event")


class Clock(Closing):
    """Runs a program on one CPU at a fixed rate, whatever else runs there; a context manager.

    The kernel stops it when the descriptor is closed.

    Parameters
    ----------
    program : int
        Descriptor of a loaded program of kind ``PERF_EVENT``.
    frequency : int
        Ticks a second.
    cpu : int
        Where it runs.

    Raises
    ------
    OSError
        The kernel's refusal.
    Unavailable
        The system call's number is not known for this CPU.
    """

    def __init__(self, program: int, *, frequency: int, cpu: int) -> None:
        self._fd = perf_event(_SOFTWARE, _CPU_CLOCK, cpu=cpu, frequency=frequency)
        try:
            fcntl.ioctl(self._fd, _SET_BPF, program)
            fcntl.ioctl(self._fd, _ENABLE, 0)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the clock; safe to call twice."""
        fd, self._fd = self._fd, -1
        libbpf.close(fd)


def probe_source(name: str) -> int:
    """Number of the kernel's source of dynamic probe events, ``kprobe`` or ``uprobe``.

    Raises
    ------
    Unavailable
        The kernel has none.
    """
    try:
        return int(Path(f"/sys/bus/event_source/devices/{name}/type").read_text())
    except OSError:
        raise Unavailable(
            f"the kernel was built without {name}s: use a kernel that has it, such as the one of "
            "vagrant up"
        ) from None


class KprobeCount(Closing):
    """Counts how often this thread passes a kernel function, with no program; a context manager.

    The kernel takes the probe back when the descriptor is closed.

    Parameters
    ----------
    function : str
        Name of the kernel function.

    Raises
    ------
    OSError
        The kernel's refusal.
    Unavailable
        The kernel has no kprobes.
    """

    def __init__(self, function: str) -> None:
        name = ctypes.create_string_buffer(function.encode())
        source = probe_source("kprobe")
        self._fd = perf_event(source, 0, name=ctypes.addressof(name), pid=0, cpu=-1)

    def read(self) -> int:
        """How often so far."""
        return int.from_bytes(os.read(self._fd, 8), "little")

    def close(self) -> None:
        """Take the probe back; safe to call twice."""
        fd, self._fd = self._fd, -1
        libbpf.close(fd)
