"""What a lookup really calls: one bpf(2) with a pointer to attributes, and nothing else."""

from __future__ import annotations

import ctypes
import errno
import mmap
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

from experiments import bpf_calls
from experiments.bpf_calls import ATTRIBUTES, COMMANDS, LOOKUP, UPDATE, Seen
from labkit.errors import BadInput
from labkit.figures import Axes, style
from labkit.kernel import libbpf
from labkit.kernel.mapping import MS_SYNC
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say
from labkit.runs import Run

_MAP_FAILED = ctypes.c_void_p(-1)
_SENTINEL = 0x5EA1
_MOST_ENTRIES = 100_000
_SHOWN = 2  # calls of each case that the run keeps in full


def _locked(start: int, libc: ctypes.CDLL) -> int:
    libc.mlock(ctypes.c_void_p(start), ctypes.c_size_t(mmap.PAGESIZE))
    return start


# Memory that key or value of a lookup is in: answers where, in a page with none behind it.
_MEMORY: tuple[tuple[str, str, str, Callable[[int, ctypes.CDLL], int]], ...] = (
    ("control", "locked", "locked", _locked),
    ("fixed", "untouched", "never touched", lambda start, _: start),
    ("fixed", "unaligned", "unaligned", lambda start, _: start + 1),
    ("broken", "null", "NULL", lambda start, _: 0),
    ("broken", "prot-none", "PROT_NONE", lambda start, _: start + mmap.PAGESIZE),
    ("broken", "across-end", "across the end", lambda start, _: start + mmap.PAGESIZE - 1),
)


