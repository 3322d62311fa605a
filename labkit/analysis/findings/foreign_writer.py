"""Judges experiment 45: watching a process that knows nothing of its follower."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("foreign-writer")
def foreign_writer(run: Run) -> Finding:
    """The hook sees every version, a poll does not; other maps stay out of it."""
    fixed, control = run.count("fixed"), run.count("control")
    checks = [
        Check(f"versions pass unseen: {case}", count.anomalies > 0, str(count))
        for case in run.cases("broken")
        for count in [run.count("broken", case)]
    ]
    checks += [
        Check("the hook sees every version", fixed.anomalies == 0 < fixed.operations, str(fixed)),
        Check("and nothing of another map", control.anomalies == 0 < control.operations,
              str(control)),
    ]  # fmt: skip
    polls = "; ".join(
        f"{case}: {count}, {count.cost_ns / 1e6:.2g} ms"
        for case in run.cases("broken")
        for count in [run.count("broken", case)]
    )
    return Finding(
        run.experiment,
        f"Of what another process wrote by plain libbpf calls, the hook missed {fixed}, with a "
        f"median delay of {fixed.cost_ns / 1e6:.2g} ms; polls missed more ({polls}).",
        tuple(checks),
    )
