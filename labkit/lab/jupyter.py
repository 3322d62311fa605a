"""JupyterLab for one user: nobody else's settings, no kernel's port, and a token that is checked.

Jupyter is root here, and runs whatever it is told. Its configuration is written for this one start,
into a folder that goes away, so that a token that somebody once set to nothing is not read; and its
address is shown after it has refused a question without the token.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Final

from labkit.errors import BadInput, LabError, TimedOut
from labkit.kernel.leftovers import temporary_folder
from labkit.kernel.parallel import die_with_parent
from labkit.lab import front

_START_LIMIT_S: Final = 180.0  # where the CPU is emulated it takes a minute
_END_LIMIT_S: Final = 15.0  # Jupyter ends its kernels first
_SOCKET_PATH_BYTES: Final = 107  # sun_path, with a NUL
_SOCKET_NAME_BYTES: Final = len("/kernel-01234567-89ab-cdef-0123-456789abcdef-ipc-99")
_ASK_EVERY_S: Final = 0.2
_ANSWER_S: Final = 30.0
_FRONT_LIMIT_S: Final = 20.0
_ANYWHERE: Final = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1"}
# Places of configuration, and what ties to make the commands that a user gives in a terminal.
_WITHOUT: Final = (
    "JUPYTER_CONFIG_PATH", "JUPYTER_NO_CONFIG", "JUPYTER_TOKEN", "JUPYTER_TOKEN_FILE", "MAKELEVEL",
)  # fmt: skip


def serve(
    listen: str, port: int, notebooks: Path, token: str = "", first_page: Sequence[str] = ()
) -> int:
    """Run JupyterLab until it ends.

    Parameters
    ----------
    listen : str
        IPv4 address that it listens on.
    port : int
        Its port; a taken one is an error, as the port that a VM forwards must not wander.
    notebooks : pathlib.Path
        Folder that it shows.
    token : str
        What it asks for; by default a new one, which is then shown with the address.
    first_page : sequence of str, optional
        Command that makes the first page, `labkit.lab.front.START`, while Jupyter starts.

    Returns
    -------
    int
        Jupyter's exit status.

    Raises
    ------
    BadInput
        The path of temporary folders is too long for sockets.
    LabError
        It answers a question without the token: it was ended again.
    TimedOut
        It did not answer in time: it was ended.
    """
    asked = token or secrets.token_hex(24)
    with temporary_folder() as folder:
        if len(os.fsencode(folder)) + _SOCKET_NAME_BYTES > _SOCKET_PATH_BYTES:
            raise BadInput("TMPDIR has too long a path for its kernels' sockets: name a short one.")
        settings = _settings(listen, port, notebooks, asked)
        for name, content in settings.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content))
        making = subprocess.Popen(first_page, preexec_fn=_with_parent) if first_page else None
        jupyter = subprocess.Popen(
            [str(Path(sys.executable).parent / "jupyter-lab"), *_allowed_as_root()],
            env=_environment(folder),
            preexec_fn=_with_parent,
        )
        try:
            with suppress(_Ended):
                _await_guarded(jupyter, f"http://{_ANYWHERE.get(listen, listen)}:{port}", asked)
                if making is not None:
                    with suppress(subprocess.TimeoutExpired):  # the page is there, without states
                        making.wait(_FRONT_LIMIT_S)
                shown = f"?token={asked}" if not token else ", with the token that was set"
                page = f"/tree/{front.START}" if first_page else ""
                _say(f"JupyterLab: http://{_ANYWHERE.get(listen, listen)}:{port}/lab{page}{shown}")
            return jupyter.wait()
        finally:
            if making is not None:
                making.kill()
                making.wait()
            _end(jupyter)


def _with_parent() -> None:
    if sys.platform == "linux":
        die_with_parent()


class _Ended(Exception):
    """Jupyter has ended by itself, and said why."""


def _settings(listen: str, port: int, notebooks: Path, token: str) -> dict[str, object]:
    """Files of Jupyter's own configuration folder."""
    guarded = {"IdentityProvider": {"token": token}, "PasswordIdentityProvider": {"token": token}}
    return {
        "jupyter_server_config.json": {
            **guarded,
            "ServerApp": {
                "ip": listen,
                "port": port,
                "port_retries": 0,
                "root_dir": str(notebooks),
                "open_browser": False,
            },
            # Sockets in our folder: a port of 127.0.0.1 is anybody's who has an account here.
            "KernelManager": {"transport": "ipc"},
        },
        # Read after all the others, from the whole search path: ours is the first of it.
        "jupyter_lab_config.json": guarded,
        "labconfig/default_setting_overrides.json": {
            "@jupyterlab/apputils-extension:notification": {
                "fetchNews": "false",
                "checkForUpdates": False,
            },
            "@jupyterlab/docmanager-extension:plugin": {
                "defaultViewers": {"markdown": "Markdown Preview"},
            },
            "@jupyterlab/filebrowser-extension:browser": {"showLastModifiedColumn": False},
        },
    }


