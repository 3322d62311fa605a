"""Judges experiment 15: a held pointer shows another key's value."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Count, Run

_AGAIN = "hash, looked up again after use"


@judges("recycled-element")
def recycled_element(run: Run) -> Finding:
    """Held elements are used again, locked ones too; owner checks and arrays are safe."""
    rounds = run.table("rounds")
    longest = rounds["hold"].max()
    unchecked = rounds[(rounds["case"] == "hash") & (rounds["hold"] == longest)]
    plain = Count(
        int((unchecked["reads"] - unchecked["absent"]).sum()),
        int(unchecked["foreign"].sum()),
        float("nan"),
    )
    again = run.count("broken", _AGAIN)
    caught = int(rounds.loc[rounds["case"] == _AGAIN, "caught"].sum())
    checks = [
        Check(
            f"another key's value is used: {case}",
            run.count("broken", case).anomalies > 0,
            str(run.count("broken", case)),
        )
        for case in run.cases("broken")
        # How much looking again misses depends on when the key comes back, perhaps nothing.
        if case != _AGAIN
    ]
    checks.append(
        Check(
            "looking the key up again afterwards catches some of them",
            caught > 0,
            f"{caught:,} caught, {again.anomalies:,} not",
        )
    )
    checks += [
        Check(
            f"an element whose key stays keeps its value: {case}",
            run.count("control", case).anomalies == 0,
            str(run.count("control", case)),
        )
        for case in run.cases("control")
    ]
    checks += [
        Check(
            f"no other key's value is used: {case}",
            run.count("fixed", case).anomalies == 0,
            str(run.count("fixed", case)),
        )
        for case in run.cases("fixed")
    ]
    guarded = rounds[(rounds["variant"] == "fixed") & rounds["case"].str.startswith("hash")]
    refused = int(guarded["rejected"].sum())
    checks.append(Check("the owner checks had something to refuse", refused > 0, f"{refused:,}"))
    locked = run.count("broken", "hash, used under its bpf_spin_lock")
    no_prealloc = run.count("broken", "hash, NO_PREALLOC")
    safe = run.count("fixed")
    return Finding(
        run.experiment,
        f"A program that held a looked-up pointer for {unchecked['hold_ns'].median():.0f} ns, "
        f"while the key was deleted and others inserted, used another key's value in {plain} "
        f"reads; NO_PREALLOC does not help ({no_prealloc} over all holds), nor does a lock in the "
        f"value ({locked}), and looking the key up again caught {caught:,} and missed "
        f"{again.anomalies:,}. With the key in one word with the content, under one checksum with "
        f"it, or in an array: {safe}.",
        tuple(checks),
    )
