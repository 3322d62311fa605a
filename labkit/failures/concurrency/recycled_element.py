"""A pointer that a program holds shows another key's value: elements are used again at once."""

from __future__ import annotations

import functools
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from threading import Event

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import programs
from labkit.kernel.libbpf import MapFlag
from labkit.kernel.parallel import together
from labkit.kernel.programs import Unit

_CHUNK = 5_000  # program runs between two looks at the other CPU
_RACE_S = 1.0  # bound of one race, where other load leaves us little of a CPU


_COUNTED = ("absent", "foreign", "rejected", "caught", "given_up")


@dataclass(frozen=True)
class _Setting:
    variant: str
    case: str
    reader: str = "use_unchecked"
    writer: str = "delete_and_insert"  # or "spare_a"; empty: nobody writes
    kind: str = "hash"
    flags: MapFlag = MapFlag.NONE
    locked: bool = False


_SWEPT = (
    _Setting("broken", "hash"),
    _Setting("broken", "hash, NO_PREALLOC", flags=MapFlag.NO_PREALLOC),
)
_AT_LONGEST = (
    _Setting("broken", "hash, used under its bpf_spin_lock", "use_under_lock", locked=True),
    _Setting("broken", "hash, looked up again after use", "use_and_look_again"),
    _Setting("control", "hash, A is never deleted", writer="spare_a"),
    _Setting("control", "hash, NO_PREALLOC, A is never deleted", writer="spare_a",
             flags=MapFlag.NO_PREALLOC),
    _Setting("fixed", "hash, key and content in one word", "use_one_word"),
    _Setting("fixed", "hash, checksum over key and content", "use_checksummed"),
    _Setting("fixed", "hash, NO_PREALLOC, checksum over key and content", "use_checksummed",
             flags=MapFlag.NO_PREALLOC),
    _Setting("fixed", "array, written in place", kind="array"),
)  # fmt: skip


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
        ``counts`` (operations are values that the program found and went on to use), with
        ``cost_ns`` of a lookup with its longest hold and use, nobody writing, and
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
    planned = [(hold, one) for hold in holds for one in _SWEPT]
    planned += [(max(holds), one) for one in _AT_LONGEST]
    rows = []
    with ExitStack() as stack:
        benches: dict[tuple[int, str, MapFlag, bool], _Bench] = {}
        say("compiling")
        for hold, setting in planned:
            place = (hold, setting.kind, setting.flags, setting.locked)
            if place not in benches:
                constants: dict[str, int | str] = {"LOCKED": 1} if setting.locked else {}
                unit = stack.enter_context(
                    programs.load("recycled_element", KIND=setting.kind,
                                  FLAGS=int(setting.flags), HOLD=hold, **constants)
                )  # fmt: skip
                benches[place] = _Bench(unit)
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            for hold, setting in planned:
                bench = benches[hold, setting.kind, setting.flags, setting.locked]
                quiet = bench.race(replace(setting, writer=""), _CHUNK, 0)
                seen = bench.race(setting, reads, writes)
                rows.append(
                    {
                        "variant": setting.variant,
                        "case": setting.case,
                        "hold": hold,
                        "hold_ns": quiet["ns"],
                        "round": turn,
                        **{name: int(value) for name, value in seen.items() if name != "ns"},
                    }
                )
    measured = pd.DataFrame(rows)
    return {"counts": _counts(measured, max(holds)), "rounds": measured}


def _counts(measured: pd.DataFrame, longest: int) -> pd.DataFrame:
    triad = Triad("foreign value")
    for (variant, case), group in measured.groupby(["variant", "case"], sort=False):
        used = group["reads"] - group["absent"]
        triad.add(
            str(variant),
            case=str(case),
            operations=int(used.sum()),
            anomalies=int(group["foreign"].sum()),
            cost_ns=float(group.loc[group["hold"] == longest, "hold_ns"].median()),
        )
    return triad.table()


class _Bench:
    """One compiled map with its programs, each loaded when it is first needed."""

    def __init__(self, unit: Unit) -> None:
        self._counts = unit.map("counts")
        self._function = functools.cache(unit.function)

    def race(self, setting: _Setting, reads: int, writes: int) -> dict[str, float]:
        """Read on one CPU and write on another until both have done their part."""
        # One deletion and insertion leave A in the map, whatever was there.
        self._function("delete_and_insert").test_run()
        self._counts.update(0, np.zeros((), self._counts.value_dtype)[()])
        reader = self._function(setting.reader)
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
            writer, done = self._function(setting.writer), 0
            while (done < writes or not read_enough.is_set()) and time.monotonic() < end:
                writer.test_run(repeat=_CHUNK)
                done += _CHUNK
                if done >= writes:
                    written_enough.set()
            return done

        if setting.writer:
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
