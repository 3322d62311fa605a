"""Judges experiment 6: what a running program keeps of an update that has returned."""

from __future__ import annotations

import numpy as np
import pandas as pd

from labkit.analysis import history
from labkit.analysis.checkers import stale, unwritten
from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.history import Op
from labkit.analysis.runs import Run

_COPY = "value copied to the stack"
_SLEEPABLE = "inner map held, sleepable program"
_ORDINARY = "inner map held, ordinary program"


@judges("copied-value")
def copied_value(run: Run) -> Finding:
    """Copies and inner maps of sleepable programs go stale; pointers and lookups do not."""
    updates = run.table("updates")
    whole = history.from_frame(run.table("history"))
    judged = pd.Series(whole["key"][stale(whole)]).value_counts()
    agrees = bool((updates["key"].map(judged).fillna(0).to_numpy() == updates["stale_reads"]).all())
    copies = np.isin(whole["key"], updates[updates["case"] == _COPY]["key"])
    renewed = int(np.count_nonzero(copies & (whole["op"] == Op.READ) & (whole["version"] > 1)))
    copy, sleepable = run.count("broken", _COPY), run.count("broken", _SLEEPABLE)
    ordinary = updates[updates["case"] == _ORDINARY]
    asleep = updates[updates["case"] == _SLEEPABLE]
    waited = int((ordinary["end_ns"] >= ordinary["ended_ns"]).sum())
    returned = int((asleep["end_ns"] < asleep["ended_ns"]).sum())
    shares = {
        name: (rows["end_ns"] - rows["start_ns"]) / (rows["ended_ns"] - rows["start_ns"])
        for name, rows in (("ordinary", ordinary), ("sleepable", asleep))
    }
    blocked = {name: float(np.median(share)) for name, share in shares.items()}
    return Finding(
        run.experiment,
        f"After the update had returned, a running program used the old version in {copy} reads "
        f"of a copy on its stack, and in {sleepable} through an inner map that a sleepable "
        f"program held. The switch of an outer map waited for the ordinary program in {waited} "
        f"of {len(ordinary)} runs (median {blocked['ordinary']:.2f} of the time that the program "
        f"had left) and returned before the sleepable one ended in {returned} of {len(asleep)} "
        f"({blocked['sleepable']:.2f}). A pointer to the element and a lookup for each read "
        f"missed nothing.",
        (
            Check("a copy on the stack stays old to the end", copy.anomalies > 0 == renewed,
                  f"{copy} stale, {renewed} new"),
            Check("an inner map held by a sleepable program stays old after the switch",
                  sleepable.anomalies > 0, str(sleepable)),
            Check("the switch returns while a sleepable program still runs",
                  returned > 0, f"{returned} of {len(asleep)}"),
            Check("the switch never returns while an ordinary program holds the old inner map",
                  waited == len(ordinary) > 0, f"{waited} of {len(ordinary)}"),
            *(Check(f"never stale: {case}", count.anomalies == 0 < count.operations, str(count))
              for variant in ("control", "fixed") for case in run.cases(variant)
              for count in [run.count(variant, case)]),
            Check("the saved history shows the same, and no version from nowhere",
                  agrees and not unwritten(whole).any(), f"{int(judged.sum())} stale reads"),
        ),
    )  # fmt: skip
