"""Judges experiment 16: a reader sees half of a change of many keys."""

from __future__ import annotations

from labkit.analysis import checkers, history
from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import VARIANTS, Run

_WAITS = 5  # an outer update waits for a grace period: it takes at least so many plain updates


@judges("mixed-generations")
def mixed_generations(run: Run) -> Finding:
    """Updates of many keys are seen half done, map in map never; the switch costs a wait."""
    checks = [
        Check(
            {
                "broken": f"half of a change is seen: {case}",
                "control": f"one generation: {case}",
                "fixed": f"every reading sees one generation: {case}",
            }[variant],
            (run.count(variant, case).anomalies > 0) == (variant == "broken"),
            str(run.count(variant, case)),
        )
        for variant in VARIANTS
        for case in run.cases(variant)
    ]
    # The readings that were kept whole, judged by the checker instead of by the program.
    kept = checkers.mixed_generations(history.from_frame(run.table("history")))
    variant = kept["actor"].map(run.counts["variant"])
    broken, clean = kept["mixed"][variant == "broken"], kept["mixed"][variant != "broken"]
    checks.append(
        Check(
            "the checker finds the same in the readings that were kept whole",
            bool(broken.any() and len(clean) and not clean.any()),
            f"{broken.sum():,} of {len(broken):,} mixed where keys change one by one or a spare "
            f"is used again, {clean.sum():,} of {len(clean):,} elsewhere",
        )
    )
    costs = run.table("costs").groupby(["change", "load"])["ns"].median()
    plain, flip, switch = (
        costs[change, "idle"]
        for change in ("plain update of one key", "index flip", "outer map update")
    )
    checks.append(
        Check(
            "an update of the outer map waits for a grace period, a plain update does not",
            bool(switch > _WAITS * plain),
            f"{switch / plain:,.0f} times a plain update",
        )
    )
    beside = costs["outer map update", "a program reads"]
    return Finding(
        run.experiment,
        f"While all {run.parameters['keys']} keys got new generations, programs saw several at "
        f"once in {run.count('broken', 'keys one by one')} readings, with batch updates in "
        f"{run.count('broken', 'one batch update')}, with an index flip whose spare half was used "
        f"again at once in "
        f"{run.count('broken', 'index flip, the spare half used again at once')}. With map in map: "
        f"{run.count('fixed')}. The switch took {switch / 1e6:.1f} ms idle and "
        f"{beside / 1e6:.1f} ms beside a program that reads; the flip took {flip / 1e3:.1f} us.",
        tuple(checks),
    )
