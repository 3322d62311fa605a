"""Judges experiment 19: the errno of an update as a change signal."""

from __future__ import annotations

import errno

import pandas as pd

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run


@judges("errno-signal")
def errno_signal(run: Run) -> Finding:
    """The errno tells presence to its caller and nothing else."""
    signal, control = run.count("broken", "errno of NOEXIST"), run.count("control")
    version = run.count("fixed", "compare the version in the value")
    kept = run.count("broken", "NOEXIST used as the update itself")
    written = run.count("fixed", "update with ANY")
    answers = run.table("errno")
    return Finding(
        run.experiment,
        f"After each of {signal.operations:,} changes BPF_NOEXIST answered what it had answered "
        f"before: it missed {signal}. Comparing the version in the value missed {version}. Used "
        f"as the update itself, NOEXIST left the old value in place {kept} times.",
        (
            Check("NOEXIST tells no change", signal.anomalies == signal.operations, str(signal)),
            Check("and answers the same when nobody writes", control.anomalies == 0, str(control)),
            Check("the version tells every change", version.anomalies == 0, str(version)),
            Check("NOEXIST never replaces a value", kept.anomalies == kept.operations, str(kept)),
            Check("ANY always does", written.anomalies == 0, str(written)),
            _answers(answers, "NOEXIST on a present key", "update NOEXIST", "present",
                     errno.EEXIST),
            _answers(answers[~_arrays(answers)], "NOEXIST on an absent key", "update NOEXIST",
                     "absent", 0),
            _answers(answers[_arrays(answers)], "NOEXIST on any entry of an array",
                     "update NOEXIST", "absent", errno.EEXIST),
            _answers(answers[~_arrays(answers)], "EXIST on an absent key", "update EXIST",
                     "absent", errno.ENOENT),
            _answers(answers[_arrays(answers)], "an index past the end of an array", "update",
                     "past the end", errno.E2BIG),
            _answers(answers, "NOEXIST and EXIST at once", "update NOEXIST|EXIST", "present",
                     errno.EINVAL),
            _answers(answers[_arrays(answers)], "delete of an array's entry", "delete", "present",
                     errno.EINVAL),
            _never_enoent(answers),
        ),
    )  # fmt: skip


def _arrays(answers: pd.DataFrame) -> pd.Series[bool]:
    return answers["kind"].str.contains("array")


def _answers(answers: pd.DataFrame, what: str, operation: str, key: str, number: int) -> Check:
    """Every map kind gives this answer, to user space and to a program."""
    asked = answers[(answers["operation"] == operation) & (answers["key"] == key)]
    given = sorted({*asked["user"], *asked["program"]})
    name = errno.errorcode[number] if number else "success"
    shown = ", ".join(errno.errorcode.get(-one, str(one)) if one else "success" for one in given)
    return Check(
        f"{what} answers {name}, to user space and to a program",
        given == [-number],
        f"{shown} ({', '.join(asked['kind'])})",
    )


def _never_enoent(answers: pd.DataFrame) -> Check:
    asked = answers[answers["operation"] == "update NOEXIST"]
    enoent = int((asked[["user", "program"]] == -errno.ENOENT).any(axis=1).sum())
    return Check("NOEXIST never answers ENOENT", enoent == 0, f"{enoent} of {len(asked)} answers")
