"""Keys of an LRU map that were written, confirmed, and are gone."""

from __future__ import annotations

from typing import Any

import pandas as pd

from labkit.figures import Axes, style
from labkit.kernel import libbpf
from labkit.kernel.libbpf import MapFlag, MapKind, UpdateFlag
from labkit.kernel.maps import KeyAbsent, Map, MapFull
from labkit.kernel.parallel import together
from labkit.lab.experiment import Case, Counted, Statement, experiment
from labkit.runs import Run


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the keys that are there at the end against those inserted, both of max_entries."""
    from matplotlib.ticker import PercentFormatter

    ax = style.axes(ax)
    entries = int(str(run.parameters["entries"]))
    maps = run.case_table.set_index("case")["map"]
    for i, (case, rows) in enumerate(run.table("fill").groupby("case", sort=False)):
        label = str(maps[case])
        if int(rows["refused"].max()):
            label += " (refuses aloud)"
        rows = rows.sort_values("inserted")
        inserted, kept = rows["inserted"] / entries, rows["kept"] / entries
        ax.plot(inserted, kept, **style.look(i).line(), alpha=0.85, label=label)
    ax.axvline(1, color=style.GREY, lw=0.8, ls=":")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    ax.set_ylim(0, 1.4)
    ax.set_xlabel("keys inserted and confirmed (of max_entries)")
    ax.set_ylabel("keys in the map at the end")
    ax.legend(loc="upper left")
    return ax


@experiment(
    "lru-eviction",
    number=9,
    family="stale-reads",
    question="Which keys of an LRU map are gone although their updates succeeded?",
    claims=("1.3d", "1.2c"),
    needs=("bpf", "two_cpus"),
    quick={"entries": 1024, "touches": 5_000, "rounds": 1},
    full={"entries": 4096, "touches": 40_000, "rounds": 1},
    cases=(
        Case("broken", "beyond", "LRU, common lists, filled an eighth beyond max_entries",
             kind=MapKind.LRU_HASH, eighths=9, map="LRU, common lists"),
        Case("control", "half", "LRU, common lists, filled to half", beside="beyond",
             kind=MapKind.LRU_HASH, eighths=4, map="LRU, common lists"),
        Case("broken", "per-cpu", "LRU, NO_COMMON_LRU, filled to max_entries from one CPU",
             kind=MapKind.LRU_HASH, flags=MapFlag.NO_COMMON_LRU, eighths=8,
             map="LRU, NO_COMMON_LRU"),
        Case("fixed", "plain", "plain hash, an eighth beyond max_entries is refused",
             kind=MapKind.HASH, eighths=9, map="plain hash"),
        Case("broken", "touched", "LRU, common lists, full, one key updated with EXIST",
             kind=MapKind.LRU_HASH, map="LRU, common lists"),
        Case("fixed", "plain-touched", "plain hash, full, one key updated with EXIST",
             kind=MapKind.HASH, map="plain hash"),
    ),
    counted=Counted("evicted", operations="confirmed", anomalies="confirmed - kept"),
    statements=(
        Statement("a full LRU evicts keys that were confirmed, in silence", "some(broken)"),
        # A CPU's share is max_entries, rounded up, by the possible CPUs; where it has no free
        # node left, it frees four at once (kernel/bpf/bpf_lru_list.c, PERCPU_FREE_TARGET).
        Statement("NO_COMMON_LRU keeps one CPU's share, but for four nodes at the most",
                  'all(0 < rounds(case="per-cpu").kept) and all(-4 <= rounds(case="per-cpu").kept '
                  '- parameters.entries / rounds(case="per-cpu").possible <= 1)'),
        Statement("updating a present key evicts the key itself too: EXIST answers ENOENT",
                  'some(touch(case="touched").answered_absent > 0)'),
        Statement("an LRU filled to half keeps all", "none(control)"),
        Statement("a plain hash keeps all", "none(fixed)"),
        Statement("and refuses aloud what does not fit",
                  'all(fill(inserted > parameters.entries, case="plain").refused > 0)'),
    ),
    sentence="Filled from one CPU, an LRU map with NO_COMMON_LRU kept "
    '{percent(1 - broken["per-cpu"].rate)} of its keys, that CPU\'s share of '
    '{percent(1 / rounds(case="per-cpu").possible)}, without one error. In a full common LRU, '
    'updating one present key evicted {broken["touched"]} keys, and '
    '{sum(touch(case="touched").answered_absent)} of {sum(touch(case="touched").touches)} updates '
    "did not find their own key. A plain hash lost {fixed} and refused what did not fit.",
    figure=_figure,
)  # fmt: skip
def lru_eviction(case: Case, *, entries: int, touches: int) -> list[dict[str, Any]]:
    """Fill maps from one CPU, confirm every key, and see which ones are still there.

    An update of an LRU hash takes a free node before it looks for the key
    (kernel/bpf/hashtab.c, ``htab_lru_map_update_elem``). In a full map that evicts
    something every time, be it the very key that is updated. With ``NO_COMMON_LRU`` every
    CPU owns its share of the nodes and never borrows: a map filled from one CPU is full at
    that share (kernel/bpf/bpf_lru_list.c).

    Parameters
    ----------
    case : Case
        Map, and how far it is filled; or that one key of it is updated when it is full.
    entries : int
        ``max_entries`` of every map.
    touches : int
        Updates of one present key in a full map, with ``BPF_EXIST``.

    Returns
    -------
    list of dict
        ``confirmed`` (keys whose insertion was confirmed; nobody deletes any), ``kept`` (keys
        that are there at the end), ``possible`` (CPUs; all int64). ``fill``: maps that were
        filled to one eighth of ``max_entries`` up to twelve, with ``inserted``, ``kept``,
        ``refused``. ``touch``: ``touches``, ``answered_absent``, ``gone``.
    """
    possible, eighths = libbpf.possible_cpus(), case.get("eighths", 0)
    if not eighths:
        touched = _touch(case, entries, touches)
        kept = entries - touched["gone"]
        return [{"confirmed": entries, "kept": kept, "possible": possible,
                 "touch": pd.DataFrame([touched])}]  # fmt: skip
    fill = [_fill(case, entries, entries * part // 8) for part in range(1, 13)]

    def filled(eighths: int) -> dict[str, Any]:
        row = fill[eighths - 1]
        confirmed = row["inserted"] - row["refused"]
        return {"confirmed": confirmed, "kept": row["kept"], "possible": possible}

    observed = [{**filled(eighths), "fill": pd.DataFrame(fill)}]
    # On its way beyond max_entries the map was filled to half.
    return [*observed, {**filled(4), "case": "half"}] if case.id == "beyond" else observed


def _fill(case: Case, entries: int, inserted: int) -> dict[str, int]:
    """Insert and confirm keys from one CPU; how many are there at the end."""
    with _made(case, entries) as table:

        def insert() -> int:
            refused = 0
            for key in range(inserted):
                try:
                    table.update(key, key + 1)
                    table.lookup(key)
                except MapFull:
                    refused += 1
            return refused

        (refused,) = together(insert)
        return {"inserted": inserted, "kept": len(table.snapshot()), "refused": refused}


def _touch(case: Case, entries: int, touches: int) -> dict[str, int]:
    """Update one key of a full map over and over; what that does to it and to the others."""
    with _made(case, entries) as table:

        def fill_and_touch() -> int:
            for key in range(entries):
                table.update(key, key + 1)
            absent = 0
            for version in range(touches):
                try:
                    table.update(0, version, UpdateFlag.EXIST)
                except KeyAbsent:
                    absent += 1
            return absent

        (absent,) = together(fill_and_touch)
        gone = entries - len(table.snapshot())
        return {"touches": touches, "answered_absent": absent, "gone": gone}


def _made(case: Case, entries: int) -> Map:
    return Map.create(
        case.kind,
        key="u4",
        value="u8",
        max_entries=entries,
        flags=case.get("flags", MapFlag.NONE),
        name="evicting",
    )
