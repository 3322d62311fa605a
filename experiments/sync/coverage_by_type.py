"""Which hooks see the writes of each type of map, by each way of writing it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.sync.map_sorts import SORTS, MapSort, made
from labkit.errors import BadInput, LabError, Unavailable
from labkit.figures import Figure, cells, style
from labkit.kernel import libbpf, programs
from labkit.kernel.maps import OF_MAPS, PER_CPU, Map, MapError
from labkit.kernel.programs import Program
from labkit.kernel.ringbuf import RingReader
from labkit.lab.experiment import Case, Statement, Tables, experiment, say
from labkit.runs import Run, Triad
from labkit.sync.changes import ChangeKind, event_dtype
from labkit.sync.ring_events import Channel
from labkit.sync.trace_hook import MECHANISMS, Hooks

_PULL = "pull"
_RING_BYTES = 1 << 20
_MOST_WRITES = 512  # the longest batch that the hook on bpf(2) follows
_SPARE = 1_024  # entries more than keys: an LRU map must not evict while it is watched

_PROGRAMS = ("update_all", "delete_all", "store_all")

Write = Callable[["_Stage"], None]


class _Refused(LabError):
    """The kernel allows no such write of such a map."""


@dataclass(frozen=True)
class _Stage:
    """A map with what writes it: its keys, the value that they have, and the one they get."""

    table: Map
    keys: npt.NDArray[np.unsignedinteger]
    old: int
    new: int
    programs: dict[str, Program]

    def fill(self) -> None:
        for key in self.keys:
            self.table.update(key, self.old)

    def new_values(self) -> npt.NDArray[np.unsignedinteger]:
        shape = (len(self.keys), libbpf.possible_cpus())
        many = shape if self.table.kind in PER_CPU else shape[:1]
        return np.full(many, self.new, self.table.value_dtype)


def _update(stage: _Stage) -> None:
    for key in stage.keys:
        stage.table.update(key, stage.new)


def _update_batch(stage: _Stage) -> None:
    stage.table.update_many(stage.keys, stage.new_values())


def _delete(stage: _Stage) -> None:
    for key in stage.keys:
        stage.table.delete(key)


def _delete_batch(stage: _Stage) -> None:
    stage.table.delete_many(stage.keys)


def _take(stage: _Stage) -> None:
    for key in stage.keys:
        stage.table.lookup_and_delete(key)


def _take_batch(stage: _Stage) -> None:
    table = stage.table
    # A hash is taken bucket by bucket, so that there must be room for a whole one.
    room = 2 * len(stage.keys)
    keys, place = np.zeros(room, table.key_dtype), np.zeros(8, np.uint8)
    values = np.zeros(room * len(table.value_buffer()), np.uint8)
    count = ctypes.c_uint32(room)
    result = libbpf.api().bpf_map_lookup_and_delete_batch(
        table.fd, None, place.ctypes.data, keys.ctypes.data, values.ctypes.data,
        ctypes.byref(count), ctypes.byref(libbpf.BatchOpts()),
    )  # fmt: skip
    if count.value != len(stage.keys):
        raise _Refused(libbpf.error_name(-result))


def _by_program(name: str) -> Write:
    def write(stage: _Stage) -> None:
        if name not in stage.programs:
            raise _Refused("not tried: no program may")
        if stage.programs[name].test_run().value != len(stage.keys):
            raise _Refused("the helper refuses")

    return write


@dataclass(frozen=True)
class _Path:
    name: str
    write: Write
    group: str  # who writes: "system call", "program", or "nobody" that can be hooked
    kind: ChangeKind = ChangeKind.UPDATE


_PATHS = (
    _Path("update", _update, "system call"),
    _Path("update, batch", _update_batch, "system call"),
    _Path("delete", _delete, "system call", ChangeKind.DELETE),
    _Path("delete, batch", _delete_batch, "system call", ChangeKind.DELETE),
    _Path("lookup-and-delete", _take, "system call", ChangeKind.DELETE),
    _Path("lookup-and-delete, batch", _take_batch, "system call", ChangeKind.DELETE),
    _Path("program's update", _by_program("update_all"), "program"),
    _Path("program's delete", _by_program("delete_all"), "program", ChangeKind.DELETE),
    _Path("program's store", _by_program("store_all"), "nobody"),
)


def _slug(sort: MapSort) -> str:
    return sort.name.lower().replace(", ", "-").replace("_", "-").replace(" ", "-")


_JUDGED = {
    "broken": ("program", "syscalls", ("program", "nobody")),
    "control": ("process", "syscalls", ("system call",)),
    "fixed": ("pull", _PULL, ("program", "nobody")),
}
"""By variant: a word for the cases' ids, the mechanism, and whose writes it is to see."""

_CASES = tuple(
    Case(variant, f"{_slug(sort)}-{by}", sort.name, map=sort.name, mechanism=mechanism)
    for variant, (by, mechanism, _) in _JUDGED.items()
    for sort in SORTS
    if variant == "control" or sort.kind not in OF_MAPS  # no program may write one
)  # fmt: skip


