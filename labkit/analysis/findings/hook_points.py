"""Judges experiment 40: which hook on the changes of maps exists, and whether anybody passes it."""

from __future__ import annotations

import pandas as pd

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_HELPER = "bpf_map_update_elem"


@judges("hook-points")
def hook_points(run: Run) -> Finding:
    """The article's hook does not exist; those that this kernel takes are passed as they should."""
    article, control, fixed = run.count("broken"), run.count("control"), run.count("fixed")
    hooks = run.table("hooks")
    held = hooks[hooks["answer"] == ""]
    of_types = hooks[hooks["role"] == "function"]
    taken = of_types[of_types["answer"] == ""]
    named = hooks[hooks["role"] == "article"]
    checks = [
        Check(
            "what the article names is refused, whatever kind of hook is tried",
            article.anomalies == article.operations > 0,
            "; ".join(named["mechanism"] + ": " + named["answer"]),
        ),
        Check(
            "the same kinds of hook hold at the return of a system call",
            control.anomalies == 0 < control.operations,
            f"{control} refused",
        ),
        Check(
            "where a process passes them with every update",
            fixed.anomalies == 0 < fixed.operations,
            f"{fixed} not seen",
        ),
        Check(
            "hooks on the functions of the map types are all taken or all refused",
            len(taken) in (0, len(of_types)) and len(of_types) > 0,
            f"{len(taken)} of {len(of_types)} taken{_answers(of_types)}",
        ),
    ]
    if len(taken):
        checks += [
            _passed(taken, "a process", "passes", "writes"),
            _passed(taken[taken["program_writes"] > 0], "a program", "program_passes",
                    "program_writes"),
        ]  # fmt: skip
    helper = held[held["where"] == _HELPER]
    if len(helper):
        passes = int(helper["passes"].sum() + helper["program_passes"].sum())
        checks.append(
            Check(
                f"nobody passes the helper's own function, {_HELPER}",
                passes == 0,
                f"{passes} passes in {int((helper['writes'] + helper['program_writes']).sum())} "
                f"updates ({', '.join(helper['mechanism'])})",
            )
        )
    kinds = [
        f"{mechanism} {len(group[group['answer'] == ''])} of {len(group)}"
        for mechanism, group in hooks[hooks["role"] != "article"].groupby("mechanism", sort=False)
    ]
    return Finding(
        run.experiment,
        f"The hook that the article names was refused in {article} forms. This kernel takes of the "
        f"others: {', '.join(kinds)}. It knows {len(run.table('events'))} events with bpf in their "
        f"names, none of them for a change of a map.",
        tuple(checks),
    )


def _answers(hooks: pd.DataFrame) -> str:
    given = sorted(set(hooks["answer"]) - {""})
    return f" ({'; '.join(given)})" if given else ""


def _passed(taken: pd.DataFrame, who: str, passes: str, writes: str) -> Check:
    """By every write of a map some function is passed, for updates and for deletes."""
    verb = taken["where"].str.contains("delete").map({True: "deletes", False: "updates"})
    best = taken.assign(what=verb + " of " + taken["map"]).groupby("what")[[passes, writes]].max()
    missed = [str(what) for what in best.index[best[passes] < best[writes]]]
    return Check(
        f"each write of {who} passes a function of its map's type",
        not missed and len(best) > 0,
        ", ".join(missed) or f"{int(best[passes].sum())} of {int(best[writes].sum())}",
    )
