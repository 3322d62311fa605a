"""What the errno of a map operation says, and whether it can stand for a change event."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.failures.experiment import Tables, experiment
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import MapKind, ProgramKind, UpdateFlag
from labkit.kernel.maps import KeyAbsent, Map

_KINDS = (
    MapKind.HASH,
    MapKind.LRU_HASH,
    MapKind.PERCPU_HASH,
    MapKind.ARRAY,
    MapKind.PERCPU_ARRAY,
)
_ENTRIES = 4
_PRESENT, _ABSENT, _PAST_THE_END = 1, 3, 9
_OPERATIONS = (
    # operation, flags, keys that it is asked about
    ("update", UpdateFlag.ANY, ("present", "absent")),
    ("update NOEXIST", UpdateFlag.NOEXIST, ("present", "absent")),
    ("update EXIST", UpdateFlag.EXIST, ("present", "absent")),
    ("update NOEXIST|EXIST", UpdateFlag.NOEXIST | UpdateFlag.EXIST, ("present",)),
    ("update LOCK, no lock in the value", UpdateFlag.LOCK, ("present",)),
    ("delete", None, ("present", "absent")),
)


@experiment(
    "errno-signal",
    number=19,
    family="concurrency",
    question="Can the errno of an update tell that somebody else changed the map?",
    claims=("3.3",),
    needs=("bpf", "compile", "syscall_program"),
    quick={"changes": 5_000},
    full={"changes": 50_000},
)
def errno_signal(*, changes: int) -> Tables:
    """Change a value many times, and after each change ask what the errno tells.

    ``check_flags`` (kernel/bpf/hashtab.c) looks at presence alone: NOEXIST on a present key
    answers EEXIST whether the value changed or not. ENOENT never comes from NOEXIST.

    Parameters
    ----------
    changes : int
        Changes of one key by another descriptor of the same map.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a change (in the control: an asking without one), an
        anomaly a change that the way did not tell, or in the control a change told that
        was none; ``cost_ns`` is the time of one asking. ``errno``: ``kind``,
        ``operation``, ``key`` (present, absent, past the end), ``user`` and ``program``
        (0 or minus the errno, int64).
    """
    triad = Triad("missed")
    with (
        Map.create(MapKind.HASH, key="u4", value="u8", max_entries=_ENTRIES, name="signal") as ours,
        Map.from_id(ours.id) as theirs,
    ):
        theirs.update(_PRESENT, 0)
        probe = ours.updater(_PRESENT, np.zeros(1, np.uint64), int(UpdateFlag.NOEXIST))
        seen = np.zeros(1, np.uint64)
        look = ours.reader(_PRESENT, seen)

        def version() -> int:
            look()
            return int(seen[0])

        told, cost = _asked(probe, theirs, changes, changing=True)
        triad.add("broken", case="errno of NOEXIST", operations=changes,
                  anomalies=changes - told, cost_ns=cost)  # fmt: skip
        told, cost = _asked(probe, theirs, changes, changing=False)
        triad.add("control", case="errno of NOEXIST, nobody writes", operations=changes,
                  anomalies=told, cost_ns=cost)  # fmt: skip
        told, cost = _asked(version, theirs, changes, changing=True)
        triad.add("fixed", case="compare the version in the value", operations=changes,
                  anomalies=changes - told, cost_ns=cost)  # fmt: skip
        for variant, case, flags in (
            ("broken", "NOEXIST used as the update itself", UpdateFlag.NOEXIST),
            ("fixed", "update with ANY", UpdateFlag.ANY),
        ):
            kept = _kept_old(theirs, changes, flags)
            triad.add(variant, case=case, operations=changes, anomalies=kept, anomaly="stale")
    return {"counts": triad.table(), "errno": _answers()}


def _asked(ask: Callable[[], int], theirs: Map, times: int, *, changing: bool) -> tuple[int, float]:
    """How often the answer differed from the one before, and nanoseconds per asking."""
    value = np.zeros(1, np.uint64)
    change = theirs.updater(_PRESENT, value)
    value[0] = 1_000_000
    change()
    told, spent, last = 0, 0, ask()
    for _ in range(times):
        if changing:
            value[0] += 1
            change()
        begun = time.monotonic_ns()
        answer = ask()
        spent += time.monotonic_ns() - begun
        told += answer != last
        last = answer
    return told, spent / times


def _kept_old(table: Map, times: int, flags: UpdateFlag) -> int:
    """Updates after which the map did not hold the value that was written."""
    value, back = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
    update, look = table.updater(_PRESENT, value, int(flags)), table.reader(_PRESENT, back)
    kept = 0
    for version in range(2_000_000, 2_000_000 + times):
        value[0] = version
        update()
        look()
        kept += int(back[0] != version)
    return kept


def _answers() -> pd.DataFrame:
    """Ask user space and a program the same questions of every kind of map."""
    return pd.DataFrame([row for kind in _KINDS for row in _answers_of(kind)])


def _answers_of(kind: MapKind) -> list[dict[str, object]]:
    indexed = kind in (MapKind.ARRAY, MapKind.PERCPU_ARRAY)
    keys = {"present": _PRESENT, "absent": _ABSENT, "past the end": _PAST_THE_END}
    rows: list[dict[str, object]] = []
    with (
        Map.create(kind, key="u4", value="u8", max_entries=_ENTRIES, name="asked") as table,
        programs.load("errno_table", TABLE_FD=table.fd) as unit,
    ):
        program = unit.function("ask", ProgramKind.SYSCALL)
        for operation, flags, states in _OPERATIONS:
            for state in (*states, "past the end") if indexed else states:
                _restore(table)
                user = _user_answer(table, flags, keys[state])
                _restore(table)
                call = np.array([flags is None, int(flags or 0), keys[state], 0], np.int64)
                program.test_run(context=call)
                rows.append(
                    {
                        "kind": kind.name.lower(),
                        "operation": operation,
                        "key": state,
                        "user": user,
                        "program": int(call[3]),
                    }
                )
    return rows


def _restore(table: Map) -> None:
    """One key was written, another never: in an array that one exists all the same."""
    table.update(_PRESENT, 1)
    if table.kind not in (MapKind.ARRAY, MapKind.PERCPU_ARRAY):
        with contextlib.suppress(KeyAbsent):
            table.delete(_ABSENT)


def _user_answer(table: Map, flags: UpdateFlag | None, which: int) -> int:
    key, value = table.encode_key(which), table.encode_value(7)
    calls = libbpf.api()
    if flags is None:
        return int(calls.bpf_map_delete_elem(table.fd, key.ctypes.data))
    return int(calls.bpf_map_update_elem(table.fd, key.ctypes.data, value.ctypes.data, int(flags)))
