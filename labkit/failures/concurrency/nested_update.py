"""An update that a program makes in the middle of another update of the same map."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput, Unavailable
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import libbpf, probe, programs
from labkit.kernel.libbpf import MapFlag, ProgramKind
from labkit.kernel.programs import Function, LoadFailed, Unit

_BUCKETS = 1024  # and elements that have room
_AT_ONCE = 400  # insertions, after which the maps are emptied; the rest is the tracer's room
_TRACER_KEYS_FROM = 1 << 31
_NO_TRACER = (
    "No tracer is called inside of an insertion here: that needs fentry, or a CPU that interrupts "
    "itself by its x2APIC. Use the virtual machine: vagrant up."
)


@dataclass(frozen=True)
class _Way:
    variant: str
    case: str
    function: str


_WAYS = (
    _Way("broken", "update in the bucket that is locked, answer ignored", "in_the_same_bucket"),
    _Way("control", "update in the next bucket", "in_the_next_bucket"),
    _Way("control", "update in another map", "in_another_map"),
    _Way("fixed", "addition in place", "in_place"),
    _Way("fixed", "array", "in_an_array"),
    _Way("fixed", "answer heeded: what was refused is put aside", "refusals_aside"),
)
_EIGHT_ON = "update eight buckets on"
_NEIGHBOUR = _Way("", _EIGHT_ON, "eight_buckets_on")


@experiment(
    "nested-update",
    number=58,
    family="concurrency",
    question="Is an update applied that a program makes in the middle of another update?",
    claims=("1.3c",),
    needs=("bpf", "compile", "test_run", "hash", "no_prealloc"),
    quick={"insertions": 20_000, "rounds": 3},
    full={"insertions": 100_000, "rounds": 5},
)
def nested_update(*, insertions: int, rounds: int) -> Tables:
    """Insert keys, while a tracer that is called inside of the insertion counts in the same map.

    A hash is changed under the lock of a bucket (kernel/bpf/hashtab.c,
    ``htab_lock_bucket``). What is called meanwhile on the same CPU, a tracing program for one,
    cannot have that lock: until Linux 6.15 its update is answered EBUSY, by a counter of each
    CPU that eight groups of buckets share; since then (4fa8d68aa53e) the lock finds out by
    itself that this CPU holds it, and the answer is EDEADLK. Here the tracer is called where
    an insertion into a NO_PREALLOC map takes one of the last elements that the allocator has
    in stock: it then asks for more by an interrupt to its own CPU (kernel/bpf/memalloc.c,
    ``irq_work_raise``).

    Parameters
    ----------
    insertions : int
        By the writer, in each round of each way, rounded up to a multiple of 400.
    rounds : int
        Rounds of all ways, in turns.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a call of the tracer, which adds one; an anomaly an addition
        that is not in the map afterwards. ``cost_ns`` is the tracer's addition, with two looks
        at the clock. ``calls``: one row per way and round with ``case``, ``calls``, ``applied``,
        ``refused`` (by an error; int64) and ``ns`` (of all calls); the buckets that share a
        counter with the locked one, until 6.15, are a case here alone. ``answers``: ``case``,
        ``answer`` (name of the errno, or "applied") and ``times``.

    Raises
    ------
    Unavailable
        Nothing on this machine is called inside of an insertion.
    """
    if insertions > 10_000_000:
        raise BadInput(f"insertions of nested-update are at most 10,000,000, not {insertions:,}.")
    by_msr = not probe.probe("fentry").works
    constants = {"BY_MSR": 1} if by_msr else {}
    calls: list[dict[str, object]] = []
    answers: dict[tuple[str, int], int] = {}
    with programs.load(
        "nested_update", BUCKETS=_BUCKETS, PROCESS=os.getpid(),
        FLAGS=int(MapFlag.NO_PREALLOC | MapFlag.ZERO_SEED), **constants,
    ) as unit:  # fmt: skip
        bench = _Bench(unit, by_msr)
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            for way in (*_WAYS, _NEIGHBOUR):
                seen, answered = bench.measure(way.function, insertions)
                calls.append({"case": way.case, "round": turn, **seen})
                for number, times in answered.items():
                    answers[way.case, number] = answers.get((way.case, number), 0) + times
    found = pd.DataFrame(calls)
    if not found["calls"].sum():
        raise Unavailable(_NO_TRACER)
    triad = Triad("addition lost")
    for way in _WAYS:
        mine = found[found["case"] == way.case]
        triad.add(
            way.variant, case=way.case, operations=int(mine["calls"].sum()),
            anomalies=int((mine["calls"] - mine["applied"]).sum()),
            cost_ns=mine["ns"].sum() / max(mine["calls"].sum(), 1),
        )  # fmt: skip
    return {
        "counts": triad.table(),
        "calls": found,
        "answers": pd.DataFrame(
            [
                {
                    "case": case,
                    "answer": libbpf.error_name(number) if number else "applied",
                    "times": times,
                }
                for (case, number), times in answers.items()
            ]
        ),
    }


class _Bench:
    """The compiled maps and programs; the writer inserts, one tracer at a time is attached."""

    def __init__(self, unit: Unit, by_msr: bool) -> None:
        self._unit = unit
        self._by_msr = by_msr
        self._table, self._beside = unit.map("table"), unit.map("beside")
        self._array, self._answers = unit.map("in_array"), unit.map("answers")
        self._state = unit.map("state")
        self._insert = unit.function("insert")
        self._tracer = functools.cache(self._load)
        # The same keys each time, since the seed is zero: enough of them for every bucket.
        unit.function("find_tracer_key").test_run(repeat=_BUCKETS * 24)
        assert (unit.map("tracer_key").snapshot().values >= _TRACER_KEYS_FROM).all()

    def _load(self, name: str) -> Function:
        if self._by_msr:
            return self._unit.function(name, ProgramKind.RAW_TRACEPOINT)
        return self._unit.function(name, hook="fentry:arch_irq_work_raise")

    def measure(self, tracer: str, insertions: int) -> tuple[dict[str, int], dict[int, int]]:
        """Insert under a tracer: what became of its calls, and how often it got which errno."""
        total = dict.fromkeys(("calls", "applied", "refused", "ns"), 0)
        answered = np.zeros(self._answers.max_entries, np.int64)
        try:
            held = self._unit.attach(self._tracer(tracer), "write_msr" if self._by_msr else None)
        except LoadFailed as error:
            raise Unavailable(f"{_NO_TRACER} The kernel says: {error}") from error
        try:
            for _ in range(-(-insertions // _AT_ONCE)):
                self._empty()
                self._insert.test_run(repeat=_AT_ONCE)
                state = self._state.lookup(0)
                answers = self._answers.snapshot().values.astype(np.int64)
                answered += answers
                total["calls"] += int(state["calls"])
                total["ns"] += int(state["ns"])
                total["applied"] += self._applied()
                total["refused"] += int(answers[1:].sum())
        finally:
            self._unit.detach(held)
        return total, {int(number): int(answered[number]) for number in np.flatnonzero(answered)}

    def _applied(self) -> int:
        """Additions that stand in any of the maps."""
        table = self._table.snapshot()
        counted = table.values[table.keys >= _TRACER_KEYS_FROM]
        others = self._beside.snapshot().values, self._array.snapshot().values
        return int(counted.sum()) + sum(int(one.sum()) for one in others)

    def _empty(self) -> None:
        for table in (self._table, self._beside):
            if len(keys := table.snapshot().keys):
                table.delete_many(keys)
        for array in (self._array, self._answers):
            array.update_many(np.arange(array.max_entries), np.zeros(array.max_entries, np.uint64))
        state = self._state.lookup(0)
        self._state.update(0, (state["next"], 0, 0, 0))
