"""Judges experiment 20: reading a Go map while nobody, or one goroutine, writes."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("go-map")
def go_map(run: Run) -> Finding:
    """Readers never die, one writer kills the process, and recover does not help."""
    broken, control, fixed = (run.count(v) for v in ("broken", "control", "fixed"))
    processes = run.table("processes")
    died = processes[processes["fatal"]]
    plain = run.count("broken", "bare map, one writer")
    return Finding(
        run.experiment,
        f"Readers alone: {control} processes ended. With one writer the runtime ended {plain}, "
        f"and recover() caught {int(died['recovered'].sum())} of these. A lock or a sync.Map: "
        f"{fixed}.",
        (
            Check("readers alone never end the process", control.anomalies == 0, str(control)),
            Check("one writer does", plain.anomalies > 0, str(plain)),
            Check(
                "the race detector reports it every time",
                broken.anomalies - plain.anomalies == broken.operations - plain.operations,
                str(run.count("broken", "bare map, one writer, race detector")),
            ),
            Check(
                "recover() never catches it",
                len(died) > 0 and not died["recovered"].any(),
                f"{int(died['recovered'].sum())} of {len(died)}",
            ),
            Check("a lock or a sync.Map cures it", fixed.anomalies == 0, str(fixed)),
        ),
    )
