"""What a map's flags tell of its memory, whose memory that is, and where a map can be pinned."""

from __future__ import annotations

import mmap
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd

from labkit.errors import LabError
from labkit.kernel import libbpf
from labkit.kernel.leftovers import temporary_folder
from labkit.kernel.libbpf import MapFlag, MapKind
from labkit.kernel.maps import PER_CPU, Map, MapError
from labkit.kernel.pins import PinFolder
from labkit.kernel.tools import bpftool_command
from labkit.lab.experiment import Case, Statement, Tables, experiment, say
from labkit.runs import Triad

_KINDS = (MapKind.HASH, MapKind.PERCPU_HASH)
_FLAGS = (MapFlag.NONE, MapFlag.NO_PREALLOC)
_BPFTOOL_LIMIT_S = 30.0


def _counted(tables: Tables) -> Tables:
    """Wrong answers to whether a map is preallocated, and refused pins."""
    maps, triad = tables["maps"], Triad("wrong about the allocation")
    # Who goes by max_entries alone takes every map for a preallocated one.
    told = (maps["shown_flags"] & int(MapFlag.NO_PREALLOC)) == 0
    preallocated = (maps["flags"] & int(MapFlag.NO_PREALLOC)) == 0
    for variant, case, wrong in (
        ("broken", "guess", ~told),
        ("control", "guess-preallocated", ~told[preallocated]),
        ("fixed", "flags", told != preallocated),
    ):
        triad.add(variant, case=case, operations=len(wrong), anomalies=int(wrong.sum()))
    for row in tables["pins"].to_dict("records"):
        triad.add("fixed" if row["case"] == "pin-bpffs" else "broken", case=row["case"],
                  operations=row["tries"], anomalies=row["refused"],
                  anomaly="refused")  # fmt: skip
    return {"counts": triad.table()}


@experiment(
    "map-flags",
    number=39,
    family="kernel-facts",
    question="Can one see from outside how a map allocates, and what does max_entries cost?",
    claims=("1.9", "2.1c"),
    needs=("bpf", "hash", "percpu", "no_prealloc", "bpffs_detached", "bpftool"),
    quick={"entries": [1_024, 16_384, 65_536], "pins": 10},
    full={"entries": [1_024, 4_096, 16_384, 65_536, 262_144], "pins": 100},
    cases=(
        Case("broken", "guess", "guessed from max_entries"),
        Case("control", "guess-preallocated", "guessed from max_entries, preallocated maps"),
        Case("fixed", "flags", "bpftool's flags"),
        Case("broken", "pin-elsewhere", "pin in an ordinary file system"),
        Case("fixed", "pin-bpffs", "pin in a bpffs"),
    ),
    derive=_counted,
    statements=(
        Statement("bpftool map show tells NO_PREALLOC",
                  "all(maps(flags=1).shown_flags == 1) and all(maps(flags=0).shown_flags == 0)"),
        # Where a guess is wrong about a map, it is so every time.
        Statement("max_entries does not tell it: the guess is right of preallocated maps alone",
                  "some(broken['guess']) and not all(broken['guess']) and none(control, like=1)"),
        Statement("without flags an empty map has the memory of a full one",
                  "all(0 < maps(flags=0).memlock_empty == maps(flags=0).memlock_full)"),
        Statement("that memory is the kernel's: the process has no array of max_entries",
                  "2 * sum(maps(flags=0).rss_grown_bytes) < sum(maps(flags=0).memlock_empty)"),
        Statement("a pin needs a bpffs", "all(broken['pin-elsewhere'])"
                  " and none(fixed['pin-bpffs'], like=broken['pin-elsewhere'])"),
    ),
    sentence="bpftool's flags were wrong about the allocation of {fixed['flags']} maps, a guess "
    "from max_entries about {broken['guess']}. Without flags the kernel held "
    "{sum(maps(flags=0).memlock_empty)} B for {rows(maps(flags=0))} empty maps, and the process "
    "that made them grew by {sum(maps(flags=0).rss_grown_bytes)} B. Pinning was refused "
    "{broken['pin-elsewhere']} times in an ordinary file system and {fixed['pin-bpffs']} in a "
    "bpffs.",
)  # fmt: skip
def map_flags(*, entries: list[int], pins: int) -> Tables:
    """Make maps with and without NO_PREALLOC, and look at them from outside.

    A hash table without flags allocates all its elements when it is made
    (kernel/bpf/hashtab.c, ``prealloc_init``), in the kernel; the process that makes it keeps a
    descriptor. ``bpftool map show`` prints ``flags 0x1`` for BPF_F_NO_PREALLOC.

    Parameters
    ----------
    entries : list of int
        max_entries of the maps, one map of each kind and flag for each.
    pins : int
        Attempts to pin a map in a bpffs, and as many in an ordinary file system.

    Returns
    -------
    dict of DataFrame
        ``maps``: ``kind``,
        ``entries``, ``flags`` (set at creation), ``shown_flags`` (by bpftool),
        ``memlock_empty``, ``memlock_full`` (bytes, as the kernel states them before and after
        the map was filled), ``rss_grown_bytes`` (of this process, by the creation). ``pins``:
        ``case``, ``place``, ``tries``, ``refused``, ``answer`` (minus the errno of the last
        refusal).
    """
    say(f"maps of {', '.join(map(str, entries))} entries")
    maps = pd.DataFrame(
        [_looked_at(kind, size, flags) for size in entries for kind in _KINDS for flags in _FLAGS]
    )
    places = []
    with PinFolder() as private, temporary_folder() as ordinary:
        for case, place, path in (
            ("pin-elsewhere", "an ordinary file system", str(ordinary / "map")),
            ("pin-bpffs", "a bpffs", private.path("map")),
        ):
            refused, answer = _pinned(path, pins)
            about = {"case": case, "place": place, "tries": pins}
            places.append({**about, "refused": refused, "answer": answer})
    return {"maps": maps, "pins": pd.DataFrame(places)}


