"""Judges experiment 23: buffers that are shorter than the value."""

from __future__ import annotations

import errno

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("short-read-buffer")
def short_read_buffer(run: Run) -> Finding:
    """The kernel copies the whole value whatever the buffer, and reports no error."""
    buffers, ends = run.table("buffers"), run.table("ends")
    short = buffers[buffers["variant"] == "broken"]
    missing = (short["value_bytes"] - short["buffer_bytes"]) * short["calls"]
    overrun = {
        direction: int(short.loc[short["direction"] == direction, "overrun_bytes"].sum())
        for direction in ("read", "write")
    }
    errors = int(short["errors"].sum())
    broken, control, fixed = run.count("broken"), run.count("control"), run.count("fixed")
    by_map = buffers[buffers["case"] == "labkit Map"]
    ill_sized = by_map["buffer_bytes"] != by_map["value_bytes"]
    refused = int(by_map["refused"].sum())
    closed = ends[ends["place"] == "before a page that may not be touched"]
    heap = ends[ends["place"] == "on the heap"]
    closed_short = closed[closed["buffer_bytes"] < closed["value_bytes"]]
    closed_exact = closed[closed["buffer_bytes"] == closed["value_bytes"]]
    heap_short = heap[heap["buffer_bytes"] < heap["value_bytes"]]
    heap_exact = heap[heap["buffer_bytes"] == heap["value_bytes"]]
    died = int((heap_short["exit_status"] < 0).sum())
    checks = (
        Check(
            "the kernel reports no error for a short buffer",
            len(short) > 0 and errors == 0,
            f"{errors:,} errors in {int(short['calls'].sum()):,} calls",
        ),
        Check(
            "every call with a short buffer runs over by exactly the missing bytes",
            broken.anomalies == broken.operations > 0
            and bool((short["overrun_bytes"] == missing).all()),
            f"{overrun['read']:,} B overwritten behind {run.count('broken', 'read, plain call')} "
            f"lookups, {overrun['write']:,} foreign B stored by "
            f"{run.count('broken', 'write, plain call')} updates",
        ),
        Check(
            "a buffer of the value's size or more is never overrun",
            control.anomalies == 0,
            str(control),
        ),
        Check("neither cure overruns a buffer", fixed.anomalies == 0, str(fixed)),
        Check(
            "labkit's Map refuses every buffer of another size, before any call",
            0 < refused == int(by_map.loc[ill_sized, "calls"].sum()),
            f"{refused:,} of {int(by_map.loc[ill_sized, 'calls'].sum()):,}",
        ),
        Check(
            "only where memory ends does the kernel answer EFAULT, with the buffer filled already",
            len(closed_short) > 0
            and bool((closed_short["answer"] == -errno.EFAULT).all())
            and bool((closed_short["written_bytes"] > 0).all())
            and bool((closed_exact["answer"] == 0).all()),
            f"answers {sorted(set(closed_short['answer'].tolist()))}, "
            f"{int(closed_short['written_bytes'].sum()):,} B written all the same; "
            f"full-sized buffers {sorted(set(closed_exact['answer'].tolist()))}",
        ),
        Check(
            "on the heap the lookup succeeds, and the process dies when it frees the neighbour",
            len(heap_short) > 0
            and bool((heap_short["answer"] == 0).all())
            and died == len(heap_short)
            and bool((heap_exact["exit_status"] == 0).all()),
            f"{died} of {len(heap_short)} died of a signal, "
            f"{int((heap_exact['exit_status'] != 0).sum())} of {len(heap_exact)} with a buffer "
            "of the right size",
        ),
    )
    plain = run.count("control", "read, plain call").cost_ns
    bounced = run.count("fixed", "read, bounce buffer").cost_ns
    mapped = run.count("fixed", "read, labkit Map").cost_ns
    return Finding(
        run.experiment,
        f"Every lookup into a short buffer succeeded and overwrote what lay behind it "
        f"({overrun['read']:,} bytes in {run.count('broken', 'read, plain call').operations:,} "
        f"calls), and every update from one stored its neighbours ({overrun['write']:,} bytes). "
        f"On the heap, {died} of {len(heap_short)} processes died later, in free(). Buffers of "
        f"the value's size: {control}. A bounce buffer costs {bounced - plain:+.0f} ns a lookup, "
        f"labkit's prepared reader {mapped - plain:+.0f} ns, both in Python.",
        checks,
    )
