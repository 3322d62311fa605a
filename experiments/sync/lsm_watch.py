"""The security hook on bpf(2) as a watch on a map: it sees what is asked, not what is done."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from labkit.errors import BadInput, LabError
from labkit.figures import Axes, style
from labkit.judge.checkers import told_of
from labkit.kernel import programs
from labkit.kernel.libbpf import MapKind, UpdateFlag
from labkit.kernel.maps import KeyExists, Map
from labkit.kernel.parallel import Child
from labkit.kernel.programs import BpfObject
from labkit.kernel.ringbuf import RingReader
from labkit.lab.experiment import Case, Statement, Tables, experiment, say
from labkit.runs import Run, Triad
from labkit.sync.changes import ChangeKind, event_dtype
from labkit.sync.ring_events import Channel
from labkit.sync.trace_hook import Hooks, way_to_map

_RING_BYTES = 1 << 20
_MOST_WRITES = 1_000  # of one run of the program
_LSM, _FEXIT = "lsm", "fexit"
_UPDATE, _OTHERS, _DELETE = "update", "update by another process", "delete"
_FAILED, _BY_PROGRAM = "refused update", "program's update"

_CASES = (
    Case("broken", "refused-lsm", "refused update; lsm/bpf", watcher=_LSM, way=_FAILED),
    Case("broken", "program-lsm", "program's update; lsm/bpf", watcher=_LSM, way=_BY_PROGRAM),
    Case("control", "update-lsm", "update; lsm/bpf", watcher=_LSM, way=_UPDATE),
    Case("control", "others-lsm", "update by another process; lsm/bpf", watcher=_LSM, way=_OTHERS),
    Case("control", "delete-lsm", "delete; lsm/bpf", watcher=_LSM, way=_DELETE),
    Case("fixed", "update-fexit", "update; fexit on the type's functions",
         watcher=_FEXIT, way=_UPDATE),
    Case("fixed", "others-fexit", "update by another process; fexit on the type's functions",
         watcher=_FEXIT, way=_OTHERS),
    Case("fixed", "delete-fexit", "delete; fexit on the type's functions",
         watcher=_FEXIT, way=_DELETE),
    Case("fixed", "refused-fexit", "refused update; fexit on the type's functions",
         watcher=_FEXIT, way=_FAILED),
    Case("fixed", "program-fexit", "program's update; fexit on the type's functions",
         watcher=_FEXIT, way=_BY_PROGRAM),
)  # fmt: skip


def _derived(tables: Tables) -> Tables:
    """Counts: a call or write and a telling of none; and how often the calls were told of."""
    told = tables["told"]
    rows, triad = told.set_index(["way", "watcher"]), Triad("unseen write")
    for case in _CASES:
        row = rows.loc[(case.way, case.watcher)]
        triad.add(
            case.variant, case=case.id, operations=max(int(row["writes"]), int(row["told"])),
            anomalies=abs(int(row["changed"]) - int(row["told"])),
            anomaly="told of, though refused" if case.way == _FAILED else None,
        )  # fmt: skip
    calls = told[["way", "watcher"]].assign(
        told_of=told_of(told["writes"], told["told"], np.zeros(len(told)))
    )
    return {"counts": triad.table(), "calls": calls}


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw for each way to write how many changes there were, and how many each hook told of."""
    told = run.table("told")
    ways = list(told["way"].unique())
    ax = style.axes(ax, height=2.4)
    at = np.arange(len(ways))
    lsm = told[told["watcher"] == _LSM].set_index("way")
    fexit = told[told["watcher"] == _FEXIT].set_index("way")
    bars = (
        ("changes", lsm["changed"], style.GREY),
        ("told by lsm/bpf", lsm["told"], style.VERMILLION),
        ("told by fexit", fexit["told"], style.GREEN),
    )
    for place, (label, values, colour) in enumerate(bars):
        ax.barh(at + 0.25 * (place - 1), values.reindex(ways), 0.23, color=colour, label=label)
    ax.set_yticks(at, ways)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel(f"of {int(lsm['writes'].iloc[0]):,} calls or writes", loc="right")
    style.legend_above(ax, 3, columnspacing=1.0, handlelength=1.0, fontsize=6.5)
    return ax


