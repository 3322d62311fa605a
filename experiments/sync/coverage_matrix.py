"""Which hooks see which ways of writing a map, and what they cost those who write."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import BadInput, LabError
from labkit.figures import Axes, cells, style
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import MapFlag, MapKind, ProgramKind, UpdateFlag
from labkit.kernel.mapping import mapped
from labkit.kernel.maps import KeyExists, Map
from labkit.kernel.parallel import Child
from labkit.kernel.programs import Program
from labkit.kernel.ringbuf import RingReader
from labkit.kernel.tools import bpftool_command
from labkit.lab.experiment import Case, Statement, Tables, experiment, say
from labkit.runs import Run, Triad
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
    program: Program  # writes the hash


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
            program=unit.program("write_map", ProgramKind.SYSCALL),
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


_PATHS = (
    Case("control", "system-call", "update, system call", group="system call",
         write=_by_system_call),
    Case("control", "libbpf", "update, libbpf", group="system call", write=_by_libbpf),
    Case("control", "bpftool", "update, bpftool", group="system call", write=_by_bpftool),
    Case("control", "batch", "update, batch", group="system call", write=_by_batch),
    Case("control", "delete", "delete", group="system call", write=_delete, deletes=True),
    Case("control", "take", "lookup-and-delete", group="system call", write=_take, deletes=True),
    Case("control", "batch-delete", "delete, batch", group="system call", write=_delete_by_batch,
         deletes=True),
    Case("control", "outer-slot", "outer map's slot", group="system call", watched="outer",
         write=_switch, switch=True),
    Case("broken", "program-update", "program's update", group="program",
         write=_by_program(_PROGRAM_UPDATE)),
    Case("broken", "program-delete", "program's delete", group="program",
         write=_by_program(_PROGRAM_DELETE), deletes=True),
    Case("broken", "program-store", "program's store", group="nobody",
         write=_by_program(_PROGRAM_STORE)),
    Case("broken", "mmap-store", "store by mmap", group="nobody", watched="array",
         write=_by_mapping),
    Case("broken", "inner-switched", "inner map switched", group="nobody", watched="array",
         write=_switch, switch=True),
    Case("control", "another-map", "another map", group="no write", write=_to_another_map),
    Case("control", "failed-update", "failed update", group="no write", write=_refused),
)  # fmt: skip
"""Ways to write, each by ``write`` into the map ``watched`` (of `_Stage`; ``hash`` by default).
``group`` says who writes: a system call, a program, nobody that could be hooked; or that there is
no write of that map, so that silence is right."""

_PULLED = (
    Case("fixed", "program-update-pulled", "program's update, and a pull"),
    Case("fixed", "program-delete-pulled", "program's delete, and a pull"),
    Case("fixed", "program-store-pulled", "program's store, and a pull"),
    Case("fixed", "mmap-store-pulled", "store by mmap, and a pull"),
    Case("fixed", "inner-switched-pulled", "inner map switched, pulled through the outer"),
)


def _derived(tables: Tables) -> Tables:
    """Counts, what each mechanism sees of each way to write, and what a hook adds to a call."""
    matrix = tables["matrix"]
    triad = Triad("unseen write")
    variants = {case.id: case.variant for case in _PATHS}
    for row in matrix[matrix["mechanism"] == "syscalls"].to_dict("records"):
        silent = row["group"] == "no write"
        # An event of no write is an operation that went wrong as well.
        triad.add(
            variants[row["case"]], case=row["case"], operations=row["writes"] + row["false_events"],
            anomalies=(0 if silent else row["writes"] - row["seen"]) + row["false_events"],
            anomaly="false event" if silent else None,
        )  # fmt: skip
    for row in tables["copies"].to_dict("records"):
        of_maps = row["case"] == "inner-switched-pulled"
        triad.add(
            "fixed", case=row["case"], operations=row["compared"], anomalies=row["differing"],
            anomaly="map that differs" if of_maps else "key that differs", cost_ns=row["pull_ns"],
        )  # fmt: skip
    sights = matrix[["case", "group", "mechanism"]].assign(
        sees=[_sight(row) for row in matrix.to_dict("records")]
    )
    of = ["mechanism", "call", "round"]
    price = tables["overhead"].pivot(index=of, columns="hooked", values="ns").reset_index()
    price = price.assign(added_ns=price[True] - price[False], plain_ns=price[False])
    return {
        "counts": triad.table(),
        "sights": sights,
        "price": price[[*of, "added_ns", "plain_ns"]],
    }


def _sight(row: Mapping[Any, Any]) -> str:
    if row["answer"]:
        return "refused"
    if not row["writes"]:
        return "not tried"
    if row["false_events"]:
        return "what was not written"
    return "nothing" if not row["seen"] else "all" if row["seen"] == row["writes"] else "some"


_MECHANISMS = {
    "functions": "fexit on\nfunctions",
    "kprobes": "kprobe on\nfunctions",
    "syscalls": "return\nof bpf(2)",
    _PULL: "periodic\npull",
}


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw one cell for each path and mechanism, with the share in it."""
    matrix = run.table("matrix")
    matrix = matrix[matrix["group"] != "no write"]
    paths = list(matrix["case"].unique())
    rows = matrix.set_index(["mechanism", "case"])
    ax = style.axes(ax, height=1.1 + 0.22 * len(paths))

    def cell(x: int, y: int) -> cells.Cell:
        row = rows.loc[(list(_MECHANISMS)[x], paths[y])]
        if row["answer"]:
            return cells.refusal(str(row["answer"]))
        return cells.share(int(row["seen"]), int(row["writes"]))

    cells.draw_cells(
        ax, list(_MECHANISMS.values()), [run.label(path) for path in paths], cell, label_size=8
    )
    groups = matrix[matrix["mechanism"] == _PULL]["group"].tolist()
    for y in range(1, len(groups)):
        if groups[y] != groups[y - 1]:
            ax.axhline(y - 0.5, color="black", linewidth=0.8)
    ax.set_xlabel("writes seen; grey: this kernel refuses the hook", loc="right")
    return ax


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
    cases=_PATHS + _PULLED,
    derive=_derived,
    statements=(
        Statement("the hook on bpf(2) tells of each write by a system call, and of nothing else",
                  "none(control)"),
        Statement("the hook on bpf(2) sees nothing that passes no system call", "all(broken)"),
        Statement("with a pull, the copy is right in the end", "none(fixed)"),
        # A kernel may refuse a hook; one that it takes sees everything, or nothing.
        Statement("fexit on the type's functions sees all that system calls and programs write",
                  'all(sights(mechanism="functions", group=("system call", "program")).sees == '
                  '"all" or sights(mechanism="functions", group=("system call", "program")).sees '
                  '== "refused")'),
        Statement("the return of bpf(2) sees all that system calls write",
                  'all(sights(mechanism="syscalls", group="system call").sees == "all")'),
        Statement("the return of bpf(2) sees nothing that a program writes",
                  'all(sights(mechanism="syscalls", group="program").sees == "nothing")'),
        Statement("no hook sees a store, or a switch above the map that it watches",
                  'all(sights(mechanism=("functions", "kprobes", "syscalls"), group="nobody").sees '
                  '== "nothing" or sights(mechanism=("functions", "kprobes", "syscalls"), '
                  'group="nobody").sees == "refused")'),
        Statement("a pull finds every key that was written, by whatever way",
                  'all(sights(case != "inner-switched", mechanism="pull", group=("system call", '
                  '"program", "nobody")).sees == "all")'),
        Statement("a pull of the inner map does not tell that the outer one left it",
                  'sights(mechanism="pull", case="inner-switched").sees == "nothing"'),
        # Not of kprobes: they come before the function knows of success.
        Statement("nothing is told of other maps and of failed writes",
                  'all(sights(mechanism=("functions", "syscalls", "pull"), group="no write").sees '
                  '== "nothing" or sights(mechanism=("functions", "syscalls", "pull"), '
                  'group="no write").sees == "refused")'),
    ),
    sentence='The hook on the return of bpf(2) missed {control(group="system call")} writes by '
    "system calls, and {broken} that pass none; with a pull, {fixed} differed in the end. It added "
    '{median(price(mechanism="syscalls", call="update, watched map").added_ns)} ns to an update of '
    'the map that it watches, and {median(price(mechanism="syscalls", call="getppid").added_ns)} '
    'ns to every other system call. This kernel refused the hook in {rows(sights(sees="refused"))} '
    'of {rows(sights(mechanism != "pull"))} trials.',
    figure=_figure,
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
        ``matrix``: one row for each path and mechanism with columns ``case`` (of `_PATHS`),
        ``group``, ``mechanism`` (of `labkit.sync.trace_hook.MECHANISMS`, or ``pull``: two
        snapshots compared), ``writes``, ``seen`` (of them), ``false_events`` (of no write, or the
        second of one) (int64) and ``answer`` (why it was refused; then nothing was seen or
        missed). ``copies``: one row for each path that the hook on bpf(2) does not see, followed
        by it and a pull every 50 ms, with ``case``, ``compared`` and ``differing`` (keys of the
        map and of its copy in the end, or inner maps; int64) and ``pull_ns`` (of the pull, per
        key). ``overhead``: ``round``, ``mechanism``, ``call``,
        ``hooked`` (bool) and ``ns`` (float64, per call from Python, the interpreter included: only
        differences are the hook's; the median over pieces of 100 calls).
    """
    if writes > 512:
        raise BadInput("writes of coverage-matrix is at most 512.")
    matrix: list[dict[str, object]] = []
    overhead: list[dict[str, object]] = []
    with _stage(writes, switches) as stage:
        for mechanism in MECHANISMS:
            say(f"{len(_PATHS)} ways to write, seen by {mechanism}")
            matrix += _seen_by_hooks(stage, mechanism, writes, switches)
        say("the same, seen by a pull")
        matrix += [_seen_by_pull(stage, path, writes, switches) for path in _PATHS]
        table = pd.DataFrame(matrix)
        working = [m for m in MECHANISMS if not table[table["mechanism"] == m]["answer"].any()]
        say(f"the price of a hook, in {rounds} rounds")
        for turn in range(rounds):
            overhead += _overhead(stage, working, calls, turn)
        say("a hook and a pull together")
        copies = _copies(stage, writes, switches)
    return {"matrix": table, "copies": copies, "overhead": pd.DataFrame(overhead)}


def _prepared(stage: _Stage, path: Case, writes: int, switches: int) -> tuple[Keys, Versions]:
    """Bring the maps to their first state; answers what is to be written."""
    keys = np.arange(writes, dtype=np.uint32)
    for table in (stage.hash, stage.array):
        table.update_many(keys, np.ones(writes, np.uint64))
    stage.spare.update_many(keys, np.full(writes, 3, np.uint64))
    if path.get("switch", False):
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
        paths = [path for path in _PATHS if _watched(path) == watched]
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
                    deletes = path.get("deletes", False)
                    kind = ChangeKind.DELETE if deletes else ChangeKind.UPDATE
                    seen = np.isin(keys, events["key"][events["kind"] == kind])
                    if not deletes and not path.get("switch", False):
                        seen &= np.isin(keys, events["key"][events["version"] == 2])
                    meant = 0 if path.group == "no write" else int(seen.sum())
                    rows.append(_row(path, mechanism, len(keys), meant, len(events) - meant))
    order = [path.id for path in _PATHS]
    return sorted(rows, key=lambda row: order.index(str(row["case"])))


def _watched(path: Case) -> str:
    return str(path.get("watched", "hash"))


def _seen_by_pull(stage: _Stage, path: Case, writes: int, switches: int) -> dict[str, object]:
    keys, versions = _prepared(stage, path, writes, switches)
    table: Map = getattr(stage, _watched(path))
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
    path: Case, mechanism: str, writes: int, seen: int, false_events: int, answer: str = ""
) -> dict[str, object]:
    return {
        "case": path.id,
        "group": path.group,
        "mechanism": mechanism,
        "writes": writes,
        "seen": seen,
        "false_events": false_events,
        "answer": answer,
    }


def _copies(stage: _Stage, writes: int, switches: int) -> pd.DataFrame:
    """Follow what the hook does not see by the same hook and a periodic pull."""
    rows: list[dict[str, object]] = []
    for watched in ("hash", "array"):
        table: Map = getattr(stage, watched)
        with TraceHook(mechanism="syscalls", pull_s=_PULL_S) as strategy:
            strategy.attach(table)
            for path in _PATHS:
                if path.variant != "broken" or _watched(path) != watched:
                    continue
                keys, versions = _prepared(stage, path, writes, switches)
                path.write(stage, keys, versions)
                if path.get("switch", False):
                    compared, differing, pull_ns = _pulled_through(stage, len(keys))
                else:
                    compared, differing, pull_ns = _pulled(table, strategy, keys)
                rows.append(
                    {
                        "case": f"{path.id}-pulled",
                        "compared": compared,
                        "differing": differing,
                        "pull_ns": pull_ns,
                    }
                )
    return pd.DataFrame(rows)


def _pulled(table: Map, strategy: TraceHook, written: Keys) -> tuple[int, int, float]:
    """Keys written, in the map or in its copy; how many differ; nanoseconds of a pull per key."""
    deadline = time.monotonic() + _CONVERGE_S
    while strategy.replica.differs(table.snapshot()) and time.monotonic() < deadline:
        strategy.poll(_PULL_S)
    begun = time.monotonic_ns()
    snapshot = table.snapshot()
    differing = strategy.replica.differs(snapshot)
    took = time.monotonic_ns() - begun
    compared = {
        *written.tolist(),
        *snapshot.keys.tolist(),
        *strategy.replica.contents()[0].tolist(),
    }
    return len(compared), differing, took / table.max_entries


def _pulled_through(stage: _Stage, switches: int) -> tuple[int, int, float]:
    """A switch is caught by asking the outer map first which map there is to read."""
    replica = Replica(stage.array)
    begun = time.monotonic_ns()
    replica.load(stage.array.snapshot(), started_ns=begun)
    differing = 0
    for slot in range(switches):
        with Map.from_id(int(stage.outer.lookup(slot)), key="u4", value="u8") as shown:
            replica.resync(shown.snapshot(), started_ns=time.monotonic_ns())
        differing += int(replica.differs(stage.spare.snapshot()) > 0)
    took = time.monotonic_ns() - begun
    return switches, differing, took / switches / stage.spare.max_entries


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
