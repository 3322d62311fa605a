"""What the kernel room's benchmark shows: every result, and the bars that some must reach."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pandas as pd

from experiments.bench.sync_bars import GO, C, against_rates
from labkit.figures import Axes, Figure, style
from labkit.judge.bars import Result, checks, result, short
from labkit.judge.findings import Finding
from labkit.runs import BadRun, Run

EXPERIMENT: Final = "bench-kernel"

OURS: Final = "RingReader"
LIBBPF: Final = f"{C}, add"
LIBBPF_COPY: Final = f"{C}, copy"
GO_COPY: Final = f"{GO}, copy"
BCC: Final = ("bcc, event(data)", "bcc, ctypes cast")
"""bcc's callbacks that reach a field; the faster one is the one to beat."""

BY_CALL: Final = "the system call of snapshot() alone"

_LABELS = {
    OURS: "RingReader, copies",
    f"{OURS}, any size": "RingReader, any size",
    LIBBPF_COPY: "C, libbpf, copies",
    GO_COPY: "Go, cilium/ebpf, copies",
    f"{OURS}, adding a field": "RingReader, adds",
    LIBBPF: "C, libbpf, adds",
    f"{GO}, add": "Go, cilium/ebpf, adds",
    BCC[1]: "bcc, cast",
    BCC[0]: "bcc, event(data)",
    "bcc, empty callback": "bcc, empty",
}

DRAIN_BCC: Final = 150.0
DRAIN_COPYING: Final = 2.0
DRAIN_ADDING: Final = 1.0
DRAIN_GO: Final = 5.0
LIVE_EVENTS: Final = 20_000_000
LINEAR: Final = 1.5
SNAPSHOT_ITEMS: Final = 20.0
SNAPSHOT_BATCH: Final = 2.0
SNAPSHOT_GO: Final = 1.5
UPDATE_MANY: Final = 6.0
UPDATE_C: Final = 0.9


def results(run: Run) -> list[Result]:
    """Every result of a run, in the order in which it was measured.

    Parameters
    ----------
    run
        A run of the benchmark.

    Returns
    -------
    list of Result
        Ratios are taken within each repetition, and their median is held against the bar.
    """
    return [*_drain(run), *_live(run), *_maps(run), *_latency(run)]


def judge(run: Run) -> Finding:
    """Every bar of the kernel room holds.

    Parameters
    ----------
    run
        A run of the benchmark.

    Raises
    ------
    BadRun
        Its counts are not those of its tables.
    """
    _check_counts(run)
    every = results(run)
    with_bar = [one for one in every if one.bar]
    lost = run.count("fixed")
    against_bcc = with_bar[0]
    return Finding(
        EXPERIMENT,
        f"A filled ring was drained into NumPy {short(against_bcc.value)} times as fast as by "
        f"bcc's callback, and of {lost.operations:,} events at full speed {lost.anomalies:,} "
        f"were lost, where bcc lost {100 * run.count('broken').rate:.0f} %.",
        checks(every),
    )


def _check_counts(run: Run) -> None:
    """Refuse a run whose two accounts of the events lost live differ."""
    live = run.table("live")
    for variant, name in (("broken", BCC[1]), ("control", LIBBPF), ("fixed", OURS)):
        rows, count = live[live["consumer"] == name], run.count(variant, name)
        if [count.operations, count.anomalies] != rows[["produced", "dropped"]].sum().to_list():
            raise BadRun(f"The counts of {name} are not those of the run's table live.")


def _drain(run: Run) -> Iterator[Result]:
    table = run.table("drain")
    rate = _per_second(table, "consumer", "events")
    ours = rate[OURS]
    bcc = rate[list(BCC)].max(axis=1)
    yield result("drain against bcc's own callback", ours / bcc, least=DRAIN_BCC)
    copying = rate[LIBBPF_COPY]
    yield result(
        "drain, copying, against libbpf's callback that copies", ours / copying, least=DRAIN_COPYING
    )
    yield result(
        "the same with records of any size",
        rate[f"{OURS}, any size"] / copying,
        least=DRAIN_COPYING,
    )
    yield result(
        "drain, adding a field in place, against libbpf's callback that adds",
        rate[f"{OURS}, adding a field"] / rate[LIBBPF],
        least=DRAIN_ADDING,
    )
    if GO_COPY in rate:
        yield result("drain, copying, against Go's ReadInto", ours / rate[GO_COPY], least=DRAIN_GO)
    yield result("drain against bcc's empty callback", ours / rate["bcc, empty callback"])
    for name in rate:
        yield result(f"drain, {name}", rate[name] / 1e6, "M events/s")


