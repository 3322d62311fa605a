"""bcc hands the kernel an address, never a length: what of a wrong size ends up in the map."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import BadInput
from labkit.figures import Axes, style
from labkit.kernel import programs
from labkit.kernel.maps import Map
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say
from labkit.runs import Run

_KEY = 0
_TENANTS = 4  # identifiers that agree in their low 32 bits


def _derived(tables: Tables) -> Tables:
    """The counts, and by how many bytes each leaf is past the map's value size.

    In the writes by bcc of a wrong size with the bytes that one of them lost, or took from its
    neighbours; in the writes by the cures with how many were refused.
    """
    sizes, keys = tables["sizes"], tables["keys"]
    both = pd.concat([sizes, keys.rename(columns={"identifiers": "writes"})])
    counted = Counted("wrong value", operations="writes", anomalies="wrong", cost_ns="write_ns")
    exact = sizes.loc[sizes["case"] == "exact-leaf", "leaf_bytes"].iloc[0]
    leaves = sizes.assign(
        past=sizes["leaf_bytes"] - exact,
        lost=sizes["lost_bytes"] / sizes["writes"],
        foreign=sizes["foreign_bytes"] / sizes["writes"],
    )
    return {
        "counts": counted.table(both),
        "ill_sized": leaves[leaves["variant"] == "broken"],
        "cured": leaves[leaves["variant"] == "fixed"],
    }


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw how many bytes of each write went wrong, for every size of the leaf."""
    ax = style.axes(ax)
    value_bytes = int(str(run.parameters["value_bytes"]))
    sizes = run.table("sizes")
    broken = sizes[sizes["variant"] == "broken"]
    for column, label, side, number in (
        ("foreign_bytes", "neighbouring memory stored", broken["leaf_bytes"] < value_bytes, 3),
        ("lost_bytes", "tail lost", broken["leaf_bytes"] > value_bytes, 1),
    ):
        rows = broken[side]
        per_write = rows[column] / rows["writes"]
        ax.plot(rows["leaf_bytes"], per_write, **style.look(number).line(), label=f"bcc: {label}")
    control = sizes[sizes["case"] == "exact-leaf"]
    wrong = (control["lost_bytes"] + control["foreign_bytes"]) / control["writes"]
    ax.plot(
        control["leaf_bytes"], wrong, **style.VARIANT["control"].points(), label="exact leaf",
        zorder=3,
    )  # fmt: skip
    refused = sizes[(sizes["case"] == "map") & (sizes["refused"] == sizes["writes"])]
    stored_wrongly = refused["wrong"] / refused["writes"]
    ax.plot(
        refused["leaf_bytes"], stored_wrongly, **style.VARIANT["fixed"].points(), mfc="white",
        label="labkit Map: refused",
    )  # fmt: skip
    ax.axvline(value_bytes, color=style.GREY, linewidth=0.8, linestyle=":")
    ax.set_xlabel(f"size of the leaf, bytes (value size of the map: {value_bytes})")
    ax.set_ylabel("wrong bytes per write")
    ax.set_ylim(top=1.55 * max(1.0, ax.get_ylim()[1]))
    ax.legend(loc="upper right", handlelength=2.4)
    return ax


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
    cases=(
        Case("broken", "too-big", "leaf too big"),
        Case("broken", "too-small", "leaf too small"),
        Case("control", "exact-leaf", "exact leaf"),
        Case("fixed", "checked", "bcc behind a check of sizeof, any leaf"),
        Case("fixed", "map", "labkit Map, any leaf"),
        Case("broken", "wide-key", "too wide key, bcc"),
        Case("control", "exact-key", "exact key, bcc"),
        Case("fixed", "map-key", "too wide key, labkit Map"),
    ),
    derive=_derived,
    statements=(
        Statement("bcc raises for no value of a wrong size",
                  'none(sizes(writes > 0, variant="broken").refused > 0)'),
        Statement("of a leaf that is too big exactly the bytes past the map's value size are lost",
                  'all(broken["too-big"]) '
                  'and all(ill_sized(past > 0).lost == ill_sized(past > 0).past) '
                  'and none(ill_sized(past > 0).foreign > 0)'),
        Statement("a leaf that is too small is filled up with exactly what lies behind it in "
                  "memory",
                  'all(broken["too-small"]) '
                  'and all(ill_sized(past < 0).foreign == -ill_sized(past < 0).past) '
                  'and none(ill_sized(past < 0).lost > 0)'),
        Statement("a key that is too wide loses its upper part, and entries fall onto each other",
                  'keys(case="wide-key").identifiers - keys(case="wide-key").entries == '
                  'keys(case="wide-key").wrong > 0'),
        Statement("values and keys of the exact size are stored", "none(control)"),
        Statement("no cure lets a wrong value be stored", "none(fixed)"),
        Statement("a check of sizeof, and labkit's Map, refuse every value of a wrong size and no "
                  "other", 'all(cured(past != 0).refused == cured(past != 0).writes) '
                  'and none(cured(past == 0).refused > 0)'),
        Statement("labkit's Map refuses every identifier that does not fit the key",
                  'keys(case="map-key").identifiers - keys(case="map-key").entries == '
                  'keys(case="map-key").refused > 0'),
    ),
    sentence="bcc stored every value of a wrong size without an error: "
    '{sum(sizes(case="too-big").lost_bytes)} bytes were cut off in {broken["too-big"].operations} '
    'writes that were too big, and {sum(sizes(case="too-small").foreign_bytes)} bytes of '
    'neighbouring memory went into the map in {broken["too-small"].operations} that were too '
    'small; {broken["wide-key"]} identifiers shared an entry because the key was too narrow. '
    "A write of the right size took {us(control[\"exact-leaf\"].cost_ns)}, "
    '{us(fixed["checked"].cost_ns)} with a check of sizeof before it, and '
    "{us(fixed[\"map\"].cost_ns)} by labkit's Map, all in Python.",
    figure=_figure,
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
        ``sizes``: one row per writer and size with columns ``variant``, ``case``, ``leaf_bytes``,
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
    with programs.load_by_bcc(
        "bcc_leaf_size", VALUE_BYTES=value_bytes, KEYS=_TENANTS * trials
    ) as loaded:
        say(f"{trials} values of each of {len(leaf_bytes)} sizes, by three writers")
        sizes = _write_values(loaded, value_bytes, leaf_bytes, trials, random)
        say(f"{_TENANTS * trials} identifiers of 64 bits as keys of 32 and of 64")
        keys = _write_keys(loaded, trials, random)
    return {"sizes": sizes, "keys": keys}


