"""The security hook on bpf(2) as a watch on a map: it sees what is asked, not what is done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput, LabError
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import programs
from labkit.kernel.libbpf import MapKind, UpdateFlag
from labkit.kernel.maps import KeyExists, Map
from labkit.kernel.parallel import Child
from labkit.kernel.programs import Unit
from labkit.kernel.ringbuf import RingReader
from labkit.sync.changes import ChangeKind, event_dtype
from labkit.sync.ring_events import Channel
from labkit.sync.trace_hook import Hooks, way_to_map

_RING_BYTES = 1 << 20
_MOST_WRITES = 1_000  # of one run of the program
_LSM, _FEXIT = "lsm/bpf", "fexit on the type's functions"
_FAILED, _BY_PROGRAM = "refused update", "program's update"


@experiment(
    "lsm-watch",
    number=46,
    family="sync",
    question="Is the security hook on bpf(2) a watch on a map's changes?",
    claims=("3.1a", "4.2"),
    needs=("bpf", "btf", "compile", "test_run", "hash", "ringbuf", "lsm", "fexit"),
    quick={"writes": 200},
    full={"writes": 1_000},
)
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
        ``counts``: an operation is a write, or an update that the kernel refuses (NOEXIST on a
        present key); an anomaly a write that was not told of, or a refused one that was; broken
        and control by the LSM program, fixed by fexit. ``told``: one row per ``way`` and
        ``watcher`` with ``writes`` (asked for), ``changed`` (that took effect), ``told`` (int64)
        and ``values_right`` (bool: the LSM program read the values that were written; True where
        there are none).
    """
    if writes > _MOST_WRITES:
        raise BadInput(f"writes of lsm-watch are {_MOST_WRITES:,} at most.")
    rows: list[dict[str, object]] = []
    with (
        Map.create(MapKind.HASH, key="u4", value="u8", max_entries=writes) as table,
        programs.load(
            "lsm_watch", TABLE_FD=table.fd, WRITES=writes, MAP_ID=table.id, **way_to_map()
        ) as unit,
        Channel.create(_RING_BYTES) as channel,
        Hooks(table, channel, mechanism="functions") as _,
        RingReader(channel.ring, event_dtype(table.key_dtype, table.value_dtype)) as reader,
    ):
        unit.attach(unit.function("on_bpf", hook="lsm:bpf"))
        counts = unit.map("counts")
        for way, write in _WAYS.items():
            say(f"{writes} times: {way}")
            kind = ChangeKind.DELETE if way == "delete" else ChangeKind.UPDATE
            if way != "update":
                _fill(table, writes)
            reader.read()
            before = _counted(counts)
            write(unit, table, writes)
            told = _counted(counts) - before
            events = reader.read()
            changed = 0 if way == _FAILED else writes
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
    found = pd.DataFrame(rows)
    return {"counts": _counts(found), "told": found}


def _counts(found: pd.DataFrame) -> pd.DataFrame:
    triad = Triad("unseen write")
    for _, row in found.iterrows():
        way, refused = str(row["way"]), row["way"] == _FAILED
        by_lsm = row["watcher"] == _LSM
        variant = "fixed" if not by_lsm else (
            "broken" if way in (_FAILED, _BY_PROGRAM) else "control"
        )  # fmt: skip
        wrong = row["told"] if refused else row["writes"] - row["told"]
        triad.add(
            variant, case=f"{way}; {row['watcher']}", operations=row["writes"],
            anomalies=max(min(wrong, row["writes"]), 0),
            anomaly="told of, though refused" if refused else None,
        )  # fmt: skip
    return triad.table()


def _counted(counts: Map) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array([int(counts.lookup(which)) for which in range(3)], np.int64)


def _fill(table: Map, writes: int) -> None:
    table.update_many(np.arange(writes, dtype="u4"), np.zeros(writes, "u8"))


def _update(unit: Unit, table: Map, writes: int) -> None:
    for key in range(writes):
        table.update(key, key)


def _from_another_process(unit: Unit, table: Map, writes: int) -> None:
    def write() -> None:
        with Map.from_id(table.id, key="u4", value="u8") as theirs:
            _update(unit, theirs, writes)

    with Child(write) as child:
        child.result()


def _delete(unit: Unit, table: Map, writes: int) -> None:
    for key in range(writes):
        table.delete(key)


def _refused(unit: Unit, table: Map, writes: int) -> None:
    for key in range(writes):
        with suppress(KeyExists):
            table.update(key, key, UpdateFlag.NOEXIST)


def _by_program(unit: Unit, table: Map, writes: int) -> None:
    if unit.function("update_all").test_run().value != writes:
        raise LabError("The program's update was refused.")


_WAYS: dict[str, Callable[[Unit, Map, int], None]] = {
    "update": _update,
    "update by another process": _from_another_process,
    "delete": _delete,
    _FAILED: _refused,
    _BY_PROGRAM: _by_program,
}
