"""Hybrid: ring events, and the map read whole whenever the events may not tell all."""

from __future__ import annotations

import math
import time

from labkit.errors import BadInput
from labkit.sync.changes import Changes
from labkit.sync.ring_events import Channel, RingEvents


class Hybrid(RingEvents):
    """Ring events, and a pull when something was dropped, when the stream idles, and at times.

    What was dropped is repaired as by `RingEvents`. A pull after idling finds what was lost
    where nobody counts, and the slow periodic one the writes of those who emit nothing: they
    are seen within ``pull_every_s``, if they give their writes versions.

    Parameters
    ----------
    channel, version, timer_s, gather_s, resync_gap_s
        As for `RingEvents`.
    idle_s : float
        Read the map when no event came for so long, seconds, and again each time after that.
    pull_every_s : float or None
        Read the map so long after it was read last, seconds, however busy the stream is; None:
        never.
    on_loss : bool
        Read the map when a counter or a number tells that an event was dropped. False, with
        ``pull_every_s=None``, pulls when idle only, and then diverges for as long as the stream
        is busy: it is here to show that.

    Examples
    --------
    >>> from labkit.kernel.libbpf import MapKind
    >>> from labkit.kernel.maps import Map
    >>> with (
    ...     Map.create(MapKind.HASH, key="u8", value="u8", max_entries=8) as table,
    ...     Channel.create(1 << 16) as channel,
    ...     Hybrid(channel, pull_every_s=0.05) as strategy,
    ... ):
    ...     replica = strategy.attach(table)
    ...     table.update(80, 1)  # by somebody who emits no event
    ...     for changes in strategy.changes(for_s=5):
    ...         break
    ...     [(int(row["key"]), int(row["version"])) for row in changes]
    [(80, 1)]
    """

    def __init__(
        self,
        channel: Channel,
        *,
        version: str | None = "version",
        timer_s: float = 0.1,
        gather_s: float = 0.0,
        resync_gap_s: float = 0.05,
        idle_s: float = 1.0,
        pull_every_s: float | None = 10.0,
        on_loss: bool = True,
    ) -> None:
        for name, seconds in (("idle_s", idle_s), ("pull_every_s", pull_every_s)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise BadInput(f"{name} is more than 0 s and finite, not {seconds}.")
        super().__init__(
            channel,
            version=version,
            timer_s=timer_s,
            gather_s=gather_s,
            resync_gap_s=resync_gap_s,
        )
        self._idle_s = idle_s
        self._pull_every_s = pull_every_s
        self._on_loss = on_loss
        self._last_event = self._last_pull = 0.0

    def _subscribe(self) -> None:
        super()._subscribe()
        self._last_event = self._last_pull = time.monotonic()

    def _take(self) -> Changes:
        before = self._delivered + self._coalesced
        news = super()._take()
        if self._delivered + self._coalesced > before:
            self._last_event = time.monotonic()
        return news

    def _pull_at(self) -> float:
        at = max(self._last_event, self._last_pull) + self._idle_s
        if self._pull_every_s is not None:
            at = min(at, self._last_pull + self._pull_every_s)
        return min(at, super()._pull_at()) if self._on_loss else at

    def _pull(self) -> Changes:
        news = super()._pull()
        self._last_pull = time.monotonic()
        return news
