"""The bounds of commands beside a crowd of maps, judged from a table that was written by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from experiments.bench import load_bars as bars
from labkit import runs
from labkit.runs import Run


def made(**changed: float) -> Run:
    usual = {"cpu_s": 2.0, "peak_mib": 90.0, "text_bytes": 1_000}
    rows = [{"command": "list", **usual}, {"command": "doctor", **usual, **changed}]
    facts: dict[str, object] = {"kernel": "6.1.0", "recorded_at": "2026-01-01T00:00:00+00:00"}
    return Run(bars.EXPERIMENT, "quick", {"maps": 7}, facts, {"commands": pd.DataFrame(rows)})


def test_what_keeps_to_its_bounds_holds() -> None:
    assert bars.judge(made()).holds
    assert len(bars.judge(made()).checks) == 6


@pytest.mark.parametrize("figure", list(bars.MOST))
def test_each_bound_falls_short_by_itself(figure: str) -> None:
    run = made(**{figure: bars.MOST[figure] * 1.01})
    (short,) = (one for one in bars.results(run) if one.holds is False)
    assert short.name.startswith("doctor: ") and not bars.judge(run).holds


def test_the_recorded_runs_hold() -> None:
    found = runs.recorded(bars.EXPERIMENT, profile="quick")
    assert found and all(bars.judge(run).holds for run in found)
