"""The bars of a watch's cost, judged from a table that was written by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from experiments.bench import watch_bars as bars
from labkit.runs import BadRun, Run

USUAL = {bars.NOBODY: 1_000, bars.WATCHED: 1_600, bars.UNWATCHED: 1_230, bars.PEER: 2_000}


def made(dropped: int = 0, **changed: int) -> Run:
    """Nanoseconds of an update; ``changed`` by the names of `bars`."""
    ns = USUAL | {getattr(bars, name): value for name, value in changed.items()}
    rows = [
        (way, turn, 100, 100 * one, 100 * bars.EVENTS[way], 100 * bars.EVENTS[way], 0)
        for turn in range(9)
        for way, one in ns.items()
    ]
    columns = ["way", "repetition", "updates", "cpu_ns", "produced", "delivered", "dropped"]
    table = pd.DataFrame(rows, columns=columns)
    table.loc[table["way"] == bars.WATCHED, "dropped"] = dropped
    facts: dict[str, object] = {"kernel": "6.1.0", "recorded_at": "2026-01-01T00:00:00+00:00"}
    return Run(bars.EXPERIMENT, "quick", {}, facts, {"updates": table})


def test_what_keeps_to_its_bars_holds() -> None:
    finding = bars.judge(made())
    assert finding.holds and len(finding.checks) == 4
    assert "took 600 ns more" in finding.sentence and "230 ns" in finding.sentence


@pytest.mark.parametrize(
    ("changed", "short"),
    [
        ({"WATCHED": 2_001, "PEER": 9_000}, [bars.WATCHED]),
        ({"UNWATCHED": 1_301}, [bars.UNWATCHED]),
        ({"PEER": 1_599}, [bars.WATCHED]),
        ({"PEER": 1_459, "WATCHED": 1_100}, [bars.UNWATCHED]),
    ],
)
def test_each_bar_falls_short_by_itself(changed: dict[str, int], short: list[str]) -> None:
    run = made(**changed)
    assert [one.name.split(":")[0] for one in bars.results(run) if one.holds is False] == short
    assert not bars.judge(run).holds


def test_events_that_do_not_add_up_are_no_run() -> None:
    with pytest.raises(BadRun, match="neither delivered nor dropped"):
        bars.judge(made(dropped=1))
