"""Judges experiment 25: readers of per-CPU values."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("per-cpu-stride")
def per_cpu_stride(run: Run) -> Finding:
    """A lookup writes the rounded size for every possible CPU, whatever the buffer."""
    readers = run.table("readers")
    cpus = int(readers["cpus"].iloc[0])
    law = (readers["value_bytes"] + 7) // 8 * 8 * cpus
    one = readers[readers["case"] == "buffer for one value"]
    packed = readers[
        (readers["case"] == "buffer for an array of values") & (readers["variant"] == "broken")
    ]
    fixed = readers[readers["variant"] == "fixed"]
    one_count = run.count("broken", "buffer for one value")
    packed_count = run.count("broken", "buffer for an array of values")
    control, cured = run.count("control"), run.count("fixed")
    words = one[one["value_bytes"] == 8]
    smashed = int((words["overrun_bytes"] / 8).sum() / max(1, int(words["lookups"].sum())))
    mistaken = int(packed["wrong_cpus"].sum())
    checks = [
        Check(
            f"a lookup writes round_up(value size, 8) bytes for each of {cpus} possible CPUs",
            bool((readers["written_bytes"] == law).all()) and int(readers["errors"].sum()) == 0,
            ", ".join(
                f"{size} B: {written} B"
                for size, written in one.groupby("value_bytes")["written_bytes"].max().items()
            ),
        ),
        Check(
            "an array of values is right where the size divides by eight",
            control.anomalies == 0,
            str(control),
        ),
        Check(
            "labkit's Map gives every CPU its own value and writes past nothing",
            cured.anomalies == 0 and int(fixed["overrun_bytes"].sum()) == 0,
            str(cured),
        ),
        Check(
            "an array of values overruns, or mistakes a CPU, where the size does not",
            packed_count.anomalies == packed_count.operations > 0,
            f"{packed_count} lookups, {mistaken:,} values of a CPU wrong",
        ),
    ]
    if cpus > 1:
        checks.append(
            Check(
                "a buffer for one value is overrun at every lookup",
                one_count.anomalies == one_count.operations > 0
                and bool((one["overrun_bytes"] > 0).all()),
                f"{one_count}, {int(one['overrun_bytes'].sum()):,} B past the buffer",
            )
        )
    return Finding(
        run.experiment,
        f"With {cpus} possible CPUs a lookup of an 8-byte per-CPU value into one u64 overwrote "
        f"{smashed} word{'' if smashed == 1 else 's'} behind it each time; buffers for one "
        f"value were overrun in {one_count} lookups. An array of values whose size does not "
        f"divide by eight went wrong in {packed_count} lookups ({mistaken:,} times a CPU got "
        f"another's bytes), and {control} where it does. Sized and decoded by labkit's Map: "
        f"{cured}.",
        tuple(checks),
    )
