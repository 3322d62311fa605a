"""What the errno of a map operation says, and whether it can stand for a change event."""

from __future__ import annotations

import contextlib
import errno
import math
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import MapKind, ProgramKind, UpdateFlag
from labkit.kernel.maps import KeyAbsent, Map
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment

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


# Statements name the kinds by these words of the table ``errno``.
_ARRAYS = '("array", "percpu_array")'
_HASHES = '("hash", "lru_hash", "percpu_hash")'


def _gives(where: str, number: int) -> str:
    """All questions of that kind got this answer, in user space and in a program."""
    rows = f"errno({where})"
    return f"all({rows}.user == {-number} and {rows}.program == {-number})"


def _answered(words: str, where: str, number: int) -> Statement:
    name = errno.errorcode[number]
    return Statement(f"{words} answers {name}, to user space and to a program",
                     _gives(where, number))  # fmt: skip


@experiment(
    "errno-signal",
    number=60,
    family="concurrency",
    question="Can the errno of an update tell that somebody else changed the map?",
    claims=("3.3",),
    needs=("bpf", "compile", "syscall_program"),
    quick={"changes": 5_000},
    full={"changes": 50_000},
    cases=(
        Case("broken", "noexist", "errno of NOEXIST"),
        Case("control", "quiet", "errno of NOEXIST, nobody writes"),
        Case("fixed", "version", "compare the version in the value"),
        Case("broken", "noexist-as-update", "NOEXIST used as the update itself"),
        Case("fixed", "any", "update with ANY"),
    ),
    counted=Counted("missed", operations="changes", anomalies="missed", cost_ns="ask_ns"),
    statements=(
        Statement("NOEXIST tells no change", 'all(broken["noexist"])'),
        Statement("and answers the same when nobody writes", "none(control)"),
        Statement("the version tells every change", 'none(fixed["version"])'),
        Statement("NOEXIST never replaces a value", 'all(broken["noexist-as-update"])'),
        Statement("ANY always does", 'none(fixed["any"])'),
        # With the two of arrays below that is every answer of NOEXIST: ENOENT is none of them.
        Statement("NOEXIST answers EEXIST on a present key, and success on an absent one, to user "
                  "space and to a program",
                  _gives('operation="update NOEXIST", key="present"', errno.EEXIST) + " and "
                  + _gives(f'operation="update NOEXIST", key="absent", kind={_HASHES}', 0)),
        _answered("NOEXIST on any entry of an array",
                  f'operation="update NOEXIST", key="absent", kind={_ARRAYS}', errno.EEXIST),
        _answered("EXIST on an absent key",
                  f'operation="update EXIST", key="absent", kind={_HASHES}', errno.ENOENT),
        _answered("an index past the end of an array",
                  'operation=("update", "update NOEXIST", "update EXIST"), key="past the end"',
                  errno.E2BIG),
        _answered("NOEXIST and EXIST at once",
                  'operation="update NOEXIST|EXIST", key="present"', errno.EINVAL),
        _answered("delete of an array's entry",
                  f'operation="delete", key="present", kind={_ARRAYS}', errno.EINVAL),
    ),
    sentence='After each of {broken["noexist"].operations} changes BPF_NOEXIST answered what it '
    'had answered before: it missed {broken["noexist"]}. Comparing the version in the value missed '
    '{fixed["version"]}. Used as the update itself, NOEXIST left the old value in place '
    '{broken["noexist-as-update"]} times.',
)  # fmt: skip
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
        ``rounds``: one row per case with ``variant``, ``case``, ``changes``, ``missed`` (changes
        that the way did not tell, or that are not in the map; in the control changes that it told
        though there was none; int64), ``ask_ns`` (float64, of one asking; NaN for an update).
        ``errno``: ``kind``, ``operation``, ``key`` (present, absent, past the end), ``user`` and
        ``program`` (0 or minus the errno, int64).
    """
    rows: list[dict[str, object]] = []

    def keep(variant: str, case: str, missed: int, ask_ns: float = math.nan) -> None:
        rows.append({"variant": variant, "case": case, "changes": changes, "missed": missed,
                     "ask_ns": ask_ns})  # fmt: skip

    with (
        Map.create(MapKind.HASH, key="u4", value="u8", max_entries=_ENTRIES, name="signal") as ours,
        Map.from_id(ours.id) as theirs,
    ):
        theirs.update(_PRESENT, 0)
        probe = ours.updater(_PRESENT, np.zeros(1, np.uint64), int(UpdateFlag.NOEXIST))
        seen = np.zeros(1, np.uint64)
        read = ours.reader(_PRESENT, seen)

        def version() -> int:
            read()
            return int(seen[0])

        told, ask_ns = _asked(probe, theirs, changes, changing=True)
        keep("broken", "noexist", changes - told, ask_ns)
        told, ask_ns = _asked(probe, theirs, changes, changing=False)
        keep("control", "quiet", told, ask_ns)
        told, ask_ns = _asked(version, theirs, changes, changing=True)
        keep("fixed", "version", changes - told, ask_ns)
        kept_old = _kept_old(theirs, changes, UpdateFlag.NOEXIST)
        keep("broken", "noexist-as-update", kept_old)
        keep("fixed", "any", _kept_old(theirs, changes, UpdateFlag.ANY))
    return {"rounds": pd.DataFrame(rows), "errno": _answers()}


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
    update, read = table.updater(_PRESENT, value, int(flags)), table.reader(_PRESENT, back)
    kept = 0
    for version in range(2_000_000, 2_000_000 + times):
        value[0] = version
        update()
        read()
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
        programs.load("errno_table", TABLE_FD=table.fd) as loaded,
    ):
        program = loaded.program("ask", ProgramKind.SYSCALL)
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
