"""The article's main symptom: update returns, and the program reads an old value. Refuted."""

from __future__ import annotations

import math
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis import history
from labkit.analysis.checkers import stale
from labkit.analysis.history import History, Op
from labkit.analysis.runs import Triad
from labkit.errors import LabError, TimedOut
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import libbpf, network, programs
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.parallel import Child, ahead_of_others, cpus, shared_array
from labkit.kernel.programs import Function, Unit

_WAYS = {
    "broken": ("copy", "copy kept"),
    "control": ("lookup", "looked up"),
    "fixed": ("renewed", "copy renewed by generation"),
}
_SAMPLES = 120  # pairs of write and read of each case that are saved, evenly spaced
_TIMED_RUNS = 20_000
_LIMIT_S = 10
_WRITER, _READER = 0, 1

# One write and the read that follows it, CLOCK_MONOTONIC nanoseconds.
_PAIR = np.dtype(
    [(name, np.int64) for name in ("write_start", "write_end", "start", "end", "version")]
)
_Pairs = npt.NDArray[np.void]


@dataclass(frozen=True)
class _Delivered:
    """What came out at the other end of the pair."""

    pairs: _Pairs
    numbers: list[int]  # of the packets that arrived, in order


@experiment(
    "no-staleness",
    number=1,
    family="stale-reads",
    question="Once an update has returned, can a program still read the old value?",
    claims=("1.1", "1.5", "1.12", "5.4"),
    needs=("bpf", "compile", "test_run", "two_cpus", "hash", "netns_veth", "xdp"),
    quick={"updates": 50_000, "copied": 5_000, "packets": 200},
    full={"updates": 100_000, "copied": 20_000, "packets": 2_000},
)
def no_staleness(*, updates: int, copied: int, packets: int) -> Tables:
    """Update, then let a program read: on this CPU, on another one, and when a packet comes.

    The system call and the program work on the same memory: ``bpf_map_update_value`` calls
    the map's own ``map_update_elem`` (kernel/bpf/syscall.c), and there is no copy in
    between that would have to be flushed. A read that begins after the update returned sees
    it; the checker is Lamport's regularity of a register.

    A reader that copied the value once is the positive control: there the same checker must
    find staleness. It is cured when the writer counts a generation up, and the reader renews
    its copy whenever that count has changed.

    Packets are sent through a veth pair in a network namespace of their own, to an XDP
    program that drops at odd versions of the policy; what arrives is counted as well.

    Parameters
    ----------
    updates : int
        Updates, each followed by one read, where the program looks the value up; on the
        same CPU, and again handed over to a process on another CPU.
    copied : int
        The same where the program keeps a copy.
    packets : int
        Updates, each followed by one packet.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a read that began after an update had returned;
        ``cost_ns`` is the time of one run of the program, as the kernel measures it.
        ``packets``: per case ``variant``, ``case``, ``sent``, ``should_pass``, ``passed``
        (by the program's own record), ``delivered``, ``as_meant`` (packets that were
        delivered or dropped as the policy of that moment says). ``history``: columns of
        :data:`labkit.analysis.history.HISTORY`, with ``variant`` and ``case``; the key is
        the number of the case. It holds a sample of 120 pairs of write and read of each
        case, the first two included; the counts are over all.
    """
    triad = Triad("stale")
    histories: list[pd.DataFrame] = []
    delivered: list[dict[str, object]] = []
    with programs.load("no_staleness", PACKETS=packets) as unit:
        for variant, (way, words) in _WAYS.items():
            reader = unit.function(f"read_by_{way}")
            police = unit.function(f"police_by_{way}", ProgramKind.XDP)
            count = updates if way == "lookup" else copied
            for path in ("same CPU", "other CPU", "XDP"):
                case = f"{words}, {path}"
                say(case)
                write = _writer(unit, renew=way == "renewed")
                cost_ns = math.nan
                if path == "same CPU":
                    pairs = _on_same_cpu(write, reader, count)
                    cost_ns = _cost_ns(reader)
                elif path == "other CPU":
                    pairs = _on_other_cpu(write, reader, count)
                else:
                    through = _through_xdp(unit, write, police, packets)
                    pairs, cost_ns = through.pairs, _cost_ns(police)
                    row = _judged_by_delivery(through, packets)
                    delivered.append({"variant": variant, "case": case, **row})
                key = len(histories)
                whole = _history(pairs, np.arange(1, len(pairs) + 1), key)
                triad.add(
                    variant,
                    case=case,
                    operations=len(pairs),
                    anomalies=int(stale(whole).sum()),
                    cost_ns=cost_ns,
                )
                spread = np.linspace(0, len(pairs) - 1, _SAMPLES).astype(int)
                kept = np.unique(np.append(spread, min(1, len(pairs) - 1)))
                sample = history.to_frame(_history(pairs[kept], kept + 1, key))
                histories.append(sample.assign(variant=variant, case=case))
    return {
        "counts": triad.table(),
        "packets": pd.DataFrame(delivered),
        "history": pd.concat(histories, ignore_index=True),
    }


def _cost_ns(function: Function) -> float:
    """Median of a few means of the kernel, with the maps as the last read left them."""
    # The packet has a number that no packet of this run has, so that nothing is recorded.
    packet = network.frame(struct.pack("=I", 2**32 - 1))
    runs = [function.test_run(repeat=_TIMED_RUNS, data=packet).mean_ns for _ in range(5)]
    return float(np.median(runs))


