"""A program is replaced while events pass: which of them no version sees, and which two see."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput, TimedOut, Unavailable
from labkit.figures import anomaly_rates
from labkit.kernel import libbpf, network, perf_events, programs
from labkit.kernel.compiler import LoadFailed
from labkit.kernel.libbpf import AttachType, ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, ahead_of_others, another_cpu, shared_array
from labkit.kernel.programs import BpfObject, Program
from labkit.kernel.tools import tracefs_folder
from labkit.lab.experiment import Case, Counted, Statement, experiment

_KINDS: Final = {
    "xdp": ProgramKind.XDP,
    "tcx": ProgramKind.TC,
    "cgroup": ProgramKind.CGROUP_SKB,
    "trace": ProgramKind.TRACEPOINT,
}
_CGROUP_EGRESS, _PERF_EVENT = 1, 41  # enum bpf_attach_type
_TRACEPOINT_EVENT = 2  # PERF_TYPE_TRACEPOINT
_CALL = "syscalls:sys_enter_close"
_HIGH = 1 << 30  # no process has so many descriptors; below it stand pid and event
_OVERLAP_S = 0.001  # until who has attached the new version takes the old one off
_MOST_EVENTS = 1 << 16  # that have a descriptor of their own
_LIMIT_S = 30.0
_SETTLED_S = 0.05


@experiment(
    "hot-swap",
    number=62,
    family="production",
    question="What passes unseen, and what is seen twice, while a program is replaced?",
    claims=("5.9",),
    needs=("bpf", "compile", "tracefs", "tracepoint", "netns_veth", "xdp", "tcx", "two_cpus"),
    quick={"events": 20_000, "swaps": 10, "rounds": 2},
    full={"events": 60_000, "swaps": 40, "rounds": 8},
    cases=(
        Case("broken", "xdp-detach", "XDP: detach, attach", hook="xdp", how="detach"),
        Case("broken", "tcx-detach", "tcx: detach, attach", hook="tcx", how="detach"),
        Case("broken", "trace-detach", "tracepoint: detach, attach", hook="trace", how="detach"),
        Case("broken", "tcx-both", "tcx: attach, detach", hook="tcx", how="both"),
        Case("broken", "trace-both", "tracepoint: attach, detach", hook="trace", how="both"),
        Case("broken", "xdp-bad", "XDP: detach, refused, back", hook="xdp", how="bad"),
        Case("broken", "xdp-fresh", "XDP: updated, with a map anew", hook="xdp", how="fresh"),
        Case("control", "xdp-still", "XDP: not replaced", hook="xdp", how="still"),
        Case("control", "trace-still", "tracepoint: not replaced", hook="trace", how="still"),
        Case("fixed", "xdp-update", "XDP: link updated", hook="xdp", how="update"),
        Case("fixed", "tcx-update", "tcx: link updated", hook="tcx", how="update"),
        Case("fixed", "cgroup-update", "cgroup: link updated", hook="cgroup", how="update"),
        Case("fixed", "trace-slot", "tracepoint: slot of a prog_array", hook="trace", how="slot"),
        Case("fixed", "xdp-bad-first", "XDP: loaded first, refused", hook="xdp", how="bad-first"),
    ),
    counted=Counted("event unseen or seen twice", operations="sent", anomalies="wrong"),
    statements=(
        Statement("every event is seen once, twice or not at all",
                  "all(rounds.sent == rounds.once + rounds.wrong and rounds.sent > 0)"
                  " and all(rounds.wrong == rounds.unseen + rounds.twice)"),
        Statement("each way that takes a program off, or has two of them, shows", "some(broken)"),
        Statement("between detaching and attaching, events pass unseen",
                  'all(rounds(how="detach").unseen > 0)'),
        Statement("between attaching and detaching, two versions see them and none is missed",
                  'all(rounds(how="both").twice > 0 and rounds(how="both").unseen == 0)'),
        Statement("without a replacement each event is seen once", "none(control)"),
        Statement("a link that is updated, or a slot, misses none and doubles none",
                  "none(fixed)"),
        Statement("although it was replaced as often as wanted",
                  'all(rounds(how="update").swapped == parameters.swaps)'
                  ' and all(rounds(how="slot").swapped == parameters.swaps)'),
        Statement("a tracepoint's own link refuses an update (EINVAL)",
                  'all(rounds(how="slot").update_answer == -22)'),
        Statement("the verifier refused the new version",
                  'all(rounds(how="bad").refusals == parameters.swaps)'
                  ' and all(rounds(how="bad-first").refusals == parameters.swaps)'),
    ),
    sentence='Replaced by detaching and attaching, {sum(rounds(how="detach").unseen)} of '
    '{sum(rounds(how="detach").sent)} events passed unseen; by attaching and detaching, '
    '{sum(rounds(how="both").twice)} of {sum(rounds(how="both").sent)} were seen twice. By an '
    "update of the link, a slot of a prog_array, or a load before anything is taken off: {fixed}.",
    figure=anomaly_rates,
)  # fmt: skip
def hot_swap(case: Case, *, events: int, swaps: int) -> dict[str, Any]:
    """Replace a program many times while another process makes numbered events.

    The map notes for each number how often it was seen, by whichever version. Frames go through a
    veth pair in a network namespace of our own, datagrams to an address of the loopback that
    nobody listens at, and calls are close() of descriptors that nobody has.

    ``BPF_LINK_UPDATE`` exchanges one pointer at the hook (net/core/dev.c, ``bpf_xdp_link_update``;
    kernel/bpf/tcx.c, ``tcx_link_update``; kernel/bpf/cgroup.c, ``cgroup_bpf_replace``). The link of
    a perf event has no such operation (kernel/bpf/syscall.c, ``bpf_perf_link_lops``).

    Parameters
    ----------
    case : Case
        The hook, and the way.
    events : int
        Numbered events of a round.
    swaps : int
        Replacements meanwhile.

    Returns
    -------
    dict
        ``how`` it was replaced; ``sent`` events; ``once``, ``unseen``, ``twice`` (or more often):
        how often the map says that they were seen; ``wrong``: unseen and twice; ``swapped``,
        ``refusals`` of a version, ``update_answer``: minus the errno of an update of the
        tracepoint's link.

    Raises
    ------
    BadInput
        More events than descriptors of that kind.
    Unavailable
        There is no cgroup file system of version 2.
    """
    if events > _MOST_EVENTS:
        raise BadInput(f"events of hot-swap are {_MOST_EVENTS:,} at most, not {events:,}.")
    with Child(partial(_swapped, case, events, swaps)) as child:
        found: dict[str, Any] = child.result(2 * _LIMIT_S)
    return found


def _swapped(case: Case, events: int, swaps: int) -> dict[str, Any]:
    """In a child, whose network goes away with it."""
    if case.hook in ("xdp", "tcx"):
        network.enter_own_network()
    first = _HIGH | (os.getpid() & 0x3FFF) << 16
    address = network.own_address()
    constants: dict[str, int] = {
        "EVENTS": events, "PROTOCOL": network.LAB_PROTOCOL, "FIRST_ID": first,
        "ADDRESS_ID": address,
    }  # fmt: skip
    made = shared_array(1, np.int64)
    made[0] = -1
    with (
        programs.load("hot_swap", **constants) as loaded,
        programs.load("hot_swap", **constants) as anew,
        ExitStack() as held,
    ):
        work = partial(_make_events, case.hook, events, first, address, made)
        # Forked before there is a link: one that it holds would not end where it is closed here.
        with ahead_of_others(), Child(work, cpu=another_cpu(1)) as maker:
            swapping = _Swapping(case, loaded, anew, held)
            made[0] = 0
            for turn in range(1, swaps + 1):
                _wait_until(made, turn * events // (swaps + 1), maker)
                swapping.swap()
            maker.result(_LIMIT_S)
        seen = (anew if case.how == "fresh" else loaded).map("seen", key="u4", value="u4")
        times = _settled(seen)
    return {
        "how": case.how,
        "sent": int(made[0]),
        "once": int((times == 1).sum()),
        "unseen": int((times == 0).sum()),
        "twice": int((times > 1).sum()),
        "wrong": int((times != 1).sum()),
        "swapped": swapping.swapped,
        "refusals": swapping.refusals,
        "update_answer": swapping.update_answer,
    }


class _Swapping:
    """A program at its hook, and how another takes its place; links go with ``held``."""

    def __init__(self, case: Case, loaded: BpfObject, anew: BpfObject, held: ExitStack) -> None:
        self._hook, self._how, self._object = case.hook, case.how, loaded
        self._target = self._opened(held)
        self._links: list[int] = []
        held.callback(self._close)
        self.swapped = self.refusals = self.update_answer = 0
        source = anew if self._how == "fresh" else loaded
        self._load = partial(source.program, f"on_{self._hook}", _KINDS[self._hook])
        self._now = loaded.program(f"on_{self._hook}", _KINDS[self._hook])
        if self._how == "slot":
            self._slot = loaded.map("slot", key="u4", value="u4")
            self._slot.update(0, self._now.fd)
            held.callback(self._slot.delete, 0)
            self.update_answer = _answer_to_update(self._now, self._load())
            self._attach(loaded.program("on_slot", ProgramKind.TRACEPOINT))
        else:
            self._attach(self._now)

    def swap(self) -> None:
        """Have the other version in the place of this one, by the way of the case."""
        if self._how == "still" or (self._how == "fresh" and self.swapped):
            return
        if self._how in ("bad", "bad-first"):
            if self._how == "bad":
                self._detach()
            self._load_unsafe()
            if self._how == "bad":
                self._attach(self._now)
            return
        following = self._load()
        if self._how == "detach":
            self._detach()
            self._attach(following)
        elif self._how == "both":
            self._attach(following)
            time.sleep(_OVERLAP_S)
            self._detach()
        elif self._how == "slot":
            self._slot.update(0, following.fd)
        else:
            answer = libbpf.api().bpf_link_update(self._links[0], following.fd, None)
            libbpf.checked(answer, f"updating the link of {self._hook}")
        self._now = following
        self.swapped += 1

    def _opened(self, held: ExitStack) -> int:
        if self._hook == "cgroup":
            target = os.open(_cgroup_root(), os.O_RDONLY | os.O_DIRECTORY)
            held.callback(os.close, target)
            return target
        return 0 if self._hook == "trace" else socket.if_nametoindex(network.ENDS[1])

    def _attach(self, program: Program) -> None:
        if self._hook == "trace":
            self._links.append(_perf_link(program))
            return
        kinds = {"xdp": AttachType.XDP, "tcx": AttachType.TCX_INGRESS, "cgroup": _CGROUP_EGRESS}
        kind = int(kinds[self._hook])
        link = libbpf.api().bpf_link_create(program.fd, self._target, kind, None)
        self._links.append(libbpf.checked(link, f"attaching to {self._hook}"))

    def _detach(self) -> None:
        link = self._links.pop(0)
        if self._hook != "trace":  # a perf event's link has no such operation
            # Closing does not detach while anybody else looks at the link.
            libbpf.checked(libbpf.api().bpf_link_detach(link), f"detaching from {self._hook}")
        libbpf.close(link)

    def _close(self) -> None:
        while self._links:
            self._detach()

    def _load_unsafe(self) -> None:
        try:
            self._object.program("unsafe", ProgramKind.XDP)
        except LoadFailed:
            self.refusals += 1


def _perf_link(program: Program) -> int:
    """Attach to the tracepoint by a link; the perf event goes with it."""
    number = (tracefs_folder() / "events" / _CALL.replace(":", "/") / "id").read_text()
    event = perf_events.perf_event(_TRACEPOINT_EVENT, int(number))
    try:
        link = libbpf.api().bpf_link_create(program.fd, event, _PERF_EVENT, None)
        return libbpf.checked(link, f"attaching to {_CALL}")
    finally:
        os.close(event)


def _answer_to_update(now: Program, following: Program) -> int:
    link = _perf_link(now)
    try:
        return int(libbpf.api().bpf_link_update(link, following.fd, None))
    finally:
        libbpf.close(link)


def _cgroup_root() -> str:
    with open("/proc/self/mounts", errors="surrogateescape") as mounts:
        for line in mounts:
            _, point, kind = line.split()[:3]
            if kind == "cgroup2":
                return point
    raise Unavailable("No cgroup file system of version 2 is mounted here: mount one.")


def _make_events(
    hook: str, events: int, first: int, address: int, made: npt.NDArray[np.int64]
) -> None:
    with ExitStack() as opened:
        make: Callable[[int], object]
        if hook == "trace":
            close = ctypes.CDLL(None).close
            make = lambda number: close(first + number)  # noqa: E731
        elif hook == "cgroup":
            udp = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            to = (socket.inet_ntoa(address.to_bytes(4, sys.byteorder)), 9)
            make = lambda number: udp.sendto(number.to_bytes(4, sys.byteorder), to)  # noqa: E731
        else:
            raw = opened.enter_context(network.packet_socket(network.ENDS[0]))
            make = lambda number: raw.send(network.frame(number.to_bytes(4, sys.byteorder)))  # noqa: E731
        while made[0] < 0:
            time.sleep(0.0005)
        for number in range(events):
            make(number)
            made[0] = number + 1


def _wait_until(made: npt.NDArray[np.int64], due: int, maker: Child) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while made[0] < due:
        if maker.ended():
            return  # with all of them made, or with an error that its result tells
        if time.monotonic() > deadline:
            raise TimedOut(f"The events were not made within {_LIMIT_S:g} s.")


def _settled(seen: Map) -> npt.NDArray[Any]:
    """How often each was seen, once nothing is on its way any more."""
    deadline = time.monotonic() + _LIMIT_S
    before, now = -1, int(seen.snapshot().values.sum())
    while now != before:
        if time.monotonic() > deadline:
            raise TimedOut(f"Events were seen still after {_LIMIT_S:g} s.")
        time.sleep(_SETTLED_S)
        before, now = now, int(seen.snapshot().values.sum())
    values: npt.NDArray[Any] = seen.snapshot().values
    return values
