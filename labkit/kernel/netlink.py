"""Which programs the network devices of one namespace run: XDP and tc, asked by netlink.

A device or a tc filter runs a program without a link, so that neither a list of links nor any
descriptor tells of it. The kernel lists both by rtnetlink (include/uapi/linux/rtnetlink.h,
if_link.h, pkt_cls.h, tc_act/tc_bpf.h). Five kinds of lists and a dozen attributes are all that is
read here, so that this library asks its users for no netlink package.

Decoding takes any bytes: what is cut short, or says a length that cannot be, ends the message.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from labkit.kernel.closing import Closing

_LIMIT_S: Final = 1.0
_BUFFER_BYTES: Final = 1 << 18
_MOST_TRIES: Final = 3
_REQUEST_DUMP: Final = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_INTERRUPTED: Final = 0x10  # NLM_F_DUMP_INTR
_ERROR, _DONE = 2, 3
_GET_LINK, _GET_QDISC, _GET_CLASS, _GET_FILTER, _GET_ACTION = 18, 38, 42, 46, 50
_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE: Final = struct.Struct("=HH")  # struct nlattr
_DEVICE: Final = struct.Struct("=BxHiII")  # struct ifinfomsg
_IFF_UP: Final = 1
_TRAFFIC: Final = struct.Struct("=BxHIIII")  # struct tcmsg
_KIND, _OPTIONS, _CHAIN = 1, 2, 11  # TCA_*
_SHARED_BLOCK: Final = 0xFFFFFFFF  # TCM_IFINDEX_MAGIC_BLOCK
_CLSACT: Final = 0xFFFF0000
_ROOT: Final = 0xFFFFFFFF
_XDP_MODES: Final = {5: "native", 6: "generic", 7: "offload"}  # IFLA_XDP_*_PROG_ID

INGRESS: Final = 0xFFFFFFF2
EGRESS: Final = 0xFFFFFFF3
"""Parents of filters at a clsact qdisc (TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_*))."""


@dataclass(frozen=True)
class Device:
    """One network device.

    Attributes
    ----------
    index : int
        Its number in its namespace.
    name : bytes
        As the kernel has it.
    xdp : tuple of (str, int)
        Mode (``native``, ``generic``, ``offload``) and program id of each XDP program.
    up : bool
        Whether it is set up, so that packets may pass.
    """

    index: int
    name: bytes
    xdp: tuple[tuple[str, int], ...]
    up: bool


@dataclass(frozen=True)
class Filter:
    """One tc filter that runs a program.

    Attributes
    ----------
    program_id : int
        The program.
    parent : int
        `INGRESS`, `EGRESS`, or the qdisc or class that it belongs to.
    block : int or None
        The block that several devices share, where it belongs to such a one.
    priority, protocol, handle, chain : int
        As ``tc`` takes them; the protocol is an EtherType.
    direct : bool
        Its answer decides by itself (``direct-action``).
    """

    program_id: int
    parent: int
    block: int | None
    priority: int
    protocol: int
    handle: int
    chain: int
    direct: bool


@dataclass(frozen=True)
class Action:
    """One tc action that runs a program.

    Attributes
    ----------
    program_id, index : int
        The program, and the number of the action in its namespace.
    filters : int
        How many filters lead to it.
    """

    program_id: int
    index: int
    filters: int


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Cut what one read of a netlink socket gave into messages: type, flags, payload."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, flags, _, _ = _HEADER.unpack_from(data, at)
        if not _HEADER.size <= length <= len(data) - at:
            return
        yield kind, flags, data[at + _HEADER.size : at + length]
        at += _aligned(length)


def attributes(data: bytes) -> dict[int, bytes]:
    """Attributes of a message, or of an attribute that holds others, by their type."""
    found: dict[int, bytes] = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= length <= len(data) - at:
            break
        found[kind & 0x3FFF] = data[at + _ATTRIBUTE.size : at + length]  # less NLA_F_*
        at += _aligned(length)
    return found


def device(payload: bytes) -> Device | None:
    """Read an RTM_NEWLINK message; None where it says no name."""
    if len(payload) < _DEVICE.size:
        return None
    _, _, index, flags, _ = _DEVICE.unpack_from(payload)
    known = attributes(payload[_DEVICE.size :])
    if 3 not in known:  # IFLA_IFNAME
        return None
    xdp = attributes(known.get(43, b""))
    modes = [(name, _number(xdp, kind)) for kind, name in _XDP_MODES.items()]
    programs = tuple((name, one) for name, one in modes if one)
    return Device(index, _text(known[3]), programs, bool(flags & _IFF_UP))


def traffic_filter(payload: bytes) -> Filter | None:
    """Read an RTM_NEWTFILTER message; None where the filter is no BPF program."""
    if len(payload) < _TRAFFIC.size:
        return None
    _, _, index, handle, parent, info = _TRAFFIC.unpack_from(payload)
    known = attributes(payload[_TRAFFIC.size :])
    options = attributes(known.get(_OPTIONS, b""))
    program_id = _number(options, 11)  # TCA_BPF_ID
    if _text(known.get(_KIND, b"")) != b"bpf" or not program_id:
        return None
    shared = index == _SHARED_BLOCK  # then the parent's place has the number of the block
    return Filter(
        program_id=program_id,
        parent=0 if shared else parent,
        block=parent if shared else None,
        priority=info >> 16,
        protocol=socket.ntohs(info & 0xFFFF),
        handle=handle,
        chain=_number(known, _CHAIN),
        direct=bool(_number(options, 8) & 1),  # TCA_BPF_FLAGS: TCA_BPF_FLAG_ACT_DIRECT
    )


def traffic_actions(payload: bytes) -> list[Action]:
    """Read an RTM_NEWACTION message: its actions that are BPF programs."""
    found = []
    for one in attributes(attributes(payload[4:]).get(1, b"")).values():  # struct tcamsg, then
        known = attributes(one)  # TCA_ACT_TAB: a numbered list
        options = attributes(known.get(_OPTIONS, b""))
        program_id, general = _number(options, 9), options.get(2, b"")  # TCA_ACT_BPF_ID, _PARMS
        if _text(known.get(_KIND, b"")) == b"bpf" and program_id and len(general) >= 20:
            index, _, _, _, bound = struct.unpack_from("=IIiii", general)  # tc_gen
            found.append(Action(program_id, index, bound))
    return found


class Netlink(Closing):
    """A conversation with the network namespace in which it was opened.

    Raises
    ------
    OSError
        From each method too: the kernel's answer, or TimeoutError after a second of silence.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.settimeout(_LIMIT_S)
        self._sequence = 0

    def close(self) -> None:
        """End it; safe to call twice."""
        self._socket.close()

    def devices(self) -> list[Device]:
        """All devices of the namespace."""
        skip_statistics = struct.pack("=HHI", 8, 29, 1 << 3)  # IFLA_EXT_MASK
        answers = self._dump(_GET_LINK, _DEVICE.pack(0, 0, 0, 0, 0) + skip_statistics)
        return [one for one in map(device, answers) if one]

    def filter_parents(self) -> dict[int, list[int]]:
        """Where filters may stand: by index of the device, parents to ask for filters.

        These are both sides of clsact, the qdisc of ingress, other qdiscs, and their classes.
        """
        found: dict[int, list[int]] = {}
        for payload in self._dump(_GET_QDISC, self._traffic(0, 0)):
            if len(payload) < _TRAFFIC.size:
                continue
            _, _, index, handle, parent, _ = _TRAFFIC.unpack_from(payload)
            kind = _text(attributes(payload[_TRAFFIC.size :]).get(_KIND, b""))
            here = found.setdefault(index, [])
            if kind == b"clsact":
                here += [INGRESS, EGRESS]
            elif kind == b"ingress":
                here.append(_CLSACT)
            elif handle:
                here += [handle, *self._classes(index, handle)]
            elif parent == _ROOT:
                here.append(0)  # the kernel's own qdisc has no handle
        return found

    def filters(self, index: int, parent: int) -> list[Filter]:
        """The filters of one device and parent that run programs, in the order of asking."""
        answers = self._dump(_GET_FILTER, self._traffic(index, parent))
        return [one for one in map(traffic_filter, answers) if one]

    def actions(self) -> list[Action]:
        """The actions of the namespace that run programs; none where the kernel has no act_bpf."""
        kind = struct.pack("=HH4s", 8, _KIND, b"bpf\0")
        wanted = struct.pack("=HH", 4 + 4 + len(kind), 1) + struct.pack("=HH", 4 + len(kind), 1)
        answers = self._dump(_GET_ACTION, bytes(4) + wanted + kind)
        return [one for payload in answers for one in traffic_actions(payload)]

    def _classes(self, index: int, qdisc: int) -> list[int]:
        payloads = self._dump(_GET_CLASS, self._traffic(index, qdisc))
        return [_TRAFFIC.unpack_from(one)[3] for one in payloads if len(one) >= _TRAFFIC.size]

    @staticmethod
    def _traffic(index: int, parent: int) -> bytes:
        return _TRAFFIC.pack(0, 0, index, 0, parent, 0)

    def _dump(self, request: int, body: bytes) -> list[bytes]:
        """Payloads of one list; asked for again where it changed while it was told."""
        for _ in range(_MOST_TRIES):
            found, whole = self._told(request, body)
            if whole:
                break
        return found

    def _told(self, request: int, body: bytes) -> tuple[list[bytes], bool]:
        self._sequence += 1
        length = _HEADER.size + len(body)
        header = _HEADER.pack(length, request, _REQUEST_DUMP, self._sequence, 0)
        self._socket.send(header + body)
        found: list[bytes] = []
        whole = True
        while True:
            for kind, flags, payload in messages(self._socket.recv(_BUFFER_BYTES)):
                whole = whole and not flags & _INTERRUPTED
                if kind in (_ERROR, _DONE):
                    number = -struct.unpack_from("=i", payload)[0] if len(payload) >= 4 else 0
                    if number > 0:
                        raise OSError(number, os.strerror(number))
                    return found, whole
                found.append(payload)


def _aligned(length: int) -> int:
    return length + 3 & ~3


def _number(known: dict[int, bytes], kind: int) -> int:
    """An attribute of four bytes, or 0."""
    raw = known.get(kind, b"")
    return int.from_bytes(raw[:4], sys.byteorder) if len(raw) >= 4 else 0


def _text(raw: bytes) -> bytes:
    return raw.partition(b"\0")[0]
