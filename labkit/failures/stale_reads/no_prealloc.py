"""What BPF_F_NO_PREALLOC changes: no hidden rehash, but errors that must be read."""

from __future__ import annotations

import errno
import threading
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import LabError, TimedOut
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import leftovers, libbpf, programs
from labkit.kernel.libbpf import MapFlag, MapKind, ProgramKind
from labkit.kernel.maps import Map, MapFull, OutOfMemory
from labkit.kernel.parallel import Child, shared_array

_LIVE_KEY, _LIVE_ACTION = 80, 1  # a rule that is in force before somebody prefills the map
_PREFILLED_KEYS = 65_536
_UNCONFIGURED = 4_000  # keys that nobody configured, asked after a prefill
_SWITCH_LIMIT_S = 60.0
_LARGE_VALUE = 2_048  # bytes: few insertions reach the memory limit
_HOLD_S, _START_S = 60.0, 10.0


@dataclass(frozen=True)
class _Burst:
    variant: str
    case: str
    flags: MapFlag
    interrupts_off: bool


_BURSTS = (
    _Burst("broken", "NO_PREALLOC, bursts with interrupts off", MapFlag.NO_PREALLOC, True),
    _Burst("control", "NO_PREALLOC, bursts with interrupts on", MapFlag.NO_PREALLOC, False),
    _Burst("fixed", "preallocated, bursts with interrupts off", MapFlag.NONE, True),
)


@experiment(
    "no-prealloc",
    number=10,
    family="stale-reads",
    question="Does NO_PREALLOC make updates fail in silence, and does prefilling help?",
    claims=("1.3c", "1.7", "1.10", "1.11"),
    needs=("bpf", "compile", "test_run", "raw_tracepoint", "no_prealloc", "memcg"),
    quick={"insertions": 40_000, "burst": 400, "limit_mib": 48},
    full={"insertions": 200_000, "burst": 400, "limit_mib": 128},
)
def no_prealloc(*, insertions: int, burst: int, limit_mib: int) -> Tables:
    """Insert where memory is scarce, and prefill where a rule is in force.

    The bucket array is sized at creation and never again (kernel/bpf/hashtab.c,
    ``htab_map_alloc``: ``n_buckets = roundup_pow_of_two(max_entries)``); only elements are
    allocated late. An allocation can fail: in a burst with interrupts off, since the
    per-CPU cache is refilled by an interrupt, and under a memory limit. Every failure is
    answered, ENOMEM; only a program that does not look makes it silent.

    Parameters
    ----------
    insertions : int
        New keys in every burst setting.
    burst : int
        Keys inserted in one program run.
    limit_mib : int
        Memory limit of the control group, MiB; the map is asked to hold more.

    Returns
    -------
    dict of DataFrame
        ``counts``: of the bursts and the memory limit an operation is an insertion and an
        anomaly one that failed, to be found absent later by who ignored the answer; of the
        prefills an operation is a key, an anomaly a wrong one. ``answers``: ``case``,
        ``attempted``, ``inserted``, ``no_memory``, ``full``, ``other`` (int64).
        ``fill``: ``flags``, ``entries``, ``filled``, ``memlock_bytes``, ``insert_ns`` and
        ``next_answer`` (errno of one insertion more) for maps empty, half and wholly filled.
        ``creation``: ``case``, ``errno`` (0: created).
    """
    triad, answers = Triad("failed insertion"), []
    for setting in _BURSTS:
        say(setting.case)
        row = _burst(setting, insertions, burst)
        answers.append({"case": setting.case, **row})
        triad.add(
            setting.variant,
            case=setting.case,
            operations=row["attempted"],
            anomalies=row["attempted"] - row["inserted"],
        )
    say("under a memory limit")
    limited, refused = _limited(limit_mib)
    answers.append({"case": "NO_PREALLOC under a memory limit", **limited})
    triad.add(
        "broken",
        case="NO_PREALLOC under a memory limit",
        operations=limited["attempted"],
        anomalies=limited["no_memory"],
    )
    say("prefilling")
    _prefill(triad)
    creation = pd.DataFrame([{"case": "preallocated, same limit and entries", "errno": refused}])
    return {
        "counts": triad.table(),
        "answers": pd.DataFrame(answers),
        "fill": _filled(),
        "creation": creation,
    }


