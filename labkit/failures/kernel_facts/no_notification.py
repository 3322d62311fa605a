"""A map tells nobody that it changed: what poll and epoll answer on the descriptor of a map."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import programs
from labkit.kernel.parallel import together
from labkit.kernel.programs import Function, Unit
from labkit.kernel.ringbuf import RingReader

_EVENT = np.dtype([("version", "u8"), ("sent_ns", "u8")])
_RING = "events"
_CHANGE_AFTER_S = 0.002  # the follower waits by then
_TOLD_WITHIN_S = 2.0  # how long to wait for an event that was sent
_LONGEST_WAIT_MS = 1_000

Wait = Callable[[float], int]
"""Waits so many seconds at most; answers the events of the descriptor, 0 when time was up."""


@contextmanager
def _poll(fd: int) -> Iterator[Wait]:
    poll = select.poll()
    poll.register(fd, select.POLLIN)

    def wait(limit_s: float) -> int:
        return sum(events for _, events in poll.poll(1e3 * limit_s))

    yield wait


@contextmanager
def _epoll(fd: int, edge: int = 0) -> Iterator[Wait]:
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN | edge)

        def wait(limit_s: float) -> int:
            return sum(events for _, events in epoll.poll(limit_s))

        yield wait


@contextmanager
def _edges(fd: int) -> Iterator[Wait]:
    with _epoll(fd, select.EPOLLET) as wait:
        wait(0.0)  # an edge is reported once, and here at the start
        yield wait


_WAYS = {"poll": _poll, "epoll": _epoll, "epoll, edges only": _edges}


@dataclass(frozen=True)
class _Watch:
    way: str
    map: str

    @property
    def case(self) -> str:
        return f"{self.way} on {'a ring buffer' if self.map == _RING else self.map}"


_WATCHES = (
    *(
        _Watch("poll", name)
        for name in ("array", "hash", "lru_hash", "percpu_array", "percpu_hash")
    ),
    _Watch("epoll", "hash"),
    _Watch("epoll, edges only", "hash"),
    _Watch("poll", _RING),
    _Watch("epoll", _RING),
)


@experiment(
    "no-notification",
    number=31,
    family="kernel-facts",
    question="Does poll or epoll on a map's descriptor tell that the map has changed?",
    claims=("3.1a",),
    needs=("bpf", "compile", "test_run", "hash", "lru", "percpu", "ringbuf"),
    quick={"polls": 12, "wait_ms": 20},
    full={"polls": 100, "wait_ms": 40},
)
def no_notification(*, polls: int, wait_ms: int) -> Tables:
    """Wait on maps of each kind and on a ring buffer, while a program changes them or does not.

    Only ring buffers can be waited for: ``bpf_map_poll`` answers EPOLLERR for every map type
    that has no poll operation of its own (kernel/bpf/syscall.c). Maps keep no list of who
    waits, so nothing wakes a follower later either. The program that changes the maps
    changes all of them in one run, and sends one event.

    Parameters
    ----------
    polls : int
        Waits on every descriptor in which the maps change 2 ms after it began, and as many
        in which nothing happens.
    wait_ms : int
        How long to wait where no answer is due, milliseconds; 5 to 1000.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a change, an anomaly one of which the answer tells
        nothing; in the control an operation is a wait without a change, an anomaly one that
        was answered all the same. ``cost_ns`` of a told change is the median time from its
        event until Python went on, its own wake-up included. ``polls``: one row per wait
        with columns ``way``, ``map``, ``case``, ``changed`` (bool), ``turn``, ``events``
        (the answer; 0: time was up), ``events_after`` (a second look, after the change),
        ``told`` (bool: POLLIN, and the event of this change could be read), ``waited_ms``,
        ``change_ms`` (after the wait began) and ``told_ns`` (after the event was sent;
        float64, NaN where it does not apply).
    """
    if not 1e3 * _CHANGE_AFTER_S < wait_ms <= _LONGEST_WAIT_MS:
        raise BadInput(f"wait_ms of no-notification is above 2 and at most {_LONGEST_WAIT_MS}.")
    rows = []
    with (
        programs.load("no_notification") as unit,
        RingReader(unit.map(_RING), _EVENT, batch=64) as reader,
    ):
        change = unit.function("change")
        for watch in _WATCHES:
            say(f"{polls} changes, and {polls} times nothing: {watch.case}")
            rows += _watched(unit, reader, change, watch, polls, wait_ms / 1e3)
    table = pd.DataFrame(rows)
    triad = Triad("change not told")
    for case, group in table.groupby("case", sort=False):
        changed, idle = group[group["changed"]], group[~group["changed"]]
        rings = bool((group["map"] == _RING).all())
        triad.add(
            "fixed" if rings else "broken",
            case=f"{case}, changed",
            operations=len(changed),
            anomalies=int((~changed["told"]).sum()),
            cost_ns=float(changed["told_ns"].median()) if rings else float("nan"),
        )
        if rings:
            triad.add(
                "control",
                case=f"{case}, nothing changed",
                operations=len(idle),
                anomalies=int((idle["events"] != 0).sum()),
                anomaly="woken for nothing",
            )
    return {"counts": triad.table(), "polls": table}


def _watched(
    unit: Unit, reader: RingReader, change: Function, watch: _Watch, polls: int, wait_s: float
) -> list[dict[str, object]]:
    rows = []
    with _WAYS[watch.way](unit.map(watch.map).fd) as wait:
        for turn in range(polls):
            for changed in (True, False):
                waits_s = _TOLD_WITHIN_S if changed and watch.map == _RING else wait_s
                row = _one_wait(reader, change if changed else None, wait, waits_s)
                rows.append(
                    {
                        "way": watch.way,
                        "map": watch.map,
                        "case": watch.case,
                        "changed": changed,
                        "turn": turn,
                        **row,
                    }
                )
    return rows


def _one_wait(
    reader: RingReader, change: Function | None, wait: Wait, limit_s: float
) -> dict[str, object]:
    waiting = Event()

    def follow() -> tuple[int, int, int]:
        begun = time.monotonic_ns()
        waiting.set()
        events = wait(limit_s)
        return begun, events, time.monotonic_ns()

    changed_ns = float("nan")
    if change is None:
        begun, events, answered = follow()
    else:

        def change_soon(change: Function = change) -> int:
            waiting.wait(_TOLD_WITHIN_S)
            time.sleep(_CHANGE_AFTER_S)
            change.test_run()
            return time.monotonic_ns()

        (begun, events, answered), changed_ns = together(follow, change_soon)
    after = wait(0.0)
    sent = reader.read()  # in any case: the ring begins the next wait empty
    told = bool(events & select.POLLIN) and len(sent) == 1
    return {
        "events": events,
        "events_after": after,
        "told": told,
        "waited_ms": (answered - begun) / 1e6,
        "change_ms": (changed_ns - begun) / 1e6,
        "told_ns": float(answered - int(sent["sent_ns"][0])) if told else float("nan"),
    }
