"""Every recorded run: it loads, its finding holds and can fail, its figure is drawn."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from labkit.analysis import figures, runs
from labkit.analysis.findings import judge
from labkit.analysis.runs import RECORDED, VARIANTS, Run
from labkit.errors import LabError
from labkit.failures.experiment import catalogue

PATHS = sorted(path.parent for path in RECORDED.glob("*/*/*/run.json"))
MOST_BYTES = 10 << 20


def each(paths: list[Path]) -> pytest.MarkDecorator:
    names = ["-".join(path.parts[-3:]) for path in paths]
    return pytest.mark.parametrize("path", paths, ids=names or None)


each_run = each(PATHS)


def load(path: Path) -> Run:
    return replace(runs.load(path), recorded=True)


@each_run
def test_it_stands_where_it_says(path: Path) -> None:
    run = load(path)
    assert path.parts[-3:] == (run.kernel, run.profile, run.experiment)
    known = catalogue().get(run.experiment)
    if known is not None:  # a benchmark is no experiment
        assert run.parameters == dict(known.profiles[run.profile])


@each_run
def test_its_finding_holds(path: Path) -> None:
    judge(load(path)).require()


@pytest.mark.parametrize("variant", VARIANTS)
@each_run
def test_its_finding_fails_on_planted_counts(path: Path, variant: str) -> None:
    """Where there were anomalies, plant none; where there were none, let everything go wrong."""
    run = load(path)
    counts = run.counts.copy()
    planted = (counts["variant"] == variant) & (counts["operations"] > 0)
    flipped = np.where(counts["anomalies"] > 0, 0, counts["operations"])
    counts["anomalies"] = counts["anomalies"].where(~planted, flipped).astype("int64")
    try:
        finding = judge(replace(run, tables={**run.tables, "counts": counts}))
    except LabError:
        return
    assert not finding.holds, f"{variant} was turned over, and yet: {finding}"


@each([path for path in PATHS if path.name in figures.drawn()])
def test_its_figure_is_drawn_and_marked(path: Path) -> None:
    run = load(path)
    figure = figures.draw(run)
    figure.savefig(io.BytesIO(), format="png")
    (mark,) = (text for text in figure.texts if f"recorded on {run.kernel}" in text.get_text())
    box = mark.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, "a part of the mark is cut off"
    assert not any(box.overlaps(one.get_window_extent()) for one in figure.legends)


def test_all_together_are_small() -> None:
    assert sum(path.stat().st_size for path in RECORDED.rglob("*") if path.is_file()) < MOST_BYTES
