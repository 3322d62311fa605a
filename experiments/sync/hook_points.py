"""Which places of the kernel a program can be hooked to that wants to see maps change."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.sync.map_sorts import SORTS, MapSort, made
from labkit.errors import BadInput, LabError
from labkit.figures import Axes, cells, style
from labkit.judge.checkers import told_of
from labkit.kernel import programs
from labkit.kernel.btf import member_offset
from labkit.kernel.compiler import LoadFailed
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.mapping import Mapping, mapped
from labkit.kernel.maps import OF_MAPS, Map
from labkit.kernel.programs import BpfObject
from labkit.kernel.tools import tracefs_folder
from labkit.lab.experiment import Case, Statement, Tables, experiment, say
from labkit.runs import Run, Triad
from labkit.sync.trace_hook import FUNCTIONS

_SPARE = 1_024  # entries more than keys: an LRU map must not evict, which passes no hook
_MOST_WRITES = 1_000  # of one run of the program, which is unrolled for no verifier
_BY_NAME = {
    "raw tracepoint": ProgramKind.RAW_TRACEPOINT,
    "tracepoint": ProgramKind.TRACEPOINT,
    "kprobe": ProgramKind.KPROBE,
}
"""Mechanisms whose program is told where only when it is attached; the others when it is loaded."""

_ALL_CALLS = ("sys_enter", "sys_exit")
"""Raw tracepoints that every system call passes: the program there picks out bpf(2)."""

_SO_FAR, _AT_START, _AT_END = range(3)  # enum counted of the source
_PROGRAM, _PROCESS = "program", "process"
_UPDATE, _DELETE = "update", "delete"


@dataclass(frozen=True)
class _Hook:
    """``role`` says whose idea it is: the article's, an event that exists, a function's, other."""

    mechanism: str
    where: str
    role: str


_CASES = (
    Case("broken", "article-tp-btf", "tp_btf bpf_map_update_elem",
         mechanism="tp_btf", where="bpf_map_update_elem"),
    Case("broken", "article-raw-tracepoint", "raw tracepoint bpf_map_update_elem",
         mechanism="raw tracepoint", where="bpf_map_update_elem"),
    Case("broken", "article-tracepoint", "tracepoint bpf:bpf_map_update_elem",
         mechanism="tracepoint", where="bpf:bpf_map_update_elem"),
    Case("control", "event-tp-btf", "tp_btf sys_exit", mechanism="tp_btf", where="sys_exit"),
    Case("control", "event-raw-tracepoint", "raw tracepoint sys_exit",
         mechanism="raw tracepoint", where="sys_exit"),
    Case("control", "event-tracepoint", "tracepoint syscalls:sys_exit_bpf",
         mechanism="tracepoint", where="syscalls:sys_exit_bpf"),
    Case("fixed", "passed-tp-btf", "tp_btf sys_exit, passed", mechanism="tp_btf",
         where="sys_exit"),
    Case("fixed", "passed-raw-tracepoint", "raw tracepoint sys_exit, passed",
         mechanism="raw tracepoint", where="sys_exit"),
    Case("fixed", "passed-tracepoint", "tracepoint syscalls:sys_exit_bpf, passed",
         mechanism="tracepoint", where="syscalls:sys_exit_bpf"),
)  # fmt: skip
_ROLES = {"broken": "article", "control": "event"}

_OTHERS = (
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


def _derived(tables: Tables) -> Tables:
    """Counts, and in a word how often each hook, and each type's functions, were passed."""
    hooks, passes = tables["hooks"], tables["passes"]
    by_name = ["mechanism", "where"]
    triad = Triad("attachment refused")
    for case in _CASES:
        if case.variant == "fixed":
            rows = _of(passes[passes["writer"] == _PROCESS], case)
            # A pass without a write is an operation that went wrong as well.
            triad.add(
                case.variant, case=case.id,
                operations=int(rows[["writes", "passes"]].max(axis=1).sum()),
                anomalies=int((rows["writes"] - rows["passes"]).abs().sum()),
                anomaly="write not seen, or seen twice",
            )  # fmt: skip
        else:
            refused = _of(hooks, case)["answer"] != ""
            triad.add(
                case.variant, case=case.id, operations=len(refused), anomalies=int(refused.sum())
            )
    known = passes.merge(hooks, on=[*by_name, "map"], validate="many_to_one")
    known["refused"] = known["answer"] != ""
    passings = known.assign(passed=told_of(known["writes"], known["passes"], known["refused"]))
    of_types = known[known["role"] == "function"]
    functions = of_types.groupby(["map", "writer", "change"], sort=False, as_index=False).agg(
        writes=("writes", "max"), passes=("passes", "sum"), refused=("refused", "all"),
    )  # fmt: skip
    functions["passed"] = told_of(functions["writes"], functions["passes"], functions["refused"])
    return {
        "counts": triad.table(),
        "passings": passings.drop(columns=["answer", "refused"]),
        "functions": functions.drop(columns="refused"),
    }


