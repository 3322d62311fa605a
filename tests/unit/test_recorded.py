"""Every recorded run: it loads, its finding does not fail, its figure is drawn, and what its
experiment states of it can fail.
"""

from __future__ import annotations

import functools
import io
from dataclasses import replace
from pathlib import Path

import pytest

from labkit.judge.findings import FAILS
from labkit.lab import mutation
from labkit.lab.catalogue import catalogue, draw, drawn, judge, load
from labkit.lab.experiment import case_table
from labkit.runs import RECORDED, Run, natural

PATHS = sorted(
    (path.parent for path in RECORDED.glob("*/*/*/run.json")), key=lambda path: natural(str(path))
)
MOST_BYTES = 10 << 20


def each(paths: list[Path]) -> pytest.MarkDecorator:
    names = ["-".join(path.parts[-3:]) for path in paths]
    return pytest.mark.parametrize("path", paths, ids=names or None)


@functools.cache
def recorded(path: Path) -> Run:
    return replace(load(path), recorded=True)


@each(PATHS)
def test_it_stands_where_it_says_and_its_finding_does_not_fail(path: Path) -> None:
    run = recorded(path)
    assert path.parts[-3:] == (run.kernel, run.profile, run.experiment)
    if (known := catalogue().get(run.experiment)) is None:
        return  # a benchmark, which judges itself
    newest = [one for one in PATHS if one.parts[-2:] == path.parts[-2:]][-1]
    # An older kernel's runs may be of a day when the profile was another one.
    assert path != newest or run.parameters == dict(known.profiles[run.profile])
    if known.cases:
        assert list(run.case_table["case"]) == list(case_table(known.cases)["case"])
    finding = judge(run)
    assert finding.state != FAILS, finding


@each([path for path in PATHS if path.name in drawn()])
def test_its_figure_is_drawn_and_marked(path: Path) -> None:
    run = recorded(path)
    figure = draw(run)
    figure.savefig(io.BytesIO(), format="png")
    (mark,) = (text for text in figure.texts if f"recorded on {run.kernel}" in text.get_text())
    box = mark.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, "a part of the mark is cut off"
    assert not any(box.overlaps(one.get_window_extent()) for one in figure.legends)


@pytest.mark.parametrize("id", list(catalogue()))
def test_no_mutant_survives(id: str) -> None:
    """Each column that a statement reads is spoilt: it must turn, and some mutant make it fail.

    In one run here; `make mutation` spoils all of them.
    """
    planted = mutation.in_recorded_runs(catalogue()[id], every=False)
    assert planted.mutants > 0
    assert planted.survivors == () and planted.never_held == ()


def test_all_together_are_small() -> None:
    assert sum(path.stat().st_size for path in RECORDED.rglob("*") if path.is_file()) < MOST_BYTES
