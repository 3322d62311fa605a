"""Values that are read half old and half new, against their size, and what keeps them whole."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from ctypes import byref, c_uint32
from dataclasses import dataclass, replace
from functools import partial
from threading import Event

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput, TimedOut
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import UpdateFlag
from labkit.kernel.maps import PER_CPU, Map, MapError
from labkit.kernel.parallel import together
from labkit.kernel.programs import Unit

_WORD = 8
_EVERY_BYTE = 0x0101010101010101
_FNV_BASIS, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3
_WRITES = 128  # updates in one call of the writer, each with another byte
_READS = 250  # reads of a process between two looks at the writer
_RUNS = 5_000  # runs of a program between two looks at the writer
_LEAST_CALLS = 20  # a reader goes on until the writer has called that often
_LONG = 1024  # bytes; a hash is torn so seldom that programs read it more often ...
_RARER_SHORT, _RARER_LONG = 3, 10  # ... by these factors, below that size and from there on
_RACE_S = 1.0  # bound of one race, where other load leaves us little of a CPU
_LIMIT_S = 30.0

Words = npt.NDArray[np.uint64]
Enough = Callable[[int, int], bool]  # of reads done and reads wanted


@dataclass(frozen=True)
class _Setting:
    variant: str
    case: str
    table: str
    reader: str  # "process" or "program"
    function: str = ""  # the reading program
    layout: str = "plain"  # or "locked" (lock before the payload), "checked" (version, checksum)
    read_flags: UpdateFlag = UpdateFlag.ANY
    write_flags: UpdateFlag = UpdateFlag.ANY
    by_batch: bool = False  # read with BPF_MAP_LOOKUP_BATCH
    published: bool = False  # written where no program reads, then put into the outer map
    written: bool = True


def _both(variant: str, case: str, table: str, **more: object) -> list[_Setting]:
    """The same setting with a process that reads and with a program that reads."""
    one = replace(_Setting(variant, case, table, "process"), **more)  # type: ignore[arg-type]
    by_program = replace(
        one,
        reader="program",
        function=f"read_{table.removeprefix('in_')}",
        case=f"{case}, read by a program",
    )
    return [replace(one, case=f"{case}, read by a process"), by_program]


_SWEPT = [
    *_both("broken", "array", "in_array"),
    *_both("broken", "hash", "in_hash"),
    *_both("broken", "per-CPU array", "in_percpu_array"),
    *_both("broken", "per-CPU hash", "in_percpu_hash"),
]
_LOCK = UpdateFlag.LOCK
_HALF_CURES = [
    replace(one, case=f"array, lock on the reading side only, {one.case.partition(', ')[2]}")
    for one in _both("broken", "array", "locked_array", layout="locked", read_flags=_LOCK)
]
_CURES = [
    *_both("fixed", "array, BPF_F_LOCK", "locked_array", layout="locked",
           read_flags=_LOCK, write_flags=_LOCK),
    *_both("fixed", "hash, BPF_F_LOCK", "locked_hash", layout="locked",
           read_flags=_LOCK, write_flags=_LOCK),
    *_both("fixed", "array, checksum", "checked_array", layout="checked"),
    _Setting("fixed", "hash, batch lookup, read by a process", "in_hash", "process",
             by_batch=True),
    _Setting("fixed", "map in map, read by a program", "inner", "program", "read_published",
             published=True),
]  # fmt: skip


@experiment(
    "torn-reads",
    number=14,
    family="concurrency",
    question="From which size on is a value read half old and half new, and what keeps it whole?",
    claims=("1.T",),
    needs=("bpf", "compile", "test_run", "two_cpus", "spin_lock"),
    quick={"sizes": [8, 16, 24, 64, 256, 1024, 4096], "cure_size": 256, "process_reads": 6_000,
           "program_reads": 30_000, "rounds": 2},
    full={"sizes": [8, 16, 24, 64, 256, 1024, 4096], "cure_size": 256, "process_reads": 20_000,
          "program_reads": 100_000, "rounds": 6},
)  # fmt: skip
def torn_reads(
    *, sizes: list[int], cure_size: int, process_reads: int, program_reads: int, rounds: int
) -> Tables:
    """Overwrite one value as fast as the kernel can, and read it on another CPU.

    An array's update copies into the value that readers look at. A hash's update writes a
    new element, but the old one is used again for the next update while a reader may still
    copy from it. A per-CPU value is copied word by word, which keeps words whole and no
    more. A read takes no lock in any of them. ``BPF_F_LOCK`` on the writing and the reading
    side takes the value's own lock; a checksum lets the reader notice and read again; a
    value that is written aside and published by one pointer (map in map) is never seen
    half done; a batch lookup of a hash holds the bucket's lock.

    Parameters
    ----------
    sizes : list of int
        Payload sizes in bytes, multiples of 8.
    cure_size : int
        Payload size at which the cures are measured, one of ``sizes``.
    process_reads, program_reads : int
        Reads in each setting and round, at the least (by a program of a hash, which is torn
        more seldom, three to ten times as many); a reader goes on until the writer has
        had its share of the machine too, a second at the most.
    rounds : int
        Rounds of every setting, in turns, so that a burst of other load hits all alike.

    Returns
    -------
    dict of DataFrame
        ``counts``, with ``cost_ns`` of a read of ``cure_size`` bytes, and ``rounds``: one row
        per setting, size and round with columns ``variant``, ``case``, ``table``, ``reader``,
        ``written`` (bool), ``size`` (bytes), ``round``, ``reads``, ``torn`` (mixed, and not
        noticed by the reader's own check), ``rejected`` (noticed), ``given_up`` (a program's
        four tries all rejected), ``equal_ends`` (mixed although the versions at both ends
        agree: what a check without checksum lets pass), ``absent``, ``writes`` (int64),
        ``read_ns`` and ``write_ns`` (float64; a process's read less the loop around it, its
        checksum in NumPy not counted; NaN where nobody writes) and ``publish_ms`` (float64,
        milliseconds of an update of the outer map). A per-CPU value read by a
        process is torn if the value of any CPU is.

    Raises
    ------
    BadInput
        A size that is not a multiple of 8 or beyond 4096, or a ``cure_size`` that is not
        among the sizes.
    """
    if wrong := [size for size in sizes if size % _WORD or size > 4096]:
        raise BadInput(f"The sizes of torn-reads are multiples of 8 up to 4096, not {wrong}.")
    if cure_size not in sizes:
        raise BadInput(f"cure_size must be one of the sizes {sizes}, not {cure_size}.")
    rows: list[dict[str, object]] = []
    at_cure_size = _SWEPT + _HALF_CURES + _CURES
    at_cure_size += [
        replace(one, variant="control", case=f"{one.case}, nobody writes", written=False)
        for one in _SWEPT + _CURES
    ]
    for size in sizes:
        say(f"values of {size} bytes")
        settings = at_cure_size if size == cure_size else _SWEPT
        with programs.load("torn_reads", WORDS=size // _WORD) as unit:
            bench = _Bench(unit, size, process_reads, program_reads)
            for turn in range(rounds):
                for setting in settings:
                    rows.append({"round": turn, "size": size, **bench.measure(setting)})
    measured = pd.DataFrame(rows)
    # One word cannot be half written: the smallest size is the control of the others.
    word = (measured["size"] == _WORD) & (measured["variant"] == "broken")
    measured.loc[word, "variant"] = "control"
    measured.loc[word, "case"] += ", 8 B"
    return {"counts": _counts(measured, cure_size), "rounds": measured}


def _counts(measured: pd.DataFrame, cure_size: int) -> pd.DataFrame:
    triad = Triad("torn read")
    for (variant, case), group in measured.groupby(["variant", "case"], sort=False):
        cost = group.loc[group["size"] == cure_size, "read_ns"].median()
        triad.add(
            str(variant),
            case=str(case),
            operations=int(group["reads"].sum()),
            anomalies=int(group["torn"].sum()),
            cost_ns=max(float(cost), 0.0),  # in this order NaN stays NaN
        )
    return triad.table()


class _Bench:
    """The maps and programs of one value size."""

    def __init__(self, unit: Unit, size: int, process_reads: int, program_reads: int) -> None:
        self._unit = unit
        self._size = size
        self._process_reads, self._program_reads = process_reads, program_reads
        every = _SWEPT + _HALF_CURES + _CURES
        self._tables = {one.table: unit.map(one.table) for one in every}
        self._functions = {
            one.function: unit.function(one.function) for one in every if one.function
        }
        self._counts, self._outer = unit.map("counts"), unit.map("outer")
        self._spare = unit.map("spare")
        for one in every:
            _Writer(self._tables[one.table], one).write()

    def measure(self, setting: _Setting) -> dict[str, object]:
        table = self._tables[setting.table]
        self._counts.update(0, np.zeros((), self._counts.value_dtype)[()])
        # Whatever an earlier round published last: the spare is free to be written again.
        self._outer.update(0, self._tables["inner"].fd)
        writing, stop = Event(), Event()
        calls = [0]

        def write() -> dict[str, object]:
            targets = [self._spare, table] if setting.published else [table]
            writers = [_Writer(one, setting) for one in targets]
            write_ns, publish_ms = [], []
            deadline = time.monotonic() + _LIMIT_S
            while not stop.is_set():
                if time.monotonic() > deadline:
                    raise TimedOut("The reader of torn-reads did not end.")
                turn = calls[0] // _LEAST_CALLS % len(writers)
                write_ns.append(writers[turn].write() / _WRITES)
                calls[0] += 1
                if setting.published and calls[0] % _LEAST_CALLS == 0:
                    # Returns when no program is left that found the other map before.
                    begun = time.monotonic_ns()
                    self._outer.update(0, targets[turn].fd)
                    publish_ms.append((time.monotonic_ns() - begun) / 1e6)
                writing.set()
            return {
                "writes": calls[0] * _WRITES,
                "write_ns": float(np.median(write_ns)),
                "publish_ms": float(np.median(publish_ms)) if publish_ms else math.nan,
            }

        least = _LEAST_CALLS * (2 if setting.published else 1) if setting.written else 0

        def read() -> dict[str, object]:
            try:
                if setting.written and not writing.wait(_LIMIT_S):
                    raise TimedOut("The writer of torn-reads did not begin.")
                end = time.monotonic() + _RACE_S

                def enough(done: int, wanted: int) -> bool:
                    return (done >= wanted and calls[0] >= least) or time.monotonic() > end

                if setting.reader == "process":
                    return self._read_by_process(setting, table, enough)
                return self._read_by_program(setting, enough)
            finally:
                stop.set()

        if setting.written:
            seen, done = together(read, write)
        else:
            (seen,) = together(read)
            done = {"writes": 0, "write_ns": math.nan, "publish_ms": math.nan}
        return {
            "variant": setting.variant,
            "case": setting.case,
            "table": setting.table,
            "reader": setting.reader,
            "written": setting.written,
            **seen,
            **done,
        }

    def _read_by_program(self, setting: _Setting, enough: Enough) -> dict[str, object]:
        function, reads, nanoseconds = self._functions[setting.function], 0, []
        wanted = self._program_reads
        if setting.table == "in_hash":
            wanted *= _RARER_LONG if self._size >= _LONG else _RARER_SHORT
        while not reads or not enough(reads, wanted):
            nanoseconds.append(function.test_run(repeat=_RUNS).mean_ns)
            reads += _RUNS
        seen = self._counts.lookup(0)
        return {
            "reads": reads,
            **{name: int(seen[name]) for name in _COUNTED},
            "read_ns": float(np.median(nanoseconds)),
        }

    def _read_by_process(self, setting: _Setting, table: Map, enough: Enough) -> dict[str, object]:
        reader = _Reader(table, setting)
        total = dict.fromkeys(("reads", *_COUNTED), 0)
        nanoseconds: list[float] = []
        while not nanoseconds or not enough(total["reads"] + total["absent"], self._process_reads):
            nanoseconds.append(reader.read())
            for name, count in reader.judge().items():
                total[name] += count
        return {**total, "read_ns": float(np.median(nanoseconds)) / _READS}


_COUNTED = ("torn", "rejected", "given_up", "equal_ends", "absent")


class _Writer:
    """Updates of one key, many in a call, each with another byte in its payload.

    A batch update does for each element what a single update does
    (kernel/bpf/syscall.c, ``generic_map_update_batch``), without the way there and back.
    """

    def __init__(self, table: Map, setting: _Setting) -> None:
        slots = libbpf.possible_cpus() if table.kind in PER_CPU else 1
        words = table.value_size // _WORD
        filled = np.arange(1, _WRITES + 1, dtype=np.uint64) * np.uint64(_EVERY_BYTE)
        self._values = np.empty((_WRITES, slots, words), np.uint64)
        self._values[...] = filled[:, None, None]
        if setting.layout == "locked":
            self._values[..., 0] = 0
        elif setting.layout == "checked":
            self._values[..., -2] = _checksum(self._values[:, 0, :-2])[:, None]
        self._keys = np.zeros(_WRITES, np.uint32)
        self._table, self._call = table, libbpf.api().bpf_map_update_batch
        self._options = libbpf.BatchOpts(elem_flags=int(setting.write_flags))

    def write(self) -> int:
        """Write all of them; returns the nanoseconds that it took."""
        count = c_uint32(_WRITES)
        begun = time.monotonic_ns()
        result = self._call(self._table.fd, self._keys.ctypes.data, self._values.ctypes.data,
                            byref(count), byref(self._options))  # fmt: skip
        if result < 0:
            raise MapError(-result, f"Overwriting {self._table!r} by batch")
        return time.monotonic_ns() - begun


class _Reader:
    """Lookups of one key into one row of memory each, judged afterwards."""

    def __init__(self, table: Map, setting: _Setting) -> None:
        slots = libbpf.possible_cpus() if table.kind in PER_CPU else 1
        self._rows = np.zeros((_READS, slots, table.value_size // _WORD), np.uint64)
        self._layout = setting.layout
        first, stride = self._rows.ctypes.data, self._rows.strides[0]
        self._places = range(first, first + _READS * stride, stride)
        self._answers: list[int] = []
        self._key = np.zeros(1, np.uint32)
        look_up = libbpf.api().bpf_map_lookup_elem_flags
        self._look_up: Callable[[int, int], int] = partial(look_up, table.fd, self._key.ctypes.data)
        self._flags = int(setting.read_flags)
        if setting.by_batch:
            self._look_up = self._batch_of_one(table)

    def _batch_of_one(self, table: Map) -> Callable[[int, int], int]:
        call, options, count = libbpf.api().bpf_map_lookup_batch, libbpf.BatchOpts(), c_uint32()
        place = np.zeros(_WORD, np.uint8)

        def look_up(at: int, flags: int) -> int:
            count.value = 1
            call(table.fd, None, place.ctypes.data, self._key.ctypes.data, at, byref(count),
                 byref(options))  # fmt: skip
            return count.value - 1  # the end of the table is an error too: the count tells

        return look_up

    def read(self) -> int:
        """Fill every row; returns the nanoseconds that it took, less the loop around it."""
        look_up, flags, places = self._look_up, self._flags, self._places
        begun = time.monotonic_ns()
        self._answers = [look_up(at, flags) for at in places]
        spent = time.monotonic_ns() - begun
        nothing = partial(ctypes.memmove, self._key.ctypes.data)
        at = self._key.ctypes.data
        begun = time.monotonic_ns()
        [nothing(at, 0) for _ in places]
        return spent - (time.monotonic_ns() - begun)

    def judge(self) -> dict[str, int]:
        """Count the rows that were read, and those that are mixed of two writes."""
        rows = self._rows[np.array(self._answers) == 0]
        payload = rows[..., 1:] if self._layout == "locked" else rows
        if self._layout == "checked":
            payload = rows[..., :-2]
        first = payload[..., :1]
        whole = (payload == first) & (first == (first & 0xFF) * np.uint64(_EVERY_BYTE))
        mixed = ~whole.all(axis=(1, 2))
        noticed = np.zeros(len(rows), bool)
        equal_ends = 0
        if self._layout == "checked":
            noticed = rows[:, 0, -2] != _checksum(rows[:, 0, :-2])
            equal_ends = int((mixed & (rows[:, 0, 0] == rows[:, 0, -1])).sum())
        return {
            "reads": len(rows),
            "torn": int((mixed & ~noticed).sum()),
            "rejected": int(noticed.sum()),
            "equal_ends": equal_ends,
            "absent": _READS - len(rows),
        }


def _checksum(rows: Words) -> Words:
    """FNV-1a over the words of each row, as the program computes it."""
    total = np.full(len(rows), _FNV_BASIS, np.uint64)
    for column in rows.T:
        total = (total ^ column) * np.uint64(_FNV_PRIME)
    return total
