"""Judges experiment 39: flags, memory and pins of a map."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("map-flags")
def map_flags(run: Run) -> Finding:
    """The flags tell the allocation; elements are the kernel's memory; pins need a bpffs."""
    guessed, shown = (
        run.count("broken", "guessed from max_entries"),
        run.count("fixed", "bpftool's flags"),
    )
    control = run.count("control")
    elsewhere = run.count("broken", "pin in an ordinary file system")
    pinned = run.count("fixed", "pin in a bpffs")
    maps = run.table("maps")
    ready = maps[maps["flags"] == 0]
    kernel, process = int(ready["memlock_empty"].sum()), int(ready["rss_grown_bytes"].sum())
    return Finding(
        run.experiment,
        f"bpftool's flags were wrong about the allocation of {shown} maps, a guess from "
        f"max_entries about {guessed}. Without flags the kernel held {kernel:,} B for "
        f"{len(ready)} empty maps, and the process that made them grew by {process:,} B. Pinning "
        f"was refused {elsewhere} times in an ordinary file system and {pinned} in a bpffs.",
        (
            Check(
                "bpftool map show tells NO_PREALLOC",
                shown.operations > 0
                and shown.anomalies == 0
                and bool((maps["shown_flags"] == maps["flags"]).all()),
                f"wrong about {shown} maps",
            ),
            Check(
                "max_entries does not tell it",
                0 < guessed.anomalies < guessed.operations and control.anomalies == 0,
                f"wrong about {guessed}, of preallocated maps about {control}",
            ),
            Check(
                "flags 0: an empty map has the memory of a full one",
                len(ready) > 0 and bool((ready["memlock_empty"] == ready["memlock_full"]).all()),
                f"{kernel:,} B empty, {int(ready['memlock_full'].sum()):,} B full",
            ),
            Check(
                "that memory is the kernel's: the process has no array of max_entries",
                4 * process < kernel,
                f"{process:,} B in the process, {kernel:,} B in the kernel",
            ),
            Check(
                "a pin needs a bpffs",
                elsewhere.anomalies == elsewhere.operations > 0
                and pinned.operations > 0
                and pinned.anomalies == 0,
                f"refused {elsewhere} elsewhere, {pinned} there",
            ),
        ),
    )
