"""See the changes of one live map as they are made, whoever makes them: anybody's, not one of ours.

Hooks tell of each change with its key and value (`labkit.sync.trace_hook`). What no hook sees, such
as a program's store through a pointer, is found by reading the map every so often. The map needs no
version in its values, and is never written to.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput
from labkit.inspect.diagnose import map_ids
from labkit.kernel import objects
from labkit.kernel.closing import Closing
from labkit.kernel.maps import OF_MAPS, PER_CPU, Map
from labkit.kernel.ringbuf import RingReader
from labkit.sync.changes import ChangeKind, event_dtype
from labkit.sync.ring_events import Channel
from labkit.sync.strategy import bounded
from labkit.sync.trace_hook import Hooks

_RING_BYTES: Final = 1 << 22
_LAST_S: Final = 5.0  # to read what the ring holds in the end
_STEP_S: Final = 0.2
_BLIND: Final = {
    "functions": "stores through a pointer that a program looked up, stores through a mapping, "
    "and what an LRU map evicts",
    "syscalls": "what programs write, stores through a mapping, and what an LRU map evicts",
}


@dataclass(frozen=True)
class MapEvent:
    """One change that was seen.

    Attributes
    ----------
    at_ns : int
        When the kernel had applied it, or when it was found by reading; CLOCK_MONOTONIC.
    what : str
        ``update`` or ``delete``, told by a hook; ``found`` or ``gone``, which no hook told.
    key, value
        Of the map's layout; the value is None for a delete, and for a key that is gone.
    """

    at_ns: int
    what: str
    key: Any
    value: Any


class Watch(Closing):
    """Watches one map; a context manager.

    Parameters
    ----------
    table : Map
        Opened by id, pin or name; it stays the caller's.
    pull_s : float
        From one reading of the whole map to the next, seconds. What no hook told is reported
        when two readings in a row show it, so that a change whose event is still on its way is
        not. Per-CPU maps and maps of maps are not read.

    Attributes
    ----------
    mechanism : str
        How the map's changes are hooked: one of `labkit.sync.trace_hook.MECHANISMS`.
    blind : str
        What the hooks do not see, in words.
    seen, found : int
        Changes told by hooks so far, and found by reading.

    Raises
    ------
    BadInput
        The type of the map has no hook, or ``pull_s`` is no bound.
    Unavailable
        This kernel refuses the hooks; the sentence says which.
    """

    def __init__(self, table: Map, *, pull_s: float = 1.0) -> None:
        if bounded(pull_s) == 0:
            raise BadInput("A reading every 0 s would leave no time for events: give more.")
        self._table = table
        self._pull_s = pull_s
        self._readable = table.kind not in PER_CPU | OF_MAPS
        self._channel = Channel.create(_RING_BYTES)
        self._hooks: Hooks | None = None
        self._reader: RingReader | None = None
        self.seen = self.found = 0
        try:
            self._hooks = Hooks(table, self._channel)
            event = event_dtype(table.key_dtype, table.value_dtype)
            self._reader = RingReader(self._channel.ring, event, batch=4096)
        except BaseException:
            self.close()
            raise
        self.mechanism = self._hooks.mechanism
        self.blind = _BLIND[self.mechanism]
        self._touched: set[bytes] = set()  # keys of which events told since the last reading
        self._doubtful: set[bytes] = set()  # what one reading showed otherwise, and no event told
        self._known = self._read() if self._readable else {}
        self._next_pull = time.monotonic() + pull_s

    @property
    def dropped(self) -> int:
        """Changes whose events found no room, or whose hook the kernel skipped."""
        counts = self._channel.counts.lookup(0)
        assert self._hooks is not None
        return int(counts["dropped"].sum()) + self._hooks.missed()

    def poll(self, timeout_s: float) -> list[MapEvent]:
        """Wait for changes, and hand them out.

        Parameters
        ----------
        timeout_s : float
            How long to wait for the first of them, seconds.

        Returns
        -------
        list of MapEvent
            In the order in which they were told; empty if none came.

        Raises
        ------
        MapError
            The map cannot be read.
        """
        assert self._reader is not None
        deadline = time.monotonic() + bounded(timeout_s)
        while True:
            until = min(deadline, self._next_pull) if self._readable else deadline
            self._reader.wait(max(0.0, until - time.monotonic()))
            news = self._take()
            if self._readable and time.monotonic() >= self._next_pull:
                news += self._pull()
            if news or time.monotonic() >= deadline:
                return news

    def end(self) -> list[MapEvent]:
        """Unhook the map, and hand out all that its hooks had told until then.

        Returns
        -------
        list of MapEvent
            With them, every change that was hooked is told or counted as dropped.
        """
        assert self._hooks is not None
        self._hooks.detach()
        news = self._take()
        deadline = time.monotonic() + _LAST_S
        # A hook that ran at that moment may still be on its way to the ring.
        while self.seen < self._emitted() and time.monotonic() < deadline:
            news += self._take()
        return news

    def _emitted(self) -> int:
        return int(self._channel.counts.lookup(0)["emitted"].sum())

    def close(self) -> None:
        """Unhook the map; safe to call twice."""
        for one in (self._reader, self._hooks, self._channel):
            if one is not None:
                one.close()

    def _take(self) -> list[MapEvent]:
        """What the ring holds now, one batch at the most."""
        assert self._reader is not None
        events = self._reader.read().copy()
        self._touched.update(_each(events["key"]))
        self.seen += len(events)
        return [
            MapEvent(
                int(event["committed_ns"]),
                ChangeKind(event["kind"]).name.lower(),
                event["key"],
                event["value"] if event["kind"] == ChangeKind.UPDATE else None,
            )
            for event in events
        ]

    def _pull(self) -> list[MapEvent]:
        """Read the map; what two readings in a row show, and no event told since, is news."""
        before, self._touched = self._touched, set()
        now, at_ns = self._read(), time.monotonic_ns()
        told = self._take()  # of what the reading shows already, or of what came after it
        known, doubtful, news = dict(now), set(), []
        for key in now.keys() | self._known.keys():
            value = now.get(key)
            if key in before or key in self._touched or value == self._known.get(key):
                continue
            if key in self._doubtful:
                news.append(self._event(at_ns, key, value))
                continue
            doubtful.add(key)
            if key in self._known:
                known[key] = self._known[key]
            else:
                del known[key]
        self._known, self._doubtful = known, doubtful
        self.found += len(news)
        self._next_pull = time.monotonic() + self._pull_s
        return told + news

    def _event(self, at_ns: int, key: bytes, value: bytes | None) -> MapEvent:
        layout = [("key", self._table.key_dtype), ("value", self._table.value_dtype)]
        row = np.frombuffer(key + (value or bytes(self._table.value_size)), layout)[0]
        what, content = ("gone", None) if value is None else ("found", row["value"])
        return MapEvent(at_ns, what, row["key"], content)

    def _read(self) -> dict[bytes, bytes]:
        snapshot = self._table.snapshot()
        return dict(zip(_each(snapshot.keys), _each(snapshot.values), strict=True))


def show(which: str, *, seconds: float) -> None:
    """Print the changes of a map as they are made, and in the end how many there were.

    The changes go to standard output, a line each; what is said of them goes to standard error.

    Parameters
    ----------
    which : str
        Id, path of a pin, or name of the map.
    seconds : float
        After which it ends; infinite: when it gets SIGINT, whatever that did before.

    Raises
    ------
    BadInput
        No map is meant, or several; or its type has no hook.
    Unavailable
        This kernel refuses the hooks; the sentence says which.
    """
    found = map_ids(which, objects.snapshot())
    if len(found) > 1:
        raise BadInput(f"Maps {found} are all called {which!r}: name one by its id.")
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        _show(found[0], seconds, interrupted)
    finally:
        signal.signal(signal.SIGINT, before)


def _show(map_id: int, seconds: float, interrupted: threading.Event) -> None:
    with Map.from_id(map_id) as table, Watch(table) as watch:
        _say(f"Watching {table!r} by {watch.mechanism}; the hooks do not see {watch.blind}.")
        since_epoch_s = time.time() - time.monotonic()
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0 and not interrupted.is_set():
            _print(watch.poll(min(left, _STEP_S)), since_epoch_s)
        _print(watch.end(), since_epoch_s)
        _say(
            f"{watch.seen:,} changes were told by hooks, {watch.dropped:,} were dropped on "
            f"their way, and {watch.found:,} were found by reading."
        )


def _print(events: list[MapEvent], since_epoch_s: float) -> None:
    for one in events:
        moment = datetime.fromtimestamp(since_epoch_s + one.at_ns / 1e9)
        value = "" if one.value is None else f" = {in_words(one.value)}"
        print(f"{moment:%H:%M:%S.%f}  {one.what:6}  {in_words(one.key)}{value}")
    sys.stdout.flush()


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def in_words(item: Any) -> str:
    """A key or value of any layout, short enough for a line: fields by name, raw bytes in hex."""
    if getattr(item, "dtype", None) is not None and item.dtype.names:
        return "{" + ", ".join(f"{name}: {in_words(item[name])}" for name in item.dtype.names) + "}"
    if isinstance(item, np.ndarray):
        return "[" + ", ".join(map(in_words, item)) + "]"
    return item.tobytes().hex() if isinstance(item, np.void) else str(item)


def _each(rows: npt.NDArray[Any]) -> list[bytes]:
    """The bytes of each row, padding as it stands."""
    raw, count = rows.tobytes(), len(rows)
    size = len(raw) // count if count else 0
    return [raw[i * size : (i + 1) * size] for i in range(count)]
