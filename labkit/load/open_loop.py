"""A writer that changes one version at moments set beforehand: the load of all who follow it."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

import numpy as np
import numpy.typing as npt

from labkit.errors import TimedOut
from labkit.kernel.parallel import Child, another_cpu, shared_array

_HEAD_START_NS = 30_000_000  # until the first write: the follower is polling by then
_SPIN_NS = 150_000  # of the wait for a moment, so much is spun: sleeping is not that exact
_GRACE_S = 10.0


def schedule(changes: int, gap_ms: float, seed: int) -> npt.NDArray[np.int64]:
    """Moments that have nothing to do with a poller's clock.

    They are of a Poisson process that has exactly so many in ``changes * gap_ms``: each is uniform
    over that window, and independent of the others. So is its wait for a poller whose periods fill
    the window without a rest, wherever one of them begins.

    Parameters
    ----------
    changes : int
        How many.
    gap_ms : float
        Mean gap between them, milliseconds.
    seed : int
        The same one gives the same moments.

    Returns
    -------
    numpy.ndarray
        int64, shape ``(changes,)``: nanoseconds after the start, ascending.
    """
    moments = np.random.default_rng(seed).uniform(0, changes * gap_ms * 1e6, changes)
    return np.sort(moments).astype(np.int64)


class OpenLoopWriter:
    """A child process that writes the versions 1, 2, ... each at its moment; a context manager.

    A late write does not shift the ones behind it. Entering forks the child, so enter from the
    main thread, after what it writes to was made.

    Parameters
    ----------
    moments : numpy.ndarray
        Of `schedule`.
    write : callable
        Called in the child with each version.
    closed_loop_ms : float, optional
        Wait before each write until `saw` was told of the version before it; so many
        milliseconds are allowed for that in the mean. The schedule is not kept then.

    Attributes
    ----------
    times : numpy.ndarray
        int64, shape ``(changes, 2)``: start and end of each write, CLOCK_MONOTONIC nanoseconds;
        shared with the child.
    """

    def __init__(
        self,
        moments: npt.NDArray[np.int64],
        write: Callable[[int], object],
        *,
        closed_loop_ms: float = 0.0,
    ) -> None:
        self.times: npt.NDArray[np.int64] = shared_array((len(moments), 2), np.int64)
        self._moments, self._write, self._closed_loop = moments, write, closed_loop_ms > 0
        self._seen = shared_array(1, np.int64)
        limit_s = _GRACE_S + 4 * float(moments[-1]) / 1e9
        self._limit_s = limit_s + 4 * len(moments) * closed_loop_ms / 1e3

    @property
    def intended_ns(self) -> npt.NDArray[np.int64]:
        """When each write was wanted: by the schedule, or at its start in a closed loop."""
        if self._closed_loop:
            return self.times[:, 0].copy()
        intended: npt.NDArray[np.int64] = np.minimum(self._intended, self.times[:, 0])
        return intended

    def saw(self, version: int) -> None:
        """Tell that the follower has this version."""
        self._seen[0] = version

    def all_seen(self) -> bool:
        """Whether the follower has told of the last version.

        Raises
        ------
        TimedOut
            It has not, in a multiple of the time that the schedule takes.
        """
        if time.monotonic() > self._deadline:
            raise TimedOut("The follower did not see the last change in time.")
        return int(self._seen[0]) >= len(self._moments)

    def _run(self) -> None:
        for i, moment in enumerate(self._intended.tolist()):
            while self._closed_loop and self._seen[0] < i:
                time.sleep(0.0001)
            wait_until(moment)
            self.times[i, 0] = time.monotonic_ns()
            self._write(i + 1)
            self.times[i, 1] = time.monotonic_ns()

    def __enter__(self) -> OpenLoopWriter:
        self._deadline = time.monotonic() + self._limit_s
        self._intended = time.monotonic_ns() + _HEAD_START_NS + self._moments
        self._child = Child(self._run, cpu=another_cpu(0))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._child.result()
        finally:
            self._child.close()


def next_poll(moment: int, period_ns: int) -> int:
    """Wait for the next poll of a follower; one that is late skips those that it has missed.

    ``moment`` is when the poll before this one was due, CLOCK_MONOTONIC nanoseconds, and
    ``period_ns`` lies between two polls; answers when this one was due.
    """
    late = time.monotonic_ns() - moment
    moment += max(1, -(-late // period_ns)) * period_ns
    wait_until(moment)
    return moment


def wait_until(moment: int) -> None:
    """Sleep until a moment of CLOCK_MONOTONIC, and spin for the last of it."""
    left = moment - time.monotonic_ns()
    if left > _SPIN_NS:
        time.sleep((left - _SPIN_NS) / 1e9)
    while time.monotonic_ns() < moment:
        pass
