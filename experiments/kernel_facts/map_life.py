"""How long a map lives: as long as anything refers to it, and no close() ends that."""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from labkit.errors import BadInput, LabError, TimedOut
from labkit.figures import Axes, stacked, style
from labkit.kernel import libbpf, objects, programs
from labkit.kernel.libbpf import MapFlag, MapKind
from labkit.kernel.maps import Map, MapError, map_error
from labkit.kernel.objects import Objects
from labkit.kernel.parallel import Child, shared_array
from labkit.kernel.pins import PinFolder
from labkit.lab.experiment import Case, Counted, Statement, experiment
from labkit.runs import Run

# An RCU grace period, a work queue, and whoever has the map open only to look at it.
_FREED_WITHIN_S = 10.0
_LOOK_AGAIN_S = 100e-6
_CHILD_LIMIT_S = 60.0
_FEWEST, _MOST = 32, 1024  # descriptors: a process has some open before it begins
_PIN = "policy"
_OWN = "own descriptor"

Sees = Callable[[Objects, int], bool]
"""Whether a reference to the map of that id shows, from outside."""

Hold = Callable[[Map], AbstractContextManager[Sees]]
Rows = list[dict[str, Any]]


@contextmanager
def _child(table: Map) -> Iterator[Sees]:
    with Child(lambda: time.sleep(_CHILD_LIMIT_S)) as child:
        yield lambda found, id: id in found.maps and child.pid in found.maps[id].pids


@contextmanager
def _pin(table: Map) -> Iterator[Sees]:
    with PinFolder() as pins:
        table.pin(pins.path(_PIN))
        yield lambda found, id: id in found.maps and bool(found.maps[id].pins)
        pins.unpin(_PIN)


@contextmanager
def _program(table: Map) -> Iterator[Sees]:
    with programs.load("held_map", TABLE_FD=table.fd) as loaded:
        program = loaded.program("look_up").id
        yield lambda found, id: program in found.programs and id in found.programs[program].map_ids


@contextmanager
def _outer_map(table: Map) -> Iterator[Sees]:
    with Map.create(
        MapKind.ARRAY_OF_MAPS, key="u4", value="u4", max_entries=1, inner=table, name="outer"
    ) as outer:
        outer.update(0, table.fd)
        yield lambda found, id: outer.id in found.maps and id in found.maps[outer.id].map_ids
        outer.delete(0)


@contextmanager
def _mapping(table: Map) -> Iterator[Sees]:
    # Not by Python's own mmap: that keeps a descriptor of the map as long as the mapping.
    libc, page = ctypes.CDLL(None, use_errno=True), ctypes.c_size_t(mmap.PAGESIZE)
    libc.mmap.restype, both = ctypes.c_void_p, mmap.PROT_READ | mmap.PROT_WRITE
    start = libc.mmap(None, page, both, mmap.MAP_SHARED, table.fd, ctypes.c_long(0))
    if start == ctypes.c_void_p(-1).value:
        raise map_error(ctypes.get_errno(), f"Mapping {table!r} into memory")

    # The kernel tells that a map is mapped here, and not which one.
    def sees(found: Objects, id: int) -> bool:
        with open("/proc/self/maps") as file:
            return any(line.startswith(f"{start:x}-") and "bpf-map" in line for line in file)

    try:
        yield sees
    finally:
        libc.munmap(ctypes.c_void_p(start), page)


def _held(id: str, reference: str, hold: Hold, *, added: str, dropped: str) -> Case:
    """A reference, with its two steps in the life of a map."""
    return Case("broken", id, f"closed, still held: {reference}",
                reference=reference, hold=hold, added=added, dropped=dropped)  # fmt: skip


_HELD = (
    _held("child", "descriptor in a child", _child, added="fork", dropped="child ends"),
    _held("pin", "pin", _pin, added="pin", dropped="unpin"),
    _held("program", "program", _program, added="load", dropped="unload"),
    _held("outer-map", "outer map", _outer_map, added="put into outer", dropped="take out"),
    _held("mapping", "mapping", _mapping, added="mmap", dropped="munmap"),
)


