"""The article's cure for stale maps: mmap, msync, memory barriers. What each call answers."""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import Unavailable
from labkit.kernel import programs
from labkit.kernel.libbpf import MapFlag, MapKind, ProgramKind
from labkit.kernel.mapping import MS_ASYNC, MS_INVALIDATE, MS_SYNC, mapped
from labkit.kernel.maps import Map, MapError
from labkit.kernel.parallel import together
from labkit.lab.experiment import Case, Statement, Tables, experiment, say
from labkit.runs import Triad

_FIELDS = np.dtype([("data", "u8"), ("flag", "u8")])
_READS = 1_000  # reads of both fields in one program run
_READS_PER_STORE = 20
_CHUNK = 20  # program runs between two checks whether the writer goes on

# membarrier(2): the full barrier that a language without one can ask of the kernel.
_MEMBARRIER, _REGISTER, _EXPEDITED = 324, 1 << 4, 1 << 3


@dataclass(frozen=True)
class _Tried:
    kind: MapKind
    flags: MapFlag = MapFlag.NONE

    @property
    def name(self) -> str:
        return self.kind.name.lower() + ("-mmapable" if self.flags else "")


_MMAPABLE = _Tried(MapKind.ARRAY, MapFlag.MMAPABLE)
_TRIED = (
    _Tried(MapKind.HASH),
    _Tried(MapKind.HASH, MapFlag.MMAPABLE),
    _Tried(MapKind.LRU_HASH),
    _Tried(MapKind.PERCPU_HASH),
    _Tried(MapKind.PERCPU_ARRAY),
    _Tried(MapKind.PERCPU_ARRAY, MapFlag.MMAPABLE),
    _Tried(MapKind.ARRAY),
    _MMAPABLE,
)

_LIMIT_S = 900.0  # for millions of barriers, which cost an emulated CPU microseconds each

_CASES = (
    Case("broken", "procedure", "update, mmap, msync(MS_SYNC)", anomaly="impossible"),
    Case("control", "update", "update, then a program reads; no msync", anomaly="stale"),
    Case("fixed", "update-mapping", "update, then read through the mapping; no msync",
         anomaly="stale"),
    Case("fixed", "store", "store through the mapping, a program reads; no msync",
         anomaly="stale"),
    Case("fixed", "store-lookup", "store through the mapping, then lookup; no msync",
         anomaly="stale"),
    Case("broken", "flag-first", "mapping: flag stored before the data", anomaly="out of order"),
    Case("fixed", "data-first", "mapping: data stored before the flag", anomaly="out of order"),
    Case("fixed", "barrier", "mapping: data, full barrier, flag", anomaly="out of order"),
)  # fmt: skip


def derive(tables: Tables) -> Tables:
    """Count what went wrong with reads, and the map types without the article's procedure.

    Of the procedure an operation is a map type, an anomaly one on which it cannot be carried out;
    elsewhere an operation is a read, an anomaly a stale one, or a pair of fields read in the wrong
    order.
    """
    triad, answers = Triad("stale"), tables["answers"]
    impossible = int((answers["msync_sync"] != 0).sum())  # missing where a step before it failed
    about = {case.id: case for case in _CASES}
    triad.add("broken", case="procedure", operations=len(answers), anomalies=impossible,
              anomaly=about["procedure"].anomaly)  # fmt: skip
    for row in tables["reads"].to_dict("records"):
        case = about[row["case"]]
        triad.add(case.variant, case=case.id, operations=row["reads"], anomalies=row["wrong"],
                  cost_ns=row["cost_ns"], anomaly=case.anomaly)  # fmt: skip
    return {"counts": triad.table()}


