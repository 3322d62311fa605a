"""A change of many keys is read half done; a map in map switches them all, at a price."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import partial
from threading import Event

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import TimedOut
from labkit.figures import Axes, mixed_readings, stacked, times_of_changes
from labkit.judge import checkers, history
from labkit.judge.history import History, Op
from labkit.kernel import programs
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import KeyAbsent, Map, map_error
from labkit.kernel.parallel import Child, another_cpu, shared_array, together
from labkit.kernel.programs import BpfObject
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say
from labkit.runs import Run

_PAUSE = 64  # calls of the clock that a program spends on each key: a sweep outlasts two flips
_CHUNK = 20  # sweeps between two looks at the writer; a switch waits for them
_SAMPLES = 24  # sweeps of each setting and round that are kept whole
_LEAST = 4  # generations that every setting sees in a round
_WARM_UP = 2  # changes of each kind that are not timed
_LIMIT_S = 60.0


# ``writer``: a method of `_Bench`; without one nobody writes. ``sweep``: a program; without one a
# process reads.
_CASES = (
    Case("broken", "one-by-one", "keys one by one", writer="one_by_one", sweep="sweep_table"),
    Case("broken", "batch", "one batch update", writer="batch", sweep="sweep_table"),
    Case("broken", "batch-by-process", "one batch update, read by a process in one batch",
         writer="batch"),
    Case("broken", "index-flip", "index flip, the spare half used again at once", writer="flip",
         sweep="sweep_active_half"),
    Case("control", "quiet", "nobody writes", sweep="sweep_table"),
    Case("control", "quiet-by-process", "nobody writes, read by a process in one batch"),
    Case("fixed", "map-in-map", "map in map", writer="publish", sweep="sweep_published"),
    Case("fixed", "new-map-by-process", "map in map, a new map each time, read by a process",
         writer="publish_new"),
)  # fmt: skip


def _derived(tables: Tables) -> Tables:
    """What the checker says of the readings that were kept whole."""
    kept = checkers.mixed_generations(history.from_frame(tables["history"]))
    cases = tables["cases"]
    kept = kept.assign(
        variant=kept["actor"].map(cases["variant"]), case=kept["actor"].map(cases["case"])
    )
    return {"kept": kept}


def _times(run: Run, ax: Axes) -> None:
    """The time of every kind of change."""
    costs = run.table("costs")
    times_of_changes(ax, costs.assign(series=costs["load"]), unit="µs per change", unit_ns=1e3)


@experiment(
    "mixed-generations",
    number=16,
    family="concurrency",
    question="Can a reader see half of a change of many keys, and what does a switch cost?",
    claims=("4.3",),
    needs=("bpf", "compile", "test_run", "two_cpus"),
    quick={"keys": 64, "sweeps": 1_500, "process_reads": 1_000, "switches": 10, "rounds": 2},
    full={"keys": 64, "sweeps": 5_000, "process_reads": 5_000, "switches": 50, "rounds": 6},
    cases=_CASES,
    counted=Counted("mixed reading", operations="readings", anomalies="mixed", cost_ns="ns"),
    derive=_derived,
    statements=(
        Statement("half of a change is seen", "some(broken, like=0.004)"),
        Statement("one generation is seen while nobody writes", "none(control)"),
        Statement("every reading of a map in map sees one generation", "none(fixed)"),
        # The readings that were kept whole, judged by the checker instead of by the program.
        Statement("the checker finds mixed readings where keys change one by one or a spare is "
                  "used again, and none elsewhere",
                  'some(kept(variant="broken").mixed) and '
                  'none(kept(variant=("control", "fixed")).mixed)'),
        Statement("an update of the outer map waits for a grace period, a plain update does not",
                  'ratio(costs(change="outer map update", load="idle").ns, '
                  'costs(change="plain update of one key", load="idle").ns) > 2'),
    ),
    sentence="While all {parameters.keys} keys got new generations, programs saw several at once "
    'in {broken["one-by-one"]} readings, with batch updates in {broken["batch"]}, with an index '
    'flip whose spare half was used again at once in {broken["index-flip"]}. With map in map: '
    '{fixed}. The switch took {ms(median(costs(change="outer map update", load="idle").ns))} idle '
    'and {ms(median(costs(change="outer map update", load="a program reads").ns))} beside a '
    'program that reads; the flip took {us(median(costs(change="index flip", load="idle").ns))}.',
    figure=stacked(mixed_readings, _times, height=4.9, ratios=(1.5, 1)),
)  # fmt: skip
def mixed_generations(
    *, keys: int, sweeps: int, process_reads: int, switches: int, rounds: int
) -> Tables:
    """Give all keys a new generation again and again, and read the whole table meanwhile.

    Each element is updated by itself, in a batch too: no lock spans two keys. A writer that
    fills a spare table and then switches the readers over changes all keys at once, if
    nobody still reads what it fills next. The update of an outer map waits until every
    program that may have found the old inner map has ended (kernel/bpf/syscall.c,
    ``maybe_wait_bpf_programs``), so the old one is free when the call returns; the flip of
    an index waits for nobody. No such wait covers a process: there the old map must live on
    for those who read it, so each generation gets a new one.

    Parameters
    ----------
    keys : int
        Keys of the table.
    sweeps, process_reads : int
        Readings of the whole table by a program, and by a process, in each setting and
        round, at the least.
    switches : int
        Changes of each kind that are timed, idle and while a program runs.
    rounds : int
        Rounds of every setting, in turns, so that a burst of other load hits all alike.

    Returns
    -------
    dict of DataFrame
        ``rounds``: one row per setting and round with ``variant``, ``case``, ``round``,
        ``readings`` (of the whole table), ``mixed`` among them (int64) and ``ns`` (float64, of
        one); ``costs``: one row per timed change with columns ``change`` (text; one of them makes
        no call of the kernel: that is the interpreter's share), ``load`` (idle, or a program
        reads on the other CPU), ``ns`` (float64); and ``history``: of each setting and round
        with a program that reads, sampled readings in the columns of
        :data:`labkit.judge.history.HISTORY`, with the number of the row in the table of cases
        as actor and the generation as version.
    """
    rows: list[dict[str, object]] = []
    sampled: list[History] = []
    with programs.load(
        "mixed_generations", KEYS=keys, PAUSE=_PAUSE, SAMPLES=_SAMPLES,
        EVERY=max(1, sweeps // _SAMPLES),
    ) as loaded, _Bench(loaded, keys) as bench:  # fmt: skip
        for turn in range(rounds):
            for actor, case in enumerate(_CASES):
                say(f"round {turn + 1} of {rounds}: {case.label}")
                sweep = case.get("sweep", "")
                seen = bench.measure(
                    case.get("writer", ""), sweep, sweeps if sweep else process_reads
                )
                rows.append({"variant": case.variant, "case": case.id, "round": turn, **seen})
                if sweep:
                    sampled.append(bench.sampled(actor))
        say("timing the switches")
        costs = pd.DataFrame(bench.costs(switches))
    return {
        "rounds": pd.DataFrame(rows),
        "costs": costs,
        "history": history.to_frame(history.concatenate(*sampled)),
    }


class _Bench:
    """The table in all its forms, the ways to change it, and its readers."""

    def __init__(self, loaded: BpfObject, keys: int) -> None:
        self._keys = np.arange(keys, dtype=np.uint32)
        self._table, self._halves = loaded.map("table"), loaded.map("halves")
        self._active, self._outer = loaded.map("active"), loaded.map("outer")
        self._counts, self._samples = loaded.map("counts"), loaded.map("samples")
        sweeps = [one.sweep for one in _CASES if one.get("sweep", "")]
        self._functions = {name: loaded.program(name) for name in sweeps}
        self._generation = 1
        self._value = np.zeros(1, np.uint64)
        self._writers = [self._table.updater(key, self._value) for key in range(keys)]
        self._inner = [self._new_map(), self._new_map()]
        self._turn = 0
        for half in (0, 1):
            self._halves.update_many(self._keys + half * len(self._keys), self._generations())
        self._table.update_many(self._keys, self._generations())
        self.publish()

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._inner:
            one.close()

    def _new_map(self) -> Map:
        return Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=len(self._keys))

    def _generations(self) -> npt.NDArray[np.uint64]:
        return np.full(len(self._keys), self._generation, np.uint64)

    # -- changes of all keys -----------------------------------------------------------

    def one_by_one(self) -> None:
        self._value[0] = self._generation
        for write in self._writers:
            write()

    def batch(self) -> None:
        self._table.update_many(self._keys, self._generations())

    def flip(self) -> None:
        self._turn ^= 1
        self._halves.update_many(self._keys + self._turn * len(self._keys), self._generations())
        self._active.update(0, self._turn)

    def publish(self) -> None:
        self._turn ^= 1
        spare = self._inner[self._turn]
        spare.update_many(self._keys, self._generations())
        self._outer.update(0, spare.fd)

    def publish_new(self) -> None:
        self._turn ^= 1
        fresh, old = self._new_map(), self._inner[self._turn]
        fresh.update_many(self._keys, self._generations())
        self._outer.update(0, fresh.fd)
        # Who holds a descriptor of the old one may read on; we need it no more.
        self._inner[self._turn] = fresh
        old.close()

    # -- readers -----------------------------------------------------------------------

    def measure(self, writer: str, sweep: str, wanted: int) -> dict[str, float]:
        """Readings, mixed ones among them, and the nanoseconds of one."""
        self._counts.update(0, (0, 0))
        # Shared memory: a process that reads is a process of its own, with its own interpreter.
        flags = shared_array(2, np.int64)
        written, stop = flags[:1], flags[1:]

        def write() -> None:
            change: Callable[[], None] = getattr(self, writer)
            done, deadline = 0, time.monotonic() + _LIMIT_S
            while not stop[0]:
                if time.monotonic() > deadline:
                    raise TimedOut("The reader of mixed-generations did not end.")
                self._generation += 1
                change()
                done += 1
                written[0] = done >= _LEAST

        def read() -> dict[str, float]:
            try:
                if sweep:
                    return self._sweep(sweep, wanted, written)
                return self._read_by_process(writer == "publish_new", wanted, written)
            finally:
                stop[0] = 1

        if not writer:
            written[0] = 1
        seen: dict[str, float]
        if sweep:
            seen = together(read, write)[0] if writer else read()
            return seen
        with Child(read, cpu=another_cpu(1)) as child:
            if writer:
                together(write)
            seen = child.result(_LIMIT_S)
        return seen

    def _sweep(self, name: str, wanted: int, written: npt.NDArray[np.int64]) -> dict[str, float]:
        done, nanoseconds = 0, []
        while done < wanted or not written[0]:
            nanoseconds.append(self._functions[name].test_run(repeat=_CHUNK).mean_ns)
            done += _CHUNK
        mixed = int(self._counts.lookup(0)["mixed"])
        return {"readings": done, "mixed": mixed, "ns": float(np.median(nanoseconds))}

    def _read_by_process(
        self, published: bool, wanted: int, written: npt.NDArray[np.int64]
    ) -> dict[str, float]:
        done, mixed, nanoseconds = 0, 0, []
        while done < wanted or not written[0]:
            begun = time.monotonic_ns()
            if published:
                try:
                    found = Map.from_id(int(self._outer.lookup(0)))
                except KeyAbsent:
                    continue  # replaced and freed between the two calls
                with found:
                    values = found.snapshot().values
            else:
                values = self._table.snapshot().values
            nanoseconds.append(time.monotonic_ns() - begun)
            done += 1
            mixed += int(values.min() != values.max())
        return {"readings": done, "mixed": mixed, "ns": float(np.median(nanoseconds))}

    def sampled(self, actor: int) -> History:
        """The readings that the program kept in this round, as reads of every key."""
        kept = self._samples.snapshot().values[:_SAMPLES]
        kept = kept[kept["end_ns"] > 0]
        self._samples.update_many(
            np.arange(_SAMPLES, dtype=np.uint32), np.zeros(_SAMPLES, self._samples.value_dtype)
        )
        keys = len(self._keys)
        return history.build(
            np.full(len(kept) * keys, int(Op.READ)),
            actor=actor,
            key=np.tile(self._keys, len(kept)),
            version=kept["generation"].reshape(-1),
            start_ns=np.repeat(kept["start_ns"], keys),
            end_ns=np.repeat(kept["end_ns"], keys),
        )

    # -- the price of a change ---------------------------------------------------------

    def costs(self, switches: int) -> list[dict[str, object]]:
        """Time the calls that change what readers see, idle and beside a running program."""
        half, inner = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
        plain = self._writers[0]
        flip, switch = self._active.updater(0, half), self._outer.updater(0, inner)

        to, source = half.ctypes.data, inner.ctypes.data

        def nothing() -> int:
            ctypes.memmove(to, source, 0)
            return 0

        def flip_index() -> int:
            half[0] ^= 1
            return flip()

        def switch_map() -> int:
            self._turn ^= 1
            inner[0] = self._inner[self._turn].fd
            return switch()

        changes = {
            "no call of the kernel": nothing,
            "plain update of one key": plain,
            "index flip": flip_index,
            "outer map update": switch_map,
        }
        rows: list[dict[str, object]] = []

        def time_all(load: str) -> None:
            # In turns: the ratio of two of them is one of neighbours.
            for i in range(_WARM_UP + switches):
                for name, change in changes.items():
                    begun = time.monotonic_ns()
                    answer = change()
                    took = float(time.monotonic_ns() - begun)
                    if answer < 0:
                        raise map_error(-answer, f"Timing the {name}")
                    if i >= _WARM_UP:
                        rows.append({"change": name, "load": load, "ns": took})

        timed = Event()

        def sweep() -> None:
            while not timed.is_set():
                self._functions["sweep_published"].test_run(repeat=_CHUNK)

        def change_all() -> None:
            try:
                time_all("a program reads")
            finally:
                timed.set()

        together(partial(time_all, "idle"))
        together(sweep, change_all)
        return rows
