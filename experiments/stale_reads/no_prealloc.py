"""What BPF_F_NO_PREALLOC changes: no hidden rehash, but errors that must be read."""

from __future__ import annotations

import errno
import threading
import time

import numpy as np
import pandas as pd

from labkit.errors import LabError, TimedOut
from labkit.figures import Axes, style
from labkit.kernel import leftovers, libbpf, programs
from labkit.kernel.libbpf import MapFlag, MapKind, ProgramKind
from labkit.kernel.maps import Map, MapFull, OutOfMemory
from labkit.kernel.parallel import Child, shared_array
from labkit.lab.experiment import Case, Statement, Tables, experiment, say
from labkit.runs import Run, Triad

_LIVE_KEY, _LIVE_ACTION = 80, 1  # a rule that is in force before somebody prefills the map
_PREFILLED_KEYS = 65_536
_UNCONFIGURED = 4_000  # keys that nobody configured, asked after a prefill
_SWITCH_LIMIT_S = 60.0
_LARGE_VALUE = 2_048  # bytes: few insertions reach the memory limit
_HOLD_S, _START_S = 60.0, 10.0


_CASES = (
    Case("broken", "interrupts-off", "NO_PREALLOC, bursts with interrupts off",
         flags=MapFlag.NO_PREALLOC, interrupts_off=True),
    Case("control", "interrupts-on", "NO_PREALLOC, bursts with interrupts on",
         flags=MapFlag.NO_PREALLOC, interrupts_off=False),
    Case("fixed", "preallocated", "preallocated, bursts with interrupts off",
         flags=MapFlag.NONE, interrupts_off=True),
    Case("broken", "memory-limit", "NO_PREALLOC under a memory limit"),
    Case("broken", "prefill-live", "prefill of 1,024 entries: the live rule",
         anomaly="overwritten rule"),
    Case("broken", "prefill-new", "prefill of 65,536 entries: later new keys",
         anomaly="refused key"),
    Case("broken", "prefill-absent", "prefill of 65,536 entries: keys nobody configured",
         anomaly="invented rule"),
    Case("fixed", "no-prefill", "no prefill: rules, new and unconfigured keys",
         anomaly="wrong key"),
)  # fmt: skip


def derive(tables: Tables) -> Tables:
    """Count failed insertions, and keys that are wrong after a prefill."""
    triad = Triad("failed insertion")
    about = {case.id: case for case in _CASES}
    for row in tables["answers"].to_dict("records"):
        failed = row["attempted"] - row["inserted"]
        triad.add(about[row["case"]].variant, case=row["case"], operations=row["attempted"],
                  anomalies=failed)  # fmt: skip
    for row in tables["prefills"].to_dict("records"):
        case = about[row["case"]]
        triad.add(case.variant, case=case.id, operations=row["keys"], anomalies=row["wrong"],
                  anomaly=case.anomaly)  # fmt: skip
    return {"counts": triad.table()}


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """The memory that the kernel states for a map against its max_entries, empty to full."""
    ax = style.axes(ax)
    fills = {0.0: ("empty", "none"), 0.5: ("half full", "left"), 1.0: ("full", "full")}
    for i, (flags, rows) in enumerate(run.table("fill").groupby("flags", sort=False)):
        look = style.look(i)
        for share, (label, filled) in fills.items():
            points = rows[rows["filled"] == rows["entries"] * share]
            ax.plot(points["entries"], points["memlock_bytes"] / 2**20, **look.line(),
                    fillstyle=filled, label=f"{flags}, {label}")  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("max_entries (key 4 B, value 8 B)")
    ax.set_ylabel("memory of the map (MiB)")
    ax.legend(loc="upper left", fontsize=6)
    return ax


