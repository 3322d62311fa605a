"""A handle kept to a map that was unpinned and made again: writes succeed, nobody reads them."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.pins import PinFolder
from labkit.kernel.sockets import GuardedSocket

_PEER, _ALLOW = 0, 1


class _Agent:
    """A writer that opened the policy once by its pin and keeps the handle."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.handle = Map.from_pin(path)
        self.reopened = 0

    def id_behind_path(self) -> int:
        fd = libbpf.open_pin(self.path)
        try:
            return int(libbpf.map_info(fd).id)
        finally:
            libbpf.close(fd)

    def reopen(self) -> None:
        self.handle.close()
        self.handle = Map.from_pin(self.path)
        self.reopened += 1

    def write(self) -> None:
        self.handle.update(_PEER, _ALLOW)

    def compare_and_write(self) -> None:
        # A map made again between these two calls is noticed at the next write.
        if self.id_behind_path() != self.handle.id:
            self.reopen()
        self.write()

    def open_and_write(self) -> None:
        self.reopen()
        self.write()


_SETTINGS: tuple[tuple[str, str, bool, Callable[[_Agent], None]], ...] = (
    # variant, case, the map is made again, how the agent writes
    ("broken", "handle kept", True, _Agent.write),
    ("control", "handle kept, map never made again", False, _Agent.write),
    ("fixed", "ids compared before each write", True, _Agent.compare_and_write),
    ("fixed", "path opened for each write", True, _Agent.open_and_write),
)


@experiment(
    "cached-handle",
    number=3,
    family="stale-reads",
    question="Does a write through a kept handle reach the map that now stands behind the pin?",
    claims=("1.2d", "1.4a"),
    needs=("bpf", "compile", "bpffs_detached"),
    quick={"recreations": 3, "writes": 100, "packets": 5},
    full={"recreations": 20, "writes": 500, "packets": 10},
)
def cached_handle(*, recreations: int, writes: int, packets: int) -> Tables:
    """Allow a peer through a handle opened earlier, and count what of its traffic is cut off.

    A descriptor refers to the map, not to the path: after ``unlink`` and a new pin at the
    same path the old map lives on for its last holder, takes every write and answers 0 (a
    pin is one more reference to the map, kernel/bpf/inode.c). An agent that keeps the handle
    over a reload of the programs fills a map that no program reads, and the new, empty one
    denies everybody: aws/aws-network-policy-agent#676, cilium/cilium#45196; in
    aws/aws-network-policy-agent#646 the kept handle had gone bad altogether, and the answer
    was ignored.

    The program is a socket filter that drops what is not allowed; the traffic is real.

    Parameters
    ----------
    recreations : int
        How often the pin is removed, the map made again, and the new program attached.
    writes : int
        Writes by the agent after each of these.
    packets : int
        Datagrams sent after each write.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a datagram of a peer that was allowed just before, an
        anomaly one that was dropped, ``cost_ns`` the time of one write. ``recreations``:
        per setting and recreation ``variant``, ``case``, ``recreation``, ``writes``,
        ``sent``, ``cut_off``, ``read_back`` (writes that the agent's own lookup confirmed),
        ``handle_id``, ``path_id`` and ``obeyed_id`` (ids of the map behind handle and path
        after the first write, and of the one that the attached program refers to),
        ``reopened`` (times that the agent opened the path again), ``write_ns`` (float64,
        median).
    """
    rows = []
    for variant, case, made_again, write in _SETTINGS:
        say(case)
        with PinFolder() as pins, GuardedSocket() as traffic:
            for row in _measure(pins, traffic, recreations, writes, packets, made_again, write):
                rows.append({"variant": variant, "case": case, **row})
    table = pd.DataFrame(rows)
    triad = Triad("cut off")
    triad.add_cases(
        table,
        operations=table["sent"],
        anomalies=table["cut_off"],
        cost_ns=table["write_ns"],
    )
    return {"counts": triad.table(), "recreations": table}


def _measure(
    pins: PinFolder,
    traffic: GuardedSocket,
    recreations: int,
    writes: int,
    packets: int,
    made_again: bool,
    write: Callable[[_Agent], None],
) -> list[dict[str, float]]:
    path = pins.path("policy")
    unit = programs.load("socket_policy", PIN=path)
    agent = _Agent(path)
    rows = []
    try:
        for turn in range(recreations):
            if made_again:
                pins.unpin("policy")
                unit.close()
                unit = programs.load("socket_policy", PIN=path)
            guard = unit.function("guard", ProgramKind.SOCKET_FILTER)
            traffic.attach(guard)
            agent.reopened = 0
            arrived, confirmed, spent_ns = 0, 0, []
            for _ in range(writes):
                begun = time.monotonic_ns()
                write(agent)
                spent_ns.append(time.monotonic_ns() - begun)
                confirmed += int(agent.handle.lookup(_PEER)) == _ALLOW
                arrived += traffic.send(packets)
            (obeyed_id,) = libbpf.prog_map_ids(guard.fd)
            rows.append(
                {
                    "recreation": turn,
                    "writes": writes,
                    "sent": writes * packets,
                    "cut_off": writes * packets - arrived,
                    "read_back": confirmed,
                    "handle_id": agent.handle.id,
                    "path_id": agent.id_behind_path(),
                    "obeyed_id": obeyed_id,
                    "reopened": agent.reopened,
                    "write_ns": float(np.median(spent_ns)),
                }
            )
    finally:
        agent.handle.close()
        unit.close()
    return rows
