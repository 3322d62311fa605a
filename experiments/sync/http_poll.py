"""Poll a status server over HTTP, as the article does: where the delay of a change goes."""

from __future__ import annotations

import functools
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import LabError, Unavailable
from labkit.figures import Axes, Figure, style
from labkit.judge.statistics import uniform_fits
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child
from labkit.kernel.provenance import emulated
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment
from labkit.load import open_loop
from labkit.load.open_loop import OpenLoopWriter
from labkit.runs import SLOWER, Run

PARTS = ("wait", "name lookup", "connect", "TLS", "request", "server", "compare")
"""What the delay of a change is made of, in the order of time."""

_HOST = "localhost"
_TIMEOUT_S = 5.0  # of every operation on a socket, on both sides
_REFUSE_EVERY = 3  # requests to _FLAKY
_STATUS, _FLAKY = "/status", "/flaky"
_NEWS, _NO_CHANGE, _UNKNOWN = "change", "no change", "unknown"


# A hatch says the same as the colour, for print in grey.
_LOOKS = {
    "wait": ("#D9D9D9", ""),
    "name lookup": (style.YELLOW, "...."),
    "connect": (style.ORANGE, ""),
    "TLS": (style.VERMILLION, "////"),
    "request": (style.SKY, ""),
    "server": (style.BLUE, "\\\\\\\\"),
    "compare": (style.BLACK, ""),
}


def _figure(run: Run) -> Figure:
    """Stacked bars of the parts: above of a change's delay, below of one poll, all but the wait.

    A bar is the mean over the middle half of the delays: parts still add up, and the few that
    other load on the machine held up do not count. Those show in the 99th percentile beside it.
    The first poll over a kept connection, which opens it, is left out below.
    """
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(style.HALF_PAGE[0] * 1.35, 4.6), height_ratios=(8, 4.6)
    )
    answered = run.cases("control")
    kept = run.table("rounds").query("kept == 1")["case"]
    pairs = zip(run.cases("broken"), run.cases("fixed"), strict=True)
    others = [case for pair in pairs for case in pair]
    _stacked(above, run, run.table("changes"), list(PARTS), answered + others)
    above.set_xlabel("delay of a change (ms): middle half, and p99", loc="right")
    polls = run.table("polls")
    opening = polls["case"].isin(kept) & (polls["connect"] > 0)
    _stacked(below, run, polls[~opening], list(PARTS[1:]), answered)
    below.set_xlabel("one poll, all but the wait (ms): middle half, and p99", loc="right")
    handles, labels = above.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, columnspacing=1.2)
    return figure


def _stacked(ax: Axes, run: Run, table: pd.DataFrame, parts: list[str], cases: list[str]) -> None:
    rows, left = np.arange(len(cases)), np.zeros(len(cases))
    whole = table[parts].sum(axis=1).groupby(table["case"])
    tail = whole.quantile(0.99).loc[cases] / 1e6
    middle = whole.rank(pct=True).between(0.25, 0.75)
    means = table[middle].groupby("case")[parts].mean().loc[cases] / 1e6
    for part in parts:
        color, hatch = _LOOKS[part]
        ax.barh(rows, means[part], left=left, height=0.72, color=color, hatch=hatch, lw=0.3,
                edgecolor=style.BLACK, label=part)  # fmt: skip
        left += means[part].to_numpy()
    for row, total, late in zip(rows, left, tail, strict=True):
        ax.annotate(f"{total:.3g} (p99 {late:.3g})", (total, row), xytext=(3, 0),
                    textcoords="offset points", va="center", fontsize=6)  # fmt: skip
    style.rows(ax, [run.label(case).replace("new connection", "new") for case in cases])
    ax.set_xlim(0, left.max() * 1.28)


