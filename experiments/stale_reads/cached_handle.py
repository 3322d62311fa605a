"""A handle kept to a map that was unpinned and made again: writes succeed, nobody reads them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd

from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.pins import PinFolder
from labkit.kernel.sockets import GuardedSocket
from labkit.lab.experiment import Case, Counted, Statement, experiment

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


@experiment(
    "cached-handle",
    number=3,
    family="stale-reads",
    question="Does a write through a kept handle reach the map that now stands behind the pin?",
    claims=("1.2d", "1.4a"),
    needs=("bpf", "compile", "bpffs_detached"),
    quick={"recreations": 3, "writes": 100, "packets": 5, "rounds": 1},
    full={"recreations": 20, "writes": 500, "packets": 10, "rounds": 1},
    cases=(
        Case("broken", "kept", "handle kept", made_again=True, write=_Agent.write),
        Case("control", "left-in-place", "handle kept, map never made again",
             write=_Agent.write),
        Case("fixed", "compared", "ids compared before each write", made_again=True,
             write=_Agent.compare_and_write),
        Case("fixed", "reopened", "path opened for each write", made_again=True,
             write=_Agent.open_and_write),
    ),
    counted=Counted("cut off", operations="sent", anomalies="cut_off", cost_ns="write_ns",
                    of="recreations"),
    statements=(
        Statement("everything written through the kept handle is lost on the program",
                  "all(broken)"),
        Statement("the handle's own lookups confirm every write",
                  "all(0 < recreations.read_back == recreations.writes)"),
        Statement("the ids behind handle and path differ each time that the handle is kept over a "
                  "new map, and never else",
                  "all((recreations.handle_id != recreations.path_id) "
                  '== (recreations.case == "kept"))'),
        Statement("the attached program always uses the map behind the path",
                  "all(0 < recreations.path_id == recreations.obeyed_id)"),
        Statement("no datagram is cut off while the map stays", "none(control)"),
        Statement("comparing ids, or opening the path for each write, is a cure", "none(fixed)"),
        Statement("comparing ids opens the path once for each new map",
                  'all(recreations(case="compared").reopened == 1)'),
    ),
    sentence="Once the map was made again behind its pin, {broken} datagrams of an allowed peer "
    "were cut off, though all writes through the kept handle succeeded and its own lookups "
    'confirmed {sum(recreations(case="kept").read_back)} of '
    '{sum(recreations(case="kept").writes)}. With the map left in place {control} were. '
    "Comparing the id behind the path with the id behind the handle before each write brought it "
    'to {fixed["compared"]}, for {us(fixed["compared"].cost_ns - control.cost_ns)} more a write '
    "in Python.",
)  # fmt: skip
def cached_handle(case: Case, *, recreations: int, writes: int, packets: int) -> dict[str, Any]:
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
    case : Case
        Whether the map is made again, and how the agent writes.
    recreations : int
        How often the pin is removed, the map made again, and the new program attached.
    writes : int
        Writes by the agent after each of these.
    packets : int
        Datagrams sent after each write.

    Returns
    -------
    dict
        ``recreations``: for each ``recreation`` ``writes``, ``sent`` (datagrams of a peer
        that was allowed just before), ``cut_off``, ``read_back`` (writes that the agent's
        own lookup confirmed), ``handle_id``, ``path_id`` and ``obeyed_id`` (ids of the map
        behind handle and path after the last write, and of the one that the attached program
        refers to), ``reopened`` (times that the agent opened the path again), ``write_ns``
        (float64, median).
    """
    with PinFolder() as pins, GuardedSocket() as traffic:
        return {"recreations": _measure(case, pins, traffic, recreations, writes, packets)}


def _measure(
    case: Case,
    pins: PinFolder,
    traffic: GuardedSocket,
    recreations: int,
    writes: int,
    packets: int,
) -> pd.DataFrame:
    path = pins.path("policy")
    loaded = programs.load_by_bcc("socket_policy", PIN=path)
    agent = _Agent(path)
    rows = []
    try:
        for turn in range(recreations):
            if case.get("made_again", False):
                pins.unpin("policy")
                loaded.close()
                loaded = programs.load_by_bcc("socket_policy", PIN=path)
            guard = loaded.program("guard", ProgramKind.SOCKET_FILTER)
            traffic.attach(guard)
            agent.reopened = 0
            arrived, confirmed, spent_ns = 0, 0, []
            for _ in range(writes):
                begun = time.monotonic_ns()
                case.write(agent)
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
        loaded.close()
    return pd.DataFrame(rows)
