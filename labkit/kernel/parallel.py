"""Work at the same time on chosen CPUs: pinned threads, and processes that die with us.

A ``test_run`` and every libbpf call release the interpreter's lock, so threads are
enough where the work is in the kernel; Python loops that race need processes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.errors import LabError, TimedOut
from labkit.kernel.closing import Closing

_PR_SET_PDEATHSIG = 1
_AHEAD = -15  # of -20 to 19; some 28 times the weight of 0


def cpus() -> list[int]:
    """CPUs that this process may use, ascending."""
    return sorted(os.sched_getaffinity(0))


def another_cpu(index: int) -> int:
    """The CPU for the index-th task; wraps around where there are fewer CPUs."""
    usable = cpus()
    return usable[index % len(usable)]


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send this process a signal when the thread that made it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


@contextmanager
def ahead_of_others() -> Iterator[None]:
    """Give this thread, and what it starts meanwhile, more of the CPUs than other load has.

    For two that wait for each other on two CPUs: beside other load they would rarely run at
    the same moment. Without the privilege it changes nothing.
    """
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, _AHEAD)
    try:
        yield
    finally:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, usual)


def together(*tasks: Callable[[], Any], timeout_s: float = 120.0) -> list[Any]:
    """Run tasks at the same time, one thread each, each pinned to its own CPU.

    Parameters
    ----------
    *tasks : callable
        The i-th runs on the i-th usable CPU. All begin at one barrier.
    timeout_s : float
        Bound for all of them together, seconds.

    Returns
    -------
    list
        Results in the order of the tasks.

    Raises
    ------
    TimedOut
        A task did not end in time.
    Exception
        The first error that a task raised.
    """
    usable = cpus()
    barrier = threading.Barrier(len(tasks))
    results: list[Any] = [None] * len(tasks)
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            os.sched_setaffinity(0, {usable[i % len(usable)]})  # of this thread alone
            barrier.wait(timeout_s)
            results[i] = tasks[i]()
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(tasks))]
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    if real:
        raise real[0]
    if errors or any(thread.is_alive() for thread in threads):
        raise TimedOut(f"{len(tasks)} tasks did not end within {timeout_s:g} s.")
    return results


class Child(Closing):
    """A forked process that runs one function and cannot outlive its parent.

    Parameters
    ----------
    work : callable
        Runs in the child; its result comes back by pickle.
    cpu : int, optional
        CPU to pin the child to.

    Notes
    -----
    Fork from the main thread: the kernel kills a child when the *thread* that forked it
    ends.
    """

    def __init__(self, work: Callable[[], Any], *, cpu: int | None = None) -> None:
        self._read, write = os.pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                die_with_parent()
                if os.getppid() != parent:
                    os._exit(1)  # the parent died before the kernel could note our wish
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                os.close(self._read)
                if cpu is not None:
                    os.sched_setaffinity(0, {cpu})
                try:
                    outcome: tuple[bool, Any] = (True, work())
                except Exception as error:
                    outcome = (False, error)
                try:
                    body = pickle.dumps(outcome)
                except Exception:
                    body = pickle.dumps((False, LabError(repr(outcome[1]))))
                with os.fdopen(write, "wb") as pipe:
                    pipe.write(body)
                status = 0
            finally:
                os._exit(status)
        os.close(write)
        self.exit_status: int | None = None

    def result(self, timeout_s: float = 120.0) -> Any:
        """Wait for the function's result.

        Raises
        ------
        TimedOut
            It did not end within ``timeout_s`` seconds; the child is killed.
        LabError
            The child was killed (``exit_status`` is minus the signal).
        Exception
            What the function raised.
        """
        deadline = time.monotonic() + timeout_s
        body = bytearray()
        while True:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._read], [], [], left)[0]:
                self.close()
                raise TimedOut(f"A child process did not end within {timeout_s:g} s.")
            piece = os.read(self._read, 1 << 20)
            if not piece:
                break
            body += piece
        self.close(kill=False)
        if not body:
            raise LabError(f"A child process ended without a result (status {self.exit_status}).")
        good, value = pickle.loads(bytes(body))
        if not good:
            raise value
        return value

    def ended(self) -> bool:
        """Whether the child has ended, or its result waits to be read."""
        return bool(select.select([self._read], [], [], 0)[0])

    def close(self, *, kill: bool = True) -> None:
        """End the child and collect it; safe to call twice."""
        if self.exit_status is not None:
            return
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.exit_status = os.waitstatus_to_exitcode(status)
        os.close(self._read)


def shared_array(shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeroed array in anonymous shared memory, seen by children forked later.

    Returns
    -------
    numpy.ndarray
        Of the given shape and dtype; gone with the last process that maps it.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = mmap.mmap(-1, max(size, 1))
    return np.frombuffer(memory, dtype, count=int(np.prod(shape))).reshape(shape)
