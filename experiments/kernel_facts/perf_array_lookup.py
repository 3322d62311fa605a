"""A perf event array holds no events: who looks them up gets an errno, who reads the rings all."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from labkit.errors import TimedOut
from labkit.kernel import libbpf, programs
from labkit.kernel.parallel import cpus
from labkit.kernel.ringbuf import RingReader
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment

_EVENT = np.dtype([("seq", "u8"), ("value", "u8")])
_PAGES = 16  # of the perf buffer of each CPU
_POLL_MS = 10
_LIMIT_S = 30.0
_NUMBERS = ctypes.POINTER(ctypes.c_uint64)


_COUNTED = Counted("refused lookup", operations="operations", anomalies="anomalies", cost_ns="ns")


def _counted(tables: Tables) -> Tables:
    counts = _COUNTED.table(tables["rounds"])
    counts.loc[counts["variant"] == "fixed", "anomaly"] = "event not delivered"
    return {"counts": counts}


@experiment(
    "perf-array-lookup",
    number=33,
    family="kernel-facts",
    question="Can the events of a perf event array be had by looking its keys up?",
    claims=("5.1", "5.3"),
    needs=("bpf", "compile", "test_run", "ringbuf", "perf_buffer"),
    quick={"bursts": 40, "burst": 50, "rounds": 1},
    full={"bursts": 400, "burst": 50, "rounds": 1},
    cases=(
        Case("broken", "perf-array", "lookup of a perf event array"),
        Case("control", "array", "lookup of an array", beside="perf-array"),
        Case("fixed", "perf-buffer", "perf buffer", beside="perf-array"),
        Case("fixed", "ring-buffer", "ring buffer in its place", beside="perf-array"),
    ),
    derive=_counted,
    statements=(
        # The kernel's own ENOTSUPP; the C library has no name for it.
        Statement("every lookup of a perf event array is refused with ENOTSUPP, 524",
                  "all(broken) and all(answers(map='perf').answer == -524)"),
        Statement("the same call on an array is answered", "none(control)"),
        Statement("a perf buffer delivers every event", "none(fixed['perf-buffer'])"),
        Statement("so does a ring buffer in its place", "none(fixed['ring-buffer'])"),
    ),
    sentence="The kernel refused {broken} lookups of a perf event array, with errno "
    "{-answers(map='perf').answer}, while it held {fixed['perf-buffer'].operations} events in the "
    "rings behind it. The perf buffer missed {fixed['perf-buffer']} of them, a ring buffer in its "
    "place {fixed['ring-buffer']}.",
)  # fmt: skip
def perf_array_lookup(case: Case, *, bursts: int, burst: int) -> list[dict[str, Any]]:
    """Send events, and after each burst look them up, and read them from the two buffers.

    The value of a ``BPF_MAP_TYPE_PERF_EVENT_ARRAY`` is a perf event that user space put there,
    one for each CPU; the events lie in the ring of pages that belongs to it. User space has no
    lookup: ``bpf_map_copy_value`` (kernel/bpf/syscall.c) finds no operation and answers
    ENOTSUPP, 524.

    Parameters
    ----------
    case : Case
        Of which all others are beside.
    bursts : int
        How often events are sent and looked for.
    burst : int
        Events of one burst; all fit into either buffer.

    Returns
    -------
    list of dict
        For each case ``operations`` (lookups, or events that were sent), ``anomalies`` (refused
        lookups, or events that were not delivered as they were sent), ``ns`` (per operation,
        Python's part included); for the lookups the table ``answers``: ``map``, ``key``,
        ``answer`` (0 or minus the errno), ``times``.
    """
    with (
        programs.load_by_bcc("perf_array_lookup") as loaded,
        RingReader(loaded.map("ring"), _EVENT) as reader,
    ):
        perf, array = loaded.map("perf"), loaded.map("newest")
        send = loaded.program("send")
        bpf = loaded.table("perf").bpf  # not the table itself: closing the object must end it
        by_perf: list[tuple[int, int]] = []

        def record(_cpu: int, data: int, _size: int) -> None:
            numbers = ctypes.cast(data, _NUMBERS)
            by_perf.append((numbers[0], numbers[1]))

        loaded.table("perf").open_perf_buffer(record, page_cnt=_PAGES)
        by_ring: list[tuple[int, int]] = []
        asked: dict[tuple[str, int], list[int]] = {}
        spent = {"perf-array": 0, "array": 0, "perf-buffer": 0, "ring-buffer": 0}
        for number in range(1, bursts + 1):
            send.test_run(repeat=burst)
            for name, one, keys in (("perf", perf, cpus()), ("array", array, [0])):
                for key in keys:
                    answer, ns = _look_up(one.fd, key, one.value_size)
                    asked.setdefault((name, key), []).append(answer)
                    spent["perf-array" if name == "perf" else "array"] += ns
            sent = number * burst
            spent["perf-buffer"] += _drain(by_perf, sent, lambda: bpf.perf_buffer_poll(_POLL_MS))
            spent["ring-buffer"] += _drain(
                by_ring, sent, lambda: by_ring.extend(reader.poll(_POLL_MS / 1e3).tolist())
            )
        sent = int(array.lookup(0))
    meant = {(seq, seq * 3) for seq in range(1, sent + 1)}
    rows = [
        {"case": "perf-array", **_answered(asked, "perf")},
        {"case": "array", **_answered(asked, "array")},
        {"case": "perf-buffer", "operations": sent, "anomalies": len(meant - set(by_perf))},
        {"case": "ring-buffer", "operations": sent, "anomalies": len(meant - set(by_ring))},
    ]
    return [{**row, "ns": spent[row["case"]] / row["operations"]} for row in rows]


def _answered(asked: dict[tuple[str, int], list[int]], map: str) -> dict[str, Any]:
    """What the lookups of one map were answered."""
    given = pd.DataFrame(
        [
            {"map": name, "key": key, "answer": answer}
            for (name, key), answers in asked.items()
            for answer in answers
            if name == map
        ]
    )
    return {
        "operations": len(given),
        "anomalies": int((given["answer"] != 0).sum()),
        "answers": given.value_counts(sort=False).reset_index(name="times"),
    }


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
