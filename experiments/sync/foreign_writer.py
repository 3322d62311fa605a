"""Watch the writes of another process, which is not ours and tells nobody."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pandas as pd

from labkit.errors import LabError
from labkit.figures import Axes, style
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import die_with_parent
from labkit.lab.experiment import Case, Counted, Statement, experiment
from labkit.load import foreign_process
from labkit.runs import Run
from labkit.sync.changes import ChangeKind, Changes
from labkit.sync.poll import Poll
from labkit.sync.strategy import Strategy
from labkit.sync.trace_hook import TraceHook

_VALUE = np.dtype([("version", "u8"), ("written_ns", "u8")])
_LIMIT_S = 60.0  # of one follow; nothing is asserted about it
_SAMPLE = 2_000  # delays of a case that are kept


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the delays of all versions written; a curve ends at the share that was seen."""
    ax = style.axes(ax)
    for i, (case, group) in enumerate(run.table("delays").groupby("case", sort=False)):
        seen = 1 - run.count(str(group["variant"].iloc[0]), str(case)).rate
        late = group["delay_ns"].sort_values() / 1e6
        share = [seen * (place + 1) / len(late) for place in range(len(late))]
        look = style.look(i)
        ax.step(late, share, where="post", color=look.color, ls=look.linestyle,
                label=f"{run.label(str(case))}: {seen:.0%} seen")  # fmt: skip
    ax.set_xscale("log")
    ax.set_ylim(0, 1.5)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    ax.set_xlabel("from the writer's time stamp to the copy (ms)", loc="right")
    ax.set_ylabel("share of versions written")
    ax.legend(loc="upper left")
    return ax


@experiment(
    "foreign-writer",
    number=45,
    family="sync",
    question="Can every write of a process be seen that knows nothing of its follower?",
    claims=("3.1a", "3.2"),
    needs=("bpf", "compile", "hash", "batch_hash", "ringbuf", "tp_btf"),
    # So fast that each key is written twice between two polls, or more often.
    quick={"writes": 2_009, "per_second": 8_000, "keys": 4, "rounds": 1},
    full={"writes": 20_011, "per_second": 8_000, "keys": 4, "rounds": 1},
    cases=(
        Case("broken", "poll-1ms", "poll every 1 ms", period_s=0.001),
        Case("broken", "poll-10ms", "poll every 10 ms", period_s=0.01),
        Case("broken", "poll-100ms", "poll every 100 ms", period_s=0.1),
        Case("fixed", "hook", "hook"),
        Case("control", "elsewhere", "hook, another map is written", elsewhere=True),
    ),
    counted=Counted("version missed or made up", operations="changes", anomalies="wrong",
                    cost_ns="delay_ns"),
    statements=(
        Statement("versions pass unseen", "some(broken)"),
        Statement("the hook sees every version", "none(fixed)"),
        Statement("and nothing of another map", "none(control)"),
        Statement("nobody tells of a version that was not written, or of one twice",
                  'all(rounds(case != "elsewhere").told == rounds(case != "elsewhere").seen > 0) '
                  'and all(rounds(case="elsewhere").told == 0)'),
    ),
    sentence="Of what another process wrote by plain libbpf calls, the hook missed {fixed}, with a "
    "median delay of {ms(fixed.cost_ns)}; polls missed more (every 1 ms "
    '{broken["poll-1ms"]}, every 10 ms {broken["poll-10ms"]}, every 100 ms '
    '{broken["poll-100ms"]}).',
    figure=_figure,
)  # fmt: skip
def foreign_writer(case: Case, *, writes: int, per_second: int, keys: int) -> dict[str, Any]:
    """Follow a map that another process overwrites by plain calls of libbpf.

    The process is started for it, imports nothing of ours, and writes what it would write
    anyway: a value with its version and the time. A follower who polls sees the newest version of
    a key at each poll; the hook sees each system call when it returns.

    Parameters
    ----------
    case : Case
        The follower's period, where it polls; or whether another map than the followed one is
        written.
    writes : int
        Writes of the process.
    per_second : int
        Its rate.
    keys : int
        Keys that it writes in turn.

    Returns
    -------
    dict
        ``told`` (changes that the follower handed out); ``seen`` (different versions among them
        that were written to its map); ``changes`` (writes, and what was told beyond those seen);
        ``wrong`` (of these, what was written to its map and not seen, or told and not written);
        ``delay_ns``, the median from the writer's own time stamp (taken before its call) until the
        change stood in the replica. ``delays``, a DataFrame: a sample of at most 2,000,
        ``delay_ns``.
    """
    strategy = Poll(case.period_s) if "period_s" in case.settings else TraceHook()
    elsewhere = case.get("elsewhere", False)
    changes = _followed(strategy, writes, per_second, keys, elsewhere=elsewhere)
    row = figures(changes, 0 if elsewhere else writes, keys)
    return {**row, "changes": row["changes"] + writes} if elsewhere else row


