"""What a map's flags tell of its memory, whose memory that is, and where a map can be pinned."""

from __future__ import annotations

import mmap
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import LabError
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import libbpf
from labkit.kernel.leftovers import temporary_folder
from labkit.kernel.libbpf import MapFlag, MapKind
from labkit.kernel.maps import PER_CPU, Map, MapError
from labkit.kernel.pins import PinFolder
from labkit.kernel.tools import bpftool_command

_KINDS = (MapKind.HASH, MapKind.PERCPU_HASH)
_FLAGS = (MapFlag.NONE, MapFlag.NO_PREALLOC)
_BPFTOOL_LIMIT_S = 30.0


@experiment(
    "map-flags",
    number=39,
    family="kernel-facts",
    question="Can one see from outside how a map allocates, and what does max_entries cost?",
    claims=("1.9", "2.1c"),
    needs=("bpf", "hash", "percpu", "no_prealloc", "bpffs_detached", "bpftool"),
    quick={"entries": [1_024, 16_384, 65_536], "pins": 10},
    full={"entries": [1_024, 4_096, 16_384, 65_536, 262_144], "pins": 100},
)
def map_flags(*, entries: list[int], pins: int) -> Tables:
    """Make maps with and without NO_PREALLOC, and look at them as a stranger would.

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
        ``counts``: an operation is a map of which is said whether it is preallocated, an
        anomaly a wrong answer; or a pinning, an anomaly a refused one. ``maps``: ``kind``,
        ``entries``, ``flags`` (set at creation), ``shown_flags`` (by bpftool),
        ``memlock_empty``, ``memlock_full`` (bytes, as the kernel states them before and after
        the map was filled), ``rss_grown_bytes`` (of this process, by the creation). ``pins``:
        ``place``, ``refused``, ``answer`` (minus the errno of the last refusal).
    """
    say(f"maps of {', '.join(map(str, entries))} entries")
    maps = pd.DataFrame(
        [_looked_at(kind, size, flags) for size in entries for kind in _KINDS for flags in _FLAGS]
    )
    triad = Triad("wrong about the allocation")
    preallocated = maps["flags"] == 0
    # Who goes by max_entries alone takes every map for a preallocated one.
    triad.add("broken", case="guessed from max_entries", operations=len(maps),
              anomalies=int((~preallocated).sum()))  # fmt: skip
    triad.add("control", case="guessed from max_entries, preallocated maps",
              operations=int(preallocated.sum()), anomalies=0)  # fmt: skip
    told = (maps["shown_flags"] & int(MapFlag.NO_PREALLOC)) == 0
    triad.add("fixed", case="bpftool's flags", operations=len(maps),
              anomalies=int((told != preallocated).sum()))  # fmt: skip
    places = []
    with PinFolder() as private, temporary_folder() as ordinary:
        for variant, place, path in (
            ("broken", "pin in an ordinary file system", str(ordinary / "map")),
            ("fixed", "pin in a bpffs", private.path("map")),
        ):
            refused, answer = _pinned(path, pins)
            places.append({"place": place, "refused": refused, "answer": answer})
            triad.add(variant, case=place, operations=pins, anomalies=refused,
                      anomaly="refused")  # fmt: skip
    return {"counts": triad.table(), "maps": maps, "pins": pd.DataFrame(places)}


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
