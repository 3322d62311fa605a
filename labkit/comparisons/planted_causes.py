"""Causes of stale reads, planted in maps: what a diagnosis names of them, and what it makes up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.diagnose import diagnose
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import programs
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.programs import Unit

_ROOM = 64
_LRU_ROOM = 4096  # of which the lists of a CPU keep 128 free, on whichever CPU we come to run
_TCP = 6

Stages = Iterator[int]
"""Ids of the map to be diagnosed: as it should be, with the cause planted, and repaired."""


@experiment(
    "planted-causes",
    number=59,
    family="sync",
    question="Does a diagnosis name the cause that was planted in a map, and no other?",
    claims=(),
    needs=("bpf", "compile", "hash", "lru", "batch_hash", "frozen_map"),
    quick={"rounds": 5},
    full={"rounds": 30},
)
def planted_causes(*, rounds: int) -> Tables:
    """Diagnose maps before a cause of stale reads is planted, with it, and after its repair.

    A diagnosis (`labkit.diagnose`) judges by what the kernel shows of a map: the graph of maps,
    programs and holders, its flags, layout and content. Here it must name the experiment that
    stands for what was planted, and name no cause where there is none.

    Parameters
    ----------
    rounds : int
        Of every cause; each round makes maps and programs of its own.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a diagnosis, an anomaly one that names a cause: each of those
        with a cause planted should, none of the others. ``cost_ns`` is the time of a diagnosis,
        all maps and processes of the machine looked at. ``diagnoses``: one row per ``cause``,
        ``variant`` and round with ``round``, ``named`` (experiments of the causes that were
        named, joined by commas) and ``ns``.
    """
    rows: list[dict[str, object]] = []
    for turn in range(rounds):
        say(f"round {turn + 1} of {rounds}")
        for cause, planted in _PLANTED.items():
            with ExitStack() as stack:
                stages = planted(stack, f"labkit_{turn}")
                for stage, map_id in zip(("control", "broken", "fixed"), stages, strict=True):
                    begun = time.monotonic_ns()
                    (found,) = diagnose(str(map_id))
                    ns = time.monotonic_ns() - begun
                    named = [one.experiment for one in found.remarks if one.weight == "cause"]
                    rows.append(
                        {
                            "cause": cause,
                            "variant": stage,
                            "round": turn,
                            "named": ",".join(named),
                            "ns": ns,
                        }
                    )
    table, triad = pd.DataFrame(rows), Triad("cause named")
    for (variant, case), group in table.groupby(["variant", "cause"], sort=False):
        triad.add(
            str(variant),
            case=str(case),
            operations=len(group),
            anomalies=int((group["named"] != "").sum()),
            cost_ns=float(group["ns"].median()),
        )
    return {"counts": triad.table(), "diagnoses": table}


def _map(stack: ExitStack, name: str, kind: MapKind = MapKind.HASH, room: int = _ROOM) -> Map:
    made = Map.create(kind, key="u4", value="u8", max_entries=room, name=name)
    return stack.enter_context(made)


def _reader(stack: ExitStack, table: Map) -> Unit:
    """A loaded program that refers to a map."""
    unit = stack.enter_context(programs.load("held_map", TABLE_FD=table.fd))
    unit.function("look_up")
    return unit


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
    yield new.id
    old = _map(stack, name)  # which the writer goes on to hold
    yield new.id
    old.close()
    yield new.id


def _padded_keys(stack: ExitStack, name: str) -> Stages:
    unit = stack.enter_context(programs.load("padded_key", KEYS=_ROOM, PADDED=1))
    unit.function("look_up_all")
    table = unit.map("policy")
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


_PLANTED: dict[str, Callable[[ExitStack, str], Stages]] = {
    "second-map-after-reload": _second_map,
    "cached-handle": _kept_handle,
    "padded-key": _padded_keys,
    "ignored-answers": _filled(MapKind.HASH, _ROOM),
    "lru-eviction": _filled(MapKind.LRU_HASH, _LRU_ROOM),
    "rodata-folded": _frozen,
}
"""By the experiment that stands for the cause."""
