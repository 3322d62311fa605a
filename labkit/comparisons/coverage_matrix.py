"""Which hooks see which ways of writing a map, and what they cost those who write."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput, LabError
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import MapFlag, MapKind, ProgramKind, UpdateFlag
from labkit.kernel.mapping import mapped
from labkit.kernel.maps import KeyExists, Map
from labkit.kernel.parallel import Child
from labkit.kernel.probe import bpftool_command
from labkit.kernel.programs import Function
from labkit.kernel.ringbuf import RingReader
from labkit.sync.changes import ChangeKind, event_dtype
from labkit.sync.replica import Replica
from labkit.sync.ring_events import Channel
from labkit.sync.trace_hook import MECHANISMS, Hooks, TraceHook

_PULL = "pull"
_RING_BYTES = 1 << 22
_CONVERGE_S = 10.0  # how long the fixed variant may take, at most
_PULL_S = 0.05
_PIECE = 100  # calls that are timed together
_PROGRAM_UPDATE, _PROGRAM_DELETE, _PROGRAM_STORE = range(3)  # enum way of the source
_CALL = np.dtype([("way", "u8"), ("key", "u8"), ("version", "u8"), ("answer", "i8")])
_UPDATE_ELEM = 2  # BPF_MAP_UPDATE_ELEM

Keys = npt.NDArray[np.uint32]
Versions = npt.NDArray[np.uint64]
Write = Callable[["_Stage", Keys, Versions], None]


class _Attr(ctypes.Structure):
    """``union bpf_attr`` of an element command."""

    _fields_ = [
        ("map_fd", ctypes.c_uint32),
        ("key", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class _Stage:
    """The maps that are written: keys of 4 bytes, and the value is the version."""

    hash: Map
    array: Map  # can be mapped; also the inner map that the outer one shows at first
    spare: Map  # the inner map that it is switched to
    outer: Map
    other: Map  # watched by nobody
    program: Function  # writes the hash


@contextmanager
def _stage(keys: int, switches: int) -> Iterator[_Stage]:
    with ExitStack() as stack:

        def made(kind: MapKind, entries: int, flags: MapFlag = MapFlag.NONE) -> Map:
            return stack.enter_context(
                Map.create(kind, key="u4", value="u8", max_entries=entries, flags=flags)
            )

        table = made(MapKind.HASH, keys)
        array = made(MapKind.ARRAY, keys, MapFlag.MMAPABLE)
        outer = stack.enter_context(
            Map.create(
                MapKind.ARRAY_OF_MAPS, key="u4", value="u4", max_entries=switches, inner=array
            )
        )
        unit = stack.enter_context(programs.load("coverage_matrix", TABLE_FD=table.fd))
        yield _Stage(
            hash=table,
            array=array,
            spare=made(MapKind.ARRAY, keys, MapFlag.MMAPABLE),
            outer=outer,
            other=made(MapKind.HASH, keys),
            program=unit.function("write_map", ProgramKind.SYSCALL),
        )


# -- the ways to write ---------------------------------------------------------------------


def _by_system_call(stage: _Stage, keys: Keys, versions: Versions) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    number = 280 if platform.machine() == "aarch64" else 321
    for i in range(len(keys)):
        key_at, value_at = keys.ctypes.data + 4 * i, versions.ctypes.data + 8 * i
        attr = _Attr(map_fd=stage.hash.fd, key=key_at, value=value_at)
        if libc.syscall(number, _UPDATE_ELEM, ctypes.byref(attr), ctypes.sizeof(attr)):
            raise LabError(f"bpf(2) answers {libbpf.error_name(ctypes.get_errno())}.")


def _by_libbpf(stage: _Stage, keys: Keys, versions: Versions) -> None:
    def write() -> None:
        with Map.from_id(stage.hash.id, key="u4", value="u8") as theirs:
            for key, version in zip(keys, versions, strict=True):
                theirs.update(key, version)

    with Child(write) as child:
        child.result()


def _by_bpftool(stage: _Stage, keys: Keys, versions: Versions) -> None:
    lines = "".join(
        f"map update id {stage.hash.id} key hex {key.tobytes().hex(' ')} "
        f"value hex {version.tobytes().hex(' ')}\n"
        for key, version in zip(keys, versions, strict=True)
    )
    done = subprocess.run(
        [bpftool_command(), "batch", "file", "-"],
        input=lines, text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode:
        raise LabError(f"bpftool failed: {(done.stderr or done.stdout).strip()[:200]}.")


def _by_batch(stage: _Stage, keys: Keys, versions: Versions) -> None:
    stage.hash.update_many(keys, versions)


def _delete(stage: _Stage, keys: Keys, versions: Versions) -> None:
    for key in keys:
        stage.hash.delete(key)


def _take(stage: _Stage, keys: Keys, versions: Versions) -> None:
    for key in keys:
        stage.hash.lookup_and_delete(key)


def _delete_by_batch(stage: _Stage, keys: Keys, versions: Versions) -> None:
    stage.hash.delete_many(keys)


def _by_program(way: int) -> Write:
    def write(stage: _Stage, keys: Keys, versions: Versions) -> None:
        for key, version in zip(keys, versions, strict=True):
            call = np.array([(way, key, version, 0)], _CALL)
            stage.program.test_run(context=call)
            if call["answer"][0]:
                raise LabError(f"A program's write was refused: {call['answer'][0]}.")

    return write


def _by_mapping(stage: _Stage, keys: Keys, versions: Versions) -> None:
    with mapped(stage.array) as memory:
        memory.values[keys] = versions


def _switch(stage: _Stage, keys: Keys, versions: Versions) -> None:
    for key in keys:
        stage.outer.update(key, stage.spare.fd)


def _to_another_map(stage: _Stage, keys: Keys, versions: Versions) -> None:
    for key, version in zip(keys, versions, strict=True):
        stage.other.update(key, version)


def _refused(stage: _Stage, keys: Keys, versions: Versions) -> None:
    for key, version in zip(keys, versions, strict=True):
        with suppress(KeyExists):
            stage.hash.update(key, version, UpdateFlag.NOEXIST)


@dataclass(frozen=True)
class _Path:
    name: str
    watched: str  # field of _Stage
    write: Write
    group: str  # who writes: "system call", "program", "nobody" that can be hooked; or "no write"
    kind: ChangeKind = ChangeKind.UPDATE
    switch: bool = False


_PATHS = (
    _Path("update, system call", "hash", _by_system_call, "system call"),
    _Path("update, libbpf", "hash", _by_libbpf, "system call"),
    _Path("update, bpftool", "hash", _by_bpftool, "system call"),
    _Path("update, batch", "hash", _by_batch, "system call"),
    _Path("delete", "hash", _delete, "system call", ChangeKind.DELETE),
    _Path("lookup-and-delete", "hash", _take, "system call", ChangeKind.DELETE),
    _Path("delete, batch", "hash", _delete_by_batch, "system call", ChangeKind.DELETE),
    _Path("outer map's slot", "outer", _switch, "system call", switch=True),
    _Path("program's update", "hash", _by_program(_PROGRAM_UPDATE), "program"),
    _Path("program's delete", "hash", _by_program(_PROGRAM_DELETE), "program", ChangeKind.DELETE),
    _Path("program's store", "hash", _by_program(_PROGRAM_STORE), "nobody"),
    _Path("store by mmap", "array", _by_mapping, "nobody"),
    _Path("inner map switched", "array", _switch, "nobody", switch=True),
    _Path("another map", "hash", _to_another_map, "no write"),
    _Path("failed update", "hash", _refused, "no write"),
)


@experiment(
    "coverage-matrix",
    number=44,
    family="sync",
    question="Which hooks see which ways of writing a map, and what must a pull catch?",
    claims=("3.1a", "4.2"),
    needs=(
        "bpf", "compile", "syscall_program", "tp_btf", "hash", "batch_hash", "map_in_map",
        "mmapable_array", "ringbuf", "bpftool",
    ),
    quick={"writes": 101, "switches": 5, "calls": 5_000, "rounds": 3},
    full={"writes": 499, "switches": 23, "calls": 50_000, "rounds": 9},
)  # fmt: skip
def coverage_matrix(*, writes: int, switches: int, calls: int, rounds: int) -> Tables:
    """Write maps in every way there is, and count what each mechanism reports.

    A hook on the return of bpf(2) sees what processes do, and nothing of what programs do. Hooks on
    the map type's functions see both. A store through a pointer that a program has looked up, and
    one through a mapping of the map, pass no function of the kernel; and when an outer map is
    switched to another inner map, nothing of the inner map changes that a follower watches. Only
    reading the map again tells of these. Kprobes on the map's functions are skipped while a system
    call changes a map (``bpf_disable_instrumentation`` in kernel/bpf/syscall.c).

    Parameters
    ----------
    writes : int
        Writes in each way; at most 512, the longest batch that the hook on bpf(2) follows.
    switches : int
        Switches of an inner map; each waits for the kernel's readers.
    calls : int
        Calls that are timed, of each sort and round.
    rounds : int
        Rounds without a hook and with one, in turns.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a write; in broken (programs' writes, and stores, followed by
        the hook on bpf(2) alone) and control (system calls) an anomaly is one that was not seen;
        in fixed (the same hook with a pull every 50 ms) a key that differs in the end, with
        ``cost_ns`` of the pull per key. ``matrix``: one row for each path and mechanism with
        columns ``path``, ``group`` (who writes: ``system call``, ``program``, ``nobody`` that
        could be hooked; or ``no write``, where silence is right), ``mechanism`` (of
        `labkit.sync.trace_hook.MECHANISMS`, or ``pull``: two snapshots compared), ``writes``,
        ``seen``, ``false_events`` (events of no write) (int64) and ``answer`` (why it was refused;
        then nothing was seen or missed). ``overhead``: ``round``, ``mechanism``, ``call``,
        ``hooked`` (bool) and ``ns`` (float64, per call from Python, the interpreter included: only
        differences are the hook's; the median over pieces of 100 calls).
    """
    if writes > 512:
        raise BadInput("writes of coverage-matrix is at most 512.")
    matrix: list[dict[str, object]] = []
    overhead: list[dict[str, object]] = []
    triad = Triad("unseen write")
    with _stage(writes, switches) as stage:
        for mechanism in MECHANISMS:
            say(f"{len(_PATHS)} ways to write, seen by {mechanism}")
            matrix += _seen_by_hooks(stage, mechanism, writes, switches)
        say("the same, seen by a pull")
        matrix += [_seen_by_pull(stage, path, writes, switches) for path in _PATHS]
        table = pd.DataFrame(matrix)
        working = [m for m in MECHANISMS if not table[table["mechanism"] == m]["answer"].any()]
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}: the price of a hook")
            overhead += _overhead(stage, working, calls, turn)
        for _, row in table[table["mechanism"] == "syscalls"].iterrows():
            if row["group"] == "no write":
                triad.add(
                    "control", case=row["path"], operations=row["writes"],
                    anomalies=row["false_events"], anomaly="false event",
                )  # fmt: skip
            else:
                triad.add(
                    "control" if row["group"] == "system call" else "broken", case=row["path"],
                    operations=row["writes"], anomalies=row["writes"] - row["seen"],
                )  # fmt: skip
        say("a hook and a pull together")
        _converge(stage, triad, writes, switches)
    return {"counts": triad.table(), "matrix": table, "overhead": pd.DataFrame(overhead)}


def _prepared(stage: _Stage, path: _Path, writes: int, switches: int) -> tuple[Keys, Versions]:
    """Bring the maps to their first state; answers what is to be written."""
    keys = np.arange(writes, dtype=np.uint32)
    for table in (stage.hash, stage.array):
        table.update_many(keys, np.ones(writes, np.uint64))
    stage.spare.update_many(keys, np.full(writes, 3, np.uint64))
    if path.switch:
        for slot in range(switches):
            stage.outer.update(slot, stage.array.fd)
        keys = keys[:switches]
    return keys, np.full(len(keys), 2, np.uint64)


def _seen_by_hooks(
    stage: _Stage, mechanism: str, writes: int, switches: int
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for watched in ("hash", "outer", "array"):
        table: Map = getattr(stage, watched)
        paths = [path for path in _PATHS if path.watched == watched]
        with Channel.create(_RING_BYTES) as channel:
            try:
                hooks = Hooks(table, channel, mechanism=mechanism)
            except LabError as error:
                rows += [_row(path, mechanism, 0, 0, 0, str(error)) for path in paths]
                continue
            layout = event_dtype(table.key_dtype, table.value_dtype)
            with hooks, RingReader(channel.ring, layout) as reader:
                for path in paths:
                    keys, versions = _prepared(stage, path, writes, switches)
                    reader.read()
                    path.write(stage, keys, versions)
                    events = reader.read()
                    seen = np.isin(keys, events["key"][events["kind"] == path.kind])
                    if path.kind == ChangeKind.UPDATE and not path.switch:
                        seen &= np.isin(keys, events["key"][events["version"] == 2])
                    meant = 0 if path.group == "no write" else int(seen.sum())
                    rows.append(_row(path, mechanism, len(keys), meant, len(events) - meant))
    order = [path.name for path in _PATHS]
    return sorted(rows, key=lambda row: order.index(str(row["path"])))


def _seen_by_pull(stage: _Stage, path: _Path, writes: int, switches: int) -> dict[str, object]:
    keys, versions = _prepared(stage, path, writes, switches)
    table: Map = getattr(stage, path.watched)
    before = table.snapshot()
    path.write(stage, keys, versions)
    after = table.snapshot()
    old = set(zip(before.keys.tolist(), before.values.tolist(), strict=True))
    new = set(zip(after.keys.tolist(), after.values.tolist(), strict=True))
    changed = {key for key, _ in old ^ new}
    seen = len(changed & set(keys.tolist()))
    false_events = len(changed) if path.group == "no write" else len(changed) - seen
    return _row(path, _PULL, len(keys), 0 if path.group == "no write" else seen, false_events)


def _row(
    path: _Path, mechanism: str, writes: int, seen: int, false_events: int, answer: str = ""
) -> dict[str, object]:
    return {
        "path": path.name,
        "group": path.group,
        "mechanism": mechanism,
        "writes": writes,
        "seen": seen,
        "false_events": false_events,
        "answer": answer,
    }


def _converge(stage: _Stage, triad: Triad, writes: int, switches: int) -> None:
    """Follow what the hook does not see by the same hook and a periodic pull."""
    for watched in ("hash", "array"):
        table: Map = getattr(stage, watched)
        unseen = [
            path
            for path in _PATHS
            if path.watched == watched and path.group in ("program", "nobody")
        ]
        with TraceHook(mechanism="syscalls", pull_s=_PULL_S) as strategy:
            strategy.attach(table)
            for path in unseen:
                keys, versions = _prepared(stage, path, writes, switches)
                path.write(stage, keys, versions)
                if path.switch:
                    _pull_through(stage, triad, path, len(keys))
                    continue
                deadline = time.monotonic() + _CONVERGE_S
                while strategy.replica.differs(table.snapshot()) and time.monotonic() < deadline:
                    strategy.poll(_PULL_S)
                begun = time.monotonic_ns()
                snapshot = table.snapshot()
                differs = strategy.replica.differs(snapshot)
                triad.add(
                    "fixed", case=f"{path.name}, and a pull", operations=len(keys),
                    anomalies=min(differs, len(keys)), anomaly="key that differs",
                    cost_ns=(time.monotonic_ns() - begun) / writes,
                )  # fmt: skip


def _pull_through(stage: _Stage, triad: Triad, path: _Path, switches: int) -> None:
    """A switch is caught by asking the outer map first which map there is to read."""
    replica = Replica(stage.array)
    begun = time.monotonic_ns()
    replica.load(stage.array.snapshot(), started_ns=begun)
    differing = 0
    for slot in range(switches):
        with Map.from_id(int(stage.outer.lookup(slot)), key="u4", value="u8") as shown:
            replica.resync(shown.snapshot(), started_ns=time.monotonic_ns())
        differing += int(replica.differs(stage.spare.snapshot()) > 0)
    triad.add(
        "fixed", case=f"{path.name}, pulled through the outer", operations=switches,
        anomalies=differing, anomaly="map that differs",
        cost_ns=(time.monotonic_ns() - begun) / switches / stage.spare.max_entries,
    )  # fmt: skip


def _overhead(
    stage: _Stage, mechanisms: list[str], calls: int, turn: int
) -> list[dict[str, object]]:
    value = np.ones(1, np.uint64)
    sorts: dict[str, Callable[[], int]] = {
        "update, watched map": stage.hash.updater(0, value),
        "update, another map": stage.other.updater(0, value),
        "getppid": os.getppid,
    }
    rows: list[dict[str, object]] = []
    for mechanism in mechanisms:
        for hooked in (False, True):
            with ExitStack() as stack:
                if hooked:
                    channel = stack.enter_context(Channel.create(_RING_BYTES))
                    # Nobody reads along: what a follower costs is not the hook's price.
                    stack.enter_context(
                        Hooks(stage.hash, channel, mechanism=mechanism, wakeup="never")
                    )
                for sort, call in sorts.items():
                    rows.append(
                        {
                            "round": turn,
                            "mechanism": mechanism,
                            "call": sort,
                            "hooked": hooked,
                            "ns": _timed(call, calls),
                        }
                    )
    return rows


def _timed(call: Callable[[], int], calls: int) -> float:
    """Nanoseconds of a call: the median over pieces, so that other load on the CPU falls out."""
    pieces = []
    for _ in range(max(calls // _PIECE, 1)):
        begun = time.monotonic_ns()
        for _ in range(_PIECE):
            call()
        pieces.append((time.monotonic_ns() - begun) / _PIECE)
    return float(np.median(pieces))
