"""Several writers want to be the first for a key; more than one may believe it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.errors import LabError
from labkit.figures import anomaly_rates
from labkit.kernel import libbpf
from labkit.kernel.libbpf import MapKind, UpdateFlag
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, another_cpu, shared_array
from labkit.lab.experiment import Case, Counted, Statement, experiment

_HEAD_START_NS = 50_000_000  # for the forks to be done before the first one writes


@experiment(
    "first-writer",
    number=19,
    family="concurrency",
    question="When several writers insert one key, does exactly one believe it was first?",
    claims=("1.3b",),
    needs=("bpf", "two_cpus"),
    quick={"writers": 4, "keys": 20_000, "rounds": 2},
    full={"writers": 4, "keys": 60_000, "rounds": 6},
    cases=(
        Case("broken", "lookup-first", "lookup, then update", looks_up=True, alone=False),
        Case("control", "one-writer", "lookup, then update, one writer", looks_up=True, alone=True),
        Case("fixed", "noexist", "BPF_NOEXIST", looks_up=False, alone=False),
    ),
    counted=Counted("not exactly one winner", operations="keys", anomalies="wrong",
                    cost_ns="claim_ns"),
    statements=(
        Statement("a lookup and then an update has several winners", "some(broken, like=2e-4)"),
        Statement("a single writer always wins", "none(control)"),
        Statement("BPF_NOEXIST has exactly one winner", "none(fixed)"),
    ),
    sentence="With a lookup before the update, {broken} keys had more than one writer who believed "
    "to be the first; with BPF_NOEXIST, {fixed}.",
    figure=anomaly_rates,
)  # fmt: skip
def first_writer(case: Case, *, writers: int, keys: int) -> dict[str, Any]:
    """Let processes claim the same keys in the same order, and count the winners of each.

    ``BPF_NOEXIST`` is checked under the bucket's lock (kernel/bpf/hashtab.c,
    ``check_flags``), so the kernel itself decides the race. A lookup followed by an update
    leaves a gap in which another writer does the same.

    Parameters
    ----------
    case : Case
        How a key is claimed, and whether one writer is alone.
    writers : int
        Processes, spread over the CPUs.
    keys : int
        Keys; every writer claims all of them.

    Returns
    -------
    dict
        ``keys``, ``wrong`` (keys with no winner or more than one; int64), ``claim_ns`` (float64,
        of one claim).
    """
    claim = _lookup_then_update if case.looks_up else _update_noexist
    winners, claim_ns = _race(claim, 1 if case.alone else writers, keys)
    return {"keys": keys, "wrong": int((winners != 1).sum()), "claim_ns": claim_ns}


def _race(
    claim: Callable[..., int], writers: int, keys: int
) -> tuple[npt.NDArray[np.int64], float]:
    """Winners of each key, and the nanoseconds that one claim took."""
    won = shared_array((writers, keys), np.uint8)
    spent = shared_array(writers, np.int64)
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=keys, name="claimed") as table:
        start = time.monotonic_ns() + _HEAD_START_NS

        def write(who: int) -> None:
            names = np.arange(keys, dtype=np.uint32)
            value = np.array([who + 1], np.uint64)
            while time.monotonic_ns() < start:
                pass
            begun = time.monotonic_ns()
            at, data = names.ctypes.data, value.ctypes.data
            for key in range(keys):
                won[who, key] = claim(table.fd, at + 4 * key, data)
            spent[who] = time.monotonic_ns() - begun

        with ExitStack() as stack:
            children = [
                stack.enter_context(Child(lambda who=who: write(who), cpu=another_cpu(who)))  # type: ignore[misc]
                for who in range(writers)
            ]
            for child in children:
                child.result()
        if len(table.snapshot()) != keys:
            raise LabError("Some keys were claimed by nobody: a writer's calls failed.")
    return won.sum(axis=0, dtype=np.int64), float(spent.mean()) / keys


def _lookup_then_update(fd: int, key: int, value: int) -> int:
    calls = libbpf.api()
    old = np.zeros(1, np.uint64)
    if calls.bpf_map_lookup_elem(fd, key, old.ctypes.data) == 0:
        return 0
    return int(calls.bpf_map_update_elem(fd, key, value, UpdateFlag.ANY) == 0)


def _update_noexist(fd: int, key: int, value: int) -> int:
    return int(libbpf.api().bpf_map_update_elem(fd, key, value, UpdateFlag.NOEXIST) == 0)
