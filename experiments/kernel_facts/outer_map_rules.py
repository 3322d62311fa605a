"""Who may put a map into an outer map, and which maps it takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from labkit.kernel import programs
from labkit.kernel.compiler import LoadFailed
from labkit.kernel.libbpf import MapFlag, MapKind
from labkit.kernel.maps import Map, MapError
from labkit.kernel.programs import BpfObject
from labkit.lab.experiment import Case, Statement, Tables, experiment
from labkit.runs import Triad

_ENTRIES = 8
_CASES = (
    Case("broken", "by-program", "a program updates the outer map"),
    Case("control", "plain-map", "a program updates a map of values"),
    Case("broken", "other-shape", "user space offers an inner map of another shape"),
    Case("fixed", "fits", "user space offers an inner map that fits"),
)


@dataclass(frozen=True)
class _Inner:
    """A map that is offered to an outer map whose template has `_ENTRIES` u64."""

    name: str
    template: MapKind
    fits: bool
    kind: MapKind
    value: str = "u8"
    entries: int = _ENTRIES
    flags: MapFlag = MapFlag.NONE
    template_flags: MapFlag = MapFlag.NONE


_INNERS = (
    _Inner("array like the template", MapKind.ARRAY, True, MapKind.ARRAY),
    _Inner("array with other values", MapKind.ARRAY, False, MapKind.ARRAY, value="u4"),
    _Inner("array with more entries", MapKind.ARRAY, False, MapKind.ARRAY, entries=2 * _ENTRIES),
    _Inner("hash in place of an array", MapKind.ARRAY, False, MapKind.HASH),
    _Inner(
        "array with more entries, INNER_MAP",
        MapKind.ARRAY,
        True,
        MapKind.ARRAY,
        entries=2 * _ENTRIES,
        flags=MapFlag.INNER_MAP,
        template_flags=MapFlag.INNER_MAP,
    ),
    _Inner("hash like the template", MapKind.HASH, True, MapKind.HASH),
    _Inner("hash with other values", MapKind.HASH, False, MapKind.HASH, value="u4"),
    _Inner("hash with more entries", MapKind.HASH, True, MapKind.HASH, entries=2 * _ENTRIES),
)


def _counted(tables: Tables) -> Tables:
    """Loads that were refused, and offers after which the outer map held another map."""
    triad = Triad("refused")
    tried = pd.concat(
        [
            tables["programs"].rename(columns={"loaded": "done"}),
            tables["offers"].rename(columns={"in_place": "done"}),
        ]
    )
    for case in _CASES:
        rows = tried[tried["case"] == case.id]
        triad.add(case.variant, case=case.id, operations=int(rows["times"].sum()),
                  anomalies=int((rows["times"] - rows["done"]).sum()))  # fmt: skip
    return {"counts": triad.table()}


@experiment(
    "outer-map-rules",
    number=53,
    family="kernel-facts",
    question="Can a program switch the inner map, and may the new one have another shape?",
    claims=("4.3",),
    needs=("bpf", "compile", "test_run", "map_in_map"),
    quick={"switches": 20},
    full={"switches": 200},
    cases=_CASES,
    derive=_counted,
    statements=(
        Statement("a program cannot update an outer map", "all(broken['by-program'])"),
        Statement("the same call on a map of values is loaded", "none(control)"),
        Statement("an inner map of another shape is refused with EINVAL",
                  "all(broken['other-shape']) and all(offers(case='other-shape').answer == -22)"),
        Statement("one that fits is in force at once", "none(fixed)"),
    ),
    sentence="The kernel refused {broken['by-program']} programs that update an outer map "
    "({programs(case='by-program').answer}) User space could switch: {fixed} offers of a map that "
    "fits were refused, and {broken['other-shape']} of one that does not.",
)  # fmt: skip
def outer_map_rules(*, switches: int) -> Tables:
    """Switch inner maps from user space and from a program, to maps of equal and other shape.

    The verifier lets a program look an outer map up and no more
    (``check_map_func_compatibility``, kernel/bpf/verifier.c). User space passes the descriptor
    of a map, and ``bpf_map_meta_equal`` (kernel/bpf/map_in_map.c) compares type, sizes of key
    and value, and flags with the template; arrays must agree in max_entries as well, unless
    both were made with BPF_F_INNER_MAP (``array_map_meta_equal``): a program has that bound
    compiled in.

    Parameters
    ----------
    switches : int
        Offers of each inner map, and loads of each program.

    Returns
    -------
    dict of DataFrame
        ``offers``: ``case`` (whether it fits, as the rules say), ``inner``, ``template``,
        ``times``, ``answer`` (0 or minus the errno), ``in_place`` (offers after which the outer
        map held the id of the map offered, int64). ``programs``: ``case``, ``program``, ``times``,
        ``loaded`` (int64), ``answer``.
    """
    offers = pd.DataFrame([_offered(inner, switches) for inner in _INNERS])
    with (
        Map.create(MapKind.ARRAY, key="u4", value="u4", max_entries=1) as table,
        _outer(_INNERS[0]) as outer,
        programs.load("outer_map_rules", OUTER_FD=outer.fd, TABLE_FD=table.fd) as loaded,
    ):
        loads = pd.DataFrame(
            [
                {"case": case, **_loaded(loaded, name, switches)}
                for case, name in (("by-program", "replace"), ("plain-map", "write_value"))
            ]
        )
    return {"offers": offers, "programs": loads}


def _outer(inner: _Inner) -> Map:
    with _made(inner.template, "u8", _ENTRIES, inner.template_flags) as template:
        return Map.create(
            MapKind.ARRAY_OF_MAPS, key="u4", value="u4", max_entries=1, inner=template
        )


def _made(kind: MapKind, value: str, entries: int, flags: MapFlag) -> Map:
    return Map.create(kind, key="u4", value=value, max_entries=entries, flags=flags)


def _offered(inner: _Inner, times: int) -> dict[str, object]:
    answers, in_place = [], 0
    with _outer(inner) as outer:
        for _ in range(times):
            with _made(inner.kind, inner.value, inner.entries, inner.flags) as offered:
                try:
                    outer.update(0, offered.fd)
                    answers.append(0)
                except MapError as refused:
                    answers.append(-int(refused.errno or 0))
                in_place += int(outer.get(0, -1)) == offered.id
    (answer,) = np.unique(answers)  # the same every time
    return {
        "case": "fits" if inner.fits else "other-shape",
        "inner": inner.name,
        "template": inner.template.name.lower(),
        "times": times,
        "answer": int(answer),
        "in_place": in_place,
    }


def _loaded(rules: BpfObject, name: str, times: int) -> dict[str, object]:
    loaded, answer = 0, ""
    for _ in range(times):
        try:
            rules.program(name)
            loaded += 1
        except LoadFailed as refused:
            answer = str(refused).partition(": ")[2]
    return {"program": name, "times": times, "loaded": loaded, "answer": answer}
