"""What commands take beside ten thousand maps, two thousand programs and a thousand pins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pandas as pd

from labkit.judge.bars import Result, checks, result
from labkit.judge.findings import Finding
from labkit.runs import Run

EXPERIMENT: Final = "bench-load"

MOST: Final = {"cpu_s": 20.0, "peak_mib": 300.0, "text_bytes": 200_000.0}
_WORDS: Final = {
    "cpu_s": ("CPU", "s"), "peak_mib": ("memory", "MiB"), "text_bytes": ("text", "B"),
}  # fmt: skip


def results(run: Run) -> list[Result]:
    """Every result of a run.

    Parameters
    ----------
    run
        A run of `experiments.bench.bench_load`.

    Returns
    -------
    list of Result
        CPU, memory and text of each command.
    """
    return list(_results(run.table("commands")))


def judge(run: Run) -> Finding:
    """Whether every command keeps to its bounds.

    Parameters
    ----------
    run
        A run of `experiments.bench.bench_load`.
    """
    table = run.table("commands")
    return Finding(
        EXPERIMENT,
        f"Beside {run.parameters['maps']:,} maps each of {len(table)} commands took "
        f"{table['cpu_s'].max():.1f} s of CPU, {table['peak_mib'].max():.0f} MiB and "
        f"{table['text_bytes'].max():,} B of text at the most.",
        checks(results(run)),
    )


def _results(table: pd.DataFrame) -> Iterator[Result]:
    for _, row in table.iterrows():
        for figure, (what, unit) in _WORDS.items():
            name = f"{row['command']}: {what}"
            yield result(name, pd.Series([float(row[figure])]), unit, most=MOST[figure])
