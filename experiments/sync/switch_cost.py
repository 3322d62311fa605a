"""What it costs to switch all keys at once, and who may still read what is filled next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import TimedOut
from labkit.figures import Axes, mixed_readings, stacked, times_of_changes
from labkit.kernel import programs
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.maps import KeyAbsent, Map
from labkit.kernel.parallel import Child, cpus, together
from labkit.kernel.programs import BpfObject
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say
from labkit.runs import Run
from labkit.sync.double_map import IN_FORCE, DoubleMapWriter, IndexFlipWriter, Layout

_KEYS = 256  # of the table that programs read
_WORK_BYTES = 1 << 22  # copied for each key: a reading lasts some 40 ms, longer than a switch
_LEAST = 4  # generations that every setting sees, and mixed readings where they are expected
_LIMIT_S = 30.0
_TICK_S = 0.001  # a writer that waits for readings to end asks so often
_ORDINARY, _SLEEPABLE = ProgramKind.TC, ProgramKind.SYSCALL

Values = npt.NDArray[np.uint64]
Change = Callable[[int], object]


_CASES = (
    Case("broken", "reuse-sleepable", "old map filled again after the switch, sleepable program",
         writer="reuse", reader="sweep_published", kind=_SLEEPABLE),
    Case("broken", "flip-ordinary", "old half filled again at once, ordinary program",
         writer="flip_twice", reader="sweep_half", kind=_ORDINARY),
    Case("broken", "flip-wait-sleepable", "old half filled again after a wait, sleepable program",
         writer="flip_and_wait", reader="sweep_half", kind=_SLEEPABLE),
    Case("control", "reuse-ordinary", "old map filled again after the switch, ordinary program",
         writer="reuse", reader="sweep_published", kind=_ORDINARY),
    Case("fixed", "publish-sleepable", "a new map for each generation, sleepable program",
         writer="publish", reader="sweep_published", kind=_SLEEPABLE),
    Case("fixed", "publish-ordinary", "a new map for each generation, ordinary program",
         writer="publish", reader="sweep_published", kind=_ORDINARY),
    Case("fixed", "flip-wait-ordinary", "old half filled again after a wait, ordinary program",
         writer="flip_and_wait", reader="sweep_half", kind=_ORDINARY),
    Case("fixed", "flip-compared", "old half filled at once, sleepable program that compares",
         writer="flip_twice", reader="sweep_half_and_compare", kind=_SLEEPABLE),
)  # fmt: skip
# Ways to publish that are timed: methods of `_Table`.
_CHANGES = {
    "in_place": "batch update in place",
    "flip": "index flip",
    "flip_and_wait": "index flip that waits",
    "reuse": "old map filled again, switch",
    "publish": "new map, switch",
}
_LOADS = {"idle": "idle", "busy": "both CPUs busy"}


def _times(run: Run, ax: Axes) -> None:
    """The time of every way to publish the smallest and the largest table."""
    costs = run.table("costs")
    costs = costs[costs["keys"].isin([costs["keys"].min(), costs["keys"].max()])]
    series = costs["keys"].map("{:,} keys, ".format) + costs["load"].map(_LOADS)
    costs = costs.assign(series=series, change=costs["change"].map(_CHANGES))
    times_of_changes(ax, costs, unit="ms per generation", unit_ns=1e6)


def _waits(change: str) -> Statement:
    """Of two ways to publish the smallest table, one waits for a grace period."""
    return Statement(
        f"it waits for a grace period: {_CHANGES[change]}",
        f'ratio(costs(change="{change}", keys=min(parameters.keys), load="idle").ns, '
        'costs(change="flip", keys=min(parameters.keys), load="idle").ns) > 2',
    )


@experiment(
    "switch-cost",
    number=47,
    family="sync",
    question="When may the old generation's memory be filled again, and what does a switch cost?",
    claims=("4.3",),
    needs=("bpf", "compile", "test_run", "two_cpus", "syscall_program", "map_in_map"),
    quick={"sweeps": 13, "keys": [64, 16_384], "switches": 7},
    full={"sweeps": 150, "keys": [64, 1_024, 16_384, 131_072], "switches": 25},
    cases=_CASES,
    counted=Counted("mixed reading", operations="readings", anomalies="mixed",
                    cost_ns="change_ns", of="sweeps"),
    statements=(
        Statement("mixed", "some(broken)"),
        Statement("whole generations, where the switch waits for who reads", "none(control)"),
        Statement("whole generations", "none(fixed)"),
        Statement("every reader saw the table change", "all(sweeps.generations > 0)"),
        Statement("the program that compares threw readings away",
                  'all(sweeps(case="flip-compared").moved > 0)'),
        *map(_waits, ("flip_and_wait", "reuse", "publish")),
    ),
    sentence="Old memory filled again while it was read: mixed in {broken} readings; with a new "
    "map, a wait for ordinary programs, or a second look by sleepable ones: {fixed}. A switch of "
    "{min(parameters.keys)} keys took "
    '{ms(median(costs(change="publish", keys=min(parameters.keys), load="idle").ns))} idle, '
    '{ms(median(costs(change="publish", keys=min(parameters.keys), load="busy").ns))} with both '
    'CPUs busy, an index flip '
    '{ms(median(costs(change="flip", keys=min(parameters.keys), load="idle").ns))}; of '
    "{max(parameters.keys)} keys "
    '{ms(median(costs(change="publish", keys=max(parameters.keys), load="idle").ns))} with a new '
    'map and {ms(median(costs(change="reuse", keys=max(parameters.keys), load="idle").ns))} with '
    "the old one. Beside an ordinary program that reads slowly a switch took "
    '{ms(fixed["publish-ordinary"].cost_ns)}: it waits for the end of the reading.',
    figure=stacked(mixed_readings, _times, height=5.4, ratios=(1.3, 1)),
)  # fmt: skip
def switch_cost(*, sweeps: int, keys: list[int], switches: int) -> Tables:
    """Publish generation after generation beside slow programs, then time each way to publish.

    The update of an outer map returns when every ordinary program that might hold the old inner
    map has ended (kernel/bpf/syscall.c, ``maybe_wait_bpf_programs``); a flip of an index waits
    for nobody, and can borrow that wait from an outer map that nobody reads. For sleepable
    programs there is no wait: the memory must not be filled again (a new map, which the kernel
    frees when they are gone), or they have to look afterwards whether their generation is still
    in force.

    Parameters
    ----------
    sweeps : int
        Readings of the whole table in each setting, at the least. Readings go on until four
        generations were seen, and in the broken variant until four of them were mixed: its
        counts show that it happens, not how often.
    keys : list of int
        Sizes of the tables whose publication is timed.
    switches : int
        Publications of each kind, size and load that are timed.

    Returns
    -------
    dict of DataFrame
        ``sweeps``: per ``variant`` and ``case``, ``readings`` of the whole table, ``mixed`` (those
        that saw several generations), ``moved`` (readings that found their generation replaced and
        were thrown away), ``generations`` (seen), ``publications``, and ``change_ns``, the median
        time of one beside that reader. ``costs``: one row per timed publication with ``change``
        (a method of `_Table`), ``keys``, ``load`` (idle, or busy: both CPUs), ``round`` and ``ns``
        (int64).
    """
    rows: list[dict[str, object]] = []
    with programs.load("double_map", KEYS=_KEYS, WORK_BYTES=_WORK_BYTES) as loaded:
        for case in _CASES:
            say(f"{case.variant}: {case.label}")
            with _Table(
                Layout("u4", "u8", _KEYS, MapKind.ARRAY),
                outer=loaded.map("outer"), halves=loaded.map("halves"), word=loaded.map("word"),
            ) as table:  # fmt: skip
                seen, took_ns = _sweep(loaded, case, getattr(table, case.writer), sweeps)
            rows.append(
                {
                    "variant": case.variant,
                    "case": case.id,
                    "readings": int(seen["sweeps"]),
                    "mixed": int(seen["mixed"]),
                    "moved": int(seen["moved"]),
                    "generations": int(seen["generations"]),
                    "publications": len(took_ns),
                    "change_ns": float(np.median(took_ns)),
                }
            )
    costs = [row for size in keys for row in _costs(size, switches)]
    return {"sweeps": pd.DataFrame(rows), "costs": pd.DataFrame(costs)}


def _sweep(loaded: BpfObject, case: Case, change: Change, sweeps: int) -> tuple[np.void, list[int]]:
    """What the program counted beside the writer, and the time of each publication."""
    program, counts = loaded.program(case.reader, case.kind), loaded.map("counts")
    counts.update(0, (0,) * 5)
    change(1)
    least, ended = "mixed" if case.variant == "broken" else "generations", Event()
    took_ns: list[int] = []
    readings = 0

    def read() -> np.void:
        nonlocal readings
        deadline = time.monotonic() + _LIMIT_S
        try:
            while True:
                seen: np.void = counts.lookup(0)
                if seen["sweeps"] >= sweeps and seen[least] >= _LEAST:
                    return seen
                if time.monotonic() > deadline:
                    if least == "mixed":
                        return seen  # the statement tells that none was
                    raise TimedOut(f"The writer of switch-cost stood still ({case.label}).")
                program.test_run()
                readings += 1
        finally:
            ended.set()

    def write() -> None:
        number = 2
        while not ended.is_set():
            begun = time.monotonic_ns()
            change(number)
            took_ns.append(time.monotonic_ns() - begun)
            number += 1
            if case.writer == "flip_twice":
                # Of these two readings the second finds its generation in force to the end.
                enough = readings + 2
                while readings < enough and not ended.is_set():
                    time.sleep(_TICK_S)

    seen: np.void = together(read, write)[0]
    return seen, took_ns


@dataclass
class _Table:
    """One table in all its forms, and the ways to publish its generation of some number."""

    layout: Layout
    outer: Map
    halves: Map
    word: Map
    open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> _Table:
        self._keys = np.arange(self.layout.max_entries, dtype=np.uint32)
        self._spares = [self.open.enter_context(self.layout.new("spare")) for _ in range(2)]
        self._flip = self.open.enter_context(IndexFlipWriter(self.halves, self.word))
        self._generations = DoubleMapWriter(self.outer, self.layout)
        self._done = 0  # generations published by the compare-and-refuse writers
        self.word.update(0, 0)
        self.open.callback(self._empty)
        return self

    def _empty(self) -> None:
        with suppress(KeyAbsent):
            self.outer.delete(IN_FORCE)

    def __exit__(self, *_: object) -> None:
        self.open.close()

    def _values(self, number: int) -> Values:
        return np.full(len(self._keys), number, np.uint64)

    def in_place(self, number: int) -> None:
        self._spares[0].update_many(self._keys, self._values(number))

    def reuse(self, number: int) -> None:
        spare = self._spares[number % 2]
        spare.update_many(self._keys, self._values(number))
        self.outer.update(IN_FORCE, spare.fd)

    def publish(self, number: int) -> None:
        self._done = self._generations.publish(
            self._keys, self._values(number), expected=self._done
        )

    def flip(self, number: int) -> None:
        half = self._keys + number % 2 * len(self._keys)
        self.halves.update_many(half, self._values(number))
        self.word.update(0, number)

    def flip_twice(self, number: int) -> None:
        self.flip(2 * number)
        self.flip(2 * number + 1)

    def flip_and_wait(self, number: int) -> None:
        self._done = self._flip.publish(self._values(number), expected=self._done)


def _costs(keys: int, switches: int) -> list[dict[str, object]]:
    """Time each way to publish a table of some size, idle and while both CPUs are busy."""
    rows: list[dict[str, object]] = []
    layout = Layout("u4", "u8", keys)
    with ExitStack() as stack:

        def array(value: str, entries: int) -> Map:
            return stack.enter_context(Layout("u4", value, entries, MapKind.ARRAY).new("labkit"))

        tables = {
            method: stack.enter_context(
                _Table(
                    layout,
                    stack.enter_context(layout.outer()),
                    array("u8", 2 * keys),
                    array("u8", 1),
                )
            )
            for method in _CHANGES
        }

        def time_all(load: str) -> None:
            say(f"timing {keys:,} keys, {_LOADS[load]}")
            for turn in range(switches + 1):  # the first is not kept
                for method, table in tables.items():
                    change: Change = getattr(table, method)
                    begun = time.monotonic_ns()
                    change(turn)
                    took = time.monotonic_ns() - begun
                    if turn:
                        about = {"change": method, "keys": keys, "load": load}
                        rows.append({**about, "round": turn - 1, "ns": took})

        time_all("idle")
        with _busy():
            time_all("busy")
    return rows


@contextmanager
def _busy() -> Iterator[None]:
    """One process that spins on each CPU."""

    def spin() -> None:
        deadline = time.monotonic() + 4 * _LIMIT_S
        while time.monotonic() < deadline:
            pass

    with ExitStack() as stack:
        for cpu in cpus():
            stack.enter_context(Child(spin, cpu=cpu))
        yield
