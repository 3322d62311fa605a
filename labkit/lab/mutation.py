"""Mutants in the recorded runs of every experiment: they show which statements cannot fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from labkit.judge.mutants import mutate
from labkit.lab.catalogue import catalogue, load
from labkit.lab.experiment import Experiment
from labkit.runs import RECORDED


@dataclass(frozen=True)
class Planted:
    """What became of the mutants in the recorded runs of one experiment.

    Attributes
    ----------
    experiment
        Its id.
    mutants, turned
        How many were planted, and for how many a statement did not hold.
    survivors
        Statements that do not mind something that they read, with the run, in words.
    never_held
        Statements that hold for no recorded run, so that nothing could be planted.
    """

    experiment: str
    mutants: int
    turned: int
    survivors: tuple[str, ...]
    never_held: tuple[str, ...]


def in_recorded_runs(
    experiment: Experiment, data: Path = RECORDED, *, every: bool = True
) -> Planted:
    """Plant mutants in the recorded runs of one experiment.

    Parameters
    ----------
    experiment : Experiment
        From the catalogue.
    data : Path
        Folder of recorded runs.
    every : bool
        Whether a statement is put to the test in every run; else in the first one for which it
        holds, quick ones first.
    """
    mutants, turned, held = 0, 0, set[str]()
    survivors: dict[str, list[str]] = {}
    files = sorted(
        data.glob(f"*/*/{experiment.id}/run.json"), key=lambda file: file.parts[-3] != "quick"
    )
    for file in files:
        left = [one for one in experiment.statements if every or one.words not in held]
        if not left:
            break
        for one in mutate(load(file.parent), left):
            held.add(one.statement)
            mutants, turned = mutants + one.planted, turned + one.turned
            if one.survived:
                survivors.setdefault(str(one), []).append(" ".join(file.parts[-4:-2]))
    return Planted(
        experiment.id,
        mutants,
        turned,
        tuple(f"{words} ({', '.join(where)})" for words, where in survivors.items()),
        tuple(one.words for one in experiment.statements if one.words not in held),
    )


def over_recorded_runs() -> list[Planted]:
    """Plant mutants in the recorded runs of every experiment."""
    return [in_recorded_runs(one) for one in catalogue().values() if one.statements]


def as_text(planted: Sequence[Planted]) -> str:
    """Tell for a terminal what became of the mutants."""
    lines = [f"{one.experiment}: {one.turned:,} of {one.mutants:,} turned" for one in planted]
    for one in planted:
        lines += [f"survived: {one.experiment}: {words}" for words in one.survivors]
        lines += [f"never held: {one.experiment}: {words}" for words in one.never_held]
    total, turned = sum(one.mutants for one in planted), sum(one.turned for one in planted)
    survivors = sum(len(one.survivors) for one in planted)
    lines.append(f"{total:,} mutants, {turned:,} turned a statement, {survivors} survivors")
    return "\n".join(lines)
