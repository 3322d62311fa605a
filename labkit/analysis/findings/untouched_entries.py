"""Judges experiment 55: entries that nobody wrote."""

from __future__ import annotations

import errno

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("untouched-entries")
def untouched_entries(run: Run) -> Finding:
    """Every entry of an array is found; only the value itself can tell that it was written."""
    found, control = run.count("broken"), run.count("control")
    cures = {case: run.count("fixed", case) for case in run.cases("fixed")}
    kinds = run.table("kinds")
    arrays = kinds[kinds["kind"].str.contains("array")]
    hashes = kinds[~kinds["kind"].str.contains("array")]
    return Finding(
        run.experiment,
        f"Judged by whether a lookup finds them, {found} keys of arrays were taken for written "
        f"and were not, and {control} of hashes. By a version in the value, "
        f"{', '.join(str(one) for one in cures.values())}.",
        (
            Check(
                "an array finds keys that nobody wrote, as zeros",
                found.anomalies == int(arrays["zeros"].sum()) > 0
                and bool((arrays["found"] == arrays["keys"]).all()),
                f"{found}",
            ),
            Check(
                "and answers EEXIST to NOEXIST on them",
                len(arrays) > 0 and set(arrays["noexist"]) == {-errno.EEXIST},
                f"{', '.join(arrays['kind'])}",
            ),
            Check(
                "a hash finds what was written and no more",
                control.operations > 0
                and control.anomalies == 0
                and not hashes[["zeros", "noexist"]].any(axis=None),
                f"{control} ({', '.join(hashes['kind'])})",
            ),
            Check(
                "a version in the value tells",
                len(cures) == 2
                and all(one.anomalies == 0 < one.operations for one in cures.values()),
                "; ".join(f"{case}: {one}" for case, one in cures.items()),
            ),
        ),
    )