def _of(rows: pd.DataFrame, case: Case) -> pd.DataFrame:
    found: pd.DataFrame = rows[
        (rows["mechanism"] == case.mechanism) & (rows["where"] == case.where)
    ]
    return found


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw a row for each hook, and in it the writes that passed it, or the refusal."""
    hooks = run.table("hooks").to_dict("records")
    at = ["mechanism", "where", "map", "writer", "change"]
    passes = {
        tuple(row[name] for name in at): row for row in run.table("passes").to_dict("records")
    }
    ax = style.axes(ax, height=0.8 + 0.15 * len(hooks))
    labels = [
        f"{hook['mechanism']} {hook['where']}"
        + (f" ({hook['map']})" if hook["role"] == "function" else "")
        for hook in hooks
    ]

    def cell(x: int, y: int) -> cells.Cell:
        hook = hooks[y]
        if hook["answer"]:
            return cells.refusal(hook["answer"])
        change = _DELETE if _DELETE in hook["where"] else _UPDATE
        writer = (_PROCESS, _PROGRAM)[x]
        row = passes.get((hook["mechanism"], hook["where"], hook["map"], writer, change))
        return cells.share(row["passes"], row["writes"]) if row else (cells.EMPTY, "–")

    cells.draw_cells(ax, ["by\nbpf(2)", "by a\nprogram"], labels, cell, size=5.5, label_size=5.5)
    ax.set_xlabel("updates (deletes) that passed the hook; grey: refused", loc="right")
    return ax


@experiment(
    "hook-points",
    number=40,
    family="sync",
    question="Which hook on the changes of maps exists in this kernel, and does anybody pass it?",
    claims=("4.2",),
    needs=(
        "bpf", "btf", "compile", "tracefs", "raw_tracepoint", "tracepoint", "tp_btf",
        "test_run", "hash", "lru", "percpu", "map_in_map", "mmapable_array",
    ),
    quick={"writes": 20},
    full={"writes": 200},
    cases=_CASES,
    derive=_derived,
    statements=(
        Statement("what the article names is refused, whatever kind of hook is tried",
                  "all(broken)"),
        Statement("the same kinds of hook hold at the return of a system call", "none(control)"),
        Statement("each write of a process passes them once", "none(fixed)"),
        Statement("no write of a program does",
                  'all(passings(role="event", writer="program").passed == "never")'),
        # A kernel may refuse programs on its functions, but not some of them.
        Statement("each write of a process passes one function of its map's type, once",
                  'all(functions(writer="process").passed == "once") or '
                  'all(functions(writer="process").passed == "refused")'),
        Statement("each write of a program does",
                  'all(functions(writer="program").passed == "once") or '
                  'all(functions(writer="program").passed == "refused")'),
        Statement("nobody passes the helper's own function, bpf_map_update_elem",
                  'all(passings(role="other", where="bpf_map_update_elem").passed == "never" or '
                  'passings(role="other", where="bpf_map_update_elem").passed == "refused")'),
    ),
    sentence="The hook that the article names was refused in {broken} forms. Of {rows(hooks)} "
    'hooks that were tried, this kernel takes {rows(hooks(answer=""))}; of those by fentry '
    '{rows(hooks(mechanism="fentry", answer=""))} of {rows(hooks(mechanism="fentry"))}, by kprobe '
    '{rows(hooks(mechanism="kprobe", answer=""))} of {rows(hooks(mechanism="kprobe"))}. It knows '
    "{rows(events)} events with bpf in their names.",
    figure=_figure,
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
        Updates past each hook, then as many deletes where the map's type has them; by bpf(2), and
        again by a program. 1,000 at most.

    Returns
    -------
    dict of DataFrame
        ``hooks``: one row per hook with columns ``mechanism``, ``where``, ``role`` (``article``,
        ``event`` at a system call, ``function`` of a map's type, ``other``), ``map`` (what was
        written) and ``answer`` (why it was refused; empty where it holds). ``passes``: one row per
        hook, ``writer`` (``process``; ``program``, but none may write a map of maps) and
        ``change`` (``update``, ``delete``) with ``writes`` (0 where the hook was refused) and
        ``passes`` (int64). ``events``: ``event``, every event of this kernel with "bpf" in its
        name.
    """
    if writes > _MOST_WRITES:
        raise BadInput(f"writes of hook-points are {_MOST_WRITES:,} at most.")
    hooks: list[dict[str, object]] = []
    passes: list[dict[str, object]] = []
    for sort in SORTS:
        tried = list(_hooks(sort))
        if not tried:
            continue
        say(f"{len(tried)} hooks, past which a map is written: {sort.name}")
        with (
            made(sort, writes + (_SPARE if sort.evicts else 0)) as (table, (value, _)),
            programs.load(
                "hook_points",
                PROCESS=os.getpid(),
                TABLE_FD=table.fd,
                WRITES=writes,
                **_system_call(),
                **sort.key_form,
            ) as loaded,
            mapped(loaded.map("passes")) as counter,
        ):
            writers = _writers(loaded, counter, sort, table, value, writes)
            for hook in tried:
                named: dict[str, object] = {
                    "mechanism": hook.mechanism,
                    "where": hook.where,
                    "map": sort.name,
                }
                answer, held = _attached(loaded, hook)
                hooks.append(named | {"role": hook.role, "answer": answer})
                for (writer, change), write in writers.items():
                    passes.append(
                        {
                            **named,
                            "writer": writer,
                            "change": change,
                            "writes": 0 if answer else writes,
                            "passes": 0 if answer else write(),
                        }
                    )
                if held is not None:
                    loaded.detach(held)
    return {
        "hooks": pd.DataFrame(hooks),
        "passes": pd.DataFrame(passes),
        "events": _bpf_events(),
    }


