"""What a lookup really calls: one bpf(2) with a pointer to attributes, and nothing else."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput, LabError
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.mapping import MS_SYNC
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child
from labkit.kernel.programs import Function, Unit

# enum bpf_cmd (include/uapi/linux/bpf.h).
_LOOKUP, _UPDATE = 1, 2
_COMMANDS = {
    _LOOKUP: "look up element",
    _UPDATE: "update element",
    4: "get next key",
    24: "look up batch",
    26: "update batch",
}
_CALL = np.dtype(
    [("number", "u8"), ("command", "u8"), ("pointer", "u8"), ("size", "u8"), ("attributes", "V64")]
)
# union bpf_attr, of commands on one element; it has the descriptor first in them alone.
_ATTRIBUTES = np.dtype(
    {
        "names": ["map_fd", "key", "value", "flags"],
        "formats": ["u4", "u8", "u8", "u8"],
        "offsets": [0, 8, 16, 24],
        "itemsize": 64,
    }
)
_SPARE_CALLS = 1_000  # room beyond the two that one element takes at most
_MAP_FAILED = ctypes.c_void_p(-1)
_SENTINEL = 0x5EA1
_MOST_ENTRIES = 100_000
_SHOWN = 2  # calls of each case that the run keeps in full


@experiment(
    "lookup-syscall",
    number=29,
    family="kernel-facts",
    question="Which system call does a lookup make, and does it need mapped or locked memory?",
    claims=("2.1b", "2.2a", "2.2b", "2.2c", "3.1b"),
    needs=("bpf", "compile", "tracefs", "tracepoint", "batch_hash"),
    quick={"entries": 2_000, "attempts": 200},
    full={"entries": 30_000, "attempts": 2_000},
)
def lookup_syscall(*, entries: int, attempts: int) -> Tables:
    """Look elements up and update them in several ways, and write down what enters the kernel.

    Programs on the tracepoints of ``bpf``, ``mmap`` and ``msync`` see every such call of the
    measuring thread, and read the attributes from its memory. They are attached and detached
    by other calls, so what they count is the work alone. The article's two procedures are
    carried out as well: ``Syscall6(SYS_BPF, cmd, fd, key, value, flags)``, and mmap of the
    map's descriptor with msync. The kernel copies key and value from and to whatever memory
    the pointers name (kernel/bpf/syscall.c, ``map_lookup_elem``), and brings in its pages.

    Parameters
    ----------
    entries : int
        Elements of the map; each is looked up or updated once in every case.
    attempts : int
        Calls of each procedure of the article, and with each kind of pointer.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a call, an anomaly one that was refused, not seen as it
        was made, or seen while nothing was called. ``calls``: per case ``case``,
        ``entries`` (elements asked for), ``made`` (calls in user space; 0 where a library
        decides), ``bpf``, ``mmap`` (of a descriptor) and ``msync`` (calls seen),
        ``as_made`` (calls seen with the command, descriptor and pointers of the call that
        was made), ``attributes_bytes`` (the size that was passed). ``commands``: ``case``,
        ``command``, ``calls``. ``examples``: the first calls of each case: ``case``,
        ``command``, ``pointer``, ``size``, ``map_fd``, ``key``, ``value``, ``flags``, as text.
        ``refusals``: ``case``, ``answer`` (minus the errno), ``times``, ``changed`` (values
        that are not what they were). ``pointers``:
        ``variant``, ``pointer``, ``memory``, ``calls``, ``failed`` (with EFAULT) and
        ``locked_kib`` (memory that the process had locked).
    """
    if not 1 <= entries <= _MOST_ENTRIES:
        raise BadInput(f"entries of lookup-syscall are 1 to {_MOST_ENTRIES:,}.")
    namespace = os.stat("/proc/self/ns/pid")
    with programs.load(
        "lookup_syscall",
        ENTRIES=entries,
        CALLS=2 * entries + _SPARE_CALLS,
        THREAD=threading.get_native_id(),
        NAMESPACE_DEVICE=namespace.st_dev,
        NAMESPACE_INODE=namespace.st_ino,
    ) as unit:
        table, watcher = unit.map("table"), _Watcher(unit)
        numbers = np.arange(entries)
        table.update_many(numbers.astype(np.uint32), numbers.astype(np.uint64))
        say(f"{entries} elements, looked up and updated in several ways")
        cases = [
            *_by_libbpf(table, entries),
            *_by_bcc(unit.table("table"), entries),
            *_by_batch(table, entries),
        ]
        seen = {case.name: watcher.watch(case.work) for case in cases}
        say("the calls of the article, and none at all")
        system_call = int(seen[cases[0].name].calls["number"][0])
        article = _by_article(system_call, table, attempts)
        seen |= {case.name: watcher.watch(case.work) for case in article}
        idle = watcher.watch(lambda: [table.encode_key(key) for key in range(entries)])
        say("memory that is locked, never touched, or not there")
        with Child(lambda: _pointers(table, attempts)) as child:
            pointers = pd.DataFrame(child.result())
    refusals = pd.DataFrame([row for case in article for row in _refusal(case, seen[case.name])])
    calls = pd.DataFrame([_calls(case, seen[case.name]) for case in (*cases, *article)])
    return {
        "counts": _counts(calls, refusals, idle, entries, pointers),
        "calls": calls,
        "commands": _commands(seen),
        "examples": _examples(seen),
        "refusals": refusals,
        "pointers": pointers,
    }


@dataclass(frozen=True)
class _Case:
    name: str
    entries: int
    work: Callable[[], Any]
    made: int = 0  # calls that we make ourselves, with these arguments
    command: int = 0
    fd: int = -1
    keys: npt.NDArray[np.uint64] | None = None  # where the key of each call stands
    values: npt.NDArray[np.uint64] | None = None


@dataclass(frozen=True)
class _Seen:
    calls: npt.NDArray[Any]
    mmap: int
    msync: int
    result: Any  # of the work


class _Watcher:
    """Watches the calls of this thread while some work is done."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self._calls = unit.map("calls", value=_CALL)
        self._totals = unit.map("totals")
        for name in ("mmap", "msync"):
            self._attach(unit.function(f"on_{name}", ProgramKind.TRACEPOINT), name)
        self._on_bpf = unit.function("on_bpf", ProgramKind.TRACEPOINT)

    def _attach(self, function: Function, call: str) -> int:
        return self._unit.attach(function, f"syscalls:sys_enter_{call}")

    def watch(self, work: Callable[[], Any]) -> _Seen:
        self._totals.update(0, np.zeros(1, self._totals.value_dtype)[0])
        link = self._attach(self._on_bpf, "bpf")  # by other calls than bpf(2)
        try:
            result = work()
        finally:
            self._unit.detach(link)
        totals = self._totals.lookup(0)
        if int(totals["bpf"]) > self._calls.max_entries:
            raise LabError(
                f"{int(totals['bpf'])} calls were made, more than the {self._calls.max_entries} "
                "that there is room for: run it with fewer entries."
            )
        calls = self._calls.snapshot().values[: int(totals["bpf"])]
        return _Seen(calls, int(totals["mmap"]), int(totals["msync"]), result)


