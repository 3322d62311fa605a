"""What one lookup or update costs, whose cost that is, and what a poll adds to it."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import BadInput, LabError
from labkit.figures import Axes, style
from labkit.judge.statistics import uniform_fits
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import ahead_of_others
from labkit.kernel.programs import BccObject
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment
from labkit.load import open_loop
from labkit.load.open_loop import OpenLoopWriter
from labkit.runs import Run

LATE_MS = 47.0
"""What the article gives as the mean duration of a lookup, milliseconds."""

_KEY = 1
_MOST_CALLS = 100_000
_RUNS = 200_000  # of a program in place
_WAYS = {
    "clock": "clock alone",
    "refused": "refused bpf(2)",
    "lookup-kernel": "lookup, inside the kernel",
    "update-kernel": "update, inside the kernel",
    "lookup": "lookup, libbpf",
    "lookup-map": "lookup, labkit Map",
    "lookup-bcc": "lookup, bcc t[k]",
}
"""The ways to call that are drawn, with their labels."""

Nanoseconds = npt.NDArray[np.int64]


def derive(tables: Tables) -> Tables:
    """What the statements compare: delays with the uniform law, and their means.

    ``fits``: see `uniform_fits`. ``means``: ``case``, ``round``, ``ms``, the mean delay.
    """
    delays = tables["delays"]
    means = delays.groupby(["case", "round"], sort=False)["delay_ms"].mean().rename("ms")
    return {"fits": uniform_fits(delays), "means": means.reset_index()}


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Which share of the calls took at most so long, for each way."""
    ax = style.axes(ax, height=3.2)
    times = run.table("times").groupby("way")["ns"]
    for number, (way, label) in enumerate(_WAYS.items()):
        look = style.look(number)
        ax.ecdf(times.get_group(way), color=look.color, ls=look.linestyle, label=label)
    ax.axvline(LATE_MS * 1e6, color=style.BLACK, lw=0.8)
    ax.text(LATE_MS * 1e6, 0.5, "47 ms, the article's mean ", ha="right", va="center",
            rotation=90, fontsize=6)  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlim(20, 2e8)
    ax.set_xlabel("duration of one call (ns)")
    ax.set_ylabel("share of the calls")
    ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1), ncols=2, fontsize=6, columnspacing=1.0)
    return ax


