"""Judges experiment 19: who was first to insert a key."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("first-writer")
def first_writer(run: Run) -> Finding:
    """Look-then-update has several winners, NOEXIST exactly one."""
    broken, control, fixed = (run.count(v) for v in ("broken", "control", "fixed"))
    return Finding(
        run.experiment,
        f"With a lookup before the update, {broken} keys had more than one writer who believed "
        f"to be the first; with BPF_NOEXIST, {fixed}.",
        (
            Check("look-then-update has several winners", broken.anomalies > 0, str(broken)),
            Check("a single writer always wins", control.anomalies == 0, str(control)),
            Check("BPF_NOEXIST has exactly one winner", fixed.anomalies == 0, str(fixed)),
        ),
    )
