"""What preserve_access_index on a map's value does: the program is not loaded, never stale."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from labkit.kernel import elf
from labkit.kernel.compiler import LoadFailed
from labkit.lab.experiment import Case, Statement, Tables, experiment, say
from labkit.runs import Triad

_CASES = (  # with ATTRIBUTE of the source
    Case("broken", "on-value", "attribute on the map value's struct", attribute=1),
    Case("control", "plain", "no attribute", attribute=0),
    Case("fixed", "on-kernel", "attribute on the kernel's struct alone", attribute=2),
    Case("control", "plain-updates", "no attribute, updates", beside="plain"),
    Case("fixed", "on-kernel-updates", "attribute on the kernel's struct alone, updates",
         beside="on-kernel"),
)  # fmt: skip
_POLICY = np.dtype([("version", "u4"), ("action", "u4")])
_KEY = 1


def _counted(tables: Tables) -> Tables:
    """Refused loads, and updates that the next run of the program did not read."""
    triad, variants = Triad("load refused"), {case.id: case.variant for case in _CASES}
    for row in tables["builds"].to_dict("records"):
        triad.add(variants[row["case"]], case=row["case"], operations=row["loads"],
                  anomalies=row["refused"])  # fmt: skip
    for row in tables["updates"].to_dict("records"):
        triad.add(variants[row["case"]], case=row["case"], operations=row["updates"],
                  anomalies=row["stale"], anomaly="stale")  # fmt: skip
    return {"counts": triad.table()}


@experiment(
    "co-re-refusal",
    number=38,
    family="kernel-facts",
    question="Can an attribute for relocation make a program read old values of a map?",
    claims=("1.8",),
    needs=("bpf", "btf", "clang", "hash", "syscall_program"),
    quick={"loads": 10, "updates": 2_000},
    full={"loads": 50, "updates": 50_000},
    cases=_CASES,
    derive=_counted,
    statements=(
        Statement("the attribute on a struct that the kernel does not know prevents every load",
                  "all(broken) and all(builds(case='on-value').error == 'EINVAL')"),
        Statement("without it, or on the kernel's struct alone, the program is loaded",
                  "none(control['plain']) and none(fixed['on-kernel'])"),
        Statement("a loaded program reads every update",
                  "none(control['plain-updates']) and none(fixed['on-kernel-updates'])"),
    ),
    sentence="With the attribute on the struct of a map's value {broken} loads were refused "
    "({builds(case='on-value').error}). The builds without it, and with it on the kernel's own "
    "struct alone, were loaded and missed {sum(updates.stale)} of {sum(updates.updates)} updates.",
)  # fmt: skip
def co_re_refusal(*, loads: int, updates: int) -> Tables:
    """Build one program with the attribute at different places, load it, and update its map.

    ``__builtin_preserve_access_index`` has clang write down which field an access means, and
    libbpf sets its offset from the running kernel's BTF when the program is loaded. For a struct
    that the kernel does not know there is nothing to set it from: libbpf puts an instruction
    there that the verifier refuses. Once loaded, a program's offsets never change again, so it
    cannot read a map's value of yesterday.

    Parameters
    ----------
    loads : int
        Loads of each build.
    updates : int
        Updates of the map, each followed by a run of the program, for each build that loads.

    Returns
    -------
    dict of DataFrame
        ``builds``: ``case``, ``loads``, ``refused``, ``answer`` (text of the last refusal),
        ``error`` (the errno's name in it). ``updates``: ``case``, ``updates``, ``stale`` (those
        that the next run of the program did not read).
    """
    builds, read = [], []
    measured = {case.beside: case.id for case in _CASES}
    for case in (one for one in _CASES if not one.beside):
        say(case.label)
        body = elf.compile("co_re_refusal", ATTRIBUTE=case.attribute)
        refused, answer = 0, ""
        for _ in range(loads):
            try:
                elf.load("co_re_refusal", body).close()
            except LoadFailed as failed:
                refused, answer = refused + 1, str(failed)
        named = re.search(r"\bE[A-Z0-9]+\b", answer)
        error = named[0] if named else ""
        builds.append(
            {"case": case.id, "loads": loads, "refused": refused, "answer": answer, "error": error}
        )
        if case.id in measured and not refused:
            stale = _stale(body, updates)
            read.append({"case": measured[case.id], "updates": updates, "stale": stale})
    return {"builds": pd.DataFrame(builds), "updates": pd.DataFrame(read)}


def _stale(body: bytes, updates: int) -> int:
    """Updates whose version the next run of the program did not return."""
    stale = 0
    with elf.load("co_re_refusal", body) as loaded:
        policies, program = loaded.map("policies", value=_POLICY), loaded.program("read_version")
        value = np.zeros(1, _POLICY)
        update = policies.updater(_KEY, value)
        for version in range(1, updates + 1):
            value["version"] = version
            update()
            stale += program.test_run().value != version
    return stale
