"""What the benchmark of the strategies says to one who must choose: tables from a saved run.

The ``run`` is one of sync-benchmark, completed; a ``strategy`` has the name that it has there.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Final

import pandas as pd

from experiments.sync.sync_benchmark import rate_of, rows_of
from labkit.runs import Run

PUBLISHED: Final = Path(__file__).resolve().parents[2] / "data" / "reference" / "sync-methods.csv"
"""The article's table: method, changes per second, p99 (ms), CPU (%), observability, where."""

_OURS: Final = {"batch pull": "poll 10 ms", "event-driven": "events", "hybrid": "hybrid"}
_NEAR: Final = 1.1  # what differs by less is told apart by no run
_LOST: Final = 0.001  # of the changes: a rate is carried while fewer are not handed out
_NEEDS: Final = 5  # rows of `by_need`
_BEHIND: Final = 0.95  # and while the writer reaches this share of it


def beside_the_article(run: Run) -> pd.DataFrame:
    """Put the article's table beside ours, as ratios to the batch pull.

    The article names no hardware, rate, payload or loss, so that only ratios and the order of the
    methods can be compared. Ours, at the second rate of the run: ``throughput`` is the highest
    rate of the run at which fewer than 0.1 % of the versions were not handed out; a poll passes
    versions over without any error, the more of them the fewer keys are written. Medians over the
    rounds.

    Returns
    -------
    pandas.DataFrame
        One row for each figure of the article and method: ``figure``, ``method``, ``article``,
        ``here``, ``article's ratio``, ``ratio here`` (to the batch pull), ``verdict``.
    """
    published = pd.read_csv(PUBLISHED).set_index("method")
    rate, highest = rate_of(run, "middle"), rate_of(run, "highest")
    here = {}
    for method, strategy in _OURS.items():
        rows = rows_of(run, strategy, rate)
        here[method] = {
            "throughput_per_s": carried(run, strategy),
            "p99_ms": float(rows["p99_ns"].median()) / 1e6,
            "cpu_percent": float(rows["follower_cpu"].median()) * 100,
        }
    ours = pd.DataFrame(here).T
    lines = []
    for column, words in (
        ("throughput_per_s", "throughput (changes/s, all versions)"),
        ("p99_ms", f"P99 (ms, at {rate:,}/s)"),
        ("cpu_percent", f"CPU (% of one, at {rate:,}/s)"),
    ):
        theirs, mine = published[column], ours[column]
        order = list(theirs.sort_values().index)
        same = all(mine[a] <= _NEAR * mine[b] for a, b in itertools.pairwise(order))
        for method in _OURS:
            ratio = float(theirs[method] / theirs["batch pull"])
            other = float(mine[method] / mine["batch pull"])
            lines.append(
                {
                    "figure": words,
                    "method": method,
                    "article": f"{theirs[method]:,}",
                    "here": _figure(mine[method]),
                    "article's ratio": f"{ratio:.2f}",
                    "ratio here": f"{other:.2f}",
                    "verdict": _verdict(ratio, other, same),
                }
            )  # fmt: skip
    for method, strategy in _OURS.items():
        rows = rows_of(run, strategy, highest)
        share = float(rows["delivered"].sum() / rows["operations"].sum())
        lines.append(
            {
                "figure": "observability",
                "method": method,
                "article": str(published.loc[method, "observability"]),
                "here": f"{share:.1%} of the versions at {highest:,}/s",
                "article's ratio": "",
                "ratio here": "",
                "verdict": "every version" if share > 1 - _LOST else "the newest version of a key",
            }
        )
    return pd.DataFrame(lines)


def carried(run: Run, strategy: str) -> float:
    """The highest rate of the run that a strategy carries; changes per second.

    Returns
    -------
    float
        The lowest rate's achieved one where none is carried with every version.
    """
    rows = rows_of(run, strategy)
    best = 0.0
    for rate, of in rows.groupby("rate"):
        missed = 1 - of["delivered"].sum() / of["operations"].sum()
        if missed < _LOST and of["achieved"].median() >= _BEHIND * float(str(rate)):
            best = max(best, float(of["achieved"].median()))
    return best


