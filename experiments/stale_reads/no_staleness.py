"""The article's main symptom: update returns, and the program reads an old value. Refuted."""

from __future__ import annotations

import math
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import LabError, TimedOut
from labkit.figures import Axes, style
from labkit.judge import history
from labkit.judge.checkers import stale, t_staleness, unwritten
from labkit.judge.history import History, Op
from labkit.kernel import libbpf, network, programs
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.parallel import Child, ahead_of_others, cpus, shared_array
from labkit.kernel.programs import BpfObject, Program
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment
from labkit.runs import Run

_SAMPLES = 120  # pairs of write and read of each measurement that are saved, evenly spaced
_MS = 1e6
_MARKERS = {"same CPU": "o", "other CPU": "^", "XDP": "D"}
_WAYS = {"copy": "copy kept", "lookup": "looked up", "renewed": "copy renewed by generation"}
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


def _sample(tables: Tables) -> Tables:
    """What the checkers find in the pairs that are saved, per measurement."""
    saved = tables["history"]
    whole = history.from_frame(saved)
    found = saved.assign(stale=stale(whole), unwritten=unwritten(whole), reads=1)
    by = found[saved["op"] == Op.READ].groupby(["variant", "case", "round"], sort=False)
    return {"sample": by[["reads", "stale", "unwritten"]].sum().reset_index()}


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw how long each read had missed an update, over the time of its measurement."""
    ax = style.axes(ax, height=3.0)
    saved = run.table("history")
    saved = saved.assign(age_ms=t_staleness(history.from_frame(saved)) / _MS)
    first = saved.groupby(["case", "round"])["start_ns"].transform("min")
    saved = saved.assign(at_ms=(saved["start_ns"] - first) / _MS)
    cases = run.case_table
    paths = dict(zip(cases["case"], cases["path"], strict=True))
    for (variant, case), reads in saved[saved["op"] == Op.READ].groupby(["variant", "case"]):
        look = style.VARIANT[str(variant)].points()
        look["marker"] = _MARKERS[paths[case]]
        ax.plot(reads["at_ms"], reads["age_ms"], **look, ms=3, alpha=0.6)
    for variant, way in cases.groupby("variant", sort=False)["way"].first().items():
        ax.plot([], [], lw=4, color=style.VARIANT[str(variant)].color, label=_WAYS[way])
    for path, marker in _MARKERS.items():
        ax.plot([], [], color=style.GREY, marker=marker, linestyle="none", ms=3, label=path)
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set_ylim(bottom=-0.03)
    ax.set_xlabel("time since the first update, ms")
    ax.set_ylabel("age of the update missed, ms")
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=2, columnspacing=1)
    return ax


def _three(variant: str, way: str) -> list[Case]:
    """The paths of one way to read; the first one's measurement has the other two beside it."""
    first = ""
    cases = []
    for path in _MARKERS:
        id = f"{way}-{path}".lower().replace(" ", "-")
        cases.append(Case(variant, id, f"{_WAYS[way]}, {path}", beside=first, way=way, path=path))
        first = first or id
    return cases


