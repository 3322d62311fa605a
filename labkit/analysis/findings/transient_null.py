"""Judges experiment 5: a lookup misses a key that is being overwritten."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


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
    checks += [
        Check(f"cured by: {case}", run.count("fixed", case).anomalies == 0,
              str(run.count("fixed", case)))
        for case in run.cases("fixed")
    ]  # fmt: skip
    return Finding(
        run.experiment,
        f"A key that is never deleted was absent in {broken} lookups "
        f"while it was overwritten by plain updates "
        f"({1e6 * broken.rate:.0f} in a million), and in {control} "
        f"while nobody wrote. Updates in place (BPF_F_LOCK, array) "
        "and one retry each brought it to "
        f"{max(run.count('fixed', case).anomalies for case in run.cases('fixed')):,}.",
        tuple(checks),
    )
