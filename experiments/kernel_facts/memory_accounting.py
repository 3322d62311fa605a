"""Whose memory a map is, and which limit holds it: a control group's, and no knob of a bpffs."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pandas as pd

from labkit.errors import BadInput, TimedOut
from labkit.figures import Axes, style
from labkit.kernel import leftovers, programs
from labkit.kernel.leftovers import MemoryGroup
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map, OutOfMemory
from labkit.kernel.parallel import Child
from labkit.kernel.pins import PinFolder
from labkit.lab.driver import in_turns
from labkit.lab.experiment import Case, Statement, Tables, experiment, say
from labkit.runs import Run, Triad

_KNOBS = ("memcg.protection", "memory.max", "cgroup.procs")  # the article's, and a cgroup's own
_SHARES = (1 / 8, 1 / 2, 4 / 5)  # of the limit: the first two fit together, the third does not
_VALUE_BYTES = 1_024
_LIMIT_S = 30.0  # for the kernel to free maps
_SAID_LIMIT_MIB = 128  # what the article gives as the limit of a program type
_MAGIC = {0xCAFE4A11: "bpf", 0x63677270: "cgroup2", 0x27E0EB: "cgroup"}  # linux/magic.h


_CASES = (
    Case("broken", "knobs", "the article's knobs"),
    Case("control", "limit-written", "the limit of a control group, written"),
    Case("fixed", "beyond", "maps beyond the limit of a control group"),
    Case("control", "within", "maps within the limit"),
    Case("control", "unlimited", "the same maps without a limit"),
    Case("control", "large", f"program with a map beyond {_SAID_LIMIT_MIB} MiB"),
)


def _counted(tables: Tables) -> Tables:
    """Refusals of knobs and of maps; of maps beyond the limit, those that were made."""
    triad = Triad("refused")
    for case in _CASES:
        name = {"knobs": "knobs", "limit-written": "knobs", "large": "large"}.get(case.id, "maps")
        rows = tables[name][tables[name]["case"] == case.id]
        operations, wrong = len(rows), int((rows["answer"] != 0).sum())
        if name == "knobs":
            operations, wrong = int(rows["times"].sum()), int(rows["refused"].sum())
        if case.id == "beyond":
            wrong = operations - wrong
        triad.add(case.variant, case=case.id, operations=operations, anomalies=wrong,
                  anomaly="made" if case.id == "beyond" else None)  # fmt: skip
    return {"counts": triad.table()}


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw what each map added to the group's memory, made inside and outside of it."""
    ax = style.axes(ax)
    maps = run.table("maps")
    largest = float(maps["mib"].max())
    ax.plot([0, largest], [0, largest], color=style.GREY, lw=0.8, label="the map's own size")
    for variant, label, rows, more in (
        ("broken", "made by somebody else", maps[~maps["limited"]], {}),
        ("control", "made by a member", maps[maps["limited"] & (maps["answer"] == 0)], {}),
        (
            "fixed",
            "refused to a member (ENOMEM)",
            maps[maps["limited"] & (maps["answer"] != 0)],
            {"mfc": "none", "ms": 9},
        ),
    ):
        look = style.VARIANT[variant].points() | more
        ax.plot(rows["mib"], rows["charged_mib"], **look, label=label)
    limit = run.parameters["limit_mib"]
    ax.set_xlabel(f"size of the map (MiB), one beside the other;\nlimit of the group {limit} MiB")
    ax.set_ylabel("charged to the group (MiB)")
    ax.legend(loc="upper left", fontsize=6)
    return ax