def _derived(tables: Tables) -> Tables:
    """Counts by type, and what each mechanism sees of each way of writing each type."""
    matrix, triad = tables["matrix"], Triad("unseen write")
    for case in _CASES:
        of_map = matrix[
            (matrix["map"] == case.map)
            & (matrix["mechanism"] == case.mechanism)
            & matrix["group"].isin(_JUDGED[case.variant][2])
        ]
        written, seen = int(of_map["writes"].sum()), int(of_map["seen"].sum())
        triad.add(case.variant, case=case.id, operations=written, anomalies=written - seen)
    sights = matrix[["map", "path", "group", "mechanism"]].assign(
        sees=[_sight(row) for row in matrix.to_dict("records")]
    )
    # Where the kernel allows no such write, there is nothing to see.
    return {"counts": triad.table(), "sights": sights[sights["sees"] != "no such write"]}


def _sight(row: dict[Any, Any]) -> str:
    if row["answer"]:
        return "refused"
    if not row["writes"]:
        return "no such write" if row["refused"] else "not tried"
    return "nothing" if not row["seen"] else "all" if row["seen"] == row["writes"] else "some"


_TITLES = {"functions": "fexit on functions", "kprobes": "kprobe on functions",
           "syscalls": "return of bpf(2)", _PULL: "periodic pull"}  # fmt: skip


def _figure(run: Run) -> Figure:
    """Draw one square for each type and way: all seen, some, none; and what cannot be."""
    from matplotlib import pyplot

    matrix = run.table("matrix")
    maps, paths = list(matrix["map"].unique()), list(matrix["path"].unique())
    rows = {(row["mechanism"], row["map"], row["path"]): row for row in matrix.to_dict("records")}
    figure, axes = pyplot.subplots(1, len(_TITLES), figsize=(6.9, 3.0), sharey=True)
    for ax, (mechanism, title) in zip(axes, _TITLES.items(), strict=True):

        def cell(x: int, y: int, mechanism: str = mechanism) -> cells.Cell:
            row = rows[mechanism, maps[x], paths[y]]
            if row["answer"]:
                return cells.REFUSED, ""
            if not row["writes"]:
                return cells.EMPTY, ""
            colour, _ = cells.share(row["seen"], row["writes"])
            return colour, {style.GREEN: "●", style.YELLOW: "◐"}.get(colour, "○")

        cells.draw_cells(ax, maps, paths, cell, size=6)
        ax.xaxis.tick_bottom()
        ax.tick_params(axis="x", rotation=90, length=0, labelsize=6)
        ax.set_title(title, fontsize=7)
    figure.supxlabel(
        "● all seen   ◐ some   ○ none\ngrey: hook refused   empty: no such write",
        x=0.01, ha="left", fontsize=6.5,
    )  # fmt: skip
    return figure


@experiment(
    "coverage-by-type",
    number=48,
    family="sync",
    question="Does a hook see every type of map, and every command that writes it?",
    claims=("4.2",),
    needs=(
        "bpf", "compile", "test_run", "tp_btf", "hash", "no_prealloc", "lru", "percpu",
        "map_in_map", "batch_hash", "ringbuf",
    ),
    quick={"writes": 23, "switches": 5},
    full={"writes": 499, "switches": 101},
    cases=_CASES,
    derive=_derived,
    statements=(
        Statement("the hook on bpf(2) sees no write of a program", "all(broken)"),
        Statement("the hook on bpf(2) sees every write of a process", "none(control)"),
        Statement("two snapshots show every key that a program wrote", "none(fixed)"),
        # A kernel may refuse a hook; one that it takes sees everything, or nothing.
        Statement("fexit on a type's functions sees all that processes and programs write",
                  'all(sights(mechanism="functions", group=("system call", "program")).sees == '
                  '"all" or sights(mechanism="functions", group=("system call", "program")).sees '
                  '== "refused")'),
        Statement("the return of bpf(2) sees all that processes write, by every command",
                  'all(sights(mechanism="syscalls", group="system call").sees == "all")'),
        Statement("the return of bpf(2) sees nothing that programs write or store",
                  'all(sights(mechanism="syscalls", group=("program", "nobody")).sees == '
                  '"nothing")'),
        # Which functions' kprobes the kernel skips is the matter of kprobe-trap.
        Statement("no hook on functions sees what programs store",
                  'all(sights(mechanism=("functions", "kprobes"), group="nobody").sees == '
                  '"nothing" or sights(mechanism=("functions", "kprobes"), group="nobody").sees '
                  '== "refused")'),
        Statement("a pull finds every key that was written, by whomever",
                  'all(sights(mechanism="pull").sees == "all")'),
    ),
    sentence="Of the writes of 10 types of map by 9 ways, each as far as the kernel allows it, the "
    "hook on bpf(2) missed {control} of processes and {broken} of programs, a pull "
    'missed {fixed} of programs. This kernel refused the hook in {rows(sights(sees="refused"))} of '
    '{rows(sights(mechanism != "pull"))} trials.',
    figure=_figure,
)  # fmt: skip
def coverage_by_type(*, writes: int, switches: int) -> Tables:
    """Write a map of each type by each command and by a program, and count what each hook tells of.

    The functions that a hook stands on belong to a type of map: a hook on those of the hash sees
    no array. bpf(2) has functions of its own for per-CPU maps and maps of maps, and takes
    elements in batches by a third. The return of bpf(2) is one place for all of them.

    Parameters
    ----------
    writes : int
        Writes of each type and way; at most 512, the longest batch that the hook on bpf(2)
        follows.
    switches : int
        The same for maps of maps, whose writers wait for the kernel's readers.

    Returns
    -------
    dict of DataFrame
        ``matrix``: one row for each type, path and mechanism with columns ``map``, ``path``,
        ``group`` (``system call``, ``program``, or
        ``nobody`` that could be hooked), ``mechanism`` (of `labkit.sync.trace_hook.MECHANISMS`, or
        ``pull``), ``writes`` and ``seen`` (int64; 0 where there is no such write), ``refused``
        (why there is none) and ``answer`` (why the kernel refuses the hook; it is not asked again
        for the types that follow).
    """
    if writes > _MOST_WRITES:
        raise BadInput(f"writes of coverage-by-type are {_MOST_WRITES} at most.")
    rows: list[dict[str, object]] = []
    answers: dict[str, str] = {}
    for sort in SORTS:
        say(f"{len(_PATHS)} ways to write, each watched in {len(MECHANISMS) + 1} ways: {sort.name}")
        rows += _watched(sort, switches if sort.kind in OF_MAPS else writes, answers)
    return {"matrix": pd.DataFrame(rows)}


