"""Figures as a text file for Prometheus: node_exporter's textfile collector reads it."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from labkit.console import require_replaceable
from labkit.errors import BadInput, LabError


@dataclass(frozen=True)
class Metric:
    """One metric of the exposition format.

    Attributes
    ----------
    name : str
        With its unit at the end, as Prometheus wants it (``..._seconds``).
    kind : str
        ``gauge`` or ``counter``.
    help : str
        What it says, in one line.
    samples : sequence of (mapping, float)
        Labels and value of each.
    """

    name: str
    kind: str
    help: str
    samples: Sequence[tuple[Mapping[str, str], float]]


def require_writable(path: str) -> None:
    """Refuse a file that could not be written in the end.

    Raises
    ------
    BadInput
        It is no plain file, or its folder is missing or closed to this user.
    """
    require_replaceable(path)
    folder = Path(path).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(
            f"No file can be written at {path!r}: give one in a folder that is there, and that "
            "this user may write to."
        )


def write(path: str, metrics: Iterable[Metric]) -> None:
    """Put metrics into a file, whole or not at all; whoever may read files may read it.

    Parameters
    ----------
    path : str
        The file; replaced in one step, so that a collector never reads half of it.
    metrics : iterable of Metric
        In the order in which they are to stand.

    Raises
    ------
    LabError
        The file cannot be written.
    """
    text = "".join(map(_text, metrics))
    partial = ""
    try:
        # The collector passes over names that do not end in .prom.
        handle, partial = tempfile.mkstemp(prefix=f".{Path(path).name}.", dir=Path(path).parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        partial = ""
    except OSError as error:
        raise LabError(f"{path!r} cannot be written: {error.strerror}.") from error
    finally:
        if partial:
            with contextlib.suppress(OSError):
                os.unlink(partial)


def _text(metric: Metric) -> str:
    lines = [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
    for labels, value in metric.samples:
        inside = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
        lines.append(f"{metric.name}{{{inside}}} {_number(value)}")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return "+Inf" if value == math.inf else repr(float(value))


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