def _system_call() -> dict[str, int]:
    """Constants of the program that picks out bpf(2): its number, and where it stands."""
    arm = platform.machine() == "aarch64"
    return {
        "NR_BPF": 280 if arm else 321,
        "NUMBER_AT": member_offset("pt_regs", "syscallno" if arm else "orig_ax"),
    }


def _hooks(sort: MapSort) -> Iterator[_Hook]:
    if sort == SORTS[0]:
        for case in _CASES:
            if case.variant in _ROLES:
                yield _Hook(case.mechanism, case.where, _ROLES[case.variant])
        for hook in _OTHERS:
            yield hook
            if hook.mechanism == "kprobe":  # the compiler's own copies of a function
                for name in _variants(hook.where):
                    yield _Hook(hook.mechanism, name, hook.role)
    if sort.flags and sort.kind is SORTS[0].kind:
        return  # its functions are those of the other hash
    for function, program in FUNCTIONS[sort.kind].items():
        if program.startswith(("on_update", "on_delete")):
            yield _Hook("fentry", function, "function")


def _variants(function: str) -> list[str]:
    lines = Path("/proc/kallsyms").read_text().splitlines()
    names = (line.split()[2] for line in lines)
    return sorted(
        {name for name in names if name.startswith((f"{function}.isra", f"{function}.constprop"))}
    )


def _attached(loaded: BpfObject, hook: _Hook) -> tuple[str, int | None]:
    """The kernel's refusal, or nothing and what holds the attachment."""
    program = "on_system_call" if hook.where in _ALL_CALLS else "on_pass"
    try:
        if hook.mechanism in _BY_NAME:
            one = loaded.program(program, _BY_NAME[hook.mechanism])
            return "", loaded.attach(one, hook.where)
        one = loaded.program(program, hook=f"{hook.mechanism}:{hook.where}")
        return "", loaded.attach(one)
    except LoadFailed as refused:
        return str(refused).partition(": ")[2].removesuffix("."), None


def _writers(
    loaded: BpfObject, counter: Mapping, sort: MapSort, table: Map, value: int, writes: int
) -> dict[tuple[str, str], Callable[[], int]]:
    """Who writes all keys in which way, and answers how often the hook was passed meanwhile.

    In this order, so that a delete finds its key.
    """
    keys = sort.keys(writes)

    def update() -> int:
        before = int(counter.values[_SO_FAR])
        for key in keys:
            table.update(key, value)
        return int(counter.values[_SO_FAR]) - before

    def delete() -> int:
        before = int(counter.values[_SO_FAR])
        for key in keys:
            table.delete(key)
        return int(counter.values[_SO_FAR]) - before

    def by_program(name: str) -> Callable[[], int]:
        program = loaded.program(name)

        def write() -> int:
            if program.test_run().value != writes:
                raise LabError(f"A program's write of a map was refused: {sort.name}, {name}.")
            return int(counter.values[_AT_END]) - int(counter.values[_AT_START])

        return write

    writers: dict[tuple[str, str], Callable[[], int]] = {(_PROCESS, _UPDATE): update}
    if sort.deletes:
        writers[_PROCESS, _DELETE] = delete
    if sort.kind not in OF_MAPS:
        writers[_PROGRAM, _UPDATE] = by_program("update_all")
        if sort.deletes:
            writers[_PROGRAM, _DELETE] = by_program("delete_all")
    return writers


def _bpf_events() -> pd.DataFrame:
    found = sorted((tracefs_folder() / "events").glob("*/*bpf*/format"))
    names = [f"{path.parent.parent.name}:{path.parent.name}" for path in found]
    return pd.DataFrame({"event": names})
