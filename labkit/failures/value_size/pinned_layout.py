"""A pinned map outlives the build that made it; the next build knows another struct."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import elf, libbpf, programs
from labkit.kernel.maps import Map
from labkit.kernel.pins import PinFolder
from labkit.kernel.programs import LoadFailed

_LAYOUTS = {"kept": 1, "grown": 2, "shrunk": 3, "reordered": 4}
_EVERY_FIELD = np.dtype(
    [("packets", "u8"), ("limit", "u4"), ("action", "u4"), ("burst", "u8"), ("expires", "u8")]
)
_VERSION = "layout version in the pin's name"
_ROOM_BYTES = 64  # for a value of any layout
_BEHIND = 0xEE  # what lies behind a value in the writer's memory

Values = npt.NDArray[Any]


@experiment(
    "pinned-layout",
    number=24,
    family="value-size",
    question="Who notices that a pinned map has values of another layout than the program?",
    claims=("2.4",),
    needs=("bpf", "compile", "clang", "hash", "bpffs_detached"),
    quick={"entries": 256, "seed": 24},
    full={"entries": 16_384, "seed": 24},
)
def pinned_layout(*, entries: int, seed: int) -> Tables:
    """Let builds with four layouts of one struct take over a pinned map, and read it.

    A map's value size is fixed when it is made. libbpf compares type, sizes and flags of
    a pinned map with those of the object file and refuses (``bpf_object__reuse_map``:
    "parameter mismatch"). bcc's ``BPF_TABLE_PINNED`` opens what is pinned and compares
    nothing; only a program that reads past the value is refused, by the verifier. Fields
    that changed places in a struct of the same size are seen by nobody.

    Parameters
    ----------
    entries : int
        Policies in the map, all written by the old build and again by the new one.
    seed : int
        Of the random policies.

    Returns
    -------
    dict of DataFrame
        ``counts``, where an operation is one policy decoded by one build, with
        ``cost_ns`` of copying an entry into the new map where that is the cure;
        ``builds``: one row per way to take the map over and layout with columns
        ``variant``, ``case`` (the way), ``layout``, ``accepted`` (1 or 0), ``map_bytes``,
        ``struct_bytes``, ``old_reads``, ``old_wrong`` (policies that the old build decodes
        to other fields than were meant for it), ``new_reads``, ``new_wrong`` (the same for
        the new build; all int64) and ``copy_ns`` (float64, per entry); ``programs``: one
        row per program of the new, grown build with columns ``field``, ``map_bytes``,
        ``loads`` (1 or 0) and ``answer`` (text).
    """
    random = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    tried: list[dict[str, object]] = []
    with PinFolder() as pins, _build(pins, "kept", entries, version=1) as old_build:
        old = old_build.map("policies")
        for layout, number in _LAYOUTS.items():
            say(f"the struct is {layout}: {entries} policies, taken over in four ways")
            with _build(pins, layout, entries, version=1) as by_bcc:
                case = _Case(pins, layout, entries, by_bcc)
                for name, take in (
                    ("bcc", _take_by_bcc),
                    ("libbpf", _take_by_libbpf),
                    ("labkit Map", _take_by_map),
                ):
                    rows.append(_measured(name, layout, old, case, take, random))
                if layout == "grown":
                    tried += _programs(by_bcc, old.value_size)
            with _build(pins, layout, entries, version=number) as by_version:
                case = _Case(pins, layout, entries, by_version)
                rows.append(_measured(_VERSION, layout, old, case, _take_by_version, random))
                if layout == "grown":
                    tried += _programs(by_version, by_version.map("policies").value_size)
    builds = pd.DataFrame(rows)
    return {"counts": _counts(builds), "builds": builds, "programs": pd.DataFrame(tried)}


def _build(pins: PinFolder, layout: str, entries: int, version: int) -> programs.Unit:
    """A build by bcc, whose map is pinned under a name with a version."""
    return programs.load(
        "pinned_layout",
        LAYOUT=_LAYOUTS[layout],
        ENTRIES=entries,
        PIN=pins.path(f"policies_v{version}"),
    )


@dataclass(frozen=True)
class _Case:
    """A new build, and where it finds things."""

    pins: PinFolder
    layout: str
    entries: int
    unit: programs.Unit

    @property
    def struct(self) -> np.dtype[Any]:
        """The struct as this build knows it."""
        struct: np.dtype[Any] = np.dtype(self.unit.table("policies").Leaf)
        return struct


@dataclass(frozen=True)
class _Taken:
    """What became of the attempt to take a map over and write new policies into it.

    ``read`` pairs what the new build reads with what it should read; empty where the map
    was refused. ``apart`` is true where the new build writes into a map of its own.
    """

    accepted: bool
    map_bytes: int
    read: tuple[tuple[Values, Values], ...] = ()
    apart: bool = False
    copy_ns: float = np.nan


_Take = Callable[[_Case, Map, Values, Values], _Taken]


def _measured(
    name: str, layout: str, old: Map, case: _Case, take: _Take, random: np.random.Generator
) -> dict[str, object]:
    before, meant = _policies(random, case.entries), _policies(random, case.entries)
    old.update_many(np.arange(case.entries, dtype=np.uint32), _as(old.value_dtype, before))
    taken = take(case, old, before, meant)
    # What the old build should find: what the new one meant, but in the fields that the new
    # one does not know, or where it wrote elsewhere or nothing, what was there before.
    expected = before.copy()
    if taken.accepted and not taken.apart:
        for field in case.struct.names or ():
            expected[field] = meant[field]
    return {
        "variant": _variant(name, layout),
        "case": name,
        "layout": layout,
        "accepted": int(taken.accepted),
        "map_bytes": taken.map_bytes,
        "struct_bytes": case.struct.itemsize,
        "old_reads": case.entries,
        "old_wrong": _wrong(_in_order(old), expected),
        "new_reads": sum(len(seen) for seen, _ in taken.read),
        "new_wrong": sum(_wrong(seen, should) for seen, should in taken.read),
        "copy_ns": taken.copy_ns,
    }


def _variant(name: str, layout: str) -> str:
    if layout == "kept":
        return "control"
    # Of two structs of the same size nobody who compares sizes knows one from the other.
    cured = name == _VERSION or (name != "bcc" and layout != "reordered")
    return "fixed" if cured else "broken"


def _take_by_bcc(case: _Case, old: Map, before: Values, meant: Values) -> _Taken:
    table, struct = case.unit.table("policies"), case.struct
    room = np.zeros(_ROOM_BYTES, np.uint8)
    leaf = table.Leaf.from_buffer(room.data)
    look_up = libbpf.api().bpf_map_lookup_elem
    for key, value in enumerate(_as(struct, meant)):
        room[:] = _BEHIND
        room[: struct.itemsize] = np.frombuffer(value.tobytes(), np.uint8)
        table[ctypes.c_uint32(key)] = leaf
    seen = np.zeros(case.entries, struct)
    for key in range(case.entries):
        room[:] = 0  # as a new Leaf is
        at = ctypes.c_uint32(key)
        libbpf.checked(
            look_up(table.map_fd, ctypes.addressof(at), room.ctypes.data), "reading a policy"
        )
        seen[key] = room[: struct.itemsize].view(struct)[0]
    with Map.from_fd(table.map_fd) as taken:
        return _Taken(taken.id == old.id, taken.value_size, ((seen, _as(struct, meant)),))


def _take_by_libbpf(case: _Case, old: Map, before: Values, meant: Values) -> _Taken:
    name = "pinned_layout_libbpf"
    body = elf.compile(name, LAYOUT=_LAYOUTS[case.layout], ENTRIES=case.entries)
    try:
        loaded = elf.load(name, body, pins={"policies": case.pins.path("policies_v1")})
    except LoadFailed:
        return _Taken(False, old.value_size)
    with loaded:
        return _written(loaded.map("policies", value=case.struct), meant)


def _take_by_map(case: _Case, old: Map, before: Values, meant: Values) -> _Taken:
    try:
        opened = Map.from_pin(case.pins.path("policies_v1"), value=case.struct)
    except BadInput:
        return _Taken(False, old.value_size)
    with opened:
        return _written(opened, meant)


def _take_by_version(case: _Case, old: Map, before: Values, meant: Values) -> _Taken:
    """Copy what the old map holds into the one of this layout, then write there."""
    table = case.unit.map("policies")
    if table.id == old.id:
        return _written(table, meant)
    begun = time.perf_counter_ns()
    found = old.snapshot()
    table.update_many(found.keys, _as(table.value_dtype, found.values))
    spent = time.perf_counter_ns() - begun
    known = [
        name for name in table.value_dtype.names or () if name in (old.value_dtype.names or ())
    ]
    copied = (_in_order(table)[known], before[known])
    written = _written(table, meant)
    return _Taken(
        True, table.value_size, (copied, *written.read), apart=True, copy_ns=spent / len(found)
    )


def _written(table: Map, meant: Values) -> _Taken:
    values = _as(table.value_dtype, meant)
    table.update_many(np.arange(len(meant), dtype=np.uint32), values)
    return _Taken(True, table.value_size, ((_in_order(table), values),))


def _policies(random: np.random.Generator, entries: int) -> Values:
    """Random policies with every field that any layout has; none is zero."""
    policies = np.zeros(entries, _EVERY_FIELD)
    for field in _EVERY_FIELD.names or ():
        policies[field] = random.integers(1, 1 << 32, entries)
    return policies


def _as(struct: np.dtype[Any], policies: Values) -> Values:
    """The fields that a struct has and the policies have, the rest zero."""
    out = np.zeros(len(policies), struct)
    for field in set(struct.names or ()) & set(policies.dtype.names or ()):
        out[field] = policies[field]
    return out


def _in_order(table: Map) -> Values:
    found = table.snapshot()
    return np.asarray(found.values[np.argsort(found.keys)])


def _wrong(seen: Values, expected: Values) -> int:
    """How many of the policies have a field that is not as expected."""
    differs = np.zeros(len(seen), bool)
    for field in seen.dtype.names or ():
        differs |= seen[field] != expected[field]
    return int(differs.sum())


def _programs(unit: programs.Unit, map_bytes: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for field in ("limit", "expires"):
        answer = ""
        try:
            unit.function(f"read_{field}")
        except LoadFailed as error:
            answer = str(error)
        rows.append(
            {"field": field, "map_bytes": map_bytes, "loads": int(not answer), "answer": answer}
        )
    return rows


def _counts(builds: pd.DataFrame) -> pd.DataFrame:
    triad = Triad("policy misread")
    for row in builds.to_dict("records"):
        triad.add(
            row["variant"],
            case=f"{row['case']}, struct {row['layout']}",
            operations=row["old_reads"] + row["new_reads"],
            anomalies=row["old_wrong"] + row["new_wrong"],
            cost_ns=row["copy_ns"],
        )
    return triad.table()
