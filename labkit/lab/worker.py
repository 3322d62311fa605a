"""A function in a process of its own: bounded in time, and nothing is left when it dies.

The worker holds every program, map and link that its function makes, so that the kernel frees
them however it ends. It hands over one thing, the function's answer. It is the leader of a process
group and dies with its parent; whatever killed it, its group ends with it
(:func:`labkit.kernel.leftovers.own_group`).
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from labkit import errors
from labkit.errors import LabError, TimedOut
from labkit.kernel.closing import Closing
from labkit.kernel.leftovers import own_group
from labkit.kernel.parallel import die_with_parent
from labkit.lab.progress import KEPT

Say = Callable[[str], None]


class Worker(Closing):
    """A process that calls one function; a context manager that ends it with all its children.

    It gets ready while it waits for its order, and lives no longer than the thread that made it.

    Parameters
    ----------
    pass_fds : sequence of int
        Descriptors that it inherits under the same numbers.
    """

    def __init__(self, pass_fds: Sequence[int] = ()) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # Ctrl-C reaches us, and we end the worker with all its children
            pass_fds=pass_fds,
        )

    def answer(
        self,
        function: str,
        arguments: Mapping[str, Any],
        *,
        name: str,
        limit_s: float,
        say: Say | None = None,
    ) -> Any:
        """Give the order, once, and wait for what the function returns.

        Parameters
        ----------
        function : str
            ``"package.module:function"``; takes JSON values and returns one.
        arguments : mapping
            Keyword arguments, JSON values.
        name : str
            What it does, for messages.
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
        order = json.dumps({"function": function, "arguments": dict(arguments)})
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as orders:
            orders.write(order.encode() + b"\n")
        answer, noise = self._attend(name, limit_s, say)
        status = self._process.wait(10)
        try:
            outcome = json.loads(answer.splitlines()[-1])
        except (ValueError, IndexError):
            last = noise[-1] if noise else "it said nothing"
            raise LabError(
                f"The worker of {name} ended with status {status} and no answer: {last}"
            ) from None
        if "error" in outcome:
            raise _error(outcome["kind"])(outcome["error"])
        return outcome["answer"]

    def _attend(self, name: str, limit_s: float, say: Say | None) -> tuple[str, list[str]]:
        """Pass progress on as it comes; return the answer and the last lines of noise."""
        worker, deadline = self._process, time.monotonic() + limit_s
        assert worker.stdout is not None and worker.stderr is not None
        answer, pending, noise = bytearray(), b"", [""]
        with selectors.DefaultSelector() as waiting:
            waiting.register(worker.stdout, selectors.EVENT_READ)
            waiting.register(worker.stderr, selectors.EVENT_READ)
            # A pipe is open as long as any process of the group has it; none outlives the worker.
            while waiting.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimedOut(
                        f"{name} did not end within {limit_s:g} s and was stopped; give it "
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
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def __del__(self) -> None:
        if "_process" in self.__dict__:  # it may not have been started
            self.close()


def _pass_on(words: str, say: Say | None) -> None:
    if say is not None:
        say(words)
    else:
        print(words.replace(KEPT, ""), file=sys.stderr, flush=True)


def _error(kind: str) -> type[LabError]:
    named = getattr(errors, kind, LabError)
    return named if isinstance(named, type) and issubclass(named, LabError) else LabError


def _call(order: dict[str, Any]) -> dict[str, Any]:
    module, _, function = order["function"].partition(":")
    # Elsewhere there is nothing to guard: the function says what it lacks.
    guarded = own_group() if sys.platform == "linux" else contextlib.nullcontext()
    try:
        with guarded:
            call = getattr(importlib.import_module(module), function)
            return {"answer": call(**order["arguments"])}
    except LabError as error:
        return {"error": str(error), "kind": type(error).__name__}


def _main(parent: int) -> None:
    if sys.platform == "linux":
        die_with_parent()
        if os.getppid() != parent:
            sys.exit("The process that made this worker has gone.")
    # What is slow to import and never edited; the lab's own modules are read when they are wanted.
    for library in ("pandas", "pyarrow.parquet"):
        importlib.import_module(library)
    order = sys.stdin.readline()
    if not order:
        return  # nobody wants it any more
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    print(json.dumps(_call(json.loads(order))), flush=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
