"""Which maps are meant by what a user typed: ids, pins, names, a program, or all."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from labkit.errors import BadInput
from labkit.inspect.diagnose import map_ids
from labkit.kernel import libbpf, objects
from labkit.kernel.objects import MapObject, Objects

_MOST_LISTED = 8  # maps of one name, the newest


def which_maps(names: Sequence[str], program: int | None = None) -> list[int]:
    """Ids of the maps that are meant.

    Parameters
    ----------
    names : sequence of str
        Ids, paths of pins, or names.
    program : int, optional
        Id of a program, whose maps are meant too.

    Returns
    -------
    list of int
        In the order in which they were named, each once; empty where nothing was named.

    Raises
    ------
    BadInput
        There is no such map or program, a name is that of several maps, or the program refers to
        no map. The sentence lists the maps of a name with their holders and ages.
    """
    if not names and program is None:
        return []
    now = objects.snapshot()
    found: list[int] = []
    for name in names:
        meant = map_ids(name, now)
        if len(meant) > 1:
            each = [_known(now.maps[one], now) for one in meant[-_MOST_LISTED:]]
            more = f" and {len(meant) - len(each):,} older ones" if len(each) < len(meant) else ""
            raise BadInput(
                f"{len(meant):,} maps are called {name!r}, name one by its id: {'; '.join(each)}"
                f"{more}."
            )
        found += meant
    if program is not None:
        if program not in now.programs:
            raise BadInput(f"There is no program with id {program}: bpftool prog show lists them.")
        found += now.programs[program].map_ids
        if not found:
            raise BadInput(f"Program {program} refers to no map: name one that it should use.")
    return list(dict.fromkeys(found))


def programs_of(map_ids: Sequence[int]) -> list[str]:
    """Programs that refer to any of some maps, such as ``program 41 count``."""
    wanted, found = set(map_ids), []
    for identifier in libbpf.ids("prog"):
        try:
            fd = libbpf.fd_by_id("prog", identifier)
        except OSError:
            continue  # gone between listing and opening
        try:
            if not wanted.isdisjoint(libbpf.prog_map_ids(fd)):
                name = libbpf.shown(libbpf.prog_info(fd).name)
                found.append(f"program {identifier} {name}")
        finally:
            libbpf.close(fd)
    return found


def _known(one: MapObject, now: Objects) -> str:
    holders = ", ".join(now.holders(one))
    users = [each for each in now.programs.values() if one.id in each.map_ids]
    used = ", ".join(f"program {each.id} {each.name}" for each in users)
    held = f"held by {holders}" if holders else f"used by {used}" if used else "no holder in sight"
    return f"{one.id} ({one.kind}, {held}, {_age(one, [each.id for each in users])})"


def _age(one: MapObject, programs: Sequence[int]) -> str:
    """How old a map is at least: the kernel dates programs and pins, and no map."""
    begun = [since for each in programs if (since := _loaded_s(each)) is not None]
    for pin in one.pins:
        try:
            begun.append(time.time() - os.stat(pin).st_ctime)
        except OSError:
            continue  # unpinned by now
    if not begun:
        return "age unknown, as no program or pin dates it"
    return f"at least {_duration(max(begun))} old"


def _loaded_s(program: int) -> float | None:
    """Seconds since a program was loaded; None where it is gone."""
    try:
        fd = libbpf.fd_by_id("prog", program)
    except OSError:
        return None
    try:
        loaded_s: float = libbpf.prog_info(fd).load_time / 1e9
        return time.clock_gettime(time.CLOCK_BOOTTIME) - loaded_s
    finally:
        libbpf.close(fd)


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
