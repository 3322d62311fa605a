"""Per-CPU values come all at once, eight bytes aligned: what a reader who forgets that gets."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import libbpf, parallel, programs
from labkit.kernel.maps import Map

_KEY = 0
_GUARD = 0xA5  # never the last byte of a slot
_ONE, _PACKED, _MAP = "buffer for one value", "buffer for an array of values", "labkit Map"


@experiment(
    "per-cpu-stride",
    number=25,
    family="value-size",
    question="What does a reader get who asks a per-CPU map for one value?",
    claims=("3.1c", "2.4"),
    needs=("bpf", "compile", "test_run"),
    quick={"value_bytes": [4, 8, 12, 16, 20], "lookups": 500},
    full={"value_bytes": list(range(4, 65, 4)), "lookups": 10_000},
)
def per_cpu_stride(*, value_bytes: list[int], lookups: int) -> Tables:
    """Mark the slot of every CPU by a program that runs there, and read the slots in three ways.

    A lookup in a per-CPU map copies ``round_up(value_size, 8)`` bytes for every *possible*
    CPU (kernel/bpf/syscall.c, ``bpf_map_value_size``), whatever buffer the caller has.
    The article's reader gives it one ``__u64``. Others give it an array of values, which
    is right only for sizes that divide by eight.

    Parameters
    ----------
    value_bytes : list of int
        Value sizes, bytes; multiples of 4.
    lookups : int
        Lookups by each reader for each map type and size.

    Returns
    -------
    dict of DataFrame
        ``counts``, with ``cost_ns`` of a lookup from Python, and ``readers``: one row per
        reader, map type and size with columns ``variant``, ``case`` (the reader), ``kind``,
        ``value_bytes``, ``cpus`` (possible ones), ``buffer_bytes``, ``lookups``, ``wrong``
        (lookups that overran or gave some CPU a wrong value), ``errors``,
        ``written_bytes`` (by one lookup), ``overrun_bytes`` (past the buffer, all lookups),
        ``wrong_cpus`` (CPUs whose value the reader misses or mistakes, all lookups; all
        int64) and ``lookup_ns`` (float64, median).
    """
    for size in value_bytes:
        if size % 4 or size > 256:
            raise BadInput(f"value_bytes of per-cpu-stride are multiples of 4 up to 256: {size}.")
    rows = []
    for size in value_bytes:
        say(f"per-CPU values of {size} B")
        with programs.load("per_cpu_stride", WORDS=size // 4) as unit:
            maps = [unit.map(name, value=("u4", (size // 4,))) for name in ("in_array", "in_hash")]
            maps[1].update(_KEY, np.zeros(size // 4, np.uint32))
            expected = _mark_slots(unit, size)
            rows += [
                _read(table, case, expected, lookups)
                for table in maps
                for case in (_ONE, _PACKED, _MAP)
            ]
    readers = pd.DataFrame(rows)
    return {"counts": _counts(readers), "readers": readers}


def _mark_slots(unit: programs.Unit, size: int) -> npt.NDArray[np.uint32]:
    """Run the program once on every CPU of ours; return what the slots must hold now."""
    function = unit.function("mark_own")
    usable = parallel.cpus()
    parallel.together(*[function.test_run for _ in usable])
    expected = np.zeros((libbpf.possible_cpus(), size // 4), np.uint32)
    for cpu in usable:
        expected[cpu] = (cpu + 1) << 16 | (np.arange(size // 4) + 1)
    return expected


def _read(
    table: Map, case: str, expected: npt.NDArray[np.uint32], lookups: int
) -> dict[str, object]:
    """Read all slots by one reader, between guards, and compare with what is in them."""
    cpus, words = expected.shape
    size, stride = 4 * words, table.value_buffer().nbytes // cpus
    memory = np.zeros(2 * stride * cpus, np.uint8)
    key = table.encode_key(_KEY)
    lookup, fd = libbpf.api().bpf_map_lookup_elem, table.fd
    key_at, into = key.ctypes.data, memory.ctypes.data
    buffer_bytes = {_ONE: size, _PACKED: size * cpus, _MAP: stride * cpus}[case]
    exact = table.reader(_KEY, memory[:buffer_bytes]) if case == _MAP else None

    errors = overrun = wrong_cpus = wrong = written = 0
    spent = []
    for _ in range(lookups):
        memory[:] = _GUARD
        begun = time.perf_counter_ns()
        answer = lookup(fd, key_at, into) if exact is None else exact()
        spent.append(time.perf_counter_ns() - begun)
        errors += answer != 0
        written = int(np.flatnonzero(memory != _GUARD)[-1]) + 1
        past = max(0, written - buffer_bytes)
        if exact is None:
            seen = memory[:buffer_bytes].view(np.uint32).reshape(-1, words)
        else:
            seen = table.decode_value(memory[:buffer_bytes])
        right = int((seen == expected[: len(seen)]).all(axis=1).sum())
        overrun, wrong_cpus = overrun + past, wrong_cpus + cpus - right
        wrong += past > 0 or right < cpus
    return {
        "variant": {
            _ONE: "broken",
            _PACKED: "control" if size == stride else "broken",
            _MAP: "fixed",
        }[case],
        "case": case,
        "kind": table.kind.name.lower(),
        "value_bytes": size,
        "cpus": cpus,
        "buffer_bytes": buffer_bytes,
        "lookups": lookups,
        "wrong": wrong,
        "errors": errors,
        "written_bytes": written,
        "overrun_bytes": overrun,
        "wrong_cpus": wrong_cpus,
        "lookup_ns": float(np.median(spent)),
    }


def _counts(readers: pd.DataFrame) -> pd.DataFrame:
    triad = Triad("overrun or wrong CPU")
    for (variant, case), group in readers.groupby(["variant", "case"], sort=False):
        triad.add(
            str(variant),
            case=str(case),
            operations=int(group["lookups"].sum()),
            anomalies=int(group["wrong"].sum()),
            cost_ns=float(group["lookup_ns"].median()),
        )
    return triad.table()
