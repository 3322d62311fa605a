"""Judges experiment 18: counts lost between reading and clearing them."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_DIFFERENCES = "never delete, take differences"


@judges("collected-counts")
def collected_counts(run: Run) -> Finding:
    """Read-then-delete loses most, lookup-and-delete far less, differences nothing."""
    worst, control = run.count("broken"), run.count("control")
    gap = run.count("broken", "read a key, then delete it")
    exact = run.count("fixed", _DIFFERENCES)
    single_step = [case for case in run.cases("fixed") if case != _DIFFERENCES]
    checks = [
        Check(f"loses events: {case}", run.count("broken", case).anomalies > 0,
              str(run.count("broken", case)))
        for case in run.cases("broken")
    ]  # fmt: skip
    checks.append(
        Check("nothing is lost once counting is over", control.anomalies == 0, str(control))
    )
    checks += [
        Check(
            f"loses at most a tenth of what read-then-delete does: {case}",
            10 * run.count("fixed", case).rate <= gap.rate,
            f"{run.count('fixed', case)} against {gap}",
        )
        for case in single_step
    ]
    checks.append(Check(f"loses nothing: {_DIFFERENCES}", exact.anomalies == 0, str(exact)))
    remaining = sum(run.count("fixed", case).anomalies for case in single_step)
    return Finding(
        run.experiment,
        f"Reading and then deleting lost {worst} events; lookup-and-delete closes the gap between "
        f"the two calls and lost {remaining:,}, those that a program was adding to an element "
        f"that had just been taken; counters that are never deleted lost {exact.anomalies:,}.",
        tuple(checks),
    )
