"""Judges experiment 10: what NO_PREALLOC changes, and what prefilling breaks."""

from __future__ import annotations

import errno

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_OFF = "NO_PREALLOC, bursts with interrupts off"
_LIMIT = "NO_PREALLOC under a memory limit"


@judges("no-prealloc")
def no_prealloc(run: Run) -> Finding:
    """Insertions fail with an answer and for two reasons; prefilling breaks rules."""
    off, limit = run.count("broken", _OFF), run.count("broken", _LIMIT)
    control = run.count("control")
    fixed = run.count("fixed", "preallocated, bursts with interrupts off")
    answers, fill = run.table("answers"), run.table("fill")
    told = answers["inserted"] + answers["no_memory"] + answers["full"] + answers["other"]
    full = fill[fill["filled"] == fill["entries"]]
    refused = int(run.table("creation")["errno"].iloc[0])
    prefills = [case for case in run.cases("broken") if case.startswith("prefill")]
    bare = run.count("fixed", "no prefill: rules, new and unconfigured keys")
    return Finding(
        run.experiment,
        f"In bursts with interrupts off {off} insertions into a NO_PREALLOC map failed, and "
        f"{limit} under a memory limit; every one was answered ENOMEM. With interrupts on, "
        f"{control} failed; preallocated, {fixed}. Maps took every key up to max_entries, so "
        "nothing was rehashed. Prefilling overwrote the rule in force, refused every later key "
        "and invented rules that nobody had configured.",
        (
            Check("bursts with interrupts off fail", off.anomalies > 0, str(off)),
            Check("a memory limit makes insertions fail", limit.anomalies > 0, str(limit)),
            Check(
                "every failure is answered ENOMEM",
                bool((told == answers["attempted"]).all())
                and not answers[["full", "other"]].any(axis=None),
                f"{int(answers['no_memory'].sum()):,} of "
                f"{int((answers['attempted'] - answers['inserted']).sum()):,}",
            ),
            Check("with interrupts on none fails", control.anomalies == 0, str(control)),
            Check("preallocated, none fails", fixed.anomalies == 0, str(fixed)),
            Check(
                "preallocation is refused up front where memory is short",
                refused == errno.ENOMEM,
                errno.errorcode.get(refused, "created"),
            ),
            Check(
                "a map takes max_entries keys and answers E2BIG to the next",
                len(full) > 0 and bool((full["next_answer"] == errno.E2BIG).all()),
                f"{int((full['next_answer'] == errno.E2BIG).sum())} of {len(full)} maps",
            ),
            *(
                Check(f"harmful: {case}", _all(run, case), str(run.count("broken", case)))
                for case in prefills
            ),
            Check("without prefill nothing is wrong", bare.anomalies == 0, str(bare)),
        ),
    )


def _all(run: Run, case: str) -> bool:
    count = run.count("broken", case)
    return count.anomalies == count.operations > 0
