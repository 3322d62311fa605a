"""Judges experiment 54: the answers that a full map gives."""

from __future__ import annotations

import errno

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("ignored-answers")
def ignored_answers(run: Run) -> Finding:
    """Every key that is missing was refused with an answer."""
    ignored = {case: run.count("broken", case) for case in run.cases("broken")}
    heeded = {case: run.count("fixed", case) for case in run.cases("fixed")}
    fits = {case: run.count("control", case) for case in run.cases("control")}
    answers = run.table("answers")
    refused = answers[answers["answer"] != 0]
    missing = sum(one.anomalies for one in ignored.values())
    stored = sum(one.operations for one in ignored.values())
    return Finding(
        run.experiment,
        f"Of {stored:,} keys that were stored without a look at the answer, {missing:,} were not "
        f"in the map; each had been answered "
        f"{', '.join(errno.errorcode[-one] for one in sorted(set(refused['answer'])))}. Who heeded "
        f"the answers was wrong about {sum(one.anomalies for one in heeded.values()):,}.",
        (
            Check(
                "who ignores answers believes in keys that are not there",
                len(ignored) == 2 and all(one.anomalies > 0 for one in ignored.values()),
                "; ".join(f"{case}: {one}" for case, one in ignored.items()),
            ),
            Check(
                "each of them was answered E2BIG, to user space and to the program",
                set(refused["answer"]) == {-errno.E2BIG} and int(refused["times"].sum()) == missing,
                f"{int(refused['times'].sum()):,} answers for {missing:,} keys",
            ),
            Check(
                "who heeds them knows what is there",
                len(heeded) == 2
                and all(one.anomalies == 0 < one.operations for one in heeded.values()),
                "; ".join(f"{case}: {one}" for case, one in heeded.items()),
            ),
            Check(
                "where all fit, none is missing",
                len(fits) == 2
                and all(one.anomalies == 0 < one.operations for one in fits.values()),
                "; ".join(f"{case}: {one}" for case, one in fits.items()),
            ),
        ),
    )
