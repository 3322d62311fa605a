"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from labkit.console import require_replaceable
from labkit.errors import BadInput, LabError


def require_writable(path: str) -> None:
    """Refuse a file that could not be written in the end.

    Raises
    ------
    BadInput
        It is no plain file, or its folder is missing or closed to this user.
    """
    require_replaceable(path)
    folder = Path(path).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(
            f"No file can be written at {path!r}: give one in a folder that is there, and that "
            "this user may write to."
        )


def write_whole(path: str, content: bytes, *, mode: int) -> None:
    """Put bytes into a file, whole or not at all.

    Parameters
    ----------
    path : str
        The file; replaced in one step, so that nobody reads half of it.
    content : bytes
        All that is to stand in it.
    mode : int
        Permission bits.

    Raises
    ------
    LabError
        The file cannot be written.
    """
    partial = ""
    try:
        handle, partial = tempfile.mkstemp(prefix=f".{Path(path).name}.", dir=Path(path).parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        partial = ""
    except OSError as error:
        raise LabError(f"{path!r} cannot be written: {error.strerror}.") from error
    finally:
        if partial:
            with contextlib.suppress(OSError):
                os.unlink(partial)
