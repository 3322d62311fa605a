"""Figures as a text file for Prometheus: node_exporter's textfile collector reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from labkit.inspect.whole_file import write_whole


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
    # The collector passes over names that do not end in .prom, as that of a partial file.
    write_whole(path, "".join(map(_text, metrics)).encode(errors="replace"), mode=0o644)


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
