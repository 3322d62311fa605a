"""A policy in .rodata is decided when the program is loaded, and cannot be changed after."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import elf, libbpf
from labkit.kernel.maps import Map, MapError

_DENY = 2
_DENIED = 0x5EED  # what a denying run returns; stands in no other instruction
_RUNS = [("allowed", "u8"), ("denied", "u8")]  # the program's .bss
_BEFORE_LOAD: Mapping[str, bytes] = {".rodata": np.array([_DENY], np.uint32).tobytes()}
_SETTINGS: tuple[tuple[str, str, str, str, Mapping[str, bytes]], ...] = (
    # variant, case, program, map with its policy, contents set before the load
    ("broken", ".rodata, written after load", "obey_constant", ".rodata", {}),
    ("control", ".rodata, set before load", "obey_constant", ".rodata", _BEFORE_LOAD),
    ("fixed", ".data, written after load", "obey_variable", ".data", {}),
    ("fixed", "array map, written after load", "obey_map", "policy", {}),
)


@experiment(
    "rodata-folded",
    number=8,
    family="stale-reads",
    question="Can a policy in a program's read-only data be changed while it is loaded?",
    claims=("1.4e",),
    needs=("bpf", "test_run", "clang", "frozen_map"),
    quick={"runs": 100_000, "rounds": 5},
    full={"runs": 1_000_000, "rounds": 20},
)
def rodata_folded(*, runs: int, rounds: int) -> Tables:
    """Write deny into the policy of a loaded program, and count the runs that still allow.

    libbpf freezes the map behind ``.rodata`` before it loads the programs. The verifier
    takes what it reads from a frozen map that programs cannot write as a constant
    (kernel/bpf/verifier.c, ``bpf_map_is_rdonly``), decides the branches that depend on it,
    and removes those never taken. A later write is refused with EPERM, so nobody is
    deceived who looks at the answer. ``.data`` is an ordinary array.

    Parameters
    ----------
    runs : int
        Runs of the program in a round, after the write.
    rounds : int
        Rounds of every setting, in turns; each loads the program anew.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a run after the policy was written or set, an anomaly
        one that allowed though the policy meant deny, ``cost_ns`` the time of one run.
        ``rounds``: ``variant``, ``case``, ``round``, ``answer`` (of the write: ``0`` or the
        errno's name; ``set before load`` where none was tried), ``value`` (that a look into
        the map shows after), ``meant``, ``denying`` (instructions of the denying branch
        that the verifier left), ``instructions``, ``allowed`` and ``denied`` (runs, counted by
        the program), ``run_ns`` (float64).
    """
    say("compiling")
    body = elf.compile("rodata_folded")
    rows = []
    for turn in range(rounds):
        for variant, case, program, section, initial in _SETTINGS:
            with elf.load("rodata_folded", body, initial) as loaded:
                row = _measure(loaded, program, section, runs, write=not initial)
            rows.append({"variant": variant, "case": case, "round": turn, **row})
    table = pd.DataFrame(rows)
    triad = Triad("stale decision")
    triad.add_cases(
        table,
        operations=table["allowed"] + table["denied"],
        anomalies=table["allowed"],
        cost_ns=table["run_ns"],
    )
    return {"counts": triad.table(), "rounds": table}


def _measure(
    loaded: elf.ElfObject, program: str, section: str, runs: int, *, write: bool
) -> dict[str, object]:
    policy, function = loaded.map(section, value="u4"), loaded.function(program)
    code = libbpf.prog_instructions(function.fd)
    answer = _write(policy) if write else "set before load"
    spent = function.test_run(repeat=runs)
    seen = loaded.map(".bss", value=_RUNS).lookup(0)
    return {
        "answer": answer,
        "value": int(policy.lookup(0)),
        "meant": _DENY,
        "denying": int(np.count_nonzero(code["immediate"] == _DENIED)),
        "instructions": len(code),
        "allowed": int(seen["allowed"]),
        "denied": int(seen["denied"]),
        "run_ns": float(spent.mean_ns),
    }


def _write(policy: Map) -> str:
    try:
        policy.update(0, _DENY)
    except MapError as refusal:
        return libbpf.error_name(refusal.errno or 0)
    return "0"
