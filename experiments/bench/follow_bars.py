"""What a soak of followers shows: accounts that add up, replicas that are the map, flat memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import pandas as pd

from labkit.judge.bars import Result, checks, result
from labkit.judge.findings import Finding
from labkit.runs import Run

EXPERIMENT: Final = "soak-follow"

EVENTS: Final = "RingEvents"
HOOK: Final = "TraceHook"
WATCH: Final = "watch"
PROGRAM: Final = "program"
CALLS: Final = "process"
WRITER: Final = {EVENTS: PROGRAM, HOOK: CALLS, WATCH: CALLS}
"""Whose changes each of the followers follows."""

MOST_GROWTH: Final = 1.05
"""Of a process's memory, from the third quarter of a soak to the last."""
MOST_GROWTH_AT_FIRST: Final = 1.2
"""The same of a watch in the profile quick: at times it takes a whole ring into Python's heap.

That comes to rest after seconds, and beside other load after more. One that kept its events would
grow by more.
"""
LEAST_CHANGES: Final = {"quick": 1e5, "full": 1e8}
_FEWEST_SAMPLES: Final = 8
GROWTH: Final = "growth of memory"


def results(run: Run) -> list[Result]:
    """Every result of a run.

    Parameters
    ----------
    run
        A run of `experiments.bench.bench_follow`.

    Returns
    -------
    list of Result
        What nobody accounts for, what the replicas lack, and how memory grew. One that was
        stopped before memory was looked at often enough falls short.
    """
    return [*_accounts(run), *_memory(run)]


def judge(run: Run) -> Finding:
    """Whether all of them hold.

    Parameters
    ----------
    run
        A run of `experiments.bench.bench_follow`.
    """
    every = results(run)
    by_name = {one.name: one.value for one in every}
    growth = max(value for name, value in by_name.items() if name.endswith(GROWTH))
    return Finding(
        EXPERIMENT,
        f"After {by_name['changes made']:,.0f} changes no process had more than {growth:.3f} times "
        "the memory of a quarter before.",
        checks(every),
    )


def _accounts(run: Run) -> Iterator[Result]:
    accounts: dict[Any, Any] = run.table("accounts").set_index("process").to_dict("index")
    made = accounts[PROGRAM]["produced"] + accounts[CALLS]["produced"]
    yield _one("changes made", made, "changes", least=LEAST_CHANGES[run.profile])
    for name, writer in WRITER.items():
        own, theirs = accounts[name], accounts[writer]
        told = own["delivered"] + own["dropped"] + own["coalesced"] + own["refused"]
        asked = theirs["produced"] + (theirs["refused"] if name == WATCH else 0)
        yield _one(f"{name}: delivered", 100 * own["delivered"] / theirs["produced"], "%")
        yield _one(f"{name}: dropped", 100 * own["dropped"] / asked, "%")
        yield _one(f"{name}: not accounted for", abs(asked - told), "changes", most=0)
        if name == WATCH:
            continue
        difference = abs(own["produced"] - theirs["produced"])
        yield _one(f"{name}: counted otherwise than made", difference, "changes", most=0)
        yield _one(f"{name}: replica differs in", own["differs"], "keys", most=0)


def _memory(run: Run) -> Iterator[Result]:
    samples = run.table("samples")
    end = samples["at_s"].max()
    for name in run.table("accounts")["process"]:
        own = samples[samples["process"] == name]
        third = own.loc[own["at_s"].between(0.5 * end, 0.75 * end), "rss_bytes"]
        last = own.loc[own["at_s"] > 0.75 * end, "rss_bytes"]
        enough = min(len(third), len(last)) >= _FEWEST_SAMPLES
        yield _one(f"{name}: memory in the end", last.max() / (1 << 20), "MiB")
        growth = last.max() / third.max() if enough else math.nan
        at_first = name == WATCH and run.profile == "quick"
        yield _one(
            f"{name}: {GROWTH}", growth, most=MOST_GROWTH_AT_FIRST if at_first else MOST_GROWTH
        )


def _one(name: str, value: float, unit: str = "times", **bar: float) -> Result:
    return result(name, pd.Series([float(value)]), unit, **bar)