def _burst(setting: _Burst, insertions: int, burst: int) -> dict[str, int]:
    with (
        Map.create(
            MapKind.HASH,
            key="u4",
            value="u8",
            max_entries=insertions,
            flags=setting.flags,
            name="burst",
        ) as table,
        programs.load(
            "insert_burst",
            TABLE_FD=table.fd,
            BURST=burst,
            INSERTIONS=insertions,
            OWNER=threading.get_native_id(),
        ) as unit,
    ):
        seen = unit.map("answers")
        if setting.interrupts_off:
            unit.attach(unit.function("on_switch", ProgramKind.RAW_TRACEPOINT), "sched_switch")
            deadline = time.monotonic() + _SWITCH_LIMIT_S
            while int(seen.lookup(0)["next_key"]) < insertions:
                time.sleep(0.0002)  # sleeping makes the scheduler switch away from us
                if time.monotonic() > deadline:
                    raise TimedOut("The scheduler did not switch often enough for all bursts.")
        else:
            in_place = unit.function("in_place")
            for _ in range(-(-insertions // burst)):
                in_place.test_run()
        row = seen.lookup(0)
        present = len(table.snapshot())
    if present != int(row["inserted"]):
        raise LabError("The program's count of insertions and the map disagree.")
    return {
        "attempted": int(row["next_key"]),
        "inserted": int(row["inserted"]),
        "no_memory": int(row["no_memory"]),
        "full": int(row["full"]),
        "other": int(row["other"]),
    }


def _limited(limit_mib: int) -> tuple[dict[str, int], int]:
    """Answers of filling a map beyond the limit; errno of making it preallocated instead.

    A map is charged to the group of the process that made it, whoever fills it. So a child
    in the group makes it and sleeps: if it did the filling, the next page that it touched
    would have it killed for lack of memory.
    """
    entries = (limit_mib << 20) * 2 // _LARGE_VALUE
    told = shared_array(2, np.int64)  # errno of the preallocated map, id of the other

    def make(flags: MapFlag) -> Map:
        return Map.create(
            MapKind.HASH,
            key="u4",
            value=f"V{_LARGE_VALUE}",
            max_entries=entries,
            flags=flags,
            name="limited",
        )

    with leftovers.memory_cgroup(limit_mib << 20) as group:

        def hold() -> None:
            group.add()
            try:
                make(MapFlag.NONE).close()
            except OutOfMemory as refused:
                told[0] = refused.errno
            with make(MapFlag.NO_PREALLOC) as table:
                told[1] = table.id
                time.sleep(_HOLD_S)

        with Child(hold) as child:
            deadline = time.monotonic() + _START_S
            while not told[1]:
                time.sleep(0.005)
                if time.monotonic() > deadline or child.ended():
                    raise TimedOut("The process in the limited group made no map.")
            with Map.from_id(int(told[1])) as table:
                answers = _insert_all(table, entries)
    return answers, int(told[0])


def _insert_all(table: Map, entries: int) -> dict[str, int]:
    answers = {"attempted": entries, "inserted": 0, "no_memory": 0, "full": 0, "other": 0}
    value = bytes(_LARGE_VALUE)
    for key in range(entries):
        try:
            table.update(key, value)
            answers["inserted"] += 1
        except OutOfMemory:
            answers["no_memory"] += 1
    return answers


def _filled() -> pd.DataFrame:
    """Fill maps to the last entry: memory as the kernel states it, time of an insertion."""
    rows = []
    for flags in (MapFlag.NONE, MapFlag.NO_PREALLOC):
        for entries in (1_024, 4_096, 16_384, 65_536):
            for share in (0.0, 0.5, 1.0):
                with Map.create(
                    MapKind.HASH, key="u4", value="u8", max_entries=entries, flags=flags
                ) as table:
                    keys = np.arange(int(entries * share), dtype=np.uint32)
                    begun = time.monotonic_ns()
                    table.update_many(keys, keys)
                    spent = time.monotonic_ns() - begun
                    rows.append(
                        {
                            "flags": "NO_PREALLOC" if flags else "preallocated",
                            "entries": entries,
                            "filled": len(keys),
                            "memlock_bytes": libbpf.map_memory(table.fd),
                            "insert_ns": spent / len(keys) if len(keys) else float("nan"),
                            "next_answer": _one_more(table, entries) if share == 1.0 else 0,
                        }
                    )
    return pd.DataFrame(rows)


def _one_more(table: Map, key: int) -> int:
    try:
        table.update(key, 0)
    except MapFull as refused:
        return int(refused.errno or 0)
    return 0


def _prefill(triad: Triad) -> None:
    """The article's cure: write a zero to every key from 0 on, before the traffic comes."""
    with _rules(1_024) as table:
        prefilled = _prefilled_keys(table)
        overwritten = int(table.lookup(_LIVE_KEY) != _LIVE_ACTION)
        if prefilled != table.max_entries:
            raise LabError(f"A map of {table.max_entries} entries took {prefilled} keys.")
        triad.add("broken", case="prefill of 1,024 entries: the live rule", operations=1,
                  anomalies=overwritten, anomaly="overwritten rule")  # fmt: skip
    with _rules(_PREFILLED_KEYS) as table:
        _prefilled_keys(table)
        new = range(_PREFILLED_KEYS, _PREFILLED_KEYS + _UNCONFIGURED)
        refused = sum(_one_more(table, key) == errno.E2BIG for key in new)
        triad.add("broken", case="prefill of 65,536 entries: later new keys",
                  operations=_UNCONFIGURED, anomalies=refused, anomaly="refused key")  # fmt: skip
        found = _found_unconfigured(table)
        triad.add("broken", case="prefill of 65,536 entries: keys nobody configured",
                  operations=_UNCONFIGURED, anomalies=found, anomaly="invented rule")  # fmt: skip
    with _rules(_PREFILLED_KEYS) as table:
        found = _found_unconfigured(table)
        new = range(_PREFILLED_KEYS, _PREFILLED_KEYS + _UNCONFIGURED)
        refused = sum(_one_more(table, key) == errno.E2BIG for key in new)
        changed = int(table.lookup(_LIVE_KEY) != _LIVE_ACTION)
        triad.add("fixed", case="no prefill: rules, new and unconfigured keys",
                  operations=2 * _UNCONFIGURED + 1, anomalies=found + refused + changed,
                  anomaly="wrong key")  # fmt: skip


def _rules(entries: int) -> Map:
    table = Map.create(
        MapKind.HASH, key="u4", value="u4", max_entries=entries, flags=MapFlag.NO_PREALLOC,
        name="rules",
    )  # fmt: skip
    table.update(_LIVE_KEY, _LIVE_ACTION)
    return table


def _prefilled_keys(table: Map) -> int:
    """Write zeros to the keys 0, 1, 2, ... up to the first refusal."""
    for key in range(_PREFILLED_KEYS):
        try:
            table.update(key, 0)
        except MapFull:
            return key
    return _PREFILLED_KEYS


def _found_unconfigured(table: Map) -> int:
    keys = range(_LIVE_KEY + 1, _LIVE_KEY + 1 + _UNCONFIGURED)
    return sum(table.get(key) is not None for key in keys)
