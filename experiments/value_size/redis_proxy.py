"""A real Redis without persistence, and a proxy before it that minds the size of values."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from labkit.errors import LabError, Unavailable
from labkit.kernel.leftovers import helper_process, temporary_folder
from labkit.kernel.parallel import die_with_parent
from labkit.kernel.tools import redis_server_command

_START_S = 10.0
_ANSWER_S = 10.0
_LONGEST_PATH = 100  # of a socket, which holds 108 bytes with its NUL


class RedisRefused(LabError):
    """The answer to a command was an error."""


class Client:
    """One connection that speaks as much of the Redis protocol as SET and GET need."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_ANSWER_S)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._answers = self._socket.makefile("rb")

    def close(self) -> None:
        """End the connection."""
        self._answers.close()
        self._socket.close()

    def call(self, *words: bytes) -> bytes:
        """Send one command and return the raw answer."""
        self._socket.sendall(_command(words))
        return _answer(self._answers)

    def set(self, key: bytes, value: bytes) -> None:
        """Store a value; RedisRefused where server or proxy does not take it."""
        answer = self.call(b"SET", key, value)
        if answer != b"+OK\r\n":
            raise RedisRefused(answer.decode(errors="replace").strip("-\r\n"))

    def get(self, key: bytes) -> bytes:
        """Fetch a value; RedisRefused where there is none."""
        head, _, value = self.call(b"GET", key).partition(b"\r\n")
        if not head.startswith(b"$") or head == b"$-1":
            raise RedisRefused(f"There is no value {key!r}.")
        return value[:-2]


@contextlib.contextmanager
def redis_server() -> Iterator[Path]:
    """Run a Redis on a socket in a folder of its own; nothing of it reaches a network or disk.

    Yields
    ------
    pathlib.Path
        Its socket.

    Raises
    ------
    Unavailable
        There is no Redis, or it does not start.
    """
    executable, name = redis_server_command()
    with temporary_folder() as folder:
        path = folder / "redis"
        if len(str(path)) > _LONGEST_PATH:
            raise Unavailable(f"A socket cannot have a path as long as {path}: set TMPDIR.")
        options = {
            "--port": "0",
            "--unixsocket": str(path),
            "--unixsocketperm": "700",
            "--save": "",
            "--appendonly": "no",
            "--dir": str(folder),
        }
        words = [word for option in options.items() for word in option]
        server = subprocess.Popen(
            [name, *words],
            executable=executable,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        try:
            with helper_process(server.pid):
                _await(server, path)
                yield path
        finally:
            server.kill()
            server.wait(_ANSWER_S)


def _await(server: subprocess.Popen[bytes], path: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError, LabError):
            client = Client(path)
            try:
                if client.call(b"PING") == b"+PONG\r\n":
                    return
            finally:
                client.close()
        time.sleep(0.01)
    raise Unavailable("The Redis of this machine does not start: try redis-server by hand.")


@contextlib.contextmanager
def proxy(server: Path, *, limit: int, refuse: bool) -> Iterator[Path]:
    """Stand between clients and a Redis, with a limit to the size of what they SET.

    Parameters
    ----------
    server : Path
        Socket of the Redis.
    limit : int
        Longest value that passes as it is, bytes.
    refuse : bool
        Answer a longer value with an error; otherwise cut it to the limit and pass it on.

    Yields
    ------
    pathlib.Path
        Socket of the proxy; one client at a time.
    """
    with temporary_folder() as folder, socket.socket(socket.AF_UNIX) as listening:
        path = folder / "proxy"
        listening.bind(str(path))
        listening.listen(1)
        listening.settimeout(_ANSWER_S)
        ended: list[Exception] = []

        def serve() -> None:
            try:
                connection, _ = listening.accept()
                with connection:
                    connection.settimeout(_ANSWER_S)
                    _relay(connection, server, limit, refuse)
            except Exception as error:
                ended.append(error)

        worker = threading.Thread(target=serve, daemon=True)
        worker.start()
        yield path
        worker.join(2 * _ANSWER_S)
        if ended:
            raise ended[0]


def _relay(connection: socket.socket, server: Path, limit: int, refuse: bool) -> None:
    behind = Client(server)
    try:
        with connection.makefile("rb") as asked:
            while words := _words(asked):
                if words[0] == b"SET" and len(words[2]) > limit:
                    if refuse:
                        size = len(words[2])
                        connection.sendall(b"-ERR value of %d B, limit %d B\r\n" % (size, limit))
                        continue
                    words[2] = words[2][:limit]
                connection.sendall(behind.call(*words))
    finally:
        behind.close()


def _command(words: tuple[bytes, ...]) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)


def _words(asked: BufferedReader) -> list[bytes]:
    """One command; empty when the client has gone."""
    head = asked.readline()
    return [_bulk(asked, asked.readline()) for _ in range(int(head[1:]))] if head else []


def _answer(answers: BufferedReader) -> bytes:
    head = answers.readline()
    if not head:
        raise LabError("The Redis server closed the connection.")
    if head.startswith(b"$") and head != b"$-1\r\n":
        return head + _bulk(answers, head) + b"\r\n"
    return head


def _bulk(stream: BufferedReader, head: bytes) -> bytes:
    """The bytes behind a head such as ``$12``, without the line end behind them."""
    return stream.read(int(head[1:]) + 2)[:-2]
