"""Judges the kernel room's benchmark: every figure, and the bars that some must reach."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import pandas as pd

from labkit.analysis.bars import Figure, at_least, checks, short, spread
from labkit.analysis.findings import Finding, judges
from labkit.analysis.runs import BadRun, Run

EXPERIMENT: Final = "bench-kernel"

OURS: Final = "RingReader"
LIBBPF: Final = "libbpf in C"
BCC: Final = ("bcc, event(data)", "bcc, ctypes cast")
"""bcc's callbacks that reach a field; the faster one is the one to beat."""

DRAIN_BCC: Final = 100.0
DRAIN_LIBBPF: Final = 0.4
LIVE_EVENTS: Final = 20_000_000
SNAPSHOT_ITEMS: Final = 20.0
SNAPSHOT_BATCH: Final = 1.0
UPDATE_MANY: Final = 6.0


def figures(run: Run) -> list[Figure]:
    """Every figure of a run, in the order in which it was measured.

    Parameters
    ----------
    run
        A run of the benchmark.

    Returns
    -------
    list of Figure
        Ratios are taken within each repetition, and their median is held against the bar.
    """
    return [*_drain(run), *_live(run), *_maps(run), *_latency(run)]


@judges(EXPERIMENT)
def bench_kernel(run: Run) -> Finding:
    """Every bar of the kernel room holds."""
    _check_counts(run)
    every = figures(run)
    barred = [one for one in every if one.holds is not None]
    lost = run.count("fixed")
    against_bcc = barred[0]
    return Finding(
        EXPERIMENT,
        f"A filled ring was drained into NumPy {short(against_bcc.value)} times as fast as by "
        f"bcc's callback, and of {lost.operations:,} events at full speed {lost.anomalies:,} "
        f"were lost, where bcc lost {100 * run.count('broken').rate:.0f} %.",
        checks(every),
    )


def _check_counts(run: Run) -> None:
    """Refuse a run whose two accounts of the events lost live differ."""
    for name, rows in run.table("live").groupby("consumer"):
        variant = {OURS: "fixed", LIBBPF: "control"}.get(str(name), "broken")
        count = run.count(variant, str(name))
        if [count.operations, count.anomalies] != rows[["produced", "dropped"]].sum().to_list():
            raise BadRun(f"The counts of {name} are not those of the run's table live.")


def _drain(run: Run) -> Iterator[Figure]:
    table = run.table("drain")
    rate = _per_second(table, "consumer", "events")
    ours = rate[OURS]
    bcc = rate[list(BCC)].max(axis=1)
    yield at_least("drain against bcc's own callback", ours / bcc, DRAIN_BCC)
    yield at_least("drain against libbpf's consumer in C", ours / rate[LIBBPF], DRAIN_LIBBPF)
    yield spread("drain against bcc's empty callback", ours / rate["bcc, empty callback"], "times")
    yield spread(
        "drain and add a field, against libbpf in C",
        rate[f"{OURS}, adding a field"] / rate[LIBBPF],
        "times",
    )
    for name in rate:
        yield spread(f"drain, {name}", rate[name] / 1e6, "M events/s")


def _live(run: Run) -> Iterator[Figure]:
    table = run.table("live")
    for name, rows in table.groupby(table["consumer"].map(str), sort=False):
        produced, dropped = int(rows["produced"].sum()), int(rows["dropped"].sum())
        if name == OURS:
            enough = int(rows["produced"].min()) >= LIVE_EVENTS
            yield Figure(
                f"live, {name}, lost of {produced:,}",
                dropped,
                "events",
                bar=f"0 of at least {LIVE_EVENTS:,}",
                holds=dropped == 0 and enough,
            )
        else:
            share = 100 * rows["dropped"] / rows["produced"]
            yield spread(f"live, {name}, lost of {produced:,}", share, "%")
        speed = 1e3 * rows["produced"] / rows["produce_ns"]
        yield spread(f"live, {name}, speed of the producer", speed, "M events/s")


def _maps(run: Run) -> Iterator[Figure]:
    table = run.table("maps")
    rate = _per_second(table, "way", "entries")
    snapshot = rate["snapshot()"]
    yield at_least("snapshot() against bcc's items()", snapshot / rate["items()"], SNAPSHOT_ITEMS)
    yield at_least(
        "snapshot() against bcc's items_lookup_batch()",
        snapshot / rate["items_lookup_batch()"],
        SNAPSHOT_BATCH,
    )
    # Filling and overwriting together, so that neither is picked.
    way = table["way"].str.removesuffix(", fill").str.removesuffix(", overwrite")
    both = _per_second(
        table.assign(way=way)
        .groupby(["way", "repetition"], as_index=False)[["entries", "ns"]]
        .sum(),
        "way",
        "entries",
    )
    ours = both["update_many()"]
    yield at_least("update_many() against bcc's t[k] = v", ours / both["t[k] = v"], UPDATE_MANY)
    yield spread(
        "update_many() against t[k] = v with its ctypes objects made before",
        ours / both["t[k] = v, objects ready"],
        "times",
    )
    for name in rate:
        yield spread(f"whole map, {name}", rate[name] / 1e6, "M entries/s")


def _latency(run: Run) -> Iterator[Figure]:
    pooled = run.table("latency_pooled")
    cells = run.table("latency").groupby(["policy", "rate"], sort=False)
    for row in pooled.to_dict("records"):
        where = f"{row['policy']}, {row['rate'] // 1000}k events/s"
        repetitions = cells.get_group((row["policy"], row["rate"]))
        dropped = int(repetitions["dropped"].sum())
        for point, column in (("p50", "p50_ns"), ("p99", "p99_ns"), ("p99.9", "p999_ns")):
            low = high = math.nan
            if column in repetitions:
                low, high = repetitions[column].min() / 1e3, repetitions[column].max() / 1e3
            yield Figure(
                f"latency, {where}, {point} of {row['events']:,} ({dropped} lost)",
                row[column] / 1e3,
                "us",
                low,
                high,
            )


def _per_second(table: pd.DataFrame, by: str, what: str) -> pd.DataFrame:
    """One row per repetition, one column per way: things per second."""
    rate = table.assign(rate=1e9 * table[what] / table["ns"])
    return rate.pivot(index="repetition", columns=by, values="rate")
