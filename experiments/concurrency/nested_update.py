"""An update that a program makes in the middle of another update of the same map."""

from __future__ import annotations

import functools
import os

import numpy as np
import pandas as pd

from labkit.errors import BadInput, Unavailable
from labkit.figures import Axes, style
from labkit.kernel import libbpf, probe, programs
from labkit.kernel.compiler import LoadFailed
from labkit.kernel.libbpf import MapFlag, ProgramKind
from labkit.kernel.programs import BpfObject, Program
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say
from labkit.runs import VARIANTS, Run

SHARED_RULE = "every eighth bucket with it"
OWN_RULE = "no other bucket with it"
"""What `lock_rule` answers."""

_BUCKETS = 1024  # and elements that have room
_AT_ONCE = 400  # insertions, after which the maps are emptied; the rest is the tracer's room
_TRACER_KEYS_FROM = 1 << 31
_NO_TRACER = (
    "No tracer is called inside of an insertion here: that needs fentry, or a CPU that interrupts "
    "itself by its x2APIC. Use the virtual machine: vagrant up."
)


_CASES = (
    Case("broken", "same-bucket", "update in the bucket that is locked, answer ignored",
         tracer="in_the_same_bucket"),
    Case("control", "next-bucket", "update in the next bucket", tracer="in_the_next_bucket"),
    Case("control", "another-map", "update in another map", tracer="in_another_map"),
    Case("fixed", "in-place", "addition in place", tracer="in_place"),
    Case("fixed", "array", "array", tracer="in_an_array"),
    Case("fixed", "answer-heeded", "answer heeded: what was refused is put aside",
         tracer="refusals_aside"),
)  # fmt: skip
_EIGHT_ON = "eight-on"


def refusal(run: Run) -> str:
    """Errno by which the locked bucket refuses."""
    answers = run.table("answers")
    refused = answers[answers["case"].isin(run.cases("broken")) & (answers["answer"] != "applied")]
    return " or ".join(sorted(set(refused["answer"])))


def lock_rule(run: Run) -> str:
    """Which buckets are locked with the one that is changed, by what updates in them come to."""
    calls = run.table("eight_on")[["calls", "refused"]].sum()
    if 0 < calls["refused"] == calls["calls"]:
        return SHARED_RULE
    return OWN_RULE if calls["refused"] == 0 < calls["calls"] else "neither rule"


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """The time of an addition for every way, over the rounds, and how many were lost."""
    rounds = run.table("rounds")
    ways = [(variant, case) for variant in VARIANTS for case in run.cases(variant)]
    ax = style.axes(ax, height=2.6)
    ns = (rounds["ns"] / rounds["calls"]).groupby(rounds["case"]).agg(["min", "median", "max"])
    low, high = ns["min"].min(), ns["max"].max()
    for y, (variant, case) in enumerate(ways):
        least, middle, most = ns.loc[[case]].to_numpy(dtype=float)[0]
        look = style.VARIANT[variant].points()
        ax.errorbar(middle, y, xerr=[[middle - least], [most - middle]], **look)
        left = middle * middle > low * high  # where there is room for words
        ax.annotate(
            f"{run.count(variant, case)} lost", (least if left else most, y),
            (-5 if left else 5, 0), fontsize=6,
            textcoords="offset points", ha="right" if left else "left", va="center",
        )  # fmt: skip
    for variant in VARIANTS:
        ax.plot([], [], **style.VARIANT[variant].points(), label=variant)
    style.logarithmic(ax)
    ax.set_xlim(low / 25, high * 25)
    labels = [run.label(case).replace(", ", ",\n").replace(": ", ":\n") for _, case in ways]
    style.rows(ax, labels, fontsize=6)
    ax.set_xlabel("ns per addition, two looks at the clock included\n(median, and range over "
                  "rounds)", loc="right")  # fmt: skip
    style.legend_above(ax, 3, columnspacing=1.2, handletextpad=0.2)
    return ax


