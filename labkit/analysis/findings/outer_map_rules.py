"""Judges experiment 53: who may switch an inner map, and to which."""

from __future__ import annotations

import errno

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("outer-map-rules")
def outer_map_rules(run: Run) -> Finding:
    """User space alone switches, and only to a map that fits the template."""
    by_program = run.count("broken", "a program updates the outer map")
    other = run.count("broken", "user space offers an inner map of another shape")
    control = run.count("control")
    fits = run.count("fixed", "user space offers an inner map that fits")
    offers = run.table("offers")
    refused = offers[~offers["takes"]]
    said = str(run.table("programs").set_index("program").loc["replace", "answer"])
    return Finding(
        run.experiment,
        f"The kernel refused {by_program} programs that update an outer map. User space could "
        f"switch: {fits} offers of a map that fits were refused, and {other} of one that "
        "does not.",
        (
            Check(
                "a program cannot update an outer map",
                by_program.anomalies == by_program.operations > 0,
                f"{by_program}: {said}",
            ),
            Check(
                "the same call on a map of values is loaded",
                control.operations > 0 and control.anomalies == 0,
                f"{control} refused",
            ),
            Check(
                "an inner map of another shape is refused with EINVAL",
                other.anomalies == other.operations > 0
                and set(refused["answer"]) == {-errno.EINVAL},
                f"{other}: {', '.join(refused['case'])}",
            ),
            Check(
                "one that fits is in force at once",
                fits.operations > 0 and fits.anomalies == 0,
                f"refused {fits}: {', '.join(offers.loc[offers['takes'], 'case'])}",
            ),
        ),
    )