def derive(tables: Tables) -> Tables:
    """What the statements compare: sums of parts, and the wait with the uniform law.

    ``sums``: ``case``, ``delay``, ``parts`` (their sum), ``least`` (of them), one row for each
    change, nanoseconds. ``took``: ``case``, ``round``, ``ns`` of each poll. ``fits``: of the wait,
    see `uniform_fits`.
    """
    polls, changes = tables["polls"], tables["changes"]
    parts, waits = changes[list(PARTS)], changes.assign(wait_ms=changes["wait"] / 1e6)
    return {
        "sums": changes[["case", "delay"]].assign(parts=parts.sum(axis=1), least=parts.min(axis=1)),
        "took": polls[["case", "round"]].assign(ns=polls[list(PARTS[1:])].sum(axis=1)),
        "fits": uniform_fits(waits, "wait_ms"),
    }


@experiment(
    "http-poll",
    number=42,
    family="sync",
    question="Where does the delay go when a change is polled for over HTTP?",
    claims=("3.2",),
    needs=("bpf", "two_cpus"),
    # Changes times their gap: whole periods, or waits would not be uniform on them.
    quick={"period_ms": 20.0, "gap_ms": 8.0, "changes": 15, "rounds": 7, "seed": 5},
    full={"period_ms": 20.0, "gap_ms": 8.0, "changes": 40, "rounds": 8, "seed": 5},
    cases=(
        Case("control", "plain-kept", "plain, kept", keep=True),
        Case("control", "plain-new", "plain, new connection"),
        Case("control", "tls-kept", "TLS, kept", tls=True, keep=True),
        Case("control", "tls-new", "TLS, new connection", tls=True),
        Case("broken", "plain-ignored", "plain, new connection, errors ignored", path=_FLAKY),
        Case("fixed", "plain-heeded", "plain, new connection, errors heeded", path=_FLAKY),
        Case("broken", "tls-ignored", "TLS, new connection, errors ignored", tls=True,
             path=_FLAKY),
        Case("fixed", "tls-heeded", "TLS, new connection, errors heeded", tls=True, path=_FLAKY),
    ),
    counted=Counted("false no change", operations="asked", anomalies="false",
                    cost_ns="poll_cpu_ns"),
    derive=derive,
    statements=(
        Statement("the parts of every delay add up to it, to the nanosecond",
                  "all(sums.parts == sums.delay and sums.delay > 0 and sums.least >= 0)"),
        # One in 10,000 such runs would have so little by chance.
        Statement("where the connection is plain and kept, a change waits uniformly over the "
                  "period, but for polls that are late",
                  'between(fits(case="plain-kept").p_least, fits(case="plain-kept").p_value) '
                  "> 0.0001"),
        Statement("which is most of the delay",
                  'spread(changes(case="plain-kept").wait / changes(case="plain-kept").delay) '
                  "> 0.5"),
        Statement("TLS on a new connection makes the poll itself longer",
                  'ratio(took(case="tls-new").ns, took(case="plain-kept").ns) > 1'),
        Statement("every request that was sent was served",
                  "all(rounds.served == rounds.asked and rounds.asked > 0)"),
        Statement("a kept connection is opened once, and the others once a poll",
                  "all(rounds(kept=1).connections == 1) "
                  "and all(rounds(kept=0).connections == rounds(kept=0).asked)"),
        Statement("a server that answers hides no change", "none(control)"),
        Statement("ignored errors pass for no change", "some(broken)"),
        Statement("and nothing else does", "all(polls(false).refused)"),
        Statement("errors that are heeded hide no change", "none(fixed)"),
        Statement("although the server refused polls there",
                  'some(polls(case=("plain-heeded", "tls-heeded")).refused)'),
    ),
    sentence="Over a plain connection that is kept, "
    '{percent(median(changes(case="plain-kept").wait / changes(case="plain-kept").delay))} of a '
    "change's delay was the wait for the next poll. The poll itself took "
    '{ms(median(took(case="plain-kept").ns))} there, and {ms(median(took(case="tls-new").ns))} '
    "with TLS and a new connection each time. A client that ignores errors believed {broken} times "
    "wrongly that nothing had changed; one that heeds them {fixed}.",
    figure=_figure,
)  # fmt: skip
def http_poll(
    case: Case, *, period_ms: float, gap_ms: float, changes: int, seed: int, turn: int
) -> dict[str, Any]:
    """Ask a status server for the version in a map, every so often, and compare.

    A server in a process of its own, on 127.0.0.1, looks the version up in the map and answers
    JSON. Each of four clients, plain and TLS, with a new connection for each poll and with one
    that is kept, stamps its steps. TLS is 1.3 with a P-256 certificate that the client verifies;
    it is made for the run and never reaches a disk. Sessions are not resumed. Client and server
    are Python: their parts hold the interpreter's time.

    The article's client ignores errors, and so takes a request that failed for "no change". In
    broken the server refuses every third request (503); in fixed the same client notices, and
    asks again at once.

    Parameters
    ----------
    case : Case
        The client, and the path that it asks for.
    period_ms : float
        Poll period, milliseconds.
    gap_ms : float
        Mean gap between two changes, milliseconds; open loop. Where
        the CPU is emulated, period and gap are `SLOWER` times as long, or a poll would take longer
        than its period.
    changes : int
        Changes in a round.
    seed : int
        Of the schedule; all clients follow the same one in a round, and another in the next.
    turn : int
        The round.

    Returns
    -------
    dict
        ``asked``: how many polls, ``false``: those after which the client believed that nothing
        had changed although a newer version had been committed before the poll began, ``served``
        and ``connections`` (by the server's count), ``kept``: 1 where one is, ``poll_cpu_ns``: the
        client's CPU time per poll. ``polls``: ``answer`` (``change``, ``no change``,
        ``unknown``), ``refused``, ``false`` (bool) and one column for each of `PARTS` but the first
        (int64 nanoseconds; 0 for a step that was not needed).
        ``changes``: ``version``, ``seen_as`` (the version by which it was noticed), ``period_ms``
        (as it was kept here), ``delay`` (int64 nanoseconds from the intended moment to the end of
        the comparison), and `PARTS`: how much of that delay fell into each step.

    Raises
    ------
    Unavailable
        The openssl command is missing, or localhost is not 127.0.0.1 here.
    """
    if emulated():
        period_ms, gap_ms = period_ms * SLOWER, gap_ms * SLOWER
    moments = open_loop.schedule(changes, gap_ms, seed + turn)
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=1) as table:
        table.update(0, 0)
        log, cpu_ns, writer, (served, connections) = _follow(case, table, moments, period_ms)
    false = _false_no_change(log, writer.times[:, 1])
    return {
        "kept": int(case.get("keep", False)),
        "polls": _table_of_polls(log, false),
        "changes": _table_of_changes(log, writer.intended_ns).assign(period_ms=period_ms),
        "asked": len(log),
        "false": int(false.sum()),
        "served": served,
        "connections": connections,
        "poll_cpu_ns": cpu_ns / len(log),
    }


