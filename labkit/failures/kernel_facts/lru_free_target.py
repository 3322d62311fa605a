"""How many keys of a small LRU map one insertion from another CPU pushes out."""

from __future__ import annotations

import pandas as pd

from labkit.analysis.runs import Triad
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import libbpf
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map, MapFull
from labkit.kernel.parallel import together

_ROOM = 1_024  # entries more than keys, in control: more than all CPUs together hold back


@experiment(
    "lru-free-target",
    number=57,
    family="kernel-facts",
    question="How many keys does one insertion push out of a full LRU map?",
    claims=("1.3d",),
    needs=("bpf", "lru", "two_cpus"),
    quick={"entries": [16, 64, 256, 2_048], "rounds": 3},
    full={"entries": [16, 32, 64, 128, 256, 512, 2_048], "rounds": 10},
)
def lru_free_target(*, entries: list[int], rounds: int) -> Tables:
    """Fill LRU maps from one CPU, insert one key from another, and count what is gone.

    A CPU that has no free element of its own takes a number of them from the common list, and
    where that is empty as well, evicts as many at once (kernel/bpf/bpf_lru_list.c,
    ``bpf_lru_list_pop_free_to_local``). The number was 128, whatever the size of the map, until
    Linux 6.16 (d4adf1c9ee77): one insertion pushed half of 256 keys out. (Of 128 and fewer, the
    CPU that filled the map had taken all elements for its own, and one of them was taken from
    it.) Since then it is half of a CPU's share of the elements, 128 at most.

    Parameters
    ----------
    entries : list of int
        Sizes of the maps.
    rounds : int
        New maps of each size.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a key that was confirmed, an anomaly one that was gone after
        one more key was inserted, by another CPU: in broken of a full LRU map, in control of one
        with room for 1,024 more, in fixed of a full plain hash, which refuses the insertion.
        ``evicted``: one row per size and round with ``entries``, ``round``, ``before`` (keys that
        were there before that insertion), ``gone`` (of those, after it) (int64). ``cpus``:
        ``possible``.
    """
    triad, rows = Triad("evicted"), []
    for size in entries:
        say(f"{rounds} LRU maps of {size} entries, full, and one key more")
        of_size = [_one_more(MapKind.LRU_HASH, size, size) for _ in range(rounds)]
        rows += [
            {"entries": size, "round": turn, "before": before, "gone": gone}
            for turn, (before, gone) in enumerate(of_size)
        ]
        for variant, case, outcomes in (
            ("broken", f"LRU of {size}, full", of_size),
            ("control", f"LRU of {size + _ROOM}, {size} keys",
             [_one_more(MapKind.LRU_HASH, size, size + _ROOM) for _ in range(rounds)]),
            ("fixed", f"hash of {size}, full",
             [_one_more(MapKind.HASH, size, size) for _ in range(rounds)]),
        ):  # fmt: skip
            triad.add(
                variant, case=case, operations=sum(before for before, _ in outcomes),
                anomalies=sum(gone for _, gone in outcomes),
            )  # fmt: skip
    possible = pd.DataFrame({"possible": [libbpf.possible_cpus()]})
    return {"counts": triad.table(), "evicted": pd.DataFrame(rows), "cpus": possible}


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
