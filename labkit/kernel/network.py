"""A network of our own with a veth pair: no address, no route, and gone with the process."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from typing import Final

from labkit.errors import Unavailable
from labkit.kernel import libbpf, tools

ENDS: Final = ("labkit0", "labkit1")
"""Names of the two ends of the pair; what goes in at one comes out at the other."""

LAB_PROTOCOL: Final = 0x88B5
"""EtherType for local experiments (IEEE 802): no other traffic on the pair has it."""

_ALL_PROTOCOLS = 3  # ETH_P_ALL
_CLONE_NEWNET = 0x40000000
_LIMIT_S = 10.0


def enter_own_network() -> None:
    """Move this process into a new network namespace and set up the pair in it.

    For a child process that is about to end: the kernel removes namespace and pair with its
    last process, however it dies. There is no way back.

    Raises
    ------
    OSError
        The kernel refuses a namespace.
    Unavailable
        There is no ``ip`` command, or it cannot make the pair, or that does not come up.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        libbpf.checked(-ctypes.get_errno(), "making a network namespace")
    if not (ip := tools.find_tool("ip")):
        raise Unavailable("There is no ip command: install iproute2 (make setup does).")
    _ip(ip, f"link add {ENDS[0]} type veth peer name {ENDS[1]}")
    for end in ENDS:
        _ip(ip, f"link set {end} up")
    # The kernel lets an end send only some time after both are up: until then it drops every frame
    # (net/core/link_watch.c), and tells nobody.
    deadline = time.monotonic() + _LIMIT_S
    while {one["operstate"] for one in json.loads(_ip(ip, "-json link show type veth"))} != {"UP"}:
        if time.monotonic() > deadline:
            raise Unavailable(
                f"The veth pair was not up within {_LIMIT_S:g} s: the machine is overloaded."
            )
        time.sleep(0.005)


def _ip(command: str, words: str) -> str:
    done = subprocess.run(
        [command, *words.split()], capture_output=True, text=True, check=False, timeout=_LIMIT_S
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise Unavailable(f"ip {words} failed ({said}): use a kernel that has veth.")
    return done.stdout


def packet_socket(interface: str, protocol: int = _ALL_PROTOCOLS) -> socket.socket:
    """Open a socket for whole Ethernet frames on one interface; the caller closes it.

    Parameters
    ----------
    interface : str
        One of `ENDS`.
    protocol : int
        EtherType of the frames that are received; all by default.
    """
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol))
    raw.bind((interface, protocol))
    return raw


def frame(payload: bytes) -> bytes:
    """Ethernet frame to everybody on the pair, of `LAB_PROTOCOL`, padded to 64 bytes."""
    head = b"\xff" * 6 + b"\x02\0\0\0\0\1" + LAB_PROTOCOL.to_bytes(2, "big")
    return (head + payload).ljust(64, b"\0")


def own_address() -> int:
    """Address of the loopback that no other process of the lab has, in network order.

    It has no sign where a program takes it as a number of 32 bits.
    """
    pid = os.getpid()
    words = bytes([127, 128 | pid >> 14 & 127, pid >> 7 & 127, pid & 127])
    return int.from_bytes(words, sys.byteorder)
