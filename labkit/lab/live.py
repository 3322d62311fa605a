"""One strategy under one load, watched while it runs: what the panel of notebook 06 does.

The load runs in a worker process, in windows of a quarter of a second. After each one the worker
tells its figures on a pipe; in the end it saves the run, which is loaded from disk and drawn. A
process has one such run at a time.
"""

from __future__ import annotations

import base64
import json
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit import figures, runs
from labkit.errors import BadInput, LabError
from labkit.figures.live_load import account, latency, live_load
from labkit.judge.statistics import percentiles
from labkit.lab import driver
from labkit.lab.catalogue import find
from labkit.lab.experiment import Experiment, Tables, say
from labkit.lab.measure import RUNS, check_writable
from labkit.lab.worker import Worker
from labkit.load.strategies import DOUBLE_MAP, STRATEGIES
from labkit.load.workload import Generations, Load, Trace
from labkit.runs import Run
from labkit.sync.double_map import DoubleMap

EXPERIMENT: Final = "live-load"
"""Under which the runs are saved and drawn."""

CHOICES: Final = (*STRATEGIES, DOUBLE_MAP)
"""What can be run."""

# Lowest and highest rate, changes per second. A hook follows an ordinary process, which makes one
# system call for each; a double map changes as a whole, at the lowest rate five times a window.
_USUAL_RATES: Final = (100, 1_000_000)
_RATES: Final = {"hook": (100, 100_000), DOUBLE_MAP: (4_000, 100_000)}

MOST_SECONDS: Final = 60
MOST_CHANGES: Final = 10_000_000
MOST_RING_BYTES: Final = 1 << 26

_WINDOW_S = 0.25
_WARM_UP_S = 0.03  # of each window: its writer and follower have only just begun
_RECENT = 2_000  # changes over which the live percentiles go, at least
_KEYS = 200
_TIMER_S = 0.1
_TAIL_POINTS = 100
_START_S = 60.0  # to start the worker, try the kernel's features and compile the writer
_DRAW_S = 60.0
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True)
class Order:
    """What to run.

    Attributes
    ----------
    strategy : str
        One of `CHOICES`.
    rate : int
        Intended changes per second.
    value_bytes : int
        Size of a value: 8 to 1024, whole words.
    ring_bytes : int
        Size of the ring: a power of two and whole pages. A double map has none.
    seconds : int
        After which it ends by itself.

    Raises
    ------
    BadInput
        A value that cannot be; the sentence says what can.
    """

    strategy: str
    rate: int
    value_bytes: int = 8
    ring_bytes: int = 1 << 20
    seconds: int = 20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "strategy" and type(value) is not int:
                raise BadInput(f"{name} is a whole number, not {value!r}.")
        if self.strategy not in CHOICES:
            raise BadInput(f"A strategy is one of {', '.join(CHOICES)}, not {self.strategy!r}.")
        lowest, highest = _RATES.get(self.strategy, _USUAL_RATES)
        if not lowest <= self.rate <= highest:
            raise BadInput(
                f"The rate is {lowest:,} to {highest:,} changes/s with {self.strategy}, "
                f"not {self.rate:,}."
            )
        if self.value_bytes % 8 or not 8 <= self.value_bytes <= 1024:
            raise BadInput(
                f"A value has 8 to 1,024 bytes, in whole words of 8, not {self.value_bytes:,}."
            )
        ring = self.ring_bytes
        if not _PAGE <= ring <= MOST_RING_BYTES or ring & (ring - 1):
            raise BadInput(
                f"A ring's size is a power of two from {_PAGE:,} to {MOST_RING_BYTES:,} bytes, "
                f"not {ring:,}."
            )
        if not 1 <= self.seconds <= MOST_SECONDS:
            raise BadInput(f"A run takes 1 to {MOST_SECONDS} s, not {self.seconds:,}.")
        if self.rate * self.seconds > MOST_CHANGES:
            raise BadInput(
                f"{self.rate:,} changes/s for {self.seconds} s are more than {MOST_CHANGES:,} "
                f"changes: run at most {MOST_CHANGES // self.rate} s."
            )


