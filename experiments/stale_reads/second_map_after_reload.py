"""A reload makes a second map of the same name; the attached program still reads the first."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.pins import PinFolder
from labkit.kernel.sockets import GuardedSocket
from labkit.lab.experiment import Case, Counted, Statement, experiment

_PEER, _ALLOW, _DENY = 0, 1, 2


@experiment(
    "second-map-after-reload",
    number=2,
    family="stale-reads",
    question="After a reload, does the program that stayed attached read the map that is written?",
    claims=("1.4a", "1.2d"),
    needs=("bpf", "compile", "bpffs_detached"),
    quick={"changes": 200, "packets": 5, "rounds": 2},
    full={"changes": 1_000, "packets": 10, "rounds": 10},
    cases=(
        Case("broken", "made-anew", "loader makes its map anew", reload=True),
        Case("control", "no-reload", "no reload"),
        Case("fixed", "pinned", "loader uses the pinned map again", reload=True, pinned=True),
    ),
    counted=Counted("stale decision", operations="sent", anomalies="against_policy",
                    cost_ns="change_ns"),
    statements=(
        Statement("the program that stayed attached obeys no change",
                  'all(0 < rounds(case="made-anew").against_policy '
                  '== rounds(case="made-anew").sent - rounds(case="made-anew").should_be_in)'),
        Statement("the written map shows the new value, the program's own the old one",
                  'all(rounds(case="made-anew").shown == rounds(case="made-anew").meant) '
                  'and none(rounds(case="made-anew").obeyed == rounds(case="made-anew").meant)'),
        Statement("map ids tell the two maps apart, and are one where it works; names are the "
                  "same everywhere",
                  'all((rounds.written_id != rounds.obeyed_id) == (rounds.case == "made-anew")) '
                  "and all(rounds.same_name)"),
        Statement("without a reload every change is obeyed", "none(control)"),
        Statement("cured by using the pinned map again", "none(fixed)"),
    ),
    sentence="After a reload that made its map anew, the attached program let in all "
    "{broken.anomalies} datagrams that the newest policy forbade, while the written map showed "
    'the new value in {rows(rounds(shown == meant, case="made-anew"))} of '
    '{rows(rounds(case="made-anew"))} rounds and the program\'s own in '
    '{rows(rounds(obeyed == meant, case="made-anew"))}. Without a '
    "reload {control}, with the pinned map used again {fixed} were treated against the policy. "
    'The ids told the two maps apart in {rows(rounds(written_id != obeyed_id, case="made-anew"))} '
    "rounds; their names were the same in "
    '{rows(rounds(same_name, case="made-anew"))}.',
)  # fmt: skip
def second_map_after_reload(case: Case, *, changes: int, packets: int) -> dict[str, Any]:
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
    case : Case
        Whether the loader runs again, and with a pin.
    changes : int
        Policy changes, deny and allow in turns.
    packets : int
        Datagrams sent after each change.

    Returns
    -------
    dict
        ``sent``, ``let_in``, ``should_be_in``, ``against_policy`` (datagrams treated against
        the newest policy), ``written_id`` and ``obeyed_id`` (ids of the map that was
        written, and of the one that the attached program refers to), ``same_name`` (bool:
        both bear one name), ``shown`` (the value that a lookup in the written map shows at
        the end), ``obeyed`` (the value in the program's own map), ``meant``, ``change_ns``
        (float64, median). Values: 1 allows, 2 denies.
    """
    with PinFolder() as pins, GuardedSocket() as traffic:
        pin = {"PIN": pins.path("policy")} if case.get("pinned", False) else {}
        with programs.load_by_bcc("socket_policy", **pin) as first:
            guard = first.program("guard", ProgramKind.SOCKET_FILTER)
            traffic.attach(guard)
            first.map("policy").update(_PEER, _ALLOW)
            if not case.get("reload", False):
                return _change(first.map("policy"), guard, traffic, changes, packets)
            # The new loader makes or finds its map and loads its program, but the program
            # that guards the socket is not replaced: nobody told the one who attached it.
            with programs.load_by_bcc("socket_policy", **pin) as second:
                second.program("guard", ProgramKind.SOCKET_FILTER)
                return _change(second.map("policy"), guard, traffic, changes, packets)


def _change(
    written: Map, guard: programs.Program, traffic: GuardedSocket, changes: int, packets: int
) -> dict[str, Any]:
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
