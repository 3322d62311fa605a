"""Programs of the Go module while they run: built once, started, and gone with who started them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments import go_program
from labkit.errors import LabError
from labkit.kernel import leftovers
from labkit.kernel.closing import Closing
from labkit.kernel.parallel import die_with_parent
from labkit.lab.experiment import say

_ENDS_WITHIN_S = 30.0


@contextmanager
def built(package: str, *, detector: bool = False) -> Iterator[Path]:
    """Build a program of the module.

    Parameters
    ----------
    package : str
        Its folder in `experiments.go_program.MODULE`.
    detector : bool
        With the race detector.

    Yields
    ------
    Path
        The program, as long as the block lasts.
    """
    say(f"building {package} in Go{', with the race detector' * detector}")
    with leftovers.temporary_folder() as folder:
        yield go_program.build(
            go_program.MODULE / package, folder, modules=go_program.EBPF, detector=detector
        )


class Started(Closing):
    """A program that runs and speaks by ``orders.Stage``; a context manager.

    Parameters
    ----------
    program : Path
        From `built`.
    *arguments : object
        Of its command line.
    """

    def __init__(self, program: Path, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [str(program), *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, bufsize=1, preexec_fn=die_with_parent,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def said(self) -> list[str]:
        """The words of its next line; the worker's time limit bounds the wait.

        Raises
        ------
        LabError
            It ended instead.
        """
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line.split()
        _, complaint = self._process.communicate()
        raise LabError(f"A program in Go ended before its time: {complaint.strip()[-300:]}")

    def go_on(self, answer: object = "") -> None:
        """Let it leave its stage; what it asked for is the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{answer}\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """Let it leave its last stage, and wait for its end.

        Raises
        ------
        LabError
            It ends with an error.
        """
        _, complaint = self._process.communicate("\n", timeout=_ENDS_WITHIN_S)
        if self._process.returncode:
            raise LabError(f"A program in Go failed: {complaint.strip()[-300:]}")

    def close(self) -> None:
        """End it, whatever it does; safe to call twice."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.communicate()
