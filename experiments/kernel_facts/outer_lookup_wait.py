"""Whether a process that looks an inner map up waits for every program that runs."""

from __future__ import annotations

import bisect
import functools
import platform
import resource
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np

from labkit.errors import Unavailable
from labkit.figures import Axes, style
from labkit.kernel import programs
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.programs import BpfObject
from labkit.lab.experiment import Case, Counted, Statement, experiment
from labkit.runs import Run

_LOOKUP: Final = "bpf_map_copy_value"  # what bpf(2) calls for a lookup
_WAIT: Final = "synchronize_rcu"
_CALLS: Final = (0xE8, 0xE9)  # call and jump, each followed by the distance in 4 bytes


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the median call of each sort, and how many waited for the kernel's readers."""
    ax = style.axes(ax, height=1.8)
    counts = run.counts
    labels = [run.label(case).replace(", ", ",\n") for case in counts["case"]]
    median_us = counts["cost_ns"].to_numpy() / 1e3
    ax.barh(labels, median_us, 0.6, color=style.BLUE)
    for y, (waited, calls, x) in enumerate(
        zip(counts["anomalies"], counts["operations"], median_us, strict=True)
    ):
        ax.text(x, y, f" {waited} of {calls} waited", va="center", fontsize=6.5)
    ax.set_xscale("log")
    ax.set_xlim(median_us.min() / 2, median_us.max() * 60)
    ax.tick_params(axis="y", labelsize=6.5)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel("median call, Python included [µs]", loc="right")
    return ax


@experiment(
    "outer-lookup-wait",
    number=56,
    family="kernel-facts",
    question="Does a process that asks which inner map is in force wait for every program?",
    claims=("4.3",),
    needs=("bpf", "compile", "test_run", "two_cpus", "map_in_map"),
    quick={"calls": 50, "rounds": 1},
    full={"calls": 500, "rounds": 1},
    cases=(
        Case("broken", "switch", "inner map switched, by a process"),
        Case("control", "array-lookup", "lookup in an array, by a process"),
        # Broken where the kernel's lookup waits.
        Case("broken", "process-lookup", "lookup in the outer map, by a process"),
        Case("fixed", "program-lookup", "lookup in the outer map, by a program"),
    ),
    counted=Counted("call that waited", operations="calls", anomalies="waited", cost_ns="call_ns"),
    statements=(
        Statement("a switch of the inner map waits", 'all(broken["switch"])'),
        Statement("a lookup in a plain array does not", "none(control)"),
        Statement("nor does a program's lookup in the outer map", "none(fixed)"),
        Statement("a process's lookup in it waits if the kernel's code for it does, or never",
                  'all(rounds(calls > 0, case="process-lookup").waits_by_code) and '
                  'all(broken["process-lookup"]) or '
                  'none(rounds(calls > 0, case="process-lookup").waits_by_code) and '
                  'none(broken["process-lookup"], like=broken["switch"])'),
    ),
    sentence="A process that looked up which inner map is in force waited for the kernel's readers "
    'in {broken["process-lookup"]} lookups; the kernel\'s code for a lookup waits: '
    '{first(rounds.waits_by_code)}. A switch waited in {broken["switch"]}, a program\'s lookup in '
    "{fixed}, a lookup in a plain array in {control}. A switch took "
    '{ms(median(rounds(case="switch").call_ns))}, the process\'s lookup '
    '{ms(median(rounds(case="process-lookup").call_ns))}.',
    figure=_figure,
)  # fmt: skip
def outer_lookup_wait(case: Case, *, calls: int) -> dict[str, Any]:
    """Make one sort of calls on an outer map or on a plain array, and count those that waited.

    The update of an outer map waits until every program has ended that might still hold the old
    inner map (``maybe_wait_bpf_programs``, kernel/bpf/syscall.c). Until Linux 6.8 (c26f2a890139)
    the lookup waited in the same way, for nothing: a follower that asked which map is in force
    paid a grace period for each look, and each empty slot of a snapshot one more. Whether this
    kernel's lookup should wait is read from its machine code: does ``bpf_map_copy_value`` call
    ``synchronize_rcu``?

    Parameters
    ----------
    case : Case
        Sort of calls.
    calls : int
        In a round.

    Returns
    -------
    dict
        ``calls``, ``waited`` (calls in which the thread gave its CPU up of its own accord),
        ``call_ns`` (median, Python included) and ``waits_by_code`` (bool).
    """
    waits_by_code = _lookup_waits()
    with (
        Map.create(MapKind.ARRAY, key="u4", value="u4", max_entries=1) as plain,
        Map.create(MapKind.ARRAY, key="u4", value="u4", max_entries=1) as other,
        Map.create(
            MapKind.ARRAY_OF_MAPS, key="u4", value="u4", max_entries=1, inner=plain
        ) as outer,
        ExitStack() as stack,
    ):
        inners = plain.fd, other.fd
        outer.update(0, plain.fd)
        sorts: dict[str, Callable[[int], object]] = {
            "switch": lambda turn: outer.update(0, inners[turn % 2]),
            "array-lookup": lambda turn: plain.lookup(0),
            "process-lookup": lambda turn: outer.lookup(0),
        }
        if case.id == "program-lookup":
            loaded = stack.enter_context(_program(outer))
            look = loaded.program("look")
            sorts[case.id] = lambda turn: look.test_run()
        call, took, waited = sorts[case.id], np.zeros(calls, np.int64), 0
        for turn in range(calls):
            plain.lookup(0)  # whoever comes after a long wait finds cold caches
            before, begun = _waits(), time.monotonic_ns()
            call(turn)
            took[turn] = time.monotonic_ns() - begun
            waited += _waits() > before
    return {"calls": calls, "waited": waited, "call_ns": float(np.median(took)),
            "waits_by_code": waits_by_code}  # fmt: skip


def _waits() -> int:
    """How often this thread gave its CPU up of its own accord."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def _program(outer: Map, *, start: int = 0, words: int = 1) -> BpfObject:
    """The program that looks a slot of ``outer`` up, or reads the kernel's code from ``start``."""
    signed = start - (1 << 64) if start >> 63 else start  # the compiler takes none above 2**63
    return programs.load("outer_lookup_wait", OUTER_FD=outer.fd, WORDS=words, START=signed)


@functools.cache
def _lookup_waits() -> bool:
    """Whether the kernel's function for a lookup by bpf(2) calls the one that waits."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(f"The machine code of {platform.machine()} is not known: use x86-64.")
    symbols = [line.split()[:3] for line in Path("/proc/kallsyms").read_text().splitlines()]
    places = {name: int(address, 16) for address, _, name in symbols}
    if not places.get(_LOOKUP) or not places.get(_WAIT):
        raise Unavailable(f"/proc/kallsyms does not say where {_LOOKUP} is: ask as root.")
    start, every = places[_LOOKUP], sorted(set(places.values()))
    end = every[bisect.bisect_right(every, start)]
    words = (end - start) // 8
    with (
        Map.create(MapKind.ARRAY, key="u4", value="u4", max_entries=1) as any_map,
        _program(any_map, start=start, words=words) as loaded,
    ):
        if loaded.program("read_code").test_run().value != words:
            raise Unavailable("This kernel does not let a program read the kernel's code.")
        code = loaded.map("code").snapshot().values.astype("<u8").tobytes()
    targets = {
        start + at + 5 + int.from_bytes(code[at + 1 : at + 5], "little", signed=True)
        for at in range(len(code) - 4)
        if code[at] in _CALLS
    }
    return places[_WAIT] in targets
