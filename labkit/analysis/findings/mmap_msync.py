"""Judges experiment 11: the article's cure by mmap, msync and barriers."""

from __future__ import annotations

import errno

import pandas as pd

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_ENOTSUPP = 524  # the kernel's own number, without a name in user space


@judges("mmap-msync")
def mmap_msync(run: Run) -> Finding:
    """The procedure is impossible everywhere, and nothing is stale without it."""
    procedure = run.count("broken", "update, mmap, msync(MS_SYNC)")
    wrong = run.count("broken", "mapping: flag stored before the data")
    control = run.count("control")
    unsynchronised = [case for case in run.cases("fixed") if case.endswith("no msync")]
    ordered = [case for case in run.cases("fixed") if case.startswith("mapping:")]
    if run.provenance.get("architecture") != "x86_64":
        # Only x86 keeps the order of two stores by itself; elsewhere the barrier is needed.
        ordered = [case for case in ordered if "barrier" in case]
    answers = run.table("answers").set_index("map")
    mappable = "array with MMAPABLE"
    others = answers.drop(index=mappable)
    return Finding(
        run.experiment,
        f"The procedure of the article could be carried out on "
        f"{procedure.operations - procedure.anomalies} of {procedure.operations} map types: most "
        "cannot be mapped, and where mmap works, msync(MS_SYNC) answers EINVAL. Without any "
        f"msync, {control} reads after an update were stale. Through a mapping the order of two "
        f"stores is the writer's: flag first broke {wrong}, data first none.",
        (
            Check(
                "no map type allows update, mmap, msync(MS_SYNC)",
                procedure.anomalies == procedure.operations,
                str(procedure),
            ),
            Check(
                "only an array made with MMAPABLE can be mapped",
                not (others["mmap"] == 0).any() and _name(answers.loc[mappable, "mmap"]) == "0",
                "; ".join(f"{kind}: {_said(row)}" for kind, row in answers.iterrows()),
            ),
            Check(
                "and there msync(MS_SYNC) answers EINVAL",
                _name(answers.loc[mappable, "msync_sync"]) == "EINVAL",
                _name(answers.loc[mappable, "msync_sync"]),
            ),
            Check("a program reads every update at once", control.anomalies == 0, str(control)),
            *(
                Check(f"none is stale: {case}", run.count("fixed", case).anomalies == 0,
                      str(run.count("fixed", case)))
                for case in unsynchronised
            ),
            Check("the wrong order of stores shows", wrong.anomalies > 0, str(wrong)),
            *(
                Check(f"the right order does not: {case}",
                      run.count("fixed", case).anomalies == 0, str(run.count("fixed", case)))
                for case in ordered
            ),
        ),
    )  # fmt: skip


def _said(row: pd.Series) -> str:
    if row["create"] != 0:
        return f"create {_name(row['create'])}"
    return f"mmap {_name(row['mmap'])}"


def _name(answer: object) -> str:
    number = -int(float(str(answer)))
    return "ENOTSUPP" if number == _ENOTSUPP else errno.errorcode.get(number, "0")
