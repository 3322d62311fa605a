"""Judges experiment 46: the security hook on bpf(2) as a watch."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_REFUSED, _BY_PROGRAM = "refused update; lsm/bpf", "program's update; lsm/bpf"


@judges("lsm-watch")
def lsm_watch(run: Run) -> Finding:
    """It sees every process's call with its value, refused ones too, and no program's write."""
    refused, unseen = run.count("broken", _REFUSED), run.count("broken", _BY_PROGRAM)
    control, fixed = run.count("control"), run.count("fixed")
    told = run.table("told")
    right = told[told["watcher"] == "lsm/bpf"]["values_right"]
    return Finding(
        run.experiment,
        f"The LSM program on bpf(2) missed {control} writes of processes, and saw each value "
        f"before the map did; it also told of {refused} updates that the kernel then refused, and "
        f"missed {unseen} by a program. fexit on the type's functions was wrong in {fixed}.",
        (
            Check("it sees every write of every process",
                  control.anomalies == 0 < control.operations, f"{control} unseen"),
            Check("with the value that is to be written", bool(right.all()),
                  f"in {right.sum()} of {len(right)} ways"),
            Check("it tells of updates that the kernel refuses",
                  refused.anomalies == refused.operations > 0, f"{refused} told of"),
            Check("it sees no write of a program",
                  unseen.anomalies == unseen.operations > 0, f"{unseen} unseen"),
            Check("fexit sees both as they are", fixed.anomalies == 0 < fixed.operations,
                  f"{fixed} wrong"),
        ),
    )  # fmt: skip