def _by_libbpf(table: Map, entries: int) -> list[_Case]:
    lib, fd = libbpf.api(), table.fd
    keys, values = np.arange(entries, dtype=np.uint32), np.arange(entries, dtype=np.uint64)
    numbers = np.arange(entries, dtype=np.uint64)
    key_at, value_at = keys.ctypes.data + 4 * numbers, values.ctypes.data + 8 * numbers
    arguments = list(zip(key_at.tolist(), value_at.tolist(), strict=True))

    def look_up(_keep: object = (keys, values)) -> None:
        for key, value in arguments:
            lib.bpf_map_lookup_elem(fd, key, value)

    def update(_keep: object = (keys, values)) -> None:
        for key, value in arguments:
            lib.bpf_map_update_elem(fd, key, value, 0)

    return [
        _Case("libbpf, look up", entries, look_up, entries, _LOOKUP, fd, key_at, value_at),
        _Case("libbpf, update", entries, update, entries, _UPDATE, fd, key_at, value_at),
    ]


def _by_bcc(table: Any, entries: int) -> list[_Case]:
    keys = [table.Key(number) for number in range(entries)]
    leaves = [table.Leaf(number) for number in range(entries)]
    key_at, leaf_at = (
        np.array([ctypes.addressof(one) for one in many], np.uint64) for many in (keys, leaves)
    )

    def look_up() -> None:
        for key in keys:
            table[key]

    def update() -> None:
        for key, leaf in zip(keys, leaves, strict=True):
            table[key] = leaf

    fd = int(table.map_fd)
    return [
        # bcc makes the room for the value itself.
        _Case("bcc, t[k]", entries, look_up, entries, _LOOKUP, fd, key_at),
        _Case("bcc, t[k] = v", entries, update, entries, _UPDATE, fd, key_at, leaf_at),
        _Case("bcc, items()", entries, lambda: list(table.items())),
    ]