def _writer(unit: Unit, *, renew: bool) -> Callable[[int], None]:
    """What brings a new version of the policy into force; the readers' copies start empty."""
    unit.map("copies").update(0, (0, 0))
    value, generation = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
    update = unit.map("policy").updater(0, value)
    announce = unit.map("generation").updater(0, generation)

    def write(version: int) -> None:
        value[0] = generation[0] = version
        # The generation comes last: a reader that sees it finds the policy in place.
        answer = update() or (announce() if renew else 0)
        if answer < 0:
            raise LabError(f"The kernel refused an update: {libbpf.error_name(-answer)}.")

    return write


def _on_same_cpu(write: Callable[[int], None], reader: Function, count: int) -> _Pairs:
    pairs = np.zeros(count, _PAIR)
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpus()[0]})
    try:
        for turn in range(count):
            begun = time.monotonic_ns()
            write(turn + 1)
            written = time.monotonic_ns()
            version = reader.test_run().value
            pairs[turn] = begun, written, written, time.monotonic_ns(), version
    finally:
        os.sched_setaffinity(0, allowed)
    return pairs


def _on_other_cpu(write: Callable[[int], None], reader: Function, count: int) -> _Pairs:
    """The same, the read by a process on another CPU that waits to be told."""
    pairs = shared_array(count, _PAIR)
    # Turns written and turns read. Both sides watch them all the time: to be woken up takes
    # longer than write and read together, and ages on a machine with other load.
    turns = shared_array(2, np.int64).data

    def read_when_told() -> None:
        for turn in range(count):
            _await(turns, _WRITER, turn + 1)
            pair = pairs[turn]
            pair["start"] = time.monotonic_ns()
            pair["version"] = reader.test_run().value
            pair["end"] = time.monotonic_ns()
            turns[_READER] = turn + 1

    here, there = cpus()[:2]
    allowed = os.sched_getaffinity(0)
    try:
        with ahead_of_others(), Child(read_when_told, cpu=there) as child:
            os.sched_setaffinity(0, {here})
            for turn in range(count):
                pair = pairs[turn]
                pair["write_start"] = time.monotonic_ns()
                write(turn + 1)
                pair["write_end"] = time.monotonic_ns()
                turns[_WRITER] = turn + 1
                _await(turns, _READER, turn + 1)
            child.result(_LIMIT_S)
    finally:
        os.sched_setaffinity(0, allowed)
    return pairs


def _await(turns: memoryview, whose: int, turn: int) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        for _ in range(10_000):
            if turns[whose] >= turn:
                return
    raise TimedOut(
        f"A hand-over between two CPUs took more than {_LIMIT_S} s: try again on a machine "
        "with less load."
    )


def _through_xdp(
    unit: Unit, write: Callable[[int], None], police: Function, packets: int
) -> _Delivered:
    """The same, the read by an XDP program when a packet comes out of a veth."""
    seen = unit.map("seen")
    seen.update_many(np.arange(packets, dtype=np.uint32), np.zeros(packets, seen.value_dtype))

    def send_all() -> _Delivered:
        # In a child of its own, which takes the network with it when it ends.
        network.enter_own_network()
        near, far = network.ENDS
        unit.attach(police, socket.if_nametoindex(far))
        pairs = np.zeros(packets, _PAIR)
        numbers: list[int] = []
        with (
            network.packet_socket(near) as sender,
            network.packet_socket(far, network.LAB_PROTOCOL) as receiver,
        ):
            receiver.setblocking(False)
            for number in range(packets):
                begun = time.monotonic_ns()
                write(number + 1)
                written = time.monotonic_ns()
                sender.send(network.frame(struct.pack("=I", number)))
                deadline = time.monotonic() + _LIMIT_S
                while not seen.lookup(number)["version"]:
                    if time.monotonic() > deadline:
                        raise TimedOut(f"Packet {number} did not reach the program.")
                # Once more: the first look may have met the program in the middle of its
                # record, whose last field is the version.
                read = seen.lookup(number)
                times = (int(read[name]) for name in ("start_ns", "end_ns", "version"))
                pairs[number] = begun, written, *times
                numbers += _received(receiver)
            receiver.settimeout(0.1)  # for a last packet that is still on its way
            numbers += _received(receiver)
        return _Delivered(pairs, numbers)

    with Child(send_all) as child:
        result = child.result(60.0 + packets * 0.01)
    assert isinstance(result, _Delivered)
    return result


def _received(receiver: socket.socket) -> list[int]:
    """Numbers in the packets that were delivered since the last look."""
    numbers = []
    try:
        while True:
            packet = receiver.recv(2048)
            numbers.append(int(struct.unpack_from("=I", packet, 14)[0]))
    except (BlockingIOError, TimeoutError):
        return numbers


def _judged_by_delivery(through: _Delivered, packets: int) -> dict[str, int]:
    meant = np.arange(1, packets + 1) % 2 == 0
    arrived = np.zeros(packets, bool)
    arrived[through.numbers] = True
    return {
        "sent": packets,
        "should_pass": int(meant.sum()),
        "passed": int((through.pairs["version"] % 2 == 0).sum()),
        "delivered": len(through.numbers),
        "as_meant": int((arrived == meant).sum()),
    }


def _history(pairs: _Pairs, versions: npt.NDArray[np.int64], key: int) -> History:
    writes = history.build(
        [Op.WRITE] * len(pairs), actor=_WRITER, key=key, version=versions,
        start_ns=pairs["write_start"], end_ns=pairs["write_end"],
    )  # fmt: skip
    reads = history.build(
        [Op.READ] * len(pairs), actor=_READER, key=key, version=pairs["version"],
        start_ns=pairs["start"], end_ns=pairs["end"],
    )  # fmt: skip
    return history.concatenate(writes, reads)
