"""Experiments that end in every way that there is; none but the last touches the kernel."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from functools import partial

import pandas as pd

from labkit.errors import Unavailable
from labkit.figures import anomaly_rates
from labkit.lab.experiment import Statement, Tables, Value, experiment, say
from labkit.lab.parts import Parts
from labkit.lab.progress import Meter
from labkit.runs import Triad


def _counts(lost: int) -> Tables:
    triad = Triad("lost")
    triad.add("broken", case="toy", operations=100, anomalies=lost, cost_ns=5.0)
    triad.add("control", case="toy", operations=100, anomalies=0)
    triad.add("fixed", case="toy", operations=100, anomalies=0)
    return {"counts": triad.table()}


def counts(*, lost: int) -> Tables:
    """Count what it is told to."""
    say(f"losing {lost}")
    return _counts(lost)


def sleeps(*, seconds: float) -> Tables:
    """Start a helper that knows nothing of us, and sleep."""
    helper = subprocess.Popen(["sleep", str(seconds)])
    say(f"worker {os.getpid()} helper {helper.pid}")
    time.sleep(seconds)
    return _counts(1)


def spins(*, letters: int) -> Tables:
    """Be busy in C, where no Python signal handler runs."""
    say(f"worker {os.getpid()}")
    re.match("(a+)+$", "a" * letters + "b")
    return _counts(1)


def lacks(*, lost: int) -> Tables:
    """Find that the kernel has no toys."""
    raise Unavailable("This kernel lacks toys: use one that has some.")


def raises(*, lost: int) -> Tables:
    """Have a bug."""
    raise ZeroDivisionError("a bug in a toy")


def aborts(*, lost: int) -> Tables:
    """Crash as C code does."""
    os.abort()


def holds_objects(*, seconds: float) -> Tables:
    """Hold a map, a pin and a network namespace with a device, and sleep."""
    from labkit.kernel.libbpf import MapKind
    from labkit.kernel.maps import Map
    from labkit.kernel.pins import PinFolder

    table = Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=1, name="toy_table")
    with table, PinFolder() as pins:
        table.pin(pins.path("toy"))
        inside = ["unshare", "--net", "sh", "-c", f"ip link add toy0 type veth && sleep {seconds}"]
        helper = subprocess.Popen(inside)
        say(f"worker {os.getpid()} helper {helper.pid} map {table.id}")
        time.sleep(seconds)
    return _counts(1)


def in_parts(*, pauses: int, seconds: float, parts: Parts) -> Tables:
    """Take naps, and tell who took which."""
    rows = []
    with Meter(pauses, done=parts.before, unit="nap") as meter:
        for nap in range(pauses):
            fresh = f"{nap:02}" not in parts
            rows.append(parts.measure(f"{nap:02}", partial(_nap, nap, seconds)))
            if fresh:
                meter.step()
    return {**_counts(1), "naps": pd.DataFrame(rows)}


def _nap(nap: int, seconds: float) -> dict[str, object]:
    time.sleep(seconds)
    return {"nap": nap, "worker": os.getpid(), "depth": float("nan")}


def _register(number: int, id: str, function: Callable[..., Tables], **values: Value) -> None:
    experiment(
        id, number=number, family="stale-reads", question=f"What does {id} do?",
        claims=("0.0",), needs=(), quick=values, full=values,
        statements=(Statement("some <lost>", "broken.anomalies < 9"),),
        sentence="{broken.anomalies} <lost>.", figure=anomaly_rates,
    )(function)  # fmt: skip


_register(901, "toy-counts", counts, lost=7)
_register(902, "toy-sleeps", sleeps, seconds=600.0)
_register(903, "toy-spins", spins, letters=64)
_register(904, "toy-lacks", lacks, lost=7)
_register(905, "toy-raises", raises, lost=7)
_register(906, "toy-aborts", aborts, lost=7)
_register(908, "toy-in-parts", in_parts, pauses=12, seconds=0.1)
_register(907, "toy-holds-objects", holds_objects, seconds=600.0)
