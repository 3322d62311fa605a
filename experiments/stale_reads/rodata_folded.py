"""A policy in .rodata is decided when the program is loaded, and cannot be changed after."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from labkit.kernel import elf, libbpf
from labkit.kernel.maps import Map, MapError
from labkit.lab.experiment import Case, Counted, Statement, experiment

_DENY = 2
_DENIED = 0x5EED  # what a denying run returns; stands in no other instruction
_RUNS = [("allowed", "u8"), ("denied", "u8")]  # the program's .bss
_BEFORE_LOAD: Mapping[str, bytes] = {".rodata": np.array([_DENY], np.uint32).tobytes()}


@experiment(
    "rodata-folded",
    number=8,
    family="stale-reads",
    question="Can a policy in a program's read-only data be changed while it is loaded?",
    claims=("1.4e",),
    needs=("bpf", "test_run", "clang", "frozen_map"),
    quick={"runs": 100_000, "rounds": 5},
    full={"runs": 1_000_000, "rounds": 20},
    cases=(
        Case("broken", "rodata-late", ".rodata, written after load",
             program="obey_constant", section=".rodata"),
        Case("control", "rodata-before", ".rodata, set before load",
             program="obey_constant", section=".rodata", initial=_BEFORE_LOAD),
        Case("fixed", "data-late", ".data, written after load",
             program="obey_variable", section=".data"),
        Case("fixed", "map-late", "array map, written after load",
             program="obey_map", section="policy"),
    ),
    counted=Counted("stale decision", operations="allowed + denied", anomalies="allowed",
                    cost_ns="run_ns"),
    statements=(
        Statement("a write to .rodata after load is refused",
                  'all(rounds(case="rodata-late").answer == "EPERM")'),
        Statement("so no tool can show the new value there, and there alone",
                  'all((rounds.value != rounds.meant) == (rounds.case == "rodata-late"))'),
        Statement("every run obeys the value that was loaded", "all(broken)"),
        Statement("the verifier removed the branch that denies, there alone",
                  'all((rounds.denying == 0) == (rounds.case == "rodata-late")) '
                  'and max(rounds(case="rodata-late").instructions) '
                  '< min(rounds(variant="fixed").instructions)'),
        Statement("a value set before the load is obeyed", "none(control)"),
        Statement("the kernel accepts every write to .data and to a map",
                  'all(rounds(variant="fixed").answer == "0")'),
        Statement("cured by .data, or by a map", "none(fixed)"),
    ),
    sentence="A write to .rodata of a loaded program was refused with EPERM "
    '{rows(rounds(case="rodata-late", answer="EPERM"))} of {rows(rounds(case="rodata-late"))} '
    "times, and {broken} runs went on to allow: the verifier had removed the denying branch from "
    '{rows(rounds(case="rodata-late", denying=0))} of {rows(rounds(case="rodata-late"))} '
    "programs. Set before the load, {control} runs allowed; in .data or a map a write was obeyed "
    "at once ({fixed} runs allowed).",
)  # fmt: skip
def rodata_folded(case: Case, *, runs: int) -> dict[str, Any]:
    """Write deny into the policy of a loaded program, and count the runs that still allow.

    libbpf freezes the map behind ``.rodata`` before it loads the programs. The verifier
    takes what it reads from a frozen map that programs cannot write as a constant
    (kernel/bpf/verifier.c, ``bpf_map_is_rdonly``), decides the branches that depend on it,
    and removes those never taken. A later write is refused with EPERM, so nobody is
    deceived who looks at the answer. ``.data`` is an ordinary array.

    Parameters
    ----------
    case : Case
        Where the policy is, and when it is written. The program is loaded anew each time.
    runs : int
        Runs of the program, after the write.

    Returns
    -------
    dict
        ``answer`` (of the write: ``0`` or the errno's name; ``set before load`` where none
        was tried), ``value`` (that a lookup in the map shows after), ``meant``, ``denying``
        (instructions of the denying branch that the verifier left), ``instructions``,
        ``allowed`` and ``denied`` (runs, counted by the program), ``run_ns`` (float64).
    """
    initial = case.get("initial", {})
    with elf.load("rodata_folded", _compiled(), initial) as loaded:
        policy, function = loaded.map(case.section, value="u4"), loaded.program(case.program)
        code = libbpf.prog_instructions(function.fd)
        answer = "set before load" if initial else _write(policy)
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


@functools.cache
def _compiled() -> bytes:
    return elf.compile("rodata_folded")


def _write(policy: Map) -> str:
    try:
        policy.update(0, _DENY)
    except MapError as refusal:
        return libbpf.error_name(refusal.errno or 0)
    return "0"
