"""Judges experiment 14: values that are read half old and half new."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Count, Run


@judges("torn-reads")
def torn_reads(run: Run) -> Finding:
    """Values longer than a word are torn in every kind of map, single words and cures never."""
    rounds = run.table("rounds")
    array = _at_cure_size(run, "array, read by a program")
    hashed = _at_cure_size(run, "hash, read by a program")
    checks = [
        Check(f"values are torn: {case}", count.anomalies > 0, str(count))
        for case in run.cases("broken")
        # A process alone may see no torn read of a hash: it is rare, and its reads are few.
        if (count := run.count("broken", case)) and case != "hash, read by a process"
    ]
    checks.append(
        Check(
            "an element that is used again is torn more seldom than one overwritten in place",
            hashed.rate < array.rate,
            f"{1e6 * hashed.rate:.0f} against {1e6 * array.rate:.0f} in a million",
        )
    )
    word = _sum(run, "control", ", 8 B")
    quiet = _sum(run, "control", ", nobody writes")
    checks.append(Check("a value of one word is never torn", word.anomalies == 0, str(word)))
    checks.append(Check("nothing is torn while nobody writes", quiet.anomalies == 0, str(quiet)))
    checks += [
        Check(f"whole every time: {case}", run.count("fixed", case).anomalies == 0,
              str(run.count("fixed", case)))
        for case in run.cases("fixed")
    ]  # fmt: skip
    torn = rounds[(rounds["variant"] == "broken") & (rounds["torn"] > 0)]
    smallest = torn.groupby("table")["size"].min()
    sizes = ", ".join(
        f"{name} from {smallest.get(table)} B"
        for table, name in {
            "in_array": "array",
            "in_hash": "hash",
            "in_percpu_array": "per-CPU array",
            "in_percpu_hash": "per-CPU hash",
        }.items()
    )
    checked = rounds[rounds["table"] == "checked_array"]
    fixed = _sum(run, "fixed", "")
    return Finding(
        run.experiment,
        f"Read while it was overwritten, a value was torn in every kind of map ({sizes}): by a "
        f"program {1e6 * array.rate:,.0f} in a million reads of {run.parameters['cure_size']} B in "
        f"an array and {1e6 * hashed.rate:,.0f} in a hash. Words, and reads with BPF_F_LOCK "
        f"on both sides, a checksum, a batch lookup of a hash or a map in map: {fixed} torn. "
        f"Versions at head and tail are no substitute for the checksum: they agreed in "
        f"{checked['equal_ends'].sum():,} of {checked['rejected'].sum():,} reads that it refused.",
        tuple(checks),
    )


def _at_cure_size(run: Run, case: str) -> Count:
    rounds = run.table("rounds")
    rows = rounds[(rounds["case"] == case) & (rounds["size"] == run.parameters["cure_size"])]
    return Count(int(rows["reads"].sum()), int(rows["torn"].sum()), float("nan"))


def _sum(run: Run, variant: str, ending: str) -> Count:
    """Add up the cases whose name ends so."""
    counts = [run.count(variant, case) for case in run.cases(variant) if case.endswith(ending)]
    return Count(
        sum(count.operations for count in counts),
        sum(count.anomalies for count in counts),
        float("nan"),
    )