@dataclass
class _Poll:
    """One poll: its steps' ends in the order of `PARTS`, CLOCK_MONOTONIC nanoseconds."""

    knew: int  # version before
    edges: list[int] = field(default_factory=list)  # start, then the end of each step
    server: tuple[int, int] = (0, 0)  # from the request's arrival to the answer's departure
    refused: bool = False
    answer: str = _UNKNOWN
    version: int = 0

    def spans(self) -> list[list[tuple[int, int]]]:
        """Intervals of each of `PARTS` but the wait; together they cover the poll, once."""
        start, named, connected, secured, answered, compared = self.edges
        begun, ended = self.server
        return [
            [(start, named)],
            [(named, connected)],
            [(connected, secured)],
            [(secured, begun), (ended, answered)],
            [(begun, ended)],
            [(answered, compared)],
        ]


# -- the server ----------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    requests = connections = 0

    def __init__(self, table: Map, context: ssl.SSLContext | None) -> None:
        self.table, self.context = table, context
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    def count(self) -> int:
        with self.lock:
            self.requests += 1
            return self.requests

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve one connection; the handshake is its own thread's."""
        with self.lock:
            self.connections += 1
        request.settimeout(_TIMEOUT_S)
        if self.context is None:
            super().finish_request(request, client_address)
            return
        with self.context.wrap_socket(request, server_side=True) as secure:
            super().finish_request(secure, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; one that failed tells of it itself."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = _TIMEOUT_S
    wbufsize = -1  # one write for header and body

    def parse_request(self) -> bool:
        self.arrived_ns = time.monotonic_ns()
        return super().parse_request()

    def do_GET(self) -> None:
        server = cast(_Server, self.server)
        number = server.count()
        if self.path == "/counts":
            answer: dict[str, int] = {"served": number - 1, "connections": server.connections - 1}
        else:
            answer = {"version": int(server.table.lookup(0)), "arrived_ns": self.arrived_ns}
        refuse = self.path == _FLAKY and number % _REFUSE_EVERY == 0
        if refuse:
            del answer["version"]
        self.send_response(503 if refuse else 200)
        self.send_header("Content-Type", "application/json")
        answer["left_ns"] = time.monotonic_ns()
        body = json.dumps(answer).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what was asked stands in the tables."""


@contextmanager
def _serving(table: Map, context: ssl.SSLContext | None) -> Iterator[int]:
    """A server in a child that dies with us; yields its port."""
    with _Server(table, context) as server, Child(server.serve_forever):
        server.socket.close()  # the child has its own
        yield int(server.server_address[1])


@functools.cache
def _certificate() -> bytes:
    """Key and certificate for localhost, fresh; they stay in memory."""
    command = shutil.which("openssl")
    if command is None:
        raise Unavailable("The openssl command is missing, which makes the server's certificate: "
                          "install the package openssl.")  # fmt: skip
    done = subprocess.run(
        [command, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-days", "2", "-subj", f"/CN={_HOST}", "-addext", f"subjectAltName=DNS:{_HOST}",
         "-keyout", "-"],
        capture_output=True, timeout=30, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        raise LabError(f"openssl made no certificate: {done.stderr.decode()[-200:].strip()}")
    return done.stdout


def _contexts(identity: bytes) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's context and the client's."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    memory = os.memfd_create("certificate")
    try:
        os.write(memory, identity)
        server.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    public = identity[identity.index(b"-----BEGIN CERTIFICATE-----") :]
    client.load_verify_locations(cadata=public.decode())
    return server, client


# -- the client ----------------------------------------------------------------------------


class _Client:
    """Asks for a path and stamps each step; connects where `close` came before."""

    def __init__(self, port: int, context: ssl.SSLContext | None) -> None:
        self._port, self._context = port, context
        self._connection: http.client.HTTPConnection | None = None

    def get(self, path: str, poll: _Poll) -> tuple[int, bytes]:
        """Status and body; the edges of all steps but the comparison are put into the poll."""
        poll.edges.append(time.monotonic_ns())
        if self._connection is None:
            self._connection = self._connected(poll)
        else:
            poll.edges += [poll.edges[0]] * 3
        self._connection.request("GET", path)
        answer = self._connection.getresponse()
        body = answer.read()
        poll.edges.append(time.monotonic_ns())
        return answer.status, body

    def _connected(self, poll: _Poll) -> http.client.HTTPConnection:
        try:
            found = socket.getaddrinfo(_HOST, self._port, socket.AF_INET, socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise Unavailable(f"The name {_HOST} has no address here: {error.strerror}.") from None
        address = found[0][4]
        if address[0] != "127.0.0.1":
            raise Unavailable(f"The name {_HOST} is {address[0]} here: let it be 127.0.0.1.")
        poll.edges.append(time.monotonic_ns())
        plain = socket.create_connection(("127.0.0.1", self._port), _TIMEOUT_S)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        poll.edges.append(time.monotonic_ns())
        connection = http.client.HTTPConnection(_HOST, self._port, timeout=_TIMEOUT_S)
        connection.sock = plain
        if self._context is not None:
            connection.sock = self._context.wrap_socket(plain, server_hostname=_HOST)
            poll.edges.append(time.monotonic_ns())
        else:
            poll.edges.append(poll.edges[-1])
        return connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _follow(
    case: Case, table: Map, moments: npt.NDArray[np.int64], period_ms: float
) -> tuple[list[_Poll], int, OpenLoopWriter, tuple[int, int]]:
    """All polls, the client's CPU time, the writer, the server's requests and connections."""
    contexts = _contexts(_certificate()) if case.get("tls", False) else (None, None)
    log: list[_Poll] = []
    known = 0
    period_ns = round(period_ms * 1e6)
    with ExitStack() as stack:
        port = stack.enter_context(_serving(table, contexts[0]))
        client = _Client(port, contexts[1])
        stack.callback(client.close)
        writer = stack.enter_context(
            OpenLoopWriter(moments, lambda version: table.update(0, version))
        )
        cpu_began = time.thread_time_ns()
        moment = time.monotonic_ns()
        while not writer.all_seen():
            poll = _Poll(known)
            known = _ask(client, case, poll)
            if not case.get("keep", False):  # no part of the delay: the version is known by now
                client.close()
            log.append(poll)
            writer.saw(known)
            if poll.answer != _UNKNOWN:
                moment = open_loop.next_poll(moment, period_ns)
        cpu_ns = time.thread_time_ns() - cpu_began
        client.close()  # the counts come over a connection of their own
        counts = json.loads(client.get("/counts", _Poll(0))[1])
    return log, cpu_ns, writer, (counts["served"], counts["connections"])


def _ask(client: _Client, case: Case, poll: _Poll) -> int:
    """One poll; answers the version that the client knows by then."""
    try:
        status, body = client.get(case.get("path", _STATUS), poll)
    except (OSError, http.client.HTTPException) as error:
        raise LabError(f"The status server did not answer ({error!r}): try again.") from None
    answer = json.loads(body)
    poll.server = (answer["arrived_ns"], answer["left_ns"])
    poll.refused = status != http.HTTPStatus.OK
    poll.version = poll.knew
    if poll.refused:
        # The article's client does not look at the error: what brought no version is no change.
        poll.answer = _UNKNOWN if case.variant == "fixed" else _NO_CHANGE
    elif answer["version"] > poll.knew:
        poll.answer, poll.version = _NEWS, answer["version"]
    else:
        poll.answer = _NO_CHANGE
    poll.edges.append(time.monotonic_ns())
    return poll.version


# -- the tables ----------------------------------------------------------------------------


def _false_no_change(
    log: list[_Poll], committed_ns: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    newest = np.searchsorted(committed_ns, [poll.edges[0] for poll in log])
    return np.array(
        [
            poll.answer == _NO_CHANGE and version > poll.knew
            for poll, version in zip(log, newest.tolist(), strict=True)
        ]
    )


def _table_of_polls(log: list[_Poll], false: npt.NDArray[np.bool_]) -> pd.DataFrame:
    steps = [[sum(end - start for start, end in part) for part in poll.spans()] for poll in log]
    return pd.DataFrame(steps, columns=list(PARTS[1:]), dtype=np.int64).assign(
        answer=[poll.answer for poll in log],
        refused=[poll.refused for poll in log],
        false=false,
    )


def _table_of_changes(log: list[_Poll], intended_ns: npt.NDArray[np.int64]) -> pd.DataFrame:
    news = [poll for poll in log if poll.answer == _NEWS]
    versions = np.arange(1, len(intended_ns) + 1)
    places = np.searchsorted([poll.version for poll in news], versions)
    rows = []
    for version, place, since in zip(versions, places, intended_ns.tolist(), strict=True):
        poll = news[place]
        # What of each step lies behind the intended moment: a change may come in the midst of it.
        parts = [
            sum(max(0, end - max(start, since)) for start, end in part) for part in poll.spans()
        ]
        wait = max(0, poll.edges[0] - since)
        rows.append((version, poll.version, poll.edges[-1] - since, wait, *parts))
    columns = ["version", "seen_as", "delay", *PARTS]
    return pd.DataFrame(rows, columns=columns, dtype=np.int64)