def choices(run: Run) -> pd.DataFrame:
    """Which strategy for which need, with the measured reason.

    Returns
    -------
    pandas.DataFrame
        Columns ``need``, ``choose`` and ``because`` (text). A need that the run did not measure
        names the section of the report that does.
    """
    rate, highest = rate_of(run, "middle"), rate_of(run, "highest")
    cells = run.table("cells")
    plain = cells[(cells["writer"] == "program") & (cells["wakeup"] == "default")]
    plain = plain[plain["value_bytes"] == plain["value_bytes"].min()]
    at = plain[plain["rate"] == rate].groupby("strategy")
    late = at[["commit_p50_ns", "p99_ns"]].median()
    fast = str(late["commit_p50_ns"].idxmin())
    slow = late.loc["poll 10 ms"]
    whole = plain.groupby("strategy")[["operations", "delivered", "dropped"]].sum()
    busy = plain[plain["rate"] == highest].groupby("strategy")[["operations", "delivered"]].sum()
    missed: dict[str, float] = (1 - busy["delivered"] / busy["operations"]).to_dict()
    complete = whole[whole["delivered"] >= whole["operations"]]
    carry = {str(name): carried(run, str(name)) for name in complete.index}
    safe = max(carry, key=lambda name: (carry[name], name == "hybrid")) if carry else ""
    cost = at["follower_ns"].median()
    cheap = str(cost.idxmin())
    foreign = cells[
        (cells["writer"] == "process")
        & (cells["rate"] == rate)
        & (cells["wakeup"] == "default")
        & (cells["value_bytes"] == cells["value_bytes"].min())
    ]
    hook = foreign[foreign["strategy"] == "hook"]
    poll = foreign[foreign["strategy"] == "poll 10 ms"]
    lines = [
        (
            "lowest latency", fast,
            f"p50 of {_ms(late.loc[fast, 'commit_p50_ns'])} ms after the commit at {rate:,}/s; "
            f"the 10 ms poll {_ms(slow['commit_p50_ns'])} ms",
        ),
        (
            "no lost version", safe or "none",
            f"every version handed out, up to {carry[safe]:,.0f}/s; polls passed over "
            f"{missed['poll 10 ms']:.0%} (10 ms) and {missed['poll 1 ms']:.0%} (1 ms) at "
            f"{highest:,}/s"
            if safe else "every strategy dropped or passed over some in this run",
        ),
        _atomic(run),
        (
            "foreign writers", "hook, with a slow pull",
            f"p50 of {_ms(hook['commit_p50_ns'].median())} ms after the commit and "
            f"{hook['delivered'].sum() / hook['operations'].sum():.0%} of the versions, from a "
            f"process that tells nobody; the 10 ms poll {_ms(poll['commit_p50_ns'].median())} ms. "
            "Which writes a hook does not see: coverage-matrix"
            if len(hook) else "not measured in this run",
        ),
        (
            "lowest cost", cheap,
            f"{cost[cheap] / 1e3:,.1f} us of the follower's CPU per change at {rate:,}/s, events "
            f"{cost['events'] / 1e3:,.1f} us; it handed out "
            f"{1 - missed[cheap]:.0%} of the versions at {highest:,}/s",
        ),
    ]  # fmt: skip
    return pd.DataFrame(lines, columns=["need", "choose", "because"])


def _atomic(run: Run) -> tuple[str, str, str]:
    """Who hands out all keys at once, by how often a read found them at different versions."""
    reads = run.table("usual").groupby("strategy")[["reads", "mixed"]].sum()
    whole = reads[(reads["mixed"] == 0) & (reads["reads"] > 0)]
    name = str(whole["reads"].idxmax()) if len(whole) else "none"
    shares = (reads["mixed"] / reads["reads"]).drop(index=name, errors="ignore")
    best = str(shares.idxmin())
    reason = f"of {best} {shares[best]:.0%} did, the others more"
    if name != "none":
        found = int(reads["reads"][name])
        reason = f"none of {found:,} reads of its copy found keys at different versions; {reason}"
    return "atomic over keys", name, reason


