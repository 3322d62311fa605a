"""A kprobe on the function that updates a map, which misses the updates of system calls."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import ExitStack

import pandas as pd

from labkit.errors import LabError
from labkit.figures import Axes, cells, style
from labkit.kernel import programs
from labkit.kernel.btf import member_offset
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.perf_events import KprobeCount
from labkit.kernel.programs import BpfObject
from labkit.kernel.sockets import GuardedSocket
from labkit.lab.experiment import Case, Statement, Tables, experiment, say
from labkit.runs import Run, Triad

_FUNCTION = "htab_map_update_elem"
_ON_THE_WAY = "__sys_bpf"  # every bpf(2) passes it, before instrumentation is switched off
_READ_FUNCTION = "vfs_read"
_KPROBE, _FENTRY, _PLAIN, _OUTER = "kprobe", "fentry", "plain", "outer"
"""Watchers: a kprobe's program, an fentry program, and kprobes without a program on the function
and on ``__sys_bpf``."""
_BPF2, _BY_KPROBE, _BY_TRACEPOINT = "bpf(2)", "a kprobe's program", "a tracepoint's program"
_BY_RAW, _BY_FILTER = "a raw tracepoint's program", "a socket filter"

_CASES = (
    # These write while instrumentation is disabled on their CPU.
    Case("broken", "kprobe-bpf2", "kprobe with a program; bpf(2)", watcher=_KPROBE, writer=_BPF2),
    Case("broken", "kprobe-kprobe", "kprobe with a program; a kprobe's program",
         watcher=_KPROBE, writer=_BY_KPROBE),
    Case("broken", "kprobe-tracepoint", "kprobe with a program; a tracepoint's program",
         watcher=_KPROBE, writer=_BY_TRACEPOINT),
    Case("control", "kprobe-raw", "kprobe with a program; a raw tracepoint's program",
         watcher=_KPROBE, writer=_BY_RAW),
    Case("control", "kprobe-filter", "kprobe with a program; a socket filter",
         watcher=_KPROBE, writer=_BY_FILTER),
    Case("fixed", "fentry-bpf2", "fentry; bpf(2)", watcher=_FENTRY, writer=_BPF2),
    Case("fixed", "plain-bpf2", "kprobe without a program; bpf(2)", watcher=_PLAIN, writer=_BPF2),
    Case("fixed", "outer-bpf2", f"kprobe without a program, {_ON_THE_WAY}; bpf(2)",
         watcher=_OUTER, writer=_BPF2),
    Case("fixed", "fentry-kprobe", "fentry; a kprobe's program",
         watcher=_FENTRY, writer=_BY_KPROBE),
    Case("fixed", "fentry-tracepoint", "fentry; a tracepoint's program",
         watcher=_FENTRY, writer=_BY_TRACEPOINT),
    Case("fixed", "fentry-raw", "fentry; a raw tracepoint's program",
         watcher=_FENTRY, writer=_BY_RAW),
    Case("fixed", "fentry-filter", "fentry; a socket filter",
         watcher=_FENTRY, writer=_BY_FILTER),
)  # fmt: skip


def _counts(tables: Tables) -> Tables:
    """An operation is an update, or a hit that is none; an anomaly what was not one for one."""
    seen, triad = tables["seen"].set_index(["writer", "watcher"]), Triad("unseen update")
    for case in _CASES:
        row = seen.loc[(case.writer, case.watcher)]
        updates, hits = int(row["updates"]), int(row["seen"])
        triad.add(
            case.variant, case=case.id, operations=max(updates, hits),
            anomalies=abs(updates - hits),
        )  # fmt: skip
    return {"counts": triad.table()}


_WATCHERS = {
    _KPROBE: "program\nby kprobe",
    _FENTRY: "program\nby fentry",
    _PLAIN: "kprobe,\nno program",
}


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw one cell for each writer and watcher."""
    rows = run.table("seen").to_dict("records")
    seen = {(row["writer"], row["watcher"]): (row["seen"], row["updates"]) for row in rows}
    writers = list(dict.fromkeys(writer for writer, _ in seen))
    ax = style.axes(ax, height=2.1)

    def cell(x: int, y: int) -> cells.Cell:
        return cells.share(*seen[writers[y], list(_WATCHERS)[x]])

    cells.draw_cells(ax, list(_WATCHERS.values()), writers, cell, label_size=7)
    ax.set_xlabel("updates seen, of a hash, by writer", loc="right")
    return ax


