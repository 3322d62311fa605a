"""Per-CPU values come all at once, eight bytes aligned: what a reader who forgets that gets."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import BadInput
from labkit.figures import Axes, style
from labkit.kernel import libbpf, parallel, programs
from labkit.kernel.maps import Map
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say
from labkit.runs import Run

_KEY = 0
_GUARD = 0xA5  # never the last byte of a slot
_READERS = ("one", "packed", "map")


def _derived(tables: Tables) -> Tables:
    """For each reader what a lookup must write and what its buffer lacks."""
    readers = tables["readers"]
    due = (readers["value_bytes"] + 7) // 8 * 8 * readers["cpus"]
    slots = readers.assign(
        due_bytes=due,
        missing=due - readers["buffer_bytes"],
        overrun=readers["overrun_bytes"] / readers["lookups"],
    )
    return {"slots": slots}


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the bytes that one lookup writes and the buffers of two readers, by value size."""
    from matplotlib.ticker import MultipleLocator

    ax = style.axes(ax)
    readers = run.table("readers")
    readers = readers[readers["kind"] == readers["kind"].iloc[0]].sort_values("value_bytes")
    written = readers[readers["variant"] == "fixed"]
    cpus = int(readers["cpus"].iloc[0])
    ax.plot(
        written["value_bytes"], written["written_bytes"], **style.VARIANT["fixed"].line(),
        label="the kernel writes, labkit provides", drawstyle="steps-pre",
    )  # fmt: skip
    for reader, number, label in (
        ("packed", 3, "an array of values"),
        ("one", 1, "one value"),
    ):
        rows = readers[readers["reader"] == reader]
        ax.plot(
            rows["value_bytes"], rows["buffer_bytes"], **style.look(number).line(),
            label=f"room for {label}",
        )  # fmt: skip
    ax.xaxis.set_major_locator(MultipleLocator(8))
    ax.set_xlabel("value size, bytes")
    ax.set_ylabel(f"bytes per lookup ({cpus} possible CPUs)")
    ax.set_ylim(0, 1.4 * float(written["written_bytes"].max()))
    ax.legend(loc="upper left")
    return ax


@experiment(
    "per-cpu-stride",
    number=25,
    family="value-size",
    question="What does a reader get who asks a per-CPU map for one value?",
    claims=("3.1c", "2.4"),
    needs=("bpf", "compile", "test_run"),
    quick={"value_bytes": [4, 8, 12, 16, 20], "lookups": 500},
    full={"value_bytes": list(range(4, 65, 4)), "lookups": 10_000},
    cases=(
        Case("broken", "one", "buffer for one value"),
        Case("broken", "packed", "buffer for an array of values"),
        Case("control", "one-fits", "buffer for one value of 8 n bytes, with one CPU"),
        Case("control", "packed-fits", "buffer for an array of values of 8 n bytes"),
        Case("fixed", "map", "labkit Map"),
    ),
    counted=Counted("overrun or wrong CPU", operations="lookups", anomalies="wrong",
                    cost_ns="lookup_ns", of="readers"),
    derive=_derived,
    statements=(
        Statement("a lookup writes round_up(value size, 8) bytes for each possible CPU",
                  "all(slots(lookups > 0).written_bytes == slots(lookups > 0).due_bytes) "
                  "and none(slots.errors > 0)"),
        Statement("a smaller buffer is overrun, or a CPU mistaken, at every lookup",
                  "all(broken)"),
        Statement("a smaller buffer is overrun by just what it lacks, and no other is",
                  "all(slots(missing > 0).overrun == slots(missing > 0).missing) "
                  "and none(slots(missing == 0).overrun > 0)"),
        Statement("an array of values is right where the size divides by eight", "none(control)"),
        Statement("labkit's Map gives every CPU its own value and writes past nothing",
                  "none(fixed)"),
    ),
    sentence="With {max(readers.cpus)} possible CPUs a lookup of an 8-byte per-CPU value into one "
    'u64 overwrote {max(slots(reader="one", value_bytes=8).overrun)} bytes behind it each time; '
    'buffers for one value were overrun in {broken["one"]} lookups. An array of values whose size '
    'does not divide by eight went wrong in {broken["packed"]} lookups '
    '({sum(readers(case="packed").wrong_cpus)} times a CPU got another\'s bytes), and in '
    "{control} where it does. Sized and decoded by labkit's Map: {fixed}.",
    figure=_figure,
)  # fmt: skip
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
        ``readers``: one row per reader, map type and size with columns ``variant``, ``case``,
        ``reader`` (``one``, ``packed`` or ``map``), ``kind``, ``value_bytes``, ``cpus``
        (possible ones), ``buffer_bytes``, ``lookups``, ``wrong`` (lookups that overran or gave
        some CPU a wrong value), ``errors``, ``written_bytes`` (by one lookup),
        ``overrun_bytes`` (past the buffer, all lookups), ``wrong_cpus`` (CPUs whose value the
        reader misses or mistakes, all lookups; all int64) and ``lookup_ns`` (float64, median).
    """
    for size in value_bytes:
        if size % 4 or size > 256:
            raise BadInput(f"value_bytes of per-cpu-stride are multiples of 4 up to 256: {size}.")
    rows = []
    for size in value_bytes:
        say(f"per-CPU values of {size} B")
        with programs.load("per_cpu_stride", WORDS=size // 4) as loaded:
            maps = [
                loaded.map(name, value=("u4", (size // 4,))) for name in ("in_array", "in_hash")
            ]
            maps[1].update(_KEY, np.zeros(size // 4, np.uint32))
            expected = _mark_slots(loaded, size)
            rows += [
                _read(table, reader, expected, lookups) for table in maps for reader in _READERS
            ]
    return {"readers": pd.DataFrame(rows)}


def _mark_slots(loaded: programs.BpfObject, size: int) -> npt.NDArray[np.uint32]:
    """Run the program once on every CPU of ours; return what the slots must hold now."""
    function = loaded.program("mark_own")
    usable = parallel.cpus()
    parallel.together(*[function.test_run for _ in usable])
    expected = np.zeros((libbpf.possible_cpus(), size // 4), np.uint32)
    for cpu in usable:
        expected[cpu] = (cpu + 1) << 16 | (np.arange(size // 4) + 1)
    return expected


def _read(
    table: Map, reader: str, expected: npt.NDArray[np.uint32], lookups: int
) -> dict[str, object]:
    """Read all slots by one reader, between guards, and compare with what is in them."""
    cpus, words = expected.shape
    size, stride = 4 * words, table.value_buffer().nbytes // cpus
    memory = np.zeros(2 * stride * cpus, np.uint8)
    key = table.encode_key(_KEY)
    lookup, fd = libbpf.api().bpf_map_lookup_elem, table.fd
    key_at, into = key.ctypes.data, memory.ctypes.data
    buffer_bytes = {"one": size, "packed": size * cpus, "map": stride * cpus}[reader]
    exact = table.reader(_KEY, memory[:buffer_bytes]) if reader == "map" else None

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
    if reader == "map":
        variant = "fixed"
    else:
        variant = "control" if size == stride and buffer_bytes == stride * cpus else "broken"
    return {
        "variant": variant,
        "case": f"{reader}-fits" if variant == "control" else reader,
        "reader": reader,
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
