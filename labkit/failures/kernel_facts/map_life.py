"""How long a map lives: as long as anything refers to it, and no close() ends that."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput, TimedOut
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import libbpf, objects, programs
from labkit.kernel.libbpf import MapFlag, MapKind
from labkit.kernel.mapping import mapped
from labkit.kernel.maps import Map, MapError
from labkit.kernel.objects import Objects
from labkit.kernel.parallel import Child, shared_array
from labkit.kernel.pins import PinFolder

# An RCU grace period, a work queue, and whoever has the map open only to look at it.
_FREED_WITHIN_S = 10.0
_LOOK_AGAIN_S = 100e-6
_CHILD_LIMIT_S = 60.0
_FEWEST, _MOST = 32, 1024  # descriptors: a process has some open before it begins
_PIN = "policy"

Sees = Callable[[Objects, int], bool]
"""Whether a reference to the map of that id shows, from outside."""


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
    with programs.load("held_map", TABLE_FD=table.fd) as unit:
        program = unit.function("look_up").id
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
    with mapped(table) as mapping:
        begins = f"{mapping.values.ctypes.data:x}-"

        # The kernel tells that a map is mapped here, and not which one.
        def sees(found: Objects, id: int) -> bool:
            with open("/proc/self/maps") as file:
                return any(line.startswith(begins) and "bpf-map" in line for line in file)

        yield sees


@dataclass(frozen=True)
class _Reference:
    name: str
    added: str  # the step of the timeline
    dropped: str
    hold: Callable[[Map], AbstractContextManager[Sees]]


_REFERENCES = (
    _Reference("descriptor in a child", "fork", "child ends", _child),
    _Reference("pin", "pin", "unpin", _pin),
    _Reference("program", "load", "unload", _program),
    _Reference("outer map", "put into outer", "take out", _outer_map),
    _Reference("mapping", "mmap", "munmap", _mapping),
)
_OWN = "own descriptor"


@experiment(
    "map-life",
    number=28,
    family="kernel-facts",
    question="Does close() free a map, and if not, who keeps it alive?",
    claims=("2.1a",),
    needs=("bpf", "compile", "map_in_map", "mmapable_array", "bpffs_detached"),
    quick={"rounds": 3, "hold_ms": 20, "descriptors": 128},
    full={"rounds": 25, "hold_ms": 50, "descriptors": 256},
)
def map_life(*, rounds: int, hold_ms: int, descriptors: int) -> Tables:
    """Refer to a map in every way there is, close the descriptor, and look for its id.

    The kernel counts references and frees a map with the last one (kernel/bpf/syscall.c,
    ``bpf_map_put``). Descriptors, pins, programs, outer maps and mappings count alike. The
    end of a process closes its descriptors, so only living processes leak. Some references
    are dropped late: a program's after an RCU grace period, a pin's when its inode is freed.

    Parameters
    ----------
    rounds : int
        Rounds of every kind of reference, in turns.
    hold_ms : int
        How long to look whether the map vanishes after close, milliseconds.
    descriptors : int
        RLIMIT_NOFILE of the process that never closes a map, 32 to 1024.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a close, or the drop of the last reference, an anomaly a
        map that is still there; ``cost_ns`` of a drop is the median time from its return
        until the id is gone. ``rounds``: per reference and round ``reference`` (empty: none but the
        descriptor), ``round``, ``survived`` (the close), ``named`` (the holder was found
        from outside), ``gone`` (all bool) and ``gone_ms`` (after the last drop returned). ``life``:
        one map through all references: ``step``, ``action``, ``reference``, ``seen``,
        ``exists`` (bool). ``leak``: one row: ``limit``, ``opened`` (maps until EMFILE),
        ``answer`` (minus the errno), ``alive`` (maps while the process lives), ``left``
        (after its end) and ``gone_ms``.
    """
    if not _FEWEST <= descriptors <= _MOST:
        raise BadInput(f"descriptors of map-life are {_FEWEST} to {_MOST}.")
    rows = []
    for turn in range(rounds):
        say(f"round {turn + 1} of {rounds}: one reference of each kind")
        rows.append({"reference": "", "round": turn, **_closed_alone()})
        for reference in _REFERENCES:
            row = _closed_while_held(reference, hold_ms)
            rows.append({"reference": reference.name, "round": turn, **row})
    say("the whole life of one map, and a process that never closes")
    table, life, leak = pd.DataFrame(rows), _life(hold_ms), _leak(descriptors)
    return {
        "counts": _counts(table, leak),
        "rounds": table,
        "life": life,
        "leak": pd.DataFrame([leak]),
    }


def _create() -> Map:
    return Map.create(
        MapKind.ARRAY, key="u4", value="u8", max_entries=1, flags=MapFlag.MMAPABLE, name="policy"
    )


def _exists(id: int) -> bool:
    # By listing: opening the map by its id would be one more reference.
    return id in libbpf.ids("map")


def _gone_after_ms(*ids: int, limit_s: float = _FREED_WITHIN_S) -> float:
    """Milliseconds until none of the ids exists; NaN where the limit passed."""
    begun = time.monotonic_ns()
    while not set(ids).isdisjoint(libbpf.ids("map")):
        if time.monotonic_ns() - begun > limit_s * 1e9:
            return float("nan")
        time.sleep(_LOOK_AGAIN_S)
    return (time.monotonic_ns() - begun) / 1e6


def _closed_alone() -> dict[str, object]:
    table = _create()
    id = table.id
    table.close()
    gone_ms = _gone_after_ms(id)
    gone = gone_ms == gone_ms
    return {"survived": not gone, "named": False, "gone": gone, "gone_ms": gone_ms}


def _closed_while_held(reference: _Reference, hold_ms: int) -> dict[str, object]:
    with ExitStack() as held:
        with _create() as table:
            id = table.id
            sees = held.enter_context(reference.hold(table))
        _gone_after_ms(id, limit_s=hold_ms / 1000)
        survived, named = _exists(id), sees(objects.snapshot(), id)
    gone_ms = _gone_after_ms(id)
    return {"survived": survived, "named": named, "gone": gone_ms == gone_ms, "gone_ms": gone_ms}


def _descriptor(found: Objects, id: int) -> bool:
    """Whether this process has a descriptor of the map."""
    for path in Path("/proc/self/fdinfo").iterdir():
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue  # the descriptor of the listing itself
        if f"map_id:\t{id}" in lines:
            return True
    return False


def _life(hold_ms: int) -> pd.DataFrame:
    """Add every reference to one map, then drop one after the other."""
    rows: list[dict[str, object]] = []
    seeing: dict[str, Sees] = {_OWN: _descriptor}
    stacks = {reference.name: ExitStack() for reference in _REFERENCES}
    steps = 0

    def look(action: str) -> None:
        nonlocal steps
        found, exists = objects.snapshot(), _exists(policy)
        for name in (_OWN, *stacks):
            seen = name in seeing and seeing[name](found, policy)
            rows.append(
                {
                    "step": steps,
                    "action": action,
                    "reference": name,
                    "seen": seen,
                    "exists": exists,
                }
            )
        steps += 1

    with ExitStack() as all_of_them:
        table = all_of_them.enter_context(_create())
        policy = table.id
        for stack in stacks.values():
            all_of_them.enter_context(stack)
        look("create")
        for reference in _REFERENCES:
            sees = stacks[reference.name].enter_context(reference.hold(table))
            seeing[reference.name] = sees
            look(reference.added)
        table.close()
        _gone_after_ms(policy, limit_s=hold_ms / 1000)
        look("close")
        for reference in _REFERENCES:
            stacks[reference.name].close()
            last = reference is _REFERENCES[-1]
            _gone_after_ms(policy, limit_s=_FREED_WITHIN_S if last else hold_ms / 1000)
            look(reference.dropped)
    return pd.DataFrame(rows)


def _leak(limit: int) -> dict[str, int | float]:
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
    gone_ms = _gone_after_ms(*made)
    left = len(set(made) & set(libbpf.ids("map")))
    return {
        "limit": limit,
        "opened": len(made),
        "answer": answer,
        "alive": alive,
        "left": left,
        "gone_ms": gone_ms,
    }


def _counts(table: pd.DataFrame, leak: dict[str, int | float]) -> pd.DataFrame:
    triad = Triad("map alive")
    for name, group in table.groupby("reference", sort=False):
        held = str(name)
        gone_ns = 1e6 * float(group["gone_ms"].median())
        if held:
            triad.add(
                "broken", case=f"closed, still held: {held}", operations=len(group),
                anomalies=int(group["survived"].sum()),
            )  # fmt: skip
        triad.add(
            "fixed" if held else "control",
            case=f"dropped as well: {held}" if held else "closed, no other reference",
            operations=len(group),
            anomalies=int((~group["gone"]).sum()),
            cost_ns=gone_ns,
        )
    opened = int(leak["opened"])
    triad.add(
        "broken", case="never closed, process lives", operations=opened,
        anomalies=int(leak["alive"]),
    )  # fmt: skip
    triad.add(
        "fixed", case="never closed, process ended", operations=opened,
        anomalies=int(leak["left"]), cost_ns=1e6 * leak["gone_ms"],
    )  # fmt: skip
    return triad.table()
