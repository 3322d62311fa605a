"""Judges experiment 7: a per-CPU value is written here and read there."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_ELSEWHERE = "per-CPU array, read on another CPU"
_SAME = "per-CPU array, read on the same CPU"
_SHARED = "array, read on another CPU"
_NEWEST = "per-CPU array, newest of all slots"
_VECTOR = "user space writes the whole vector back"
_READS = "user space only reads"
_OWN = "user space adds by a program, in the slot of its CPU"


@judges("per-cpu-slot")
def per_cpu_slot(run: Run) -> Finding:
    """Another CPU never sees the write, and a vector written back loses counts."""
    elsewhere, vector = run.count("broken", _ELSEWHERE), run.count("broken", _VECTOR)
    same, shared = run.count("control", _SAME), run.count("control", _SHARED)
    reads, newest, own = (
        run.count("control", _READS), run.count("fixed", _NEWEST), run.count("fixed", _OWN)
    )  # fmt: skip
    slots = run.table("slots")
    vector_rows = slots[slots["case"] == _VECTOR]
    erased = vector_rows[vector_rows["found"] < vector_rows["counted"]]
    rounds = slots["round"].nunique()
    additions = int(vector_rows[vector_rows["counted_by"] == "user space"]["counted"].sum())
    return Finding(
        run.experiment,
        f"A program on another CPU read an older version than the one written in {elsewhere} "
        f"reads of a per-CPU array; on the writer's CPU in {same}, from an ordinary array in "
        f"{shared}, and from the newest of all slots in {newest}. User space that added its own "
        f"count and wrote the vector back erased {vector} counts, "
        f"{vector.anomalies / additions:.1f} for each of its additions; adding by a program "
        f"in its own slot lost {own}, for {own.cost_ns / 1e3:.1f} µs instead of "
        f"{vector.cost_ns / 1e3:.1f} µs an addition.",
        (
            Check("another CPU never reads what this CPU wrote",
                  elsewhere.anomalies == elsewhere.operations > 0, str(elsewhere)),
            Check("the writer's CPU always does", same.anomalies == 0 < same.operations, str(same)),
            Check("so does every CPU in an ordinary array",
                  shared.anomalies == 0 < shared.operations, str(shared)),
            Check("cured by reading all slots", newest.anomalies == 0 < newest.operations,
                  str(newest)),
            Check("writing the vector back erases what programs counted",
                  vector.anomalies > 0, f"{vector} in {len(erased)} of {rounds} rounds"),
            Check("nothing is lost while user space only reads",
                  reads.anomalies == 0 < reads.operations, str(reads)),
            Check("cured by adding in the slot of its own CPU",
                  own.anomalies == 0 < own.operations, str(own)),
        ),
    )  # fmt: skip
