"""Judges experiment 5: a lookup misses a key that is being overwritten."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_RETRY = "hash, one retry in the program"


@judges("transient-null")
def transient_null(run: Run) -> Finding:
    """Hash lookups miss, and neither in-place writes nor a retry do."""
    broken, control = run.count("broken"), run.count("control")
    checks = [
        Check(
            f"a plain update hides a key for a moment ({case})",
            run.count("broken", case).anomalies > 0,
            str(run.count("broken", case)),
        )
        for case in run.cases("broken")
    ]
    checks.append(
        Check(
            "no key is absent while nobody writes",
            control.anomalies == 0,
            str(control),
        )
    )
    in_place = [case for case in run.cases("fixed") if case != _RETRY]
    checks += [
        Check(f"cured by: {case}", run.count("fixed", case).anomalies == 0,
              str(run.count("fixed", case)))
        for case in in_place
    ]  # fmt: skip
    # A second miss needs a second update of the same key within nanoseconds: rare, not impossible.
    retried, missed = run.count("fixed", _RETRY), run.count("broken", "hash")
    checks.append(
        Check(
            "one retry finds at least 99 of 100 of the keys that were missed",
            100 * retried.anomalies <= missed.anomalies,
            f"{retried.anomalies:,} of {missed.anomalies:,} were absent again",
        )
    )
    return Finding(
        run.experiment,
        f"A key that is never deleted was absent in {broken} lookups "
        f"while it was overwritten by plain updates "
        f"({1e6 * broken.rate:.0f} in a million), and in {control} "
        f"while nobody wrote. Updates in place (BPF_F_LOCK, array) "
        f"brought it to {sum(run.count('fixed', case).anomalies for case in in_place):,}, one "
        f"retry to {retried.anomalies:,}.",
        tuple(checks),
    )
