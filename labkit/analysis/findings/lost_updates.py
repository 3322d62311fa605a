"""Judges experiment 13: increments lost by read-modify-write."""

from __future__ import annotations

import math

import pandas as pd

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run
from labkit.analysis.statistics import bootstrap, compare


@judges("lost-updates")
def lost_updates(run: Run) -> Finding:
    """Every unguarded way loses under contention and none alone; no cure loses any."""
    rounds = run.table("rounds")

    def ns(case: str, load: str) -> pd.Series[float]:
        return rounds.loc[(rounds["case"] == case) & (rounds["load"] == load), "ns"]

    checks = [
        Check(
            f"increments are lost by {case}",
            run.count("broken", case).anomalies > 0,
            str(run.count("broken", case)),
        )
        for case in run.cases("broken")
    ]
    checks += [
        Check(
            f"a single writer loses none ({case})",
            run.count("control", case).anomalies == 0,
            str(run.count("control", case)),
        )
        for case in run.cases("control")
    ]
    checks += [
        Check(
            f"none is lost by {case}",
            run.count("fixed", case).anomalies == 0,
            str(run.count("fixed", case)),
        )
        for case in run.cases("fixed")
    ]
    lock, own = "program: bpf_spin_lock", "program: per-CPU value"
    checks.append(
        Check(
            "a lock that two CPUs want costs more than a counter that they do not share",
            bool(ns(lock, "contended").median() > ns(own, "contended").median()),
            str(compare(ns(lock, "contended"), ns(own, "contended"), paired=True)),
        )
    )

    def lost(case: str) -> str:
        return f"{100 * run.count('broken', case).rate:.1f} %"

    def cost(case: str) -> str:
        alone, contended = bootstrap(ns(case, "alone")), bootstrap(ns(case, "contended"))
        spread = f" [{contended.low:.1f}, {contended.high:.1f}]"
        return (
            f"{alone.estimate:.1f} ns alone, {contended.estimate:.1f} ns contended"
            f"{'' if math.isnan(contended.low) else spread}"
        )

    atomic, update = "program: atomic add", "process: lookup, update"
    return Finding(
        run.experiment,
        f"Two CPUs that increment one counter lost {lost('program: (*v)++')} by (*v)++ and "
        f"{lost('program: lookup, update')} by lookup and update; processes lost {lost(update)}, "
        f"and {lost('process: the same, BPF_F_LOCK')} with BPF_F_LOCK, which guards the copy and "
        f"not the sum. An atomic add ({cost(atomic)}), a per-CPU value ({cost(own)}) and "
        f"bpf_spin_lock ({cost(lock)}) lost none; nor did processes with a key each, a file lock, "
        "or a program that adds for them.",
        tuple(checks),
    )
