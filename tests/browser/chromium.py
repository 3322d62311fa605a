"""Headless Chromium, driven through a pair of pipes (the DevTools protocol): no port, no driver."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ARTEFACTS = Path(__file__).parents[2] / ".lab" / "screenshots"
"""Where tests keep what they saw; git ignores it, and make clean removes it."""

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
KEYS = {
    "Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " "), "Escape": (27, ""),
}  # fmt: skip
SHIFT, CONTROL = 8, 2
ANSWER_S = 30.0


def missing() -> str:
    """Why no browser can be started here; empty where one can."""
    if shutil.which("chromium") is None:
        return "Chromium is not installed: run provision/browser-packages.sh"
    return ""


class Browser:
    """A new, empty browser with one page; a context manager.

    Parameters
    ----------
    profile : Path
        Folder for its profile, made anew.
    width, height : int
        Of the page, pixels.
    """

    def __init__(self, profile: Path, width: int = 1000, height: int = 1000) -> None:
        theirs, self._out = os.pipe()
        self._in, answers = os.pipe()
        # The protocol's pipes are descriptors 3 and 4 by definition.
        renumber = f'exec "$0" "$@" 3<&{theirs} 4>&{answers}'
        command = ["bash", "-c", renumber, "chromium", *FLAGS, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs, answers),
            start_new_session=True,
        )
        os.close(theirs)
        os.close(answers)
        self._number, self._pending, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        try:
            page = self.command("Target.createTarget", url="about:blank")["targetId"]
            attached = self.command("Target.attachToTarget", targetId=page, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Network"):
                self.command(f"{domain}.enable")
            self.resize(width, height)
        except BaseException:
            self.close()
            raise

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events on the way are kept in `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + ANSWER_S
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            if "method" in answer:
                self.events.append(answer)

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._pending:
            left = deadline - time.monotonic()
            assert left > 0, "Chromium did not answer"
            if select.select([self._in], [], [], left)[0]:
                piece = os.read(self._in, 1 << 20)
                assert piece, "Chromium has gone"
                self._pending += piece
        body, _, self._pending = self._pending.partition(b"\0")
        message: dict[str, Any] = json.loads(body)
        return message

    def resize(self, width: int, height: int) -> None:
        """Give the page another size, in pixels."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def open(self, url: str) -> None:
        """Go to an address and wait until the page has loaded."""
        answer = self.command("Page.navigate", url=url)
        assert not answer.get("errorText"), f"{url}: {answer.get('errorText')}"
        self.until(lambda: self.run("document.readyState === 'complete'"), "the page to load")

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression in the page."""
        answer = self.command("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, f"{script}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def until(self, met: Callable[[], Any], what: str, *, within_s: float = 30.0) -> Any:
        """Wait until something is met, and return it; fails with a screenshot where it is not."""
        deadline = time.monotonic() + within_s
        while not (value := met()):
            if time.monotonic() > deadline:
                self.screenshot("failed")
                raise AssertionError(f"waited {within_s:g} s for {what}; see {ARTEFACTS}")
            time.sleep(0.05)
        return value

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press and release one key: a name of `KEYS`, or a character."""
        code, text = KEYS[key] if key in KEYS else (ord(key.upper()), key)
        text = "" if modifiers & CONTROL else text
        how = {
            "key": key, "code": {" ": "Space"}.get(key, key if len(key) > 1 else ""),
            "windowsVirtualKeyCode": code, "modifiers": modifiers,
        }  # fmt: skip
        # Ctrl+A is an editing command here, as the browser's own shortcuts are not there.
        commands = ["selectAll"] if (key, modifiers) == ("a", CONTROL) else []
        self.command(
            "Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text,
            commands=commands, **how,
        )  # fmt: skip
        self.command("Input.dispatchKeyEvent", type="keyUp", **how)

    def screenshot(self, name: str) -> Path:
        """Keep a picture of the page in `ARTEFACTS`."""
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        file = ARTEFACTS / f"{name}.png"
        file.write_bytes(base64.b64decode(self.command("Page.captureScreenshot")["data"]))
        return file

    def close(self) -> None:
        """End the browser with all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        os.close(self._out)
        os.close(self._in)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