def _steps(life: pd.DataFrame) -> pd.DataFrame:
    """Each step of a life: whether the map exists, and whether anybody is seen to hold it."""
    steps = life.groupby(["round", "step"], sort=False)
    return steps.agg(exists=("exists", "first"), held=("seen", "any")).reset_index()


def _draw_life(run: Run, ax: Axes) -> None:
    """The life of one map step by step."""
    life = run.table("life")
    life = life[life["round"] == 0]
    steps = life.drop_duplicates("step").sort_values("step")
    references = list(life["reference"].unique())
    for row, name in enumerate(references):
        seen = life[(life["reference"] == name) & life["seen"]]["step"]
        ax.plot(seen, [row] * len(seen), color=style.BLUE, marker="o", linewidth=4)
    bottom = len(references)
    alive = steps[steps["exists"]]["step"]
    gone = steps[~steps["exists"]]["step"]
    ax.plot(alive, [bottom] * len(alive), color=style.GREEN, marker="s", linewidth=4)
    ax.plot(gone, [bottom] * len(gone), **style.look(1).points(), markersize=7)
    closed = float(steps.loc[steps["action"] == "close", "step"].iloc[0])
    ax.axvline(closed, color=style.BLACK, linewidth=1, linestyle=":")
    ax.annotate(
        "close()", (closed, -0.6), xytext=(3, 0), textcoords="offset points", fontsize=7,
        va="center",
    )  # fmt: skip
    ax.set_yticks(range(bottom + 1), [*references, "the map exists"])
    ax.set_ylim(bottom + 0.6, -0.9)
    ax.set_xticks(steps["step"], steps["action"], rotation=60, ha="right", rotation_mode="anchor")
    ax.set_title("Who holds the map")


def _draw_ends(run: Run, ax: Axes) -> None:
    """The time from a last drop to the end."""
    rounds = run.table("rounds").dropna(subset="gone_ns")
    cases = list(rounds["case"].unique())
    for row, case in enumerate(cases):
        some = rounds[rounds["case"] == case]
        look = style.VARIANT[some["variant"].iloc[0]]
        ax.plot(some["gone_ns"] / 1e6, [row] * len(some), **look.points(), alpha=0.6)
    style.rows(ax, map(run.label, cases))
    style.logarithmic(ax)
    ax.set_xlabel("ms after the last drop (one point a round)", loc="right")
    ax.set_title("How late it goes")