def _live(run: Run) -> Iterator[Result]:
    table = run.table("live")
    for name, rows in table.groupby(table["consumer"].map(str), sort=False):
        produced, dropped = int(rows["produced"].sum()), int(rows["dropped"].sum())
        if name == OURS:
            enough = int(rows["produced"].min()) >= LIVE_EVENTS
            yield Result(
                f"live, {name}, lost of {produced:,}",
                dropped,
                "events",
                bar=f"0 of at least {LIVE_EVENTS:,}",
                holds=dropped == 0 and enough,
            )
        else:
            share = 100 * rows["dropped"] / rows["produced"]
            yield result(f"live, {name}, lost of {produced:,}", share, "%")
        speed = 1e3 * rows["produced"] / rows["produce_ns"]
        yield result(f"live, {name}, speed of the producer", speed, "M events/s")


def _maps(run: Run) -> Iterator[Result]:
    table = run.table("maps")
    rate = _per_second(table, "way", "entries")
    snapshot = rate["snapshot()"]
    yield result(
        "snapshot() against bcc's items()", snapshot / rate["items()"], least=SNAPSHOT_ITEMS
    )
    yield result(
        "snapshot() against bcc's items_lookup_batch()",
        snapshot / rate["items_lookup_batch()"],
        least=SNAPSHOT_BATCH,
    )
    by_go = f"batch, {GO}"
    if f"{by_go}, lookup" in rate:
        yield result(
            "snapshot() against Go's BatchLookup",
            snapshot / rate[f"{by_go}, lookup"],
            least=SNAPSHOT_GO,
        )
    # It tells how much there is to gain.
    yield result("snapshot(), of the speed of its system call alone", snapshot / rate[BY_CALL])
    for other in ("items_lookup_batch()", f"{by_go}, lookup"):
        if other in rate:
            yield result(f"{BY_CALL}, against {other}", rate[BY_CALL] / rate[other])
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
    yield result("update_many() against bcc's t[k] = v", ours / both["t[k] = v"], least=UPDATE_MANY)
    yield result(
        "update_many() against t[k] = v with its ctypes objects made before",
        ours / both["t[k] = v, objects ready"],
    )
    yield result(
        "update_many() against libbpf's batch in C", ours / both[f"batch, {C}"], least=UPDATE_C
    )
    large = run.table("large")
    each = large.assign(each=large["ns"] / large["entries"])
    grown = each.pivot(index="repetition", columns="entries", values="each")
    few, many = sorted(large["entries"].unique().tolist())
    yield result(
        f"snapshot() of {many:,} entries, cost of an entry against that of {few:,}",
        grown[many] / grown[few],
        most=LINEAR,
    )
    for name in rate:
        yield result(f"whole map, {name}", rate[name] / 1e6, "M entries/s")


def _latency(run: Run) -> Iterator[Result]:
    pooled = run.table("latency_pooled")
    cells = run.table("latency").groupby(["policy", "rate", "reader"], sort=False)
    for row in pooled.to_dict("records"):
        where = f"{row['policy']}, {row['rate'] // 1000}k events/s, {row['reader']}"
        repetitions = cells.get_group((row["policy"], row["rate"], row["reader"]))
        dropped = int(repetitions["dropped"].sum())
        cpu = repetitions["reader_ns"].median() / 1e3
        for point, column in (("p50", "p50_ns"), ("p99", "p99_ns"), ("p99.9", "p999_ns")):
            low, high = repetitions[column].min() / 1e3, repetitions[column].max() / 1e3
            yield Result(
                f"latency, {where}, {point} of {row['events']:,} ({dropped} lost, "
                f"{short(cpu)} us of CPU for each)",
                row[column] / 1e3, "us", low, high,
            )  # fmt: skip


