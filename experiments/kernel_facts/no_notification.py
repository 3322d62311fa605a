"""A map tells nobody that it changed: what poll and epoll answer on the descriptor of a map."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event

import numpy as np
import pandas as pd

from labkit.errors import BadInput
from labkit.figures import Axes, style
from labkit.kernel import programs
from labkit.kernel.parallel import together
from labkit.kernel.programs import Program
from labkit.kernel.ringbuf import RingReader
from labkit.lab.experiment import Case, Statement, Tables, experiment, say
from labkit.runs import Run, Triad

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


_WAYS = {"poll": _poll, "epoll": _epoll, "edges": _edges}
_ANSWERED = tuple(
    Case("broken", f"{way}-{map.replace('_', '-')}", f"{way} on {map}, changed", way=way, map=map)
    for way, map in (
        ("poll", "array"), ("poll", "hash"), ("poll", "lru_hash"), ("poll", "percpu_array"),
        ("poll", "percpu_hash"), ("epoll", "hash"),
    )
)  # fmt: skip
_CASES = (
    *_ANSWERED,
    Case("broken", "edges-hash", "epoll, edges only on hash, changed", way="edges", map="hash"),
    Case("fixed", "poll-ring", "poll on a ring buffer, changed", way="poll", map=_RING),
    Case("control", "poll-ring-quiet", "poll on a ring buffer, nothing changed",
         beside="poll-ring", way="poll", map=_RING),
    Case("fixed", "epoll-ring", "epoll on a ring buffer, changed", way="epoll", map=_RING),
    Case("control", "epoll-ring-quiet", "epoll on a ring buffer, nothing changed",
         beside="epoll-ring", way="epoll", map=_RING),
)  # fmt: skip


def _counted(tables: Tables) -> Tables:
    """Changes that were not told, and waits that were answered though nothing changed."""
    polls, triad = tables["polls"], Triad("change not told")
    for case in _CASES:
        rows = polls[polls["case"] == case.id]
        if case.variant == "control":
            triad.add("control", case=case.id, operations=len(rows),
                      anomalies=int((rows["events"] != 0).sum()),
                      anomaly="woken for nothing")  # fmt: skip
        else:
            changed = rows[rows["changed"]]
            triad.add(case.variant, case=case.id, operations=len(changed),
                      anomalies=int((~changed["told"]).sum()),
                      cost_ns=float(changed["told_ns"].median()))  # fmt: skip
    return {"counts": triad.table()}


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw how long each wait took; those with a change above, without below each line."""
    ax = style.axes(ax, height=4.2)
    polls = run.table("polls")
    names = polls["way"].replace({"edges": "epoll for edges\nalone,"}) + " on "
    names += polls["map"].replace({_RING: "a ring buffer"})
    labels = list(names.unique())
    row = names.map(labels.index) + polls["changed"].map({True: -0.17, False: 0.17})
    for label, events, look in (
        ("POLLERR", select.POLLERR, style.VARIANT["broken"]),
        ("no answer", 0, style.VARIANT["control"]),
        ("POLLIN", select.POLLIN, style.VARIANT["fixed"]),
    ):
        chosen = polls["events"] == events
        ax.plot(polls.loc[chosen, "waited_ms"], row[chosen], **look.points(), markersize=3.5,
                alpha=0.6, label=label)  # fmt: skip
    changed = float(polls["change_ms"].median())
    ax.axvline(changed, color=style.BLACK, linewidth=1, linestyle=":")
    ax.annotate(
        "the change", (changed, -0.75), xytext=(-3, 0), textcoords="offset points", ha="right",
        va="center", fontsize=7,
    )  # fmt: skip
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -1.1)
    ax.grid(False, axis="y")
    style.logarithmic(ax)
    ax.set_xlabel("answered after, ms\n(upper row: changed; lower: not)", loc="right")
    style.legend_above(ax, 3, columnspacing=1, handletextpad=0.2)
    return ax