@experiment(
    "nested-update",
    number=58,
    family="concurrency",
    question="Is an update applied that a program makes in the middle of another update?",
    claims=("1.3c",),
    needs=("bpf", "compile", "test_run", "hash", "no_prealloc"),
    quick={"insertions": 20_000, "rounds": 3},
    full={"insertions": 100_000, "rounds": 5},
    cases=_CASES,
    counted=Counted("addition lost", operations="calls", anomalies="calls - applied",
                    cost_ns="ns / calls"),
    statements=(
        Statement("additions in the locked bucket are lost", "some(broken)"),
        Statement("every lost addition was answered with an error",
                  'broken.anomalies == sum(rounds(variant="broken").refused) and some(broken)'),
        Statement("the error is that of a lock",
                  'all(answers(answer != "applied").answer == "EBUSY" '
                  'or answers(answer != "applied").answer == "EDEADLK")'),
        Statement("none is lost in another bucket or map", "none(control)"),
        Statement("none is lost in place, in an array, or with the refusals put aside",
                  "none(fixed)"),
    ),
    sentence="A tracer that was called inside of an insertion counted in the same map: {broken} of "
    "its additions were lost where its key was in the bucket that was locked, "
    '{sum(rounds(variant="broken").refused)} of them answered '
    '{first(answers(answer != "applied", case="same-bucket").answer)}, which took '
    "{us(broken.cost_ns)} each ({us(control.cost_ns)} where it went through). In another bucket or "
    "map {control} were lost; in place, in an array, or with the refusals put aside {fixed}.",
    figure=_figure,
)  # fmt: skip
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
        ``rounds``: one row per way and round with ``variant``, ``case``, ``round``, ``calls``
        (of the tracer, which adds one), ``applied`` (additions that are in the map afterwards),
        ``refused`` (by an error; int64) and ``ns`` (of all calls, with two looks at the clock
        each). ``eight_on``: the same of updates in the buckets that share a counter with the
        locked one, until 6.15. ``answers``: ``case``, ``answer`` (name of the errno, or
        "applied") and ``times``.

    Raises
    ------
    Unavailable
        Nothing on this machine is called inside of an insertion.
    """
    if insertions > 10_000_000:
        raise BadInput(f"insertions of nested-update are at most 10,000,000, not {insertions:,}.")
    by_msr = not probe.probe("fentry").works
    constants = {"BY_MSR": 1} if by_msr else {}
    rows: list[dict[str, object]] = []
    eight_on: list[dict[str, object]] = []
    answers: dict[tuple[str, int], int] = {}

    def keep(case: str, answered: dict[int, int]) -> None:
        for number, times in answered.items():
            answers[case, number] = answers.get((case, number), 0) + times

    with programs.load(
        "nested_update", BUCKETS=_BUCKETS, PROCESS=os.getpid(),
        FLAGS=int(MapFlag.NO_PREALLOC | MapFlag.ZERO_SEED), **constants,
    ) as loaded:  # fmt: skip
        bench = _Bench(loaded, by_msr)
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            for case in _CASES:
                seen, answered = bench.measure(case.tracer, insertions)
                rows.append({"variant": case.variant, "case": case.id, "round": turn, **seen})
                keep(case.id, answered)
            seen, answered = bench.measure("eight_buckets_on", insertions)
            eight_on.append({"round": turn, **seen})
            keep(_EIGHT_ON, answered)
    measured = pd.DataFrame(rows)
    if not measured["calls"].sum():
        raise Unavailable(_NO_TRACER)
    return {
        "rounds": measured,
        "eight_on": pd.DataFrame(eight_on),
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

    def __init__(self, loaded: BpfObject, by_msr: bool) -> None:
        self._loaded = loaded
        self._by_msr = by_msr
        self._table, self._beside = loaded.map("table"), loaded.map("beside")
        self._array, self._answers = loaded.map("in_array"), loaded.map("answers")
        self._state = loaded.map("state")
        self._insert = loaded.program("insert")
        self._tracer = functools.cache(self._load)
        # The same keys each time, since the seed is zero: enough of them for every bucket.
        loaded.program("find_tracer_key").test_run(repeat=_BUCKETS * 24)
        assert (loaded.map("tracer_key").snapshot().values >= _TRACER_KEYS_FROM).all()

    def _load(self, name: str) -> Program:
        if self._by_msr:
            return self._loaded.program(name, ProgramKind.RAW_TRACEPOINT)
        return self._loaded.program(name, hook="fentry:arch_irq_work_raise")

    def measure(self, tracer: str, insertions: int) -> tuple[dict[str, int], dict[int, int]]:
        """Insert under a tracer: what became of its calls, and how often it got which errno."""
        total = dict.fromkeys(("calls", "applied", "refused", "ns"), 0)
        answered = np.zeros(self._answers.max_entries, np.int64)
        try:
            held = self._loaded.attach(self._tracer(tracer), "write_msr" if self._by_msr else None)
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
            self._loaded.detach(held)
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
