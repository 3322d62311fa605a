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

from labkit.errors import BadInput
from labkit.kernel import elf, libbpf, programs
from labkit.kernel.compiler import LoadFailed
from labkit.kernel.maps import Map
from labkit.kernel.pins import PinFolder
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say

_LAYOUTS = {"kept": 1, "grown": 2, "shrunk": 3, "reordered": 4}
_EVERY_FIELD = np.dtype(
    [("packets", "u8"), ("limit", "u4"), ("action", "u4"), ("burst", "u8"), ("expires", "u8")]
)
_WAYS = {
    "bcc": "bcc",
    "libbpf": "libbpf",
    "map": "labkit Map",
    "version": "layout version in the pin's name",
}
_REACH_BYTES = {"limit": 12, "expires": 32}  # of the grown struct, up to the end of a field
_ROOM_BYTES = 64  # for a value of any layout
_BEHIND = 0xEE  # what lies behind a value in the writer's memory

Values = npt.NDArray[Any]


def _case(way: str, layout: str) -> Case:
    if layout == "kept":
        variant = "control"
    else:
        # Of two structs of the same size nobody who compares sizes knows one from the other.
        cured = way == "version" or (way != "bcc" and layout != "reordered")
        variant = "fixed" if cured else "broken"
    label = f"{_WAYS[way]}, struct {layout}"
    return Case(variant, f"{way}-{layout}", label, way=way, layout=layout)


_CASES = {(way, layout): _case(way, layout) for layout in _LAYOUTS for way in _WAYS}


def _derived(tables: Tables) -> Tables:
    """Whether a program of the grown build reads past the value of its map."""
    programs = tables["programs"]
    past = programs["field"].map(_REACH_BYTES) > programs["map_bytes"]
    return {"tried": programs.assign(past=past)}


@experiment(
    "pinned-layout",
    number=24,
    family="value-size",
    question="Who notices that a pinned map has values of another layout than the program?",
    claims=("2.4",),
    needs=("bpf", "compile", "clang", "hash", "bpffs_detached"),
    quick={"entries": 256, "seed": 24},
    full={"entries": 16_384, "seed": 24},
    cases=tuple(_CASES.values()),
    counted=Counted("policy misread", operations="old_reads + new_reads",
                    anomalies="old_wrong + new_wrong", cost_ns="copy_ns", of="builds"),
    derive=_derived,
    statements=(
        Statement("bcc takes a pinned map of any layout without an error",
                  'all(builds(way="bcc").accepted == 1)'),
        Statement("this leaves one of the two builds with policies that it misreads",
                  "some(broken)"),
        Statement("where the struct grew, the new build writes fields that are not stored",
                  'builds(case="bcc-grown").new_wrong == builds(case="bcc-grown").new_reads > 0 '
                  'and builds(case="bcc-grown").old_wrong == 0'),
        Statement("where it shrank, the old build decodes wrong fields",
                  'builds(case="bcc-shrunk").old_wrong == builds(case="bcc-shrunk").old_reads > 0'),
        Statement("libbpf and labkit's Map refuse a map whose values have another size",
                  'all(builds(map_bytes != struct_bytes, way=("libbpf", "map")).accepted == 0)'),
        Statement("nobody who compares sizes sees fields that changed places",
                  'all(builds(case=("libbpf-reordered", "map-reordered")).accepted == 1) '
                  'and all(builds(case=("libbpf-reordered", "map-reordered")).old_wrong '
                  '== builds(case=("libbpf-reordered", "map-reordered")).old_reads)'),
        Statement("the verifier rejects the program that reads past the pinned value, and only "
                  "that", "all(tried(past=1).loads == 0) and all(tried(past=0).loads == 1)"),
        Statement("with one layout everybody reads what was meant", "none(control)"),
        Statement("whoever finds the map by its layout version gets one",
                  'all(builds(way="version").accepted == 1)'),
        Statement("no cure lets a policy be misread", "none(fixed)"),
    ),
    sentence='bcc took the pinned map for each of {rows(builds(layout != "kept", accepted == 1, '
    'way="bcc"))} changed layouts: where the struct grew, the new build misread '
    '{builds(case="bcc-grown").new_wrong} policies, where it shrank, the old one '
    "{builds(case=\"bcc-shrunk\").old_wrong}. libbpf and labkit's Map refused both, but let pass a "
    "struct of the same size whose fields changed places. A layout version in the pin's name, and "
    'a copy at {us(median(builds(layout != "kept", way="version").copy_ns))} an entry, left '
    '{fixed(way="version")} misread.',
)  # fmt: skip
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
        ``builds``: one row per way to take the map over and layout with columns
        ``variant``, ``case``, ``way``, ``layout``, ``accepted`` (1 or 0), ``map_bytes``,
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
                build = _Build(pins, layout, entries, by_bcc)
                for way, take in (
                    ("bcc", _take_by_bcc),
                    ("libbpf", _take_by_libbpf),
                    ("map", _take_by_map),
                ):
                    rows.append(_measured(way, layout, old, build, take, random))
                if layout == "grown":
                    tried += _programs(by_bcc, old.value_size)
            with _build(pins, layout, entries, version=number) as by_version:
                build = _Build(pins, layout, entries, by_version)
                rows.append(_measured("version", layout, old, build, _take_by_version, random))
                if layout == "grown":
                    tried += _programs(by_version, by_version.map("policies").value_size)
    return {"builds": pd.DataFrame(rows), "programs": pd.DataFrame(tried)}