def _looked_at(kind: MapKind, entries: int, flags: MapFlag) -> dict[str, object]:
    before = _resident_bytes()
    with Map.create(
        kind, key="u4", value="u8", max_entries=entries, flags=flags, name="looked_at"
    ) as table:
        grown = _resident_bytes() - before
        empty = libbpf.map_memory(table.fd)
        shown = _shown_flags(table.id)
        keys = np.arange(entries, dtype=np.uint32)
        values = np.zeros((entries, libbpf.possible_cpus()) if kind in PER_CPU else entries)
        table.update_many(keys, values.astype(np.uint64))
        return {
            "kind": kind.name.lower(),
            "entries": entries,
            "flags": int(flags),
            "shown_flags": shown,
            "memlock_empty": empty,
            "memlock_full": libbpf.map_memory(table.fd),
            "rss_grown_bytes": grown,
        }


def _shown_flags(identifier: int) -> int:
    """Flags as ``bpftool map show | grep flags`` has them."""
    done = subprocess.run(
        [bpftool_command(), "map", "show", "id", str(identifier)],
        capture_output=True, text=True, check=False, timeout=_BPFTOOL_LIMIT_S,
    )  # fmt: skip
    found = re.search(r"\bflags (0x[0-9a-f]+)", done.stdout)
    if found is None:
        raise LabError(f"bpftool shows no flags: {(done.stderr or done.stdout).strip()[:200]}")
    return int(found[1], 16)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _pinned(path: str, times: int) -> tuple[int, int]:
    """Refusals of pinning and opening one map at a path so often, and the last answer."""
    refused = answer = 0
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=1, name="pinned") as table:
        for _ in range(times):
            try:
                table.pin(path)
                with Map.from_pin(path) as opened:
                    if opened.id != table.id:
                        raise LabError("The pin leads to another map.")
                Path(path).unlink()
            except MapError as error:
                refused, answer = refused + 1, -int(error.errno or 0)
    return refused, answer
