"""Findings and figures: found by id, required to hold, drawn without a screen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labkit import figures
from labkit.errors import BadInput
from labkit.figures import style
from labkit.judge.findings import Check, Finding, FindingFailed
from labkit.lab import catalogue
from labkit.lab.pages import render
from labkit.runs import Run, Triad

GOOD = Check("the control loses nothing", True, "0 of 10")
BAD = Check("broken <loses> some", False, "0 of 10")


def run(experiment: str = "made-up", **changes: Any) -> Run:
    triad = Triad("torn")
    triad.add("broken", case="array, 64 B", operations=1000, anomalies=7)
    triad.add("control", case="array, 8 B", operations=1000, anomalies=0)
    triad.add("fixed", case="array, 64 B, BPF_F_LOCK", operations=1000, anomalies=0)
    made = Run(
        experiment,
        "quick",
        {},
        {"kernel": "6.18.44", "recorded_at": "2026-11-22T22:00:00+00:00"},
        {"counts": triad.table()},
    )
    return replace(made, **changes)


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    yield
    assert pyplot.get_fignums() == []


def words(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def test_a_finding_says_whether_it_holds() -> None:
    good = Finding("made-up", "Nothing was lost.", (GOOD,))
    assert good.holds and good.require() is good
    assert str(good) == (
        "made-up holds: Nothing was lost.\n  [holds] the control loses nothing: 0 of 10"
    )
    bad = Finding("made-up", "Nothing was lost.", (GOOD, BAD))
    assert not bad.holds
    with pytest.raises(FindingFailed) as caught:
        bad.require()
    assert str(caught.value) == "made-up does not hold: broken <loses> some (0 of 10)."
    assert isinstance(caught.value, AssertionError)
    html = render("finding.html", finding=bad, recorded="")
    assert "FAILS" in html and "&lt;loses&gt;" in html and "<loses>" not in html


def test_a_finding_that_checks_nothing_is_refused() -> None:
    with pytest.raises(BadInput, match="checks nothing"):
        Finding("made-up", "All is well.", ())


def test_a_figure_is_signed() -> None:
    figure = figures.draw(figures.anomaly_rates, run())
    assert "made-up · quick profile · kernel 6.18.44 · 2026-11-22" in words(figure)
    assert "recorded" not in words(figure)
    figure.draw_without_rendering()


def test_recorded_and_emulated_runs_are_marked() -> None:
    facts = {"virtual": {"machine": "qemu", "emulated": True}, "cpu": {"count": 2}}
    provenance = run().provenance | facts
    figure = figures.draw(figures.anomaly_rates, run(recorded=True, provenance=provenance))
    assert "recorded on 6.18.44\nemulated machine" in words(figure)
    assert "kernel 6.18.44 · 2 CPUs" in words(figure)


def test_rates_show_each_case_and_a_bound_for_none_seen() -> None:
    (ax,) = figures.draw(figures.anomaly_rates, run()).axes
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["array, 64 B", "array, 8 B", "array, 64 B, BPF_F_LOCK"]
    assert ax.get_xscale() == "log"
    markers = {look.marker for look in style.VARIANT.values()}
    at = {}
    for line in ax.lines:
        if line.get_marker() in markers:
            for x, y in np.asarray(line.get_xydata()):
                at[float(y)] = float(x)
    assert at[0] == pytest.approx(0.007)
    assert at[1] == pytest.approx(3 / 1000, rel=0.01)


def test_nothing_is_drawn_of_nothing() -> None:
    empty = run(tables={"counts": run().counts.iloc[:0]})
    (ax,) = figures.draw(figures.anomaly_rates, empty).axes
    assert not ax.has_data()


def test_axes_of_the_caller_are_used_and_several_may_come_back() -> None:
    def pair(run: Run) -> list[Axes]:
        _, axes = pyplot.subplots(1, 2)
        return [figures.anomaly_rates(run, ax=ax) for ax in axes]

    assert len(figures.draw(pair, run()).axes) == 2
    assert isinstance(figures.draw(lambda run: pyplot.figure(), run()), Figure)
    with pytest.raises(BadInput, match="must return axes or a figure"):
        figures.draw(lambda run: [1], run())
    with pytest.raises(BadInput, match="There is no experiment 'unheard-of'"):
        catalogue.draw(run("unheard-of"))
    with pytest.raises(BadInput, match="has no figure 'other'"):
        catalogue.draw(run("transient-null"), "other")
    with pytest.raises(BadInput, match="There is no experiment 'unheard-of'"):
        catalogue.judge(run("unheard-of"))


def test_series_look_different_in_more_than_colour() -> None:
    looks = [style.look(series) for series in range(7)]
    for group in (looks, list(style.VARIANT.values())):
        for seen in zip(
            *((look.color, look.marker, look.linestyle) for look in group), strict=True
        ):
            assert len(set(seen)) == len(group)
    with pytest.raises(BadInput, match="at most 7"):
        style.look(7)