@experiment(
    "mmap-msync",
    number=11,
    family="stale-reads",
    question="Must a map be mapped into memory and synchronised for an update to be seen?",
    claims=("1.5", "1.6", "1.12", "3.1b"),
    needs=("bpf", "compile", "test_run", "syscall_program", "mmapable_array", "two_cpus"),
    quick={"updates": 10_000, "stores": 300_000},
    full={"updates": 100_000, "stores": 2_000_000},
    cases=_CASES,
    derive=derive,
    statements=(
        Statement("no map type allows update, mmap, msync(MS_SYNC)", 'all(broken["procedure"])'),
        Statement("only an array made with MMAPABLE can be mapped",
                  'answers(map="array-mmapable").mmap == 0 and rows(answers(mmap=0)) == 1'),
        # EINVAL is 22.
        Statement("and there msync(MS_SYNC) answers EINVAL",
                  'answers(map="array-mmapable").msync_sync == -22'),
        # The article expects all of them to be stale; one in a thousand would show.
        Statement("a program reads every update at once", "none(control, like=0.001)"),
        Statement("nothing is stale without msync",
                  'none(fixed["update-mapping", "store", "store-lookup"], like=0.001)'),
        Statement("the wrong order of stores shows", 'some(broken["flag-first"], like=0.0004)'),
        Statement("the right order with a barrier between them does not",
                  'none(fixed["barrier"], like=broken["flag-first"])'),
        Statement("nor does it without one on x86, which alone keeps the order of two stores",
                  'machine.architecture != "x86_64" '
                  'or none(fixed["data-first"], like=broken["flag-first"])'),
    ),
    sentence="The procedure of the article could be carried out on {rows(answers(msync_sync=0))} "
    "of {rows(answers)} map types: most cannot be mapped, and where mmap works, msync(MS_SYNC) "
    "answers EINVAL. Without any msync, {control} reads after an update were stale. Through a "
    'mapping the order of two stores is the writer\'s: flag first broke {broken["flag-first"]}, '
    'data first {fixed["data-first"]}.',
)  # fmt: skip
def mmap_msync(*, updates: int, stores: int) -> Tables:
    """Try the article's procedure on every map type, then see whether anything was stale.

    Only an array made with ``BPF_F_MMAPABLE`` can be mapped (kernel/bpf/syscall.c,
    ``bpf_map_mmap``), and its file has no fsync, so ``msync(MS_SYNC)`` answers EINVAL. A
    store through the mapping is a store to the very memory that programs read. The order of
    two stores is the writer's business, as with any shared memory.

    Parameters
    ----------
    updates : int
        Updates, and stores, after each of which the other side reads.
    stores : int
        Pairs of stores through the mapping in each order, at the least; a program reads
        both fields 20 times as often, at the least.

    Returns
    -------
    dict of DataFrame
        ``reads``: ``variant``, ``case``, ``reads``, ``wrong`` (int64), ``cost_ns`` of a pair of
        stores (NaN where it is not timed). ``answers``: ``map``, ``create``,
        ``mmap``, ``msync_sync``, ``msync_async``, ``msync_invalidate`` (0 or minus the
        errno; missing where the step before failed).
    """
    reads = _without_msync(updates)
    for case, store in (
        ("flag-first", _flag_first),
        ("data-first", _data_first),
        ("barrier", _with_barrier()),
    ):
        say(case)
        reads.append((case, *_ordered(store, stores)))
    table = pd.DataFrame(reads, columns=["case", "reads", "wrong", "cost_ns"])
    variants = {case.id: case.variant for case in _CASES}
    table.insert(0, "variant", table["case"].map(variants))
    return {"reads": table, "answers": pd.DataFrame([_answers(tried) for tried in _TRIED])}


def _answers(tried: _Tried) -> dict[str, Any]:
    row: dict[str, Any] = {"map": tried.name}
    row |= dict.fromkeys(("create", "mmap", "msync_sync", "msync_async", "msync_invalidate"), None)
    try:
        table = Map.create(tried.kind, key="u4", value="u8", max_entries=4, flags=tried.flags)
    except MapError as refused:
        return row | {"create": -int(refused.errno or 0)}
    row["create"] = 0
    with table:
        try:
            with mapped(table) as mapping:
                return row | {
                    "mmap": 0,
                    "msync_sync": mapping.msync(MS_SYNC),
                    "msync_async": mapping.msync(MS_ASYNC),
                    "msync_invalidate": mapping.msync(MS_INVALIDATE),
                }
        except MapError as refused:
            return row | {"mmap": -int(refused.errno or 0)}