@experiment(
    "lsm-watch",
    number=46,
    family="sync",
    question="Is the security hook on bpf(2) a watch on a map's changes?",
    claims=("3.1a", "4.2"),
    needs=("bpf", "btf", "compile", "test_run", "hash", "ringbuf", "lsm", "fexit"),
    quick={"writes": 200},
    full={"writes": 1_000},
    cases=_CASES,
    derive=_derived,
    statements=(
        Statement("it sees each write of every process, once", "none(control)"),
        Statement("with the values that are to be written",
                  'all(told(watcher="lsm").values_right)'),
        Statement("it tells of each update that the kernel refuses, once",
                  'calls(watcher="lsm", way="refused update").told_of == "once"'),
        Statement("it sees no write of a program", 'all(broken["program-lsm"])'),
        Statement("fexit tells of each change once, and of no refused update", "none(fixed)"),
    ),
    sentence="The LSM program on bpf(2) missed {control} writes of processes, and saw each value "
    'before the map did; it also told of {broken["refused-lsm"]} updates that the kernel then '
    'refused, and missed {broken["program-lsm"]} by a program. fexit on the type\'s functions was '
    "wrong in {fixed}.",
    figure=_figure,
)  # fmt: skip
def lsm_watch(*, writes: int) -> Tables:
    """Write a map in five ways under an LSM program on ``bpf`` and under fexit programs.

    ``security_bpf`` is called with the command and the kernel's copy of its arguments before
    anything is done (kernel/bpf/syscall.c, ``__sys_bpf``): the program there sees every process,
    sees the key and value that are to be written, and could forbid the call. It cannot know
    whether the call will succeed, and what programs write passes no system call.

    Parameters
    ----------
    writes : int
        Of each way; 1,000 at most.

    Returns
    -------
    dict of DataFrame
        ``told``: one row per ``way`` and ``watcher`` (``lsm``; ``fexit`` on the functions of the
        map's type) with ``writes`` (asked for), ``changed`` (that took effect), ``told`` (int64;
        more than ``writes`` where one was told of twice) and ``values_right`` (bool: the LSM
        program read the values that were written; True where there are none).
    """
    if writes > _MOST_WRITES:
        raise BadInput(f"writes of lsm-watch are {_MOST_WRITES:,} at most.")
    rows: list[dict[str, object]] = []
    with (
        Map.create(MapKind.HASH, key="u4", value="u8", max_entries=writes) as table,
        programs.load(
            "lsm_watch", TABLE_FD=table.fd, WRITES=writes, MAP_ID=table.id, **way_to_map()
        ) as loaded,
        Channel.create(_RING_BYTES) as channel,
        Hooks(table, channel, mechanism="functions") as _,
        RingReader(channel.ring, event_dtype(table.key_dtype, table.value_dtype)) as reader,
    ):
        loaded.attach(loaded.program("on_bpf", hook="lsm:bpf"))
        counts = loaded.map("counts")
        for way, write in _WAYS.items():
            say(f"{writes} times: {way}")
            kind = ChangeKind.DELETE if way == _DELETE else ChangeKind.UPDATE
            if way != _UPDATE:
                _fill(table, writes)
            reader.read()
            before = _counted(counts)
            changed = write(loaded, table, writes)
            told = _counted(counts) - before
            events = reader.read()
            wanted = writes * (writes - 1) // 2 if told[0] else 0
            rows += [
                {
                    "way": way, "watcher": _LSM, "writes": writes, "changed": changed,
                    "told": int(told[1] if kind is ChangeKind.DELETE else told[0]),
                    "values_right": int(told[2]) == wanted,
                },
                {
                    "way": way, "watcher": _FEXIT, "writes": writes, "changed": changed,
                    "told": int((events["kind"] == kind).sum()), "values_right": True,
                },
            ]  # fmt: skip
    return {"told": pd.DataFrame(rows)}


def _counted(counts: Map) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array([int(counts.lookup(which)) for which in range(3)], np.int64)


def _fill(table: Map, writes: int) -> None:
    table.update_many(np.arange(writes, dtype="u4"), np.zeros(writes, "u8"))


# Each answers how many of the writes took effect.


def _update(loaded: BpfObject, table: Map, writes: int) -> int:
    for key in range(writes):
        table.update(key, key)
    return writes


def _from_another_process(loaded: BpfObject, table: Map, writes: int) -> int:
    def write() -> int:
        with Map.from_id(table.id, key="u4", value="u8") as theirs:
            return _update(loaded, theirs, writes)

    with Child(write) as child:
        return int(child.result())


def _remove(loaded: BpfObject, table: Map, writes: int) -> int:
    for key in range(writes):
        table.delete(key)
    return writes


def _refused(loaded: BpfObject, table: Map, writes: int) -> int:
    refused = 0
    for key in range(writes):
        try:
            table.update(key, key, UpdateFlag.NOEXIST)
        except KeyExists:
            refused += 1
    return writes - refused


def _by_program(loaded: BpfObject, table: Map, writes: int) -> int:
    if loaded.program("update_all").test_run().value != writes:
        raise LabError("The program's update was refused.")
    return writes


_WAYS: dict[str, Callable[[BpfObject, Map, int], int]] = {
    _UPDATE: _update,
    _OTHERS: _from_another_process,
    _DELETE: _remove,
    _FAILED: _refused,
    _BY_PROGRAM: _by_program,
}
