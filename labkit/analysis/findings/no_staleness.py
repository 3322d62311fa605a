"""Judges experiment 1: update returns, then a program reads."""

from __future__ import annotations

from labkit.analysis import history
from labkit.analysis.checkers import stale, unwritten
from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("no-staleness")
def no_staleness(run: Run) -> Finding:
    """No read after an update is stale, and the checker finds those of a kept copy."""
    broken, fixed = run.count("broken"), run.count("fixed")
    saved = run.table("history")
    whole = history.from_frame(saved)
    late = saved[stale(whole)].groupby("variant").size()
    copied = saved[(saved["variant"] == "broken") & (saved["op"] == history.Op.READ)]
    # The first read of each case makes the copy; all later ones miss an update.
    to_find = len(copied) - copied["case"].nunique()
    packets = run.table("packets").set_index("variant")
    cases = run.cases("control")
    sent, as_meant = int(packets["sent"]["control"]), int(packets["as_meant"]["control"])
    should, delivered = packets["should_pass"]["control"], packets["delivered"]["control"]
    wrong = int(packets["sent"]["broken"] - packets["as_meant"]["broken"])
    each = ", ".join(f"{run.count('control', case)} ({case})" for case in cases)
    return Finding(
        run.experiment,
        f"Of the reads that began after an update had returned, these were stale: {each}. "
        f"Of {sent:,} packets {delivered:,} were delivered, {should:,} should have been. The same "
        f"checker found {broken} stale reads where the program kept a copy (there {wrong:,} "
        f"packets were treated wrongly), and {fixed} once the copy was renewed by generation.",
        (
            *(Check(f"never stale: {case}", count.anomalies == 0 < count.operations, str(count))
              for case in cases for count in [run.count("control", case)]),
            Check("every packet is treated by the policy of its moment",
                  as_meant == sent > 0 and delivered == should,
                  f"{as_meant:,} of {sent:,}, {delivered:,} delivered of {should:,}"),
            *(Check(f"the checker finds staleness where it is: {case}",
                    count.anomalies == count.operations - 1 > 0, str(count))
              for case in run.cases("broken") for count in [run.count("broken", case)]),
            Check("a kept copy lets packets through or drops them wrongly", wrong > 0,
                  f"{wrong:,} of {sent:,}"),
            *(Check(f"cured: {case}", count.anomalies == 0 < count.operations, str(count))
              for case in run.cases("fixed") for count in [run.count("fixed", case)]),
            Check("the saved sample shows the same, and no version from nowhere",
                  late.to_dict() == {"broken": to_find} and not unwritten(whole).any(),
                  f"{int(late.sum())} stale reads in {len(copied)} of kept copies"),
        ),
    )  # fmt: skip
