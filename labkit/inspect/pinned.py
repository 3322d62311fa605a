"""Who may open a pin: its mode and owner, the folders above it, and the bpffs that it stands in."""

from __future__ import annotations

import os
import pwd
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

USUAL_BPFFS: Final = "/sys/fs/bpf"


@dataclass(frozen=True)
class Pin:
    """One pin of a map.

    Attributes
    ----------
    path : str
        As this process can reach it.
    mode : int
        Permission bits.
    owner : str
        Name and number.
    closed_folder : str
        The first folder above it that others may not enter, with its mode; empty where all may.
    place : str
        Where its bpffs is, unless that is the usual one.
    """

    path: str
    mode: int
    owner: str
    closed_folder: str
    place: str

    def __str__(self) -> str:
        """The pin, and who is refused, for a terminal."""
        words = f"{self.path}, mode {self.mode:04o}, owner {self.owner}"
        if self.place:
            words += f", {self.place}"
        if self.closed_folder:
            return f"{words}: another user is answered EACCES by the folder {self.closed_folder}"
        if not self.mode & stat.S_IROTH:
            return f"{words}: another user is answered EACCES"
        if not self.mode & stat.S_IWOTH:
            return f"{words}: another user may only read, and is answered EACCES else"
        return words


def process_behind(path: str) -> str | None:
    """The number of the process through whose mount namespace a path leads; None where none is.

    Parameters
    ----------
    path : str
        Of a pin, as `labkit.kernel.objects` has it.
    """
    found = re.match(r"/proc/(\d+)/(?:root|fd)/", path)
    return found[1] if found else None


def look(paths: Iterable[str]) -> list[Pin]:
    """Look at pins; one that is gone meanwhile is left out.

    Parameters
    ----------
    paths : iterable of str
        As `labkit.kernel.objects` gives them.

    Returns
    -------
    list of Pin
        In the same order.
    """
    return [found for path in paths if (found := _look(path)) is not None]


def _look(path: str) -> Pin | None:
    try:
        seen = os.stat(path)
        folders = [(folder, os.stat(folder).st_mode) for folder in Path(path).parents]
        usual = os.path.isdir(USUAL_BPFFS) and os.stat(USUAL_BPFFS).st_dev == seen.st_dev
    except OSError:
        return None
    if (process := process_behind(path)) is not None:
        # What stands above it belongs to the way by which we reach it, not to its own.
        folders = []
        place = f"in the mount namespace of process {process} alone"
    else:
        place = "" if usual else f"in another bpffs than {USUAL_BPFFS}"
    closed = [one for one in folders if not one[1] & stat.S_IXOTH]
    return Pin(
        path,
        stat.S_IMODE(seen.st_mode),
        f"{_name(seen.st_uid)} ({seen.st_uid})",
        f"{closed[-1][0]} (mode {stat.S_IMODE(closed[-1][1]):04o})" if closed else "",
        place,
    )


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return "without a name"
