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
                bool(group["survived"].all()),
                f"{int(group['survived'].sum())} of {len(group)}",
            )
            for name, group in held.groupby("reference", sort=False)
        ),
        Check(
            "that holder can be found from outside",
            bool(held["named"].all()),
            f"{int(held['named'].sum())} of {len(held)}",
        ),
        Check(
            "the map goes once that holder lets go too",
            len(held) > 0 and bool(held["gone"].all()),
            f"{int(held['gone'].sum())} of {len(held)}, the slowest after "
            f"{held['gone_ms'].max():.1f} ms",
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
    survived = int(held["survived"].sum())
    return Finding(
        run.experiment,
        f"close() freed the map in {control.operations - control.anomalies} of "
        f"{control.operations} cases where nothing else referred to it, and in "
        f"{len(held) - survived} of {len(held)} where something did: "
        f"{', '.join(references)}. Each of these kept it alive, was found from outside, and "
        f"let it go when dropped, at the latest {held['gone_ms'].max():.1f} ms later. A process "
        f"that never closed got {alive.operations} maps under a limit of {int(leak['limit'])} "
        f"descriptors; its end left {left.anomalies}.",
        tuple(checks),
    )