def _watched(sort: MapSort, writes: int, answers: dict[str, str]) -> list[dict[str, object]]:
    """Rows of one type; ``answers`` are those of mechanisms that the kernel refused."""
    rows: list[dict[str, object]] = []
    with ExitStack() as stack:
        # A lookup in an outer map may wait for all readers: its snapshot has no empty slot to try.
        spare = _SPARE if sort.evicts else 0
        table, (old, new) = stack.enter_context(made(sort, writes + spare))
        loaded: dict[str, Program] = {}
        if sort.kind not in OF_MAPS:  # no program may write one
            unit = stack.enter_context(
                programs.load(
                    "coverage_by_type",
                    TABLE_FD=table.fd,
                    WRITES=writes,
                    VALUE=new,
                    **sort.key_form,
                )
            )
            loaded = {name: unit.program(name) for name in _PROGRAMS}
        stage = _Stage(table, sort.keys(writes), old, new, loaded)
        for mechanism in MECHANISMS:
            if mechanism not in answers:
                try:
                    rows += _by_hooks(sort, stage, mechanism)
                    continue
                except Unavailable as error:
                    answers[mechanism] = str(error)
            rows += [
                _row(sort, path, mechanism, 0, 0, answer=answers[mechanism]) for path in _PATHS
            ]
        rows += [_by_pull(sort, stage, path) for path in _PATHS]
    return rows


def _by_hooks(sort: MapSort, stage: _Stage, mechanism: str) -> list[dict[str, object]]:
    rows = []
    layout = event_dtype(stage.table.key_dtype, stage.table.value_dtype)
    with (
        Channel.create(_RING_BYTES) as channel,
        Hooks(stage.table, channel, mechanism=mechanism),
        RingReader(channel.ring, layout) as reader,
    ):
        for path in _PATHS:
            stage.fill()
            reader.read()
            if refused := _refusal(stage, path):
                rows.append(_row(sort, path, mechanism, 0, 0, refused=refused))
                continue
            events = reader.read()
            told = events["key"][events["kind"] == path.kind]
            seen = int(np.isin(stage.keys, told).sum())
            rows.append(_row(sort, path, mechanism, len(stage.keys), seen))
    return rows


def _by_pull(sort: MapSort, stage: _Stage, path: _Path) -> dict[str, object]:
    stage.fill()
    before = _entries(stage.table)
    if refused := _refusal(stage, path):
        return _row(sort, path, _PULL, 0, 0, refused=refused)
    after = _entries(stage.table)
    seen = sum(before.get(key) != after.get(key) for key in stage.keys.tolist())
    return _row(sort, path, _PULL, len(stage.keys), seen)


def _entries(table: Map) -> dict[int, bytes]:
    snapshot = table.snapshot()
    return {
        int(key): value.tobytes() for key, value in zip(snapshot.keys, snapshot.values, strict=True)
    }


def _refusal(stage: _Stage, path: _Path) -> str:
    """Write; why the kernel does not allow it, or nothing."""
    try:
        path.write(stage)
    except MapError as error:
        return libbpf.error_name(error.errno or 0)
    except _Refused as error:
        return str(error)
    return ""


def _row(
    sort: MapSort,
    path: _Path,
    mechanism: str,
    writes: int,
    seen: int,
    *,
    refused: str = "",
    answer: str = "",
) -> dict[str, object]:
    return {
        "map": sort.name,
        "path": path.name,
        "group": path.group,
        "mechanism": mechanism,
        "writes": writes,
        "seen": seen,
        "refused": refused,
        "answer": answer,
    }