def figures(changes: Changes, writes: int, keys: int) -> dict[str, Any]:
    """What a follower told, beside what was written to its map.

    Parameters
    ----------
    changes : numpy.ndarray
        All that it handed out.
    writes, keys : int
        As for `foreign_writer`; no writes where another map was written.

    Returns
    -------
    dict
        As of `foreign_writer`; without ``delays`` where nothing was seen.
    """
    ours = changes[_written(changes, writes, keys)]
    seen = len(np.unique(ours[["key", "version"]]))
    made_up = len(changes) - seen
    delay_ns = (ours["seen_ns"] - ours["value"]["written_ns"]).astype(np.float64)
    row = {
        "changes": writes + made_up,
        "wrong": writes - seen + made_up,
        "told": len(changes),
        "seen": seen,
        "delay_ns": float(np.median(delay_ns)) if len(ours) else math.nan,
    }
    if not len(ours):
        return row
    return {**row, "delays": pd.DataFrame({"delay_ns": delay_ns[:: -(-len(ours) // _SAMPLE)]})}


def _written(changes: Changes, writes: int, keys: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which changes are ones that the process wrote: version after version of each key in turn."""
    key, version = changes["key"].astype(np.int64), changes["value"]["version"].astype(np.int64)
    place = (version - 1) * keys + key
    mask: np.ndarray[Any, np.dtype[np.bool_]] = (
        (changes["kind"] == ChangeKind.UPDATE)
        & (changes["version"] == changes["value"]["version"])
        & (key < keys)
        & (version > 0)
        & (place < writes)
    )
    return mask


def _followed(
    strategy: Strategy, writes: int, per_second: int, keys: int, *, elsewhere: bool
) -> Changes:
    """All that a strategy hands out while the foreign writer writes, and a little longer."""
    with (
        Map.create(MapKind.HASH, key="u4", value=_VALUE, max_entries=keys) as table,
        Map.create(MapKind.HASH, key="u4", value=_VALUE, max_entries=keys) as other,
        strategy,
    ):
        strategy.attach(table)
        written = other if elsewhere else table
        arguments = (written.id, keys, writes, per_second)
        writer = subprocess.Popen(
            [sys.executable, foreign_process.__file__, *map(str, arguments)],
            stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        parts = [strategy.poll(0)]
        deadline = time.monotonic() + _LIMIT_S
        try:
            while writer.poll() is None:
                if time.monotonic() > deadline:
                    raise LabError(f"The writer did not end within {_LIMIT_S:g} s.")
                parts.append(strategy.poll(0.05))
        finally:
            writer.kill()
            _, said = writer.communicate()
        if writer.returncode:
            raise LabError(f"The writer failed: {said.strip()[-200:]}.")
        while len(parts[-1]) or time.monotonic() < deadline:
            parts.append(strategy.poll(0.3))  # longer than any interval and timer
            if not len(parts[-1]):
                break
        return np.concatenate(parts)
