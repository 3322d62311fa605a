"""Watch the writes of another process, which is not ours and tells nobody."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.comparisons import stranger
from labkit.errors import LabError
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import die_with_parent
from labkit.sync.changes import ChangeKind, Changes
from labkit.sync.poll import Poll
from labkit.sync.strategy import Strategy
from labkit.sync.trace_hook import TraceHook

_VALUE = np.dtype([("version", "u8"), ("written_ns", "u8")])
_LIMIT_S = 60.0  # of one follow; nothing is asserted about it
_SAMPLE = 2_000  # delays of a case that are kept


@experiment(
    "foreign-writer",
    number=45,
    family="sync",
    question="Can every write of a process be seen that knows nothing of its follower?",
    claims=("3.1a", "3.2"),
    needs=("bpf", "compile", "hash", "batch_hash", "ringbuf", "tp_btf"),
    quick={"writes": 1_009, "per_second": 2_000, "keys": 4, "poll_ms": [10.0]},
    full={"writes": 10_007, "per_second": 2_000, "keys": 4, "poll_ms": [1.0, 10.0, 100.0]},
)
def foreign_writer(*, writes: int, per_second: int, keys: int, poll_ms: list[float]) -> Tables:
    """Follow a map that another process overwrites by plain calls of libbpf.

    The process is started for it, imports nothing of ours, and writes what it would write
    anyway: a value with its version and the time. A follower who polls sees the newest version of
    a key at each look; the hook sees each system call when it returns.

    Parameters
    ----------
    writes : int
        Writes of the process.
    per_second : int
        Its rate.
    keys : int
        Keys that it writes in turn.
    poll_ms : list of float
        Intervals of the polls, milliseconds.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a version written, an anomaly one that the follower never
        saw; in control the process writes another map, and an anomaly is a change that was
        reported. ``cost_ns`` is the median delay, from the writer's own time stamp (taken before
        its call) until the change stood in the replica. ``delays``: a sample of at most 2,000 a
        case, with columns ``variant``, ``case`` and ``delay_ns`` (float64).
    """
    triad, delays = Triad("version never seen"), []
    cases: list[tuple[str, str, Callable[[], Strategy]]] = [
        ("broken", f"poll every {ms:g} ms", lambda ms=ms: Poll(ms / 1e3))  # type: ignore[misc]
        for ms in poll_ms
    ]
    cases += [
        ("fixed", "hook", TraceHook),
        ("control", "hook, another map is written", TraceHook),
    ]
    for variant, case, strategy in cases:
        say(f"{writes} writes of another process, followed by {case}")
        changes = _followed(strategy(), writes, per_second, keys, elsewhere=variant == "control")
        updates = changes[changes["kind"] == ChangeKind.UPDATE]
        seen = len(np.unique(updates[["key", "version"]]))
        delay_ns = (updates["seen_ns"] - updates["value"]["written_ns"]).astype(np.float64)
        if variant == "control":
            triad.add(
                variant, case=case, operations=writes, anomalies=min(len(changes), writes),
                anomaly="change of another map",
            )  # fmt: skip
            continue
        triad.add(
            variant, case=case, operations=writes, anomalies=writes - seen,
            cost_ns=float(np.median(delay_ns)),
        )  # fmt: skip
        step = -(-len(delay_ns) // _SAMPLE)
        delays.append(
            pd.DataFrame({"variant": variant, "case": case, "delay_ns": delay_ns[::step]})
        )
    return {"counts": triad.table(), "delays": pd.concat(delays, ignore_index=True)}


def _followed(
    strategy: Strategy, writes: int, per_second: int, keys: int, *, elsewhere: bool
) -> Changes:
    """All that a strategy hands out while the stranger writes, and a little longer."""
    with (
        Map.create(MapKind.HASH, key="u4", value=_VALUE, max_entries=keys) as table,
        Map.create(MapKind.HASH, key="u4", value=_VALUE, max_entries=keys) as other,
        strategy,
    ):
        strategy.attach(table)
        written = other if elsewhere else table
        arguments = (written.id, keys, writes, per_second)
        writer = subprocess.Popen(
            [sys.executable, stranger.__file__, *map(str, arguments)],
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
