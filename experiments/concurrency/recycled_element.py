"""A pointer that a program holds shows another key's value: elements are used again at once."""

from __future__ import annotations

import functools
import time
from contextlib import ExitStack
from threading import Event

import numpy as np
import pandas as pd

from labkit.errors import BadInput
from labkit.figures import Axes, rates_against, style
from labkit.kernel import programs
from labkit.kernel.libbpf import MapFlag
from labkit.kernel.parallel import together
from labkit.kernel.programs import BpfObject
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say
from labkit.runs import Run

_CHUNK = 5_000  # program runs between two looks at the other CPU
_RACE_S = 1.0  # bound of one race, where other load leaves us little of a CPU


_COUNTED = ("absent", "foreign", "rejected", "caught", "given_up")


_SWEPT = (
    Case("broken", "hash", "hash"),
    Case("broken", "no-prealloc", "hash, NO_PREALLOC", flags=MapFlag.NO_PREALLOC),
)
_AT_LONGEST = (
    Case("broken", "under-lock", "hash, used under its bpf_spin_lock", reader="use_under_lock",
         locked=True),
    Case("broken", "looked-again", "hash, looked up again after use", reader="use_and_look_again"),
    Case("control", "stays", "hash, A is never deleted", writer="spare_a"),
    Case("control", "stays-no-prealloc", "hash, NO_PREALLOC, A is never deleted",
         writer="spare_a", flags=MapFlag.NO_PREALLOC),
    Case("fixed", "one-word", "hash, key and content in one word", reader="use_one_word"),
    Case("fixed", "checksum", "hash, checksum over key and content", reader="use_checksummed"),
    Case("fixed", "checksum-no-prealloc", "hash, NO_PREALLOC, checksum over key and content",
         reader="use_checksummed", flags=MapFlag.NO_PREALLOC),
    Case("fixed", "array", "array, written in place", kind="array"),
)  # fmt: skip


def _derived(tables: Tables) -> Tables:
    """The counts, with ``cost_ns`` of the longest hold; ``longest`` has the rounds with that."""
    rounds = tables["rounds"]
    rounds = rounds.assign(used=rounds["reads"] - rounds["absent"])
    longest = rounds["hold"] == rounds["hold"].max()
    counted = Counted("foreign value", operations="used", anomalies="foreign", cost_ns="hold_ns")
    return {
        "counts": counted.table(rounds.assign(hold_ns=rounds["hold_ns"].where(longest))),
        "longest": rounds[longest],
    }


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """How often another key's value was used, against the hold, and the cures beside it."""
    ax = style.axes(ax, height=3.4)
    rounds = run.table("rounds")
    rounds = rounds[rounds["variant"] != "control"]
    for series, (case, rows) in enumerate(rounds.groupby("case", sort=False)):
        label = run.label(str(case)).removeprefix("hash, ")
        fixed = rows["variant"].iloc[0] == "fixed"
        look = style.VARIANT["fixed"] if fixed else style.look((0, 1, 4, 6)[series])
        if case == "checksum-no-prealloc":
            continue  # as the preallocated one
        by_hold = rows.groupby("hold").agg(
            ns=("hold_ns", "median"), foreign=("foreign", "sum"), reads=("reads", "sum"),
            absent=("absent", "sum"),
        )  # fmt: skip
        used = by_hold["reads"] - by_hold["absent"]
        shown = None if fixed else label
        rates_against(ax, by_hold["foreign"], used, look, shown, x=by_hold["ns"])
    ax.plot([], [], mfc="white", label="with a cure", **style.VARIANT["fixed"].points())
    ax.set_yscale("log")
    ax.set_xlabel("ns from lookup to end of use\n(hollow: none, bound at 95 %)", loc="right")
    ax.set_ylabel("another key's value,\nper million values used")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.25, 1), ncols=1)
    return ax