@experiment(
    "memory-accounting",
    number=36,
    family="kernel-facts",
    question="Which limit holds the memory of maps, and to whom is it charged?",
    claims=("5.6",),
    needs=("bpf", "compile", "test_run", "bpffs_detached", "memcg"),
    quick={"limit_mib": 32, "rounds": 5},
    full={"limit_mib": 128, "rounds": 20},
    cases=_CASES,
    derive=_counted,
    statements=(
        Statement("the article's knobs do not exist", "all(broken)"),
        Statement("where maps are pinned is a bpffs and no control group",
                  "filesystems(place='pins').kind == 'bpf'"
                  " and (filesystems(place='limits').kind == 'cgroup'"
                  " or filesystems(place='limits').kind == 'cgroup2')"),
        Statement("a control group's limit refuses what is beyond it, with ENOMEM",
                  "none(fixed) and all(maps(case='beyond').answer == -12)"),
        Statement("what fits is made, and so is everything without a limit", "none(control)"),
        # The kernel counts in batches, and other memory comes and goes: all of the map or none.
        Statement("a map is charged to the group of the process that makes it",
                  "all(2 * maps(limited=True, answer=0).charged_mib"
                  " > maps(limited=True, answer=0).mib)"),
        Statement("a map is charged to no other group",
                  "all(-maps(limited=False).mib < 2 * maps(limited=False).charged_mib"
                  " < maps(limited=False).mib)"),
    ),
    sentence="Pins stand in a file system of type {filesystems(place='pins').kind}, memory is "
    "limited in one of type {filesystems(place='limits').kind} (control groups "
    "v{hierarchy.version}). {broken} writes to the article's knobs were refused. Under a group's "
    "limit {fixed} maps beyond it could be made, and each map that could was charged to the group "
    "of its maker, with {percent(min(maps(limited=True, answer=0).charged_mib"
    " / maps(limited=True, answer=0).mib))} of its size at the least.",
    figure=_figure,
)  # fmt: skip
def memory_accounting(*, limit_mib: int, rounds: int) -> Tables:
    """Turn the article's knobs, make maps within and beyond a real limit, and without one.

    /sys/fs/bpf is a bpffs: it holds pins, and no settings. Maps are allocated with
    ``GFP_KERNEL_ACCOUNT`` and charged to the memory control group of the process that makes
    them (kernel/bpf/syscall.c, ``bpf_map_save_memcg``; since Linux 5.11 instead of
    RLIMIT_MEMLOCK). There is no limit by program type.

    Parameters
    ----------
    limit_mib : int
        Limit of the control group, MiB; at least 16.
    rounds : int
        How often the maps are made in the group and outside of it, and each knob is turned.

    Returns
    -------
    dict of DataFrame
        ``knobs``: ``case``, ``place``, ``knob``, ``answer`` (0, or minus the errno of the last
        refusal), ``times``, ``refused``. ``maps``: ``case``, ``limited`` (bool), ``round``,
        ``mib``, ``answer``, ``charged_mib`` (the group's memory from before the map until after
        it). ``large``: ``case``, ``answer`` to the program with one large map. ``filesystems``:
        ``place`` (of pins, of limits), ``kind``. ``hierarchy``: ``version`` of the control groups.
    """
    if limit_mib < 16:
        raise BadInput(f"limit_mib of memory-accounting is at least 16, not {limit_mib}.")
    sizes = [round(share * limit_mib) for share in _SHARES]
    rows, knobs = [], []
    with PinFolder() as pins, leftovers.memory_cgroup(limit_mib << 20) as group:
        filesystems = [
            {"place": "pins", "kind": _filesystem(pins.path(""))},
            {"place": "limits", "kind": _filesystem(str(group.path))},
        ]
        for knob in _KNOBS:
            knobs.append(_turned("knobs", "bpffs", pins.path(knob), "1", rounds))
        other = str(group.path / _KNOBS[0])
        knobs.append(_turned("knobs", "control group", other, "1", rounds))
        limit = group.path / ("memory.limit_in_bytes" if group.version == 1 else "memory.max")
        value = str(limit_mib << 20)
        knobs.append(_turned("limit-written", "control group", str(limit), value, rounds))
        for number, limited in in_turns((True, False), rounds):
            _wait_until_freed(group, (limit_mib << 20) // 16)
            with Child(partial(_maps, group, limited, sizes)) as child:
                for row in child.result():
                    member = "beyond" if row["mib"] == sizes[-1] else "within"
                    about = {"case": member if limited else "unlimited", "limited": limited}
                    rows.append({**about, "round": number, **row})
        version = group.version
    say(f"a program with a map beyond {_SAID_LIMIT_MIB} MiB")
    return {
        "knobs": pd.DataFrame(knobs),
        "maps": pd.DataFrame(rows),
        "large": pd.DataFrame([{"case": "large", "answer": _large_map()}]),
        "filesystems": pd.DataFrame(filesystems),
        "hierarchy": pd.DataFrame([{"version": version}]),
    }


def _wait_until_freed(group: MemoryGroup, below_bytes: int) -> None:
    """Wait for the kernel, which frees a map that nobody has any more in its own time."""
    deadline = time.monotonic() + _LIMIT_S
    while group.used_bytes() >= below_bytes:
        if time.monotonic() > deadline:
            raise TimedOut("The maps of the round before are charged to their group still.")
        time.sleep(0.01)


def _filesystem(path: str) -> str:
    answer = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None).statfs(path.encode(), answer) != 0:
        return "unknown"
    magic = ctypes.c_ulong.from_buffer(answer).value
    return _MAGIC.get(magic, f"{magic:#x}")


def _turned(case: str, place: str, path: str, value: str, times: int) -> dict[str, object]:
    """Write a value to a knob, as ``echo 1 > knob`` does; what it answered."""
    answer = refusals = 0
    for _ in range(times):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except OSError as refused:
            answer, refusals = -int(refused.errno or errno.EIO), refusals + 1
    return {
        "case": case,
        "place": place,
        "knob": Path(path).name,
        "answer": answer,
        "times": times,
        "refused": refusals,
    }


def _maps(group: MemoryGroup, limited: bool, sizes: Sequence[int]) -> list[dict[str, object]]:
    """Make maps of these sizes, in MiB, one beside the other; runs in a child."""
    if limited:
        group.add()
    rows: list[dict[str, object]] = []
    with ExitStack() as made:
        for mib in sizes:
            before, answer = group.used_bytes(), 0
            try:
                made.enter_context(_array(mib))
            except OutOfMemory as refused:
                answer = -int(refused.errno or 0)
            charged = (group.used_bytes() - before) / 2**20
            rows.append({"mib": mib, "answer": answer, "charged_mib": charged})
    return rows


def _array(mib: int) -> Map:
    return Map.create(
        MapKind.ARRAY, key="u4", value=f"V{_VALUE_BYTES}", max_entries=(mib << 20) // _VALUE_BYTES,
        name="charged",
    )  # fmt: skip


def _large_map() -> int:
    """What a program is answered whose only map is larger than any limit of its type."""
    try:
        with (
            _array(_SAID_LIMIT_MIB + _SAID_LIMIT_MIB // 4) as table,
            programs.load("held_map", TABLE_FD=table.fd) as loaded,
        ):
            return 0 if loaded.program("look_up").test_run().value == 1 else -errno.ENOENT
    except OutOfMemory as refused:
        return -int(refused.errno or errno.ENOMEM)
