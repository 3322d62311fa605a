"""Judges experiment 58: an update inside another update of the same bucket is refused."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

SHARED_RULE = "every eighth bucket with it"
OWN_RULE = "no other bucket with it"
"""What `lock_rule` answers."""

_EIGHT_ON = "update eight buckets on"
_LOCK_ERRORS = {"EBUSY", "EDEADLK"}


@judges("nested-update")
def nested_update(run: Run) -> Finding:
    """What the bucket's lock refuses is refused by an error, and lost to who ignores it."""
    broken, control, fixed = (run.count(variant) for variant in ("broken", "control", "fixed"))
    calls, answers = run.table("calls"), run.table("answers")
    lost = int((calls["calls"] - calls["applied"])[calls["case"].isin(run.cases("broken"))].sum())
    refused = int(calls["refused"][calls["case"].isin(run.cases("broken"))].sum())
    errors = sorted(set(answers["answer"]) - {"applied"})
    return Finding(
        run.experiment,
        f"A tracer that was called inside of an insertion counted in the same map: {broken} of its "
        f"additions were lost where its key was in the bucket that was locked, every one answered "
        f"{' or '.join(errors) or 'with success'}, which took {_time(broken.cost_ns)} each "
        f"({_time(control.cost_ns)} where it went through). In another bucket or map {control} "
        f"were lost; in place, in an array, or with the refusals put aside {fixed}.",
        (
            Check("additions in the locked bucket are lost", broken.anomalies > 0, str(broken)),
            Check("every lost addition was answered with an error", lost == refused > 0,
                  f"{refused:,} of {lost:,}"),
            Check("the error is that of a lock", bool(errors) and set(errors) <= _LOCK_ERRORS,
                  ", ".join(errors) or "none"),
            *(
                Check(f"none is lost: {case}", count.anomalies == 0 < count.operations, str(count))
                for variant in ("control", "fixed")
                for case in run.cases(variant)
                for count in [run.count(variant, case)]
            ),
        ),
    )  # fmt: skip


def _time(ns: float) -> str:
    return f"{ns / 1e6:.1f} ms" if ns >= 1e6 else f"{ns:,.0f} ns"


def refusal(run: Run) -> str:
    """Errno by which the locked bucket refuses."""
    answers = run.table("answers")
    refused = answers[answers["case"].isin(run.cases("broken")) & (answers["answer"] != "applied")]
    return " or ".join(sorted(set(refused["answer"])))


def lock_rule(run: Run) -> str:
    """Which buckets are locked with the one that is changed, by what updates in them come to."""
    calls = run.table("calls")
    row = calls[calls["case"] == _EIGHT_ON].sum(numeric_only=True)
    if 0 < row["refused"] == row["calls"]:
        return SHARED_RULE
    return OWN_RULE if row["refused"] == 0 < row["calls"] else "neither rule"