@experiment(
    "recycled-element",
    number=15,
    family="concurrency",
    question="Can a program that holds a looked-up pointer read the value of another key?",
    claims=("1.3g", "1.11"),
    needs=("bpf", "compile", "test_run", "two_cpus", "spin_lock"),
    quick={"holds": [1, 512, 4096], "reads": 80_000, "writes": 30_000, "rounds": 3},
    full={"holds": [1, 8, 64, 512, 2048, 4096], "reads": 250_000, "writes": 100_000,
          "rounds": 6},
    cases=_SWEPT + _AT_LONGEST,
    derive=_derived,
    statements=(
        Statement("another key's value is used",
                  'some(broken["hash", "no-prealloc", "under-lock"], like=1e-3)'),
        # How much looking again misses depends on when the key comes back, perhaps nothing.
        Statement("looking the key up again afterwards catches some of them",
                  'some(rounds(case="looked-again").caught > 0)'),
        Statement("an element whose key stays keeps its value", "none(control)"),
        Statement("no other key's value is used", "none(fixed)"),
        Statement("each owner check had something to refuse",
                  'some(rounds(case="one-word").rejected > 0) and '
                  'some(rounds(case="checksum").rejected > 0) and '
                  'some(rounds(case="checksum-no-prealloc").rejected > 0)'),
    ),
    sentence="A program that held a looked-up pointer for "
    '{median(longest(case="hash").hold_ns)} ns, while the key was deleted and others inserted, '
    'used another key\'s value in {sum(longest(case="hash").foreign)} of '
    '{sum(longest(case="hash").used)} reads; NO_PREALLOC does not help ({broken["no-prealloc"]} '
    'over all holds), nor does a lock in the value ({broken["under-lock"]}), and looking the key '
    'up again caught {sum(rounds(case="looked-again").caught)} and missed '
    '{broken["looked-again"].anomalies}. With the key in one word with the content, under one '
    "checksum with it, or in an array: {fixed}.",
    figure=_figure,
)  # fmt: skip
def recycled_element(*, holds: list[int], reads: int, writes: int, rounds: int) -> Tables:
    """Look key A up, hold the pointer, use the value, while A is deleted and others inserted.

    A lookup answers with a pointer into the map, not with a copy. Deleting the key takes the
    element off its bucket, and the next insertion on that CPU may write another key and
    value into it while the pointer is still held: the elements of a preallocated hash never
    wait for a grace period, nor do those of ``BPF_F_NO_PREALLOC``, which their allocator
    hands out again for the same map (kernel/bpf/hashtab.c). A lock inside the value moves to
    the new owner with it. The owner's key, read in the same word as the content or under
    one checksum with it, tells; an element of an array has one owner for ever.

    Parameters
    ----------
    holds : list of int
        Words that the program reads between lookup and use, at most 8192. The cures are
        measured with the longest.
    reads, writes : int
        Lookups of A, and deletions of A, in each setting and round, at the least, unless
        that takes more than a second.
    rounds : int
        Rounds of every setting, in turns, so that a burst of other load hits all alike.

    Returns
    -------
    dict of DataFrame
        ``rounds``: one row per setting, hold and round with columns ``variant``, ``case``,
        ``hold`` (words), ``hold_ns`` (float64, nanoseconds of a lookup, hold and use with
        nobody writing), ``round``, ``reads``, ``absent``, ``foreign`` (another key's value
        used), ``rejected`` (a read that the check refused), ``caught`` (another key's value
        among those, by looking up again), ``given_up`` (four refused in a row), ``writes``
        (int64).

    Raises
    ------
    BadInput
        A hold beyond 8192 words.
    """
    if max(holds) > 8192:
        raise BadInput(f"A hold of recycled-element is at most 8192 words, not {max(holds)}.")
    planned = [(hold, case) for hold in holds for case in _SWEPT]
    planned += [(max(holds), case) for case in _AT_LONGEST]
    rows = []
    with ExitStack() as stack:
        benches: dict[tuple[int, str, MapFlag, bool], _Bench] = {}
        say("compiling")
        for hold, case in planned:
            if (place := _place(hold, case)) not in benches:
                _, kind, flags, locked = place
                constants: dict[str, int | str] = {"LOCKED": 1} if locked else {}
                loaded = programs.load("recycled_element", KIND=kind, FLAGS=int(flags), HOLD=hold,
                                       **constants)  # fmt: skip
                benches[place] = _Bench(stack.enter_context(loaded))
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            for hold, case in planned:
                bench = benches[_place(hold, case)]
                reader = case.get("reader", "use_unchecked")
                quiet = bench.race(reader, "", _CHUNK, 0)
                seen = bench.race(reader, case.get("writer", "delete_and_insert"), reads, writes)
                rows.append(
                    {
                        "variant": case.variant,
                        "case": case.id,
                        "hold": hold,
                        "hold_ns": quiet["ns"],
                        "round": turn,
                        **{name: int(value) for name, value in seen.items() if name != "ns"},
                    }
                )
    return {"rounds": pd.DataFrame(rows)}


def _place(hold: int, case: Case) -> tuple[int, str, MapFlag, bool]:
    """What is compiled in: cases that have it in common share the map."""
    return (
        hold,
        case.get("kind", "hash"),
        case.get("flags", MapFlag.NONE),
        case.get("locked", False),
    )


class _Bench:
    """One compiled map with its programs, each loaded when it is first needed."""

    def __init__(self, loaded: BpfObject) -> None:
        self._counts = loaded.map("counts")
        self._function = functools.cache(loaded.program)

    def race(self, read_by: str, write_by: str, reads: int, writes: int) -> dict[str, float]:
        """Read on one CPU and write on another, if at all, until both have done their part."""
        # One deletion and insertion leave A in the map, whatever was there.
        self._function("delete_and_insert").test_run()
        self._counts.update(0, np.zeros((), self._counts.value_dtype)[()])
        reader = self._function(read_by)
        read_enough, written_enough = Event(), Event()
        end = time.monotonic() + _RACE_S

        def read() -> tuple[int, float]:
            done, nanoseconds = 0, []
            while not done or (
                (done < reads or not written_enough.is_set()) and time.monotonic() < end
            ):
                nanoseconds.append(reader.test_run(repeat=_CHUNK).mean_ns)
                done += _CHUNK
            read_enough.set()
            return done, float(np.median(nanoseconds))

        def write() -> int:
            writer, done = self._function(write_by), 0
            while (done < writes or not read_enough.is_set()) and time.monotonic() < end:
                writer.test_run(repeat=_CHUNK)
                done += _CHUNK
                if done >= writes:
                    written_enough.set()
            return done

        if write_by:
            (done, ns), written = together(read, write)
        else:
            written_enough.set()
            (done, ns), written = read(), 0
        seen = self._counts.lookup(0)
        return {
            "reads": done,
            **{name: int(seen[name]) for name in _COUNTED},
            "writes": written,
            "ns": ns,
        }