def _write_values(
    loaded: programs.BccObject,
    value_bytes: int,
    leaf_bytes: list[int],
    trials: int,
    random: np.random.Generator,
) -> pd.DataFrame:
    table, checked = loaded.table("values"), loaded.map("values", value=f"V{value_bytes}")
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
        plain = (
            ("control", "exact-leaf")
            if size == value_bytes
            else ("broken", "too-big" if size > value_bytes else "too-small")
        )
        for (variant, case), write in (
            (plain, by_bcc),
            (("fixed", "checked"), by_bcc_with_check),
            (("fixed", "map"), by_map),
        ):
            rows.append({"variant": variant, "case": case, **measured(write, size)})
    return pd.DataFrame(rows)


def _write_keys(
    loaded: programs.BccObject, trials: int, random: np.random.Generator
) -> pd.DataFrame:
    low = random.choice(1 << 32, trials, replace=False).astype(np.uint64)
    tenant = np.arange(_TENANTS, dtype=np.uint64) << np.uint64(32)
    identifiers: npt.NDArray[np.uint64] = (tenant[:, None] | low[None, :]).reshape(-1)

    def by_bcc(name: str) -> tuple[int, int]:
        table, wrong = loaded.table(name), 0
        for one in identifiers.tolist():
            table[ctypes.c_uint64(one)] = ctypes.c_uint64(one)
        for one in identifiers.tolist():
            wrong += table[ctypes.c_uint64(one)].value != one
        return 0, wrong

    def by_map(name: str) -> tuple[int, int]:
        table, refused = loaded.map(name), 0
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
        ("broken", "wide-key", "by_narrow_key", by_bcc),
        ("control", "exact-key", "by_wide_key", by_bcc),
        ("fixed", "map-key", "by_narrow_key", by_map),
    ):
        refused, wrong = write(name)
        with Map.from_fd(loaded.table(name).map_fd) as table:
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