def _derived(tables: Tables) -> Tables:
    """The counts, what the article's layout was answered, and the calls of batches.

    ``misread``: whether it is an answer to attributes that make no sense.
    """
    calls, refusals, pointers = (tables[name] for name in ("calls", "refusals", "pointers"))
    made, idle = calls[calls["made"] > 0], calls[calls["by"] == "nobody"]
    seen = idle["bpf"] + idle["mmap"] + idle["msync"]
    refused = refusals["times"].where(refusals["answer"] < 0, 0)
    rows = pd.concat([
        refusals.assign(variant="broken", operations=refusals["times"], anomalies=refused),
        idle.assign(variant="control", operations=idle["entries"] + seen, anomalies=seen),
        made.assign(variant="fixed", operations=made["made"],
                    anomalies=made["made"] - made["as_made"]),
        pointers.assign(operations=pointers["calls"], anomalies=pointers["failed"]),
    ])  # fmt: skip
    counted = Counted("not as made", operations="operations", anomalies="anomalies")
    misread = refusals["answer"].isin([-errno.E2BIG, -errno.EINVAL, -errno.EFAULT])
    by_layout = refusals.assign(misread=misread)[refusals["case"] != "article-mmap"]
    batches = calls[calls["case"].isin(["labkit-snapshot", "labkit-update-many"])]
    return {"counts": counted.table(rows), "by_layout": by_layout, "batches": batches}


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw how many calls of bpf(2) one element took in each way of a library, by command."""
    ax = style.axes(ax, height=3.2)
    calls = run.table("calls")
    calls = calls[calls["by"] == "library"]
    cases, entries = list(calls["case"]), calls.set_index("case")["entries"]
    commands = run.table("commands")
    commands = commands[commands["case"].isin(cases)]
    aside = 0.25 * commands.groupby("case").cumcount()  # a way that makes two kinds of calls
    commands = commands.assign(row=commands["case"].map(cases.index) + aside)
    for number, (command, group) in enumerate(commands.groupby("command", sort=False)):
        ax.plot(
            group["calls"] / group["case"].map(entries),
            group["row"],
            **style.look(number).points(),
            alpha=0.8,
            label=str(command),
        )
    style.rows(ax, map(run.label, cases))
    style.logarithmic(ax)
    others = int(calls["mmap"].sum() + calls["msync"].sum())
    ax.set_xlabel(f"bpf() calls per element\n(mmap and msync: {others} in all)", loc="right")
    style.legend_above(ax, 2, columnspacing=1, handletextpad=0.2)
    return ax


@experiment(
    "lookup-syscall",
    number=29,
    family="kernel-facts",
    question="Which system call does a lookup make, and does it need mapped or locked memory?",
    claims=("2.1b", "2.2a", "2.2b", "2.2c", "3.1b"),
    needs=("bpf", "compile", "tracefs", "tracepoint", "batch_hash"),
    quick={"entries": 2_000, "attempts": 200},
    full={"entries": 30_000, "attempts": 2_000},
    cases=(
        Case("broken", "article-lookup", "Syscall6, look up"),
        Case("broken", "article-update", "Syscall6, update"),
        Case("broken", "article-mmap", "mmap and msync"),
        Case("control", "idle", "nothing called"),
        Case("fixed", "libbpf-lookup", "libbpf, look up"),
        Case("fixed", "libbpf-update", "libbpf, update"),
        Case("fixed", "bcc-lookup", "bcc, t[k]"),
        Case("fixed", "bcc-update", "bcc, t[k] = v"),
        # Libraries decide on the calls of these: they are told, and not counted.
        Case("fixed", "bcc-items", "bcc, items()"),
        Case("fixed", "labkit-snapshot", "labkit, snapshot()"),
        Case("fixed", "labkit-update-many", "labkit, update_many()"),
        *(Case(variant, f"{pointer}-{memory}", f"{pointer} in memory: {label}", pointer=pointer)
          for pointer in ("key", "value") for variant, memory, label, _ in _MEMORY),
    ),
    derive=_derived,
    statements=(
        Statement("a lookup or update is one bpf(command, attributes, size) with our pointers in "
                  "it",
                  'none(fixed["libbpf-lookup", "libbpf-update", "bcc-lookup", "bcc-update"])'),
        Statement("it makes no other call of bpf",
                  "all(calls(made > 0).bpf == calls(made > 0).made)"),
        Statement("no library maps the map or synchronises it",
                  'none(calls(bpf > 0, by="library").mmap > 0) '
                  'and none(calls(bpf > 0, by="library").msync > 0)'),
        Statement("the watch would have seen them",
                  'calls(case="article-mmap").mmap == calls(case="article-mmap").msync '
                  '== calls(case="article-mmap").entries > 0 '
                  'and calls(case="article-mmap").bpf == 0'),
        Statement("it sees nothing while nothing is called", 'none(control["idle"])'),
        Statement("the layout Syscall6(SYS_BPF, cmd, fd, key, value, flags) is refused",
                  'all(broken["article-lookup", "article-update"])'),
        Statement("it is refused as attributes that make no sense, and nothing changes",
                  "all(by_layout.misread) and none(by_layout(times > 0).changed > 0)"),
        Statement("mmap of a hash is refused", 'all(broken["article-mmap"])'),
        Statement("key and value may be in memory that is neither locked nor touched nor aligned",
                  'none(fixed(pointer=("key", "value")))'),
        Statement("none of it was locked then",
                  'none(pointers(calls > 0, variant="fixed").locked_kib > 0)'),
        Statement("locked memory serves as well",
                  'none(control["key-locked", "value-locked"]) '
                  'and all(pointers(variant="control").locked_kib > 0)'),
        Statement("EFAULT means that there is no memory at the pointer",
                  'all(broken(pointer=("key", "value")))'),
        Statement("to iterate by key takes two calls an element",
                  '2 * calls(case="bcc-items").entries <= calls(case="bcc-items").bpf '
                  '<= 2 * calls(case="bcc-items").entries + 2 '
                  'and calls(case="bcc-items").bpf > 0'),
        Statement("a batch takes far fewer than one call an element",
                  "all(batches(bpf > 0).bpf <= batches(bpf > 0).entries / 10)"),
    ),
    sentence="{sum(calls.as_made)} of {sum(calls.made)} lookups and updates were seen as one "
    "bpf(command, attributes, size) each, whichever library made them, with "
    '{sum(calls(by="library").mmap)} mmap and {sum(calls(by="library").msync)} msync. The '
    'article\'s Syscall6 layout was refused in {broken["article-lookup", "article-update"]} calls '
    "(the first answer: {first(by_layout.answer)}). Memory need not be locked: "
    '{fixed(pointer=("key", "value"))} lookups failed with none of it locked, '
    '{broken(pointer=("key", "value"))} where the pointer named no memory.',
    figure=_figure,
)  # fmt: skip
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
        ``calls``: per case ``case``, ``by`` (``library``, ``article`` or ``nobody``),
        ``entries`` (elements asked for), ``made`` (calls in user space; 0 where a library
        decides), ``bpf``, ``mmap`` (of a descriptor) and ``msync`` (calls seen),
        ``as_made`` (calls seen with the command, descriptor and pointers of the call that
        was made), ``attributes_bytes`` (the size that was passed). ``commands``: ``case``,
        ``command``, ``calls``. ``examples``: the first calls of each case: ``case``,
        ``command``, ``pointer``, ``size``, ``map_fd``, ``key``, ``value``, ``flags``, as text.
        ``refusals``: ``case``, ``answer`` (minus the errno), ``times``, ``changed`` (values
        that are not what they were). ``pointers``:
        ``variant``, ``case``, ``pointer``, ``memory``, ``calls``, ``failed`` (with EFAULT) and
        ``locked_kib`` (memory that the process had locked).
    """
    if not 1 <= entries <= _MOST_ENTRIES:
        raise BadInput(f"entries of lookup-syscall are 1 to {_MOST_ENTRIES:,}.")
    with bpf_calls.watching(threading.get_native_id(), entries) as (watcher, loaded):
        table = loaded.map("table")
        numbers = np.arange(entries)
        table.update_many(numbers.astype(np.uint32), numbers.astype(np.uint64))
        say(f"{entries} elements, looked up and updated in several ways")
        ways = [
            *_by_libbpf(table, entries),
            *_by_bcc(loaded.table("table"), entries),
            *_by_batch(table, entries),
        ]
        seen = {way.id: watcher.watch(way.work) for way in ways}
        say("the calls of the article, and none at all")
        system_call = int(seen[ways[0].id].calls["number"][0])
        article = _by_article(system_call, table, attempts)
        idle = _Way(
            "idle", "nobody", entries, lambda: [table.encode_key(n) for n in range(entries)]
        )
        seen |= {way.id: watcher.watch(way.work) for way in (*article, idle)}
        say("memory that is locked, never touched, or not there")
        with Child(lambda: _pointers(table, attempts)) as child:
            pointers = pd.DataFrame(child.result())
    return {
        "calls": pd.DataFrame([_calls(way, seen[way.id]) for way in (*ways, *article, idle)]),
        "commands": _commands(seen),
        "examples": _examples(seen),
        "refusals": pd.DataFrame([row for way in article for row in _refusal(way, seen[way.id])]),
        "pointers": pointers,
    }


