"""Causes of stale reads, planted in maps: what a diagnosis names of them, and what it makes up."""

from __future__ import annotations

import fcntl
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Final

import numpy as np

from labkit.inspect.diagnose import diagnose
from labkit.kernel import compiler, programs
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.programs import BpfObject
from labkit.lab.experiment import Case, Counted, Statement, experiment

_ROOM = 64
_LRU_ROOM = 4096  # of which the lists of a CPU keep 128 free, on whichever CPU we come to run
_TCP = 6
_EVICTS = "it evicts keys that nobody deleted, to make room"
_SELDOM = "sched_process_exec"
_NUMBERS = itertools.count()

Stages = Iterator[int]
"""Ids of the map to be diagnosed: as it should be, with the cause planted, and repaired."""


def _map(stack: ExitStack, name: str, kind: MapKind = MapKind.HASH, room: int = _ROOM) -> Map:
    made = Map.create(kind, key="u4", value="u8", max_entries=room, name=name)
    return stack.enter_context(made)


def _reader(stack: ExitStack, table: Map) -> BpfObject:
    """A program that refers to a map, and runs."""
    loaded = stack.enter_context(programs.load("held_map", TABLE_FD=table.fd))
    _run(loaded, "look_up")
    return loaded


def _run(loaded: BpfObject, function: str) -> None:
    """Attach a program: one that runs nowhere would be a cause by itself."""
    loaded.attach(loaded.program(function, ProgramKind.RAW_TRACEPOINT), _SELDOM)


def _second_map(stack: ExitStack, name: str) -> Stages:
    old = _map(stack, name)
    reader = _reader(stack, old)
    yield old.id
    new = _map(stack, name)
    yield new.id  # written by the reloaded loader, read by nobody
    reader.close()
    old.close()
    _reader(stack, new)
    yield new.id


def _kept_handle(stack: ExitStack, name: str) -> Stages:
    new = _map(stack, name)
    _reader(stack, new)
    new_id = new.id
    new.close()  # the program keeps it
    yield new_id
    old = _map(stack, name)  # which the writer goes on to hold
    yield new_id
    old.close()
    yield new_id


def _padded_keys(stack: ExitStack, name: str) -> Stages:
    # This map's name stands in the source: one process at a time has it.
    source = stack.enter_context((compiler.SOURCES / "padded_key.bpf.c").open())
    fcntl.flock(source, fcntl.LOCK_EX)
    loaded = stack.enter_context(programs.load("padded_key", KEYS=_ROOM, PADDED=1))
    _run(loaded, "look_up_all")
    table = loaded.map("policy")
    table.update((_TCP, 0), 1)
    yield table.id
    key = np.full(table.key_size, 0xAA, np.uint8)
    fields = key.view(table.key_dtype)
    fields["protocol"], fields["address"] = _TCP, 1
    table.update(key.tobytes(), 1)
    yield table.id
    table.delete(key.tobytes())
    table.update((_TCP, 1), 1)
    yield table.id


def _filled(kind: MapKind, room: int) -> Callable[[ExitStack, str], Stages]:
    def stages(stack: ExitStack, name: str) -> Stages:
        table = _map(stack, name, kind, room)
        _reader(stack, table)
        keys = np.arange(room, dtype=np.uint32)
        table.update_many(keys[: room // 2], keys[: room // 2])
        yield table.id
        table.update_many(keys, keys)
        yield table.id
        table.delete_many(table.snapshot().keys[: room // 2])
        yield table.id

    return stages


def _frozen(stack: ExitStack, name: str) -> Stages:
    table = _map(stack, name, MapKind.ARRAY)
    _reader(stack, table)
    yield table.id
    table.freeze()
    yield table.id
    again = _map(stack, f"{name}_new", MapKind.ARRAY)  # nothing thaws a frozen map
    _reader(stack, again)
    yield again.id


# By the experiment that stands for the cause.
_PLANTED: Final[dict[str, Callable[[ExitStack, str], Stages]]] = {
    "second-map-after-reload": _second_map,
    "cached-handle": _kept_handle,
    "padded-key": _padded_keys,
    "ignored-answers": _filled(MapKind.HASH, _ROOM),
    "lru-eviction": _filled(MapKind.LRU_HASH, _LRU_ROOM),
    "rodata-folded": _frozen,
}


@experiment(
    "planted-causes",
    number=59,
    family="sync",
    question="Does a diagnosis name the cause that was planted in a map, and no other?",
    claims=(),
    needs=("bpf", "compile", "raw_tracepoint", "hash", "lru", "batch_hash", "frozen_map"),
    quick={"rounds": 5},
    full={"rounds": 30},
    cases=(
        *(Case("control", f"{one}-before", f"{one}, before", beside=one) for one in _PLANTED),
        *(Case("broken", one, one, plant=plant) for one, plant in _PLANTED.items()),
        *(Case("fixed", f"{one}-repaired", f"{one}, repaired", beside=one) for one in _PLANTED),
    ),
    counted=Counted("cause named", operations="diagnoses", anomalies="alarms", cost_ns="ns"),
    statements=(
        Statement("a cause is named wherever one is planted", "all(broken)"),
        *(
            Statement(f"named, and nothing else: {one}",
                      f'all(rounds(case="{one}").named == "{one}")')
            for one in _PLANTED
        ),
        Statement("no cause is named before one is planted", "none(control)"),
        Statement("none is named after the repair", "none(fixed)"),
    ),
    sentence='Of {rows(rounds(variant="broken"))} maps with a planted cause the diagnosis named '
    'that very one in {rows(rounds(named == cause, variant="broken"))}; of those before it and '
    "after its repair it named a cause in {control} and {fixed}. A diagnosis took "
    "{ms(median(rounds.ns))}.",
)  # fmt: skip
def planted_causes(case: Case) -> list[dict[str, Any]]:
    """Diagnose a map before a cause of stale reads is planted, with it, and after its repair.

    A diagnosis (`labkit.inspect.diagnose`) judges by what the kernel shows of a map: the graph of
    maps, programs and holders, its flags, layout and content. Here it must name the experiment that
    stands for what was planted, and name no cause where there is none. Each time maps and programs
    are new, with a name that no other process gives: one of the same name would be a cause.

    That an LRU map evicts is named as a risk alone, for a table of connections is full by design,
    and no map tells whether a key that is gone had to stay. Here it had to.

    Parameters
    ----------
    case : Case
        The cause.

    Returns
    -------
    list of dict
        For each of the three: ``cause``, ``named`` (experiments of the causes that were named,
        joined by commas), ``diagnoses`` (1), ``alarms`` (1 where any was named) and ``ns``, the
        time of a diagnosis, all maps and processes of the machine looked at.
    """
    name = f"lk_{os.getpid() & 0xFFFF:04x}_{next(_NUMBERS)}"
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        stages = case.plant(stack, name)
        for stage, map_id in zip(("-before", "", "-repaired"), stages, strict=True):
            begun = time.monotonic_ns()
            (found,) = diagnose(str(map_id))
            ns = time.monotonic_ns() - begun
            named = [
                one.experiment
                for one in found.diagnostics
                if one.weight == "cause" or _EVICTS in one.says
            ]
            rows.append(
                {
                    "case": f"{case.id}{stage}",
                    "cause": case.id,
                    "named": ",".join(named),
                    "diagnoses": 1,
                    "alarms": int(bool(named)),
                    "ns": ns,
                }
            )
    return rows
