"""What a watch costs whoever updates a map: ``labkit bench watch``.

Judged by :mod:`experiments.bench.watch_bars`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.bench import watch_bars as bars
from labkit.errors import LabError, TimedOut
from labkit.inspect.watch import Watch
from labkit.kernel import probe, programs
from labkit.kernel.btf import member_offset
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, cpus, shared_array
from labkit.kernel.provenance import provenance, usage, usage_since
from labkit.kernel.ringbuf import RingReader
from labkit.lab import bench
from labkit.lab.driver import in_turns
from labkit.lab.experiment import say
from labkit.runs import Run
from labkit.sync.trace_hook import best_mechanism, way_to_map

PROFILES: Final[dict[str, dict[str, Any]]] = {
    "quick": {"updates": 20_000, "repetitions": 9},
    "full": {"updates": 100_000, "repetitions": 25},
}

_RING_BYTES: Final = 1 << 24
_READY_S: Final = 60.0
_WAIT_S: Final = 0.02
_READY, _WRITTEN = 0, 1  # what writer and watcher tell each other
_WARM_UP: Final = 10
_MAP_ID_AT: Final = 24  # in struct record of bpf/unfiltered_watch.bpf.c


def updates(count: int, repetitions: int, *, writer_cpu: int, watcher_cpu: int) -> pd.DataFrame:
    """Update one map again and again, with each way to watch in its turn.

    Who watches is another process, on a CPU of its own where there are two, and takes the events
    as they come. The clock is the writer's CPU time: other load adds to it little.

    Parameters
    ----------
    count : int
        Updates of one key for each way in a repetition.
    repetitions : int
        Of all ways, in another order each time.
    writer_cpu, watcher_cpu : int
        CPUs.

    Returns
    -------
    DataFrame
        A row for each way and repetition: ``way``, ``repetition``, ``updates``, ``cpu_ns`` (of the
        writer, for all updates), and the account of the events: ``produced`` (as many as the way
        makes of these updates), ``delivered``, ``dropped``.

    Raises
    ------
    LabError
        The events do not add up.
    TimedOut
        A watcher did not begin.
    """
    rows = []
    with _table("bench_written") as table, _table("bench_other") as other:
        watchers: dict[str, Callable[[npt.NDArray[np.int64]], tuple[int, int]]] = {
            bars.NOBODY: _nobody,
            bars.WATCHED: lambda shared: _watch(table, shared),
            bars.UNWATCHED: lambda shared: _watch(other, shared),
            bars.PEER: lambda shared: _peer(table, shared),
        }
        for turn, way in in_turns(list(watchers), repetitions):
            shared = shared_array(2, np.int64)
            with Child(partial(watchers[way], shared), cpu=watcher_cpu) as child:
                _wait_until_ready(child, shared)
                with Child(lambda: _write(table, count), cpu=writer_cpu) as writer:
                    cpu_ns = writer.result()
                shared[_WRITTEN] = 1
                delivered, dropped = child.result()
            produced = (count + count // _WARM_UP) * bars.EVENTS[way]
            if delivered + dropped != produced:
                raise LabError(
                    f"{way}: {produced:,} events, {delivered:,} delivered and {dropped:,} dropped."
                )
            rows.append((way, turn, count, cpu_ns, produced, delivered, dropped))
            if len(rows) % len(watchers) == 0:
                say(f"watch: {len(rows) // len(watchers)} of {repetitions} repetitions")
    columns = ["way", "repetition", "updates", "cpu_ns", "produced", "delivered", "dropped"]
    return pd.DataFrame(rows, columns=columns)


def _table(name: str) -> Map:
    return Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8, name=name)


def _wait_until_ready(child: Child, shared: npt.NDArray[np.int64]) -> None:
    deadline = time.monotonic() + _READY_S
    while not shared[_READY]:
        if child.ended():
            child.result()  # raises what went wrong
        if time.monotonic() > deadline:
            raise TimedOut(f"A watcher was not ready within {_READY_S:g} s.")
        time.sleep(_WAIT_S / 10)
    time.sleep(_WAIT_S)  # it waits at its ring by then


def _write(table: Map, count: int) -> int:
    """CPU time of so many updates, nanoseconds; the first tenth warms up, and is told as well."""
    update = table.updater(1, np.zeros(1, "u8"))
    for _ in range(count // _WARM_UP):
        update()
    begun = time.thread_time_ns()
    for _ in range(count):
        update()
    return time.thread_time_ns() - begun


def _nobody(shared: npt.NDArray[np.int64]) -> tuple[int, int]:
    shared[_READY] = 1
    while not shared[_WRITTEN]:
        time.sleep(_WAIT_S)
    return 0, 0


def _watch(table: Map, shared: npt.NDArray[np.int64]) -> tuple[int, int]:
    """What a watch told and dropped."""
    with Watch(table) as watch:
        shared[_READY] = 1
        while not shared[_WRITTEN]:
            watch.poll(_WAIT_S)
        while watch.poll(0):
            pass
        watch.end()
        return watch.seen + watch.refused, watch.dropped


@contextmanager
def _unfiltered(ring: Map) -> Iterator[None]:
    """Hook the updates of every hash, as `bpf/unfiltered_watch.bpf.c` does."""
    fields = {
        "KEY_SIZE_AT": "key_size", "VALUE_SIZE_AT": "value_size", "BTF_AT": "btf",
        "KEY_BTF_ID_AT": "btf_key_type_id", "VALUE_BTF_ID_AT": "btf_value_type_id",
        "KERNEL_VALUE_BTF_ID_AT": "btf_vmlinux_value_type_id",
    }  # fmt: skip
    constants = {name: member_offset("bpf_map", member) for name, member in fields.items()}
    with programs.load(
        "unfiltered_watch", RING_FD=ring.fd, BTF_ID_AT=member_offset("btf", "id"), **constants,
        **way_to_map(),
    ) as unit:  # fmt: skip
        if best_mechanism() == "functions":
            program = unit.program("on_update", hook="fexit:htab_map_update_elem")
        else:
            program = unit.program("on_return", hook="tp_btf:sys_exit")
        held = unit.attach(program)
        try:
            yield
        finally:
            unit.detach(held)


def _peer(table: Map, shared: npt.NDArray[np.int64]) -> tuple[int, int]:
    """What the peer told of this map, among all others; it does not know what it dropped.

    Its reader looks now and then, and is woken by no event: that would cost the writer more.
    """
    with (
        Map.create(
            MapKind.RINGBUF, key=None, value=None, max_entries=_RING_BYTES, name="bench_peer"
        ) as ring,
        RingReader(ring, "u8") as reader,
    ):
        delivered = 0
        with _unfiltered(ring):
            shared[_READY] = 1
            ended = False
            while not ended:
                ended = bool(shared[_WRITTEN])
                time.sleep(_WAIT_S)
                while len((records := reader.read_any()).places):
                    words = records.data.view(np.uint32)
                    ids = words[(records.places["start"] + _MAP_ID_AT) // 4]
                    delivered += int((ids == table.id).sum())
        return delivered, 0


def measure(profile: str) -> Run:
    """Measure here and now.

    Parameters
    ----------
    profile : str
        ``quick`` or ``full``.

    Returns
    -------
    Run
        Not saved yet. ``updates``: as `updates` answers.

    Raises
    ------
    Unavailable
        The machine lacks something; the sentence says what.
    """
    probe.require("bpf", "hash", "ringbuf", "compile")
    parameters = dict(PROFILES[profile])
    here = cpus()
    bench.ahead_of_all()
    facts, ticks = provenance(), usage()
    table = updates(
        parameters["updates"], parameters["repetitions"], writer_cpu=here[0], watcher_cpu=here[-1]
    )
    facts["during"] = usage_since(ticks)
    parameters["mechanism"] = best_mechanism()
    return Run(bars.EXPERIMENT, profile, parameters, facts, {"updates": table})


BENCHMARK: Final = bench.Benchmark(measure, bars.results, bars.judge)