def _by_batch(table: Map, entries: int) -> list[_Case]:
    numbers = np.arange(entries)
    keys, values = numbers.astype(np.uint32), numbers.astype(np.uint64)
    return [
        _Case("labkit, snapshot()", entries, table.snapshot),
        _Case("labkit, update_many()", entries, lambda: table.update_many(keys, values)),
    ]


def _by_article(system_call: int, table: Map, attempts: int) -> list[_Case]:
    """The article's calls; their work answers (minus the errno, whether a value changed)."""
    libc = ctypes.CDLL(None, use_errno=True)
    key, value = np.zeros(1, np.uint32), np.zeros(1, np.uint64)
    number, flags = ctypes.c_long(system_call), ctypes.c_ulong(0)
    key_at, value_at = (ctypes.c_void_p(one.ctypes.data) for one in (key, value))

    def by_arguments(command: int) -> tuple[list[int], int]:
        answers, changed = [], 0
        value[0] = _SENTINEL
        for _ in range(attempts):
            result = libc.syscall(
                number, ctypes.c_long(command), ctypes.c_long(table.fd), key_at, value_at, flags
            )
            answers.append(-ctypes.get_errno() if result < 0 else int(result))
            changed += int(value[0]) != _SENTINEL
        return answers, changed

    def map_and_synchronise() -> tuple[list[int], int]:
        answers = []
        for _ in range(attempts):
            try:
                mmap.mmap(table.fd, mmap.PAGESIZE).close()
                answers.append(0)
            except OSError as refused:
                answers.append(-int(refused.errno or 0))
            libc.msync(_MAP_FAILED, mmap.PAGESIZE, MS_SYNC)
        return answers, 0

    return [
        _Case("Syscall6, look up", attempts, lambda: by_arguments(_LOOKUP)),
        _Case("Syscall6, update", attempts, lambda: by_arguments(_UPDATE)),
        _Case("mmap and msync", attempts, map_and_synchronise),
    ]


# Memory that key or value of a lookup is in: answers where, in a page with none behind it.


def _locked(start: int, libc: ctypes.CDLL) -> int:
    libc.mlock(ctypes.c_void_p(start), ctypes.c_size_t(mmap.PAGESIZE))
    return start


_MEMORY: tuple[tuple[str, str, Callable[[int, ctypes.CDLL], int]], ...] = (
    ("control", "locked", _locked),
    ("fixed", "never touched", lambda start, _: start),
    ("fixed", "unaligned", lambda start, _: start + 1),
    ("broken", "NULL", lambda start, _: 0),
    ("broken", "PROT_NONE", lambda start, _: start + mmap.PAGESIZE),
    ("broken", "across the end", lambda start, _: start + mmap.PAGESIZE - 1),
)