def _per_second(table: pd.DataFrame, by: str, what: str) -> pd.DataFrame:
    """One row per repetition, one column per way: things per second."""
    rate = table.assign(rate=1e9 * table[what] / table["ns"])
    return rate.pivot(index="repetition", columns=by, values="rate")


def draw(run: Run) -> Figure:
    """Draw the drain of a filled ring, and latency percentiles against the rate of events.

    Parameters
    ----------
    run
        Its tables ``drain``, ``latency`` and ``latency_pooled`` are drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Three axes, one above the other: drain, median latency, p99 latency.
    """
    from matplotlib import pyplot

    figure, (drain, median, tail) = pyplot.subplots(
        3, 1, figsize=(style.HALF_PAGE[0], 7.2), height_ratios=(1.6, 1, 1)
    )
    _draw_drain(drain, run)
    _draw_latency(median, run, "p50_ns", "median")
    _draw_latency(tail, run, "p99_ns", "p99")
    low, high = zip(median.get_ylim(), tail.get_ylim(), strict=True)
    for ax in (median, tail):
        ax.set_ylim(min(low), max(high))
    tail.set_xlabel("events per second, on a fixed schedule")
    median.legend(
        loc="lower center", bbox_to_anchor=(0.42, 1), ncols=2, columnspacing=0.8,
        handletextpad=0.3, title="who wakes the reader", title_fontsize=7,
    )  # fmt: skip
    return figure


def _draw_drain(ax: Axes, run: Run) -> None:
    table = run.table("drain")
    rate = 1e3 * table["events"] / table["ns"]
    measured = set(table["consumer"])
    labels = {name: label for name, label in _LABELS.items() if name in measured}
    for y, name in enumerate(labels):
        of_this = rate[table["consumer"] == name]
        middle = of_this.median()
        look = style.VARIANT["fixed" if name.startswith(OURS) else "control"]
        look = style.VARIANT["broken"] if name.startswith("bcc") else look
        ax.errorbar(
            middle, y, xerr=[[middle - of_this.min()], [of_this.max() - middle]], **look.points()
        )
        ax.annotate(
            f"{middle:.3g}", (middle, y), (0, 3.5), textcoords="offset points", ha="center",
            fontsize=6.5,
        )  # fmt: skip
    ax.set_yticks(range(len(labels)), list(labels.values()))
    ax.set_ylim(len(labels) - 0.5, -0.7)
    ax.set_xscale("log")
    ax.grid(False, axis="y")
    ax.set_xlabel("filled ring drained, M events/s\n(median, least and greatest repetition)")


def _draw_latency(ax: Axes, run: Run, column: str, name: str) -> None:
    """Ours; those in C and Go are drawn as they are for followers, in bench-sync."""
    pooled, repetitions = run.table("latency_pooled"), run.table("latency")
    pooled = pooled[pooled["reader"] == OURS].sort_values("rate", kind="stable")
    repetitions = repetitions[repetitions["reader"] == OURS]
    for series, (policy, rows) in enumerate(pooled.groupby("policy", sort=False)):
        spread = repetitions[repetitions["policy"] == policy].groupby("rate")[column]
        middle = rows[column].to_numpy() / 1e3
        # The percentile of all times together may lie outside of those of the repetitions.
        low = (middle - spread.min().to_numpy() / 1e3).clip(min=0)
        high = (spread.max().to_numpy() / 1e3 - middle).clip(min=0)
        # Side by side, so that the bars of two policies do not hide each other.
        x = rows["rate"].to_numpy() * 1.09 ** (series - 2.5)
        ax.errorbar(
            x, middle, yerr=[low, high], **style.look(series).line(), label=policy,
            elinewidth=0.7, capsize=1.5,
        )  # fmt: skip
    against_rates(ax, pooled["rate"])
    ax.set_ylabel(f"intended time to\nPython, {name}, µs")