def _build(pins: PinFolder, layout: str, entries: int, version: int) -> programs.BccObject:
    """A build by bcc, whose map is pinned under a name with a version."""
    return programs.load_by_bcc(
        "pinned_layout",
        LAYOUT=_LAYOUTS[layout],
        ENTRIES=entries,
        PIN=pins.path(f"policies_v{version}"),
    )


@dataclass(frozen=True)
class _Build:
    """A new build, and where it finds things."""

    pins: PinFolder
    layout: str
    entries: int
    loaded: programs.BccObject

    @property
    def struct(self) -> np.dtype[Any]:
        """The struct as this build knows it."""
        struct: np.dtype[Any] = np.dtype(self.loaded.table("policies").Leaf)
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


_Take = Callable[[_Build, Map, Values, Values], _Taken]


def _measured(
    way: str, layout: str, old: Map, build: _Build, take: _Take, random: np.random.Generator
) -> dict[str, object]:
    before, meant = _policies(random, build.entries), _policies(random, build.entries)
    old.update_many(np.arange(build.entries, dtype=np.uint32), _as(old.value_dtype, before))
    taken = take(build, old, before, meant)
    # What the old build should find: what the new one meant, but in the fields that the new
    # one does not know, or where it wrote elsewhere or nothing, what was there before.
    expected = before.copy()
    if taken.accepted and not taken.apart:
        for field in build.struct.names or ():
            expected[field] = meant[field]
    return {
        "variant": _CASES[way, layout].variant,
        "case": _CASES[way, layout].id,
        "way": way,
        "layout": layout,
        "accepted": int(taken.accepted),
        "map_bytes": taken.map_bytes,
        "struct_bytes": build.struct.itemsize,
        "old_reads": build.entries,
        "old_wrong": _wrong(_in_order(old), expected),
        "new_reads": sum(len(seen) for seen, _ in taken.read),
        "new_wrong": sum(_wrong(seen, should) for seen, should in taken.read),
        "copy_ns": taken.copy_ns,
    }


def _take_by_bcc(build: _Build, old: Map, before: Values, meant: Values) -> _Taken:
    table, struct = build.loaded.table("policies"), build.struct
    room = np.zeros(_ROOM_BYTES, np.uint8)
    leaf = table.Leaf.from_buffer(room.data)
    look_up = libbpf.api().bpf_map_lookup_elem
    for key, value in enumerate(_as(struct, meant)):
        room[:] = _BEHIND
        room[: struct.itemsize] = np.frombuffer(value.tobytes(), np.uint8)
        table[ctypes.c_uint32(key)] = leaf
    seen = np.zeros(build.entries, struct)
    for key in range(build.entries):
        room[:] = 0  # as a new Leaf is
        at = ctypes.c_uint32(key)
        libbpf.checked(
            look_up(table.map_fd, ctypes.addressof(at), room.ctypes.data), "reading a policy"
        )
        seen[key] = room[: struct.itemsize].view(struct)[0]
    with Map.from_fd(table.map_fd) as taken:
        return _Taken(taken.id == old.id, taken.value_size, ((seen, _as(struct, meant)),))


def _take_by_libbpf(build: _Build, old: Map, before: Values, meant: Values) -> _Taken:
    name = "pinned_layout_libbpf"
    body = elf.compile(name, LAYOUT=_LAYOUTS[build.layout], ENTRIES=build.entries)
    try:
        loaded = elf.load(name, body, pins={"policies": build.pins.path("policies_v1")})
    except LoadFailed:
        return _Taken(False, old.value_size)
    with loaded:
        return _written(loaded.map("policies", value=build.struct), meant)


def _take_by_map(build: _Build, old: Map, before: Values, meant: Values) -> _Taken:
    try:
        opened = Map.from_pin(build.pins.path("policies_v1"), value=build.struct)
    except BadInput:
        return _Taken(False, old.value_size)
    with opened:
        return _written(opened, meant)


def _take_by_version(build: _Build, old: Map, before: Values, meant: Values) -> _Taken:
    """Copy what the old map holds into the one of this layout, then write there."""
    table = build.loaded.map("policies")
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


def _programs(loaded: programs.BccObject, map_bytes: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for field in ("limit", "expires"):
        answer = ""
        try:
            loaded.program(f"read_{field}")
        except LoadFailed as error:
            answer = str(error)
        rows.append(
            {"field": field, "map_bytes": map_bytes, "loads": int(not answer), "answer": answer}
        )
    return rows
