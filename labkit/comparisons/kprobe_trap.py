"""A kprobe on the function that updates a map, which misses the updates of system calls."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import ExitStack

import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import LabError
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import programs
from labkit.kernel.btf import member_offset
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.perf_events import KprobeCount
from labkit.kernel.programs import Unit
from labkit.kernel.sockets import GuardedSocket

_FUNCTION = "htab_map_update_elem"
_ON_THE_WAY = "__sys_bpf"  # every bpf(2) passes it, before instrumentation is switched off
_READ_FUNCTION = "vfs_read"
_KPROBE, _FENTRY = "kprobe with a program", "fentry"
_PLAIN, _OUTER = "kprobe without a program", f"kprobe without a program, {_ON_THE_WAY}"
_BPF2, _BY_KPROBE, _BY_TRACEPOINT = "bpf(2)", "a kprobe's program", "a tracepoint's program"
_BY_RAW, _BY_FILTER = "a raw tracepoint's program", "a socket filter"
_HIDDEN = (_BPF2, _BY_KPROBE, _BY_TRACEPOINT)
"""Writers that run while instrumentation is disabled on their CPU."""


@experiment(
    "kprobe-trap",
    number=43,
    family="sync",
    question="Whose updates does a kprobe on the update of a hash not see?",
    claims=("4.2",),
    needs=("bpf", "btf", "compile", "hash", "kprobe", "fentry", "tracepoint", "raw_tracepoint"),
    quick={"updates": 1_000},
    full={"updates": 20_000},
)
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
        ``counts``: an operation is an update, an anomaly one that was not seen; broken: by the
        kprobe's program, where bpf(2) or a program that runs under ``bpf_prog_active`` wrote;
        control: the same, where other programs wrote; fixed: by the fentry program, and for bpf(2)
        by a kprobe that has no program. ``seen``: one row per ``writer`` and ``watcher`` with
        ``updates`` (that went through, by the writer's count) and ``seen`` (int64).
    """
    rows: list[dict[str, object]] = []
    with ExitStack() as stack:
        table = stack.enter_context(Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8))
        unit = stack.enter_context(
            programs.load(
                "kprobe_trap",
                TABLE_FD=table.fd,
                MAP_ID=table.id,
                MAP_ID_AT=member_offset("bpf_map", "id"),
                PROCESS=os.getpid(),
                NR_GETPPID=173 if platform.machine() == "aarch64" else 110,
            )
        )
        unit.attach(unit.function("watch_by_kprobe", ProgramKind.KPROBE), _FUNCTION)
        unit.attach(unit.function("watch_by_fentry", hook=f"fentry:{_FUNCTION}"))
        plain = stack.enter_context(KprobeCount(_FUNCTION))
        outer = stack.enter_context(KprobeCount(_ON_THE_WAY))
        for writer, write in _WRITERS.items():
            say(f"{updates:,} updates by {writer}")
            before = _seen(unit), plain.read(), outer.read()
            went_through = write(unit, table, updates)
            calls = outer.read() - before[2]
            after = _seen(unit), plain.read()
            seen = {
                _KPROBE: after[0][0] - before[0][0],
                _FENTRY: after[0][1] - before[0][1],
                _PLAIN: after[1] - before[1],
                _OUTER: min(calls, went_through) if writer == _BPF2 else 0,
            }
            rows += [
                {"writer": writer, "watcher": watcher, "updates": went_through, "seen": count}
                for watcher, count in seen.items()
            ]
    found, triad = pd.DataFrame(rows), Triad("unseen update")
    for _, row in found.iterrows():
        writer, watcher = str(row["writer"]), str(row["watcher"])
        if watcher == _KPROBE:
            variant = "broken" if writer in _HIDDEN else "control"
        elif watcher == _FENTRY or writer == _BPF2:
            variant = "fixed"
        else:
            continue
        triad.add(
            variant, case=f"{watcher}; {writer}", operations=row["updates"],
            anomalies=max(row["updates"] - row["seen"], 0),
        )  # fmt: skip
    return {"counts": triad.table(), "seen": found}


def _seen(unit: Unit) -> tuple[int, int]:
    seen = unit.map("seen")
    return int(seen.lookup(0)), int(seen.lookup(1))


def _by_system_call(unit: Unit, table: Map, updates: int) -> int:
    for version in range(updates):
        table.update(0, version)
    return updates


def _by_program(
    index: int, kind: ProgramKind, function: str, where: str, trigger: Callable[[], object]
) -> Callable[[Unit, Map, int], int]:
    def write(unit: Unit, table: Map, updates: int) -> int:
        written = unit.map("written")
        held = unit.attach(unit.function(function, kind), where)
        try:
            for _ in range(updates):
                trigger()
        finally:
            unit.detach(held)
        return _at_least(int(written.lookup(index)), updates)

    return write


def _by_packets(unit: Unit, table: Map, updates: int) -> int:
    with GuardedSocket() as pair:
        pair.attach(unit.function("write_on_packet", ProgramKind.SOCKET_FILTER))
        pair.send(updates)
    return _at_least(int(unit.map("written").lookup(3)), updates)


def _at_least(written: int, updates: int) -> int:
    if written < updates:
        raise LabError(f"A program wrote {written:,} times, where it was called {updates:,} times.")
    return written


def _read_a_file() -> None:
    with open("/dev/zero", "rb", buffering=0) as file:
        file.read(1)


_WRITERS: dict[str, Callable[[Unit, Map, int], int]] = {
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
