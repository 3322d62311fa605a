"""JupyterLab, which is root: whatever a user has configured, it asks for its token."""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from labkit.errors import LabError
from labkit.lab import jupyter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="its processes are found in /proc")

CHECKOUT = Path(__file__).parents[2]
NO_TOKEN = {"IdentityProvider": {"token": ""}, "ServerApp": {"token": "", "ip": "0.0.0.0"}}
WITHIN_S = 90.0


def as_python(folder: Path) -> dict[str, str]:
    for name in ("jupyter_server_config", "jupyter_lab_config", "jupyter_config"):
        (folder / f"{name}.py").write_text("c.IdentityProvider.token = c.ServerApp.token = ''")
    return {"JUPYTER_CONFIG_DIR": str(folder)}


def as_json(folder: Path) -> dict[str, str]:
    (folder / "jupyter_server_config.json").write_text(json.dumps(NO_TOKEN))
    return {"JUPYTER_CONFIG_PATH": str(folder), "JUPYTER_PREFER_ENV_PATH": "1"}


def as_home(folder: Path) -> dict[str, str]:
    (folder / ".jupyter").mkdir()
    (folder / ".jupyter" / "jupyter_server_config.json").write_text(json.dumps(NO_TOKEN))
    return {"HOME": str(folder), "JUPYTER_TOKEN": "", "JUPYTER_TOKEN_FILE": os.devnull}


def until(found: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WITHIN_S
    while not (answer := found()):
        assert time.monotonic() < deadline, f"no {what} within {WITHIN_S:g} s"
        time.sleep(0.1)
    return answer


@contextmanager
def started(folder: Path, given: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """JupyterLab as ``make lab`` starts it, and the address that it shows."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, temporary = folder / "lab.log", folder / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "LAB_PORT": str(port), "TMPDIR": str(temporary), **given}
    with log.open("wb") as file:
        lab = subprocess.Popen(
            CHECKOUT / "provision" / "lab.sh", env=environment,
            stdin=subprocess.DEVNULL, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        pattern = re.compile(
            r"^lab: JupyterLab: (http://127\.0\.0\.1:\d+)/lab\S*\?token=(\w+)$", re.M
        )
        shown = until(lambda: pattern.search(log.read_text()) or lab.poll() is not None, "address")
        assert isinstance(shown, re.Match), log.read_text()
        yield lab, f"{shown[1]} {shown[2]}"
    finally:
        lab.kill()
        lab.wait()


def ask(where: str, path: str, token: str = "", body: bytes | None = None) -> tuple[int, Any]:
    headers = {"Authorization": f"token {token}"} if token else {}
    request = urllib.request.Request(f"{where}{path}", headers=headers, data=body)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as refusal:
        return refusal.code, None


def processes_that_name(folder: Path) -> list[int]:
    """Processes whose command or environment has this folder in it, apart from ours."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if bytes(folder) in words and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


@pytest.mark.parametrize(
    ("configure", "number"),
    [(as_python, signal.SIGTERM), (as_json, signal.SIGHUP), (as_home, signal.SIGKILL)],
)
def test_no_configuration_takes_the_token_away(
    configure: Callable[[Path], dict[str, str]], number: int
) -> None:
    # A socket's path is 107 bytes long at the most.
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        ends_with_nothing_left(Path(name), configure, number)


def ends_with_nothing_left(
    folder: Path, configure: Callable[[Path], dict[str, str]], number: int
) -> None:
    with started(folder, configure(folder)) as (lab, shown):
        where, token = shown.split()
        for path in ("/api/kernels", "/api/contents", "/api/sessions", "/api/terminals"):
            assert ask(where, path)[0] == ask(where, path, "x" * len(token))[0] == 403
            assert ask(where, path, token)[0] == 200
        status, kernel = ask(where, "/api/kernels", token, b"{}")
        assert status == 201
        (connection,) = (folder / "tmp").glob(f"labkit-*/kernel-{kernel['id']}.json")
        assert json.loads(connection.read_text())["transport"] == "ipc"
        until(
            lambda: ask(where, f"/api/kernels/{kernel['id']}", token)[1]["execution_state"]
            in ("idle", "starting") and any(connection.parent.glob(f"{connection.stem}-ipc-*")),
            "kernel",
        )  # fmt: skip
        lab.send_signal(number)
        lab.wait(WITHIN_S)
        until(lambda: not processes_that_name(folder / "tmp"), "end of its processes")
        until(lambda: not any((folder / "tmp").iterdir()), "removal of its folder")


def test_who_answers_without_a_token_is_not_shown() -> None:
    class Open(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with (
        http.server.HTTPServer(("127.0.0.1", 0), Open) as server,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as lives,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(LabError, match="answers 200 to who has no token"):
                jupyter._await_guarded(lives, f"http://127.0.0.1:{server.server_port}", "token")
        finally:
            server.shutdown()
            lives.kill()


@pytest.mark.parametrize("port", ["0", "65536", "1" * 5000, "-1", "$(touch x)", "８", "8888 "])
def test_a_port_is_a_number(port: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "labkit.lab.jupyter"], env={**os.environ, "LAB_PORT": port},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("lab: LAB_PORT must be a port") and done.stderr.count("\n") == 1
