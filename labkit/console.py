"""Where a command writes: standard output closed, full, left by its reader, read slowly; files."""

from __future__ import annotations

import contextlib
import io
import math
import os
import select
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from labkit.errors import BadInput, LabError

_MOST_NAME_BYTES: Final = 200  # of 255, as it is written beside its place under a longer name
_PIECE: Final = 4096  # a pipe that can be written takes so much at once (PIPE_BUF)


def open_missing() -> None:
    """Open ``/dev/null`` in place of the standard streams that were closed at the start.

    Else the next file or map to be opened would get the number 0, 1 or 2, and be written to.
    """
    for number, flag in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flag), True)  # the lowest free number: this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)


def tell(words: str) -> None:
    """Write a line to standard error, if anybody can be told."""
    with contextlib.suppress(OSError):
        print(words, file=sys.stderr, flush=True)


@contextlib.contextmanager
def guarded_output() -> Iterator[Output]:
    """Know of each error of standard output that it is one.

    Yields
    ------
    Output
        Its ``deadline`` may be set.

    Raises
    ------
    LabError
        Standard output takes no more.
    BrokenPipeError
        Its reader, such as head, has seen enough.
    """
    usual = sys.stdout
    usual.flush()
    try:
        raw = Output(usual.fileno())
    except io.UnsupportedOperation:  # a program that calls this one gathers the output itself
        yield Output(-1)
        return
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=usual.encoding,
        errors="backslashreplace",  # names of any language, where the locale is C
        line_buffering=usual.isatty(),
    )
    try:
        try:
            yield raw
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error is raw.failed and not isinstance(error, BrokenPipeError):
            raise LabError(
                f"Standard output takes no more ({error.strerror}): give it another place."
            ) from None
        raise
    finally:
        sys.stdout = usual
        if raw.left_out:
            tell(f"{raw.left_out:,} lines were left out: whoever reads them is too slow.")


def require_replaceable(path: str | Path) -> None:
    """Refuse a name whose place a file must not take, which is given its name once it is whole.

    Raises
    ------
    BadInput
        It is no name, or a folder, device, FIFO, socket or link is there: it would be gone.
    """
    if not os.fspath(path) or len(os.fsencode(os.path.basename(path))) > _MOST_NAME_BYTES:
        raise BadInput(f"A file's name has 1 to {_MOST_NAME_BYTES} bytes: give such a one.")
    with contextlib.suppress(OSError):  # what is not there
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise BadInput(
                f"{str(path)!r} is no plain file but a folder, a device, a link or the like, whose "
                "place the file would take: name another one."
            )


class Output(io.RawIOBase):
    """A descriptor that is written to until a deadline.

    Attributes
    ----------
    deadline : float
        CLOCK_MONOTONIC, seconds; at first never. Lines that find no reader by then are left out.
    left_out : int
        How many lines were.
    failed : OSError or None
        Why nothing more is written.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.deadline = math.inf
        self.left_out = 0
        self.failed: OSError | None = None

    def writable(self) -> bool:
        """It is what it is for."""
        return True

    def fileno(self) -> int:
        """The descriptor, which is not closed with this."""
        return self._fd

    def isatty(self) -> bool:
        """Whether somebody looks at it."""
        return os.isatty(self._fd)

    def write(self, data: object) -> int:
        """Write a piece, once there is room for it."""
        whole = memoryview(data)  # type: ignore[arg-type]
        if self.failed is not None:  # what is still buffered above
            return len(whole)
        bounded = self.deadline < math.inf
        piece = whole[:_PIECE] if bounded else whole
        if bounded and not self._has_room():
            self.left_out += bytes(piece).count(b"\n")
            return len(piece)
        try:
            return os.write(self._fd, piece)
        except OSError as error:
            self.failed = error
            raise

    def _has_room(self) -> bool:
        left_s = max(0.0, min(self.deadline - time.monotonic(), 1e6))  # poll takes an int of ms
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return bool(poll.poll(left_s * 1000))
