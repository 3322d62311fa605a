"""What the tracepoint of a retransmission is called, proved by retransmissions."""

from __future__ import annotations

import re
import select
import socket
import subprocess
import time
from contextlib import ExitStack

import pandas as pd

from labkit.errors import BadInput, LabError, TimedOut, Unavailable
from labkit.kernel import network, programs
from labkit.kernel.compiler import LoadFailed
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child
from labkit.kernel.programs import BpfObject
from labkit.kernel.tools import find_tool, tracefs_folder
from labkit.lab.experiment import Case, Statement, Tables, experiment, say
from labkit.runs import Triad

_NAME, _ARTICLE_NAME = "tcp:tcp_retransmit_skb", "net:tcp_retransmit_skb"
_HERE, _NOBODY = "10.77.0.1", "10.77.0.2"
_FIRST_PORT = 21_000
_LIMIT_S = 30.0
_MOST_CONNECTIONS = 200  # of several descriptors each
_LOOK_S = 0.05  # a first segment without an answer is sent again after a second (TCP_TIMEOUT_INIT)


def _counted(tables: Tables) -> Tables:
    """Attachments to the article's name that were refused, and connections that were seen."""
    names, made = tables["names"], tables["connections"].set_index("case").to_dict("index")
    refused = names.loc[names["event"] == _ARTICLE_NAME, "answer"] != ""
    answered, lost = made["answered"], made["lost"]
    triad = Triad("retransmission not seen")
    triad.add("broken", case="net", operations=len(refused), anomalies=int(refused.sum()),
              anomaly="attachment refused")  # fmt: skip
    triad.add("control", case="answered", operations=answered["made"], anomalies=answered["seen"],
              anomaly="retransmission seen")  # fmt: skip
    triad.add("fixed", case="lost", operations=lost["made"],
              anomalies=lost["made"] - lost["seen"])  # fmt: skip
    return {"counts": triad.table()}


@experiment(
    "tracepoint-names",
    number=37,
    family="kernel-facts",
    question="Under which name can retransmissions be traced?",
    claims=("5.7",),
    needs=("bpf", "compile", "tracefs", "tracepoint", "netns_veth"),
    quick={"connections": 20},
    full={"connections": 200},
    cases=(
        Case("broken", "net", _ARTICLE_NAME),
        Case("control", "answered", f"{_NAME}, answered at once"),
        Case("fixed", "lost", f"{_NAME}, nobody answers"),
    ),
    derive=_counted,
    statements=(
        Statement("the article's name does not exist where the right one does",
                  f"all(broken) and none(names(event='{_ARTICLE_NAME}').exists)"
                  f" and all(names(event='{_NAME}').exists)"),
        Statement("the right one is among the kernel's events of retransmission",
                  f"some(similar.event == '{_NAME}')"),
        Statement("it sees every connection that is retransmitted", "none(fixed)"),
        Statement("it sees none that is not", "none(control)"),
    ),
    sentence=f"There is no {_ARTICLE_NAME}: attaching to it was refused. By {_NAME}, {{fixed}} "
    "connections that nobody answered were not seen retransmitted, and {control} that were "
    'answered were seen so. This kernel has {rows(similar)} events with "retransmit" in their '
    "names.",
)  # fmt: skip
def tracepoint_names(*, connections: int) -> Tables:
    """Attach to both names, and have segments retransmitted to an address where nobody is.

    The tracepoint is declared under ``TRACE_SYSTEM tcp`` (include/trace/events/tcp.h), and that
    is its category. In a network of our own, a connection to an address without a host has its
    first segment sent again after a second; each goes to a port of its own.

    Parameters
    ----------
    connections : int
        Connections that must be retransmitted, and as many that are answered at once; 200 at
        most.

    Returns
    -------
    dict of DataFrame
        ``names``: ``event``, ``exists`` (in tracefs), ``answer`` of attaching to it (empty where
        it was attached). ``connections``: ``case``, ``made``, ``seen`` (retransmitted).
        ``similar``: ``event``, every event of this kernel with "retransmit" in its name.
    """
    if connections > _MOST_CONNECTIONS:
        raise BadInput(f"connections of tracepoint-names are {_MOST_CONNECTIONS} at most.")
    answered = range(_FIRST_PORT, _FIRST_PORT + connections)
    lost = range(_FIRST_PORT + connections, _FIRST_PORT + 2 * connections)
    with programs.load("tracepoint_names", PORT_OFFSET=_port_offset()) as loaded:
        names = pd.DataFrame([_name(loaded, event) for event in (_NAME, _ARTICLE_NAME)])
        seen = loaded.map("seen")
        loaded.attach(loaded.program("on_retransmit", ProgramKind.TRACEPOINT), _NAME)
        say(f"{connections} connections that are answered, and {connections} that are not")
        with Child(lambda: _connect(answered, lost)) as child:
            _wait(seen, lost, child)
        rows = [
            {"case": case, "made": len(ports), "seen": len(_ports(seen) & set(ports))}
            for case, ports in (("answered", answered), ("lost", lost))
        ]
    return {"names": names, "connections": pd.DataFrame(rows), "similar": _similar()}