def _table() -> Map:
    return Map.create(
        MapKind.ARRAY, key="u4", value=_FIELDS, max_entries=1, flags=MapFlag.MMAPABLE, name="mapped"
    )


def _without_msync(updates: int) -> list[tuple[str, int, int, float]]:
    """Update and store without any synchronisation, and read from every side."""
    say("update and store without msync")
    stale = {"update": 0, "update-mapping": 0, "store": 0, "store-lookup": 0}
    value, back = np.zeros(1, _FIELDS), np.zeros(1, _FIELDS)
    context = np.zeros(2, np.uint64)
    with _table() as table, mapped(table) as mapping:
        update, look_up = table.updater(0, value), table.reader(0, back)
        with programs.load("mapped_fields", TABLE_FD=table.fd, READS=_READS) as loaded:
            program = loaded.program("read_data", ProgramKind.SYSCALL)

            def read_by_program() -> int:
                program.test_run(context=context)
                return int(context[0])

            for version in range(1, 2 * updates, 2):
                value["data"] = version
                update()
                stale["update"] += read_by_program() != version
                stale["update-mapping"] += int(mapping.values["data"][0]) != version
                mapping.values["data"][0] = version + 1
                stale["store"] += read_by_program() != version + 1
                look_up()
                stale["store-lookup"] += int(back["data"][0]) != version + 1
    return [(case, updates, wrong, math.nan) for case, wrong in stale.items()]


Store = Callable[[npt.NDArray[np.uint64], npt.NDArray[np.uint64], int], None]


def _data_first(data: npt.NDArray[np.uint64], flag: npt.NDArray[np.uint64], version: int) -> None:
    data[0] = version
    flag[0] = version


def _flag_first(data: npt.NDArray[np.uint64], flag: npt.NDArray[np.uint64], version: int) -> None:
    flag[0] = version
    data[0] = version


def _with_barrier() -> Store:
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    if syscall(_MEMBARRIER, _REGISTER, 0, 0) < 0:
        raise Unavailable(
            f"This kernel has no membarrier ({os.strerror(ctypes.get_errno())}): it is built "
            "without CONFIG_MEMBARRIER."
        )

    def store(data: npt.NDArray[np.uint64], flag: npt.NDArray[np.uint64], version: int) -> None:
        data[0] = version
        syscall(_MEMBARRIER, _EXPEDITED, 0, 0)
        flag[0] = version

    return store


def _ordered(store: Store, stores: int) -> tuple[int, int, float]:
    """Reads, reads that saw the flag without its data, nanoseconds per pair of stores."""
    with _table() as table, mapped(table) as mapping:
        data, flag = mapping.values["data"], mapping.values["flag"]
        with programs.load("mapped_fields", TABLE_FD=table.fd, READS=_READS) as loaded:
            check, written, read = loaded.program("check_order"), Event(), Event()

            def write_all() -> float:
                begun, version = time.monotonic_ns(), 0
                while version < stores or not read.is_set():
                    version += 1
                    store(data, flag, version)
                    if version == stores:
                        written.set()
                return (time.monotonic_ns() - begun) / version

            def read_all() -> None:
                runs = 0
                while runs * _READS < stores * _READS_PER_STORE or not written.is_set():
                    check.test_run(repeat=_CHUNK)
                    runs += _CHUNK
                read.set()

            cost_ns, _ = together(write_all, read_all, timeout_s=_LIMIT_S)
            seen = loaded.map("order").lookup(0)
            return int(seen["reads"]), int(seen["violations"]), cost_ns
