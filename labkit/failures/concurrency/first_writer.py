"""Several writers want to be the first for a key; more than one may believe it was."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from labkit.analysis.runs import Triad
from labkit.errors import LabError
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import libbpf
from labkit.kernel.libbpf import MapKind, UpdateFlag
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, another_cpu, shared_array

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
)
def first_writer(*, writers: int, keys: int, rounds: int) -> Tables:
    """Let processes claim the same keys in the same order, and count the winners of each.

    ``BPF_NOEXIST`` is checked under the bucket's lock (kernel/bpf/hashtab.c,
    ``check_flags``), so the kernel itself decides the race. A lookup followed by an update
    leaves a gap in which another writer does the same.

    Parameters
    ----------
    writers : int
        Processes, spread over the CPUs.
    keys : int
        Keys; every writer claims all of them.
    rounds : int
        Rounds of every way, in turns.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a key, an anomaly a key with no winner or more than
        one; ``cost_ns`` is the time of one claim.
    """
    ways: tuple[tuple[str, str, Callable[..., int], int], ...] = (
        ("broken", "look, then update", _look_then_update, writers),
        ("control", "look, then update, one writer", _look_then_update, 1),
        ("fixed", "BPF_NOEXIST", _update_noexist, writers),
    )
    wrong = dict.fromkeys((case for _, case, _, _ in ways), 0)
    claim_ns: dict[str, list[float]] = {case: [] for case in wrong}
    for turn in range(rounds):
        for _, case, claim, count in ways:
            say(f"round {turn + 1} of {rounds}: {case}")
            winners, nanoseconds = _race(claim, count, keys)
            wrong[case] += int((winners != 1).sum())
            claim_ns[case].append(nanoseconds)
    triad = Triad("not exactly one winner")
    for variant, case, _, _ in ways:
        triad.add(
            variant,
            case=case,
            operations=keys * rounds,
            anomalies=wrong[case],
            cost_ns=float(np.median(claim_ns[case])),
        )
    return {"counts": triad.table()}


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
    return won.sum(axis=0, dtype=np.int64), float(spent.mean()) / keys if keys else math.nan


def _look_then_update(fd: int, key: int, value: int) -> int:
    calls = libbpf.api()
    old = np.zeros(1, np.uint64)
    if calls.bpf_map_lookup_elem(fd, key, old.ctypes.data) == 0:
        return 0
    return int(calls.bpf_map_update_elem(fd, key, value, UpdateFlag.ANY) == 0)


def _update_noexist(fd: int, key: int, value: int) -> int:
    return int(libbpf.api().bpf_map_update_elem(fd, key, value, UpdateFlag.NOEXIST) == 0)
