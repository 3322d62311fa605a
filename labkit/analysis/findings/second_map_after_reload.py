"""Judges experiment 2: a reload makes a second map, the attached program reads the first."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("second-map-after-reload")
def second_map_after_reload(run: Run) -> Finding:
    """Every refusal is ignored after a reload, none with the pin; ids tell which is which."""
    broken, control, fixed = (run.count(variant) for variant in ("broken", "control", "fixed"))
    rounds = run.table("rounds")
    reloaded = rounds[rounds["variant"] == "broken"]
    others = rounds[rounds["variant"] != "broken"]
    forbidden = int((reloaded["sent"] - reloaded["should_be_in"]).sum())
    shown = int((reloaded["shown"] == reloaded["meant"]).sum())
    obeyed = int((reloaded["obeyed"] == reloaded["meant"]).sum())
    twins = int(reloaded["same_name"].sum())
    told = int((reloaded["written_id"] != reloaded["obeyed_id"]).sum())
    equal = int((others["written_id"] == others["obeyed_id"]).sum())
    return Finding(
        run.experiment,
        f"After a reload that made its map anew, the attached program let in all {forbidden:,} "
        f"datagrams that the newest policy forbade, while the written map showed the new value "
        f"in {shown} of {len(reloaded)} rounds and the program's own in {obeyed}. Without a "
        f"reload {control}, with the pinned map used again {fixed} were treated against the "
        f"policy. The ids told the two maps apart in {told} of {len(reloaded)} rounds; their "
        f"names were the same in {twins}.",
        (
            Check("the program that stayed attached obeys no change",
                  broken.anomalies == forbidden > 0, f"{broken.anomalies:,} of {forbidden:,}"),
            Check("the written map shows the new value, the program's own the old one",
                  shown == len(reloaded) > 0 and obeyed == 0,
                  f"{shown} and {obeyed} of {len(reloaded)}"),
            Check("map ids show it, names do not", told == twins == len(reloaded),
                  f"{told} and {twins} of {len(reloaded)}"),
            Check("without a reload every change is obeyed",
                  control.anomalies == 0 < control.operations, str(control)),
            Check("cured by using the pinned map again",
                  fixed.anomalies == 0 < fixed.operations, str(fixed)),
            Check("written and obeyed map are the same one where it works",
                  equal == len(others) > 0, f"{equal} of {len(others)}"),
        ),
    )  # fmt: skip