def _port_offset() -> int:
    category, _, event = _NAME.partition(":")
    format_file = tracefs_folder() / "events" / category / event / "format"
    try:
        found = re.search(r"__u16 dport;\s*offset:(\d+);", format_file.read_text())
    except OSError:
        found = None
    if found is None:
        raise Unavailable(f"This kernel has no {_NAME} that tells a port: use another one.")
    return int(found[1])


def _name(loaded: BpfObject, event: str) -> dict[str, object]:
    exists = (tracefs_folder() / "events" / event.replace(":", "/")).is_dir()
    answer = ""
    try:
        program = loaded.program("on_retransmit", ProgramKind.TRACEPOINT)
        loaded.detach(loaded.attach(program, event))
    except LoadFailed as refused:
        answer = str(refused)
    return {"event": event, "exists": exists, "answer": answer}


def _similar() -> pd.DataFrame:
    found = sorted((tracefs_folder() / "events").glob("*/*retransmit*"))
    return pd.DataFrame({"event": [f"{path.parent.name}:{path.name}" for path in found]})


def _connect(answered: range, lost: range) -> None:
    """In a network of our own: some connections are answered, others never; runs in a child."""
    network.enter_own_network()
    ip = find_tool("ip")
    for words in (
        "link set lo up",
        f"addr add {_HERE}/24 dev {network.ENDS[0]}",
        f"neigh add {_NOBODY} lladdr 02:00:00:00:77:02 dev {network.ENDS[0]}",
    ):
        subprocess.run([str(ip), *words.split()], check=True, timeout=_LIMIT_S)
    with ExitStack() as sockets:
        for port in answered:
            server = sockets.enter_context(socket.create_server((_HERE, port)))
            sockets.enter_context(socket.create_connection((_HERE, port), timeout=_LIMIT_S))
            sockets.enter_context(server.accept()[0])
        waiting = select.poll()
        for port in lost:
            one = sockets.enter_context(socket.socket())
            one.setblocking(False)
            if one.connect_ex((_NOBODY, port)) == 0:
                raise LabError(f"Somebody answered at {_NOBODY}.")
            waiting.register(one, select.POLLOUT)
        time.sleep(_LIMIT_S)  # the kernel sends again; we are ended when it has been seen


def _ports(seen: Map) -> set[int]:
    return set(seen.snapshot().keys.tolist())


def _wait(seen: Map, lost: range, child: Child) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not set(lost) <= _ports(seen):
        if child.ended():
            child.result()
        if time.monotonic() > deadline:
            raise TimedOut(f"Not all connections were retransmitted within {_LIMIT_S:g} s.")
        time.sleep(_LOOK_S)
