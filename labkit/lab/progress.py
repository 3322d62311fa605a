"""What an experiment tells while it runs: words, and a bar with the time that is left."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Final

from tqdm import tqdm

_BETWEEN_LINES_S = 0.5


KEPT: Final = "\x1e"
"""Begins a line that is to stay, wherever lines are shown; others give way to the next one."""


def say(words: str) -> None:
    """Tell the user what goes on now; one short line on standard error."""
    print(words, file=sys.stderr, flush=True)


def keep(words: str) -> None:
    """Tell the user something that is to stay; one sentence on standard error."""
    say(KEPT + words)


class Meter:
    """A bar with the time that is left; a context manager.

    It is tqdm's, said line by line: whoever shows what an experiment says (a terminal, a
    notebook) replaces each line by the next, and no report is filled with old ones.

    Parameters
    ----------
    total : int
        Steps in all.
    done : int
        Steps that were done before, which tell nothing about the speed.
    unit : str
        What a step is, singular.
    """

    def __init__(self, total: int, *, done: int = 0, unit: str = "run") -> None:
        # A thread that looks after the bar would run beside what is measured.
        tqdm.monitor_interval = 0
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=f" {unit}s",
            file=_Lines(),
            ascii=" #",
            mininterval=_BETWEEN_LINES_S,
            miniters=1,
            bar_format="{bar:20} {n_fmt} of {total_fmt}{unit}, {remaining} left",
        )

    def step(self) -> None:
        """Count one step as done."""
        self._bar.update()

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()


class _Lines:
    """What tqdm writes to, to move back and write over: we say it."""

    def write(self, text: str) -> None:
        if words := text.strip("\r\n "):
            say(words)

    def flush(self) -> None:
        pass