@experiment(
    "map-life",
    number=28,
    family="kernel-facts",
    question="Does close() free a map, and if not, who keeps it alive?",
    claims=("2.1a",),
    needs=("bpf", "compile", "map_in_map", "mmapable_array", "bpffs_detached"),
    quick={"rounds": 3, "hold_ms": 20, "descriptors": 128},
    full={"rounds": 15, "hold_ms": 50, "descriptors": 256},
    cases=(
        Case("control", "alone", "closed, no other reference"),
        *_HELD,
        Case("broken", "all", "closed, held by all of these, then by ever fewer"),
        Case("broken", "process", "never closed, process lives"),
        *(Case("fixed", f"{one.id}-gone", f"dropped as well: {one.reference}", beside=one.id)
          for one in _HELD),
        Case("fixed", "all-gone", "dropped as well: the last of all", beside="all"),
        Case("fixed", "process-gone", "never closed, process ended", beside="process"),
    ),
    counted=Counted("map alive", operations="ended", anomalies="alive", cost_ns="gone_ns"),
    derive=lambda tables: {"steps": _steps(tables["life"])},
    statements=(
        Statement("close() frees a map to which nothing else refers", "none(control)"),
        Statement("a map stays while this refers to it", "all(broken)"),
        Statement("the map goes once nothing refers to it any more", "none(fixed)"),
        Statement("a holder can be found from outside", "all(holders.seen)"),
        Statement("one map through all references: as long as it is there, somebody is seen to "
                  "hold it", "all(steps(exists=1).held)"),
        Statement("a process that never closes runs out of descriptors (EMFILE)",
                  f"all(leak.answer == {-errno.EMFILE})"),
    ),
    sentence="close() left {control} maps where nothing else referred to them, and {broken} where "
    "something did: a child, a pin, a program, an outer map, a mapping. {percent(share("
    "holders.seen))} of such holders were found from outside. Once they were dropped too, {fixed} "
    "maps stayed. A process that never closed got {max(leak.opened)} maps under a limit of "
    '{parameters.descriptors} descriptors; its end left {fixed["process-gone"]}.',
    figure=stacked(_draw_life, _draw_ends, height=4.8, ratios=(1.3, 1)),
)  # fmt: skip
def map_life(case: Case, *, hold_ms: int, descriptors: int) -> Rows:
    """Refer to a map in every way there is, close the descriptor, and look for its id.

    The kernel counts references and frees a map with the last one (kernel/bpf/syscall.c,
    ``bpf_map_put``). Descriptors, pins, programs, outer maps and mappings count alike. The
    end of a process closes its descriptors, so only living processes leak. Some references
    are dropped late: a program's after an RCU grace period, a pin's when its inode is freed.

    Parameters
    ----------
    case : Case
        Who refers to the map besides the descriptor.
    hold_ms : int
        How long to look whether the map vanishes after close, milliseconds.
    descriptors : int
        RLIMIT_NOFILE of the process that never closes a map, 32 to 1024.

    Returns
    -------
    list of dict
        ``ended`` (references: closed, dropped, or those of a process), ``alive`` (maps that are
        still there after it; int64) and ``gone_ns`` (float64, from the last drop until the id is
        gone; NaN while something refers to the map, or where it stays). Tables besides:
        ``holders``, one row for each reference: ``seen`` (bool, from outside). ``life``, one map
        through all references: ``step``, ``action``, ``reference``, ``seen``, ``exists`` (bool).
        ``leak``: ``opened`` (maps until the limit) and ``answer`` (minus the errno).
    """
    if not _FEWEST <= descriptors <= _MOST:
        raise BadInput(f"descriptors of map-life are {_FEWEST} to {_MOST}.")
    if case.id == "alone":
        return [_closed_alone()]
    if case.id == "all":
        return _life(hold_ms)
    if case.id == "process":
        return _leak(descriptors)
    return _closed_while_held(case, hold_ms)


def _create() -> Map:
    return Map.create(
        MapKind.ARRAY, key="u4", value="u8", max_entries=1, flags=MapFlag.MMAPABLE, name="policy"
    )


def _exists(id: int) -> bool:
    # By listing: opening the map by its id would be one more reference.
    return id in libbpf.ids("map")


def _gone_after_ns(*ids: int, limit_s: float = _FREED_WITHIN_S) -> float:
    """Nanoseconds until none of the ids exists; NaN where the limit passed."""
    begun = time.monotonic_ns()
    while not set(ids).isdisjoint(libbpf.ids("map")):
        if time.monotonic_ns() - begun > limit_s * 1e9:
            return math.nan
        time.sleep(_LOOK_AGAIN_S)
    return float(time.monotonic_ns() - begun)


def _while_held(ended: int, alive: int) -> dict[str, Any]:
    return {"ended": ended, "alive": alive, "gone_ns": math.nan}


def _once_gone(*ids: int, case: str) -> dict[str, Any]:
    """Wait until no map is left, and tell how many are."""
    gone_ns = _gone_after_ns(*ids)
    alive = len(set(ids) & set(libbpf.ids("map")))
    return {"case": case, "ended": len(ids), "alive": alive, "gone_ns": gone_ns}


def _closed_alone() -> dict[str, Any]:
    table = _create()
    id = table.id
    table.close()
    return _once_gone(id, case="alone")


