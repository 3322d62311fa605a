"""Measure in a process of its own: bounded in time, and nothing is left when it dies.

The worker holds every program, map and link of the experiment, so that the kernel frees
them however it ends. It hands over one thing: the directory of the saved run. It is the
leader of a process group, dies with its parent, and has a guard: a small process that ends
the whole group once the worker is gone, whatever killed it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from labkit import errors
from labkit.analysis import runs
from labkit.analysis.runs import Run
from labkit.errors import BadInput, LabError, TimedOut
from labkit.failures.experiment import find
from labkit.kernel.parallel import die_with_parent

RUNS = Path(__file__).resolve().parents[1] / "runs"
"""Where runs are saved unless the caller says otherwise."""

TIME_LIMIT_S = {"quick": 120.0, "full": 900.0}
"""Bound for one experiment, seconds."""


def measure(
    experiment: str,
    profile: str = "quick",
    changed: Mapping[str, Any] | None = None,
    *,
    folder: Path = RUNS,
    time_limit_s: float | None = None,
    say: Callable[[str], None] | None = None,
) -> Run:
    """Run an experiment in a worker, save the run, and load it back from disk.

    Parameters
    ----------
    experiment : str
        Id, as ``python -m labkit list`` shows it.
    profile : str
        ``quick`` or ``full``.
    changed : mapping, optional
        Parameters that differ from the profile's.
    folder : Path
        Folder of runs.
    time_limit_s : float, optional
        Seconds until the worker is killed; by default `TIME_LIMIT_S` of the profile.
    say : callable, optional
        Gets each line of progress; without it they go to standard error.

    Returns
    -------
    Run
        As it stands on disk.

    Raises
    ------
    BadInput
        Before a worker is started.
    SaveFailed
        The folder of runs cannot be written, or the disk is full.
    Unavailable
        The kernel lacks a feature.
    TimedOut
        The time limit passed; the worker and all its children were killed.
    LabError
        The worker failed; the sentence says how.
    """
    find(experiment).parameters(profile, changed)
    limit = TIME_LIMIT_S[profile] if time_limit_s is None else time_limit_s
    if not limit > 0:
        raise BadInput(f"A time limit is a number of seconds above 0, not {limit!r}.")
    check_writable(Path(folder))
    order = {
        "experiment": experiment,
        "profile": profile,
        "changed": dict(changed or {}),
        "folder": str(Path(folder).absolute()),
        "parent": os.getpid(),
    }
    worker = subprocess.Popen(
        [sys.executable, "-m", "labkit.measure", json.dumps(order)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,  # Ctrl-C reaches us, and we end the worker with all its children
    )
    try:
        answer, noise = _attend(worker, experiment, time.monotonic() + limit, limit, say)
        status = worker.wait(10)
    finally:
        _end(worker)
    try:
        outcome = json.loads(answer.splitlines()[-1])
    except (ValueError, IndexError):
        last = noise[-1] if noise else "it said nothing"
        raise LabError(
            f"The worker of {experiment} ended with status {status} and no run: {last}"
        ) from None
    if "error" in outcome:
        raise _error(outcome["kind"])(outcome["error"])
    return runs.load(Path(outcome["path"]))


def _attend(
    worker: subprocess.Popen[bytes],
    experiment: str,
    deadline: float,
    limit: float,
    say: Callable[[str], None] | None,
) -> tuple[str, list[str]]:
    """Pass progress on as it comes; return the answer and the last lines of noise."""
    assert worker.stdout is not None and worker.stderr is not None
    answer, pending, noise = bytearray(), b"", [""]
    with selectors.DefaultSelector() as waiting:
        waiting.register(worker.stdout, selectors.EVENT_READ)
        waiting.register(worker.stderr, selectors.EVENT_READ)
        # A pipe is open as long as any process of the group has it; the guard sees to it that
        # none outlives the worker.
        while waiting.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimedOut(
                    f"{experiment} did not end within {limit:g} s and was stopped; give it more "
                    "time, or less work by its parameters."
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


def check_writable(folder: Path) -> None:
    """Refuse at once what would only show when the run is saved."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise runs.SaveFailed(
            f"Runs cannot be saved in {folder} ({error.strerror or error}); free some space or "
            "name a folder that can be written."
        ) from None


def _pass_on(words: str, say: Callable[[str], None] | None) -> None:
    if say is not None:
        say(words)
    else:
        print(words, file=sys.stderr, flush=True)


def _end(worker: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait(10)
    for stream in (worker.stdout, worker.stderr):
        if stream is not None:
            stream.close()


def _error(kind: str) -> type[LabError]:
    named = getattr(errors, kind, LabError)
    return named if isinstance(named, type) and issubclass(named, LabError) else LabError


def _work(order: dict[str, Any]) -> dict[str, str]:
    try:
        run = find(order["experiment"]).run(order["profile"], order["changed"])
        return {"path": str(runs.save(run, Path(order["folder"])))}
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
    if sys.platform != "linux":  # nothing to guard: the experiment says what it lacks here
        print(json.dumps(_work(order)), flush=True)
        return
    die_with_parent()
    if os.getppid() != order["parent"]:
        sys.exit("The process that ordered this run has gone.")
    with _guarded():
        answer = json.dumps(_work(order))
    print(answer, flush=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
