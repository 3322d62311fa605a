"""Judges experiment 59: a diagnosis names what was planted, and makes nothing up."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("planted-causes")
def planted_causes(run: Run) -> Finding:
    """Every planted cause is named, alone; before it and after its repair there is none."""
    diagnoses = run.table("diagnoses")
    planted = diagnoses[diagnoses["variant"] == "broken"]
    broken, control, fixed = (run.count(one) for one in ("broken", "control", "fixed"))
    right = planted["named"] == planted["cause"]
    checks = [
        Check("a cause is named wherever one is planted",
              broken.anomalies == broken.operations > 0, str(broken)),
    ]  # fmt: skip
    checks += [
        Check(
            f"named, and nothing else: {cause}",
            bool(right[planted["cause"] == cause].all()),
            f"{int(right[planted['cause'] == cause].sum()):,} of {len(group):,}",
        )
        for cause, group in planted.groupby("cause", sort=False)
    ]
    checks += [
        Check("no cause is named before one is planted", control.anomalies == 0, str(control)),
        Check("none is named after the repair", fixed.anomalies == 0, str(fixed)),
    ]
    return Finding(
        run.experiment,
        f"Of {len(planted):,} maps with a planted cause the diagnosis named that very one in "
        f"{int(right.sum()):,}; of those before it and after its repair it named a cause in "
        f"{control} and {fixed}. A diagnosis took {diagnoses['ns'].median() / 1e6:.0f} ms.",
        tuple(checks),
    )
