"""Judges experiment 22: values and keys of a wrong size, written by bcc."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("bcc-leaf-size")
def bcc_leaf_size(run: Run) -> Finding:
    """Every wrong size is stored wrongly without a word; refusing it keeps the map right."""
    value_bytes = int(str(run.parameters["value_bytes"]))
    sizes, keys = run.table("sizes"), run.table("keys")
    broken = sizes[sizes["variant"] == "broken"]
    fixed = sizes[sizes["variant"] == "fixed"]
    over = (broken["leaf_bytes"] - value_bytes).clip(lower=0) * broken["writes"]
    short = (value_bytes - broken["leaf_bytes"]).clip(lower=0) * broken["writes"]
    lost, foreign = int(broken["lost_bytes"].sum()), int(broken["foreign_bytes"].sum())
    wide = keys[keys["variant"] == "broken"].iloc[0]
    wide_count = run.count("broken", "too wide key, bcc")
    too_big = run.count("broken", "leaf too big")
    too_small = run.count("broken", "leaf too small")
    ill_sized = int(fixed.loc[fixed["leaf_bytes"] != value_bytes, "writes"].sum())
    refused = int(fixed["refused"].sum())
    fixed_keys = keys[keys["variant"] == "fixed"].iloc[0]
    control = run.count("control")
    checks = (
        Check(
            "bcc raises for no value of a wrong size",
            len(broken) > 0 and int(broken["refused"].sum()) == 0,
            f"{int(broken['refused'].sum()):,} refusals in {int(broken['writes'].sum()):,} writes",
        ),
        Check(
            "of a leaf that is too big exactly the bytes past the map's value size are lost",
            too_big.anomalies == too_big.operations > 0
            and bool((broken["lost_bytes"] == over).all()),
            f"{lost:,} B lost in {too_big.operations:,} writes",
        ),
        Check(
            "a leaf that is too small is filled up with exactly what lies behind it in memory",
            too_small.anomalies == too_small.operations > 0
            and bool((broken["foreign_bytes"] == short).all()),
            f"{foreign:,} foreign B in {too_small.operations:,} writes",
        ),
        Check(
            "a key that is too wide loses its upper part, and entries fall onto each other",
            0 < wide_count.anomalies == wide["wrong"] == wide["identifiers"] - wide["entries"],
            f"{wide['identifiers']:,} identifiers in {wide['entries']:,} entries, "
            f"{wide['wrong']:,} lookups return another's value",
        ),
        Check("values and keys of the exact size are stored", control.anomalies == 0, str(control)),
        Check(
            "the cures refuse every value of a wrong size and store every right one",
            run.count("fixed").anomalies == 0 < refused == ill_sized,
            f"{refused:,} of {ill_sized:,} refused, {run.count('fixed')} stored wrongly",
        ),
        Check(
            "labkit's Map refuses every identifier that does not fit the key",
            fixed_keys["refused"] + fixed_keys["entries"] == fixed_keys["identifiers"]
            and fixed_keys["wrong"] == 0 < fixed_keys["refused"],
            f"{fixed_keys['refused']:,} refused, {fixed_keys['entries']:,} stored",
        ),
    )
    exact = run.count("control", "exact leaf").cost_ns
    guarded = run.count("fixed", "bcc behind a check of sizeof, any leaf").cost_ns
    mapped = run.count("fixed", "labkit Map, any leaf").cost_ns
    return Finding(
        run.experiment,
        f"bcc stored every value of a wrong size without an error: {lost:,} bytes were cut off "
        f"in {too_big.operations:,} writes that were too big, and {foreign:,} bytes of "
        f"neighbouring memory went into the map in {too_small.operations:,} that were too small; "
        f"{wide['wrong']:,} of {wide['identifiers']:,} identifiers shared an entry because the "
        f"key was too narrow. A check of sizeof before bcc's call costs "
        f"{guarded - exact:+.0f} ns a write, labkit's Map {mapped - exact:+.0f} ns, both in "
        "Python.",
        checks,
    )