@dataclass(frozen=True)
class Progress:
    """How a run stands after a window.

    Attributes
    ----------
    at_s : float
        Seconds since the first window began.
    p50_ns, p99_ns : float
        Latency of the newest changes from their intended time, nanoseconds; NaN while there are
        too few of them.
    produced, delivered, dropped, coalesced : int
        Changes since the beginning, as `labkit.sync.strategy.Stats`.
    """

    at_s: float
    p50_ns: float
    p99_ns: float
    produced: int
    delivered: int
    dropped: int
    coalesced: int


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes
    ----------
    run : Run or None
        As it stands on disk; None where nothing was measured.
    picture : bytes
        PNG of its figure; empty where there is none.
    problem : str
        What went wrong, as one sentence; empty where nothing did.
    """

    run: Run | None
    picture: bytes
    problem: str


class Session:
    """One run in the background; it ends the one before it.

    A thread of its own attends to the worker, and the worker lives no longer than that thread:
    nothing is left when this process is killed.

    Parameters
    ----------
    order : Order
        What to run.
    tell : callable
        Gets each `Progress`, in the session's thread.
    end : callable
        Gets the `Ended`, once, in the session's thread.
    folder : Path
        Folder of runs.

    Raises
    ------
    SaveFailed
        The folder cannot be written.
    """

    _newest: Session | None = None
    _lock = threading.Lock()

    def __init__(
        self,
        order: Order,
        tell: Callable[[Progress], None],
        end: Callable[[Ended], None],
        *,
        folder: Path = RUNS,
    ) -> None:
        check_writable(folder)
        self._order, self._tell, self._end, self._folder = order, tell, end, folder
        self._stopped, self._once = threading.Event(), threading.Lock()
        self._wanted, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._attend, name="live-load", daemon=True)
        with Session._lock:
            self._before, Session._newest = Session._newest, self
            if self._before is not None:
                self._before.stop()
            self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ask it to end after the window that runs now, and to save what it has."""
        with self._once:
            if not self._stopped.is_set():
                self._stopped.set()
                os.close(self._stop)  # the worker reads its end

    def join(self, timeout_s: float) -> bool:
        """Wait until it has ended; False where it has not within ``timeout_s`` seconds."""
        self._thread.join(timeout_s)
        return not self.running

    def _attend(self) -> None:
        try:
            if self._before is not None:
                self._before.join(_START_S + _DRAW_S)
                self._before = None
            ended = self._ended()
        except LabError as error:
            ended = Ended(None, b"", str(error))
        except Exception as error:  # shown in the panel: a thread's traceback goes nowhere
            ended = Ended(None, b"", f"{type(error).__name__}: {error}")
        finally:
            self.stop()
            os.close(self._wanted)
        self._end(ended)

    def _ended(self) -> Ended:
        if self._stopped.is_set():
            raise LabError(_NOTHING)
        arguments = {
            "order": asdict(self._order),
            "folder": str(self._folder.absolute()),
            "stop": self._wanted,
        }
        limit_s = _START_S + 3 * self._order.seconds
        with Worker([self._wanted]) as worker:
            path = worker.answer(
                f"{__name__}:measured", arguments, name=EXPERIMENT, limit_s=limit_s, say=self._hear
            )
        run = runs.load(Path(path))
        # Drawn in a process too: matplotlib keeps one state for all threads of this one.
        order = {"path": str(run.path)}
        with Worker() as worker:
            drawn = worker.answer(
                f"{__name__}:drawn", order, name="the figure", limit_s=_DRAW_S, say=self._hear
            )
        picture = base64.b64decode(drawn)
        return Ended(run, picture, "")

    def _hear(self, words: str) -> None:
        with suppress(ValueError, TypeError):  # else noise, which the worker's error quotes
            self._tell(Progress(**json.loads(words)))


def stop_newest(timeout_s: float = 10.0) -> bool:
    """Stop the session of this process that runs, if one does.

    It waits for its end, some seconds, and answers whether nothing runs any more.
    """
    with Session._lock:
        session = Session._newest
    if session is None or not session.running:
        return True
    session.stop()
    return session.join(timeout_s)


# -- what is shown -------------------------------------------------------------------------


def message_html(words: str, *, bad: bool = False) -> str:
    """A sentence for the user; a ``bad`` one is told at once by a screen reader."""
    role, border = ("alert", "#D55E00") if bad else ("status", "#0072B2")
    return (
        f"<div role='{role}' class='labkit-message' style='border-left:4px solid {border};"
        f"padding-left:0.8em;line-height:1.4'>{escape(words)}</div>"
    )


