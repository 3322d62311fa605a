"""Whether a process that looks an inner map up waits for every program that runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import programs
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map

_WAITED: Final = 0.25  # of the median switch, which waits on every kernel
_ASKED: Final = "lookup in the outer map, by a process"


@experiment(
    "outer-lookup-wait",
    number=56,
    family="kernel-facts",
    question="Does a process that asks which inner map is in force wait for every program?",
    claims=("4.3",),
    needs=("bpf", "compile", "test_run", "map_in_map"),
    quick={"calls": 50},
    full={"calls": 500},
)
def outer_lookup_wait(*, calls: int) -> Tables:
    """Time calls on an outer map and on a plain array, in turns, and count those that waited.

    The update of an outer map waits until every program has ended that might still hold the old
    inner map (``maybe_wait_bpf_programs``, kernel/bpf/syscall.c). Until Linux 6.8 (c26f2a890139)
    the lookup waited in the same way, for nothing: a follower that asked which map is in force
    paid a grace period for each look, and each empty slot of a snapshot one more.

    Parameters
    ----------
    calls : int
        Of each sort.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a call, an anomaly one that took more than a quarter of the
        median switch of the inner map; switches in broken, lookups in a plain array in control,
        lookups in the outer map by a program in fixed; ``cost_ns`` is the median call.
        ``calls``: one row per sort, also a process's lookup in the outer map, with columns
        ``case``, ``calls``, ``waited`` (int64) and ``median_ns`` (float64).
    """
    with (
        Map.create(MapKind.ARRAY, key="u4", value="u4", max_entries=1) as plain,
        Map.create(MapKind.ARRAY, key="u4", value="u4", max_entries=1) as other,
        Map.create(
            MapKind.ARRAY_OF_MAPS, key="u4", value="u4", max_entries=1, inner=plain
        ) as outer,
        programs.load("outer_lookup_wait", OUTER_FD=outer.fd) as unit,
    ):
        look, inners = unit.function("look"), (plain.fd, other.fd)
        outer.update(0, plain.fd)
        sorts: dict[str, tuple[str, Callable[[int], object]]] = {
            "inner map switched, by a process": (
                "broken", lambda turn: outer.update(0, inners[turn % 2])
            ),
            "lookup in an array, by a process": ("control", lambda turn: plain.lookup(0)),
            _ASKED: ("", lambda turn: outer.lookup(0)),
            "lookup in the outer map, by a program": ("fixed", lambda turn: look.test_run()),
        }  # fmt: skip
        say(f"{calls} calls of {len(sorts)} sorts, in turns")
        took = {case: np.zeros(calls, np.int64) for case in sorts}
        for turn in range(calls):
            for case, (_, call) in sorts.items():
                plain.lookup(0)  # whoever comes after a long wait finds cold caches
                begun = time.monotonic_ns()
                call(turn)
                took[case][turn] = time.monotonic_ns() - begun
    limit = _WAITED * float(np.median(next(iter(took.values()))))
    triad, rows = Triad("call that waited"), []
    for case, (variant, _) in sorts.items():
        waited, median = int((took[case] > limit).sum()), float(np.median(took[case]))
        rows.append({"case": case, "calls": calls, "waited": waited, "median_ns": median})
        if variant:
            triad.add(variant, case=case, operations=calls, anomalies=waited, cost_ns=median)
    return {"counts": triad.table(), "calls": pd.DataFrame(rows)}
