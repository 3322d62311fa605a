"""The bars of a soak of followers, judged from tables that were written by hand."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest

from experiments.bench import follow_bars as bars
from labkit import runs
from labkit.runs import Run

MADE, REFUSED, SAMPLES = 1_000_000, 10_000, 100
NOTHING = dict.fromkeys(
    ["produced", "delivered", "dropped", "coalesced", "refused", "differs"], 0
)  # fmt: skip
FOLLOWED = {"produced": MADE, "delivered": MADE - 30, "dropped": 20, "coalesced": 10}


def made(
    changed: dict[str, dict[str, int]] | None = None,
    *,
    profile: str = "quick",
    samples: int = SAMPLES,
    leak: float = 0,
    leaks: str = bars.HOOK,
) -> Run:
    """A run without a fault, but for those that are given; a leak in bytes a sample."""
    accounts = {
        bars.EVENTS: FOLLOWED,
        bars.HOOK: FOLLOWED,
        bars.WATCH: {"delivered": MADE - 7, "refused": REFUSED - 3, "dropped": 10},
        bars.PROGRAM: {"produced": MADE},
        bars.CALLS: {"produced": MADE, "refused": REFUSED},
    }
    account = [{"process": name, **NOTHING, **one, **(changed or {}).get(name, {})}
               for name, one in accounts.items()]  # fmt: skip
    memory = [
        (float(at), name, int(80e6 + leak * at * (name == leaks)))
        for at in range(samples)
        for name in accounts
    ]
    facts: dict[str, Any] = {"kernel": "6.1.0", "recorded_at": "2026-01-01T00:00:00+00:00"}
    tables = {
        "accounts": pd.DataFrame(account),
        "samples": pd.DataFrame(memory, columns=["at_s", "process", "rss_bytes"]),
    }
    return Run(bars.EXPERIMENT, profile, {}, facts, tables)


def short(run: Run) -> list[str]:
    assert bars.judge(run).holds == all(one.holds is not False for one in bars.results(run))
    return [one.name for one in bars.results(run) if one.holds is False]


def test_what_is_exact_and_flat_holds() -> None:
    assert short(made()) == []
    assert "RingEvents: dropped: 0.002 %, no bar" in map(str, bars.results(made()))
    assert short(made(profile="full")) == ["changes made"]


@pytest.mark.parametrize("name", [bars.EVENTS, bars.HOOK])
@pytest.mark.parametrize(
    ("figure", "named", "off"),
    [
        ("delivered", "not accounted for", -1), ("dropped", "not accounted for", 1),
        ("coalesced", "not accounted for", -1), ("produced", "counted otherwise than made", -1),
        ("produced", "counted otherwise than made", 1), ("differs", "replica differs in", 1),
    ],
)  # fmt: skip
def test_one_change_falls_short(name: str, figure: str, named: str, off: int) -> None:
    wrong = made({name: {figure: FOLLOWED.get(figure, 0) + off}})
    assert short(wrong) == [f"{name}: {named}"]


@pytest.mark.parametrize("figure", ["delivered", "dropped", "refused"])
def test_what_the_watch_does_not_tell_falls_short(figure: str) -> None:
    assert short(made({bars.WATCH: {figure: 0}})) == [f"{bars.WATCH}: not accounted for"]


def test_a_leak_falls_short_and_so_does_what_was_hardly_looked_at() -> None:
    assert short(made(leak=80e6 / SAMPLES / 10)) == []
    for name, share in ((bars.HOOK, 3), (bars.PROGRAM, 3), (bars.WATCH, 0.3)):
        leaking = made(leak=80e6 / SAMPLES / share, leaks=name)
        assert short(leaking) == [f"{name}: {bars.GROWTH}"]
    slowly = made(profile="full", leak=80e6 / SAMPLES / 3, leaks=bars.WATCH)
    assert short(slowly) == ["changes made", f"{bars.WATCH}: {bars.GROWTH}"]
    for few in (0, 1, 20):
        growth = [one for one in bars.results(made(samples=few)) if one.name.endswith(bars.GROWTH)]
        assert len(growth) == 5
        assert all(math.isnan(one.value) and one.holds is False for one in growth)
        assert not bars.judge(made(samples=few)).holds


def test_the_recorded_runs_hold() -> None:
    found = runs.recorded(bars.EXPERIMENT, profile="full")
    assert found and all(bars.judge(run).holds for run in found)
