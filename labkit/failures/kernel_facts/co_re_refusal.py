"""What preserve_access_index on a map's value does: the program is not loaded, never stale."""

from __future__ import annotations

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import elf
from labkit.kernel.programs import LoadFailed

_BUILDS = (  # variant, case, ATTRIBUTE of the source
    ("broken", "attribute on the map value's struct", 1),
    ("control", "no attribute", 0),
    ("fixed", "attribute on the kernel's struct alone", 2),
)
_POLICY = np.dtype([("version", "u4"), ("action", "u4")])
_KEY = 1


@experiment(
    "co-re-refusal",
    number=38,
    family="kernel-facts",
    question="Can an attribute for relocation make a program read old values of a map?",
    claims=("1.8",),
    needs=("bpf", "btf", "clang", "hash", "syscall_program"),
    quick={"loads": 10, "updates": 2_000},
    full={"loads": 50, "updates": 50_000},
)
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
        ``counts``: an operation is a load, an anomaly a refused one; or an update, an anomaly
        one that the next run of the program did not read. ``builds``: ``case``, ``loads``,
        ``refused``, ``answer`` (text of the last refusal).
    """
    triad, rows = Triad("load refused"), []
    for variant, case, attribute in _BUILDS:
        say(case)
        body = elf.compile("co_re_refusal", ATTRIBUTE=attribute)
        refused, answer = 0, ""
        for _ in range(loads):
            try:
                elf.load("co_re_refusal", body).close()
            except LoadFailed as failed:
                refused, answer = refused + 1, str(failed)
        rows.append({"case": case, "loads": loads, "refused": refused, "answer": answer})
        triad.add(variant, case=case, operations=loads, anomalies=refused)
        if not refused:
            triad.add(variant, case=f"{case}, updates", operations=updates,
                      anomalies=_stale(body, updates), anomaly="stale")  # fmt: skip
    return {"counts": triad.table(), "builds": pd.DataFrame(rows)}


def _stale(body: bytes, updates: int) -> int:
    """Updates whose version the next run of the program did not return."""
    stale = 0
    with elf.load("co_re_refusal", body) as loaded:
        policies, program = loaded.map("policies", value=_POLICY), loaded.function("read_version")
        value = np.zeros(1, _POLICY)
        update = policies.updater(_KEY, value)
        for version in range(1, updates + 1):
            value["version"] = version
            update()
            stale += program.test_run().value != version
    return stale
