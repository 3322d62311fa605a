"""One measurement at a time among the notebooks of a folder of runs: the others wait and say so."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

_LOCK: Final = ".measuring"  # held while its process lives; its text says who measures what
_ASK_EVERY_S: Final = 0.2
_MOST_BYTES: Final = 200


@contextlib.contextmanager
def turn(folder: Path, name: str, say: Callable[[str], None], limit_s: float) -> Iterator[None]:
    """Wait until no other notebook measures, and keep the others waiting meanwhile.

    Parameters
    ----------
    folder : Path
        Folder of runs, which those that wait for each other share. Where it cannot be written,
        nobody waits.
    name : str
        What is measured here, and by which notebook.
    say : callable
        Gets a line while this one waits.
    limit_s : float
        After so many seconds this one measures all the same.
    """
    with contextlib.ExitStack() as holding:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:  # whoever saves a run there says what is wrong
            yield
            return
        holding.callback(os.close, lock)
        deadline = time.monotonic() + limit_s
        while not (ours := _taken(lock)) and time.monotonic() < deadline:
            other = os.pread(lock, _MOST_BYTES, 0).decode(errors="replace")
            say(f"waits, so as not to disturb what is measured now: {other}")
            time.sleep(_ASK_EVERY_S)
        if ours:
            os.ftruncate(lock, 0)
            os.pwrite(lock, name.encode()[:_MOST_BYTES], 0)
        yield


def _taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
