"""Judges experiment 51: a burst past the ring's capacity."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import VARIANTS, Run


@judges("burst-timeline")
def burst_timeline(run: Run) -> Finding:
    """What found no room stays wrong without a reading of the map, and is right soon with one."""
    bursts = run.table("bursts")
    of = {name: bursts[bursts["variant"] == name] for name in VARIANTS}
    broken, control, fixed = (run.count(variant) for variant in ("broken", "control", "fixed"))
    unaccounted = int(
        (bursts["produced"] - bursts["delivered"] - bursts["dropped"] - bursts["coalesced"])
        .abs()
        .sum()
    )
    miscounted = int((bursts["produced"] != bursts["written"]).sum())
    repaired = of["fixed"]["repaired_ns"]
    overrun = bursts[bursts["variant"] != "control"]
    full = float((overrun["fullest_bytes"] / overrun["ring_bytes"]).min())
    return Finding(
        run.experiment,
        f"A burst overran the ring: {int(of['broken']['dropped'].sum()):,} events of "
        f"{int(of['broken']['written'].sum()):,} found no room, and {broken} keys stood at an old "
        f"version until the stream ended, and after it. With a reading of the map the copy was "
        f"right {repaired.median() / 1e6:,.1f} ms after the burst (at most "
        f"{repaired.max() / 1e6:,.1f} ms), while the stream went on; one reading takes "
        f"{of['fixed']['read_ns'].median() / 1e6:,.2f} ms. A ring that holds the burst dropped "
        f"{int(of['control']['dropped'].sum())}.",
        (
            Check("produced = delivered + dropped + coalesced, and is what was written",
                  unaccounted == 0 == miscounted,
                  f"{unaccounted} unaccounted for in {len(bursts)} runs"),
            Check("the burst filled the ring", full > 0.9, f"to {full:.0%} at least"),
            Check("and events were dropped, with both followers",
                  bool((overrun["dropped"] > 0).all()), f"{overrun['dropped'].min():,} at least"),
            Check("events alone never repair it: each event of the burst that was dropped is a key "
                  "that stays behind",
                  bool((of["broken"]["behind_at_end"] > 0).all())
                  and broken.anomalies == int(of["broken"]["behind_at_end"].sum())
                  <= int(of["broken"]["dropped"].sum()),
                  f"{broken} keys behind"),
            Check("a follower that reads the map does, while the stream goes on",
                  fixed.anomalies == 0 < fixed.operations
                  and bool((of["fixed"]["left"] > 0).all()),
                  f"{fixed} keys behind, {int(of['fixed']['left'].min()):,} writes after it at the "
                  "least"),
            Check("by reading the map, which the other one does not",
                  int(of["fixed"]["resyncs"].min()) > 0 == int(of["broken"]["resyncs"].sum()),
                  f"{int(of['fixed']['resyncs'].median())} in the median"),
            Check("a ring that holds the burst drops nothing",
                  control.anomalies == 0 and int(of["control"]["dropped"].sum()) == 0,
                  f"{control} keys behind"),
        ),
    )  # fmt: skip
