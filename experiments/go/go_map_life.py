"""How long a map lives that a Go program opened: until Close, a collection, or its end."""

from __future__ import annotations

import mmap
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from experiments.go.programs import Started, built
from labkit.kernel import libbpf
from labkit.kernel.maps import Map
from labkit.kernel.pins import PinFolder
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say

_FREED_WITHIN_S = 10.0
_LOOK_AGAIN_S = 0.001


_CASES = (
    Case("control", "close", "closed at once"),
    Case("control", "defer", "closed by defer, function has returned"),
    Case("broken", "kept", "never closed, in use"),
    Case("broken", "kept-collected", "never closed, in use, after a collection"),
    Case("broken", "dropped", "never closed, out of use, before a collection"),
    Case("broken", "defer-loop", "defer in a loop, function goes on"),
    Case("broken", "pinned", "pinned and closed"),
    Case("broken", "pinned-ended", "pinned and closed, process ended"),
    Case("fixed", "dropped-collected", "never closed, out of use, after a collection"),
    Case("fixed", "kept-ended", "never closed, process ended"),
    Case("fixed", "defer-loop-left", "defer in a loop, function has returned"),
    Case("fixed", "unpinned", "pinned and closed, pin removed"),
)

# What is looked at in each stage of the program, and once it has ended.
_WAYS = {
    "close": ("close", ""),
    "defer": ("defer", ""),
    "kept": ("kept", "kept-collected", "kept-ended"),
    "dropped": ("dropped", "dropped-collected", ""),
    "defer-loop": ("defer-loop", "defer-loop-left", ""),
    "pinned": ("pinned", "pinned-ended"),
}


@experiment(
    "go-map-life",
    number=82,
    family="go",
    question="Does a Go program that never calls Close() leak its maps?",
    claims=("2.1a", "2.1c"),
    needs=("bpf", "go", "cilium_ebpf", "bpffs_detached"),
    quick={"maps": 40, "entries": [65_536, 524_288], "rounds": 2},
    full={"maps": 100, "entries": [65_536, 524_288, 2_097_152], "rounds": 5},
    cases=_CASES,
    counted=Counted("map alive", operations="maps", anomalies="alive"),
    statements=(
        Statement("what is closed is gone", "none(control)"),
        Statement("what a living process never closed stays, and so does what is pinned",
                  "all(broken)"),
        Statement("a collection closes what nothing refers to any more, and the end of the process "
                  "the rest", "none(fixed)"),
        Statement("what stays in a process stays by its descriptors",
                  'all(0 < rounds(case=("kept", "kept-collected", "dropped", "defer-loop")).held '
                  '== rounds(case=("kept", "kept-collected", "dropped", "defer-loop")).maps) '
                  'and none(rounds(case=("pinned", "pinned-ended")).held > 0)'),
        Statement("MaxEntries costs the kernel memory, and Go's heap next to none",
                  "all(0 < sizes.memlock_bytes) "
                  "and all(20 * sizes.heap_bytes < sizes.memlock_bytes) "
                  "and all(2 * sizes.rss_bytes < sizes.memlock_bytes)"),
    ),
    sentence='Of maps that were never closed {broken["kept"]} stayed while they were in use, also '
    'over a collection ({broken["kept-collected"]}); of those out of use {broken["dropped"]} '
    'stayed until one, {fixed["dropped-collected"]} after it, and {fixed["kept-ended"]} outlived '
    'their process. A defer in a loop kept {broken["defer-loop"]}. Pins kept '
    '{broken["pinned-ended"]} beyond the end. The heap grew by {max(sizes.heap_bytes)} B at most '
    "where the kernel took {max(sizes.memlock_bytes)}.",
)  # fmt: skip
def go_map_life(*, maps: int, entries: list[int], rounds: int) -> Tables:
    """Open maps in a Go program, and look from outside which of them exist.

    cilium/ebpf gives each descriptor to ``runtime.AddCleanup`` (internal/sys/fd.go), so the
    collector closes the map that nothing refers to any more, whenever it next runs; here it runs
    only when it is told to. The kernel frees a map with its last reference.

    Parameters
    ----------
    maps : int
        Maps that are opened in each way.
    entries : list of int
        ``MaxEntries`` of maps whose cost to the process and the kernel is taken.
    rounds : int
        Processes for each way.

    Returns
    -------
    dict of DataFrame
        ``rounds``: ``variant``, ``case``, ``round``, ``maps``, ``alive`` (exist in the kernel),
        ``held`` (by descriptors of the process). ``sizes``: ``entries``, ``memlock_bytes`` (as the
        kernel tells), ``heap_bytes`` (of Go, by how much it grew), ``rss_bytes`` (of the process,
        likewise).
    """
    rows: list[dict[str, object]] = []
    with built("maplife") as program, PinFolder() as pins:
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            for way, stages in _WAYS.items():
                rows += [{"round": turn, **row} for row in _lives(program, way, stages, maps, pins)]
        sizes = pd.DataFrame([_size(program, size) for size in entries])
    return {"rounds": pd.DataFrame(rows), "sizes": sizes}


def _lives(
    program: Path, way: str, stages: tuple[str, ...], maps: int, pins: PinFolder
) -> Iterator[dict[str, object]]:
    """What is seen in each stage of one process, in its end, and of pins after it."""
    *within, ended = stages
    with Started(program, way, maps, pins.path("policies")) as process:
        ids = {int(id) for id in process.said()}
        for number, case in enumerate(within):
            if number:
                process.go_on()
                process.said()
            yield _seen(case, ids, process.pid)
        process.end()
    if ended:
        yield _seen(ended, ids)
    for name in pins.names():
        pins.unpin(name)
    if way == "pinned":
        yield _seen("unpinned", ids)


def _seen(case: str, ids: set[int], pid: int = 0) -> dict[str, object]:
    variant = next(one.variant for one in _CASES if one.id == case)
    deadline = time.monotonic() + _FREED_WITHIN_S
    # What is to go goes after the collector's own goroutine and an RCU grace period.
    while (alive := ids.intersection(libbpf.ids("map"))) and variant != "broken":
        if time.monotonic() > deadline:
            break
        time.sleep(_LOOK_AGAIN_S)
    return {"variant": variant, "case": case, "maps": len(ids), "alive": len(alive),
            "held": len(ids & _held(pid))}  # fmt: skip


def _held(pid: int) -> set[int]:
    """Ids of the maps that a process has descriptors of; none of no process."""
    found = set()
    for path in Path(f"/proc/{pid}/fdinfo").glob("*") if pid else ():
        told = re.search(r"^map_id:\t(\d+)", path.read_text(errors="replace"), re.MULTILINE)
        found |= {int(told[1])} if told else set()
    return found


def _size(program: Path, entries: int) -> dict[str, int]:
    with Started(program, "size", entries) as process:
        process.said()
        before = _rss_bytes(process.pid)
        process.go_on()
        id, heap_bytes = map(int, process.said())
        rss_bytes = _rss_bytes(process.pid) - before
        with Map.from_id(id) as table:
            memlock_bytes = libbpf.map_memory(table.fd)
        process.end()
    return {"entries": entries, "memlock_bytes": memlock_bytes, "heap_bytes": heap_bytes,
            "rss_bytes": rss_bytes}  # fmt: skip


def _rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE
