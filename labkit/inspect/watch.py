"""See the changes of live maps as they are made, whoever makes them: anybody's, not one of ours.

Hooks tell of each change with its key and value, who asked for it, and the kernel's answer
(`labkit.inspect.watch_hooks`). What no hook sees, such as a program's store through a pointer, is
found by reading the map every so often. The map needs no version in its values, and is never
written to.
"""

from __future__ import annotations

import errno
import math
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput
from labkit.inspect import watch_hooks
from labkit.inspect.watch_hooks import WatchHooks, hookable
from labkit.inspect.watch_output import Output, Wanted, in_words
from labkit.inspect.watch_targets import programs_of, which_maps
from labkit.inspect.writers import Programs, Writer
from labkit.kernel import libbpf
from labkit.kernel.closing import Closing
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import OF_MAPS, PER_CPU, Map, MapError
from labkit.kernel.ringbuf import RingReader
from labkit.sync.strategy import bounded
from labkit.sync.trace_hook import best_mechanism

__all__ = ["MapEvent", "Watch", "in_words", "show"]

_RING_BYTES: Final = 1 << 23
_BATCH: Final = 8_192  # events that are taken from the ring at once
_LAST_S: Final = 5.0  # to wait in the end for an event that was counted and is not there yet
_PAYLOAD: Final = ("key", "value")
_STEP_S: Final = 0.2
_MOST_BYTES: Final = 64 << 20  # a larger map is not read whole every so often
_MOST_ENTRIES: Final = 1 << 18  # nor one that holds more: a reading would take too long
_MOST_REMEMBERED: Final = 1 << 16  # keys of a map that is not read
_MOST_INNER: Final = 256  # before Linux 6.8 each read of such an element waits for RCU
_READABLE: Final = {
    MapKind.HASH, MapKind.ARRAY, MapKind.LRU_HASH, MapKind.LPM_TRIE, MapKind.PROG_ARRAY,
    MapKind.DEVMAP, MapKind.DEVMAP_HASH, MapKind.CPUMAP, MapKind.SOCKMAP, MapKind.SOCKHASH,
    *PER_CPU, *OF_MAPS,
}  # fmt: skip
_FEW_ENTRIES: Final = {MapKind.PROG_ARRAY, *OF_MAPS}
_READ_OTHERWISE: Final = {  # what is read is not what was written: descriptors become ids, cookies
    *watch_hooks.HOLD_SOCKETS, MapKind.DEVMAP, MapKind.DEVMAP_HASH, MapKind.CPUMAP,
}  # fmt: skip
_NOT_BY_PROGRAMS: Final = {  # programs do not change what these hold
    *_FEW_ENTRIES, MapKind.DEVMAP, MapKind.DEVMAP_HASH, MapKind.CPUMAP,
}  # fmt: skip
_BLIND: Final = {
    "functions": "stores through a pointer that a program looked up, stores through a mapping, "
    "what an LRU map evicts, and calls that are refused before they reach the map (EPERM, EFAULT)",
    "syscalls": "what programs write, stores through a mapping, and what an LRU map evicts",
}
_NEVER: Final = math.inf


class MapEvent(NamedTuple):
    """One change that was asked for or found.

    Attributes
    ----------
    at_ns : int
        When the kernel had answered, or when it was found by reading; CLOCK_MONOTONIC.
    what : str
        ``update`` or ``delete``, told by a hook; ``found`` or ``gone``, which no hook told.
    key, value
        Of the map's layout; the value is None where there is none or it could not be read, and
        is a tuple, one for each CPU, in a per-CPU map. Maps of maps and program arrays: ids.
    map_id : int
        The map.
    error : str
        Why the kernel refused it, such as ``EEXIST``; empty where it did not.
    old
        The value that was told or read of this key last; None where there was none, or none is
        known: `is_new` tells the two apart.
    is_new : bool
        Nothing was there before, as far as was told or read.
    writer : Writer or None
        Who asked; None for what was found.
    after_ns : int
        For what was found: it happened after this reading, and not after ``at_ns``. Else 0.
    cpu : int or None
        The only CPU whose slot a program wrote in a per-CPU map; None where all were.
    raw_key : bytes
        The key as it stands in memory.
    """

    at_ns: int
    what: str
    key: Any
    value: Any
    map_id: int = 0
    error: str = ""
    old: Any = None
    is_new: bool = False
    writer: Writer | None = None
    after_ns: int = 0
    cpu: int | None = None
    raw_key: bytes = b""


