"""Judges experiment 38: relocation is a matter of loading."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_UPDATES = ", updates"


@judges("co-re-refusal")
def co_re_refusal(run: Run) -> Finding:
    """On a map's value the attribute prevents the load; loaded programs read every update."""
    refused = run.count("broken")
    loaded = {
        case: run.count(variant, case)
        for variant in ("control", "fixed")
        for case in run.cases(variant)
    }
    loads = {case: one for case, one in loaded.items() if not case.endswith(_UPDATES)}
    reads = {case: one for case, one in loaded.items() if case.endswith(_UPDATES)}
    builds = run.table("builds").set_index("case")
    answer = str(builds.loc[run.cases("broken")[0], "answer"])
    stale = sum(one.anomalies for one in reads.values())
    updates = sum(one.operations for one in reads.values())
    return Finding(
        run.experiment,
        f"With the attribute on the struct of a map's value {refused} loads were refused. The "
        f"builds without it, and with it on the kernel's own struct alone, were loaded and "
        f"missed {stale:,} of {updates:,} updates.",
        (
            Check(
                "the attribute on a struct that the kernel does not know prevents every load",
                refused.anomalies == refused.operations > 0 and "EINVAL" in answer,
                f"{refused}: {answer}",
            ),
            Check(
                "without it, or on the kernel's struct alone, the program is loaded",
                len(loads) == 2
                and all(one.operations > 0 == one.anomalies for one in loads.values()),
                "; ".join(f"{case}: {one} refused" for case, one in loads.items()),
            ),
            Check(
                "a loaded program reads every update",
                len(reads) == 2 and updates > 0 and stale == 0,
                f"{stale:,} of {updates:,} stale",
            ),
        ),
    )
