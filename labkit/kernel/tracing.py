"""What programs print by ``bpf_trace_printk``, read back from a trace instance of our own.

The well-known ``trace_pipe`` is shared by the whole machine and consumes what it shows: two
readers take each other's lines. An instance has a buffer of its own, and a filter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from labkit.errors import BadInput
from labkit.kernel.leftovers import trace_instance

PRINTK_EVENT: Final = "bpf_trace/bpf_trace_printk"
"""The event that every print fires, as a folder below ``events``."""

_IN_FRONT: Final = b"bpf_trace_printk: "
_LOSSES: Final = ("overrun", "dropped events")


class PrintedLines:
    """Lines that come out of one instance; made by :func:`printed_lines`."""

    def __init__(self, folder: Path, pipe: int, mark: bytes) -> None:
        self._folder, self._pipe, self._mark = folder, pipe, mark

    def read(self) -> list[bytes]:
        """Take the lines that have been printed since the last call; never blocks.

        Returns
        -------
        list of bytes
            Each begins with the mark. A line feed within a message ends it here.
        """
        raw = bytearray()
        try:
            while piece := os.read(self._pipe, 1 << 16):
                raw += piece
        except BlockingIOError:
            pass
        messages = (line.partition(_IN_FRONT)[2] for line in bytes(raw).split(b"\n"))
        return [message for message in messages if message.startswith(self._mark)]

    def lost(self) -> int:
        """Count the lines that found no room, or were overwritten before they were read."""
        return sum(
            int(value)
            for stats in self._folder.glob("per_cpu/cpu*/stats")
            for name, _, value in (line.partition(":") for line in stats.read_text().splitlines())
            if name in _LOSSES
        )


@contextmanager
def printed_lines(mark: str) -> Iterator[PrintedLines]:
    """Collect what programs print that begins with a mark, and nothing else.

    Parameters
    ----------
    mark : str
        A letter, then letters, digits, spaces, underscores and colons. Every program of the
        machine prints into the same event, so the mark must be this process's own.

    Yields
    ------
    PrintedLines
        Reads them, until the block ends.

    Raises
    ------
    BadInput
        A mark that would not survive the kernel's filter.
    Unavailable
        tracefs is not mounted, or refuses.
    """
    # A pattern that begins with a digit is an index to the kernel (filter_parse_regex).
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_: ]*", mark):
        raise BadInput(
            f"A mark is a letter, then letters, digits, spaces, _ and :, which {mark!r} is not."
        )
    with trace_instance() as folder:
        event = folder / "events" / PRINTK_EVENT
        (event / "filter").write_text(f'bpf_string ~ "{mark}*"')
        (event / "enable").write_text("1")
        pipe = os.open(folder / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
        try:
            yield PrintedLines(folder, pipe, mark.encode())
        finally:
            os.close(pipe)