def _closed_while_held(case: Case, hold_ms: int) -> Rows:
    with ExitStack() as held:
        with _create() as table:
            id = table.id
            sees = held.enter_context(case.hold(table))
        _gone_after_ns(id, limit_s=hold_ms / 1000)
        survived, seen = _exists(id), sees(objects.snapshot(), id)
        if _descriptor(id):
            raise LabError(f"The map is held by a descriptor of ours besides {case.reference}.")
    holders = pd.DataFrame([{"seen": seen}])
    return [
        {**_while_held(1, int(survived)), "holders": holders},
        _once_gone(id, case=f"{case.id}-gone"),
    ]


def _descriptor(id: int) -> bool:
    """Whether this process has a descriptor of the map."""
    for path in Path("/proc/self/fdinfo").iterdir():
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            continue  # the descriptor of the listing itself
        if f"map_id:\t{id}" in lines:
            return True
    return False


def _life(hold_ms: int) -> Rows:
    """Add every reference to one map, then drop one after the other."""
    rows: list[dict[str, object]] = []
    seeing: dict[str, Sees] = {_OWN: lambda found, id: _descriptor(id)}
    stacks = {one.reference: ExitStack() for one in _HELD}
    steps = 0

    def look(action: str) -> bool:
        nonlocal steps
        found, exists = objects.snapshot(), _exists(policy)
        for name in (_OWN, *stacks):
            seen = name in seeing and seeing[name](found, policy)
            rows.append({"step": steps, "action": action, "reference": name, "seen": seen,
                         "exists": exists})  # fmt: skip
        steps += 1
        return exists

    with ExitStack() as all_of_them:
        table = all_of_them.enter_context(_create())
        policy = table.id
        for stack in stacks.values():
            all_of_them.enter_context(stack)
        look("create")
        for one in _HELD:
            seeing[one.reference] = stacks[one.reference].enter_context(one.hold(table))
            look(one.added)
        table.close()
        _gone_after_ns(policy, limit_s=hold_ms / 1000)
        alive = [look("close")]
        *others, last = _HELD
        for one in others:
            stacks[one.reference].close()
            _gone_after_ns(policy, limit_s=hold_ms / 1000)
            alive.append(look(one.dropped))
        stacks[last.reference].close()
        gone = _once_gone(policy, case="all-gone")
        look(last.dropped)
    return [{**_while_held(len(alive), sum(alive)), "life": pd.DataFrame(rows)}, gone]


def _leak(limit: int) -> Rows:
    """Let a process open maps until it has no descriptor left, and then end."""
    ids, opened = shared_array(limit, "u4"), shared_array(2, "i8")  # how many; 1 once full
    may_end = shared_array(1, "u1")

    def open_and_wait() -> int:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        kept, answer = [], 0
        while not answer:
            try:
                kept.append(_create())
            except MapError as refused:
                answer = -int(refused.errno or 0)
            else:
                ids[opened[0]] = kept[-1].id
                opened[0] += 1
        opened[1] = 1
        deadline = time.monotonic() + _CHILD_LIMIT_S
        while not may_end[0] and time.monotonic() < deadline:
            time.sleep(0.001)
        return answer

    with Child(open_and_wait) as child:
        deadline = time.monotonic() + _CHILD_LIMIT_S
        while not opened[1]:
            if child.ended():
                break  # its error is told by result()
            if time.monotonic() > deadline:
                raise TimedOut("The process that opens maps did not run out of descriptors.")
            time.sleep(0.001)
        made = [int(id) for id in ids[: opened[0]]]
        alive = len(set(made) & set(libbpf.ids("map")))
        may_end[0] = 1
        answer = child.result()
    leak = pd.DataFrame([{"opened": len(made), "answer": answer}])
    return [{**_while_held(len(made), alive), "leak": leak},
            _once_gone(*made, case="process-gone")]  # fmt: skip
