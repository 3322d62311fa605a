"""A key with padding bytes: user space finds what it wrote, the program does not."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import LabError
from labkit.kernel import programs
from labkit.kernel.programs import BpfObject
from labkit.lab.experiment import Case, Counted, Statement, experiment

_TCP = 6
_EXAMPLES = 2  # keys of each measurement that are saved as bytes


@experiment(
    "padded-key",
    number=4,
    family="stale-reads",
    question="Does a program find a key whose padding bytes the writer left as they were?",
    claims=("1.2a",),
    needs=("bpf", "compile", "test_run"),
    quick={"keys": 1_000, "rounds": 2},
    full={"keys": 4_000, "rounds": 8},
    cases=(
        Case("broken", "left-over", "padding holds what stood in memory", padded=True),
        Case("control", "no-padding", "layout without padding"),
        Case("fixed", "cleared", "padding cleared by the writer", padded=True, cleared=True),
    ),
    counted=Counted("hidden key", operations="written",
                    anomalies="written - found_by_program", cost_ns="write_ns"),
    statements=(
        Statement("the writer finds what it wrote",
                  "all(0 < rounds.found_by_user == rounds.written)"),
        Statement("the program misses every one of these keys", "all(broken)"),
        Statement("no key is missed where the layout has no padding", "none(control)"),
        Statement("cured by clearing the padding", "none(fixed)"),
        Statement("a clean write beside it is found, and makes a second entry of the same key",
                  'all(0 < rounds(case="left-over").written '
                  '== rounds(case="left-over").found_after_repair '
                  '== rounds(case="left-over").entries_after_repair '
                  '- rounds(case="left-over").fields_after_repair)'),
    ),
    sentence="With left-over bytes in the padding the writer found "
    '{sum(rounds(case="left-over").found_by_user)} of its '
    '{sum(rounds(case="left-over").written)} keys, the program missed {broken}; without padding '
    "it missed {control}, with padding cleared {fixed}. A second, clean write brought the program "
    '{sum(rounds(case="left-over").found_after_repair)} of them and left '
    '{sum(rounds(case="left-over").entries_after_repair) '
    '- sum(rounds(case="left-over").fields_after_repair)} doubles behind.',
)  # fmt: skip
def padded_key(case: Case, *, keys: int) -> dict[str, Any]:
    """Write keys from memory that was used before, read them back, let a program read them.

    A hash map compares and hashes all bytes of a key (kernel/bpf/hashtab.c,
    ``htab_map_hash``), padding included. A writer in C that declares its key on the stack
    and sets the fields leaves in the padding what stood there; so does one here that fills
    a used buffer. Its own lookups repeat the same bytes and succeed.

    Parameters
    ----------
    case : Case
        Whether the key has padding, and whether the writer clears it.
    keys : int
        Keys in the map.

    Returns
    -------
    dict
        ``written``, ``found_by_user``, ``found_by_program``, ``entries`` in the map,
        ``entries_after_repair``, ``fields_after_repair`` (distinct keys by their fields) and
        ``found_after_repair`` (by the program), where the repair writes every key once more
        with cleared padding; ``write_ns`` (float64, mean). ``examples``: ``key`` as
        hexadecimal bytes, ``protocol``, ``address``.
    """
    padding = {"PADDED": 1} if case.get("padded", False) else {}
    with programs.load("padded_key", KEYS=keys, **padding) as loaded:
        return _measure(loaded, keys, cleared=case.get("cleared", False))


def _measure(loaded: BpfObject, keys: int, *, cleared: bool) -> dict[str, Any]:
    policy, reader = loaded.map("policy"), loaded.program("look_up_all")
    # Unseeded: each measurement finds other bytes left over.
    random = np.random.default_rng()
    written = [_filled(policy.key_dtype, address, cleared, random) for address in range(keys)]
    # As bytes: a key given by its fields would be packed by the lab, padding cleared.
    writes = [policy.updater(key, np.ones(1, policy.value_dtype)) for key in written]
    begun = time.monotonic_ns()
    refused = sum(write() < 0 for write in writes)
    write_ns = (time.monotonic_ns() - begun) / keys
    if refused:
        raise LabError(f"The kernel refused {refused} of {keys} writes to an empty map.")
    found_by_user = sum(policy.get(key) is not None for key in written)
    found_by_program = _found(loaded, reader)
    stored = _raw(policy.snapshot().keys)
    for address in range(keys):
        policy.update((_TCP, address), 1)
    after = policy.snapshot().keys
    fields = {(int(key["protocol"]), int(key["address"])) for key in after}
    examples = [_described(key, policy.key_dtype) for key in stored[:_EXAMPLES]]
    return {
        "written": keys,
        "found_by_user": found_by_user,
        "found_by_program": found_by_program,
        "entries": len(stored),
        "entries_after_repair": len(after),
        "fields_after_repair": len(fields),
        "found_after_repair": _found(loaded, reader),
        "write_ns": write_ns,
        "examples": pd.DataFrame(examples),
    }


def _filled(
    layout: np.dtype[np.void], address: int, cleared: bool, random: np.random.Generator
) -> bytes:
    """Key made by setting its two fields in a piece of memory that was used before."""
    left_over = random.integers(1, 256, layout.itemsize, dtype=np.uint8)
    if cleared:
        left_over[:] = 0
    key = left_over.view(layout)
    key["protocol"], key["address"] = _TCP, address
    return key.tobytes()


def _found(loaded: BpfObject, reader: programs.Program) -> int:
    """How many keys one run of the program finds."""
    counts = loaded.map("counts")
    before = int(counts.lookup(0)["found"])
    reader.test_run()
    return int(counts.lookup(0)["found"]) - before


def _raw(keys: npt.NDArray[np.void]) -> list[bytes]:
    """Bytes of each key; copying a key as a NumPy struct may leave its padding behind."""
    body, size = keys.tobytes(), keys.dtype.itemsize
    return [body[at : at + size] for at in range(0, len(body), size)]


def _described(key: bytes, layout: np.dtype[np.void]) -> dict[str, object]:
    fields = np.frombuffer(key, layout)[0]
    return {
        "key": key.hex(" "),
        "protocol": int(fields["protocol"]),
        "address": int(fields["address"]),
    }
