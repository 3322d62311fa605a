"""Batches and iteration in Go: what their answers tell, under deletes and when a map is full."""

from __future__ import annotations

import pandas as pd

from experiments.go.programs import Started, built
from labkit.figures import anomaly_rates
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say

_VARIANTS = {
    "iterate-quiet": "control",
    "iterate-full": "broken",
    "iterate-room": "broken",
    "batch-full": "fixed",
    "batch-room": "fixed",
}


def _derived(tables: Tables) -> Tables:
    passes, fillings = tables["passes"], tables["fillings"]
    read = passes.assign(case=passes["way"], operations=passes["passes"],
                         anomalies=passes["aborted"] + passes["twice"])  # fmt: skip
    written = [
        fillings.assign(variant="broken", case=fillings["way"] + "-ignored",
                        operations=fillings["written"],
                        anomalies=fillings["written"] - fillings["present"]),
        fillings.assign(variant="fixed", case=fillings["way"] + "-counted",
                        operations=fillings["written"],
                        anomalies=(fillings["told"] - fillings["present"]).abs()),
    ]  # fmt: skip
    counted = Counted("not as told", operations="operations", anomalies="anomalies")
    return {"counts": counted.table(pd.concat([read, *written]))}


@experiment(
    "go-batch",
    number=85,
    family="go",
    question="What do batches and iterations in Go tell, under deletes and when a map is full?",
    claims=("1.3c", "1.3f"),
    needs=("bpf", "batch_hash", "go", "cilium_ebpf"),
    quick={"entries": 512, "passes": 50, "rounds": 2},
    full={"entries": 1_024, "passes": 200, "rounds": 5},
    cases=(
        Case("broken", "iterate-full", "Iterate, full map, deletes"),
        Case("broken", "iterate-room", "Iterate, map with room, deletes"),
        Case("broken", "put-ignored", "Put, errors ignored"),
        Case("broken", "batch-update-ignored", "BatchUpdate, error ignored"),
        Case("control", "iterate-quiet", "Iterate, no deletes"),
        Case("fixed", "batch-full", "BatchLookup, full map, deletes"),
        Case("fixed", "batch-room", "BatchLookup, room, deletes"),
        Case("fixed", "put-counted", "Put, errors counted"),
        Case("fixed", "batch-update-counted", "BatchUpdate, its count read"),
    ),
    derive=_derived,
    statements=(
        Statement("deletes abort an iteration over a full map",
                  'all(broken["iterate-full"]) and all(0 < passes(way="iterate-full").aborted)'),
        Statement("where the map has room it goes on, and meets keys twice",
                  'all(0 == passes(way="iterate-room").aborted '
                  '< passes(way="iterate-room").twice)'),
        Statement("without deletes each key comes once", "none(control)"),
        Statement("batches abort nothing and meet no key twice, whatever is deleted",
                  'none(fixed["batch-full", "batch-room"])'),
        Statement("no pass that came to its end missed a key that was always there",
                  "all(0 == passes.missed < passes.passes)"),
        Statement("a map keeps what it has room for, and the rest is lost to who ignores errors",
                  'all(0 < 2 * fillings.present == fillings.written) '
                  'and some(broken["put-ignored", "batch-update-ignored"])'),
        Statement("errors and the batch's count tell exactly what is there",
                  'none(fixed["put-counted", "batch-update-counted"])'),
    ),
    sentence="Of passes by Iterate while others deleted, {sum(passes(way='iterate-full').aborted)} "
    'were aborted over full maps ({broken["iterate-full"]}), and '
    '{broken["iterate-room"]} over maps with room met keys twice or were aborted; by BatchLookup '
    '{fixed["batch-full", "batch-room"]}. Beyond the end of a map '
    '{broken["put-ignored", "batch-update-ignored"]} keys were lost to who ignored errors, and '
    '{fixed["put-counted", "batch-update-counted"]} to who counted.',
    figure=anomaly_rates,
)  # fmt: skip
def go_batch(*, entries: int, passes: int, rounds: int) -> Tables:
    """Fill a map in Go beyond its end, and iterate while others delete.

    ``MapIterator.Next`` asks for the key after the last one. Where that was deleted meanwhile the
    kernel starts anew (kernel/bpf/hashtab.c, ``htab_map_get_next_key``), and the library gives up
    with ``ErrIterationAborted`` once it has had more keys than ``MaxEntries`` (map.go): so it does
    where the map is full, and not where it has room. A batch goes on from a bucket instead.

    Parameters
    ----------
    entries : int
        Keys that are there. In the second half of a pass another goroutine deletes an odd one that
        was just read; it is back before the next pass.
    passes : int
        Passes over all keys, in each way.
    rounds : int
        Processes.

    Returns
    -------
    dict of DataFrame
        ``passes``: ``variant``, ``way``, ``round``, ``passes``, of which ``aborted``, and of those
        that came to their end ``twice`` (some key that was always there came again); ``missed``
        (passes that missed such a key). ``fillings``: ``way``, ``round``, ``written`` (keys, twice
        as many as there is room for), ``told`` (keys without an error, or the count of the batch),
        ``present`` (in the map afterwards).
    """
    read, written = [], []
    with built("batch") as program:
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            with Started(program, entries, passes) as process:
                written += [_row(process, turn, "written", "told", "present") for _ in range(2)]
                for _ in _VARIANTS:
                    row = _row(process, turn, "passes", "aborted", "twice", "missed")
                    read.append({"variant": _VARIANTS[str(row["way"])], **row})
                process.said()
                process.end()
    return {"passes": pd.DataFrame(read), "fillings": pd.DataFrame(written)}


def _row(process: Started, turn: int, *names: str) -> dict[str, object]:
    way, *counts = process.said()
    return {"way": way, "round": turn, **dict(zip(names, map(int, counts), strict=True))}
