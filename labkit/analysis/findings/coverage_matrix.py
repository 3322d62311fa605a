"""Judges experiment 44: which hooks see which ways of writing a map."""

from __future__ import annotations

import pandas as pd

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

# By mechanism: who writes so that it sees all, and who so that it sees nothing. Kprobes are not
# judged by their hits: which of them the kernel skips hangs on who else runs at the moment.
_SEES = {
    "functions": (("system call", "program"), ("nobody",)),
    "syscalls": (("system call",), ("program", "nobody")),
    "kprobes": ((), ("nobody",)),
}
_SWITCH = "inner map switched"
_NO_WRITE = ("another map", "failed update")


@judges("coverage-matrix")
def coverage_matrix(run: Run) -> Finding:
    """Each mechanism sees its paths wholly, and no other; a pull catches the rest."""
    matrix = run.table("matrix")
    tried = matrix[matrix["answer"] == ""]
    checks = []
    for case in run.cases("control"):
        count = run.count("control", case)
        quiet = case in _NO_WRITE
        words = f"no event tells of: {case}" if quiet else f"every write is seen: {case}"
        checks.append(Check(words, count.anomalies == 0 < count.operations,
                            f"{count} {'told of' if quiet else 'unseen'}"))  # fmt: skip
    checks += [
        Check(f"no hook on bpf(2) sees: {case}", count.anomalies == count.operations > 0,
              f"{count} unseen")
        for case in run.cases("broken")
        for count in [run.count("broken", case)]
    ]  # fmt: skip
    checks += [
        Check(f"in the end the copy is right: {case}", count.anomalies == 0, f"{count} differ")
        for case in run.cases("fixed")
        for count in [run.count("fixed", case)]
    ]
    for mechanism, (whole, none) in _SEES.items():
        rows = tried[tried["mechanism"] == mechanism]
        checks += [
            _all(rows, mechanism, group, seen=seen)
            for groups, seen in ((whole, True), (none, False))
            for group in groups
            if (rows["group"] == group).any()
        ]
    pulled = tried[tried["mechanism"] == "pull"]
    writes = pulled[(pulled["group"] != "no write") & (pulled["path"] != _SWITCH)]
    checks.append(
        Check(
            "a pull finds every key that was written, by whatever way",
            len(writes) > 0 and bool((writes["seen"] == writes["writes"]).all()),
            f"{writes['seen'].sum()} of {writes['writes'].sum()}",
        )
    )
    switched = pulled[pulled["path"] == _SWITCH]
    checks.append(
        Check(
            "but a pull of the inner map does not tell that the outer one left it",
            len(switched) == 1 and int(switched["seen"].sum()) == 0,
            f"{switched['seen'].sum()} of {switched['writes'].sum()}",
        )
    )
    silent = tried[(tried["group"] == "no write") & (tried["mechanism"] != "kprobes")]
    checks.append(
        Check(
            "nothing is reported of other maps and failed writes",
            len(silent) > 0 and int(silent["false_events"].sum()) == 0,
            f"{silent['false_events'].sum()} events of {silent['writes'].sum()} such calls",
        )
    )
    refused = ", ".join(matrix[matrix["answer"] != ""]["mechanism"].unique())
    broken = run.count("broken")
    calls = tried[(tried["mechanism"] == "syscalls") & (tried["group"] == "system call")]
    return Finding(
        run.experiment,
        f"The hook on bpf(2) saw {calls['seen'].sum():,} of {calls['writes'].sum():,} writes by "
        f"system calls, and {broken.operations - broken.anomalies:,} of {broken.operations:,} "
        f"that pass none; with a pull, "
        f"{run.count('fixed').anomalies} of {run.count('fixed').operations:,} differed in the end. "
        f"{_price(run)}" + (f" Refused by this kernel: {refused}." if refused else ""),
        tuple(checks),
    )


def _all(rows: pd.DataFrame, mechanism: str, group: str, *, seen: bool) -> Check:
    of = rows[rows["group"] == group]
    wanted = of["writes"] if seen else 0 * of["writes"]
    words = "all" if seen else "nothing"
    who = "that nobody can hook" if group == "nobody" else f"by a {group}"
    return Check(
        f"{mechanism} see {words} of what is written {who}",
        bool((of["seen"] == wanted).all()),
        f"{of['seen'].sum()} of {of['writes'].sum()}",
    )


def _price(run: Run) -> str:
    """What the hooks add, median over the rounds, with the smallest and the largest round."""
    overhead = run.table("overhead")
    words = []
    for (mechanism, call), group in overhead.groupby(["mechanism", "call"], sort=False):
        by_round = group.pivot(index="round", columns="hooked", values="ns")
        added = by_round[True] - by_round[False]
        words.append(
            f"{added.median():+.0f} ns ({added.min():+.0f} to {added.max():+.0f}) on a call of "
            f"{by_round[False].median():,.0f} ns ({call}; {mechanism})"
        )
    return f"Hooks added {', '.join(words)}."