@experiment(
    "no-prealloc",
    number=10,
    family="stale-reads",
    question="Does NO_PREALLOC make updates fail in silence, and does prefilling help?",
    claims=("1.3c", "1.7", "1.10", "1.11"),
    needs=("bpf", "compile", "test_run", "raw_tracepoint", "no_prealloc", "memcg"),
    quick={"insertions": 40_000, "burst": 400, "limit_mib": 48},
    full={"insertions": 200_000, "burst": 400, "limit_mib": 128},
    cases=_CASES,
    derive=derive,
    statements=(
        Statement("insertions fail where memory is scarce",
                  'some(broken["interrupts-off", "memory-limit"])'),
        Statement("every failure is answered ENOMEM",
                  "all(answers.attempted > 0 "
                  "and answers.inserted + answers.no_memory == answers.attempted) "
                  "and none(answers.full > 0 or answers.other > 0)"),
        Statement("with interrupts on none fails", 'none(control["interrupts-on"])'),
        Statement("preallocated, none fails", 'none(fixed["preallocated"])'),
        # ENOMEM is 12, E2BIG is 7.
        Statement("preallocation is refused up front where memory is short",
                  "all(creation.errno == 12)"),
        Statement("a map takes max_entries keys and answers E2BIG to the next",
                  "all(fill(filled == entries, filled > 0).next_answer == 7)"),
        Statement("a prefill makes every such key wrong",
                  'all(broken["prefill-live", "prefill-new", "prefill-absent"])'),
        Statement("without prefill nothing is wrong", 'none(fixed["no-prefill"])'),
    ),
    sentence='In bursts with interrupts off {broken["interrupts-off"]} insertions into a '
    'NO_PREALLOC map failed, and {broken["memory-limit"]} under a memory limit; every one was '
    'answered ENOMEM. With interrupts on, {control} failed; preallocated, {fixed["preallocated"]}. '
    "Maps took every key up to max_entries, so nothing was rehashed. Prefilling overwrote the rule "
    "in force, refused every later key and invented rules that nobody had configured.",
    figure=_figure,
)  # fmt: skip
def no_prealloc(*, insertions: int, burst: int, limit_mib: int) -> Tables:
    """Insert where memory is scarce, and prefill where a rule is in force.

    The bucket array is sized at creation and never again (kernel/bpf/hashtab.c,
    ``htab_map_alloc``: ``n_buckets = roundup_pow_of_two(max_entries)``); only elements are
    allocated late. An allocation can fail: in a burst with interrupts off, since the
    per-CPU cache is refilled by an interrupt, and under a memory limit. Every failure is
    answered, ENOMEM; only a program that does not look makes it silent.

    Parameters
    ----------
    insertions : int
        New keys in every burst setting.
    burst : int
        Keys inserted in one program run.
    limit_mib : int
        Memory limit of the control group, MiB; the map is asked to hold more.

    Returns
    -------
    dict of DataFrame
        ``answers``: ``variant``, ``case``, ``attempted``, ``inserted``, ``no_memory``, ``full``,
        ``other`` (int64), of the bursts and the memory limit; what was not inserted will be found
        absent later by who ignored the answer. ``prefills``: ``variant``, ``case``, ``keys``,
        ``wrong``.
        ``fill``: ``flags``, ``entries``, ``filled``, ``memlock_bytes``, ``insert_ns`` and
        ``next_answer`` (errno of one insertion more) for maps empty, half and wholly filled.
        ``creation``: ``case``, ``errno`` (0: created).
    """
    answers: list[dict[str, object]] = []
    for case in _CASES:
        if "interrupts_off" in case.settings:
            say(case.label)
            row = _burst(case, insertions, burst)
            answers.append({"variant": case.variant, "case": case.id, **row})
    say("under a memory limit")
    limited, refused = _limited(limit_mib)
    answers.append({"variant": "broken", "case": "memory-limit", **limited})
    say("prefilling")
    return {
        "answers": pd.DataFrame(answers),
        "prefills": _prefills(),
        "fill": _filled(),
        "creation": pd.DataFrame([{"case": "memory-limit", "errno": refused}]),
    }


