"""The one interface of all strategies: attach to a map, poll for its changes, keep a replica."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from labkit.errors import BadInput
from labkit.kernel.closing import Closing
from labkit.kernel.maps import OF_MAPS, PER_CPU, Map
from labkit.sync.changes import Changes, require_version
from labkit.sync.replica import Bools, Replica


@dataclass(frozen=True)
class Stats:
    """What became of the changes since the strategy was attached.

    Once the writers have stopped and `Strategy.poll` brought nothing more,
    produced = delivered + dropped + coalesced, exactly.

    Attributes
    ----------
    produced : int
        Changes that were made, as far as this strategy can count: by the counters of the
        programs that emit events, or by the steps of versions where nothing is emitted.
    delivered : int
        Changes handed out by `Strategy.poll`, those of resyncs not counted.
    dropped : int
        Events that found no room on their way, by the programs' own counters.
    coalesced : int
        Changes that were passed over because a newer one of their key was delivered.
    repaired : int
        Changes that resyncs brought: the newest version of what was dropped, or of what
        somebody wrote who emits nothing.
    resyncs : int
        Snapshots taken since the first.
    unread_bytes, free_bytes, size_bytes : int or None
        How the ring stands, where there is one.
    unknown : tuple of str
        What nobody can tell of values without a version: ``coalesced`` (values that stood only
        between two readings are in no count), ``order`` (whether two writers' events of a key came
        in the order of their changes; a reading of the map sets it right).
    """

    produced: int
    delivered: int
    dropped: int
    coalesced: int
    repaired: int = 0
    resyncs: int = 0
    unread_bytes: int | None = None
    free_bytes: int | None = None
    size_bytes: int | None = None
    unknown: tuple[str, ...] = ()


class Strategy(Closing, ABC):
    """A way to follow one map; a context manager.

    `attach` subscribes first and takes a snapshot then, so that no change falls between the
    two; what the snapshot holds already is passed over when it arrives as a change.
    Every change that `poll` hands out stands in `replica` by then.

    A strategy is used by one thread. The value of the map has a version that only grows with
    each write of its key; a delete by a writer that cooperates has a version of its own.

    Parameters
    ----------
    version : str or None
        Name of the value's field that is its version; ignored where the value is a plain
        unsigned integer, which then is the version. None: the value has none, or may go back.
        Then a change has as ``version`` the number of its arrival here, a reading of the map
        brings what differs by its bytes, and `Stats.unknown` says what nobody can tell.
    """

    def __init__(self, *, version: str | None = "version") -> None:
        self._version = version
        self._table: Map | None = None
        self._replica: Replica | None = None
        self._closed = False
        self._delivered = self._coalesced = self._repaired = self._resyncs = 0

    @property
    def table(self) -> Map:
        """The map that is followed; our own descriptor of it.

        Raises
        ------
        BadInput
            Nothing is attached, or the strategy is closed.
        """
        if self._table is None or self._closed:
            raise self._unusable()
        return self._table

    @property
    def replica(self) -> Replica:
        """The copy of the map; everything delivered so far stands in it.

        Raises
        ------
        BadInput
            Nothing is attached, or the strategy is closed.
        """
        if self._replica is None or self._closed:
            raise self._unusable()
        return self._replica

    def attach(self, table: Map) -> Replica:
        """Begin to follow a map.

        Parameters
        ----------
        table : Map
            Opened by id, pin, name or descriptor; it stays the caller's, who may close it.

        Returns
        -------
        Replica
            It holds what the map held; `poll` keeps it up to date.

        Raises
        ------
        BadInput
            Its values have no version and ``version`` is not None, the strategy cannot follow this
            map, or follows one already.
        MapError
            The kernel's refusal.
        """
        if self._closed:
            raise self._unusable()
        if self._table is not None:
            raise BadInput(f"This strategy follows {self._table!r} already: make another one.")
        if table.kind in PER_CPU | OF_MAPS:
            raise BadInput(
                f"{table!r} has no single value for a key (one for each CPU, or a map): it can be "
                "watched, but not copied."
            )
        if self._version is not None:
            require_version(table, self._version)
        self._table = Map.from_fd(table.fd, key=table.key_dtype, value=table.value_dtype)
        try:
            self._replica = Replica(self._table, version=self._version)
            self._subscribe()
            started_ns = time.monotonic_ns()
            self._replica.load(self._table.snapshot(), started_ns=started_ns)
        except BaseException:
            self.close()
            raise
        return self._replica

    def poll(self, timeout_s: float) -> Changes:
        """Wait for changes, bring the replica up to date, and hand them out.

        Parameters
        ----------
        timeout_s : float
            How long to wait for the first of them, seconds. A snapshot that is due is not cut
            short by it.

        Returns
        -------
        numpy.ndarray
            Rows of `labkit.sync.changes.change_dtype`, empty if none came; yours to keep.
            The versions of a key only grow, from row to row and from call to call.

        Raises
        ------
        BadInput
            The timeout is no bound, or nothing is attached.
        SharedRing
            Somebody else reads the ring of events too: nobody can tell any more what was lost.
        """
        if self._replica is None or self._closed:
            raise self._unusable()
        return self._collect(time.monotonic() + bounded(timeout_s))

    def changes(self, for_s: float) -> Iterator[Changes]:
        """Yield changes as they come, for a bounded time.

        Parameters
        ----------
        for_s : float
            Seconds after which the iteration ends.

        Yields
        ------
        numpy.ndarray
            As `poll` returns them, never empty.
        """
        deadline = time.monotonic() + bounded(for_s)
        while (left := deadline - time.monotonic()) > 0:
            some = self.poll(left)
            if len(some):
                yield some

    @property
    def behind(self) -> bool:
        """Whether changes are known to be missing here, until the resync that is due."""
        return False

    @abstractmethod
    def stats(self) -> Stats:
        """What became of the changes since `attach`."""

    def close(self) -> None:
        """Stop following; safe to call twice. The map and what it holds are not touched."""
        self._closed = True
        self._unsubscribe()
        if self._table is not None:
            self._table.close()

    # -- what a strategy is made of ------------------------------------------------------

    @abstractmethod
    def _subscribe(self) -> None:
        """Begin to collect changes of ``self.table``; the first snapshot comes after it."""

    @abstractmethod
    def _unsubscribe(self) -> None:
        """Undo `_subscribe`; called by `close`, also twice, also when never attached."""

    @abstractmethod
    def _collect(self, deadline: float) -> Changes:
        """Changes that came by a moment of ``time.monotonic``; it returns with the first."""

    def _apply(self, changes: Changes) -> Changes:
        """Bring changes into the replica; answers those that were news, and counts both."""
        return self._count_news(changes, self.replica.apply(changes))

    def _count_news(self, changes: Changes, fresh: Bools) -> Changes:
        """Of changes that were applied those that were news; counts both."""
        news = changes if np.count_nonzero(fresh) == len(changes) else changes[fresh]
        self._delivered += len(news)
        self._coalesced += len(changes) - len(news)
        return news

    def _resync(self) -> Changes:
        """Bring a snapshot into the replica; answers what was news, and counts it."""
        started_ns = time.monotonic_ns()
        news = self.replica.resync(self.table.snapshot(), started_ns=started_ns).changes
        self._resyncs += 1
        self._repaired += len(news)
        return news

    def _nothing(self) -> Changes:
        return np.zeros(0, self.replica.change_dtype)

    def _unusable(self) -> BadInput:
        if self._closed:
            return BadInput("This strategy is closed: make a new one.")
        return BadInput("This strategy follows no map yet: attach one.")


def bounded(seconds: float) -> float:
    """A wait that ends, or `BadInput`."""
    if not 0 <= seconds < math.inf:
        raise BadInput(f"A wait is bounded: give seconds from 0 on, not {seconds}.")
    return seconds
