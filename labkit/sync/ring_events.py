"""Ring events: the program that writes the map says so, in a ring buffer."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput
from labkit.kernel import native
from labkit.kernel.closing import Closing
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.ringbuf import RingReader, slot_bytes
from labkit.sync.changes import Changes, event_dtype
from labkit.sync.strategy import Stats, Strategy, bounded

COUNTS = np.dtype([("emitted", "u8"), ("dropped", "u8")])
"""``struct change_counts`` of bpf/change_event.h: what one program did on one CPU."""

_NEVER = float("inf")
# Each look at the counters is a system call. A drop of events shows in numbers and in a full ring
# as well; one that nobody else tells of is found so much later at most.
_LOOK_AFTER_S = 0.001
# Where program and CPU stand in an event, as words of 8 bytes (the byte before them is the kind).
_WHO_AT = 3
_WHO = np.uint64(0xFFFF_FF00)
_LONGEST_GATHER_S = 1.0  # no longer does a signal wait that comes just before a sleep
_COPIED_BYTES = 16_384  # less costs more in new memory than in a copy
MOST_EVENTS = 65_536
"""Events that are read and applied at once, at most."""


@dataclass(frozen=True)
class Channel(Closing):
    """What programs that emit changes and their follower share; a context manager.

    Attributes
    ----------
    ring : Map
        Ring buffer that carries the events of bpf/change_event.h.
    counts : Map
        Per-CPU array of `COUNTS`, one element for each program.

    Examples
    --------
    A channel that somebody else's program uses is opened by id, pin or descriptor:

    >>> with Channel.create(1 << 16) as theirs:
    ...     ours = Channel(Map.from_id(theirs.ring.id), Map.from_id(theirs.counts.id, value=COUNTS))
    ...     with RingEvents(ours) as strategy:
    ...         pass
    """

    ring: Map
    counts: Map

    @classmethod
    def create(cls, ring_bytes: int, *, programs: int = 1) -> Channel:
        """Make a ring and its counters.

        Parameters
        ----------
        ring_bytes : int
            A power of two and whole pages.
        programs : int
            How many programs will write.
        """
        counts = Map.create(
            MapKind.PERCPU_ARRAY, key="u4", value=COUNTS, max_entries=programs, name="counts"
        )
        try:
            ring = Map.create(
                MapKind.RINGBUF, key=None, value=None, max_entries=ring_bytes, name="changes"
            )
        except BaseException:
            counts.close()
            raise
        return cls(ring, counts)

    def close(self) -> None:
        """Close both maps; safe to call twice."""
        self.ring.close()
        self.counts.close()


class RingEvents(Strategy):
    """Reads the events that the writing programs emit with each change.

    It sees every version of every key, unless the ring overflows, and nothing of writers that
    emit no event. That something was dropped shows in the programs' counters and in the
    sequence of the events; then the map is read whole, and the replica has every key at the
    version it was at when the reading began, or a newer one. This happens, in the middle of a
    busy stream too, within ``timer_s`` + ``gather_s`` + 1 ms + max(``resync_gap_s``, duration of
    the resync before) + duration of one resync, while `poll` is called.

    Parameters
    ----------
    channel : Channel
        What the programs write to; it stays the caller's. A ring has one consumer.
    version : str
        As for `Strategy`.
    timer_s : float
        The longest sleep between two reads, seconds: the latency where a program wakes nobody.
    gather_s : float
        How long `poll` goes on from the first change that it hands out, seconds, 1 at most. The
        replica has each one as it comes; only its way through Python is shared by many, so that
        CPU per change falls.
    resync_gap_s : float
        At least so long from the end of one resync to the next, seconds: under a writer that
        overruns the ring all the time, reading the map must not become all that is done.

    Examples
    --------
    >>> from labkit.kernel.libbpf import MapKind
    >>> from labkit.load.event_writer import EventWriter, updates
    >>> with (
    ...     Map.create(MapKind.HASH, key="u8", value="u8", max_entries=8) as table,
    ...     Channel.create(1 << 16) as channel,
    ...     EventWriter(table, channel, updates(keys=2, rounds=3)) as writer,
    ...     RingEvents(channel) as strategy,
    ... ):
    ...     replica = strategy.attach(Map.from_id(table.id))
    ...     writer.write(6)
    ...     for changes in strategy.changes(for_s=1):
    ...         break
    ...     [(int(row["key"]), int(row["version"])) for row in changes]
    ...     replica.get(1).version
    [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)]
    3
    """

    def __init__(
        self,
        channel: Channel,
        *,
        version: str | None = "version",
        timer_s: float = 0.1,
        gather_s: float = 0.0,
        resync_gap_s: float = 0.05,
    ) -> None:
        super().__init__(version=version)
        if channel.counts.kind != MapKind.PERCPU_ARRAY or channel.counts.value_dtype != COUNTS:
            raise BadInput(
                f"The counters of a channel are a per-CPU array of COUNTS; {channel.counts!r} "
                f"holds {channel.counts.value_dtype}: open it with value=COUNTS."
            )
        if bounded(timer_s) == 0:
            raise BadInput("A timer of 0 s would never sleep: give more.")
        self._channel = channel
        self._timer_s = timer_s
        if not bounded(gather_s) <= _LONGEST_GATHER_S:
            raise BadInput(f"Changes are gathered for {_LONGEST_GATHER_S:g} s at most: give less.")
        self._gather_s = gather_s
        self._resync_gap_s = bounded(resync_gap_s)
        self._reader: RingReader | None = None
        self._resync_at = _NEVER  # when the next one is due, by time.monotonic
        self._resync_from = 0.0  # and not before this

    @property
    def behind(self) -> bool:
        """Whether a drop was noticed and not repaired yet."""
        return self._resync_at < _NEVER

    def stats(self) -> Stats:
        """Counts of the programs since `attach`, and how the ring stands."""
        if self._reader is None:
            raise self._unusable()
        produced, dropped = self._count()
        ring = self._reader.stats()
        return Stats(
            produced=int((produced - self._produced_before).sum()),
            delivered=self._delivered,
            dropped=int((dropped - self._dropped_before).sum()),
            coalesced=self._coalesced,
            repaired=self._repaired,
            resyncs=self._resyncs,
            unread_bytes=ring.unread_bytes,
            free_bytes=ring.free_bytes,
            size_bytes=ring.capacity_bytes,
            unknown=("order",) if self._version is None else (),
        )

    # -- the two accounts: counters and sequences ------------------------------------------

    def _subscribe(self) -> None:
        table = self.table
        self._event = event_dtype(table.key_dtype, table.value_dtype)
        self._change = self.replica.change_dtype
        self._slot = slot_bytes(self._event.itemsize)
        counts = self._channel.counts
        one = counts.value_buffer().nbytes
        buffer = np.zeros(counts.max_entries * one, np.uint8)
        self._count_readers: list[Callable[[], int]] = [
            counts.reader(program, buffer[program * one : (program + 1) * one])
            for program in range(counts.max_entries)
        ]
        self._counts = buffer.view(np.int64).reshape(-1, 2)  # of each program, each CPU
        self._drops, self._drops_were, self._drops_in_all = self._counts[:, 1], b"", 0
        # Counters first, ring second: what is counted by now and still unread shows itself by a
        # smaller number (see _number).
        self._produced_before, self._dropped_before = self._count()
        self._dropped_seen, self._look_at = self._dropped(), 0.0
        self._number_from_now()
        self._reader = RingReader(self._channel.ring, self._event, batch=1)
        self._native = self._native_follow(self._reader)
        self._half_bytes = self._reader.stats().capacity_bytes // 2

    def _unsubscribe(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def _count(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Changes produced and dropped so far by each source: a program on a CPU."""
        for read in self._count_readers:
            read()
        return self._counts.sum(axis=1), self._drops.copy()

    def _dropped(self) -> int:
        """Changes dropped so far by all together: asked after every read, so at the least cost."""
        for read in self._count_readers:
            read()
        drops = self._drops.tobytes()
        if drops != self._drops_were:
            self._drops_were, self._drops_in_all = drops, int(self._drops.sum())
        return self._drops_in_all

    def _number_from_now(self) -> None:
        """Know no number yet, of any source that was counted."""
        self._expected = np.full(len(self._produced_before), -1, np.int64)
        self._library = native.compiled()
        self._account = [
            native.address(part)
            for part in (self._expected, self._produced_before, self._dropped_before)
        ]

    def _number(self, events: npt.NDArray[Any]) -> bool:
        """Follow the numbers of each source; answers whether one is missing."""
        cpus = len(self._counts) // len(self._count_readers)
        if self._library is not None:
            found: int = self._library.lab_events_number(
                native.address(events), events.itemsize, len(events), cpus, len(self._expected),
                *self._account,
            )  # fmt: skip
            if found < 0:
                raise self._of_nobody()
            return found > 0
        if (
            int(events["program"].max()) >= len(self._count_readers)
            or (events["cpu"] >= cpus).any()
        ):
            raise self._of_nobody()
        return self._number_by_numpy(events, cpus)

    def _of_nobody(self) -> BadInput:
        return BadInput(
            f"An event in ring id {self._channel.ring.id} names a program or a CPU that the "
            f"channel's counters (id {self._channel.counts.id}) do not have: make them for as many "
            "programs as write to the ring."
        )

    def _number_by_numpy(self, events: npt.NDArray[Any], cpus: int) -> bool:
        words = events.view(np.uint64).reshape(len(events), -1)
        who = words[:, _WHO_AT] & _WHO
        seq = words[:, 0].view(np.int64)
        if (who == who[0]).all():
            source = int(events["program"][0]) * cpus + int(events["cpu"][0])
            return self._number_one(source, seq, events["dropped"])
        source_of = events["program"].astype(np.int64) * cpus + events["cpu"]
        gap = False
        for one in np.unique(source_of).tolist():
            here = source_of == one
            gap |= self._number_one(one, seq[here], events["dropped"][here])
        return gap

    def _number_one(
        self, source: int, seq: npt.NDArray[np.int64], dropped: npt.NDArray[np.uint32]
    ) -> bool:
        first, expected = int(seq[0]), int(self._expected[source])
        if expected < 0:
            # The first of this source. A number below the count at `attach` is an event that an
            # earlier follower left unread: it is ours now, and our account begins with it.
            expected = int(self._produced_before[source])
            if first < expected:
                known = int(self._dropped_before[source])
                self._dropped_before[source] = known - (known - int(dropped[0])) % (1 << 32)
                self._produced_before[source] = expected = first
        self._expected[source] = int(seq[-1]) + 1
        return first != expected or bool((seq[1:] != seq[:-1] + 1).any())

    # -- following ---------------------------------------------------------------------------

    def _collect(self, deadline: float) -> Changes:
        assert self._reader is not None
        while True:
            now = time.monotonic()
            until = min(deadline, self._pull_at(), now + self._timer_s)
            self._reader.wait(max(0.0, until - now))
            news = self._take()
            if self._pull_at() <= time.monotonic():
                news = np.concatenate([news, self._pull()], dtype=self._change)
            if len(news) or time.monotonic() >= deadline:
                return news

    def _take(self) -> Changes:
        """Read the ring into the replica, and see whether anything is missing."""
        assert self._reader is not None
        if self._native is not None:
            news, lost, unread = self._take_natively(self._native, self._reader)
        else:
            news, lost, unread = self._take_by_numpy(self._reader)
        now = time.monotonic()
        # A full ring cannot have become less than half full since: there is no other reader.
        if lost or not unread or unread > self._half_bytes or now >= self._look_at:
            self._look_at = now + _LOOK_AFTER_S
            dropped = self._dropped()
            lost |= dropped > self._dropped_seen
            self._dropped_seen = dropped
        if lost:
            self._resync_at = min(self._resync_at, max(now, self._resync_from))
        return news

    def _native_follow(self, reader: RingReader) -> native.Follow | None:
        """What compiled code needs to do all of `_take`; None where there is none."""
        ring = reader.ring
        if ring is None or self._library is None or self._version is None:
            return None
        self._fresh = np.empty(MOST_EVENTS, np.bool_)
        expected, produced_before, dropped_before = self._account
        follow = native.Follow(
            ring=ctypes.pointer(ring),
            table=self.replica.shared,
            most=MOST_EVENTS,
            event_bytes=self._event.itemsize,
            value_at=self._event.fields["value"][1],  # type: ignore[index]
            fresh=native.address(self._fresh),
            cpus=len(self._counts) // len(self._count_readers),
            sources=len(self._expected),
            expected=expected,
            produced_before=produced_before,
            dropped_before=dropped_before,
            gather_ns=round(1e9 * self._gather_s),
            timer_ns=round(1e9 * self._timer_s),
            **native.lock_functions(),
        )
        self._make_room(follow)
        return follow

    def _make_room(self, follow: native.Follow) -> None:
        """Give compiled code new memory to read events into."""
        self._events = np.empty(MOST_EVENTS, self._event)
        follow.events = native.address(self._events)

    def _take_natively(
        self, follow: native.Follow, reader: RingReader
    ) -> tuple[Changes, bool, int]:
        """Answers the news, whether a number is missing, and the bytes that were unread before."""
        assert self._library is not None
        taken: int = self._library.lab_follow(follow)
        reader.took(taken)
        if follow.gap < 0:
            raise self._of_nobody()
        events = self._events
        changes, fresh = events[:taken].view(self._change), self._fresh[:taken]
        if follow.applied < taken:
            fresh[follow.applied :] = self.replica.apply(changes[follow.applied :])
        news = self._count_news(changes, fresh)
        if news is changes and news.nbytes < _COPIED_BYTES:
            news = news.copy()
        elif news is changes:
            # Nobody reads the ring now. Pages of a copy would be touched first, which takes most of
            # the time; instead the events' own are handed out, without those that are not used.
            self._make_room(follow)
            events.resize(taken, refcheck=False)
            news = events.view(self._change)
        return news, follow.gap > 0, follow.unread

    def _take_by_numpy(self, reader: RingReader) -> tuple[Changes, bool, int]:
        """The same without compiled code."""
        parts, lost, most, end = [self._nothing()], False, 0, _NEVER
        while True:
            if unread := reader.unread_bytes:
                events = self._read(min(unread // self._slot + 1, MOST_EVENTS))
                lost |= bool(len(events)) and self._number(events)
                if self._version is None:
                    self.replica.number(events)
                parts.append(self._apply(events.view(self._change)))
                most = max(most, unread)
            now = time.monotonic()
            if len(parts) == 1 or lost or now >= (end := min(end, now + self._gather_s)):
                break
            reader.wait(min(end - now, self._timer_s))
        return np.concatenate(parts, dtype=self._change), lost, most

    def _read(self, room: int) -> npt.NDArray[Any]:
        """Take so many events from the ring at most; the array is the caller's."""
        assert self._reader is not None
        return self._reader.read(np.empty(room, self._event))

    def _pull_at(self) -> float:
        """When the map is to be read whole, by time.monotonic."""
        # A replica that remembers too many keys which are gone forgets some by a resync.
        return self._resync_from if self.replica.crowded else self._resync_at

    def _pull(self) -> Changes:
        """Read the map whole; what was counted as dropped by now is in it."""
        begun = time.monotonic()
        self._resync_at = _NEVER
        news = self._resync()
        ended = time.monotonic()
        self._resync_from = ended + max(self._resync_gap_s, ended - begun)
        return news
