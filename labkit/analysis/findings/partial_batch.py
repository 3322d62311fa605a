"""Judges experiment 21: a failed batch has been applied in part."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("partial-batch")
def partial_batch(run: Run) -> Finding:
    """Every failed batch left elements behind, exactly as many as its count said."""
    control, fixed = run.count("control"), run.count("fixed")
    answers = run.table("answers")
    checks = [
        Check(f"leaves elements behind: {case}", run.count("broken", case).anomalies > 0,
              str(run.count("broken", case)))
        for case in run.cases("broken")
    ]  # fmt: skip
    checks += [
        Check("a batch that fits is applied whole", control.anomalies == 0, str(control)),
        Check(
            "the kernel's count is what stands in the map",
            bool((answers["said"] == answers["applied"]).all()) and len(answers) > 0,
            "; ".join(f"{a.case}: {a.said} of {a.sent}" for a in answers.itertuples()),
        ),
        Check("nothing is left once the count is taken back", fixed.anomalies == 0, str(fixed)),
    ]
    return Finding(
        run.experiment,
        f"A batch update that failed had been applied in part: {run.count('broken')} elements "
        f"stood in the map although the call returned an error. The count that the call hands "
        f"back was exact every time; a caller who takes those elements back is left with "
        f"{fixed.anomalies:,}.",
        tuple(checks),
    )
