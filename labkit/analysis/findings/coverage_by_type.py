"""Judges experiment 48: which hooks see the writes of each type of map."""

from __future__ import annotations

import pandas as pd

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

# By mechanism: whose writes it sees, of every type and by every command, and whose it never does.
# Kprobes are not judged by their hits: which the kernel skips is the matter of kprobe-trap.
_SEES = {
    "functions": (("system call", "program"), ("nobody",)),
    "syscalls": (("system call",), ("program", "nobody")),
    "kprobes": ((), ("nobody",)),
    "pull": (("system call", "program", "nobody"), ()),
}
_WHO = {"system call": "processes write", "program": "programs write", "nobody": "programs store"}


@judges("coverage-by-type")
def coverage_by_type(run: Run) -> Finding:
    """What a mechanism sees does not hang on the type of the map; a pull finds everything."""
    matrix = run.table("matrix")
    tried = matrix[(matrix["answer"] == "") & (matrix["writes"] > 0)]
    broken, control, fixed = run.count("broken"), run.count("control"), run.count("fixed")
    checks = [
        Check("the hook on bpf(2) sees no write of a program, of any type",
              broken.anomalies == broken.operations > 0, f"{broken} unseen"),
        Check("and every one of a process", control.anomalies == 0 < control.operations,
              f"{control} unseen"),
        Check("two snapshots show every key that a program wrote",
              fixed.anomalies == 0 < fixed.operations, f"{fixed} unseen"),
    ]  # fmt: skip
    for mechanism, (whole, none) in _SEES.items():
        rows = tried[tried["mechanism"] == mechanism]
        checks += [
            _all(rows[rows["group"] == group], f"{mechanism}: {words} of what {_WHO[group]}", seen)
            for groups, seen, words in ((whole, True, "all"), (none, False, "nothing"))
            for group in groups
            if (rows["group"] == group).any()
        ]
    refused = ", ".join(matrix[matrix["answer"] != ""]["mechanism"].unique())
    seen = [
        f"{mechanism} {rows['seen'].sum():,} of {rows['writes'].sum():,}"
        for mechanism, rows in tried.groupby("mechanism", sort=False)
    ]
    return Finding(
        run.experiment,
        f"Of the writes of {matrix['map'].nunique()} types of map by {matrix['path'].nunique()} "
        f"ways, each as far as the kernel allows it, were seen: {', '.join(seen)}."
        + (f" Refused by this kernel: {refused}." if refused else ""),
        tuple(checks),
    )


def _all(rows: pd.DataFrame, statement: str, seen: bool) -> Check:
    wrong = rows[rows["seen"] != (rows["writes"] if seen else 0)]
    where = "; ".join(f"{map}, {path}" for map, path in zip(wrong["map"], wrong["path"],
                                                          strict=True))  # fmt: skip
    return Check(
        statement,
        wrong.empty,
        f"{rows['seen'].sum()} of {rows['writes'].sum()} seen{': not ' if where else ''}{where}",
    )
