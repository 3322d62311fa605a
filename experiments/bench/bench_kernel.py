"""The kernel room's figures against their bars: ``python -m labkit bench kernel``.

How it is run and judged: :mod:`labkit.lab.bench` and :mod:`experiments.bench.kernel_bars`.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.bench import kernel_bars as bars
from experiments.bench.peers import MOST_EVENTS, Peer, Policy, policies, running
from labkit.errors import LabError, TimedOut
from labkit.judge.statistics import percentiles
from labkit.kernel import libbpf, native, probe, programs
from labkit.kernel.closing import Closing
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, cpus, shared_array
from labkit.kernel.provenance import provenance, usage, usage_since
from labkit.kernel.ringbuf import Records, RingReader, slot_bytes, wakeup_constants
from labkit.lab import bench
from labkit.lab.driver import in_turns
from labkit.lab.experiment import say
from labkit.runs import Run, Triad

EVENT: Final = np.dtype(
    [("seq", "u8"), ("intended_ns", "u8"), ("committed_ns", "u8"), ("value", "u8")]
)
"""``struct event`` of bpf/ring_event.h."""

PROFILES: Final[dict[str, dict[str, Any]]] = {
    "quick": {
        "ring_bytes": 16 << 20, "drains": 7, "live_events": 20_000_000, "lives": 1,
        "long_events": 0, "map_entries": 65_536, "map_rounds": 9, "large_entries": 1_000_000,
        "latency_rounds": 3, "latency_s": 0.3, "rates": [1_000, 10_000, 100_000],
    },
    "full": {
        "ring_bytes": 16 << 20, "drains": 15, "live_events": 20_000_000, "lives": 5,
        "long_events": 1_000_000_000, "map_entries": 65_536, "map_rounds": 15,
        "large_entries": 10_000_000, "latency_rounds": 7, "latency_s": 1.0,
        "rates": [1_000, 10_000, 100_000, 1_000_000],
    },
}  # fmt: skip

_BURST: Final = 64
# Chunks of program runs between two looks at the clock: some 0.1 ms and some 0.2 s.
_SCHEDULED_RUNS: Final = 2_000
_LIVE_EVENTS: Final = 1_000_000
_QUIET_S: Final = 0.0005
_BUILD_S: Final = 60.0
_ANSWER_S: Final = 120.0


# -- producing ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Produced:
    """What a producer has done since it was made: produced = delivered + dropped + discarded.

    Attributes
    ----------
    produced, dropped, discarded : int
        Events tried, those without room in the ring, and those given back after a reserve.
    """

    produced: int
    dropped: int
    discarded: int


class Producer(Closing):
    """The program of bpf/ring_producer.bpf.c, bound to one ring; a context manager.

    Parameters
    ----------
    ring_fd : int
        Descriptor of any ring buffer map.
    wakeup : str
        One of `labkit.kernel.ringbuf.WAKEUPS`.
    wakeup_at : int
        Records (``every-n``) or unread bytes (``adaptive``) at which the reader is woken.
    discard_every : int, optional
        Every so many-th record is given back.
    """

    def __init__(
        self,
        ring_fd: int,
        wakeup: str = "never",
        wakeup_at: int = 1,
        discard_every: int | None = None,
    ) -> None:
        constants = {**wakeup_constants(wakeup, wakeup_at), "BURST": _BURST}
        if discard_every is not None:
            constants["DISCARD_EVERY"] = discard_every
        self._unit = programs.load("ring_producer", RING_FD=ring_fd, **constants)
        self._control = self._unit.map("control")
        self._flood = self._unit.program("produce")
        self._scheduled = self._unit.program("produce_on_schedule")

    def counts(self) -> Produced:
        """What was done so far, from the program's own counters."""
        row = self._control.lookup(0)
        return Produced(int(row["produced"]), int(row["dropped"]), int(row["discarded"]))

    def flood(self, events: int) -> Produced:
        """Produce so many events as fast as this CPU goes; counts since the program was made."""
        self._aim(events)
        self._flood.test_run(repeat=-(-events // _BURST))
        return self.counts()

    def keep_schedule(self, events: int, interval_ns: int, start_ns: int) -> Produced:
        """Produce one event at each ``start_ns + i * interval_ns``, open loop.

        Parameters
        ----------
        events : int
            How many.
        interval_ns : int
            Nanoseconds between two.
        start_ns : int
            When the first is wanted, CLOCK_MONOTONIC.

        Returns
        -------
        Produced
            All that this producer ever did.

        Raises
        ------
        TimedOut
            The schedule was missed by more than ten seconds.
        """
        target = self._aim(events, start_ns=start_ns, interval_ns=interval_ns)
        deadline = start_ns + events * interval_ns + 10_000_000_000
        while (counts := self.counts()).produced < target:
            self._scheduled.test_run(repeat=_SCHEDULED_RUNS)
            if time.monotonic_ns() > deadline:
                raise TimedOut("The producer fell ten seconds behind: the machine is overloaded.")
        return counts

    def _aim(self, events: int, start_ns: int = 0, interval_ns: int = 0) -> int:
        row = self._control.lookup(0)
        names = row.dtype.names or ()
        values = {name: int(row[name]) for name in names}
        values["target"] += events
        # The program counts from the first event of its life; its arithmetic wraps, as does ours.
        values["start_ns"] = (start_ns - values["produced"] * interval_ns) % (1 << 64)
        values["interval_ns"] = interval_ns
        self._control.update(0, values)
        return values["target"]

    def close(self) -> None:
        """Unload the program; safe to call twice."""
        self._unit.close()


# -- consuming ---------------------------------------------------------------------------


@dataclass
class Consumed:
    """What a consumer took: records, their values added up, and the time that it needed."""

    records: int = 0
    total: int = 0
    ns: int = 0
    gaps: int | None = None  # sequence numbers that are missing; None where nobody looked


class Consumer:
    """A ring of its own, the producer that fills it, and one way to read it."""

    name = ""

    def __init__(self, ring_bytes: int) -> None:
        self._open = ExitStack()
        self._unit = self._open.enter_context(
            programs.load_by_bcc("ring_events", PAGES=ring_bytes // os.sysconf("SC_PAGE_SIZE"))
        )
        self.ring = self._unit.map("events")
        self.producer = self._open.enter_context(Producer(self.ring.fd))

    def drain(self) -> Consumed:
        """Take everything that is in the ring."""
        raise NotImplementedError

    def follow(self, ended: Callable[[], bool]) -> Consumed:
        """Take what comes until the producer has ended and the ring is empty."""
        took, begun = Consumed(), time.monotonic_ns()
        while True:
            last = ended()
            some = self.drain()
            took.records += some.records
            took.total += some.total
            if not some.records:
                if last:
                    break
                time.sleep(_QUIET_S)
        took.ns = time.monotonic_ns() - begun
        return took

    def close(self) -> None:
        """Close ring, producer and reader."""
        self._open.close()


class ByRingReader(Consumer):
    """Ours: whole records, copied into one array that is used again every time."""

    name = "RingReader"

    def __init__(self, ring_bytes: int) -> None:
        super().__init__(ring_bytes)
        self._reader = self._open.enter_context(RingReader(self.ring, EVENT))
        self._array = np.zeros(ring_bytes // slot_bytes(EVENT.itemsize), EVENT)
        self._array.view(np.uint8).fill(1)  # touched, so that no drain pays for fresh pages

    def drain(self) -> Consumed:
        """One `RingReader.read` into the array."""
        begun = time.monotonic_ns()
        batch = self._reader.read(self._array)
        ns = time.monotonic_ns() - begun
        return Consumed(len(batch), int(batch["value"].sum()), ns)

    def follow(self, ended: Callable[[], bool]) -> Consumed:
        """Read what comes, and look at every sequence number."""
        took, begun, following = Consumed(gaps=0), time.monotonic_ns(), 0
        while True:
            last = ended()
            batch = self._reader.read()
            if len(batch):
                seq = batch["seq"]
                end = int(seq[-1]) + 1
                took.gaps = (took.gaps or 0) + end - following - len(batch)
                if int(seq[0]) < following or (np.diff(seq.view(np.int64)) <= 0).any():
                    raise LabError("The ring delivered an event twice or out of order.")
                following = end
                took.records += len(batch)
                took.total += int(batch["value"].sum())
            elif last:
                break
            else:
                time.sleep(_QUIET_S)
        took.ns = time.monotonic_ns() - begun
        return took


class ByRingReaderAdding(ByRingReader):
    """Ours, one field of every record added up where it stands in the ring."""

    name = "RingReader, adding a field"

    def drain(self) -> Consumed:
        """`RingReader.in_place` until nothing is left."""
        records, total, begun = 0, 0, time.monotonic_ns()
        while True:
            with self._reader.in_place() as batch:
                if not len(batch):
                    return Consumed(records, total, time.monotonic_ns() - begun)
                records += len(batch)
                total += int(batch["value"].sum())


class ByRingReaderAny(ByRingReader):
    """Ours, as records of any size."""

    name = "RingReader, any size"

    def __init__(self, ring_bytes: int) -> None:
        super().__init__(ring_bytes)
        self._room = Records(
            self._array.view(np.uint8), np.ones(len(self._array), native.PLACE)
        )  # fmt: skip

    def drain(self) -> Consumed:
        """One `RingReader.read_any`, with room for all that the ring holds."""
        begun = time.monotonic_ns()
        data, places = self._reader.read_any(out=self._room)
        ns = time.monotonic_ns() - begun
        values = data.view(np.uint64)[places["start"] // 8 + 3]
        return Consumed(len(places), int(values.sum()), ns)


class _Event(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in EVENT.names or ()]


class ByBcc(Consumer):
    """bcc's callback as its reference guide writes it: ``events.event(data)``."""

    name = "bcc, event(data)"

    def __init__(self, ring_bytes: int) -> None:
        super().__init__(ring_bytes)
        self._records = self._total = 0
        table = self._unit.table("events")
        self._bpf = table.bpf
        table.open_ring_buffer(self._callback(table))

    def _callback(self, table: Any) -> Callable[[Any, int, int], int]:
        def callback(context: Any, data: int, size: int) -> int:
            self._records += 1
            self._total += table.event(data).value
            return 0

        return callback

    def drain(self) -> Consumed:
        """``BPF.ring_buffer_consume``: the callback runs for every record."""
        self._records = self._total = 0
        begun = time.monotonic_ns()
        self._bpf.ring_buffer_consume()
        return Consumed(self._records, self._total, time.monotonic_ns() - begun)


class ByBccCast(ByBcc):
    """bcc's callback with the faster cast to a ctypes structure."""

    name = "bcc, ctypes cast"

    def _callback(self, table: Any) -> Callable[[Any, int, int], int]:
        pointer, cast = ctypes.POINTER(_Event), ctypes.cast

        def callback(context: Any, data: int, size: int) -> int:
            self._records += 1
            self._total += cast(data, pointer).contents.value
            return 0

        return callback


class ByBccEmpty(ByBcc):
    """bcc's callback that looks at nothing: the least that bcc can cost."""

    name = "bcc, empty callback"

    def _callback(self, table: Any) -> Callable[[Any, int, int], int]:
        return lambda context, data, size: 0

    def drain(self) -> Consumed:
        """As its base; the records are known from the producer, as nobody counts them."""
        standing = self.producer.counts().produced
        took = super().drain()
        took.records = standing - getattr(self, "_before", 0)
        self._before = standing
        return took


class ByPeer(Consumer):
    """Another program's consumer, which adds up a field, or copies each record."""

    def __init__(self, ring_bytes: int, peer: Peer, how: str) -> None:
        super().__init__(ring_bytes)
        self.name = f"{peer.name}, {how}"
        self._peer, self._how = peer, how

    def drain(self) -> Consumed:
        """What is in the ring, timed by the other program itself."""
        self._peer.order(f"drain {self.ring.id} {self._how}")
        return self._answer()

    def follow(self, ended: Callable[[], bool]) -> Consumed:
        """The same again and again, until it is told to stop."""
        self._peer.begin(f"follow {self.ring.id}")
        while not ended():
            time.sleep(0.01)
        self._peer.stop()
        return self._answer()

    def _answer(self) -> Consumed:
        told = self._peer.answer()
        return Consumed(told.records, told.total, told.ns)


# -- measuring ---------------------------------------------------------------------------


def drain(ring_bytes: int, rounds: int) -> pd.DataFrame:
    """Time how long each consumer takes to empty a full ring.

    Parameters
    ----------
    ring_bytes : int
        Size of each ring.
    rounds : int
        Repetitions, in turns; one more, the first, warms up and is not counted.

    Returns
    -------
    DataFrame
        One row per consumer and repetition: ``consumer``, ``repetition``, ``events``,
        ``ns``.

    Raises
    ------
    LabError
        A consumer did not deliver exactly what was produced.
    """
    here = min(os.sched_getaffinity(0))
    rows = []
    with ExitStack() as opened:
        consumers: list[Consumer] = [
            ByRingReader(ring_bytes), ByRingReaderAdding(ring_bytes), ByRingReaderAny(ring_bytes),
            ByBcc(ring_bytes), ByBccCast(ring_bytes), ByBccEmpty(ring_bytes),
            *(
                ByPeer(ring_bytes, peer, how)
                for peer in opened.enter_context(running(cpu=here))
                for how in ("add", "copy")
            ),
        ]  # fmt: skip
        for consumer in consumers:
            opened.callback(consumer.close)
        full = ring_bytes // slot_bytes(EVENT.itemsize) - 1
        for turn, consumer in in_turns(consumers, rounds + 1):
            if consumer is consumers[0]:
                say(f"drain: round {turn} of {rounds}" if turn else "drain: warming up")
            before = consumer.producer.counts()
            after = consumer.producer.flood(full)
            took = consumer.drain()
            if (took.records, after.dropped) != (full, before.dropped):
                raise LabError(f"{consumer.name} took {took.records} of {full} events.")
            expected = int((np.arange(before.produced, after.produced) & 0xFF).sum())
            if took.total != expected and not isinstance(consumer, ByBccEmpty):
                raise LabError(f"{consumer.name} read other values than were produced.")
            if turn:
                rows.append((consumer.name, turn, took.records, took.ns))
    return pd.DataFrame(rows, columns=["consumer", "repetition", "events", "ns"])


def live(
    ring_bytes: int, events: int, rounds: int, producer_cpu: int, *, alone: bool = False
) -> pd.DataFrame:
    """Follow a producer that runs at full speed on the other CPU, and account for all.

    Parameters
    ----------
    ring_bytes : int
        Size of each ring.
    events : int
        Events produced for each consumer in a repetition.
    rounds : int
        Repetitions, in turns.
    producer_cpu : int
        CPU of the producer.
    alone : bool
        Ours, and no other consumer.

    Returns
    -------
    DataFrame
        One row per consumer and repetition: ``consumer``, ``repetition``, ``produced``,
        ``delivered``, ``dropped`` (the program's counter), ``gaps`` (sequence numbers
        that the reader itself saw missing between others; -1 where it does not look),
        ``produce_ns``, ``consume_ns``. Always produced = delivered + dropped.

    Raises
    ------
    LabError
        The account does not add up.
    """
    here, rows = min(os.sched_getaffinity(0)), []
    with ExitStack() as opened:
        makers: list[Callable[[], Consumer]] = [lambda: ByRingReader(ring_bytes)]
        if not alone:
            makers.append(lambda: ByBccCast(ring_bytes))
            for peer in opened.enter_context(running(cpu=here)):
                makers.append(lambda peer=peer: ByPeer(ring_bytes, peer, "add"))  # type: ignore[misc]
        for turn, make in in_turns(makers, rounds):
            consumer = make()
            try:
                say(f"live: round {turn + 1} of {rounds}, {consumer.name}")
                ended = shared_array(1, np.int64)

                def produce(
                    producer: Producer = consumer.producer, ended: npt.NDArray[Any] = ended
                ) -> tuple[Produced, int]:
                    begun = time.monotonic_ns()
                    try:
                        for start in range(0, events, _LIVE_EVENTS):
                            counts = producer.flood(min(_LIVE_EVENTS, events - start))
                        return counts, time.monotonic_ns() - begun
                    finally:
                        ended[0] = 1

                def has_ended(ended: npt.NDArray[Any] = ended) -> bool:
                    return bool(ended[0])

                with Child(produce, cpu=producer_cpu) as child:
                    took = consumer.follow(has_ended)
                    counts, produce_ns = child.result(_ANSWER_S)
            finally:
                consumer.close()
            if (
                counts.produced != took.records + counts.dropped
                or (took.gaps or 0) > counts.dropped
            ):
                raise LabError(
                    f"{consumer.name}: {counts.produced} produced, but {took.records} delivered "
                    f"and {counts.dropped} dropped; {took.gaps or 0} missing between others."
                )
            rows.append((
                consumer.name, turn, counts.produced, took.records, counts.dropped,
                -1 if took.gaps is None else took.gaps, produce_ns, took.ns,
            ))  # fmt: skip
    columns = [
        "consumer", "repetition", "produced", "delivered", "dropped", "gaps", "produce_ns",
        "consume_ns",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


POLICIES: Final = policies(slot_bytes(EVENT.itemsize))
"""The last one is the floor of the harness: no sleep, no wakeup."""


def latency(
    rounds: int, seconds: float, rates: tuple[int, ...], producer_cpu: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure from the intended time of an event until a reader has it, per wakeup policy.

    Open loop: the schedule does not wait for anybody, and an event that the producer or
    the reader handles late counts from when it was wanted. The first tenth of every
    repetition warms up and is left out.

    Parameters
    ----------
    rounds : int
        Repetitions, in turns over policies and rates, and within each over the readers.
    seconds : float
        Length of one repetition, of `MOST_EVENTS` at most.
    rates : tuple of int
        Events per second.
    producer_cpu : int
        CPU of the producer.

    Returns
    -------
    repetitions : DataFrame
        One row per policy, rate, reader and repetition: ``policy``, ``rate``, ``reader`` (ours,
        and those in C and Go that this machine can build), ``repetition``, ``produced``,
        ``delivered``, ``dropped``, ``reader_ns`` (CPU time of the reader per event), ``p50_ns``,
        ``p99_ns``, ``p999_ns`` (NaN where the samples are too few).
    pooled : DataFrame
        One row per policy, rate and reader, over the raw times of all repetitions: ``policy``,
        ``rate``, ``reader``, ``events``, ``p50_ns``, ``p99_ns``, ``p999_ns``, ``max_ns``.

    Raises
    ------
    LabError
        The account does not add up.
    """
    here = min(os.sched_getaffinity(0))
    rows: list[dict[str, object]] = []
    pairs = [(policy, rate) for policy in POLICIES for rate in rates]
    with ExitStack() as opened:
        peers = opened.enter_context(running(cpu=here, room=MOST_EVENTS))
        readers = {bars.OURS: None, **{peer.name: peer for peer in peers}}
        every: dict[tuple[str, int, str], list[npt.NDArray[np.int64]]] = {
            (policy.name, rate, name): [] for policy, rate in pairs for name in readers
        }
        rings: dict[str, tuple[Map, Producer]] = {}
        for policy in POLICIES:
            ring = opened.enter_context(_ring())
            producer = Producer(ring.fd, policy.wakeup, policy.wakeup_at)
            opened.callback(producer.close)
            rings[policy.name] = ring, producer
        for done, (turn, (policy, rate)) in enumerate(in_turns(pairs, rounds)):
            if done % 5 == 0:
                left = (len(pairs) * rounds - done) * len(readers) * (seconds + 0.1)
                say(f"latency: {done} of {len(pairs) * rounds} measured, {left:.0f} s to go")
            for _, name in in_turns(list(readers), 1, seed=done):
                events = min(max(int(rate * seconds), 10), MOST_EVENTS)
                schedule = Schedule(*rings[policy.name], policy, rate, events, producer_cpu)
                row, times = schedule.follow(readers[name])
                rows.append({
                    "policy": policy.name, "rate": rate, "reader": name, "repetition": turn, **row
                })  # fmt: skip
                every[policy.name, rate, name].append(times)
    pooled = []
    for cell, parts in every.items():
        times = np.concatenate(parts)
        # Two samples beyond a percentile are few: the number of events stands beside it.
        points = percentiles(times, beyond=2)
        pooled.append((*cell, len(times), *points.to_list(), float(times.max())))
    columns = ["policy", "rate", "reader", "events", "p50_ns", "p99_ns", "p999_ns", "max_ns"]
    return pd.DataFrame(rows), pd.DataFrame(pooled, columns=columns)


@contextmanager
def _ring() -> Iterator[Map]:
    with Map.create(
        MapKind.RINGBUF, key=None, value=None, max_entries=4 << 20, name="labkit_bench"
    ) as ring:
        yield ring


@dataclass(frozen=True)
class Schedule:
    """So many events at a rate, into one ring, by a producer on a CPU of its own."""

    ring: Map
    producer: Producer
    policy: Policy
    rate: int
    events: int
    producer_cpu: int

    def follow(self, peer: Peer | None) -> tuple[dict[str, object], npt.NDArray[np.int64]]:
        """Have a peer, or our reader, follow; its row, and the times that are judged."""
        before = self.producer.counts()
        with ExitStack() as opened:
            if peer is None:
                reader = opened.enter_context(RingReader(self.ring, EVENT))
            else:
                timer_us = round(1e6 * self.policy.timer_s)
                peer.begin(f"take {self.ring.id} {timer_us} read")
            interval_ns = 1_000_000_000 // self.rate
            start_ns = time.monotonic_ns() + 20_000_000  # the child is running by then
            child = opened.enter_context(
                Child(
                    lambda: self.producer.keep_schedule(self.events, interval_ns, start_ns),
                    cpu=self.producer_cpu,
                )
            )
            if peer is None:
                intended_ns, seen_ns, cpu_ns = self._read(reader, child)
                after = child.result(_ANSWER_S)
            else:
                after = child.result(_ANSWER_S)
                peer.stop()
                cpu_ns = peer.answer().cpu_ns
                log = peer.log()
                intended_ns, seen_ns = log["intended_ns"], log["seen_ns"].astype(np.int64)
        delivered, dropped = len(seen_ns), after.dropped - before.dropped
        if delivered + dropped != self.events:
            raise LabError(
                f"{self.policy.name}: {self.events} produced, {delivered} delivered and {dropped} "
                "dropped."
            )
        times = (seen_ns - intended_ns.astype(np.int64))[self.events // 10 :]
        points = percentiles(times, beyond=1)
        row: dict[str, object] = {
            "produced": self.events, "delivered": delivered, "dropped": dropped,
            "reader_ns": cpu_ns / delivered, "p50_ns": points["p50"], "p99_ns": points["p99"],
            "p999_ns": points["p99.9"],
        }  # fmt: skip
        return row, times

    def _read(
        self, reader: RingReader, child: Child
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], int]:
        """What our reader takes: intended times, when it had each, and its CPU time."""
        seen: list[tuple[int, npt.NDArray[Any]]] = []
        delivered, ended = 0, False
        cpu_ns = time.thread_time_ns()
        while delivered < self.events:
            batch = reader.poll(self.policy.timer_s)
            now = time.monotonic_ns()
            if len(batch):
                seen.append((now, batch.copy()))
                delivered += len(batch)
            elif ended:
                break  # some were dropped, or the producer failed: the account tells
            else:
                ended = child.ended()
        cpu_ns = time.thread_time_ns() - cpu_ns
        records = np.concatenate([np.zeros(0, EVENT), *(batch for _, batch in seen)])
        when = np.repeat([now for now, _ in seen], [len(batch) for _, batch in seen])
        return records["intended_ns"], when.astype(np.int64), cpu_ns


def _by_call(
    table: Map, keys: npt.NDArray[np.uint32], values: npt.NDArray[np.uint64]
) -> Callable[[], int]:
    """What no way of reading a hash can do without: one bpf(2), into memory that is touched."""
    place, count, options = np.zeros(1, np.uint64), ctypes.c_uint32(), libbpf.BatchOpts()
    counted, opted = ctypes.byref(count), ctypes.byref(options)

    def read() -> int:
        count.value = len(keys)
        where = [native.address(part) for part in (place, keys, values)]
        libbpf.api().bpf_map_lookup_batch(table.fd, None, *where, counted, opted)
        return count.value

    return read


def maps(entries: int, rounds: int) -> pd.DataFrame:
    """Time reading and writing a whole hash, with ours, bcc's ways, and by batch in C and Go.

    Parameters
    ----------
    entries : int
        Elements of the hash, all present when it is read.
    rounds : int
        Repetitions, in turns; one more, the first, warms up and is not counted.

    Returns
    -------
    DataFrame
        One row per way and repetition: ``way``, ``repetition``, ``entries`` (handled in the
        time, several times the map's for the fast ways), ``ns``. The ways that write do so
        once into the empty hash (``..., fill``) and once over what is there
        (``..., overwrite``).

    Raises
    ------
    LabError
        A way read or wrote other entries than the rest.
    """
    with (
        programs.load_by_bcc("ring_table", ENTRIES=entries) as unit,
        running(cpu=min(os.sched_getaffinity(0))) as peers,
    ):
        ours, theirs = unit.map("table", key="u4", value="u8"), unit.table("table")
        keys = np.arange(entries, dtype=np.uint32)
        values = keys.astype(np.uint64) * 3
        # Made before the clock starts, for the variant that leaves their making out.
        pairs = [(ctypes.c_uint(k), ctypes.c_ulonglong(3 * k)) for k in range(entries)]

        def by_key() -> None:
            for k in range(entries):
                theirs[ctypes.c_uint(k)] = ctypes.c_ulonglong(3 * k)

        def by_ready_key() -> None:
            for key, leaf in pairs:
                theirs[key] = leaf

        # Reads so short that one scheduling of somebody else would hide them are repeated.
        reads: dict[str, tuple[Callable[[], int], int]] = {
            "snapshot()": (lambda: len(ours.snapshot()), 5),
            bars.BY_CALL: (_by_call(ours, np.zeros_like(keys), np.zeros_like(values)), 5),
            "items_lookup_batch()": (lambda: sum(1 for _ in theirs.items_lookup_batch()), 5),
            "items()": (lambda: sum(1 for _ in theirs.items()), 1),
        }
        writes: dict[str, Callable[[], object]] = {
            "update_many()": lambda: ours.update_many(keys, values),
            "t[k] = v": by_key,
            "t[k] = v, objects ready": by_ready_key,
        }
        by_peer = {f"batch, {peer.name}": peer for peer in peers}
        rows: list[tuple[str, int, int, int]] = []
        ours.update_many(keys, values)
        for turn, way in in_turns([*reads, *by_peer, *writes], rounds + 1):
            if way == "snapshot()":
                say(f"maps: round {turn} of {rounds}" if turn else "maps: warming up")
            if way in reads:
                read, times = reads[way]
                begun = time.monotonic_ns()
                found = [read() for _ in range(times)]
                rows.append((way, turn, entries * times, time.monotonic_ns() - begun))
                if found != [entries] * times:
                    raise LabError(f"{way} read {found} of {entries} entries.")
                continue
            if way in by_peer:
                by_peer[way].order(f"lookup {ours.id} {entries} 5")
                told = by_peer[way].answer()
                if (told.records, told.total) != (5 * entries, 5 * int(values.sum())):
                    raise LabError(f"{way} read {told.records} of {5 * entries} entries.")
                rows.append((f"{way}, lookup", turn, told.records, told.ns))
            ours.delete_many(keys)
            for what in ("fill", "overwrite"):
                begun = time.monotonic_ns()
                if way in by_peer:
                    by_peer[way].order(f"update {ours.id} {entries} 1")
                    ns = by_peer[way].answer().ns
                else:
                    writes[way]()
                    ns = time.monotonic_ns() - begun
                rows.append((f"{way}, {what}", turn, entries, ns))
            written = ours.snapshot()
            if len(written) != entries or (written.values != written.keys * 3).any():
                raise LabError(f"{way} did not write what it was given.")
    table = pd.DataFrame(rows, columns=["way", "repetition", "entries", "ns"])
    return table[table["repetition"] > 0].reset_index(drop=True)


def large(entries: int, rounds: int) -> pd.DataFrame:
    """Time `Map.snapshot` of a hash as it grows: a tenth of its entries, and all of them.

    Parameters
    ----------
    entries : int
        Of the hash in the end.
    rounds : int
        Repetitions of each.

    Returns
    -------
    DataFrame
        One row per size and repetition: ``entries``, ``repetition``, ``ns``.

    Raises
    ------
    LabError
        A snapshot had other entries than the map.
    """
    rows = []
    for size in (entries // 10, entries):
        with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=size) as table:
            keys = np.arange(size, dtype=np.uint32)
            table.update_many(keys, keys.astype(np.uint64))
            for turn in range(rounds + 1):
                say(f"a map of {size:,}: round {turn} of {rounds}")
                begun = time.monotonic_ns()
                found = table.snapshot()
                ns = time.monotonic_ns() - begun
                if len(found) != size or (found.values != found.keys).any():
                    raise LabError(f"A snapshot had {len(found)} of {size} entries.")
                if turn:
                    rows.append((size, turn, ns))
    return pd.DataFrame(rows, columns=["entries", "repetition", "ns"])


def measure(profile: str) -> Run:
    """Measure everything here and now, in this process.

    Parameters
    ----------
    profile : str
        ``quick`` or ``full``.

    Returns
    -------
    Run
        Not saved yet. Tables: ``drain``, ``live``, ``maps``, ``large``,
        ``latency``, ``latency_pooled``, as the functions of this module return them, and ``counts``
        with the events lost live (broken: bcc; control: libbpf in C; fixed: RingReader).

    Raises
    ------
    Unavailable
        The machine lacks something; the sentence says what.
    LabError
        An account does not add up.
    """
    probe.require("bpf", "compile", "test_run", "two_cpus", "ringbuf", "batch_hash", "gcc")
    parameters = PROFILES[profile]
    facts, ticks, begun = provenance(), usage(), time.monotonic()
    reader_cpu, producer_cpu = cpus()[:2]
    os.sched_setaffinity(0, {reader_cpu})
    facts["nice"] = bench.ahead_of_all()
    drained = drain(parameters["ring_bytes"], parameters["drains"])
    followed = live(
        parameters["ring_bytes"], parameters["live_events"], parameters["lives"], producer_cpu
    )
    if parameters["long_events"]:
        long = live(
            parameters["ring_bytes"], parameters["long_events"], 1, producer_cpu, alone=True
        )
        long["repetition"] = parameters["lives"]
        followed = pd.concat([followed, long], ignore_index=True)
    handled = maps(parameters["map_entries"], parameters["map_rounds"])
    grown = large(parameters["large_entries"], 7)
    repetitions, pooled = latency(
        parameters["latency_rounds"],
        parameters["latency_s"],
        tuple(parameters["rates"]),
        producer_cpu,
    )
    triad = Triad("lost")
    for variant, name in (
        ("broken", ByBccCast.name), ("control", bars.LIBBPF), ("fixed", ByRingReader.name),
    ):  # fmt: skip
        rows = followed[followed["consumer"] == name]
        triad.add(
            variant,
            case=name,
            operations=int(rows["produced"].sum()),
            anomalies=int(rows["dropped"].sum()),
        )
    facts["duration_s"] = round(time.monotonic() - begun, 3)
    facts["during"] = usage_since(ticks)
    tables = {
        "counts": triad.table(), "drain": drained, "live": followed, "maps": handled,
        "large": grown, "latency": repetitions, "latency_pooled": pooled,
    }  # fmt: skip
    return Run(bars.EXPERIMENT, profile, parameters, facts, tables)


BENCHMARK: Final = bench.Benchmark(measure, bars.results, bars.judge)