def _pointers(table: Map, attempts: int) -> list[dict[str, object]]:
    """Look key 0 up with key and value in memory of each kind; runs in a child."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    libc, lib = ctypes.CDLL(None), libbpf.api()
    good_key, good_value = np.zeros(1, np.uint32), np.zeros(1, np.uint64)
    rows: list[dict[str, object]] = []
    for role in ("key", "value"):
        for variant, memory, place in _MEMORY:
            failed, kept = 0, []
            for _ in range(attempts):
                pages = mmap.mmap(-1, 2 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                kept.append(pages)
                start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
                libc.mprotect(
                    ctypes.c_void_p(start + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0
                )
                at = place(start, libc)
                key = at if role == "key" else good_key.ctypes.data
                value = at if role == "value" else good_value.ctypes.data
                failed += lib.bpf_map_lookup_elem(table.fd, key, value) == -errno.EFAULT
            rows.append(
                {
                    "variant": variant,
                    "pointer": role,
                    "memory": memory,
                    "calls": attempts,
                    "failed": failed,
                    "locked_kib": _locked_kib(),
                }
            )
    return rows


def _locked_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmLck:")[2].split()[0])


def _calls(case: _Case, seen: _Seen) -> dict[str, object]:
    attributes = seen.calls["attributes"].view(_ATTRIBUTES)
    as_made = np.zeros(len(seen.calls), bool)
    if case.keys is not None and len(seen.calls) == case.made:
        as_made = (seen.calls["command"] == case.command) & (attributes["map_fd"] == case.fd)
        as_made &= attributes["key"] == case.keys
        if case.values is not None:
            as_made &= attributes["value"] == case.values
    return {
        "case": case.name,
        "entries": case.entries,
        "made": case.made,
        "bpf": len(seen.calls),
        "mmap": seen.mmap,
        "msync": seen.msync,
        "as_made": int(as_made.sum()),
        "attributes_bytes": int(seen.calls["size"].max(initial=0)),
    }


def _commands(seen: dict[str, _Seen]) -> pd.DataFrame:
    rows = [
        {"case": name, "command": _COMMANDS.get(int(command), str(command)), "calls": int(count)}
        for name, one in seen.items()
        for command, count in zip(*np.unique(one.calls["command"], return_counts=True), strict=True)
    ]
    return pd.DataFrame(rows, columns=["case", "command", "calls"])


def _examples(seen: dict[str, _Seen]) -> pd.DataFrame:
    rows = []
    for name, one in seen.items():
        for call in one.calls[:_SHOWN]:
            element = int(call["command"]) in (_LOOKUP, _UPDATE)
            fields = call["attributes"].reshape(1).view(_ATTRIBUTES)[0]
            readable = element and int(call["size"]) >= 32 and int(call["pointer"]) > mmap.PAGESIZE
            rows.append(
                {
                    "case": name,
                    "command": _COMMANDS.get(int(call["command"]), str(call["command"])),
                    "pointer": f"{int(call['pointer']):#x}",
                    "size": str(call["size"]),
                    "map_fd": str(fields["map_fd"]) if readable else "",
                    **{
                        field: f"{int(fields[field]):#x}" if readable else ""
                        for field in ("key", "value", "flags")
                    },
                }
            )
    return pd.DataFrame(rows)


def _refusal(case: _Case, seen: _Seen) -> list[dict[str, object]]:
    answers, changed = seen.result
    return [
        {"case": case.name, "answer": answer, "times": times, "changed": changed}
        for answer, times in Counter(answers).items()
    ]


def _counts(
    calls: pd.DataFrame,
    refusals: pd.DataFrame,
    idle: _Seen,
    entries: int,
    pointers: pd.DataFrame,
) -> pd.DataFrame:
    triad = Triad("refused")
    for case, group in refusals.groupby("case", sort=False):
        triad.add(
            "broken",
            case=str(case),
            operations=int(group["times"].sum()),
            anomalies=int(group.loc[group["answer"] < 0, "times"].sum()),
        )
    triad.add(
        "control",
        case="nothing called",
        operations=entries,
        anomalies=min(entries, len(idle.calls) + idle.mmap + idle.msync),
        anomaly="call seen",
    )
    for case, made, as_made in calls.loc[calls["made"] > 0, ["case", "made", "as_made"]].values:
        triad.add(
            "fixed",
            case=str(case),
            operations=int(made),
            anomalies=int(made - as_made),
            anomaly="not seen as made",
        )
    for variant, pointer, memory, made, failed in pointers.iloc[:, :5].itertuples(index=False):
        triad.add(
            variant,
            case=f"{pointer} in memory: {memory}",
            operations=made,
            anomalies=failed,
            anomaly="EFAULT",
        )
    return triad.table()
