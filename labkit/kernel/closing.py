"""What holds something of the kernel, and gives it back at the end of a ``with`` block."""

from __future__ import annotations

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
