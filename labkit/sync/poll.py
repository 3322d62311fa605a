"""Poll: read the whole map every so often, and compare versions."""

from __future__ import annotations

import math
import time

from labkit.errors import BadInput
from labkit.sync.changes import Changes
from labkit.sync.strategy import Stats, Strategy


class Poll(Strategy):
    """Reads the map by batch at a fixed interval; the difference in versions is what changed.

    It needs nobody's help and sees anybody's writes, but only the newest version of each key at
    each read, and no earlier than at the next one. What it counts as produced are the steps of
    the versions: exact for writers that add 1 with each write and delete of a key, once the key
    is there. A key that is missing counts as one change until it comes back; where very many are
    missing, those that were first are forgotten (`Replica.resync`) and count as new ones then.

    Values of an array may be torn by a write that overlaps the read, and then stay so until the
    next one; a hash replaces its elements whole.

    Parameters
    ----------
    interval_s : float
        Between two reads, seconds. A read that comes late skips those it has missed.
    version : str or None
        As for `Strategy`. None: a read counts one change of each key whose bytes differ.

    Examples
    --------
    >>> from labkit.kernel.maps import Map, MapKind
    >>> with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8) as table:
    ...     table.update(80, 1)
    ...     with Poll(interval_s=0.001) as strategy:
    ...         replica = strategy.attach(Map.from_id(table.id))
    ...         table.update(80, 2)
    ...         for changes in strategy.changes(for_s=1):
    ...             break
    ...         [(int(row["key"]), int(row["version"])) for row in changes]
    [(80, 2)]
    """

    def __init__(self, interval_s: float = 0.01, *, version: str | None = "version") -> None:
        if not 0 < interval_s < math.inf:
            raise BadInput(f"A poll interval is more than 0 s and finite, not {interval_s}.")
        super().__init__(version=version)
        self._interval_s = interval_s
        self._next = 0.0
        self._produced = 0

    def stats(self) -> Stats:
        """Counts by versions; what was coalesced are the versions between two reads."""
        return Stats(
            produced=self._produced,
            delivered=self._delivered,
            dropped=0,
            coalesced=self._coalesced,
            resyncs=self._resyncs,
            unknown=("coalesced",) if self._version is None else (),
        )

    def _subscribe(self) -> None:
        self._next = time.monotonic() + self._interval_s

    def _unsubscribe(self) -> None:
        pass

    def _collect(self, deadline: float) -> Changes:
        while True:
            now = time.monotonic()
            if now < self._next:
                if deadline < self._next:
                    time.sleep(max(0.0, deadline - now))
                    return self._nothing()
                time.sleep(self._next - now)
            # Late reads are skipped, not made up for: they would only see the same.
            late = (time.monotonic() - self._next) // self._interval_s
            self._next += (late + 1) * self._interval_s
            news = self._read()
            if len(news) or time.monotonic() >= deadline:
                return news

    def _read(self) -> Changes:
        """Read the map whole; answers what changed since the last read, and counts it."""
        started_ns = time.monotonic_ns()
        news, steps = self.replica.resync(self.table.snapshot(), started_ns=started_ns)
        self._resyncs += 1
        self._produced += steps
        self._delivered += len(news)
        self._coalesced += steps - len(news)
        return news