@experiment(
    "syscall-cost",
    number=34,
    family="kernel-facts",
    question="Is it the lookup that makes a poller late, or the time between two of them?",
    claims=("5.2",),
    needs=("bpf", "compile", "test_run", "tracefs", "tracepoint", "batch_hash"),
    # Changes times their gap: whole periods, or delays would not be uniform on them.
    quick={"calls": 350, "changes": 10, "gap_ms": 40.0, "seed": 34, "rounds": 6},
    full={"calls": 2_000, "changes": 60, "gap_ms": 40.0, "seed": 34, "rounds": 10},
    cases=(
        Case("broken", "slow", "change, polled for every 200 ms", period_ms=200.0),
        Case("fixed", "fast", "change, polled for every 1 ms", period_ms=1.0),
        Case("control", "lookup", "one lookup"),
        Case("control", "update", "one update", beside="lookup"),
    ),
    counted=Counted(f"{LATE_MS:g} ms or longer", operations="done", anomalies="late",
                    cost_ns="call_ns"),
    derive=derive,
    statements=(
        Statement("of 100 lookups, and of 100 updates, less than one takes 47 ms",
                  '100 * control["lookup"].anomalies < control["lookup"].operations '
                  'and 100 * control["update"].anomalies < control["update"].operations'),
        Statement("and most take less than a hundredth of that",
                  'share(0 < times(way=("lookup", "update")).ns '
                  '< 10000 * chapter_5(figure="mean lookup").value) > 0.5'),
        Statement("the kernel's part is less than what Python measures",
                  '0 < ratio(times(way="lookup-kernel").ns, times(way="lookup").ns) < 1'),
        Statement("calls above the floor are told from it",
                  'ratio(times(way="refused").ns, times(way="clock").ns) > 1 '
                  'and ratio(times(way="lookup").ns, times(way="refused").ns) > 1'),
        # One in 10,000 such runs would have so little by chance, for each period.
        Statement("a change waits uniformly over the period, but for polls that are late",
                  "all(fits.p_value > 0.0001) and "
                  'between(fits(case="slow").p_least, fits(case="slow").p_value) > 0.0001'),
        Statement("the article's mean of 38.2 ms is less than by its poll and more than by the "
                  "fast one",
                  'spread(means(case="slow").ms) '
                  '> chapter_5(figure="mean latency", method="map sync").value '
                  'and 0 < spread(means(case="fast").ms) '
                  '< chapter_5(figure="mean latency", method="map sync").value'),
        Statement("most changes are seen later than 47 ms",
                  "2 * broken.anomalies > broken.operations"),
        Statement("with the same lookups at a shorter period far fewer are",
                  "2 * fixed.anomalies < broken.anomalies"),
    ),
    sentence='Half of the lookups took less than {us(median(times(way="lookup").ns))} as Python '
    'sees them and {us(median(times(way="lookup-kernel").ns))} between entry and exit of the '
    'system call; the clock alone is {us(median(times(way="clock").ns))} of that, and an entry '
    "read in a batch takes {us(median(batches.ns_per_entry))}. A poll every "
    '{fits(case="slow").period_ms} ms saw changes {mean(delays(case="slow").delay_ms)} ms late in '
    "the mean, and {broken} later than 47 ms, of which the law expects "
    '{percent(1 - chapter_5(figure="mean lookup").value / fits(case="slow").period_ms)}; every '
    '{fits(case="fast").period_ms} ms, {mean(delays(case="fast").delay_ms)} ms and {fixed}.',
    figure=_figure,
)  # fmt: skip
def syscall_cost(
    case: Case, *, calls: int, changes: int, gap_ms: float, seed: int, turn: int
) -> list[dict[str, Any]]:
    """Time single calls in several ways, or follow changes by a slow or by a fast poll.

    The clock around a call in Python also times the interpreter, so the floor is measured
    beside it: the clock alone, a foreign function that does nothing, a bpf(2) that is refused
    at once. Programs on the entry and the exit of bpf(2) time the same calls without Python.

    Parameters
    ----------
    case : Case
        The call, or the poll's period; the article's is 200 ms.
    calls : int
        Calls of each way in a round; 100,000 at most.
    changes : int
        Changes that are followed in a round.
    gap_ms : float
        Mean gap between two changes, milliseconds; open loop.
    seed : int
        Of the schedule; both polls follow the same one in a round, and another in the next.
    turn : int
        The round.

    Returns
    -------
    list of dict
        ``done``: calls, or changes that were followed; ``late``: those that took 47 ms or longer,
        of a change from its intended moment until a poll read it or a newer one; ``call_ns``:
        median of the calls. Table ``times``: ``way``, ``ns`` (float32), one row per call.
        ``delays``: ``period_ms``, ``version``, ``delay_ms``. ``programs``: ``program``,
        ``mean_ns`` (by the kernel's clock, of many runs in place). ``batches``: ``entries``,
        ``ns_per_entry``.
    """
    if calls > _MOST_CALLS:
        raise BadInput(f"calls of syscall-cost are {_MOST_CALLS:,} at most, not {calls:,}.")
    if case.id == "lookup":
        return _called(calls)
    delay_ms = _followed(open_loop.schedule(changes, gap_ms, seed + turn), case.period_ms) / 1e6
    versions = np.arange(1, changes + 1)
    delays = {"period_ms": case.period_ms, "version": versions, "delay_ms": delay_ms}
    late = int((delay_ms >= LATE_MS).sum())
    return [{"done": changes, "late": late, "delays": pd.DataFrame(delays)}]


def _called(calls: int) -> list[dict[str, Any]]:
    """All ways to call, so many times each: a row for lookups, and one for updates."""
    namespace = os.stat("/proc/self/ns/pid")
    with programs.load_by_bcc(
        "syscall_cost",
        CALLS=calls,
        THREAD=threading.get_native_id(),
        NAMESPACE_DEVICE=namespace.st_dev,
        NAMESPACE_INODE=namespace.st_ino,
    ) as loaded:
        table = loaded.map("table")
        keys = np.arange(table.max_entries, dtype=np.uint32)
        table.update_many(keys, keys)
        times = {way: _timed(call, calls) for way, call in _ways(loaded, table).items()}
        times |= _by_kernel(loaded, table, calls)
        batch = _batch(table)
        in_place = [
            {"program": name, "mean_ns": loaded.program(name).test_run(repeat=_RUNS).mean_ns}
            for name in ("nothing", "look_up")
        ]
    ns = np.concatenate(list(times.values())).astype(np.float32)
    rows: list[dict[str, Any]] = [
        {
            "case": way,
            "done": calls,
            "late": int((times[way] >= LATE_MS * 1e6).sum()),
            "call_ns": float(np.median(times[way])),
        }
        for way in ("lookup", "update")
    ]
    rows[0] |= {
        "times": pd.DataFrame({"way": np.repeat(list(times), calls), "ns": ns}),
        "programs": pd.DataFrame(in_place),
        "batches": batch,
    }
    return rows


