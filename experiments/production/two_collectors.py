"""One load, collected twice: from a hash that is polled, and from a ring buffer."""

from __future__ import annotations

import functools
import json
import os
import queue
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.bench import peers
from labkit.errors import LabError, TimedOut
from labkit.figures import style
from labkit.judge.language import in_words, reference
from labkit.kernel import leftovers, libbpf, network, programs
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, ahead_of_others, another_cpu, shared_array
from labkit.kernel.provenance import emulated
from labkit.kernel.ringbuf import RingReader
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment
from labkit.load.open_loop import next_poll
from labkit.runs import SLOWER, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONNECTION: Final = np.dtype(
    [("intended_ns", "u8"), ("entered_ns", "u8"), ("pid", "u4"), ("address", "u4"),
     ("port", "u4"), ("number", "u4")]
)  # fmt: skip
"""``struct connection`` of bpf/two_collectors.bpf.c."""

MOST_LOST: Final = 0.001
"""A rate counts as collected while less than this share is lost."""

_HOOK = "syscalls:sys_enter_connect"
_WRONG_PORT = 9  # of bpf/peers/connect_load.c, for the process that fails
_ENTRIES = 8_192  # of the map; so it takes nearly the memory of the ring
_RING_PAGES = 256

_ROOM = 4_096  # events that are on their way to the broker, at most
_CHUNK = 2_048  # events in a message, at most
_MORE = 5  # times the usual rate while the broker stalls, so that the room is filled by then
_EMPTY_READS = 3  # in a row, until the daemon reads everything again
# For room, and of a message. Where the broker stalls, both end before the stall does.
_PATIENCE_S, _TIMEOUT_MS = 0.5, 5_000
_STALLED_PATIENCE_S, _STALLED_TIMEOUT_MS = 0.05, 400
_READY, _ENDED = 0, 1  # what parent and child tell each other
_BROKER_S, _DRAIN_S, _LOAD_S = 10.0, 15.0, 30.0

Events = npt.NDArray[np.void]

_CASES = (
    Case("broken", "batch-stalled", "map by batch, broker stalls", way="batch"),
    Case("broken", "ring-stalled", "ring, broker stalls", way="ring"),
    Case("control", "key", "map, by key", way="key"),
    Case("control", "batch", "map, by batch", way="batch"),
    Case("control", "large", "map 8 times as large, by batch", way="batch", times=8),
    Case("control", "ring", "ring buffer", way="ring"),
    Case("fixed", "ring-spill", "ring, broker stalls, spill", way="ring", spill=True),
)

_ROWS = (
    ("knees", "rate", 1.0, "peak throughput", "connections/s"),
    ("rounds", "age_ns", 1e-6, "mean latency", "mean age (ms)"),
    ("rounds", "rss_bytes", 1e-9, "memory", "memory (GB)"),
    ("rounds", "named_ns", 1e-9 / 60, "time to find a fault", "until a fault is named (min)"),
)