@experiment(
    "no-staleness",
    number=1,
    family="stale-reads",
    question="Once an update has returned, can a program still read the old value?",
    claims=("1.1", "1.5", "1.12", "5.4"),
    needs=("bpf", "compile", "test_run", "two_cpus", "hash", "netns_veth", "xdp"),
    quick={"updates": 50_000, "copied": 5_000, "packets": 200, "rounds": 1},
    full={"updates": 100_000, "copied": 20_000, "packets": 2_000, "rounds": 1},
    cases=[*_three("broken", "copy"), *_three("control", "lookup"), *_three("fixed", "renewed")],
    counted=Counted("stale", operations="reads", anomalies="stale", cost_ns="run_ns"),
    derive=_sample,
    statements=(
        Statement("no read is stale that looks the value up", "none(control)"),
        Statement("every packet is treated by the policy of its moment",
                  'all(0 < packets(variant="control").as_meant == packets(variant="control").sent) '
                  'and all(packets(variant="control").delivered '
                  '== packets(variant="control").should_pass)'),
        # The first read makes the copy, all later ones miss an update.
        Statement("the checker finds staleness where it is: in every read of a copy but the first",
                  'all(0 < rounds(variant="broken").stale == rounds(variant="broken").reads - 1)'),
        Statement("a kept copy lets packets through or drops them wrongly",
                  'all(packets(variant="broken").as_meant < packets(variant="broken").sent)'),
        Statement("a copy that is renewed by generation is cured", "none(fixed)"),
        Statement("the pairs that are saved show the same, and no version from nowhere",
                  'all(sample(variant="broken").stale == sample(variant="broken").reads - 1) '
                  'and none(sample(variant=("control", "fixed")).stale > 0) '
                  "and none(sample.unwritten > 0)"),
    ),
    sentence="Of the reads that began after an update had returned, these were stale: "
    '{control["lookup-same-cpu"]} (same CPU), {control["lookup-other-cpu"]} (other CPU), '
    '{control["lookup-xdp"]} (XDP). Of {sum(packets(variant="control").sent)} packets '
    '{sum(packets(variant="control").delivered)} were delivered, '
    '{sum(packets(variant="control").should_pass)} should have been. The same checker found '
    "{broken} stale reads where the program kept a copy (there "
    '{sum(packets(variant="broken").sent) - sum(packets(variant="broken").as_meant)} packets were '
    "treated wrongly), and {fixed} once the copy was renewed by generation.",
    figure=_figure,
)  # fmt: skip
def no_staleness(case: Case, *, updates: int, copied: int, packets: int) -> list[dict[str, Any]]:
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
    case : Case
        How the program comes by the value; it is read by all three paths.
    updates : int
        Updates, each followed by one read, where the program looks the value up; on the
        same CPU, and again handed over to a process on another CPU.
    copied : int
        The same where the program keeps a copy.
    packets : int
        Updates, each followed by one packet.

    Returns
    -------
    list of dict
        For each path ``reads`` that began after an update had returned and how many of them
        were ``stale`` (int64; the checker's answer over the whole history, of which only a
        part is saved), ``run_ns`` (float64: one run of the program, as the kernel measures
        it; NaN on the other CPU). ``history``: columns of
        :data:`labkit.judge.history.HISTORY`, 120 pairs of write and read, the first two
        included; the key is the time at which the measurement began. ``packets``: ``sent``,
        ``should_pass``, ``passed`` (by the program's own record), ``delivered``,
        ``as_meant`` (packets that were delivered or dropped as the policy of that moment
        says).
    """
    count = updates if case.way == "lookup" else copied
    renew = case.way == "renewed"
    with programs.load("no_staleness", PACKETS=packets) as loaded:
        reader = loaded.program(f"read_by_{case.way}")
        police = loaded.program(f"police_by_{case.way}", ProgramKind.XDP)
        here = _on_same_cpu(_writer(loaded, renew=renew), reader, count)
        here_ns = _cost_ns(reader)
        there = _on_other_cpu(_writer(loaded, renew=renew), reader, count)
        through = _through_xdp(loaded, _writer(loaded, renew=renew), police, packets)
        police_ns = _cost_ns(police)
    return [
        {"case": f"{case.way}-same-cpu", **_judged(here), "run_ns": here_ns},
        {"case": f"{case.way}-other-cpu", **_judged(there), "run_ns": math.nan},
        {"case": f"{case.way}-xdp", **_judged(through.pairs), "run_ns": police_ns,
         "packets": _judged_by_delivery(through, packets)},
    ]  # fmt: skip


def _judged(pairs: _Pairs) -> dict[str, Any]:
    """The checker's answer over all pairs, and a sample of them."""
    key = int(pairs["write_start"][0])
    whole = _history(pairs, np.arange(1, len(pairs) + 1), key)
    spread = np.linspace(0, len(pairs) - 1, _SAMPLES).astype(int)
    kept = np.unique(np.append(spread, min(1, len(pairs) - 1)))
    return {
        "reads": len(pairs),
        "stale": int(stale(whole).sum()),
        "history": history.to_frame(_history(pairs[kept], kept + 1, key)),
    }


def _cost_ns(function: Program) -> float:
    """Median of a few means of the kernel, with the maps as the last read left them."""
    # The packet has a number that no packet of this run has, so that nothing is recorded.
    packet = network.frame(struct.pack("=I", 2**32 - 1))
    runs = [function.test_run(repeat=_TIMED_RUNS, data=packet).mean_ns for _ in range(5)]
    return float(np.median(runs))


def _writer(loaded: BpfObject, *, renew: bool) -> Callable[[int], None]:
    """What brings a new version of the policy into force; the readers' copies start empty."""
    loaded.map("copies").update(0, (0, 0))
    value, generation = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
    update = loaded.map("policy").updater(0, value)
    announce = loaded.map("generation").updater(0, generation)

    def write(version: int) -> None:
        value[0] = generation[0] = version
        # The generation comes last: a reader that sees it finds the policy in place.
        answer = update() or (announce() if renew else 0)
        if answer < 0:
            raise LabError(f"The kernel refused an update: {libbpf.error_name(-answer)}.")

    return write


def _on_same_cpu(write: Callable[[int], None], reader: Program, count: int) -> _Pairs:
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


def _on_other_cpu(write: Callable[[int], None], reader: Program, count: int) -> _Pairs:
    """The same, the read by a process on another CPU that waits to be told."""
    pairs = shared_array(count, _PAIR)
    # Turns written and turns read. Both sides poll them all the time: to be woken up takes
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
    loaded: BpfObject, write: Callable[[int], None], police: Program, packets: int
) -> _Delivered:
    """The same, the read by an XDP program when a packet comes out of a veth."""
    seen = loaded.map("seen")
    seen.update_many(np.arange(packets, dtype=np.uint32), np.zeros(packets, seen.value_dtype))

    def send_all() -> _Delivered:
        # In a child of its own, which takes the network with it when it ends.
        network.enter_own_network()
        near, far = network.ENDS
        loaded.attach(police, socket.if_nametoindex(far))
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
                # Once more: the first lookup may have met the program in the middle of its
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
    """Numbers in the packets that were delivered since the last call."""
    numbers = []
    try:
        while True:
            packet = receiver.recv(2048)
            numbers.append(int(struct.unpack_from("=I", packet, 14)[0]))
    except (BlockingIOError, TimeoutError):
        return numbers


def _judged_by_delivery(through: _Delivered, packets: int) -> pd.DataFrame:
    meant = np.arange(1, packets + 1) % 2 == 0
    arrived = np.zeros(packets, bool)
    arrived[through.numbers] = True
    row = {
        "sent": packets,
        "should_pass": int(meant.sum()),
        "passed": int((through.pairs["version"] % 2 == 0).sum()),
        "delivered": len(through.numbers),
        "as_meant": int((arrived == meant).sum()),
    }
    return pd.DataFrame([row])


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
