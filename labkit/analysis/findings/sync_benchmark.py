"""Judges experiment 50: the strategies side by side."""

from __future__ import annotations

import pandas as pd

from labkit.analysis.checkers import accounting
from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import BadRun, Run

_ENOUGH = 3  # repetitions
_IN_TIME_NS = 1e6  # a tenth of the poll's interval


@judges("sync-benchmark")
def sync_benchmark(run: Run) -> Finding:
    """Every change is accounted for and every write seen; events are sooner than a poll can be.

    Delays are compared from the commit on, in the best repetition of each: other load on the
    machine keeps writer or follower from their CPUs, which only adds to a delay, and that is no
    strategy's fault. Tails are compared only in repetitions in which the writer kept its schedule.
    """
    cells = run.table("cells")
    unaccounted = sum(
        abs(accounting(produced=made, delivered=given, dropped=lost, coalesced=passed))
        for made, given, lost, passed in cells[
            ["produced", "delivered", "dropped", "coalesced"]
        ].to_numpy().tolist()
    )  # fmt: skip
    miscounted = int((cells["produced"] != cells["operations"]).sum())
    fixed, control, broken = run.count("fixed"), run.count("control"), run.count("broken")
    rate = middle_rate(run)
    events, poll = rows_of(run, "events", rate), rows_of(run, "poll 10 ms", rate)
    top = rows_of(run, "events", max(cells[cells["wakeup"] != "default"]["rate"]))
    switched = cells[cells["strategy"] == "double map"]
    half, mean = events["commit_p50_ns"].min(), poll["commit_mean_ns"].min()
    checks = [
        Check("produced = delivered + dropped + coalesced, in every cell", unaccounted == 0,
              f"{unaccounted} unaccounted for in {len(cells)} runs"),
        Check("what a follower counts as produced is what was written", miscounted == 0,
              f"{miscounted} of {len(cells)} runs differ"),
        *(
            Check(f"every write is seen in the end, that version or a newer one: {case}",
                  run.count("fixed", case).anomalies == 0 < run.count("fixed", case).operations,
                  f"{run.count('fixed', case)} unseen")
            for case in run.cases("fixed")
        ),
        Check("the counts are those of the cells",
              (fixed.operations, fixed.anomalies)
              == (int(cells["operations"].sum()), int(cells["unseen"].sum())),
              f"{fixed.operations:,} and {int(cells['operations'].sum()):,} writes"),
        Check("events hand out every version at the lowest rate",
              control.anomalies == 0 < control.operations, f"{control} passed over"),
        Check("a poll passes versions over at the highest rate",
              broken.anomalies > broken.operations // 10, f"{broken} passed over"),
        Check("a generation stands in the replica whole, or not at all",
              int(switched["mixed"].sum()) == 0 < int(switched["looks"].sum()),
              f"{int(switched['mixed'].sum())} of {int(switched['looks'].sum()):,} looks mixed"),
        Check(f"at {rate:,}/s the median of events is below half the mean of a 10 ms poll",
              half < mean / 2,
              f"{half / 1e3:,.0f} and {mean / 1e3:,.0f} us after the commit, at best"),
    ]  # fmt: skip
    p99, quiet = _quiet(events)["commit_p99_ns"], _quiet(poll)["commit_mean_ns"]
    if min(len(p99), len(quiet)) >= _ENOUGH:
        checks.append(
            Check(f"at {rate:,}/s the p99 of events is below the mean of a 10 ms poll",
                  p99.median() < quiet.median(),
                  f"{_us(p99)} and {_us(quiet)} us after the commit, in {len(p99)} and "
                  f"{len(quiet)} repetitions with a writer in time")
        )  # fmt: skip
    late = float(events["late_p99_ns"].median())
    return Finding(
        run.experiment,
        f"At {rate:,} changes/s events were seen {_us(events['p50_ns'])} us (p50) and "
        f"{_us(events['p99_ns'])} us (p99) after their intended time, those of a 10 ms poll "
        f"{_us(poll['p50_ns'])} and {_us(poll['p99_ns'])} us, medians of {len(events)} rounds "
        f"with a writer that was {late / 1e3:,.0f} us late at its p99. "
        f"At {int(top['rate'].iloc[0]):,}/s events dropped {int(top['dropped'].sum()):,} of "
        f"{int(top['operations'].sum()):,} and took {top['follower_cpu'].median():.0%} of a CPU. "
        f"A poll passed over {broken}; {fixed.anomalies} of {fixed.operations:,} writes were never "
        f"seen by anybody.",
        tuple(checks),
    )


def _quiet(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[(rows["late_p99_ns"] < _IN_TIME_NS) & rows["commit_p99_ns"].notna()]


def _us(ns: pd.Series) -> str:
    return f"{ns.median() / 1e3:,.0f}"


def middle_rate(run: Run) -> int:
    """The second of the rates, at which strategies are compared."""
    rates = run.parameters["rates"]
    assert isinstance(rates, list)
    return int(rates[min(1, len(rates) - 1)])


_WRITERS = {"hook": "process", "double map": "publisher"}  # of the others: the program


def usual(run: Run) -> pd.DataFrame:
    """The cells in which each strategy has the writer it is for, the first size and usual wakeup.

    Parameters
    ----------
    run : Run
        Of sync-benchmark.
    """
    cells = run.table("cells")
    writer = cells["strategy"].map(_WRITERS).fillna("program")
    kept: pd.DataFrame = cells[
        (cells["writer"] == writer)
        & (cells["wakeup"] == "default")
        & (cells["value_bytes"] == cells["value_bytes"].min())
    ]
    return kept


def rows_of(run: Run, strategy: str, rate: int | None = None) -> pd.DataFrame:
    """Runs of a strategy with the writer it is for, the first size, and the usual wakeup.

    Parameters
    ----------
    run : Run
        Of sync-benchmark.
    strategy : str
        Its name.
    rate : int, optional
        Only this one, per second.

    Raises
    ------
    BadRun
        There are none.
    """
    cells = usual(run)
    kept = cells[cells["strategy"] == strategy]
    if rate is not None:
        kept = kept[kept["rate"] == rate]
    if kept.empty:
        raise BadRun(f"The run has no cell of {strategy} at {rate} writes per second.")
    return kept
