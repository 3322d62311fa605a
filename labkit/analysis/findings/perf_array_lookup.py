"""Judges experiment 33: the events of a perf event array, looked up and read."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_ENOTSUPP = 524  # the kernel's own; the C library has no name for it


@judges("perf-array-lookup")
def perf_array_lookup(run: Run) -> Finding:
    """No lookup is answered; the buffers deliver every event."""
    looked, array = run.count("broken"), run.count("control")
    perf, ring = run.count("fixed", "perf buffer"), run.count("fixed", "ring buffer in its place")
    answers = run.table("answers")
    given = set(answers.loc[answers["map"] == "perf", "answer"])
    return Finding(
        run.experiment,
        f"The kernel refused {looked} lookups of a perf event array, with errno "
        f"{', '.join(str(-answer) for answer in sorted(given))}, while it held "
        f"{perf.operations:,} events in the rings behind it. The perf buffer missed {perf} of "
        f"them, a ring buffer in its place {ring}.",
        (
            Check(
                "every lookup of a perf event array is refused with ENOTSUPP, 524",
                looked.anomalies == looked.operations > 0 and given == {-_ENOTSUPP},
                f"{looked} refused",
            ),
            Check(
                "the same call on an array is answered",
                array.operations > 0 and array.anomalies == 0,
                f"{array} refused",
            ),
            Check(
                "a perf buffer delivers every event",
                perf.operations > 0 and perf.anomalies == 0,
                f"{perf} missing",
            ),
            Check(
                "so does a ring buffer in its place",
                ring.operations > 0 and ring.anomalies == 0,
                f"{ring} missing",
            ),
        ),
    )