def _burst(case: Case, insertions: int, burst: int) -> dict[str, int]:
    with (
        Map.create(
            MapKind.HASH,
            key="u4",
            value="u8",
            max_entries=insertions,
            flags=case.flags,
            name="burst",
        ) as table,
        programs.load(
            "insert_burst",
            TABLE_FD=table.fd,
            BURST=burst,
            INSERTIONS=insertions,
            OWNER_ID=threading.get_native_id(),
        ) as loaded,
    ):
        seen = loaded.map("answers")
        if case.interrupts_off:
            loaded.attach(loaded.program("on_switch", ProgramKind.RAW_TRACEPOINT), "sched_switch")
            deadline = time.monotonic() + _SWITCH_LIMIT_S
            while int(seen.lookup(0)["next_key"]) < insertions:
                time.sleep(0.0002)  # sleeping makes the scheduler switch away from us
                if time.monotonic() > deadline:
                    raise TimedOut("The scheduler did not switch often enough for all bursts.")
        else:
            in_place = loaded.program("in_place")
            for _ in range(-(-insertions // burst)):
                in_place.test_run()
        row = seen.lookup(0)
        present = len(table.snapshot())
    if present != int(row["inserted"]):
        raise LabError("The program's count of insertions and the map disagree.")
    return {
        "attempted": int(row["next_key"]),
        "inserted": int(row["inserted"]),
        "no_memory": int(row["no_memory"]),
        "full": int(row["full"]),
        "other": int(row["other"]),
    }


def _limited(limit_mib: int) -> tuple[dict[str, int], int]:
    """Answers of filling a map beyond the limit; errno of making it preallocated instead.

    A map is charged to the group of the process that made it, whoever fills it. So a child
    in the group makes it and sleeps: if it did the filling, the next page that it touched
    would have it killed for lack of memory.
    """
    entries = (limit_mib << 20) * 2 // _LARGE_VALUE
    told = shared_array(2, np.int64)  # errno of the preallocated map, id of the other

    def make(flags: MapFlag) -> Map:
        return Map.create(
            MapKind.HASH,
            key="u4",
            value=f"V{_LARGE_VALUE}",
            max_entries=entries,
            flags=flags,
            name="limited",
        )

    with leftovers.memory_cgroup(limit_mib << 20) as group:

        def hold() -> None:
            group.add()
            try:
                make(MapFlag.NONE).close()
            except OutOfMemory as refused:
                told[0] = refused.errno
            with make(MapFlag.NO_PREALLOC) as table:
                told[1] = table.id
                time.sleep(_HOLD_S)

        with Child(hold) as child:
            deadline = time.monotonic() + _START_S
            while not told[1]:
                time.sleep(0.005)
                if time.monotonic() > deadline or child.ended():
                    raise TimedOut("The process in the limited group made no map.")
            with Map.from_id(int(told[1])) as table:
                answers = _insert_all(table, entries)
    return answers, int(told[0])


def _insert_all(table: Map, entries: int) -> dict[str, int]:
    answers = {"attempted": entries, "inserted": 0, "no_memory": 0, "full": 0, "other": 0}
    value = bytes(_LARGE_VALUE)
    for key in range(entries):
        try:
            table.update(key, value)
            answers["inserted"] += 1
        except OutOfMemory:
            answers["no_memory"] += 1
    return answers


def _filled() -> pd.DataFrame:
    """Fill maps to the last entry: memory as the kernel states it, time of an insertion."""
    rows = []
    for flags in (MapFlag.NONE, MapFlag.NO_PREALLOC):
        for entries in (1_024, 4_096, 16_384, 65_536):
            for share in (0.0, 0.5, 1.0):
                with Map.create(
                    MapKind.HASH, key="u4", value="u8", max_entries=entries, flags=flags
                ) as table:
                    keys = np.arange(int(entries * share), dtype=np.uint32)
                    begun = time.monotonic_ns()
                    table.update_many(keys, keys)
                    spent = time.monotonic_ns() - begun
                    rows.append(
                        {
                            "flags": "NO_PREALLOC" if flags else "preallocated",
                            "entries": entries,
                            "filled": len(keys),
                            "memlock_bytes": libbpf.map_memory(table.fd),
                            "insert_ns": spent / len(keys) if len(keys) else float("nan"),
                            "next_answer": _one_more(table, entries) if share == 1.0 else 0,
                        }
                    )
    return pd.DataFrame(rows)


def _one_more(table: Map, key: int) -> int:
    try:
        table.update(key, 0)
    except MapFull as refused:
        return int(refused.errno or 0)
    return 0


def _prefills() -> pd.DataFrame:
    """The article's cure: write a zero to every key from 0 on, before the traffic comes."""
    rows: list[tuple[str, str, int, int]] = []
    with _rules(1_024) as table:
        prefilled = _prefilled_keys(table)
        overwritten = int(table.lookup(_LIVE_KEY) != _LIVE_ACTION)
        if prefilled != table.max_entries:
            raise LabError(f"A map of {table.max_entries} entries took {prefilled} keys.")
        rows.append(("broken", "prefill-live", 1, overwritten))
    new = range(_PREFILLED_KEYS, _PREFILLED_KEYS + _UNCONFIGURED)
    with _rules(_PREFILLED_KEYS) as table:
        _prefilled_keys(table)
        refused = sum(_one_more(table, key) == errno.E2BIG for key in new)
        rows.append(("broken", "prefill-new", _UNCONFIGURED, refused))
        found = _found_unconfigured(table)
        rows.append(("broken", "prefill-absent", _UNCONFIGURED, found))
    with _rules(_PREFILLED_KEYS) as table:
        found = _found_unconfigured(table)
        refused = sum(_one_more(table, key) == errno.E2BIG for key in new)
        changed = int(table.lookup(_LIVE_KEY) != _LIVE_ACTION)
        rows.append(("fixed", "no-prefill", 2 * _UNCONFIGURED + 1, found + refused + changed))
    return pd.DataFrame(rows, columns=["variant", "case", "keys", "wrong"])


def _rules(entries: int) -> Map:
    table = Map.create(
        MapKind.HASH, key="u4", value="u4", max_entries=entries, flags=MapFlag.NO_PREALLOC,
        name="rules",
    )  # fmt: skip
    table.update(_LIVE_KEY, _LIVE_ACTION)
    return table


def _prefilled_keys(table: Map) -> int:
    """Write zeros to the keys 0, 1, 2, ... up to the first refusal."""
    for key in range(_PREFILLED_KEYS):
        try:
            table.update(key, 0)
        except MapFull:
            return key
    return _PREFILLED_KEYS


def _found_unconfigured(table: Map) -> int:
    keys = range(_LIVE_KEY + 1, _LIVE_KEY + 1 + _UNCONFIGURED)
    return sum(table.get(key) is not None for key in keys)