def by_need(run: Run) -> pd.DataFrame:
    """What each strategy does for each need, as measured.

    Returns
    -------
    pandas.DataFrame
        One row for each need, text: ``need``, and a column for each strategy. Latencies are from
        the intended time, at the second rate; what is handed out and dropped is that at the
        highest one; medians over the rounds.
    """
    rate, highest = rate_of(run, "middle"), rate_of(run, "highest")
    cells = run.table("usual")
    foreign = run.table("cells")
    foreign = foreign[
        (foreign["strategy"] == "poll 10 ms")
        & (foreign["writer"] == "process")
        & (foreign["rate"] == rate)
    ]
    seen = {
        "events": "none: who writes must emit (coverage-matrix)",
        "hybrid": "late: with its next pull (foreign-writer)",
        "double map": "none: who writes must publish",
    }
    columns: dict[str, list[str]] = {}
    for name in ("poll 10 ms", "events", "hybrid", "hook", "double map"):
        of = cells[cells["strategy"] == name]
        base, top = of[of["rate"] == rate], of[of["rate"] == highest]
        if base.empty or top.empty:
            columns[name] = ["not in this run"] * _NEEDS
            continue
        share = float(top["delivered"].sum() / top["operations"].sum())
        mixed = float(of["mixed"].sum() / of["reads"].sum())
        by_others = foreign if name == "poll 10 ms" else base
        columns[name] = [
            f"p50 {_ms(base['p50_ns'].median())} ms, p99 {_ms_or_less(base['p99_ns'].median())}",
            f"{min(share, 1.0):.1%} of the versions, {int(top['dropped'].sum()):,} dropped, "
            f"{top['achieved'].median():,.0f}/s reached",
            f"{mixed:.0%} of {int(of['reads'].sum()):,} reads mixed",
            seen.get(name)
            or f"{by_others['delivered'].sum() / by_others['operations'].sum():.0%} of the "
            f"versions, p50 {_ms(by_others['p50_ns'].median())} ms",
            f"{base['follower_ns'].median() / 1e3:,.1f} us, and {base['writer_ns'].median():,.0f} "
            "ns of the writer",
        ]
    needs = [
        f"lowest latency, at {rate:,}/s",
        f"no lost version, at {highest:,}/s",
        "atomic over keys",
        f"foreign writers, at {rate:,}/s",
        f"lowest cost per change, at {rate:,}/s",
    ]
    return pd.DataFrame({"need": needs, **columns})


def measured(run: Run) -> pd.DataFrame:
    """Every cell of the benchmark with its spread over the rounds.

    Returns
    -------
    pandas.DataFrame
        One row per cell, all text but the first columns: what was run, the rate that its writer
        reached, latencies from the intended time as median (smallest to largest round),
        share of the versions handed out, what was dropped, reads of the replica that found keys
        at different versions, a write's own time, CPU of the follower, memory of maps and of the
        replica.
    """
    lines = []
    for _, rows in run.table("cells").groupby("cell"):
        one = rows.iloc[0]
        lines.append(
            {
                "strategy": one["strategy"],
                "writer": one["writer"],
                "wakeup": one["wakeup"],
                "value (B)": one["value_bytes"],
                "changes/s": f"{one['rate']:,}",
                "reached/s": f"{rows['achieved'].median():,.0f}",
                "p50 (us)": _spread(rows["p50_ns"]),
                "p99 (us)": _spread(rows["p99_ns"]),
                "writer late, p99 (us)": _spread(rows["late_p99_ns"]),
                "handed out": f"{rows['delivered'].sum() / rows['operations'].sum():.1%}",
                "dropped": f"{rows['dropped'].sum():,}",
                "mixed reads": f"{rows['mixed'].sum() / rows['reads'].sum():.0%}",
                "write (ns)": f"{rows['writer_ns'].median():,.0f}",
                "follower's CPU": f"{rows['follower_cpu'].median():.0%}",
                "maps, replica (KiB)": f"{rows['map_bytes'].median() / 1024:,.0f}, "
                f"{rows['replica_bytes'].median() / 1024:,.0f}",
            }
        )
    return pd.DataFrame(lines)


def _spread(ns: pd.Series) -> str:
    """Microseconds; empty where too few changes were measured."""
    if ns.isna().all():
        return ""
    return f"{ns.median() / 1e3:,.0f} ({ns.min() / 1e3:,.0f} to {ns.max() / 1e3:,.0f})"


def _figure(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _ms(ns: float) -> str:
    return f"{ns / 1e6:,.0f}" if ns >= 1e7 else f"{ns / 1e6:,.2g}"


def _ms_or_less(ns: float) -> str:
    return "not known: too few writes" if math.isnan(ns) else f"{_ms(ns)} ms"


def _verdict(theirs: float, ours: float, same_order: bool) -> str:
    if math.isclose(theirs, 1.0) and math.isclose(ours, 1.0):
        return "the measure of the others"
    if not ours or math.isinf(ours) or math.isnan(ours):
        return "cannot be compared"
    order = "same order of the methods" if same_order else "another order of the methods"
    if (theirs > 1) != (ours > 1):
        return f"contradicted: the other side of the batch pull; {order}"
    off = max(theirs / ours, ours / theirs)
    words = "about as published" if off < 1.5 else f"the same side, {off:,.1f} times off"
    return f"{words}; {order}"
