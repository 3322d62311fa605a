"""Double map: all keys change at once, because readers are switched from one map to the next.

Map in map. An outer array names in its first slot the map that is in force. A writer fills another
one, the spare, and puts it there: one update of one slot, so a reader has the old generation or
the new one, and a writer that dies anywhere leaves a whole one in force.

The spare is a new map each time. The kernel gives the memory of the old one to others only after
its last reader is gone: it frees a map that was inside another one after a grace period of ordinary
programs and, since Linux 6.8 (kernel/bpf/syscall.c, ``free_after_mult_rcu_gp``), one of sleepable
programs. To fill the old map anew would be right for ordinary programs alone, for which the update
of an outer map waits (``maybe_wait_bpf_programs``); sleepable programs and processes may still read
it then. The experiment switch-cost shows both, and what a new map costs.

That wait is most of what a switch costs, and a process cannot ask for a shorter one: the kernel
calls ``synchronize_rcu``, and no flag of an update says otherwise (``maybe_wait_bpf_programs``, as
of Linux 6.18). Only an administrator can, for all of the machine: with 1 in
``/sys/kernel/rcu_expedited`` (kernel/rcu/update.c, ``rcu_gp_is_expedited``) an update of an outer
map took 35 us instead of 16 ms (medians of 40, five times in turns, two CPUs, beside other load).
Every grace period of the machine then interrupts all its CPUs, and a process that is killed leaves
it so: nothing here does it.

The number of the generation is the name of its map (``gen_2a``): so it changes with the switch, by
the same store, and ``bpftool map show`` tells it. The map is frozen before the switch: no process
can write into a generation that others read.

Index flip. Two halves of one array and a word that tells which counts: the flip waits for nobody,
so the writer has to wait, before it fills the half that was in force before.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput, LabError, TimedOut, Unavailable
from labkit.kernel import libbpf
from labkit.kernel.closing import Closing
from labkit.kernel.libbpf import MapFlag, MapKind
from labkit.kernel.maps import KeyAbsent, Map, Snapshot
from labkit.sync.changes import Changes
from labkit.sync.poll import Poll
from labkit.sync.replica import Replica

IN_FORCE: Final = 0
"""The slot of the outer map that names the map in force."""

_NAME: Final = "gen_"
_LONGEST_WAIT_S: Final = 30.0  # for another writer's switch
_LOOKS: Final = 1_000  # at a map that is replaced and freed while we open it


class VersionMismatch(LabError):
    """Somebody else published meanwhile; nothing of ours is visible.

    Attributes
    ----------
    expected, current : int
        The generation that the writer had read, and the one that is in force.
    """

    def __init__(self, expected: int, current: int) -> None:
        super().__init__(
            f"Generation {current} is in force, not {expected}: somebody else published; read it, "
            "put your changes into it and publish again."
        )
        self.expected, self.current = expected, current

    def __reduce__(self) -> tuple[type[VersionMismatch], tuple[int, int]]:
        return type(self), (self.expected, self.current)


@dataclass(frozen=True)
class Layout:
    """How the map of each generation is made.

    Attributes
    ----------
    key, value : dtype-like
        Layouts; the value carries a version if `DoubleMap` shall follow.
    max_entries : int
        Keys of a generation at most.
    kind : MapKind
        Map type.
    flags : MapFlag
        Creation flags.
    """

    key: npt.DTypeLike
    value: npt.DTypeLike
    max_entries: int
    kind: MapKind = MapKind.HASH
    flags: MapFlag = MapFlag.NONE

    def new(self, name: str) -> Map:
        """Create one map of this layout; the caller closes it."""
        return Map.create(
            self.kind,
            key=self.key,
            value=self.value,
            max_entries=self.max_entries,
            flags=self.flags,
            name=name,
        )

    def outer(self, name: str = "generations") -> Map:
        """Create an outer map for such maps, its slot empty; the caller closes it."""
        with self.new("template") as template:
            return Map.create(
                MapKind.ARRAY_OF_MAPS,
                key="u4",
                value="u4",
                max_entries=1,
                inner=template,
                name=name,
            )


def published(outer: Map, layout: Layout | None = None) -> tuple[int, Map | None]:
    """Open the map that is in force.

    Parameters
    ----------
    outer : Map
        Array of maps whose slot `IN_FORCE` is switched by a `DoubleMapWriter`. Before Linux 6.8
        looking into it waits for a grace period.
    layout : Layout, optional
        Layouts of key and value, where the map's BTF does not tell.

    Returns
    -------
    tuple of (int, Map or None)
        Number of the generation, and its map, which the caller closes; 0 and None before the
        first one. Whoever holds it may read on after a switch: no writer touches it again.

    Raises
    ------
    BadInput
        The map in force was not put there by a `DoubleMapWriter`.
    TimedOut
        It was replaced again and again while it was opened.
    """
    given = {} if layout is None else {"key": layout.key, "value": layout.value}
    for _ in range(_LOOKS):
        try:
            identifier = int(outer.lookup(IN_FORCE))
        except KeyAbsent:
            return 0, None
        try:
            found = Map.from_id(identifier, **given)
        except KeyAbsent:
            continue  # replaced and freed between the two calls
        return _number(found), found
    raise TimedOut(f"{outer!r} was switched at each of {_LOOKS:,} attempts to open what it names.")


def _number(inner: Map) -> int:
    try:
        if not inner.name.startswith(_NAME):
            raise ValueError
        return int(inner.name.removeprefix(_NAME), 16)
    except ValueError:
        sentence = f"{inner!r} is in force and no generation: its name is not {_NAME}NUMBER."
        inner.close()
        raise BadInput(sentence) from None


class DoubleMapWriter:
    """Publishes whole generations of a table through an outer map.

    Any number of writers, in any processes, may publish through one outer map. Each says which
    generation it builds upon; one whose generation is no longer in force is refused. Compare and
    switch are one step under a lock that the kernel takes back when its holder dies.

    Parameters
    ----------
    outer : Map
        Array of maps; stays the caller's, as do the generations in it.
    layout : Layout
        Of the maps in it.

    Raises
    ------
    BadInput
        The map is no array of maps.

    Examples
    --------
    >>> policy = Layout(key="u4", value="u8", max_entries=8)
    >>> with policy.outer() as outer:
    ...     writer = DoubleMapWriter(outer, policy)
    ...     first = writer.publish([80, 443], [1, 1], expected=0)
    ...     with DoubleMap() as strategy:
    ...         replica = strategy.attach(outer)
    ...         second = writer.publish([80, 443], [2, 2], expected=first)
    ...         for changes in strategy.changes(for_s=1):
    ...             break
    ...         sorted((int(row["key"]), int(row["version"])) for row in changes)
    [(80, 2), (443, 2)]
    """

    def __init__(self, outer: Map, layout: Layout) -> None:
        _require_outer(outer)
        self._outer, self._layout = outer, layout

    def read(self) -> tuple[int, Snapshot]:
        """The generation in force, to build the next one upon.

        Returns
        -------
        tuple of (int, Snapshot)
            Its number, to be given as ``expected``, and all its entries; 0 and none before the
            first one.
        """
        generation, inner = published(self._outer, self._layout)
        if inner is None:
            key, value = np.dtype(self._layout.key), np.dtype(self._layout.value)
            return 0, Snapshot(np.zeros(0, key), np.zeros(0, value), complete=True, restarts=0)
        with inner:
            return generation, inner.snapshot()

    def publish(self, keys: npt.ArrayLike, values: npt.ArrayLike, *, expected: int) -> int:
        """Put a new generation in force, or leave the old one there.

        Ordinary programs that might use the old one have ended when it returns.

        Parameters
        ----------
        keys : array-like, shape (n,)
            All keys of the new generation.
        values : array-like, shape (n,)
            Their values.
        expected : int
            The generation that it replaces; 0: it is the first.

        Returns
        -------
        int
            Number of the new generation.

        Raises
        ------
        VersionMismatch
            Another generation is in force: somebody else was faster.
        MapError
            The kernel's refusal, `PartialBatch` if there are more keys than room.
        TimedOut
            Another writer stands still in the middle of its switch.
        """
        self._require(expected)  # before the work, too: it may be for nothing
        with self._layout.new(f"{_NAME}{expected + 1:x}") as fresh:
            fresh.update_many(keys, values)
            fresh.freeze()
            with _alone(self._outer):
                self._require(expected)
                self._outer.update(IN_FORCE, fresh.fd)
        return expected + 1

    def _require(self, expected: int) -> None:
        current, inner = published(self._outer)
        if inner is not None:
            inner.close()
        if current != expected:
            raise VersionMismatch(expected, current)


class DoubleMap(Poll):
    """Follows the generations of an outer map: each change of all keys comes whole, at once.

    It reads every ``interval_s`` which map is in force, which costs one lookup, and reads that map
    only when it is another one: then one call of `poll` brings all that changed, and the replica
    goes from one generation to the next between two calls. Generations that came and went between
    two reads are passed over (`passed_over`), and so are their versions in ``stats()``.

    What somebody writes into the map in force itself is not seen: a process cannot, since it is
    frozen, a program should not.

    Parameters
    ----------
    interval_s : float
        Between two reads, seconds. A read that comes late skips those it has missed.
    layout : Layout, optional
        Layouts of key and value, where the maps' BTF does not tell.
    version : str
        As for `Strategy`.
    """

    def __init__(
        self, interval_s: float = 0.01, *, layout: Layout | None = None, version: str = "version"
    ) -> None:
        super().__init__(interval_s, version=version)
        self._layout = layout
        self._outer: Map | None = None
        self._generation = self._passed_over = 0

    @property
    def generation(self) -> int:
        """The generation that the replica holds."""
        return self._generation

    @property
    def passed_over(self) -> int:
        """Generations since `attach` that came and went between two reads."""
        return self._passed_over

    def attach(self, table: Map) -> Replica:
        """Begin to follow an outer map; `Strategy.table` is the map in force from then on.

        Parameters
        ----------
        table : Map
            Array of maps that a `DoubleMapWriter` publishes through; it stays the caller's.

        Returns
        -------
        Replica
            It holds the generation in force.

        Raises
        ------
        BadInput
            The map is no array of maps, has no generation yet, its values have no version, or
            the strategy follows one already.
        """
        if self._closed or self._table is not None:
            return super().attach(table)  # refuses
        _require_outer(table)
        generation, inner = published(table, self._layout)
        if inner is None:
            raise BadInput(f"{table!r} has no generation yet: publish one first.")
        with inner:
            replica = super().attach(inner)
        self._outer, self._generation = Map.from_fd(table.fd), generation
        return replica

    def close(self) -> None:
        """Stop following; safe to call twice. Generations stay as they are."""
        super().close()
        if self._outer is not None:
            self._outer.close()

    def _read(self) -> Changes:
        assert self._outer is not None
        if int(self._outer.lookup(IN_FORCE)) == self.table.id:
            return self._nothing()
        generation, inner = published(self._outer, self._layout)
        if inner is None:
            raise BadInput(f"{self._outer!r} was emptied: there is nothing to follow any more.")
        self.table.close()
        self._table = inner
        self._passed_over += generation - self._generation - 1
        self._generation = generation
        return super()._read()


class IndexFlipWriter(Closing):
    """Publishes generations in two halves of one array, by a word that tells which one counts.

    The generation's lowest bit is the half in force. A flip is one store that waits for nobody;
    so before a half is filled again, `publish` waits until every ordinary program that may still
    read it has ended. There is no such wait for sleepable programs and processes: they have to
    compare the word after they have read, and read again if it moved.

    Parameters
    ----------
    halves : Map
        Array with an even number of entries: the first half of them is the table of the even
        generations, the second that of the odd ones.
    word : Map
        Array of one entry of 8 bytes: the number of the generation in force.

    Raises
    ------
    BadInput
        The maps do not fit.
    """

    def __init__(self, halves: Map, word: Map) -> None:
        if halves.kind is not MapKind.ARRAY or halves.max_entries % 2:
            raise BadInput(f"An index flip wants an array of two halves, not {halves!r}.")
        if word.kind is not MapKind.ARRAY or word.value_size != 8:
            raise BadInput(f"An index flip wants an array of one 8-byte word, not {word!r}.")
        self._halves, self._word = halves, word
        self._keys = np.arange(halves.max_entries // 2, dtype=np.uint32)
        self._readers = OrdinaryReaders()

    def publish(self, values: npt.ArrayLike, *, expected: int) -> int:
        """Put a new generation in force, or leave the old one there.

        Parameters
        ----------
        values : array-like, shape (n,)
            One for every entry of a half.
        expected : int
            The generation that it replaces; 0 before the first one.

        Returns
        -------
        int
            Number of the new generation.

        Raises
        ------
        VersionMismatch
            Another generation is in force: somebody else was faster.
        MapError
            The kernel's refusal.
        TimedOut
            Another writer stands still in the middle of its flip.
        """
        with _alone(self._word):
            current = int(self._word.lookup(0))
            if current != expected:
                raise VersionMismatch(expected, current)
            # Here and not after the flip: a writer that was killed in between waited for nobody.
            self._readers.wait()
            half = (expected + 1) % 2
            self._halves.update_many(self._keys + half * len(self._keys), values)
            self._word.update(0, expected + 1)
        return expected + 1

    def close(self) -> None:
        """Free what the waiting needs; safe to call twice. The maps stay the caller's."""
        self._readers.close()


