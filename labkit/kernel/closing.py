"""What holds something of the kernel, and gives it back at the end of a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Self


class Closing:
    """A context manager that closes itself, also after an exception."""

    def close(self) -> None:
        """Give back what is held; safe to call twice."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class Holding(Closing):
    """What holds several things that are opened one after the other, and closes them all."""

    _open: ExitStack

    @contextmanager
    def _opening(self) -> Iterator[ExitStack]:
        """Where to enter what is opened; if that fails, all is closed again."""
        self._open = ExitStack()
        try:
            yield self._open
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close and free all of it; safe to call twice."""
        self._open.close()