@dataclass(frozen=True)
class _Way:
    id: str
    by: str
    entries: int
    work: Callable[[], Any]
    made: int = 0  # calls that we make ourselves, with these arguments
    command: int = 0
    fd: int = -1
    keys: npt.NDArray[np.uint64] | None = None  # where the key of each call stands
    values: npt.NDArray[np.uint64] | None = None


def _by_libbpf(table: Map, entries: int) -> list[_Way]:
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
        _Way("libbpf-lookup", "library", entries, look_up, entries, LOOKUP, fd, key_at, value_at),
        _Way("libbpf-update", "library", entries, update, entries, UPDATE, fd, key_at, value_at),
    ]


def _by_bcc(table: Any, entries: int) -> list[_Way]:
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
        _Way("bcc-lookup", "library", entries, look_up, entries, LOOKUP, fd, key_at),
        _Way("bcc-update", "library", entries, update, entries, UPDATE, fd, key_at, leaf_at),
        _Way("bcc-items", "library", entries, lambda: list(table.items())),
    ]


def _by_batch(table: Map, entries: int) -> list[_Way]:
    numbers = np.arange(entries)
    keys, values = numbers.astype(np.uint32), numbers.astype(np.uint64)
    return [
        _Way("labkit-snapshot", "library", entries, table.snapshot),
        _Way("labkit-update-many", "library", entries, lambda: table.update_many(keys, values)),
    ]


def _by_article(system_call: int, table: Map, attempts: int) -> list[_Way]:
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
        _Way("article-lookup", "article", attempts, lambda: by_arguments(LOOKUP)),
        _Way("article-update", "article", attempts, lambda: by_arguments(UPDATE)),
        _Way("article-mmap", "article", attempts, map_and_synchronise),
    ]


def _pointers(table: Map, attempts: int) -> list[dict[str, object]]:
    """Look key 0 up with key and value in memory of each kind; runs in a child."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    libc, lib = ctypes.CDLL(None), libbpf.api()
    good_key, good_value = np.zeros(1, np.uint32), np.zeros(1, np.uint64)
    rows: list[dict[str, object]] = []
    for role in ("key", "value"):
        for variant, memory, _, place in _MEMORY:
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
                    "case": f"{role}-{memory}",
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


def _calls(way: _Way, seen: Seen) -> dict[str, object]:
    attributes = seen.calls["attributes"].view(ATTRIBUTES)
    as_made = np.zeros(len(seen.calls), bool)
    if way.keys is not None and len(seen.calls) == way.made:
        as_made = (seen.calls["command"] == way.command) & (attributes["map_fd"] == way.fd)
        as_made &= attributes["key"] == way.keys
        if way.values is not None:
            as_made &= attributes["value"] == way.values
    return {
        "case": way.id,
        "by": way.by,
        "entries": way.entries,
        "made": way.made,
        "bpf": len(seen.calls),
        "mmap": seen.mmap,
        "msync": seen.msync,
        "as_made": int(as_made.sum()),
        "attributes_bytes": int(seen.calls["size"].max(initial=0)),
    }


def _commands(seen: dict[str, Seen]) -> pd.DataFrame:
    rows = [
        {"case": name, "command": COMMANDS.get(int(command), str(command)), "calls": int(count)}
        for name, one in seen.items()
        for command, count in zip(*np.unique(one.calls["command"], return_counts=True), strict=True)
    ]
    return pd.DataFrame(rows, columns=["case", "command", "calls"])


def _examples(seen: dict[str, Seen]) -> pd.DataFrame:
    rows = []
    for name, one in seen.items():
        for call in one.calls[:_SHOWN]:
            element = int(call["command"]) in (LOOKUP, UPDATE)
            fields = call["attributes"].reshape(1).view(ATTRIBUTES)[0]
            readable = element and int(call["size"]) >= 32 and int(call["pointer"]) > mmap.PAGESIZE
            rows.append(
                {
                    "case": name,
                    "command": COMMANDS.get(int(call["command"]), str(call["command"])),
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


def _refusal(way: _Way, seen: Seen) -> list[dict[str, object]]:
    answers, changed = seen.result
    return [
        {"case": way.id, "answer": answer, "times": times, "changed": changed}
        for answer, times in Counter(answers).items()
    ]
