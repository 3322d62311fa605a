"""Judges experiment 43: whose updates a kprobe's program does not see."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("kprobe-trap")
def kprobe_trap(run: Run) -> Finding:
    """A kprobe's program sees nothing of bpf(2) and its like, an fentry program everything."""
    broken, control = run.count("broken"), run.count("control")
    fentry = [run.count("fixed", case) for case in run.cases("fixed") if case.startswith("fentry")]
    plain = run.count("fixed", "kprobe without a program; bpf(2)")
    hits = plain.operations - plain.anomalies
    checks = [
        Check(f"it sees none: {case}", count.anomalies == count.operations > 0, f"{count} unseen")
        for case in run.cases("broken")
        for count in [run.count("broken", case)]
    ]
    checks += [
        Check(f"all are seen: {case}", count.anomalies == 0 < count.operations, f"{count} unseen")
        for variant in ("control", "fixed")
        for case in run.cases(variant)
        for count in [run.count(variant, case)]
    ]
    return Finding(
        run.experiment,
        f"A kprobe's program on the hash's update did not see {broken} updates by bpf(2), by a "
        f"kprobe's program and by a tracepoint's, though bpf(2) hit the probe {hits:,} times; "
        f"of those by a raw tracepoint's program and a socket filter it missed {control}. An "
        f"fentry program missed {sum(one.anomalies for one in fentry):,} of "
        f"{sum(one.operations for one in fentry):,} by all five.",
        tuple(checks),
    )
