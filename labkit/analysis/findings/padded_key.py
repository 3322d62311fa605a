"""Judges experiment 4: a key whose padding bytes hold what stood in memory."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("padded-key")
def padded_key(run: Run) -> Finding:
    """The writer finds every key, the program none, and a second write makes a double."""
    broken, control, fixed = (run.count(variant) for variant in ("broken", "control", "fixed"))
    rounds = run.table("rounds")
    padded = rounds[rounds["variant"] == "broken"]
    written, by_user = int(padded["written"].sum()), int(padded["found_by_user"].sum())
    doubles = int((padded["entries_after_repair"] - padded["fields_after_repair"]).sum())
    after = int(padded["found_after_repair"].sum())
    return Finding(
        run.experiment,
        f"With left-over bytes in the padding the writer found {by_user:,} of its {written:,} "
        f"keys, the program missed {broken}; without padding it missed {control}, with padding "
        f"cleared {fixed}. A second, clean write brought the program all of them and left "
        f"{doubles:,} doubles behind.",
        (
            Check("the writer finds what it wrote", by_user == written > 0,
                  f"{by_user:,} of {written:,}"),
            Check("the program misses every one of these keys",
                  broken.anomalies == broken.operations > 0, str(broken)),
            Check("no key is missed where the layout has no padding",
                  control.anomalies == 0 < control.operations, str(control)),
            Check("cured by clearing the padding", fixed.anomalies == 0 < fixed.operations,
                  str(fixed)),
            Check("a clean write beside it is found, and makes a second entry of the same key",
                  after == written == doubles, f"{after:,} found, {doubles:,} doubles"),
        ),
    )  # fmt: skip
