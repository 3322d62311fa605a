"""A function in a process of its own: bounded in time, and nothing is left when it dies.

The worker holds every program, map and link that its function makes, so that the kernel frees
them however it ends. It hands over one thing, the function's answer. It is the leader of a process
group, dies with its parent, and has a guard: a small process that ends the whole group once the
worker is gone, whatever killed it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from labkit import errors
from labkit.errors import LabError, TimedOut
from labkit.kernel.closing import Closing
from labkit.kernel.parallel import die_with_parent

Say = Callable[[str], None]


class Worker(Closing):
    """A process that calls one function; a context manager that ends it with all its children.

    It lives no longer than the thread that made it.

    Parameters
    ----------
    function : str
        ``"package.module:function"``; takes JSON values and returns one.
    arguments : mapping
        Keyword arguments, JSON values.
    name : str
        What it does, for messages.
    pass_fds : sequence of int
        Descriptors that it inherits under the same numbers.
    """

    def __init__(
        self,
        function: str,
        arguments: Mapping[str, Any],
        *,
        name: str,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._name = name
        order = {"function": function, "arguments": dict(arguments), "parent": os.getpid()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(order)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # Ctrl-C reaches us, and we end the worker with all its children
            pass_fds=pass_fds,
        )

    def answer(self, limit_s: float, say: Say | None = None) -> Any:
        """Wait for what the function returns.

        Parameters
        ----------
        limit_s : float
            Seconds from now until it is given up.
        say : callable, optional
            Gets each line of progress; without it they go to standard error.

        Raises
        ------
        TimedOut
            The limit passed.
        LabError
            What the function raised of this kind; or it failed otherwise, and the sentence says
            how.
        """
        answer, noise = self._attend(time.monotonic() + limit_s, limit_s, say)
        status = self._process.wait(10)
        try:
            outcome = json.loads(answer.splitlines()[-1])
        except (ValueError, IndexError):
            last = noise[-1] if noise else "it said nothing"
            raise LabError(
                f"The worker of {self._name} ended with status {status} and no answer: {last}"
            ) from None
        if "error" in outcome:
            raise _error(outcome["kind"])(outcome["error"])
        return outcome["answer"]

    def _attend(self, deadline: float, limit_s: float, say: Say | None) -> tuple[str, list[str]]:
        """Pass progress on as it comes; return the answer and the last lines of noise."""
        worker = self._process
        assert worker.stdout is not None and worker.stderr is not None
        answer, pending, noise = bytearray(), b"", [""]
        with selectors.DefaultSelector() as waiting:
            waiting.register(worker.stdout, selectors.EVENT_READ)
            waiting.register(worker.stderr, selectors.EVENT_READ)
            # A pipe is open as long as any process of the group has it; the guard sees to it
            # that none outlives the worker.
            while waiting.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimedOut(
                        f"{self._name} did not end within {limit_s:g} s and was stopped; give it "
                        "more time, or less work by its parameters."
                    )
                for key, _ in waiting.select(left):
                    piece = os.read(key.fd, 1 << 16)
                    if not piece:
                        waiting.unregister(key.fileobj)
                    elif key.fileobj is worker.stdout:
                        answer += piece
                    else:
                        *lines, pending = (pending + piece).split(b"\n")
                        for line in lines:
                            words = line.decode(errors="replace")
                            noise = [*noise[-20:], words]
                            _pass_on(words, say)
        return answer.decode(), [line for line in noise if line.strip()]

    def close(self) -> None:
        """End the worker and its children; safe to call twice."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


def _pass_on(words: str, say: Say | None) -> None:
    if say is not None:
        say(words)
    else:
        print(words, file=sys.stderr, flush=True)


def _error(kind: str) -> type[LabError]:
    named = getattr(errors, kind, LabError)
    return named if isinstance(named, type) and issubclass(named, LabError) else LabError


def _call(order: dict[str, Any]) -> dict[str, Any]:
    module, _, function = order["function"].partition(":")
    try:
        return {"answer": getattr(importlib.import_module(module), function)(**order["arguments"])}
    except LabError as error:
        return {"error": str(error), "kind": type(error).__name__}


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """Have a process end our whole group when we are gone, also after kill -9."""
    worker, group = os.getpid(), os.getpgid(0)
    guard = os.fork()
    if guard == 0:
        os.closerange(0, os.sysconf("SC_OPEN_MAX"))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGINT, signal.SIGTERM})
        die_with_parent(signal.SIGUSR1)
        if os.getppid() == worker:
            signal.sigwait({signal.SIGUSR1})
        os.killpg(group, signal.SIGKILL)  # us as well
    try:
        yield
    finally:
        os.kill(guard, signal.SIGKILL)
        os.waitpid(guard, 0)


def _main(order: dict[str, Any]) -> None:
    if sys.platform != "linux":  # nothing to guard: the function says what it lacks here
        print(json.dumps(_call(order)), flush=True)
        return
    die_with_parent()
    if os.getppid() != order["parent"]:
        sys.exit("The process that ordered this work has gone.")
    with _guarded():
        answer = json.dumps(_call(order))
    print(answer, flush=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
