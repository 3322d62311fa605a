"""Judges experiment 8: a policy in read-only data, folded by the verifier."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("rodata-folded")
def rodata_folded(run: Run) -> Finding:
    """The write is refused and the branch is gone; data and maps can be changed."""
    broken, control = run.count("broken"), run.count("control")
    rounds = run.table("rounds")
    late = rounds[rounds["variant"] == "broken"]
    others = rounds[rounds["variant"] != "broken"]
    changed = rounds[rounds["variant"] == "fixed"]
    refused = int((late["answer"] == "EPERM").sum())
    shown = int((late["value"] == late["meant"]).sum())
    gone = int((late["denying"] == 0).sum())
    kept = int((others["denying"] > 0).sum())
    accepted = int((changed["answer"] == "0").sum())
    shorter = int(changed["instructions"].min() - late["instructions"].max())
    return Finding(
        run.experiment,
        f"A write to .rodata of a loaded program was refused with EPERM {refused} of {len(late)} "
        f"times, and {broken} runs went on to allow: the verifier had removed the denying "
        f"branch from {gone} of {len(late)} programs. Set before the load, {control} runs allowed; "
        f"in .data or a map a write was obeyed at once ({run.count('fixed')} runs allowed).",
        (
            Check("a write to .rodata after load is refused", refused == len(late) > 0,
                  f"EPERM {refused} of {len(late)}"),
            Check("so no tool can show a new value there", shown == 0,
                  f"{shown} of {len(late)} show it"),
            Check("every run obeys the value that was loaded",
                  broken.anomalies == broken.operations > 0, str(broken)),
            Check("the verifier removed the branch that denies, there alone",
                  gone == len(late) and kept == len(others) > 0 and shorter > 0,
                  f"gone in {gone} of {len(late)}, kept in {kept} of {len(others)}"),
            Check("a value set before the load is obeyed",
                  control.anomalies == 0 < control.operations, str(control)),
            Check("the kernel accepts every write to .data and to a map",
                  accepted == len(changed) > 0, f"{accepted} of {len(changed)}"),
            *(Check(f"cured by: {case}", count.anomalies == 0 < count.operations, str(count))
              for case in run.cases("fixed") for count in [run.count("fixed", case)]),
        ),
    )  # fmt: skip
