"""Judges experiment 57: how many keys one insertion pushes out of an LRU map."""

from __future__ import annotations

import numpy as np
import pandas as pd

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_MOST = 128  # LOCAL_FREE_TARGET of kernel/bpf/bpf_lru_list.c
FIXED_RULE = f"always {_MOST}"
"""Before Linux 6.16."""

SHARE_RULE = "half of a CPU's share"
"""Since then."""


@judges("lru-free-target")
def lru_free_target(run: Run) -> Finding:
    """One insertion evicts many keys, by one of the two rules that kernels have had."""
    broken, control, fixed = run.count("broken"), run.count("control"), run.count("fixed")
    gone = evicted(run)
    found = rule(run)
    shown = ", ".join(f"{count} of {size}" for size, count in gone.items())
    return Finding(
        run.experiment,
        f"One key more, inserted by another CPU, pushed out of full LRU maps: {shown} keys; the "
        f"rule of this kernel is {found or 'none that is known'}. With room in the map {control} "
        f"were gone; a full plain hash refused the key and lost {fixed}.",
        (
            Check("a full LRU evicts at one insertion", broken.anomalies > 0, str(broken)),
            Check("as many as one of the two known rules says", bool(found),
                  f"{shown}: {found or 'neither'}"),
            Check("every time", bool((run.table("evicted").groupby("entries")["gone"].nunique()
                                      == 1).all()), f"{len(run.table('evicted'))} maps"),
            Check("with room in the map, nothing goes", control.anomalies == 0 <
                  control.operations, str(control)),
            Check("a full hash refuses instead", fixed.anomalies == 0 < fixed.operations,
                  str(fixed)),
        ),
    )  # fmt: skip


def evicted(run: Run) -> pd.Series[int]:
    """Keys that one insertion pushed out, by the size of the map: the median of its rounds."""
    found = run.table("evicted").groupby("entries")["gone"].median().astype(int)
    assert isinstance(found, pd.Series)
    return found


def rule(run: Run) -> str:
    """`FIXED_RULE` or `SHARE_RULE`, whichever foretells the run; empty where neither does."""
    gone = evicted(run)
    sizes = gone.index.to_numpy(np.int64)
    cpus = int(run.table("cpus")["possible"].iloc[0])
    # A CPU that took 128 of 128 elements for its own has left none that could be evicted.
    fixed = np.where(sizes > _MOST, np.minimum(sizes - _MOST, _MOST), 1)
    share = np.clip(sizes // cpus // 2, 1, _MOST)
    for name, foretold in ((FIXED_RULE, fixed), (SHARE_RULE, share)):
        if np.array_equal(gone.to_numpy(), foretold):
            return name
    return ""