def live_html(progress: Progress | None) -> str:
    """The live figures as a table; None before the first."""
    names = {
        "time (s)": "at_s", "p50 (ms)": "p50_ns", "p99 (ms)": "p99_ns", "produced": "produced",
        "delivered": "delivered", "dropped": "dropped", "passed over": "coalesced",
    }  # fmt: skip
    cells = []
    for name in names.values():
        value = math.nan if progress is None else getattr(progress, name)
        if math.isnan(value):
            cells.append("&ndash;")
        elif name.endswith("_ns"):
            cells.append(f"{value / 1e6:.3f}")
        else:
            cells.append(f"{value:.1f}" if name == "at_s" else f"{value:,}")
    style = (
        "style='text-align:right;padding:0.2em 0.6em;line-height:1.3;vertical-align:bottom;"
        "font-variant-numeric:tabular-nums'"
    )
    head = "".join(f"<th scope='col' {style}>{words}</th>" for words in names)
    body = "".join(
        f"<td class='labkit-{name}' {style}>{cell}</td>"
        for name, cell in zip(names.values(), cells, strict=True)
    )
    return f"<table class='labkit-live'><tr>{head}</tr><tr>{body}</tr></table>"


def figure_html(ended: Ended) -> str:
    """The figure of a run, with its figures as words; empty where there is no run."""
    if ended.run is None:
        return ""
    data = base64.b64encode(ended.picture).decode()
    return (
        f"<img class='labkit-figure' style='max-width:100%;width:60em' "
        f"alt='{escape(summary(ended.run), quote=True)}' src='data:image/png;base64,{data}'>"
    )


def ended_html(ended: Ended) -> str:
    """How a run ended, as a sentence."""
    if ended.run is None:
        return message_html(ended.problem, bad=True)
    path = ended.run.path
    return message_html(f"{summary(ended.run)} Saved as {path.name if path else ''}.")


def summary(run: Run) -> str:
    """What became of the changes of a run, and how late they were, as a sentence."""
    return f"{run.parameters['strategy']}: {account(run)}; {latency(run)}."


# -- in the worker -------------------------------------------------------------------------

_NOTHING = "Stopped before anything was measured; nothing was saved."


def measured(order: dict[str, str | int], folder: str, stop: int) -> str:
    """Run the load, tell the figures after each window, save the run.

    Parameters
    ----------
    order : dict
        The attributes of an `Order`.
    folder : str
        Folder of runs.
    stop : int
        Descriptor that becomes readable when the run is to end.

    Returns
    -------
    str
        The directory of the run.

    Raises
    ------
    Unavailable
        The kernel lacks a feature; the sentence says which and how to get it.
    LabError
        Stopped before anything was measured.
    """
    wanted = Order(**order)  # type: ignore[arg-type]

    def stopped() -> bool:
        return bool(select.select([stop], [], [], 0)[0])

    subject = Experiment(
        id=EXPERIMENT,
        number=0,
        family="sync",
        question="How late and how lossy is one strategy under one load?",
        claims=(),
        needs=find("sync-benchmark").needs,
        profiles={"quick": asdict(wanted)},
        measure=partial(windows, stopped=stopped),
    )
    return str(runs.save(driver.measured(subject), Path(folder)))


