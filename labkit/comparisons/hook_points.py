"""Which places of the kernel a program can be hooked to that wants to see maps change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from labkit.analysis.runs import Triad
from labkit.comparisons.map_sorts import SORTS, MapSort, made
from labkit.errors import BadInput
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import programs
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.maps import OF_MAPS, Map
from labkit.kernel.programs import LoadFailed, Unit
from labkit.kernel.tools import tracefs_folder
from labkit.sync.trace_hook import FUNCTIONS

_MOST_WRITES = 1_000  # of one run of the program, which is unrolled for no verifier
_BY_NAME = {
    "raw tracepoint": ProgramKind.RAW_TRACEPOINT,
    "tracepoint": ProgramKind.TRACEPOINT,
    "kprobe": ProgramKind.KPROBE,
}
"""Mechanisms whose program is told where only when it is attached; the others when it is loaded."""


@dataclass(frozen=True)
class _Hook:
    """``role`` says whose idea it is: the article's, an event that exists, a function's, other."""

    mechanism: str
    where: str
    role: str
    deletes: bool = False

    @property
    def name(self) -> str:
        return f"{self.mechanism} {self.where}"


_EVENTS = (
    _Hook("tp_btf", "bpf_map_update_elem", "article"),
    _Hook("raw tracepoint", "bpf_map_update_elem", "article"),
    _Hook("tracepoint", "bpf:bpf_map_update_elem", "article"),
    _Hook("tp_btf", "sys_exit", "event"),
    _Hook("raw tracepoint", "sys_exit", "event"),
    _Hook("tracepoint", "syscalls:sys_exit_bpf", "event"),
    _Hook("tp_btf", "sys_enter", "other"),
    _Hook("raw tracepoint", "sys_exit_bpf", "other"),
    _Hook("tracepoint", "syscalls:sys_enter_bpf", "other"),
    _Hook("lsm", "bpf", "other"),
    _Hook("lsm", "bpf_map", "other"),
    _Hook("fentry", "__sys_bpf", "other"),
    _Hook("kprobe", "__sys_bpf", "other"),
    _Hook("fentry", "bpf_map_update_elem", "other"),
    _Hook("kprobe", "bpf_map_update_elem", "other"),
    _Hook("fentry", "bpf_map_update_value", "other"),
    _Hook("kprobe", "bpf_map_update_value", "other"),
    _Hook("kprobe", "htab_map_update_elem", "other"),
)


@experiment(
    "hook-points",
    number=40,
    family="sync",
    question="Which hook on the changes of maps exists in this kernel, and does anybody pass it?",
    claims=("4.2",),
    needs=(
        "bpf", "btf", "compile", "tracefs", "raw_tracepoint", "tracepoint", "tp_btf",
        "test_run", "hash", "lru", "percpu", "map_in_map",
    ),
    quick={"writes": 20},
    full={"writes": 200},
)  # fmt: skip
def hook_points(*, writes: int) -> Tables:
    """Try to hook every place by loading and attaching, and write maps past those that hold.

    The article hooks ``tp_btf/bpf_map_update_elem``. The tracepoint ``bpf:bpf_map_update_elem``
    was removed in Linux 4.18 (4d220ed0f814), and programs of that type came with 5.5. A function
    of that name there is: the helper's, which the verifier replaces in every program by the
    function of the map's type, so that next to nobody passes it.

    Parameters
    ----------
    writes : int
        Updates past each hook, with as many deletes where the map's type has them; by bpf(2), and
        again by a program. 1,000 at most.

    Returns
    -------
    dict of DataFrame
        ``counts``: in broken (what the article names, in every form that such a hook could have)
        and control (the same forms of the event at the return of a system call) an operation is
        an attachment, an anomaly a refused one; in fixed (the events of control) an operation is
        an update by bpf(2), an anomaly one after which the hook had not been passed. ``hooks``:
        one row per hook with columns ``mechanism``, ``where``, ``role`` (``article``, ``event``,
        ``function`` of a map's type, ``other``), ``map`` (what was written), ``answer`` (why it
        was refused; empty where it holds), ``writes`` and ``passes`` (by bpf(2), int64; passes at
        most as many as writes), ``program_writes`` and ``program_passes`` (by a program; no
        program may write a map of maps). ``events``: ``event``, every event of this kernel with
        "bpf" in its name.
    """
    if writes > _MOST_WRITES:
        raise BadInput(f"writes of hook-points are {_MOST_WRITES:,} at most.")
    rows: list[dict[str, object]] = []
    for sort in SORTS:
        hooks = list(_hooks(sort))
        if not hooks:
            continue
        say(f"{len(hooks)} hooks, past which a map is written: {sort.name}")
        with (
            made(sort, writes) as (table, (value, _)),
            programs.load(
                "hook_points",
                PROCESS=os.getpid(),
                TABLE_FD=table.fd,
                WRITES=writes,
                **sort.key_form,
            ) as unit,
        ):
            rows += [_tried(unit, hook, sort, table, value, writes) for hook in hooks]
    triad = Triad("attachment refused")
    for row in rows:
        case = f"{row['mechanism']} {row['where']}"
        if row["role"] in ("article", "event"):
            triad.add(
                "broken" if row["role"] == "article" else "control", case=case, operations=1,
                anomalies=int(row["answer"] != ""),
            )  # fmt: skip
        if row["role"] == "event":
            triad.add(
                "fixed", case=case, operations=writes,
                anomalies=writes - int(str(row["passes"])), anomaly="update not seen",
            )  # fmt: skip
    return {"counts": triad.table(), "hooks": pd.DataFrame(rows), "events": _bpf_events()}


def _hooks(sort: MapSort) -> Iterator[_Hook]:
    if sort == SORTS[0]:
        for hook in _EVENTS:
            yield hook
            if hook.mechanism == "kprobe":  # the compiler's own copies of a function
                for name in _variants(hook.where):
                    yield _Hook(hook.mechanism, name, hook.role)
    if sort.flags and sort.kind is SORTS[0].kind:
        return  # its functions are those of the other hash
    for function, program in FUNCTIONS[sort.kind].items():
        if program.startswith(("on_update", "on_delete")):
            yield _Hook("fentry", function, "function", deletes=program == "on_delete")


def _variants(function: str) -> list[str]:
    lines = Path("/proc/kallsyms").read_text().splitlines()
    names = (line.split()[2] for line in lines)
    return sorted(
        {name for name in names if name.startswith((f"{function}.isra", f"{function}.constprop"))}
    )


def _tried(
    unit: Unit, hook: _Hook, sort: MapSort, table: Map, value: int, writes: int
) -> dict[str, object]:
    answer, passes, program_writes, program_passes = "", 0, 0, 0
    counter = unit.map("passes")
    try:
        if hook.mechanism in _BY_NAME:
            held = unit.attach(unit.function("on_pass", _BY_NAME[hook.mechanism]), hook.where)
        else:
            held = unit.attach(unit.function("on_pass", hook=f"{hook.mechanism}:{hook.where}"))
    except LoadFailed as refused:
        answer = str(refused).partition(": ")[2].removesuffix(".")
    else:
        before = int(counter.lookup(0))
        _write(sort, table, value, writes)
        passes = int(counter.lookup(0)) - before
        if sort.kind not in OF_MAPS:
            writer = unit.function("write_map")
            program_writes, program_passes = writes, writer.test_run().value
        unit.detach(held)
    return {
        "mechanism": hook.mechanism,
        "where": hook.where,
        "role": hook.role,
        "map": sort.name,
        "answer": answer,
        "writes": 0 if answer else writes,
        "passes": min(passes, writes),
        "program_writes": program_writes,
        "program_passes": min(program_passes, program_writes),
    }


def _write(sort: MapSort, table: Map, value: int, writes: int) -> None:
    for key in sort.keys(writes):
        table.update(key, value)
        if sort.deletes:
            table.delete(key)


def _bpf_events() -> pd.DataFrame:
    found = sorted((tracefs_folder() / "events").glob("*/*bpf*/format"))
    names = [f"{path.parent.parent.name}:{path.parent.name}" for path in found]
    return pd.DataFrame({"event": names})