@experiment(
    "no-notification",
    number=31,
    family="kernel-facts",
    question="Does poll or epoll on a map's descriptor tell that the map has changed?",
    claims=("3.1a",),
    needs=("bpf", "compile", "test_run", "hash", "lru", "percpu", "ringbuf"),
    quick={"polls": 12, "wait_ms": 20},
    full={"polls": 100, "wait_ms": 40},
    cases=_CASES,
    derive=_counted,
    statements=(
        Statement("poll and epoll answer POLLERR on every kind of map, and nothing else",
                  "all(polls(map != 'events', way != 'edges').events == 8)"
                  " and all(polls(map != 'events', way != 'edges').events_after == 8)"),
        # The median: on a busy machine the change may come before a follower is on its CPU.
        *(
            Statement(f"they answer before the change that is waited for: {case.label}",
                      f"ratio(polls(case='{case.id}', changed=True).waited_ms,"
                      f" polls(case='{case.id}', changed=True).change_ms) < 1")
            for case in _ANSWERED
        ),
        Statement("epoll for edges alone never answers: nothing wakes it",
                  "all(polls(way='edges').events == 0)"
                  " and all(polls(way='edges').waited_ms >= parameters.wait_ms)"),
        Statement("no answer on a map tells of a change", "all(broken)"),
        Statement("a ring buffer keeps its follower waiting while nothing happens",
                  "none(control)"),
        Statement("it wakes the follower for every event",
                  "none(fixed) and all(polls(map='events', changed=True).events == 1)"),
    ),
    sentence="poll and epoll on maps of five kinds answered POLLERR in "
    "{rows(polls(map != 'events', way != 'edges', events == 8))} of "
    "{rows(polls(map != 'events', way != 'edges'))} waits, changed or not, after "
    "{us(1000000 * median(polls(map != 'events', way != 'edges').waited_ms))}; they told of "
    "{broken.operations - broken.anomalies} of {broken.operations} changes. A ring buffer told of "
    "{fixed.operations - fixed.anomalies} of {fixed.operations}, {us(fixed.cost_ns)} after the "
    "event, and woke nobody in {control.operations - control.anomalies} of {control.operations} "
    "waits without one.",
    figure=_figure,
)  # fmt: skip
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
        ``polls``: one row per wait
        with columns ``way``, ``map``, ``case``, ``changed`` (bool), ``turn``, ``events``
        (the answer; 0: time was up), ``events_after`` (a second look, after the change),
        ``told`` (bool: POLLIN, and the event of this change could be read), ``waited_ms``,
        ``change_ms`` (after the wait began) and ``told_ns`` (after the event was sent;
        float64, NaN where it does not apply).
    """
    if not 1e3 * _CHANGE_AFTER_S < wait_ms <= _LONGEST_WAIT_MS:
        raise BadInput(f"wait_ms of no-notification is above 2 and at most {_LONGEST_WAIT_MS}.")
    rows = []
    quiet = {case.beside: case.id for case in _CASES if case.beside}
    with (
        programs.load("no_notification") as loaded,
        RingReader(loaded.map(_RING), _EVENT, batch=64) as reader,
    ):
        change = loaded.program("change")
        for case in (one for one in _CASES if not one.beside):
            say(f"{polls} changes, and {polls} times nothing: {case.way} on {case.map}")
            with _WAYS[case.way](loaded.map(case.map).fd) as wait:
                for turn in range(polls):
                    for changed in (True, False):
                        due = changed and case.map == _RING
                        limit_s = _TOLD_WITHIN_S if due else wait_ms / 1e3
                        about = {
                            "way": case.way,
                            "map": case.map,
                            "case": case.id if changed else quiet.get(case.id, case.id),
                            "changed": changed,
                            "turn": turn,
                        }
                        observed = _one_wait(reader, change if changed else None, wait, limit_s)
                        rows.append({**about, **observed})
    return {"polls": pd.DataFrame(rows)}


def _one_wait(
    reader: RingReader, change: Program | None, wait: Wait, limit_s: float
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

        def change_soon(change: Program = change) -> int:
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