def _environment(folder: Path) -> dict[str, str]:
    from jupyter_core.paths import jupyter_config_dir

    environment = {
        # How JupyterLab looks stays as its user wants it.
        "JUPYTERLAB_SETTINGS_DIR": str(Path(jupyter_config_dir(), "lab", "user-settings")),
        "JUPYTERLAB_WORKSPACES_DIR": str(Path(jupyter_config_dir(), "lab", "workspaces")),
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(folder),
        "JUPYTER_RUNTIME_DIR": str(folder),
        "JUPYTER_PREFER_ENV_PATH": "0",  # our folder comes before the environment's
    }
    for name in _WITHOUT:
        environment.pop(name, None)
    return environment


def _allowed_as_root() -> list[str]:
    # Root is needed for BPF; Jupyter refuses root unless it is told.
    return ["--allow-root"] if os.geteuid() == 0 else []


def _await_guarded(jupyter: subprocess.Popen[bytes], address: str, token: str) -> None:
    """Wait until Jupyter answers with the token, and see that it refuses without."""
    deadline = time.monotonic() + _START_LIMIT_S
    while _answer(address, token) != HTTPStatus.OK:
        if jupyter.poll() is not None:
            raise _Ended
        if time.monotonic() > deadline:
            raise TimedOut(f"JupyterLab did not answer within {_START_LIMIT_S:g} s; it was ended.")
        time.sleep(_ASK_EVERY_S)
    if (answer := _answer(address, "")) != HTTPStatus.FORBIDDEN:
        raise LabError(
            f"JupyterLab answers {answer} to who has no token, in place of {HTTPStatus.FORBIDDEN}; "
            "it was ended. A configuration of this machine takes the token away: look at what "
            "jupyter --paths names under config."
        )


def _answer(address: str, token: str) -> int:
    """Status of the answer to a question for its kernels; 0 where there is none."""
    headers = {"Authorization": f"token {token}"} if token else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"{address}/api/kernels", headers=headers)
    try:
        with opener.open(request, timeout=_ANSWER_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refusal:
        return refusal.code
    except OSError:
        return 0


def _end(jupyter: subprocess.Popen[bytes]) -> None:
    jupyter.terminate()
    try:
        jupyter.wait(_END_LIMIT_S)
    except subprocess.TimeoutExpired:
        jupyter.kill()
        jupyter.wait()


def _say(words: str) -> None:
    print(f"lab: {words}", file=sys.stderr, flush=True)


def _main() -> int:
    port = os.environ.get("LAB_PORT") or "8888"
    if not port.isascii() or not port.isdecimal() or not 0 < int(port[:6]) < 1 << 16:
        raise BadInput(f"LAB_PORT must be a port number, from 1 to 65535, not {port!r}.")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    # Ctrl-C is Jupyter's: it asks, and this process waits for its end.
    signal.signal(signal.SIGINT, lambda *_: None)
    checkout = Path(__file__).resolve().parents[2]
    folder, first_page = Path(os.environ.get("LAB_NOTEBOOKS", "")), list[str]()
    if not os.environ.get("LAB_NOTEBOOKS"):
        folder = checkout / ".lab" / "notebooks"
        first_page = front.prepare(checkout / "notebooks", folder, checkout / "runs")
    return serve(
        os.environ.get("LAB_LISTEN") or "127.0.0.1",
        int(port),
        folder,
        os.environ.get("JUPYTER_TOKEN", ""),
        first_page,
    )


if __name__ == "__main__":
    try:
        sys.exit(_main())
    except LabError as error:
        _say(str(error))
        sys.exit(error.status)
