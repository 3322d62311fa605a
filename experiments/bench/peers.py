"""The programs that the benchmarks compare with: libbpf in C and cilium/ebpf in Go.

Their sources are in bpf/peers. Each is a process of its own, which takes orders and keeps its own
time; what it says of single events stands in memory that is shared with it.
"""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from experiments import go_program
from experiments.bench.sync_bars import GO, C
from labkit.errors import LabError, TimedOut, Unavailable
from labkit.kernel import compiler, leftovers
from labkit.kernel.closing import Closing
from labkit.kernel.parallel import ahead_of_others, die_with_parent
from labkit.lab.experiment import say

SOURCES: Final = compiler.SOURCES / "peers"
_BUILD_S: Final = 60.0

MOST_EVENTS: Final = 300_000
"""Of one schedule: a program that wakes its reader for each event makes some 150,000 a second, and
one that falls ten seconds behind gives up."""

HEADER: Final = np.dtype([("stop", "u8"), ("taken", "u8"), ("room", "u8")])
"""``struct ring_log`` of bpf/peers/ring_log.h."""
ROW: Final = np.dtype([("seq", "u8"), ("intended_ns", "u8"), ("seen_ns", "u8")])
"""``struct log_row``."""


@dataclass(frozen=True)
class Policy:
    """Who wakes the reader: the program's choice, and how long the reader sleeps at most.

    Attributes
    ----------
    name : str
        As figures show it.
    wakeup, wakeup_at
        As for `labkit.kernel.ringbuf.wakeup_constants`.
    timer_s : float
        The reader looks by itself after so many seconds; 0: it never sleeps.
    """

    name: str
    wakeup: str
    wakeup_at: int = 1
    timer_s: float = 0.1


def policies(slot: int) -> tuple[Policy, ...]:
    """Every policy that the lab has, for records that take so many bytes in a ring."""
    return (
        Policy("default", "default"),
        Policy("always", "always"),
        Policy("every 64 records", "every-n", 64),
        Policy("64 unread records", "adaptive", 64 * slot),
        Policy("never, 1 ms timer", "never", timer_s=0.001),
        Policy("never, reader spins", "never", timer_s=0.0),
    )


class Told(NamedTuple):
    """What a peer says of itself in the end: records, their sum, time and CPU time."""

    records: int
    total: int
    ns: int
    cpu_ns: int


class Peer(Closing):
    """A running peer; a context manager.

    Parameters
    ----------
    name : str
        `C` or `GO`.
    cpu : int
        All its threads stay on this CPU.
    room : int
        Events that its log holds at most.

    Raises
    ------
    Unavailable
        It cannot be built on this machine; the sentence says why.
    """

    def __init__(self, name: str, *, cpu: int, room: int) -> None:
        self.name = name
        self._open = ExitStack()
        log = os.memfd_create("peer_log")
        self._open.callback(os.close, log)
        size = HEADER.itemsize + room * ROW.itemsize
        os.ftruncate(log, size)
        memory = mmap.mmap(log, size)
        self._header = np.frombuffer(memory, HEADER, count=1)
        self._rows = np.frombuffer(memory, ROW, count=room, offset=HEADER.itemsize)
        self._header["room"] = room

        def settle() -> None:
            die_with_parent()
            os.sched_setaffinity(0, {cpu})

        try:
            program = _built(name)
            try:
                self._process = subprocess.Popen(
                    [f"/proc/self/fd/{program}", str(log)], stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, pass_fds=[program, log], text=True, bufsize=1,
                    preexec_fn=settle,
                )  # fmt: skip
            finally:
                os.close(program)
        except BaseException:
            self.close()
            raise
        self._open.callback(self._end)

    def order(self, words: str) -> None:
        """Give it an order that it answers by itself."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{words}\n")
        self._process.stdin.flush()

    def begin(self, words: str) -> None:
        """Give it an order that ends by `stop`; it waits for events when this returns."""
        self._header["stop"] = self._header["taken"] = 0
        self.order(words)
        if (line := self._line()) != "ready\n":
            raise self._failed(line)

    def stop(self) -> None:
        """Let it end once the ring is empty."""
        self._header["stop"] = 1

    @property
    def taken(self) -> int:
        """Events in its log so far."""
        return int(self._header["taken"][0])

    def log(self) -> npt.NDArray[Any]:
        """Rows of `ROW` of the last order, a copy."""
        return self._rows[: self.taken].copy()

    def answer(self) -> Told:
        """Wait for what it says in the end."""
        line = self._line()
        try:
            return Told(*map(int, line.split()))
        except (TypeError, ValueError):
            raise self._failed(line) from None

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()  # the worker's time limit bounds it

    def _failed(self, line: str) -> LabError:
        return LabError(f"The peer {self.name} ended and said {line!r}.")

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def close(self) -> None:
        """End it; safe to call twice."""
        self._open.close()


@contextmanager
def running(*, cpu: int, room: int = 1) -> Iterator[list[Peer]]:
    """The peers that this machine can build; what is missing is said.

    libbpf in C is always among them.
    """
    with ExitStack() as opened, ahead_of_others():  # as every follower of a load is
        peers = [opened.enter_context(Peer(C, cpu=cpu, room=room))]
        try:
            peers.append(opened.enter_context(Peer(GO, cpu=cpu, room=room)))
        except Unavailable as error:
            say(f"without {GO}: {error}")
        yield peers


def _built(name: str) -> int:
    """Build a peer; the descriptor is all that is left of it."""
    with leftovers.temporary_folder() as folder:
        if name == GO:
            say(f"building the peer {GO}")
            program = go_program.build(SOURCES / "ring_peer.go", folder, modules=go_program.EBPF)
        else:
            program = built_by_gcc(SOURCES / "ring_peer.c", folder)
        return os.open(program, os.O_RDONLY)


def built_by_gcc(source: Path, folder: Path) -> Path:
    """Build one of `SOURCES` that is in C.

    Parameters
    ----------
    source : Path
        The file.
    folder : Path
        Where the program is put.

    Returns
    -------
    Path
        The program.

    Raises
    ------
    Unavailable
        gcc is missing, or does not compile it.
    TimedOut
        It did not end.
    """
    program = folder / source.stem
    command = ["gcc", "-O2", "-o", str(program), str(source), "-lbpf"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_BUILD_S,
            env={**os.environ, "TMPDIR": str(folder)},
        )  # fmt: skip
    except FileNotFoundError:
        raise Unavailable("gcc is missing: install Debian's gcc (make setup does).") from None
    except subprocess.TimeoutExpired:
        raise TimedOut(f"gcc did not end within {_BUILD_S:g} s.") from None
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "")
        raise Unavailable(
            f"{source.name} does not compile ({first.strip() or 'gcc says no more'}): "
            "install Debian's libbpf-dev (make setup does)."
        )
    return program
