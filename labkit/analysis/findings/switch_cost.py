"""Judges experiment 47: when old memory may be filled again, and what a switch costs."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import VARIANTS, Run

_WAITS = 5  # what waits for a grace period takes at least so many flips that do not
_ORDINARY = "a new map for each generation, ordinary program"
_COMPARES = "old half filled at once, sleepable program that compares"


@judges("switch-cost")
def switch_cost(run: Run) -> Finding:
    """Only what nobody can still read is filled again, by a new map, a wait or a second look."""
    checks = [
        Check(
            f"{'mixed' if variant == 'broken' else 'whole generations'}: {case}",
            count.operations > 0 and (count.anomalies > 0) == (variant == "broken"),
            str(count),
        )
        for variant in VARIANTS
        for case in run.cases(variant)
        for count in [run.count(variant, case)]
    ]
    sweeps = run.table("sweeps").set_index("case")
    fewest = int(sweeps["generations"].drop(_COMPARES).min())
    checks.append(
        Check("every reader saw the table change", fewest > 0, f"{fewest} changes at the least")
    )
    moved = int(sweeps["moved"][_COMPARES])
    checks.append(
        Check(
            "the program that compares threw readings away", moved > 0,
            f"{moved:,}, and kept {run.count('fixed', _COMPARES).operations:,}",
        )
    )  # fmt: skip
    costs = run.table("costs")
    smallest, largest = int(costs["keys"].min()), int(costs["keys"].max())
    median = costs.groupby(["change", "keys", "load"])["ns"].median() / 1e6
    idle, busy = "idle", "both CPUs busy"
    flip = median["index flip", smallest, idle]
    for change in ("index flip that waits", "old map filled again, switch", "new map, switch"):
        waits = median[change, smallest, idle]
        checks.append(
            Check(f"it waits for a grace period: {change}", bool(waits > _WAITS * flip),
                  f"{waits / flip:,.0f} times an index flip of {smallest:,} keys")
        )  # fmt: skip
    new, old = (
        median[change, largest, idle]
        for change in ("new map, switch", "old map filled again, switch")
    )
    beside = run.count("fixed", _ORDINARY).cost_ns / 1e6
    return Finding(
        run.experiment,
        f"Old memory filled again while it was read: mixed in {run.count('broken')} readings; with "
        f"a new map, a wait for ordinary programs, or a second look by sleepable ones: "
        f"{run.count('fixed')}. A switch of {smallest:,} keys took "
        f"{median['new map, switch', smallest, idle]:.1f} ms idle, "
        f"{median['new map, switch', smallest, busy]:.1f} ms with both CPUs busy, an index flip "
        f"{flip:.2f} ms; of {largest:,} keys {new:.1f} ms with a new map and {old:.1f} ms with "
        f"the old one. Beside an ordinary program that reads slowly a switch took {beside:.0f} ms: "
        "it waits for the end of the reading.",
        tuple(checks),
    )
