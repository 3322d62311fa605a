"""Real traffic that needs no network: a socket pair whose receiving end a program guards."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator

from labkit.errors import BadInput
from labkit.kernel.closing import Closing
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.programs import Program

_SO_ATTACH_BPF = 50  # include/uapi/asm-generic/socket.h


class GuardedSocket(Closing):
    """A pair of Unix datagram sockets; a socket filter decides what the receiver gets.

    The attachment lives and dies with the socket, so nothing can be left behind. A
    datagram that the filter refuses is dropped without an error for the sender
    (net/unix/af_unix.c, ``unix_dgram_sendmsg``), as a packet is.
    """

    def __init__(self) -> None:
        self._sender, self._receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._receiver.setblocking(False)

    def attach(self, guard: Program) -> None:
        """Let a program guard the receiver; it takes the place of an earlier one at once."""
        if guard.kind is not ProgramKind.SOCKET_FILTER:
            raise BadInput(f"A socket is guarded by a socket filter, not by {guard!r}.")
        self._receiver.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_BPF, guard.fd)

    def send(self, datagrams: int) -> int:
        """Send datagrams one by one and return how many of them arrived."""
        return sum(self.arrivals([b"datagram"] * datagrams))

    def arrivals(self, datagrams: Iterable[bytes]) -> Iterator[bool]:
        """Send datagrams one by one and tell of each, which is not empty, whether it arrived."""
        send, receive = self._sender.send, self._receiver.recv
        for datagram in datagrams:
            send(datagram)
            try:
                yield len(receive(16)) > 0
            except BlockingIOError:
                yield False  # the sender's call has run the filter, so it was dropped

    def close(self) -> None:
        """Close both ends, which detaches the program; safe to call twice."""
        self._sender.close()
        self._receiver.close()
