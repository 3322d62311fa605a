"""bcc hands the kernel an address, never a length: what of a wrong size ends up in the map."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import programs
from labkit.kernel.maps import Map

_KEY = 0
_TENANTS = 4  # identifiers that agree in their low 32 bits


@experiment(
    "bcc-leaf-size",
    number=22,
    family="value-size",
    question="What does bcc store for a value or key whose size is not the map's?",
    claims=("2.2d", "2.4"),
    needs=("bpf", "compile"),
    quick={
        "value_bytes": 64,
        "leaf_bytes": [8, 16, 32, 48, 60, 64, 68, 80, 96, 128],
        "trials": 400,
        "seed": 22,
    },
    full={
        "value_bytes": 64,
        "leaf_bytes": [1, 4, 8, 16, 24, 32, 40, 48, 56, 60, 63, 64, 65, 68, 72, 80, 96, 112, 128],
        "trials": 10_000,
        "seed": 22,
    },
)  # fmt: skip
def bcc_leaf_size(*, value_bytes: int, leaf_bytes: list[int], trials: int, seed: int) -> Tables:
    """Write random values of many sizes into a map of one value size, and read them back.

    ``bpf(2)`` takes pointers without lengths: the kernel copies ``value_size`` bytes from
    wherever the value begins (kernel/bpf/syscall.c, ``map_update_elem``), and bcc's
    ``__setitem__`` passes ``ctypes.byref(leaf)`` without a look at its size. Each value
    here is a field in a larger record, as it is in a real program, so what stands behind
    it is known and what the map took of it can be counted.

    Parameters
    ----------
    value_bytes : int
        Value size of the map, bytes.
    leaf_bytes : list of int
        Sizes of what the writer holds, bytes; the map's own size must be one of them.
    trials : int
        Writes of every size by every writer, and identifiers in the key test.
    seed : int
        Of the random bytes.

    Returns
    -------
    dict of DataFrame
        ``counts``, with ``cost_ns`` of a write of the right size from Python; ``sizes``:
        one row per writer and size with columns ``variant``, ``case``, ``leaf_bytes``,
        ``writes``, ``refused``, ``wrong`` (the map holds another value than was given),
        ``lost_bytes`` (given, not stored), ``foreign_bytes`` (stored, not given; all
        int64) and ``write_ns`` (float64, median); ``keys``: one
        row per writer with columns ``variant``, ``case``, ``identifiers``, ``refused``,
        ``entries`` (in the map afterwards), ``wrong`` (lookups by identifier that return
        another's value; all int64).
    """
    if value_bytes not in leaf_bytes:
        raise BadInput(f"leaf_bytes of bcc-leaf-size must have value_bytes, {value_bytes}, in it.")
    random = np.random.default_rng(seed)
    with programs.load("bcc_leaf_size", VALUE_BYTES=value_bytes, KEYS=_TENANTS * trials) as unit:
        say(f"{trials} values of each of {len(leaf_bytes)} sizes, by three writers")
        sizes = _write_values(unit, value_bytes, leaf_bytes, trials, random)
        say(f"{_TENANTS * trials} identifiers of 64 bits as keys of 32 and of 64")
        keys = _write_keys(unit, trials, random)
    return {"counts": _counts(sizes, keys, value_bytes), "sizes": sizes, "keys": keys}


def _write_values(
    unit: programs.Unit,
    value_bytes: int,
    leaf_bytes: list[int],
    trials: int,
    random: np.random.Generator,
) -> pd.DataFrame:
    table, checked = unit.table("values"), unit.map("values", value=f"V{value_bytes}")
    stored = np.zeros(value_bytes, np.uint8)
    checked.update(_KEY, bytes(value_bytes))
    read = checked.reader(_KEY, stored)
    key = ctypes.c_uint32(_KEY)

    def by_bcc(leaf: Any) -> None:
        table[key] = leaf

    def by_bcc_with_check(leaf: Any) -> None:
        if ctypes.sizeof(leaf) != ctypes.sizeof(table.Leaf):
            raise BadInput("This is no value of the table.")
        table[key] = leaf

    def by_map(leaf: Any) -> None:
        checked.update(_KEY, bytes(leaf))

    def measured(write: Callable[[Any], None], size: int) -> dict[str, object]:
        # The record that the value is a field of: what follows it in memory is known.
        record = np.zeros(size + value_bytes, np.uint8)
        leaf = (ctypes.c_ubyte * size).from_buffer(record.data)
        kept = min(size, value_bytes)
        refused = wrong = lost = foreign = 0
        spent = []
        for given in random.integers(1, 256, (trials, len(record)), np.uint8):
            record[:] = given
            begun = time.perf_counter_ns()
            try:
                write(leaf)
            except BadInput:
                refused += 1
                continue
            spent.append(time.perf_counter_ns() - begun)
            read()
            lost_here = size - int(np.count_nonzero(stored[:kept] == given[:kept]))
            foreign_here = int(np.count_nonzero(stored[kept:] == given[kept:value_bytes]))
            wrong += lost_here + foreign_here > 0
            lost, foreign = lost + lost_here, foreign + foreign_here
        return {
            "leaf_bytes": size,
            "writes": trials,
            "refused": refused,
            "wrong": wrong,
            "lost_bytes": lost,
            "foreign_bytes": foreign,
            "write_ns": float(np.median(spent)) if spent else np.nan,
        }

    rows = []
    for size in leaf_bytes:
        plain = "control" if size == value_bytes else "broken"
        for variant, case, write in (
            (plain, "bcc", by_bcc),
            ("fixed", "bcc behind a check of sizeof", by_bcc_with_check),
            ("fixed", "labkit Map", by_map),
        ):
            rows.append({"variant": variant, "case": case, **measured(write, size)})
    return pd.DataFrame(rows)


def _write_keys(unit: programs.Unit, trials: int, random: np.random.Generator) -> pd.DataFrame:
    low = random.choice(1 << 32, trials, replace=False).astype(np.uint64)
    tenant = np.arange(_TENANTS, dtype=np.uint64) << np.uint64(32)
    identifiers: npt.NDArray[np.uint64] = (tenant[:, None] | low[None, :]).reshape(-1)

    def by_bcc(name: str) -> tuple[int, int]:
        table, wrong = unit.table(name), 0
        for one in identifiers.tolist():
            table[ctypes.c_uint64(one)] = ctypes.c_uint64(one)
        for one in identifiers.tolist():
            wrong += table[ctypes.c_uint64(one)].value != one
        return 0, wrong

    def by_map(name: str) -> tuple[int, int]:
        table, refused = unit.map(name), 0
        table.delete_many(table.snapshot().keys)
        for one in identifiers.tolist():
            try:
                table.update(one, one)
            except BadInput:
                refused += 1
        seen = table.snapshot()
        return refused, int(np.count_nonzero(seen.keys.astype(np.uint64) != seen.values))

    rows = []
    for variant, case, name, write in (
        ("broken", "bcc", "by_narrow_key", by_bcc),
        ("control", "bcc", "by_wide_key", by_bcc),
        ("fixed", "labkit Map", "by_narrow_key", by_map),
    ):
        refused, wrong = write(name)
        with Map.from_fd(unit.table(name).map_fd) as table:
            entries = len(table.snapshot())
        rows.append(
            {
                "variant": variant,
                "case": case,
                "identifiers": len(identifiers),
                "refused": refused,
                "entries": entries,
                "wrong": wrong,
            }
        )
    return pd.DataFrame(rows)


def _counts(sizes: pd.DataFrame, keys: pd.DataFrame, value_bytes: int) -> pd.DataFrame:
    triad = Triad("truncated value")
    for variant, case, selected, anomaly in (
        ("broken", "leaf too big", sizes["leaf_bytes"] > value_bytes, "truncated value"),
        ("broken", "leaf too small", sizes["leaf_bytes"] < value_bytes, "foreign bytes"),
        ("control", "exact leaf", sizes["leaf_bytes"] == value_bytes, "truncated value"),
    ):
        _add(triad, variant, case, sizes[selected & (sizes["variant"] == variant)], anomaly)
    for writer, group in sizes[sizes["variant"] == "fixed"].groupby("case", sort=False):
        _add(triad, "fixed", f"{writer}, any leaf", group, "truncated value")
    for row in keys.to_dict("records"):
        triad.add(
            row["variant"],
            case=f"{'exact' if row['variant'] == 'control' else 'too wide'} key, {row['case']}",
            operations=row["identifiers"],
            anomalies=row["wrong"],
            anomaly="value of another key",
        )
    return triad.table()


def _add(triad: Triad, variant: str, case: str, rows: pd.DataFrame, anomaly: str) -> None:
    triad.add(
        variant,
        case=case,
        operations=int(rows["writes"].sum()),
        anomalies=int(rows["wrong"].sum()),
        anomaly=anomaly,
        cost_ns=float(rows["write_ns"].median()),
    )
