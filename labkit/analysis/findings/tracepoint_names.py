"""Judges experiment 37: the name of the tracepoint of a retransmission."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("tracepoint-names")
def tracepoint_names(run: Run) -> Finding:
    """One name sees every retransmission, the other does not exist."""
    article, control, fixed = run.count("broken"), run.count("control"), run.count("fixed")
    (wrong,), (right, *_) = run.cases("broken"), run.cases("fixed")
    names = run.table("names").set_index("event")
    similar = list(run.table("similar")["event"])
    right = right.partition(",")[0]
    return Finding(
        run.experiment,
        f"There is no {wrong}: attaching to it was refused. By {right}, {fixed} connections that "
        f"nobody answered were not seen retransmitted, and {control} that were answered were "
        f"seen so. This kernel has {', '.join(similar)}.",
        (
            Check(
                "the article's name does not exist",
                article.anomalies == article.operations > 0 and not names.loc[wrong, "exists"],
                str(names.loc[wrong, "answer"]) or "it was attached",
            ),
            Check(
                "the right one does",
                bool(names.loc[right, "exists"]) and right in similar,
                ", ".join(similar),
            ),
            Check(
                "it sees every connection that is retransmitted",
                fixed.operations > 0 and fixed.anomalies == 0,
                f"{fixed} not seen",
            ),
            Check(
                "and none that is not",
                control.operations > 0 and control.anomalies == 0,
                f"{control} seen",
            ),
        ),
    )