def _figure(run: Run) -> Figure:
    """The article's four rows: its two figures, and ours with the spread over the rounds."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, 4, figsize=(style.HALF_PAGE[0] * 2, 2.3), sharey=True, layout="constrained"
    )
    said = reference()["chapter_5"]
    cases = run.cases("control")
    for ax, (table, column, scale, figure_of, label) in zip(panels, _ROWS, strict=True):
        values = run.table(table)
        for row, case in enumerate(cases):
            ours = values.loc[values["case"] == case, column] * scale
            ours = ours[ours > 0]
            if len(ours):
                middle = float(ours.median())
                spread = [[middle - float(ours.min())], [float(ours.max()) - middle]]
                ax.errorbar(middle, row, xerr=spread, **style.VARIANT["control"].points(),
                            label="here: median, least and most" if row == 0 else None)  # fmt: skip
            method = "ring buffer" if case == "ring" else "map sync"
            theirs = said[(said["figure"] == figure_of) & (said["method"] == method)]["value"]
            ax.plot(float(theirs.iloc[0]), row, marker="D", mfc="none", color=style.VERMILLION,
                    ls="none", label="the article" if row == 0 else None)  # fmt: skip
        ax.set_xscale("log")
        ax.set_xlabel(label, fontsize=6.5)
        ax.tick_params(labelsize=6)
    panels[0].set_yticks(range(len(cases)), [run.label(case) for case in cases])
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


def knees(steps: pd.DataFrame) -> pd.DataFrame:
    """The highest rate of each search that was made, and of which little was lost.

    Parameters
    ----------
    steps : DataFrame
        ``case``, ``round``, ``made``, ``produced``, ``lost``, ``seconds``.

    Returns
    -------
    DataFrame
        ``case``, ``round``, ``rate`` (connections a second that were made; 0 where already the
        lowest lost too many), ``reached``: 1 where the search ended by a loss, 0 where the list of
        rates did, and a higher one may be collected.
    """
    rows = []
    for (case, number), tried in steps.groupby(["case", "round"], sort=False):
        lost = tried["lost"] >= MOST_LOST * tried["produced"]
        good = tried[~lost]
        rate = float((good["made"] / good["seconds"]).max()) if len(good) else 0.0
        rows.append({"case": case, "round": number, "rate": rate, "reached": int(lost.any())})
    return pd.DataFrame(rows)


def derive(tables: Tables) -> Tables:
    """What follows from the rates that were tried.

    Parameters
    ----------
    tables : dict of DataFrame
        With ``rounds`` and ``steps``.

    Returns
    -------
    dict of DataFrame
        ``knees``, and ``rows``: ``row`` of the article's table, ``unit``, its two figures ``map``
        and ``ring`` and their ``ratio`` for ``whom`` (the article, or the run: medians over the
        rounds, the map by batch), and ``spread`` (least to most of the run's).
    """
    made = {**tables, "knees": knees(tables["steps"])}
    return {"knees": made["knees"], "rows": _rows(made)}


def _rows(tables: Tables) -> pd.DataFrame:
    said = reference()["chapter_5"].set_index(["figure", "method"])["value"]
    rows = []
    for table, column, scale, name, unit in _ROWS:
        theirs = [float(said[name, method]) for method in ("map sync", "ring buffer")]
        rows.append({"row": name, "whom": "the article", "unit": unit, "map": theirs[0],
                     "ring": theirs[1], "ratio": theirs[1] / theirs[0], "spread": ""})  # fmt: skip
        values = tables[table].set_index("case")[column] * scale
        batch, ring = values.loc[["batch"]], values.loc[["ring"]]
        spread = "; ".join(
            f"{in_words(one.min())} to {in_words(one.max())}" for one in (batch, ring)
        )
        ratio = ring.median() / batch.median() if batch.median() else float("nan")
        rows.append({"row": name, "whom": "this run", "unit": unit, "map": batch.median(),
                     "ring": ring.median(), "ratio": ratio, "spread": spread})  # fmt: skip
    return pd.DataFrame(rows)


@experiment(
    "two-collectors",
    number=61,
    family="production",
    question="What does a collector gain that takes events from a ring in place of a polled map?",
    claims=("5.2a", "5.2b", "5.2c"),
    needs=("bpf", "compile", "tracefs", "tracepoint", "hash", "ringbuf", "batch_hash", "netns_veth",
           "two_cpus", "gcc", "kafka"),
    quick={"rates": [30_000, 80_000], "step_s": 0.3, "base_rate": 4_000,
           "period_ms": 200.0, "processes": 200, "stall_s": 1.2, "rounds": 6},
    full={"rates": [10_000, 20_000, 28_000, 40_000, 57_000, 80_000, 113_000, 160_000, 226_000,
                    320_000, 453_000],
          "step_s": 2.0, "base_rate": 4_000, "period_ms": 200.0, "processes": 200, "stall_s": 3.0,
          "rounds": 8},
    cases=_CASES,
    counted=Counted("lost connection", operations="produced", anomalies="lost"),
    derive=derive,
    statements=(
        Statement("every connection is delivered, or its loss is counted",
                  "all(rounds.produced == rounds.delivered + rounds.lost and rounds.produced > 0)"
                  " and all(steps.produced == steps.delivered + steps.lost"
                  " and steps.produced > 0)"),
        Statement("the program sees every call of the load",
                  "all(rounds.produced == rounds.made and rounds.made > 0)"
                  " and all(steps.produced == steps.made and steps.made > 0)"),
        Statement("a broker that stalls makes both collectors lose connections", "some(broken)"),
        Statement("by the article's cascade: no room, and messages that time out",
                  'all(rounds(case="batch-stalled").no_room > 0'
                  ' and rounds(case="batch-stalled").failed > 0)'),
        Statement("up to three reads without effect, and a full resync",
                  'some(rounds(case="batch-stalled").resyncs > 0)'),
        Statement("a broker that answers loses nothing at this rate", "none(control)"),
        Statement("nor does one that stalls where events without room are spilled",
                  'none(fixed) and some(rounds(case="ring-spill").spilled > 0)'),
        Statement("a map loses what comes beyond its entries in a period",
                  'all((steps(case="batch").lost > 0 or steps(case="batch").beyond < 1.3)'
                  ' and steps(case="batch").produced > 0)'),
        Statement("so one that is larger collects a higher rate",
                  'ratio(knees(case="large").rate, knees(case="batch").rate) > 1'),
        Statement("a connection waits half a period in the map",
                  'spread(rounds(case="batch").read_age_ns) > 250000 * parameters.period_ms'),
        Statement("and less than that in the ring",
                  'ratio(rounds(case="ring").read_age_ns, rounds(case="batch").read_age_ns) < 0.5'),
        Statement("for which the ring's collector pays with more CPU time",
                  'ratio(rounds(case="ring").cpu_ns, rounds(case="batch").cpu_ns) > 1'),
        Statement("process and port are named by both, and rightly",
                  "all(rounds(processes > 1).named == 1)"),
        Statement("the two take the same memory, but for their maps",
                  'ratio(rounds(case="ring").rss_bytes, rounds(case="batch").rss_bytes) > 0.67'),
    ),
    sentence='Polled by batch, {median(knees(case="batch").rate)} connections a second were '
    'collected with a loss under 0.1 %, at least {median(knees(case="large").rate)} with a map '
    'eight times as large, and {median(knees(case="ring").rate)} through the ring. Mean age was '
    '{ms(median(rounds(case="batch").age_ns))} and {ms(median(rounds(case="ring").age_ns))}; the '
    'collector took {median(rounds(case="batch").rss_bytes) / 1048576} MiB and '
    '{median(rounds(case="ring").rss_bytes) / 1048576} MiB. A process that began to fail was named '
    'after {ms(median(rounds(case="batch").named_ns))} and '
    '{ms(median(rounds(case="ring").named_ns))}. While the broker stood still {broken} connections '
    "were lost, with a spill {fixed}.",
    figure=_figure,
)  # fmt: skip
def two_collectors(
    case: Case,
    *,
    rates: list[int],
    step_s: float,
    base_rate: int,
    period_ms: float,
    processes: int,
    stall_s: float,
    turn: int,
) -> dict[str, Any]:
    """Collect the connections of a load through a map or a ring, as JSON, into a broker.

    A program in C calls connect() in a network namespace of its own, on a schedule that waits for
    nobody. Both collectors hang at its entry (``syscalls:sys_enter_connect``), and have the same
    pipeline behind them: a bounded ring of events, a thread that makes JSON, librdkafka as
    producer, and its own mock broker, in a process of its own, on the loopback.

    The polled collector's program puts each connection into a hash, under a key of its own; the
    collector takes them all out every ``period_ms``. The other one's program sends each
    through a ring buffer. Map and ring have about the same memory.

    Where the broker stalls (a signal stops it, and another lets it go on) nothing is
    acknowledged: there is no room in the bounded ring, and messages time out. A read whose events
    found no room is as good as empty; after three of them in a row the daemon reads the whole map
    again, by key, as the article's does. In fixed, what finds no room or times out is written to a
    file, and sent once there is room. A time-out does not say whether the broker has the message,
    so some may be there twice.

    An age runs from the moment at which the schedule wanted the call. The hook is at the entry of
    the call and knows no outcome: a process fails when it connects to a port that is nobody's.

    Parameters
    ----------
    case : Case
        The way, and whether there is a spill.
    rates : list of int
        Connections a second that are tried, ascending, until too many are lost; one process makes
        them. By key none is tried: Python itself would be the limit.
    step_s : float
        How long each rate is tried, seconds.
    base_rate : int
        Connections a second of all processes together beside that search; five times as many
        while the broker stalls.
    period_ms : float
        Poll period, milliseconds. Where the CPU is emulated, all times are `SLOWER` times as long,
        and rates as much lower.
    processes : int
        Processes of the load beside the search, of which one begins to fail.
    stall_s : float
        How long the broker stands still, seconds.
    turn : int
        The round; decides when the process begins to fail.

    Returns
    -------
    dict
        Of the run at ``base_rate``: ``made`` and ``planned`` calls, ``produced``, ``delivered``
        (acknowledged), ``dropped`` (by the program), ``refused`` (no room), ``failed`` (timed out
        and not spilled), ``lost`` (the three together), ``no_room`` and ``resyncs`` (how often),
        ``spilled``; ``age_ns`` and ``age_p99_ns`` until the acknowledgement, ``read_age_ns`` until
        the collector has it (means), ``cpu_ns`` (of the collector) and ``system_ns`` (the
        kernel's part of it),
        ``rss_bytes``, ``map_bytes``, ``processes``, ``named`` (1: the process and port that
        fail), ``named_ns`` (since its first call). ``steps``: the same for each rate that was
        tried, and ``rate``, ``seconds``, ``beyond`` (connections in a period, over the entries of
        the map).

    """
    if emulated():
        step_s, period_ms, stall_s = step_s * SLOWER, period_ms * SLOWER, stall_s * SLOWER
        base_rate, rates = base_rate // SLOWER, [rate // SLOWER for rate in rates]
    with _Broker() as broker:
        once = partial(_run, case, broker, period_ms=period_ms)
        if case.variant != "control":
            return once(base_rate * _MORE, stall_s, stall_s=stall_s)
        fail_after = step_s * (0.4 + 0.1 * (turn % 5))
        row = once(base_rate, 1.5 * step_s, processes=processes, fail_after=fail_after)
        steps: list[dict[str, Any]] = []
        for rate in rates if case.way != "key" else []:
            steps.append(once(rate, step_s))
            if steps[-1]["lost"] >= MOST_LOST * steps[-1]["produced"]:
                break
    return {**row, "steps": pd.DataFrame(steps)} if steps else row


# -- one run of a load ---------------------------------------------------------------------


def _run(
    case: Case,
    broker: _Broker,
    rate: float,
    seconds: float,
    *,
    period_ms: float,
    processes: int = 1,
    fail_after: float = 0.0,
    stall_s: float = 0.0,
) -> dict[str, Any]:
    entries = _ENTRIES * case.get("times", 1)
    size = {"PAGES": _RING_PAGES} if case.way == "ring" else {"ENTRIES": entries}
    address = network.own_address()
    namespace = os.stat("/proc/self/ns/pid")
    flags = shared_array(2, np.int64)
    with programs.load(
        "two_collectors", RING=int(case.way == "ring"), ADDRESS_ID=address,
        NAMESPACE_DEVICE=namespace.st_dev, NAMESPACE_INODE=namespace.st_ino, **size,
    ) as loaded:  # fmt: skip
        if case.way == "ring":
            held = loaded.map("events")
        else:
            held = loaded.map("connections", key="u8", value=CONNECTION)
        work = partial(_collect, case, held, broker.address, flags, period_ms)
        loaded.attach(loaded.program("on_connect", ProgramKind.TRACEPOINT), _HOOK)
        with ahead_of_others(), Child(work, cpu=another_cpu(1)) as collector:
            _wait_for(flags, collector)
            load = _load(address, rate, seconds, processes, fail_after)
            try:
                if stall_s:
                    broker.stall(stall_s)
                made, planned, guilty = _answer_of(load)
            finally:
                load.kill()
                load.wait()
            flags[_ENDED] = 1
            found = collector.result(_DRAIN_S + _LOAD_S)
        account = loaded.map("account", key="u4", value=[("produced", "u8"), ("dropped", "u8")])
        produced, dropped = (int(number) for number in account.lookup(0))
        named = found.pop("named_pid") == guilty
        return {
            "rate": rate,
            "seconds": seconds,
            "processes": processes,
            "beyond": made / seconds * period_ms / 1e3 / entries,
            "made": made,
            "planned": planned,
            "produced": produced,
            "dropped": dropped,
            "lost": dropped + found["refused"] + found["failed"],
            "named": int(named),
            "map_bytes": libbpf.map_memory(held.fd),
            **found,
        }


def _wait_for(flags: npt.NDArray[np.int64], child: Child) -> None:
    """Until a child says that it is ready."""
    deadline = time.monotonic() + _BROKER_S
    while not flags[_READY]:
        if child.ended():
            child.result()
        if time.monotonic() > deadline:
            raise TimedOut(f"The broker did not answer within {_BROKER_S:g} s.")
        time.sleep(0.002)


@functools.cache
def _load_program() -> int:
    """Build the load; the descriptor is all that is left of it."""
    with leftovers.temporary_folder() as folder:
        return os.open(peers.built_by_gcc(peers.SOURCES / "connect_load.c", folder), os.O_RDONLY)


def _load(
    address: int, rate: float, seconds: float, processes: int, fail_after: float
) -> subprocess.Popen[str]:
    program = _load_program()
    words = [address, rate, seconds, processes, fail_after, os.getpid()]
    return subprocess.Popen(
        [f"/proc/self/fd/{program}", *map(str, words)], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[program], text=True,
    )  # fmt: skip


def _answer_of(load: subprocess.Popen[str]) -> list[int]:
    try:
        said, complaint = load.communicate(timeout=_LOAD_S)
    except subprocess.TimeoutExpired:
        raise TimedOut(f"The load did not end within {_LOAD_S:g} s.") from None
    if load.returncode:
        raise LabError(f"The load failed ({complaint.strip() or 'no reason given'}): run as root.")
    return [int(word) for word in said.split()]


# -- the broker ----------------------------------------------------------------------------


class _Broker:
    """librdkafka's mock broker in a child that dies with us; a context manager."""

    def __enter__(self) -> _Broker:
        flags = shared_array(1, np.int64)
        with ahead_of_others():
            self._child = Child(partial(_serve, flags))
        try:
            _wait_for(flags, self._child)
        except BaseException:
            self._child.close()
            raise
        self.address = f"127.0.0.1:{flags[_READY]}"
        return self

    def stall(self, seconds: float) -> None:
        """Let it stand still for so long; messages wait in its socket."""
        os.kill(self._child.pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            os.kill(self._child.pid, signal.SIGCONT)

    def __exit__(self, *_: object) -> None:
        self._child.close()


def _serve(flags: npt.NDArray[np.int64]) -> None:
    settings = {"test.mock.num.brokers": 1, "bootstrap.servers": "", "log_level": 0}
    from confluent_kafka import Producer

    holder = Producer(settings)
    (one,) = holder.list_topics(timeout=_BROKER_S).brokers.values()
    if one.host != "127.0.0.1":
        raise LabError(f"The mock broker listens at {one.host}, and not on the loopback alone.")
    flags[_READY] = one.port
    while True:
        time.sleep(3600)


# -- the collector -------------------------------------------------------------------------


class _Pipeline:
    """A bounded ring of events, and a thread that sends them as JSON.

    Parameters
    ----------
    broker : str
        Its address.
    stalls : bool
        Whether it stalls: then waiting is given up early.
    spill : file, optional
        Takes what found no room or timed out; without it that is lost.
    """

    def __init__(self, broker: str, stalls: bool, spill: IO[bytes] | None) -> None:
        self._patience_s = _STALLED_PATIENCE_S if stalls else _PATIENCE_S
        timeout_ms = _STALLED_TIMEOUT_MS if stalls else _TIMEOUT_MS
        from confluent_kafka import Producer

        self._producer = Producer(
            {"bootstrap.servers": broker, "linger.ms": 1, "message.timeout.ms": timeout_ms,
             "acks": 1, "log_level": 0, "reconnect.backoff.ms": 20, "reconnect.backoff.max.ms": 50,
             "retry.backoff.ms": 20, "error_cb": lambda error: None}
        )  # fmt: skip
        self._producer.list_topics(timeout=_BROKER_S)  # the first message waits for nothing
        self._changed = threading.Condition()
        self._held = 0
        self._waiting: queue.SimpleQueue[Events] = queue.SimpleQueue()
        self._spill = spill
        self._resent = 0  # bytes of the spill
        self._ages: list[npt.NDArray[np.int64]] = []
        self.refused = self.failed = self.spilled = self.no_room = 0
        for task in (self._send, self._hear):
            threading.Thread(target=task, daemon=True).start()

    def take(self, events: Events) -> bool:
        """Hand events on; whether there was room for all of them."""
        before = self.no_room
        for first in range(0, len(events), _CHUNK):
            chunk = events[first : first + _CHUNK]
            if self._offer(chunk, 0.0 if self._spill else self._patience_s):
                continue
            self.no_room += 1
            if not self._spilled(chunk):
                self.refused += len(chunk)
        return self.no_room == before

    def resend(self) -> bool:
        """Send what was spilled while there is room; whether nothing is left of it."""
        while self._spill is not None:
            with self._changed:
                self._spill.seek(self._resent)
                chunk = np.frombuffer(self._spill.read(_CHUNK * CONNECTION.itemsize), CONNECTION)
            if not len(chunk):
                break
            if not self._offer(chunk, 0.0):
                return False
            self._resent += chunk.nbytes
        return True

    def drain(self) -> None:
        """Wait until nothing is on its way any more."""
        deadline = time.monotonic() + _DRAIN_S
        while True:
            empty = self.resend()
            with self._changed:
                if empty and not self._held:
                    return
                self._changed.wait(0.01)
            if time.monotonic() > deadline:
                raise TimedOut(f"The broker had not taken everything within {_DRAIN_S:g} s.")

    def ages(self) -> npt.NDArray[np.int64]:
        """Nanoseconds of each event that was acknowledged, from its intended moment on."""
        return np.concatenate([np.empty(0, np.int64), *self._ages])

    def _offer(self, chunk: Events, patience_s: float) -> bool:
        with self._changed:
            if not self._changed.wait_for(lambda: self._held + len(chunk) <= _ROOM, patience_s):
                return False
            self._held += len(chunk)
        self._waiting.put(chunk)
        return True

    def _spilled(self, chunk: Events) -> bool:
        if self._spill is None:
            return False
        with self._changed:
            self._spill.seek(0, os.SEEK_END)
            self._spill.write(chunk.tobytes())
            self.spilled += len(chunk)
        return True

    def _send(self) -> None:
        while True:
            chunk = self._waiting.get()
            body = json.dumps(chunk.tolist())
            self._producer.produce("connections", body, on_delivery=partial(self._heard, chunk))

    def _hear(self) -> None:
        while True:
            self._producer.poll(0.1)

    def _heard(self, chunk: Events, error: object, _message: object) -> None:
        now = time.monotonic_ns()
        if error is None:
            self._ages.append(now - chunk["intended_ns"].astype(np.int64))
        elif not self._spilled(chunk):
            self.failed += len(chunk)
        with self._changed:
            self._held -= len(chunk)
            self._changed.notify_all()


class _Notes:
    """What a collector notes of the events that it has read."""

    def __init__(self) -> None:
        self.read, self.waited_ns = 0, 0
        self.named_pid, self.named_ns = 0, 0

    def of(self, events: Events) -> None:
        now = time.monotonic_ns()
        self.read += len(events)
        self.waited_ns += int((now - events["intended_ns"].astype(np.int64)).sum())
        wrong = events[events["port"] == _WRONG_PORT]
        if len(wrong) and not self.named_pid:
            first = wrong[np.argmin(wrong["intended_ns"])]
            self.named_pid = int(first["pid"])
            self.named_ns = time.monotonic_ns() - int(first["intended_ns"])


def _collect(
    case: Case,
    held: Map,
    broker: str,
    flags: npt.NDArray[np.int64],
    period_ms: float,
) -> dict[str, Any]:
    """Collect until the load has ended and nothing is left; runs in a child."""
    stalls = case.variant != "control"
    notes = _Notes()
    with tempfile.TemporaryFile() as file:  # without a name: it is gone with this process
        pipeline = _Pipeline(broker, stalls, file if case.get("spill", False) else None)
        before = resource.getrusage(resource.RUSAGE_SELF)
        flags[_READY] = 1
        if case.way == "ring":
            resyncs = 0
            _from_ring(pipeline, notes, held, flags)
        else:
            take = {"key": _by_key, "batch": _by_batch}[case.way]
            resyncs = _from_map(pipeline, notes, held, flags, round(period_ms * 1e6), take)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        pipeline.drain()
    after = resource.getrusage(resource.RUSAGE_SELF)
    system_s = after.ru_stime - before.ru_stime
    ages = pipeline.ages()
    return {
        "delivered": len(ages),
        "refused": pipeline.refused,
        "failed": pipeline.failed,
        "spilled": pipeline.spilled,
        "no_room": pipeline.no_room,
        "resyncs": resyncs,
        "age_ns": float(ages.mean()) if len(ages) else float("nan"),
        "age_p99_ns": float(np.percentile(ages, 99)) if len(ages) else float("nan"),
        "read_age_ns": notes.waited_ns / max(1, notes.read),
        "named_pid": notes.named_pid,
        "named_ns": notes.named_ns,
        "system_ns": round(system_s * 1e9),
        "cpu_ns": round((after.ru_utime - before.ru_utime + system_s) * 1e9),
        "rss_bytes": pages * resource.getpagesize(),
    }


def _from_map(
    pipeline: _Pipeline,
    notes: _Notes,
    held: Map,
    flags: npt.NDArray[np.int64],
    period_ns: int,
    take: Callable[[Map], Events],
) -> int:
    """Take all out, every period; how often the daemon read everything again."""
    moment = time.monotonic_ns()
    empty = resyncs = 0
    while True:
        last = bool(
            flags[_ENDED]
        )  # looked up before the map, so that nothing comes after the last read
        events = take(held)
        notes.of(events)
        empty = 0 if pipeline.take(events) else empty + 1
        if empty == _EMPTY_READS:
            events = _by_key(held)
            notes.of(events)
            pipeline.take(events)
            empty, resyncs = 0, resyncs + 1
        pipeline.resend()
        if last:
            return resyncs
        moment = next_poll(moment, period_ns)


def _by_key(held: Map) -> Events:
    keys = list(held.keys())
    return np.frombuffer(b"".join(held.lookup_and_delete(key) for key in keys), CONNECTION)


def _by_batch(held: Map) -> Events:
    found = held.snapshot()
    held.delete_many(found.keys)
    return found.values


def _from_ring(pipeline: _Pipeline, notes: _Notes, held: Map, flags: npt.NDArray[np.int64]) -> None:
    with RingReader(held, CONNECTION) as reader:
        while True:
            last = bool(flags[_ENDED])
            reader.wait(0.0 if last else 0.02)
            while len(events := reader.read().copy()):
                notes.of(events)
                pipeline.take(events)
            pipeline.resend()
            if last:
                return