class OrdinaryReaders:
    """Waits until all programs that run now have ended, sleepable ones excepted.

    User space has no call for it, but the update of any map of maps waits so
    (kernel/bpf/syscall.c, ``maybe_wait_bpf_programs``): one that nobody reads will do.
    """

    def __init__(self) -> None:
        layout = Layout("u4", "u4", 1, MapKind.ARRAY)
        self._outer = layout.outer("grace")
        self._inner = layout.new("grace")

    def wait(self) -> None:
        """Return after a grace period: milliseconds idle, tenths of a second under load."""
        self._outer.update(0, self._inner.fd)

    def close(self) -> None:
        """Free the two maps; safe to call twice."""
        self._outer.close()
        self._inner.close()


def _require_outer(outer: Map) -> None:
    if outer.kind is not MapKind.ARRAY_OF_MAPS:
        raise BadInput(f"Generations are switched in an array of maps, not in {outer!r}.")


@contextmanager
def _alone(table: Map) -> Iterator[None]:
    """Keep other writers of the map out; if we die, the kernel lets them in.

    A file lock, so that the kernel takes it back with the descriptor however its holder ends. All
    BPF objects share one inode: the byte at the map's id stands for the map. The descriptor is
    opened for this switch alone: one that a fork has copied would share the lock.

    Raises
    ------
    TimedOut
        Another writer holds it for longer than a switch takes.
    Unavailable
        This kernel does not lock so.
    """
    mine = libbpf.fd_by_id("map", table.id)
    try:
        deadline = time.monotonic() + _LONGEST_WAIT_S
        while not _locked(mine, table.id):
            if time.monotonic() > deadline:
                raise TimedOut(
                    f"Another writer holds {table!r} for {_LONGEST_WAIT_S:g} s: is it stopped?"
                )
            time.sleep(0.000_5)
        # By trying, as ever: were the inode one of this descriptor alone, nobody would be out.
        other = libbpf.fd_by_id("map", table.id)
        try:
            if _locked(other, table.id):
                raise Unavailable(
                    "This kernel's locks do not keep two writers of a map apart: let one process "
                    "alone publish."
                )
        finally:
            libbpf.close(other)
        yield
    finally:
        libbpf.close(mine)


def _locked(fd: int, byte: int) -> bool:
    request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise Unavailable(
            f"This kernel refuses a lock on a map ({libbpf.error_name(error.errno or 0)}): let one "
            "process alone publish."
        ) from error
    return True
