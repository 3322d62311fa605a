"""A perf event array holds no events: who looks them up gets an errno, who reads the rings all."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import TimedOut
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import libbpf, programs
from labkit.kernel.parallel import cpus
from labkit.kernel.ringbuf import RingReader

_EVENT = np.dtype([("seq", "u8"), ("value", "u8")])
_PAGES = 16  # of the perf buffer of each CPU
_POLL_MS = 10
_LIMIT_S = 30.0
_NUMBERS = ctypes.POINTER(ctypes.c_uint64)


@experiment(
    "perf-array-lookup",
    number=33,
    family="kernel-facts",
    question="Can the events of a perf event array be had by looking its keys up?",
    claims=("5.1", "5.3"),
    needs=("bpf", "compile", "test_run", "ringbuf", "perf_buffer"),
    quick={"bursts": 40, "burst": 50},
    full={"bursts": 400, "burst": 50},
)
def perf_array_lookup(*, bursts: int, burst: int) -> Tables:
    """Send events, and after each burst look them up, and read them from the two buffers.

    The value of a ``BPF_MAP_TYPE_PERF_EVENT_ARRAY`` is a perf event that user space put there,
    one for each CPU; the events lie in the ring of pages that belongs to it. User space has no
    lookup: ``bpf_map_copy_value`` (kernel/bpf/syscall.c) finds no operation and answers
    ENOTSUPP, 524.

    Parameters
    ----------
    bursts : int
        How often events are sent and looked for.
    burst : int
        Events of one burst; all fit into either buffer.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a lookup, an anomaly one that was refused; of the buffers an
        operation is an event, an anomaly one that was not delivered as it was sent.
        ``cost_ns`` is per operation, Python's part included. ``answers``: ``map``, ``key``,
        ``answer`` (0 or minus the errno), ``times``.
    """
    triad = Triad("refused lookup")
    with programs.load("perf_array_lookup") as unit, RingReader(unit.map("ring"), _EVENT) as reader:
        perf, array = unit.map("perf"), unit.map("newest")
        send = unit.function("send")
        bpf = unit.table("perf").bpf  # not the table itself: closing the unit must end it
        by_perf: list[tuple[int, int]] = []

        def record(_cpu: int, data: int, _size: int) -> None:
            numbers = ctypes.cast(data, _NUMBERS)
            by_perf.append((numbers[0], numbers[1]))

        unit.table("perf").open_perf_buffer(record, page_cnt=_PAGES)
        by_ring: list[tuple[int, int]] = []
        asked: dict[tuple[str, int], list[int]] = {}
        spent = {"lookup": 0, "array": 0, "perf": 0, "ring": 0}
        say(f"{bursts} bursts of {burst} events")
        for number in range(1, bursts + 1):
            send.test_run(repeat=burst)
            for name, one, keys in (("perf", perf, cpus()), ("array", array, [0])):
                for key in keys:
                    answer, ns = _look_up(one.fd, key, one.value_size)
                    asked.setdefault((name, key), []).append(answer)
                    spent["lookup" if name == "perf" else "array"] += ns
            sent = number * burst
            spent["perf"] += _drain(by_perf, sent, lambda: bpf.perf_buffer_poll(_POLL_MS))
            spent["ring"] += _drain(
                by_ring, sent, lambda: by_ring.extend(reader.poll(_POLL_MS / 1e3).tolist())
            )
        sent = int(array.lookup(0))
    _count(triad, asked, spent, sent, by_perf, by_ring)
    answers = [
        {"map": name, "key": key, "answer": int(answer), "times": int(times)}
        for (name, key), given in asked.items()
        for answer, times in zip(*np.unique(given, return_counts=True), strict=True)
    ]
    return {"counts": triad.table(), "answers": pd.DataFrame(answers)}


def _look_up(fd: int, key: int, value_size: int) -> tuple[int, int]:
    """Answer of one lookup, and nanoseconds."""
    packed, room = ctypes.c_uint32(key), ctypes.create_string_buffer(value_size)
    begun = time.monotonic_ns()
    answer = libbpf.api().bpf_map_lookup_elem(fd, ctypes.byref(packed), room)
    return int(answer), time.monotonic_ns() - begun


def _drain(seen: list[tuple[int, int]], sent: int, take: Callable[[], object]) -> int:
    """Take what has been sent; answers nanoseconds."""
    begun = time.monotonic_ns()
    while len(seen) < sent:
        take()
        if time.monotonic_ns() - begun > _LIMIT_S * 1e9:
            raise TimedOut(f"Of {sent} events {len(seen)} came within {_LIMIT_S:g} s.")
    return time.monotonic_ns() - begun


def _count(
    triad: Triad,
    asked: dict[tuple[str, int], list[int]],
    spent: dict[str, int],
    sent: int,
    by_perf: list[tuple[int, int]],
    by_ring: list[tuple[int, int]],
) -> None:
    for variant, case, name, way in (
        ("broken", "lookup of a perf event array", "perf", "lookup"),
        ("control", "lookup of an array", "array", "array"),
    ):
        given = [answer for (of, _), many in asked.items() if of == name for answer in many]
        triad.add(variant, case=case, operations=len(given),
                  anomalies=sum(answer != 0 for answer in given),
                  cost_ns=spent[way] / len(given))  # fmt: skip
    meant = {(seq, seq * 3) for seq in range(1, sent + 1)}
    for case, seen, way in (
        ("perf buffer", by_perf, "perf"),
        ("ring buffer in its place", by_ring, "ring"),
    ):
        triad.add("fixed", case=case, operations=sent, anomalies=len(meant - set(seen)),
                  anomaly="event not delivered", cost_ns=spent[way] / sent)  # fmt: skip
