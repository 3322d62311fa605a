"""Judges experiment 30: a trace_printk watched, and what its lines are worth."""

from __future__ import annotations

import pandas as pd

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_EVENT = "bpf_trace:bpf_trace_printk"
_OVERWRITE = "overwrite one key, print changes"


@judges("printk-watch")
def printk_watch(run: Run) -> Finding:
    """Every line can be read, by its right name; a line without a look at the answer is none."""
    last = run.table("progress").groupby("case", sort=False).tail(1)
    maps, names, watchers = (run.table(name) for name in ("maps", "names", "watchers"))
    broken, control, fixed = run.count("broken"), run.count("control"), run.count("fixed")
    (example,) = run.cases("broken")
    calls, changed, exists = (_of(last, example, it) for it in ("calls", "changed", "exists"))
    entries, newest = (_of(maps, example, it) for it in ("entries", "newest"))
    if not watchers["used"].all():  # a perf that does not work here knows no name at all
        names = names[names["asked"] == "tracefs"]
    right = names["event"] == _EVENT
    used = watchers[watchers["used"]]
    idle = "; ".join(str(answer) for answer in watchers.loc[~watchers["used"], "answer"])
    cured = last[last["variant"] == "fixed"]
    checks = (
        Check(
            "every line that was printed is read back, once",
            len(used) > 0
            and bool((used["lines"] == used["printed"]).all())
            and bool((used["printed"] > 0).all())
            and not used["lost"].any()
            and bool((last["lines"] == last["printed"]).all()),
            ", ".join(
                f"{lines:,} of {printed:,} by {watcher}"
                for watcher, lines, printed in zip(
                    used["watcher"], used["lines"], used["printed"], strict=True
                )
            )
            + (f" ({idle})" if idle else ""),
        ),
        Check(
            f"the event is called {_EVENT}",
            bool(right.any()) and bool(names.loc[right, "exists"].all()),
            f"found by {', '.join(names.loc[right & names['exists'], 'asked'])}",
        ),
        Check(
            "the article's name for it does not exist",
            bool((~right).any()) and not names.loc[~right, "exists"].any(),
            ", ".join(
                f"{event} in {asked}: {answer}"
                for event, asked, answer in zip(
                    *(names.loc[~right, column] for column in ("event", "asked", "answer")),
                    strict=True,
                )
            ),
        ),
        Check(
            "the article's example prints a line for each call and updates once",
            broken.operations == calls
            and changed == 1
            and exists == calls - 1
            and broken.anomalies == calls - 1,
            f"{broken.operations:,} lines, {changed} change, {exists:,} EEXIST",
        ),
        Check(
            "the map agrees: it holds what the first call wrote",
            entries == 1 and newest == 1,
            f"{entries} entry, written by call {newest} of {calls:,}",
        ),
        Check(
            "where every call inserts a new key, the lines are right",
            control.operations > 0 and control.anomalies == 0,
            f"{control} lines without a change",
        ),
        Check(
            "printing successful updates alone, lines and changes agree",
            fixed.anomalies == 0
            and bool((cured["lines"] == cured["changed"]).all())
            and _of(last, _OVERWRITE, "lines") == _of(maps, _OVERWRITE, "newest") > 0,
            ", ".join(
                f"{lines:,} lines for {changes:,} changes"
                for lines, changes in zip(cured["lines"], cured["changed"], strict=True)
            ),
        ),
    )
    return Finding(
        run.experiment,
        f"Of {int(used['printed'].sum()):,} lines of bpf_trace_printk, "
        f"{int(used['lines'].sum()):,} were read back from {_EVENT}, by "
        f"{' and by '.join(used['watcher'])}{f' ({idle})' if idle else ''}; an event "
        f"bpf:trace_printk was found by {int(names.loc[~right, 'exists'].sum())} of "
        f"{int((~right).sum())}. The article's example printed {broken.operations:,} "
        f"lines for {changed} change of the map: {broken} show nothing but a refused update. "
        f"Printed after a successful update alone, {fixed} lines were wrong.",
        checks,
    )


def _of(table: pd.DataFrame, case: str, column: str) -> int:
    return int(table.loc[table["case"] == case, column].iloc[0])