def windows(
    *,
    strategy: str,
    rate: int,
    value_bytes: int,
    ring_bytes: int,
    seconds: int,
    stopped: Callable[[], bool],
) -> Tables:
    """Follow a load, window after window, and tell a `Progress` after each on standard error.

    Each window is an open loop of its own, accounted for exactly: a follower attaches, a quarter
    of a second is written, and it comes to rest. The first 30 ms are not judged.

    Parameters
    ----------
    strategy, rate, value_bytes, ring_bytes, seconds
        As for `Order`.
    stopped : callable
        Asked before each window.

    Returns
    -------
    dict of DataFrame
        ``windows``: one row each, with ``at_s`` (its end), ``operations``, ``produced``,
        ``delivered``, ``dropped``, ``coalesced``, ``unseen`` (writes whose version, or a newer
        one, was never seen), ``p50_ns`` and ``p99_ns`` as `Progress`, ``late_p99_ns`` (the
        writer behind its schedule) and ``follower_cpu`` (CPUs). ``tail``: ``share`` of all judged
        changes that were later than ``ns``. ``percentiles``: one row, ``p50_ns``, ``p99_ns``,
        ``p99.9_ns`` of all of them (NaN with fewer than ten beyond) and ``samples``. ``counts``:
        an anomaly is an unseen write.
    """
    order = Order(strategy, rate, value_bytes, ring_bytes, seconds)
    rows: list[dict[str, float]] = []
    latencies: list[npt.NDArray[np.int64]] = []
    recent: deque[npt.NDArray[np.int64]] = deque()
    sums = dict.fromkeys(("produced", "delivered", "dropped", "coalesced"), 0)
    with ExitStack() as stack:
        window = _prepared(order, stack)
        begun = time.monotonic()
        while not stopped() and time.monotonic() - begun < seconds:
            trace = window()
            judged = np.arange(len(trace)) >= _WARM_UP_S * rate / trace.changes
            seen = trace.seen_ns > 0
            late_ns = (trace.seen_ns - trace.intended_ns)[judged & seen].astype(np.int64)
            behind_ns = (trace.start_ns - trace.intended_ns)[judged].astype(np.int64)
            latencies.append(late_ns)
            recent.append(late_ns)
            while sum(map(len, recent)) - len(recent[0]) >= _RECENT:
                recent.popleft()
            of = percentiles(np.concatenate(recent))
            account = {name: int(getattr(trace.stats, name)) for name in sums}
            sums = {name: sums[name] + account[name] for name in sums}
            at_s = time.monotonic() - begun
            now = Progress(at_s, float(of["p50"]), float(of["p99"]), **sums)
            rows.append(
                {
                    "at_s": at_s,
                    "operations": len(trace) * trace.changes,
                    **account,
                    "unseen": int((~seen).sum()) * trace.changes,
                    "p50_ns": now.p50_ns,
                    "p99_ns": now.p99_ns,
                    "late_p99_ns": float(np.percentile(behind_ns, 99)),
                    "follower_cpu": trace.follower_cpu_ns / trace.follower_wall_ns,
                }
            )
            say(json.dumps(asdict(now)))
    if not rows:
        raise LabError(_NOTHING)
    table = pd.DataFrame(rows)
    return {
        "counts": pd.DataFrame(
            {
                "variant": ["fixed"],
                "case": [strategy],
                "operations": [int(table["operations"].sum())],
                "anomalies": [int(table["unseen"].sum())],
                "anomaly": ["write never seen"],
                "cost_ns": [float("nan")],
            }
        ),
        "windows": table,
        **_summary(np.sort(np.concatenate(latencies))),
    }


def _prepared(order: Order, stack: ExitStack) -> Callable[[], Trace]:
    """Make the maps and the writer of an order; the answer runs one window on them."""
    if order.strategy == DOUBLE_MAP:
        published = stack.enter_context(Generations(order.value_bytes, keys=_KEYS))
        switches = round(order.rate * _WINDOW_S / _KEYS)

        def by_switches() -> Trace:
            with DoubleMap(0.001, layout=published.layout) as follower:
                return published.run(follower, rate=order.rate, switches=switches)

        return by_switches
    load = stack.enter_context(
        Load(
            order.value_bytes,
            keys=_KEYS,
            most_operations=round(order.rate * _WINDOW_S),
            ring_bytes=order.ring_bytes,
        )
    )
    writer = "process" if order.strategy == "hook" else "program"

    def by_changes() -> Trace:
        with STRATEGIES[order.strategy](load.channel, _TIMER_S) as follower:
            return load.run(follower, rate=order.rate, seconds=_WINDOW_S, writer=writer)

    return by_changes


def _summary(late_ns: npt.NDArray[np.int64]) -> Tables:
    """The tail and the percentiles of sorted latencies, nanoseconds."""
    count, of = len(late_ns), percentiles(late_ns)
    share = np.geomspace(1 / max(1, count), 1, _TAIL_POINTS if count else 0)
    place = np.clip(count - np.round(share * count), 0, count - 1)
    return {
        "tail": pd.DataFrame({"share": share, "ns": late_ns[place.astype(np.int64)]}),
        "percentiles": pd.DataFrame([{f"{name}_ns": of[name] for name in of.index}]).assign(
            samples=count
        ),
    }


def drawn(path: str) -> str:
    """Draw a saved run.

    Returns
    -------
    str
        PNG in base64.
    """
    figure = figures.draw(live_load, runs.load(Path(path)))
    return base64.b64encode(figures.as_png(figure)).decode()
