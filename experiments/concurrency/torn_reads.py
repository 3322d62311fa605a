"""Values that are read half old and half new, against their size, and what keeps them whole."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Sequence
from ctypes import byref, c_uint32
from functools import partial
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import BadInput, TimedOut
from labkit.figures import Axes, Figure, rates_against, style
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import UpdateFlag
from labkit.kernel.maps import PER_CPU, Map, MapError
from labkit.kernel.parallel import together
from labkit.kernel.programs import BpfObject
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say
from labkit.runs import Run

_WORD = 8
_EVERY_BYTE = 0x0101010101010101
_FNV_BASIS, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3
_WRITES = 128  # updates in one call of the writer, each with another byte
_READS = 250  # reads of a process between two looks at the writer
_RUNS = 5_000  # runs of a program between two looks at the writer
_LEAST_CALLS = 8  # a reader goes on until the writer has called that often
_LONG = 1024  # bytes; a hash is torn so seldom that programs read it more often ...
_RARER_SHORT, _RARER_LONG = 3, 10  # ... by these factors, below that size and from there on
_RARER_BATCH = 20  # and a process that cures it, which could not show that it does otherwise
_RACE_S = 1.0  # bound of one race, where other load leaves us little of a CPU
_LIMIT_S = 30.0

Words = npt.NDArray[np.uint64]
Enough = Callable[[int, int], bool]  # of reads done and reads wanted


def _by_both(variant: str, id: str, way: str, table: str, **settings: Any) -> tuple[Case, Case]:
    """The same setting with a process that reads and with a program that reads."""
    settings = {"way": way, "table": table, "written": True, **settings}
    return (
        Case(variant, f"{id}-by-process", f"{way}, read by a process", reader="process",
             **settings),
        Case(variant, f"{id}-by-program", f"{way}, read by a program", reader="program",
             function=f"read_{table.removeprefix('in_')}", **settings),
    )  # fmt: skip


def _controls(cases: Sequence[Case], prefix: str, words: str, **settings: Any) -> tuple[Case, ...]:
    """The same settings but for one, in which nothing can be torn."""
    return tuple(
        Case("control", f"{prefix}-{one.id}", f"{one.label}, {words}",
             **{**one.settings, **settings})
        for one in cases
    )  # fmt: skip


_LOCK_READ: dict[str, Any] = {"layout": "locked", "read_flags": UpdateFlag.LOCK}
_LOCK: dict[str, Any] = {**_LOCK_READ, "write_flags": UpdateFlag.LOCK}
_SWEPT = (
    *_by_both("broken", "array", "array", "in_array"),
    *_by_both("broken", "hash", "hash", "in_hash"),
    *_by_both("broken", "per-cpu-array", "per-CPU array", "in_percpu_array"),
    *_by_both("broken", "per-cpu-hash", "per-CPU hash", "in_percpu_hash"),
)
# One word cannot be half written: the smallest size is the control of the others.
_WORDS = _controls(_SWEPT, "word", "8 B", size=_WORD)
_HALF_CURES = _by_both(
    "broken", "half-locked", "array, lock on the reading side only", "locked_array", **_LOCK_READ
)
_CURES = (
    *_by_both("fixed", "array-lock", "array, BPF_F_LOCK", "locked_array", **_LOCK),
    *_by_both("fixed", "hash-lock", "hash, BPF_F_LOCK", "locked_hash", **_LOCK),
    *_by_both("fixed", "checksum", "array, checksum", "checked_array", layout="checked"),
    # Read with BPF_MAP_LOOKUP_BATCH.
    Case("fixed", "hash-batch", "hash, batch lookup, read by a process", way="hash, batch lookup",
         table="in_hash", reader="process", written=True, by_batch=True),
    # Written where no program reads, then put into the outer map.
    Case("fixed", "map-in-map", "map in map, read by a program", way="map in map", table="inner",
         reader="program", function="read_published", written=True, published=True),
)  # fmt: skip
_QUIET = _controls(_SWEPT + _CURES, "quiet", "nobody writes", written=False)


def _derived(tables: Tables) -> Tables:
    """The counts, with ``cost_ns`` of the size that the cures have, and the rounds of that size."""
    rounds = tables["rounds"]
    at_cure_size = rounds["size"] == rounds.loc[~rounds["written"], "size"].max()
    counted = Counted("torn read", operations="reads", anomalies="torn", cost_ns="read_ns")
    return {
        "counts": counted.table(rounds.assign(read_ns=rounds["read_ns"].where(at_cure_size))),
        "at_cure_size": rounds[at_cure_size],
    }


_KINDS = {
    "in_array": "array",
    "in_percpu_array": "per-CPU array",
    "in_percpu_hash": "per-CPU hash",
    "in_hash": "hash",
}


def _figure(run: Run) -> Figure:
    """Torn reads per million against size, and the time of a read with each cure."""
    from matplotlib import pyplot

    rounds = run.table("rounds")
    figure, (by_process, by_program, cost) = pyplot.subplots(
        3, 1, figsize=(style.HALF_PAGE[0], 6.6), height_ratios=(1, 1, 1.1)
    )
    rounds = rounds.merge(run.case_table[["case", "way"]], on="case")
    swept = rounds[rounds["case"].isin([one.id for one in _SWEPT + _WORDS])]
    for ax, reader in ((by_process, "process"), (by_program, "program")):
        _against_size(ax, swept[swept["reader"] == reader])
        ax.set_title(f"read by a {reader}")
        ax.set_ylabel("torn per million reads")
    by_process.sharex(by_program)
    by_program.set_xlabel("value, bytes (hollow: none torn, bound at 95 %)", loc="right")
    by_process.legend(
        loc="lower right", bbox_to_anchor=(1, 1.1), ncols=2, columnspacing=0.8, handletextpad=0.3
    )
    _cost(cost, rounds[rounds["size"] == run.parameters["cure_size"]])
    cost.set_xlabel(f"ns per read of {run.parameters['cure_size']} bytes", loc="right")
    return figure


def _against_size(ax: Axes, rows: pd.DataFrame) -> None:
    for series, (table, label) in enumerate(_KINDS.items()):
        sums = rows[rows["table"] == table].groupby("size")[["torn", "reads"]].sum()
        rates_against(ax, sums["torn"], sums["reads"], style.look(series), label, x=sums.index)
    sizes = sorted(rows["size"].unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [f"{size}" for size in sizes], fontsize=6)
    style.logarithmic(ax, "y", ticks=6)


def _cost(ax: Axes, rows: pd.DataFrame) -> None:
    looks = {"process": style.look(0), "program": style.look(1)}
    names = list(dict.fromkeys(one.way for one in _SWEPT + _CURES))
    for y, name in enumerate(names):
        for reader, look in looks.items():
            for written, fill in ((False, "white"), (True, look.color)):
                chosen = (
                    (rows["way"] == name)
                    & (rows["reader"] == reader)
                    & (rows["written"] == written)
                )
                ns = rows.loc[chosen, "read_ns"]
                if ns.empty:
                    continue
                middle = ns.median()
                ax.errorbar(
                    middle, y + (0.15 if written else -0.15),
                    xerr=[[middle - ns.min()], [ns.max() - middle]], mfc=fill, **look.points(),
                )  # fmt: skip
    for reader, look in looks.items():
        ax.plot([], [], label=reader, **look.points())
    ax.plot([], [], "o", color=style.GREY, mfc="white", label="nobody writes")
    ax.set_xscale("log")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    style.legend_above(ax, 3, columnspacing=0.8, handletextpad=0.1)


@experiment(
    "torn-reads",
    number=14,
    family="concurrency",
    question="From which size on is a value read half old and half new, and what keeps it whole?",
    claims=("1.T",),
    needs=("bpf", "compile", "test_run", "two_cpus", "spin_lock"),
    quick={"sizes": [8, 16, 64, 256, 4096], "cure_size": 256, "process_reads": 2_000,
           "program_reads": 10_000, "rounds": 7},
    full={"sizes": [8, 16, 24, 64, 256, 1024, 4096], "cure_size": 256, "process_reads": 20_000,
          "program_reads": 100_000, "rounds": 6},
    cases=_WORDS + _SWEPT + _HALF_CURES + _CURES + _QUIET,
    derive=_derived,
    statements=(
        Statement("values in an array, or in slots of each CPU, are torn",
                  'some(broken(table=("in_array", "in_percpu_array", "in_percpu_hash")), '
                  "like=1e-3)"),
        Statement("a lock on the reading side alone does not help",
                  'some(broken(table="locked_array"), like=1e-5)'),
        # A process alone may see no torn read of a hash: it is rare, and its reads are few.
        Statement("values in a hash are torn, as programs see", 'some(broken["hash-by-program"], '
                  "like=1e-6)"),
        # In each round the middle one of the sizes: at one alone a burst may hit one kind.
        Statement("an element that is used again is torn more seldom than one overwritten in place",
                  'ratio(rounds(case="hash-by-program").torn / '
                  'rounds(case="hash-by-program").reads, rounds(case="array-by-program").torn / '
                  'rounds(case="array-by-program").reads) < 1'),
        Statement("a value of one word is never torn", "none(control(size=8))"),
        Statement("nothing is torn while nobody writes", "none(control(written=False))"),
        Statement("in place, whole every time with a lock on both sides, a checksum or a map that "
                  "is published", 'none(fixed(table=("locked_array", "locked_hash", '
                  '"checked_array", "inner")))'),
        Statement("a batch lookup of a hash is whole every time, in so many reads that programs "
                  "saw torn ones",
                  'none(fixed["hash-batch"], like=broken["hash-by-program"])'),
    ),
    sentence="Read while it was overwritten, a value was torn in every kind of map (array from "
    '{min(rounds(torn > 0, table="in_array").size)} B, hash from '
    '{min(rounds(torn > 0, table="in_hash").size)} B, per-CPU array from '
    '{min(rounds(torn > 0, table="in_percpu_array").size)} B, per-CPU hash from '
    '{min(rounds(torn > 0, table="in_percpu_hash").size)} B): by a program '
    '{1e6 * sum(at_cure_size(case="array-by-program").torn) / '
    'sum(at_cure_size(case="array-by-program").reads)} in a million reads of '
    "{parameters.cure_size} B in an array and "
    '{1e6 * sum(at_cure_size(case="hash-by-program").torn) / '
    'sum(at_cure_size(case="hash-by-program").reads)} in a hash. Words, and reads with BPF_F_LOCK '
    "on both sides, a checksum, a batch lookup of a hash or a map in map: {fixed} torn. Versions "
    "at head and tail are no substitute for the checksum: they agreed in "
    '{sum(rounds(table="checked_array").equal_ends)} of '
    '{sum(rounds(table="checked_array").rejected)} reads that it refused.',
    figure=_figure,
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
        ``rounds``: one row per setting, size and round with columns ``variant``, ``case``,
        ``table``, ``reader``, ``written`` (bool), ``size`` (bytes), ``round``, ``reads``, ``torn``
        (mixed, and not noticed by the reader's own check), ``rejected`` (noticed), ``given_up``
        (a program's four tries all rejected), ``equal_ends`` (mixed although the versions at both
        ends agree: what a check without checksum lets pass), ``absent``, ``writes`` (int64),
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
    for size in sizes:
        say(f"values of {size} bytes")
        cases = _WORDS if size == _WORD else _SWEPT
        if size == cure_size:
            cases += _HALF_CURES + _CURES + _QUIET
        with programs.load("torn_reads", WORDS=size // _WORD) as loaded:
            bench = _Bench(loaded, size, process_reads, program_reads)
            for turn in range(rounds):
                for case in cases:
                    rows.append({"round": turn, "size": size, **bench.measure(case)})
    return {"rounds": pd.DataFrame(rows)}


class _Bench:
    """The maps and programs of one value size."""

    def __init__(
        self, loaded: BpfObject, size: int, process_reads: int, program_reads: int
    ) -> None:
        self._size = size
        self._process_reads, self._program_reads = process_reads, program_reads
        every = _SWEPT + _HALF_CURES + _CURES
        self._tables = {one.table: loaded.map(one.table) for one in every}
        functions = {one.function for one in every if one.reader == "program"}
        self._functions = {name: loaded.program(name) for name in functions}
        self._counts, self._outer = loaded.map("counts"), loaded.map("outer")
        self._spare = loaded.map("spare")
        for one in every:
            _Writer(self._tables[one.table], one).write()

    def measure(self, case: Case) -> dict[str, object]:
        table = self._tables[case.table]
        self._counts.update(0, np.zeros((), self._counts.value_dtype)[()])
        if case.table == "inner":
            # Whatever an earlier round published last: the spare is free to be written again.
            self._outer.update(0, self._tables["inner"].fd)
        writing, stop = Event(), Event()
        calls = [0]

        def write() -> dict[str, object]:
            targets = [self._spare, table] if case.get("published", False) else [table]
            writers = [_Writer(one, case) for one in targets]
            write_ns, publish_ms = [], []
            deadline = time.monotonic() + _LIMIT_S
            while not stop.is_set():
                if time.monotonic() > deadline:
                    raise TimedOut("The reader of torn-reads did not end.")
                turn = calls[0] // _LEAST_CALLS % len(writers)
                write_ns.append(writers[turn].write() / _WRITES)
                calls[0] += 1
                if case.get("published", False) and calls[0] % _LEAST_CALLS == 0:
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

        least = _LEAST_CALLS * (2 if case.get("published", False) else 1) if case.written else 0

        def read() -> dict[str, object]:
            try:
                if case.written and not writing.wait(_LIMIT_S):
                    raise TimedOut("The writer of torn-reads did not begin.")
                end = time.monotonic() + _RACE_S

                def enough(done: int, wanted: int) -> bool:
                    return (done >= wanted and calls[0] >= least) or time.monotonic() > end

                if case.reader == "process":
                    return self._read_by_process(case, table, enough)
                return self._read_by_program(case, enough)
            finally:
                stop.set()

        if case.written:
            seen, done = together(read, write)
        else:
            (seen,) = together(read)
            done = {"writes": 0, "write_ns": math.nan, "publish_ms": math.nan}
        return {
            "variant": case.variant,
            "case": case.id,
            "table": case.table,
            "reader": case.reader,
            "written": case.written,
            **seen,
            **done,
        }

    def _read_by_program(self, case: Case, enough: Enough) -> dict[str, object]:
        function, reads, nanoseconds = self._functions[case.function], 0, []
        wanted = self._program_reads
        if case.table == "in_hash":
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

    def _read_by_process(self, case: Case, table: Map, enough: Enough) -> dict[str, object]:
        reader = _Reader(table, case)
        wanted = self._process_reads * (_RARER_BATCH if case.get("by_batch", False) else 1)
        total = dict.fromkeys(("reads", *_COUNTED), 0)
        nanoseconds: list[float] = []
        while not nanoseconds or not enough(total["reads"] + total["absent"], wanted):
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

    def __init__(self, table: Map, case: Case) -> None:
        slots = libbpf.possible_cpus() if table.kind in PER_CPU else 1
        words = table.value_size // _WORD
        filled = np.arange(1, _WRITES + 1, dtype=np.uint64) * np.uint64(_EVERY_BYTE)
        self._values = np.empty((_WRITES, slots, words), np.uint64)
        self._values[...] = filled[:, None, None]
        if case.get("layout", "plain") == "locked":
            self._values[..., 0] = 0
        elif case.get("layout", "plain") == "checked":
            self._values[..., -2] = _checksum(self._values[:, 0, :-2])[:, None]
        self._keys = np.zeros(_WRITES, np.uint32)
        self._table, self._call = table, libbpf.api().bpf_map_update_batch
        self._options = libbpf.BatchOpts(elem_flags=int(case.get("write_flags", UpdateFlag.ANY)))

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

    def __init__(self, table: Map, case: Case) -> None:
        slots = libbpf.possible_cpus() if table.kind in PER_CPU else 1
        self._rows = np.zeros((_READS, slots, table.value_size // _WORD), np.uint64)
        self._layout = case.get("layout", "plain")
        first, stride = self._rows.ctypes.data, self._rows.strides[0]
        self._places = range(first, first + _READS * stride, stride)
        self._answers: list[int] = []
        self._key = np.zeros(1, np.uint32)
        look_up = libbpf.api().bpf_map_lookup_elem_flags
        self._look_up: Callable[[int, int], int] = partial(look_up, table.fd, self._key.ctypes.data)
        self._flags = int(case.get("read_flags", UpdateFlag.ANY))
        if case.get("by_batch", False):
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
