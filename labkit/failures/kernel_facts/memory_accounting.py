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

from labkit.analysis.runs import Triad
from labkit.errors import BadInput, TimedOut
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import leftovers, programs
from labkit.kernel.leftovers import MemoryGroup
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map, OutOfMemory
from labkit.kernel.parallel import Child
from labkit.kernel.pins import PinFolder

_KNOBS = ("memcg.protection", "memory.max", "cgroup.procs")  # the article's, and a cgroup's own
_SHARES = (1 / 8, 1 / 2, 4 / 5)  # of the limit: the first two fit together, the third does not
_VALUE_BYTES = 1_024
_LIMIT_S = 30.0  # for the kernel to free maps
_SAID_LIMIT_MIB = 128  # what the article gives as the limit of a program type
_MAGIC = {0xCAFE4A11: "bpf", 0x63677270: "cgroup2", 0x27E0EB: "cgroup"}  # linux/magic.h


@experiment(
    "memory-accounting",
    number=36,
    family="kernel-facts",
    question="Which limit holds the memory of maps, and to whom is it charged?",
    claims=("5.6",),
    needs=("bpf", "compile", "test_run", "bpffs_detached", "memcg"),
    quick={"limit_mib": 32, "rounds": 5},
    full={"limit_mib": 128, "rounds": 20},
)
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
        ``counts``: an operation is a write to a knob, or a map to be made; an anomaly one that
        was refused, or for the limit a map beyond it that was made. ``knobs``: ``place``,
        ``knob``, ``answer`` (minus the errno), ``times``. ``maps``: ``limited`` (bool),
        ``round``, ``mib``, ``answer``, ``charged_mib`` (the group's memory from before the
        map until after it). ``filesystems``: ``place``, ``kind``. ``hierarchy``: ``version``
        of the control groups.
    """
    if limit_mib < 16:
        raise BadInput(f"limit_mib of memory-accounting is at least 16, not {limit_mib}.")
    triad = Triad("refused")
    sizes = [round(share * limit_mib) for share in _SHARES]
    rows, knobs = [], []
    with PinFolder() as pins, leftovers.memory_cgroup(limit_mib << 20) as group:
        filesystems = [
            {"place": "where maps are pinned", "kind": _filesystem(pins.path(""))},
            {"place": "where memory is limited", "kind": _filesystem(str(group.path))},
        ]
        for knob in _KNOBS:
            knobs.append(_turned("bpffs", pins.path(knob), "1", rounds))
        knobs.append(_turned("control group", str(group.path / _KNOBS[0]), "1", rounds))
        limit = group.path / ("memory.limit_in_bytes" if group.version == 1 else "memory.max")
        knobs.append(_turned("control group", str(limit), str(limit_mib << 20), rounds))
        for number in range(rounds):
            for limited in (True, False):
                say(f"round {number + 1} of {rounds}, {'with' if limited else 'without'} a limit")
                _wait_until_freed(group, (limit_mib << 20) // 16)
                with Child(partial(_maps, group, limited, sizes)) as child:
                    for row in child.result():
                        rows.append({"limited": limited, "round": number, **row})
        version = group.version
    turned, maps = pd.DataFrame(knobs), pd.DataFrame(rows)
    _count(triad, turned, maps, sizes, rounds)
    say(f"a program with a map beyond {_SAID_LIMIT_MIB} MiB")
    triad.add("control", case=f"program with a map beyond {_SAID_LIMIT_MIB} MiB", operations=1,
              anomalies=_large_map_refused())  # fmt: skip
    return {
        "counts": triad.table(),
        "knobs": turned,
        "maps": maps,
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


def _turned(place: str, path: str, value: str, times: int) -> dict[str, object]:
    """Write a value to a knob, as ``echo 1 > knob`` does; what it answered."""
    answer = 0
    for _ in range(times):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except OSError as refused:
            answer = -int(refused.errno or errno.EIO)
    return {"place": place, "knob": Path(path).name, "answer": answer, "times": times}


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


def _count(
    triad: Triad, knobs: pd.DataFrame, maps: pd.DataFrame, sizes: Sequence[int], rounds: int
) -> None:
    real = knobs["knob"].str.startswith("memory.") & (knobs["place"] == "control group")
    for variant, case, chosen in (
        ("broken", "the article's knobs", ~real),
        ("control", "the limit of a control group, written", real),
    ):
        refused = knobs.loc[chosen, "times"].where(knobs.loc[chosen, "answer"] != 0, 0)
        triad.add(variant, case=case, operations=int(knobs.loc[chosen, "times"].sum()),
                  anomalies=int(refused.sum()))  # fmt: skip
    refused_map = maps["answer"] != 0
    beyond = maps["mib"] == sizes[-1]
    for variant, case, chosen, anomaly in (
        ("fixed", "maps beyond the limit of a control group", maps["limited"] & beyond, "made"),
        ("control", "maps within the limit", maps["limited"] & ~beyond, "refused"),
        ("control", "the same maps without a limit", ~maps["limited"], "refused"),
    ):
        of_case = refused_map[chosen]
        wrong = of_case if anomaly == "refused" else ~of_case
        triad.add(variant, case=case, operations=len(of_case), anomalies=int(wrong.sum()),
                  anomaly=anomaly)  # fmt: skip


def _large_map_refused() -> int:
    """Whether a program is refused whose only map is larger than any limit of its type."""
    try:
        with (
            _array(_SAID_LIMIT_MIB + _SAID_LIMIT_MIB // 4) as table,
            programs.load("held_map", TABLE_FD=table.fd) as unit,
        ):
            return int(unit.function("look_up").test_run().value != 1)
    except OutOfMemory:
        return 1