class _Followed:
    """One map: what was told and found of it, to be held against its readings."""

    def __init__(self, table: Map) -> None:
        self.table = table
        self.slots = libbpf.possible_cpus() if table.kind in PER_CPU else 1
        self.value_bytes = self.slots * table.value_size
        self.unread = self._why_unread()
        self.latest: dict[bytes, bytes] = {}  # values by keys, as last told or found
        self.touched: set[bytes] = set()  # keys of which events told since the reading began
        self.doubtful: set[bytes] = set()  # of which the reading before showed something else
        self.pending: set[bytes] = set()  # told, but how it is read only a reading shows
        self.loaded_ns = 0  # when the first reading had ended
        self.readings_ns = [0, 0, 0]  # when the last three began

    def _why_unread(self) -> str:
        table = self.table
        if table.kind not in _READABLE:
            return f"a {table.kind.name.lower()} cannot be read whole"
        if table.kind in _FEW_ENTRIES and table.max_entries > _MOST_INNER:
            return f"it has room for more than {_MOST_INNER} maps or programs"
        if table.max_entries * (table.key_size + self.value_bytes) > _MOST_BYTES:
            return f"it has room for more than {_MOST_BYTES >> 20} MiB"
        return ""

    def load(self) -> None:
        """Read the map for the first time."""
        if self.unread:
            return
        try:
            self.latest = self.read() or {}
        except MapError as error:
            self.unread = str(error).removesuffix(".")
        self.loaded_ns = time.monotonic_ns()

    def read(self) -> dict[bytes, bytes] | None:
        """The bytes of each value by those of its key, slots of CPUs one behind the other.

        None where there are too many by now, or the map is gone: then it is not read any more.
        It is opened anew each time: who holds a map keeps it alive, and a program array filled.
        """
        self.readings_ns = [*self.readings_ns[1:], time.monotonic_ns()]
        self.touched = set()
        table = self.table
        try:
            opened = Map.from_id(table.id, key=table.key_dtype, value=table.value_dtype)
        except MapError as error:
            if error.errno != errno.ENOENT:
                raise
            self.unread = "it is gone"
            return None
        with opened:
            snapshot = opened.snapshot()
        if len(snapshot) > _MOST_ENTRIES:
            self.unread = f"it holds more than {_MOST_ENTRIES:,} entries"
            return None
        return dict(zip(_each(snapshot.keys), _each(snapshot.values), strict=True))

    def found(self, now: dict[bytes, bytes], *, at_once: bool) -> dict[bytes, int]:
        """Keys of which a reading shows what nobody told, with the reading that it came after.

        All events from before the reading have been told by then. One whose hook had not run yet
        comes later: so a second reading has to show it too, with no event of the key in between,
        unless there will be none (``at_once``).
        """
        for key in self.pending - self.touched:
            if key in now:
                self.latest[key] = now[key]
        self.pending &= self.touched
        if now == self.latest:
            self.doubtful = set()
            return {}
        other = {key for key, _ in now.items() ^ self.latest.items()} - self.touched
        agreed = {key: self.readings_ns[0 if key in self.doubtful else 1] for key in other}
        sure = other if at_once else other & self.doubtful
        self.doubtful = other - sure
        return {key: agreed[key] for key in sure}

    def key(self, raw: bytes) -> Any:
        return np.frombuffer(raw, self.table.key_dtype)[0] if raw else None

    def value(self, raw: bytes | None) -> Any:
        """A value, or one for each CPU, of packed bytes."""
        if raw is None:
            return None
        values = np.frombuffer(raw, self.table.value_dtype)
        all_slots = self.table.kind in PER_CPU and len(raw) == self.value_bytes
        return tuple(values) if all_slots else values[0]

    def packed(self, raw: bytes) -> bytes:
        """A value as bpf(2) takes it, without what pads the slots of CPUs."""
        size = self.table.value_size
        stride = -(-size // 8) * 8
        if len(raw) != self.slots * stride or self.table.kind not in PER_CPU:
            return raw
        return b"".join(raw[at : at + size] for at in range(0, len(raw), stride))

    def before(self, key: bytes, at_ns: int) -> tuple[bytes | None, bool]:
        """The value that a key had as far as is known, and whether it had none."""
        old = self.latest.get(key)
        if at_ns <= self.loaded_ns:
            return None, False  # the first reading may show it already
        return old, old is None and not self.unread

    def deleted(self, at_ns: int, key: bytes) -> None:
        """An event told that a key is gone."""
        self._touch(at_ns, key)
        self.latest.pop(key, None)

    def updated(self, at_ns: int, key: bytes, value: bytes | None, cpu: int | None) -> None:
        """An event told that a key has this value now, on one CPU or all; None: an unknown one."""
        self._touch(at_ns, key)
        if self.unread and len(self.latest) >= _MOST_REMEMBERED:
            self.latest.clear()
        if value is None or self.table.kind in _READ_OTHERWISE:
            self.pending.add(key)
        if value is None:
            self.latest.pop(key, None)
        elif cpu is None:
            self.latest[key] = value
        else:
            slots = bytearray(self.latest.get(key, bytes(self.value_bytes)))
            slots[cpu * len(value) : (cpu + 1) * len(value)] = value
            self.latest[key] = bytes(slots)

    def _touch(self, at_ns: int, key: bytes) -> None:
        self.doubtful.discard(key)
        self.pending.discard(key)
        if at_ns >= self.readings_ns[-1]:
            self.touched.add(key)


class Watch(Closing):
    """Watches maps; a context manager.

    Parameters
    ----------
    *tables : Map
        Opened by id, pin or name; they stay the caller's, who may close them: a watch keeps no
        map alive. None: all maps of the machine, told
        without keys and values, and not read.
    pull_s : float
        From one reading of the maps to the next, seconds. What no hook told is reported when
        two readings in a row show it, so that a change whose event is still on its way is not.
        What comes and goes between two readings stays invisible.

    Attributes
    ----------
    mechanism : str
        How changes are hooked: one of `labkit.inspect.watch_hooks.MECHANISMS`.
    blind : str
        What the hooks do not see, in words.
    pull_s : float
        As given.
    seen, refused, found : int
        Changes told by hooks so far; those that the kernel refused; those found by reading.
    unhooked : tuple of str
        Functions of these kinds of maps that this kernel does not have, or does not let be hooked.

    Raises
    ------
    BadInput
        The kind of a map has no hook, or ``pull_s`` is no bound.
    Unavailable
        This kernel refuses the hooks; the sentence says which.
    """

    def __init__(self, *tables: Map, pull_s: float = 1.0) -> None:
        if bounded(pull_s) == 0:
            raise BadInput("A reading every 0 s would leave no time for events: give more.")
        self.pull_s = pull_s
        self._reader: RingReader | None = None
        self._ended = False
        self.seen = self.refused = self.found = 0
        self._followed = {table.id: _Followed(table) for table in tables}
        self._hooks = WatchHooks(tables, ring_bytes=_RING_BYTES)
        try:
            self._programs = Programs(self._hooks.program_ids)
            self._reader = RingReader(self._hooks.channel.ring, self._hooks.event, batch=_BATCH)
            for one in self._followed.values():
                one.load()
        except BaseException:
            self.close()
            raise
        self.mechanism = self._hooks.mechanism
        self.blind = _BLIND[self.mechanism]
        self.unhooked = tuple(self._hooks.refused)
        self._next_pull = time.monotonic() + pull_s if self._readable else _NEVER

    @property
    def unread(self) -> dict[int, str]:
        """Maps that are not read, or not any more, with the reason."""
        return {id: one.unread for id, one in self._followed.items() if one.unread}

    @property
    def _readable(self) -> list[_Followed]:
        return [one for one in self._followed.values() if not one.unread]

    @property
    def dropped(self) -> int:
        """Changes and refusals that no event told.

        The ring was full, the kernel skipped the hook on that CPU, or they stood so far behind in
        a batch that no event was made for them.
        """
        _, dropped, of_batches = self._hooks.counts()
        return dropped + of_batches

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
            A map cannot be read any more.
        """
        assert self._reader is not None
        deadline = time.monotonic() + bounded(timeout_s)
        while True:
            until = min(deadline, self._next_pull)
            self._reader.wait(max(0.0, until - time.monotonic()))
            news = self._take()
            if time.monotonic() >= self._next_pull:
                news += self._pull()
            if news or time.monotonic() >= deadline:
                return news

    def end(self) -> list[MapEvent]:
        """Read the maps once more, unhook them, and hand out all that is not handed out yet.

        Returns
        -------
        list of MapEvent
            With them, every change that was hooked is told or counted as dropped. What the last
            reading shows and no hook told is found, though no second reading has shown it.
        """
        if self._ended:
            return []
        self._ended = True
        last = [(one, one.read()) for one in self._readable]
        at_ns = time.monotonic_ns()
        self._hooks.detach()
        news: list[MapEvent] = []
        deadline = time.monotonic() + _LAST_S
        # A hook that ran at that moment may still be on its way to the ring.
        while self.seen + self.refused < self._hooks.counts()[0] and time.monotonic() < deadline:
            if some := self._take():
                news += some
                deadline = time.monotonic() + _LAST_S
        for one, now in last:
            if now is not None:
                news += self._found(one, now, at_ns, at_once=True)
        return news

    def close(self) -> None:
        """Unhook the maps; safe to call twice."""
        if self._reader is not None:
            self._reader.close()
        self._hooks.close()

    # -- what hooks tell ---------------------------------------------------------------------

    def _take(self) -> list[MapEvent]:
        """What the ring holds now, one batch at the most."""
        assert self._reader is not None
        events = self._reader.read()
        names = ("at_ns", "map_id", "result", "value_size", "cpu", "kind", "lacks")
        columns = [events[name].tolist() for name in names]
        told = events.dtype.names or ()
        payload = [_each(events[n]) if n in told else [b""] * len(events) for n in _PAYLOAD]
        writers = self._programs.writers(events)
        return [self._told(*row) for row in zip(*columns, *payload, writers, strict=True)]

    def _told(
        self,
        at_ns: int,
        map_id: int,
        result: int,
        value_size: int,
        cpu: int,
        kind: int,
        lacks: int,
        key: bytes,
        raw: bytes,
        writer: Writer,
    ) -> MapEvent:
        what = "update" if kind == watch_hooks.UPDATE else "delete"
        error = libbpf.error_name(-result) if result else ""
        if error:
            self.refused += 1
        else:
            self.seen += 1
        one = self._followed.get(map_id)
        if one is None:
            return MapEvent(at_ns, what, None, None, map_id, error, writer=writer)
        key = b"" if lacks & watch_hooks.LACKS_KEY else key[: one.table.key_size]
        value = None
        if value_size and not lacks & watch_hooks.LACKS_VALUE:
            value = one.packed(raw[:value_size])
        if error and one.table.kind in watch_hooks.HOLD_OBJECTS:
            value = None  # a descriptor of nothing
        shown = None if one.table.kind in watch_hooks.HOLD_SOCKETS else value
        old, is_new = one.before(key, at_ns) if key else (None, False)
        partial = value is not None and len(value) < one.value_bytes
        if key and not error and what == "delete":
            one.deleted(at_ns, key)
        elif key and not error:
            one.updated(at_ns, key, value, cpu if partial else None)
        taken = what == "delete" and value is not None
        return MapEvent(
            at_ns,
            what,
            one.key(key),
            None if taken else one.value(shown),
            map_id,
            error,
            old=one.value(value if taken else None if partial else old),
            is_new=is_new and what == "update" and not error and not partial,
            writer=writer,
            cpu=cpu if partial else None,
            raw_key=key,
        )

    # -- what readings show ------------------------------------------------------------------

    def _pull(self) -> list[MapEvent]:
        """Read the maps; what two readings in a row show, and no event told since, is news."""
        begun = time.monotonic()
        news: list[MapEvent] = []
        for one in self._readable:
            now, at_ns = one.read(), time.monotonic_ns()
            if now is None:
                continue
            while some := self._take():  # of what the reading shows already
                news += some
                if some[-1].at_ns > at_ns:
                    break
            news += self._found(one, now, at_ns, at_once=False)
        ended = time.monotonic()
        self._next_pull = ended + max(self.pull_s, ended - begun)
        return news

    def _found(
        self, one: _Followed, now: dict[bytes, bytes], at_ns: int, *, at_once: bool
    ) -> list[MapEvent]:
        news = []
        for key, after_ns in one.found(now, at_once=at_once).items():
            value, old = now.get(key), one.latest.get(key)
            if value is None:
                del one.latest[key]
            else:
                one.latest[key] = value
            news.append(
                MapEvent(
                    at_ns,
                    "gone" if value is None else "found",
                    one.key(key),
                    one.value(value),
                    one.table.id,
                    old=one.value(old),
                    is_new=old is None,
                    after_ns=after_ns,
                    raw_key=key,
                )
            )
        self.found += len(news)
        return news


def show(
    which: str | Sequence[str] = (),
    *,
    seconds: float = _NEVER,
    program: int | None = None,
    output: Output | None = None,
    wanted: Wanted | None = None,
) -> None:
    """Print the changes of maps as they are made, and in the end how many there were.

    The changes go to standard output, a line each; what is said of them goes to standard error.

    Parameters
    ----------
    which : str or sequence of str
        Ids, paths of pins, or names of maps. Neither they nor ``program``: all maps of the
        machine, without keys and values.
    seconds : float
        After which it ends; infinite: when it gets SIGINT, whatever that did before.
    program : int, optional
        Id of a program: the maps that it refers to.
    output : Output, optional
        How an event is written; by default a line of text on standard output.
    wanted : Wanted, optional
        Which events are written; by default all.

    Raises
    ------
    BadInput
        No map is meant, or several by one name; or a map's kind has no hook.
    Unavailable
        This kernel refuses the hooks; the sentence says which.
    """
    names = [which] if isinstance(which, str) else list(which)
    ids = which_maps(names, program)
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        with output or Output() as out:
            _show(ids, seconds, interrupted, out, wanted or Wanted())
    finally:
        signal.signal(signal.SIGINT, before)


def _show(
    ids: list[int], seconds: float, interrupted: threading.Event, out: Output, wanted: Wanted
) -> None:
    tables: list[Map] = []
    try:
        tables += [Map.from_id(id) for id in ids]
        meant = [one for one in tables if hookable(one.kind, best_mechanism())]
        with Watch(*(meant or tables)) as watch:  # where none can be hooked, it says why
            for one in tables:
                one.close()  # the watch needs no more than their ids and layouts
            _say_what(watch, meant)
            if len(meant) < len(tables):
                rest = ", ".join(repr(one) for one in tables if one not in meant)
                _say(f"Left out, as changes of their kinds cannot be hooked: {rest}.")
            said = watch.unread
            out.several = len(meant) != 1
            ends = time.monotonic() + seconds
            written = 0
            while (left := ends - time.monotonic()) > 0 and not interrupted.is_set():
                written += out.write(wanted.of(watch.poll(min(left, _STEP_S))))
                said = _say_unread(watch.unread, said)
            written += out.write(wanted.of(watch.end()))
            _say_counts(watch, written)
            _say_unread(watch.unread, said)
            storable = [one.id for one in meant if one.kind not in _NOT_BY_PROGRAMS]
            if watch.found and (users := programs_of(storable)):
                _say(f"What was found may have been written by {', '.join(users)}.")
    finally:
        for table in tables:
            table.close()


def _say_what(watch: Watch, tables: list[Map]) -> None:
    meant = ", ".join(map(repr, tables)) or "all maps, without keys and values,"
    tell = f"Watching {meant} by {watch.mechanism}; the hooks do not see {watch.blind}."
    if len(watch.unread) < len(tables):
        tell += (
            f" That is found by a reading every {watch.pull_s:g} s, with the interval in which it "
            "happened; what comes and goes between two readings is invisible."
        )
    _say(tell)
    if watch.unhooked:
        _say(f"Nor is seen what passes {', '.join(watch.unhooked)}: they could not be hooked.")
    _say_unread(watch.unread, {})


def _say_unread(unread: dict[int, str], said: dict[int, str]) -> dict[int, str]:
    """Say why maps are not read that were when it was said last; answers what is said by now."""
    for id in unread.keys() - said.keys():
        _say(f"Map {id} is not read ({unread[id]}): of it, what the hooks do not see is not found.")
    return unread


def _say_counts(watch: Watch, written: int) -> None:
    _say(
        f"{watch.seen:,} changes were told by hooks, {watch.dropped:,} were dropped on "
        f"their way, {watch.refused:,} were refused, and {watch.found:,} were found by reading."
    )
    if written < (all_of_them := watch.seen + watch.refused + watch.found):
        _say(f"{written:,} of these {all_of_them:,} met the filters.")


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _each(rows: npt.NDArray[Any]) -> list[bytes]:
    """The bytes of each row, padding as it stands."""
    raw, count = rows.tobytes(), len(rows)
    size = len(raw) // count if count else 0
    return [raw[i * size : (i + 1) * size] for i in range(count)]
