"""A key with padding bytes: user space finds what it wrote, the program does not."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import LabError
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import programs
from labkit.kernel.programs import Unit

_TCP = 6
_SETTINGS = (
    # variant, case, the key has padding, the writer clears it
    ("broken", "padding holds what stood in memory", True, False),
    ("control", "layout without padding", False, False),
    ("fixed", "padding cleared by the writer", True, True),
)


@experiment(
    "padded-key",
    number=4,
    family="stale-reads",
    question="Does a program find a key whose padding bytes the writer left as they were?",
    claims=("1.2a",),
    needs=("bpf", "compile", "test_run"),
    quick={"keys": 1_000, "rounds": 2},
    full={"keys": 4_000, "rounds": 8},
)
def padded_key(*, keys: int, rounds: int) -> Tables:
    """Write keys from memory that was used before, read them back, let a program look.

    A hash map compares and hashes all bytes of a key (kernel/bpf/hashtab.c,
    ``htab_map_hash``), padding included. A writer in C that declares its key on the stack
    and sets the fields leaves in the padding what stood there; so does one here that fills
    a used buffer. Its own lookups repeat the same bytes and succeed.

    Parameters
    ----------
    keys : int
        Keys in the map.
    rounds : int
        Rounds of every setting, in turns, each with other left-over bytes.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a lookup by the program of a key that was written,
        ``cost_ns`` the time of one write. ``rounds``: per setting and round ``variant``,
        ``case``, ``round``, ``written``, ``found_by_user``, ``found_by_program``,
        ``entries`` in the map, ``entries_after_repair``, ``fields_after_repair`` (distinct
        keys by their fields) and ``found_after_repair`` (by the program), where the repair
        writes every key once more with cleared padding; ``write_ns`` (float64).
        ``examples``: ``case``, ``key`` as hexadecimal bytes, ``protocol``, ``address``.
    """
    rows, examples = [], []
    random = np.random.default_rng(4)
    for turn in range(rounds):
        for variant, case, padded, cleared in _SETTINGS:
            say(f"round {turn + 1} of {rounds}: {case}")
            constants = {"KEYS": keys, **({"PADDED": 1} if padded else {})}
            with programs.load("padded_key", **constants) as unit:
                row, stored = _measure(unit, keys, cleared, random)
            rows.append({"variant": variant, "case": case, "round": turn, **row})
            if turn == 0:
                examples += [{"case": case, **_described(*key)} for key in stored[:4]]
    table = pd.DataFrame(rows)
    triad = Triad("hidden key")
    triad.add_cases(
        table,
        operations=table["written"],
        anomalies=table["written"] - table["found_by_program"],
        cost_ns=table["write_ns"],
    )
    return {"counts": triad.table(), "rounds": table, "examples": pd.DataFrame(examples)}


def _measure(
    unit: Unit, keys: int, cleared: bool, random: np.random.Generator
) -> tuple[dict[str, float], list[tuple[bytes, np.dtype[np.void]]]]:
    policy, reader = unit.map("policy"), unit.function("look_up_all")
    written = [_filled(policy.key_dtype, address, cleared, random) for address in range(keys)]
    # As bytes: a key given by its fields would be packed by the lab, padding cleared.
    writes = [policy.updater(key, np.ones(1, policy.value_dtype)) for key in written]
    begun = time.monotonic_ns()
    refused = sum(write() < 0 for write in writes)
    write_ns = (time.monotonic_ns() - begun) / keys
    if refused:
        raise LabError(f"The kernel refused {refused} of {keys} writes to an empty map.")
    found_by_user = sum(policy.get(key) is not None for key in written)
    found_by_program = _found(unit, reader)
    stored = _raw(policy.snapshot().keys)
    for address in range(keys):
        policy.update((_TCP, address), 1)
    after = policy.snapshot().keys
    fields = {(int(key["protocol"]), int(key["address"])) for key in after}
    return {
        "written": keys,
        "found_by_user": found_by_user,
        "found_by_program": found_by_program,
        "entries": len(stored),
        "entries_after_repair": len(after),
        "fields_after_repair": len(fields),
        "found_after_repair": _found(unit, reader),
        "write_ns": write_ns,
    }, [(key, policy.key_dtype) for key in stored]


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


def _found(unit: Unit, reader: programs.Function) -> int:
    """How many keys one run of the program finds."""
    counts = unit.map("counts")
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
