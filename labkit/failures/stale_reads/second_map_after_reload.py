"""A reload makes a second map of the same name; the attached program still reads the first."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.pins import PinFolder
from labkit.kernel.sockets import GuardedSocket

_PEER, _ALLOW, _DENY = 0, 1, 2
_SETTINGS = (
    # variant, case, the loader runs again, the map is pinned and used again
    ("broken", "loader makes its map anew", True, False),
    ("control", "no reload", False, False),
    ("fixed", "loader uses the pinned map again", True, True),
)


@experiment(
    "second-map-after-reload",
    number=2,
    family="stale-reads",
    question="After a reload, does the program that stayed attached read the map that is written?",
    claims=("1.4a", "1.2d"),
    needs=("bpf", "compile", "bpffs_detached"),
    quick={"changes": 200, "packets": 5, "rounds": 2},
    full={"changes": 1_000, "packets": 10, "rounds": 10},
)
def second_map_after_reload(*, changes: int, packets: int, rounds: int) -> Tables:
    """Change the policy from allow to deny and back, and count what the program lets in.

    A program refers to its maps by address, fixed when it is loaded; names play no part
    (kernel/bpf/verifier.c, ``resolve_pseudo_ldimm64``). A loader that runs again without a
    pin creates a second map, writes the policy there, and every tool that goes by the
    newest id or by the new process shows the new value, while the program attached
    earlier keeps the first map alive and obeys it (cilium/cilium#45196,
    aws/aws-network-policy-agent#514).

    The program is a socket filter that drops what is not allowed; the traffic is real.

    Parameters
    ----------
    changes : int
        Policy changes in a round, deny and allow in turns.
    packets : int
        Datagrams sent after each change.
    rounds : int
        Rounds of every setting, in turns.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a datagram, an anomaly one that was treated against the
        newest policy, ``cost_ns`` the time of one policy change. ``rounds``: per setting
        and round ``variant``, ``case``, ``round``, ``sent``, ``let_in``, ``should_be_in``,
        ``against_policy``, ``written_id`` and ``obeyed_id`` (ids of the map that was
        written, and of the one that the attached program refers to), ``same_name`` (bool:
        both bear one name), ``shown`` (the value that a look into the written map shows at
        the end), ``obeyed`` (the value in the program's own map), ``meant``, ``change_ns``
        (float64, median). Values: 1 allows, 2 denies.
    """
    rows = []
    for turn in range(rounds):
        for variant, case, reload, pinned in _SETTINGS:
            say(f"round {turn + 1} of {rounds}: {case}")
            row = _measure(changes, packets, reload=reload, pinned=pinned)
            rows.append({"variant": variant, "case": case, "round": turn, **row})
    table = pd.DataFrame(rows)
    triad = Triad("stale decision")
    triad.add_cases(
        table,
        operations=table["sent"],
        anomalies=table["against_policy"],
        cost_ns=table["change_ns"],
    )
    return {"counts": triad.table(), "rounds": table}


def _measure(changes: int, packets: int, *, reload: bool, pinned: bool) -> dict[str, float | bool]:
    with PinFolder() as pins, GuardedSocket() as traffic:
        pin = {"PIN": pins.path("policy")} if pinned else {}
        with programs.load("socket_policy", **pin) as first:
            guard = first.function("guard", ProgramKind.SOCKET_FILTER)
            traffic.attach(guard)
            first.map("policy").update(_PEER, _ALLOW)
            if not reload:
                return _change(first.map("policy"), guard, traffic, changes, packets)
            # The new loader makes or finds its map and loads its program, but the program
            # that guards the socket is not replaced: nobody told the one who attached it.
            with programs.load("socket_policy", **pin) as second:
                second.function("guard", ProgramKind.SOCKET_FILTER)
                return _change(second.map("policy"), guard, traffic, changes, packets)


def _change(
    written: Map, guard: programs.Function, traffic: GuardedSocket, changes: int, packets: int
) -> dict[str, float | bool]:
    """Change the policy through one map and watch what the attached program makes of it."""
    let_in = should_be_in = against_policy = 0
    spent_ns = []
    for left in range(changes, 0, -1):
        verdict = _DENY if left % 2 else _ALLOW  # the last change denies
        begun = time.monotonic_ns()
        written.update(_PEER, verdict)
        spent_ns.append(time.monotonic_ns() - begun)
        wanted = packets if verdict == _ALLOW else 0
        arrived = traffic.send(packets)
        let_in, should_be_in = let_in + arrived, should_be_in + wanted
        against_policy += abs(arrived - wanted)
    (obeyed_id,) = libbpf.prog_map_ids(guard.fd)
    with Map.from_id(obeyed_id) as obeyed:
        return {
            "sent": changes * packets,
            "let_in": let_in,
            "should_be_in": should_be_in,
            "against_policy": against_policy,
            "written_id": written.id,
            "obeyed_id": obeyed_id,
            "same_name": written.name == obeyed.name,
            "shown": int(written.lookup(_PEER)),
            "obeyed": int(obeyed.lookup(_PEER)),
            "meant": _DENY,
            "change_ns": float(np.median(spent_ns)),
        }
