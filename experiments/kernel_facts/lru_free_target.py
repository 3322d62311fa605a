"""How many keys of a small LRU map one insertion from another CPU pushes out."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from labkit.figures import Axes, style
from labkit.kernel import libbpf
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map, MapFull
from labkit.kernel.parallel import together
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment
from labkit.runs import Run

_ROOM: Final = 1_024  # entries more than keys, in control: more than all CPUs together hold back
_MOST: Final = 128  # LOCAL_FREE_TARGET of kernel/bpf/bpf_lru_list.c

FIXED_RULE: Final = f"always {_MOST}"
"""Before Linux 6.16."""

SHARE_RULE: Final = "half of a CPU's share"
"""Since then."""

BOTH_RULES: Final = "both"


def _cases(size: int) -> tuple[Case, ...]:
    return (
        Case("broken", f"lru-{size}", f"LRU of {size}, full",
             kind=MapKind.LRU_HASH, size=size, entries=size),
        Case("control", f"room-{size}", f"LRU of {size + _ROOM}, {size} keys",
             kind=MapKind.LRU_HASH, size=size, entries=size + _ROOM),
        Case("fixed", f"hash-{size}", f"hash of {size}, full",
             kind=MapKind.HASH, size=size, entries=size),
    )  # fmt: skip


def _foretold(tables: Tables) -> Tables:
    """What happened to every full LRU map, and which rule foretells it."""
    rounds = tables["rounds"]
    full = rounds[rounds["variant"] == "broken"].merge(tables["cases"][["case", "size"]], on="case")
    size, cpus = full["size"].to_numpy(np.int64), full["cpus"].to_numpy(np.int64)
    # A CPU that took 128 of 128 elements for its own has left none that could be evicted.
    fixed = np.where(size > _MOST, np.minimum(size - _MOST, _MOST), 1)
    share = np.clip(size // cpus // 2, 1, _MOST)
    gone = full["gone"].to_numpy()
    words = np.select(
        [(gone == fixed) & (gone == share), gone == fixed, gone == share],
        [BOTH_RULES, FIXED_RULE, SHARE_RULE],
        "neither",
    )
    return {"evicted": full[["case", "round", "size", "gone"]].assign(foretold_by=words)}


def rule(run: Run) -> str:
    """`FIXED_RULE` or `SHARE_RULE`, whichever foretells the run; empty where neither does."""
    found = set(run.table("evicted")["foretold_by"]) - {BOTH_RULES}
    return found.pop() if len(found) == 1 and found <= {FIXED_RULE, SHARE_RULE} else ""


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the keys that were gone of each map, beside all that it held."""
    ax = style.axes(ax)
    gone = run.table("evicted").groupby("size")["gone"].median()
    ax.plot(gone.index, gone.index, color=style.GREY, linestyle=":", label="all of them")
    ax.plot(gone.index, gone, **style.VARIANT["broken"].line(), label="gone")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(gone.index, map(str, gone.index))
    ax.set_xlabel("keys in a full LRU map")
    ax.set_ylabel("gone after one insertion")
    ax.legend()
    return ax


@experiment(
    "lru-free-target",
    number=57,
    family="kernel-facts",
    question="How many keys does one insertion push out of a full LRU map?",
    claims=("1.3d",),
    needs=("bpf", "lru", "two_cpus"),
    quick={"rounds": 3},
    full={"rounds": 10},
    cases=[case for size in (16, 32, 64, 128, 256, 512, 2_048) for case in _cases(size)],
    counted=Counted("evicted", operations="keys", anomalies="gone"),
    derive=_foretold,
    statements=(
        Statement("a full LRU evicts at one insertion", "some(broken)"),
        Statement("each time as many as one of the two known rules says",
                  f'all(evicted.foretold_by == "{FIXED_RULE}" or evicted.foretold_by == "both") or '
                  f'all(evicted.foretold_by == "{SHARE_RULE}" or evicted.foretold_by == "both")'),
        Statement("with room in the map, nothing goes",
                  'none(rounds(keys > 0, variant="control").gone > 0)'),
        Statement("a full plain hash loses nothing",
                  'none(rounds(keys > 0, variant="fixed").gone > 0)'),
    ),
    sentence="One key more, inserted by another CPU, pushed {first(evicted(size=64).gone)} of 64, "
    "{first(evicted(size=256).gone)} of 256 and {first(evicted(size=2048).gone)} of 2,048 keys out "
    "of a full LRU map; the rule of this kernel is "
    "{first(evicted(size=16).foretold_by)}. With room in the map {control} were gone; "
    "a full plain hash lost {fixed}.",
    figure=_figure,
)  # fmt: skip
def lru_free_target(case: Case) -> dict[str, Any]:
    """Fill a map from one CPU, insert one key from another, and count what is gone.

    A CPU that has no free element of its own takes a number of them from the common list, and
    where that is empty as well, evicts as many at once (kernel/bpf/bpf_lru_list.c,
    ``bpf_lru_list_pop_free_to_local``). The number was 128, whatever the size of the map, until
    Linux 6.16 (d4adf1c9ee77): one insertion pushed half of 256 keys out. (Of 128 and fewer, the
    CPU that filled the map had taken all elements for its own, and one of them was taken from
    it.) Since then it is half of a CPU's share of the elements, 128 at most.

    Parameters
    ----------
    case : Case
        Kind and entries of the map, and how many keys are put into it.

    Returns
    -------
    dict
        ``keys`` (that were confirmed before the insertion), ``gone`` (of those, after it) and
        ``cpus`` (possible ones).
    """
    keys, gone = _one_more(case.kind, case.size, case.entries)
    return {"keys": keys, "gone": gone, "cpus": libbpf.possible_cpus()}


def _one_more(kind: MapKind, keys: int, entries: int) -> tuple[int, int]:
    """Keys that were there before an insertion from another CPU, and how many of them are gone."""
    with Map.create(kind, key="u4", value="u8", max_entries=entries) as table:

        def fill() -> set[int]:
            for key in range(keys):
                table.update(key, 1)
            return set(table.snapshot().keys.tolist())

        def insert() -> None:
            try:
                table.update(keys, 1)
            except MapFull:
                return

        # One after the other, each on a CPU of its own.
        before = together(fill)[0]
        together(lambda: None, insert)
        after = set(table.snapshot().keys.tolist())
        return len(before), len(before - after)