def _ways(loaded: BccObject, table: Map) -> dict[str, Callable[[], Any]]:
    """One call each; the first three are the floor of the measurement."""
    look_up, update = libbpf.api().bpf_map_lookup_elem, libbpf.api().bpf_map_update_elem
    key, value = np.array([_KEY], np.uint32), np.zeros(1, np.uint64)
    key_at, value_at, fd = key.ctypes.data, value.ctypes.data, table.fd
    absolute = ctypes.CDLL(None).labs
    absolute.argtypes, absolute.restype = [ctypes.c_long], ctypes.c_long
    by_bcc = loaded.table("table")
    bcc_key = by_bcc.Key(_KEY)

    def nothing(_keep: object = (key, value)) -> None:
        return None

    return {
        "clock": nothing,
        "foreign": lambda: absolute(-1),
        "refused": lambda: look_up(-1, key_at, value_at),
        "lookup": lambda: look_up(fd, key_at, value_at),
        "update": lambda: update(fd, key_at, value_at, 0),
        "lookup-map": lambda: table.lookup(_KEY),
        "lookup-bcc": lambda: by_bcc[bcc_key],
    }


def _timed(call: Callable[[], Any], calls: int) -> Nanoseconds:
    spent = []
    for _ in range(calls):
        begun = time.monotonic_ns()
        call()
        spent.append(time.monotonic_ns() - begun)
    return np.array(spent)


def _by_kernel(loaded: BccObject, table: Map, calls: int) -> dict[str, Nanoseconds]:
    """The same calls, timed by programs between the entry and the exit of the system call."""
    value = np.zeros(1, table.value_dtype)
    progress, recorded = loaded.map("progress"), loaded.map("times")
    found = {}
    for name, call in (
        ("lookup", table.reader(_KEY, value)),
        ("update", table.updater(_KEY, value)),
    ):
        progress.update(0, (0, 0))
        links = [
            loaded.attach(loaded.program(function, ProgramKind.TRACEPOINT), f"syscalls:{event}")
            for function, event in (("on_exit", "sys_exit_bpf"), ("on_enter", "sys_enter_bpf"))
        ]
        try:
            for _ in range(calls):
                call()
        finally:
            for link in links:
                loaded.detach(link)
        seen = int(progress.lookup(0)["calls"])
        if seen != calls:
            raise LabError(f"Of {calls} calls the programs timed {seen}.")
        found[f"{name}-kernel"] = recorded.snapshot().values.astype(np.int64)
    return found


def _batch(table: Map) -> pd.DataFrame:
    begun = time.monotonic_ns()
    entries = len(table.snapshot())
    spent = time.monotonic_ns() - begun
    return pd.DataFrame([{"entries": entries, "ns_per_entry": spent / entries}])


def _followed(moments: Nanoseconds, period_ms: float) -> npt.NDArray[np.float64]:
    """Nanoseconds from the intended moment of each change until a poll read it or a newer."""
    with Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=1, name="followed") as table:
        written, value = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
        update, read = table.updater(0, written), table.reader(0, value)

        def write(version: int) -> None:
            written[0] = version
            update()

        versions, at = [], []
        # Ahead of other load, or it is the queue for a CPU that both polls would show.
        with ahead_of_others(), OpenLoopWriter(moments, write) as writer:
            moment, period_ns = time.monotonic_ns(), round(period_ms * 1e6)
            while not writer.all_seen():
                read()
                versions.append(int(value[0]))
                at.append(time.monotonic_ns())
                writer.saw(versions[-1])
                moment = open_loop.next_poll(moment, period_ns)
            intended = writer.intended_ns
    first = np.searchsorted(versions, np.arange(1, len(moments) + 1))
    return np.array(at)[first] - intended.astype(np.float64)
