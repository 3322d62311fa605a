"""Judges experiment 28: how long a map lives."""

from __future__ import annotations

import errno

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("map-life")
def map_life(run: Run) -> Finding:
    """A map outlives close() as long as one reference stands, and not a moment longer."""
    rounds, life, leak = run.table("rounds"), run.table("life"), run.table("leak").iloc[0]
    control = run.count("control")
    held = rounds[rounds["reference"] != ""]
    references = list(held["reference"].unique())
    kept = {name: run.count("broken", f"closed, still held: {name}") for name in references}
    dropped = {name: run.count("fixed", f"dropped as well: {name}") for name in references}
    stayed = sum(one.anomalies for one in dropped.values())
    steps = life.drop_duplicates("step").sort_values("step")
    closed = int(steps.loc[steps["action"] == "close", "step"].iloc[0])
    later = steps[steps["step"] >= closed]
    unexplained = steps["exists"] & ~life.groupby("step")["seen"].any().to_numpy()
    lives, ended = "never closed, process lives", "never closed, process ended"
    alive, left = run.count("broken", lives), run.count("fixed", ended)
    checks = [
        Check(
            "close() frees a map to which nothing else refers",
            control.operations > 0 and control.anomalies == 0,
            f"{control} survived",
        ),
        *(
            Check(
                f"a map survives close() while this refers to it: {name}",
                one.anomalies == one.operations > 0,
                str(one),
            )
            for name, one in kept.items()
        ),
        Check(
            "that holder can be found from outside",
            len(held) > 0 and bool(held["named"].all()),
            f"{int(held['named'].sum())} of {len(held)}",
        ),
        Check(
            "the map goes once that holder lets go too",
            all(one.operations > 0 and one.anomalies == 0 for one in dropped.values()),
            f"{stayed} of {len(held)} left, the slowest gone after {held['gone_ms'].max():.1f} ms",
        ),
        Check(
            "one map through all references: it is there until the last one goes",
            bool(later["exists"].iloc[:-1].all()) and not later["exists"].iloc[-1],
            f"{len(later) - 1} steps after close, gone with: {later['action'].iloc[-1]}",
        ),
        Check(
            "and at every step somebody is seen to hold it",
            not unexplained.any(),
            f"{int((~unexplained).sum())} of {len(steps)} steps explained",
        ),
        Check(
            "a process that never closes runs out of descriptors (EMFILE), its maps alive",
            int(leak["answer"]) == -errno.EMFILE and alive.anomalies == alive.operations > 0,
            f"{alive} maps, answer {int(leak['answer'])} at a limit of {int(leak['limit'])}",
        ),
        Check(
            "its end frees them all",
            left.operations > 0 and left.anomalies == 0,
            f"{left} left",
        ),
    ]
    survived = sum(one.anomalies for one in kept.values())
    return Finding(
        run.experiment,
        f"close() freed the map in {control.operations - control.anomalies} of "
        f"{control.operations} cases where nothing else referred to it, and in "
        f"{len(held) - survived} of {len(held)} where something did: "
        f"{', '.join(references)}. {int(held['named'].sum())} of {len(held)} such holders were "
        f"found from outside, and {stayed} maps stayed once they were dropped too (gone at the "
        f"latest {held['gone_ms'].max():.1f} ms later). A process that never closed got "
        f"{alive.operations} maps under a limit of {int(leak['limit'])} descriptors; its "
        f"end left {left.anomalies}.",
        tuple(checks),
    )