@experiment(
    "kprobe-trap",
    number=43,
    family="sync",
    question="Whose updates does a kprobe on the update of a hash not see?",
    claims=("4.2",),
    needs=("bpf", "btf", "compile", "hash", "kprobe", "fentry", "tracepoint", "raw_tracepoint"),
    quick={"updates": 1_000},
    full={"updates": 20_000},
    cases=_CASES,
    derive=_counts,
    statements=(
        Statement("a kprobe's program sees no update that is made while bpf_prog_active is up",
                  "all(broken)"),
        Statement("it sees each update of other programs, once", "none(control)"),
        Statement("fentry sees each update of all writers, once, and the probe is hit by bpf(2)",
                  "none(fixed)"),
    ),
    sentence="A kprobe's program on the hash's update did not see {broken} updates by bpf(2), by a "
    "kprobe's program and by a tracepoint's, though bpf(2) hit the probe "
    '{seen(writer="bpf(2)", watcher="plain").seen} times; of those by a raw tracepoint\'s program '
    "and a socket filter it missed {control}. An fentry program missed "
    '{fixed(watcher="fentry")} by all five.',
    figure=_figure,
)  # fmt: skip
def kprobe_trap(*, updates: int) -> Tables:
    """Update a hash by bpf(2) and by four kinds of programs, under a kprobe and an fentry program.

    bpf(2) raises the CPU's counter ``bpf_prog_active`` while it changes a map
    (``bpf_disable_instrumentation``), lest a program be called under the lock of a bucket that it
    would take itself; and so does every program that a kprobe, a tracepoint or a perf event calls
    (``trace_call_bpf``), which does nothing where the counter is up. fentry programs and raw
    tracepoints keep a counter for each program. The probe itself is hit all the same: without a
    program, it counts.

    Parameters
    ----------
    updates : int
        By each writer.

    Returns
    -------
    dict of DataFrame
        ``seen``: one row per ``writer`` and ``watcher`` (``kprobe`` and ``fentry``: programs on
        the hash's update; ``plain``: a kprobe there without a program; ``outer``: one on
        ``__sys_bpf``, beside bpf(2) alone) with ``updates`` (that went through, by the writer's
        count) and ``seen`` (int64; more than the updates where one was seen twice).
    """
    rows: list[dict[str, object]] = []
    with ExitStack() as stack:
        table = stack.enter_context(Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8))
        loaded = stack.enter_context(
            programs.load(
                "kprobe_trap",
                TABLE_FD=table.fd,
                MAP_ID=table.id,
                MAP_ID_AT=member_offset("bpf_map", "id"),
                PROCESS=os.getpid(),
                NR_GETPPID=173 if platform.machine() == "aarch64" else 110,
            )
        )
        loaded.attach(loaded.program("watch_by_kprobe", ProgramKind.KPROBE), _FUNCTION)
        loaded.attach(loaded.program("watch_by_fentry", hook=f"fentry:{_FUNCTION}"))
        plain = stack.enter_context(KprobeCount(_FUNCTION))
        outer = stack.enter_context(KprobeCount(_ON_THE_WAY))
        for writer, write in _WRITERS.items():
            say(f"{updates:,} updates by {writer}")
            before = _seen(loaded), plain.read(), outer.read()
            went_through = write(loaded, table, updates)
            calls = outer.read() - before[2]
            after = _seen(loaded), plain.read()
            seen = {
                _KPROBE: after[0][0] - before[0][0],
                _FENTRY: after[0][1] - before[0][1],
                _PLAIN: after[1] - before[1],
            }
            if writer == _BPF2:  # other writers pass it too, as often as they make system calls
                seen[_OUTER] = calls
            rows += [
                {"writer": writer, "watcher": watcher, "updates": went_through, "seen": count}
                for watcher, count in seen.items()
            ]
    return {"seen": pd.DataFrame(rows)}


def _seen(loaded: BpfObject) -> tuple[int, int]:
    seen = loaded.map("seen")
    return int(seen.lookup(0)), int(seen.lookup(1))


def _by_system_call(loaded: BpfObject, table: Map, updates: int) -> int:
    for version in range(updates):
        table.update(0, version)
    return updates


def _by_program(
    index: int, kind: ProgramKind, function: str, where: str, trigger: Callable[[], object]
) -> Callable[[BpfObject, Map, int], int]:
    def write(loaded: BpfObject, table: Map, updates: int) -> int:
        written = loaded.map("written")
        held = loaded.attach(loaded.program(function, kind), where)
        try:
            for _ in range(updates):
                trigger()
        finally:
            loaded.detach(held)
        return _at_least(int(written.lookup(index)), updates)

    return write


def _by_packets(loaded: BpfObject, table: Map, updates: int) -> int:
    with GuardedSocket() as pair:
        pair.attach(loaded.program("write_on_packet", ProgramKind.SOCKET_FILTER))
        pair.send(updates)
    return _at_least(int(loaded.map("written").lookup(3)), updates)


def _at_least(written: int, updates: int) -> int:
    if written < updates:
        raise LabError(f"A program wrote {written:,} times, where it was called {updates:,} times.")
    return written


def _read_a_file() -> None:
    with open("/dev/zero", "rb", buffering=0) as file:
        file.read(1)


_WRITERS: dict[str, Callable[[BpfObject, Map, int], int]] = {
    _BPF2: _by_system_call,
    _BY_KPROBE: _by_program(0, ProgramKind.KPROBE, "write_on_kprobe", _READ_FUNCTION, _read_a_file),
    _BY_TRACEPOINT: _by_program(
        1, ProgramKind.TRACEPOINT, "write_on_tracepoint", "syscalls:sys_enter_getppid", os.getppid
    ),
    _BY_RAW: _by_program(
        2, ProgramKind.RAW_TRACEPOINT, "write_on_raw_tracepoint", "sys_enter", os.getppid
    ),
    _BY_FILTER: _by_packets,
}
