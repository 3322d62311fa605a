"""Judges experiment 17: a walk by key skips and repeats keys that stay."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("skipped-keys")
def skipped_keys(run: Run) -> Finding:
    """Walks by key go wrong under both kinds of writes, reads by batch under neither."""
    broken, control, fixed = (run.count(v) for v in ("broken", "control", "fixed"))
    walks = run.table("walks")
    lost_place = walks[walks["case"].str.contains("delete") & (walks["variant"] == "broken")]
    unfinished = int((~lost_place["finished"]).sum())
    checks = [
        Check(f"goes wrong: {case}", run.count("broken", case).anomalies > 0,
              str(run.count("broken", case)))
        for case in run.cases("broken")
    ]  # fmt: skip
    checks += [
        Check("every key shows once while nobody writes", control.anomalies == 0, str(control)),
        Check("a read by batch shows every key once", fixed.anomalies == 0, str(fixed)),
        Check(
            "a read by batch always ends by itself",
            bool(walks[walks["variant"] == "fixed"]["finished"].all()),
            f"{int(walks[walks['variant'] == 'fixed']['finished'].sum())} of "
            f"{int((walks['variant'] == 'fixed').sum())}",
        ),
    ]
    return Finding(
        run.experiment,
        f"Of the keys that never left the map, a walk by key skipped or repeated {broken}; "
        f"{unfinished} of {len(lost_place)} walks were sent back to the start until their bound "
        f"ended them. A read by batch, under the same writes: {fixed}.",
        tuple(checks),
    )
