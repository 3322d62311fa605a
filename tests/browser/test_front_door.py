"""JupyterLab's front door as a new user meets it: page, notebook, a measurement that is stopped."""

from __future__ import annotations

import hashlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.chromium import CONTROL, SHIFT, Browser

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("kernel"), pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
SERVE = """
import signal, sys; from pathlib import Path; from labkit.lab import front, jupyter
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
originals, folder, runs = map(Path, sys.argv[2:])
front.copy(originals, folder)
front.write(folder, runs)
jupyter.serve("127.0.0.1", int(sys.argv[1]), folder, "", ["true"])
"""
LINK = "[...document.querySelectorAll('.jp-MarkdownViewer a')].find(a => a.textContent == {!r})"
OUTPUT = "[...document.querySelectorAll('.jp-OutputArea')].map(one => one.textContent).join(' ')"


def contents(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*.ipynb"))
    return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in files}


@pytest.fixture
def address(tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where a new user finds the front door, as ``make lab`` prints it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for place in ("JUPYTER_CONFIG", "JUPYTER_DATA", "JUPYTERLAB_SETTINGS", "JUPYTERLAB_WORKSPACES"):
        monkeypatch.setenv(f"{place}_DIR", str(tmp_path / place.lower()))
    places = [str(one) for one in (ROOT / "notebooks", tmp_path / "copies", tmp_path / "runs")]
    log = tmp_path / "lab.log"
    with log.open("wb") as file:
        lab = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(port), *places],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=ROOT, process_group=0,
        )  # fmt: skip
    try:
        found = browser.until(
            lambda: re.search(r"lab: JupyterLab: (http://127\.0\.0\.1:\S+)", log.read_text()),
            "JupyterLab to start",
            within_s=180,
        )
        yield found[1]
    finally:
        lab.terminate()  # it ends Jupyter, and Jupyter its kernels
        lab.wait(30)


def test_from_the_front_door_to_a_measurement_that_is_stopped(
    address: str, browser: Browser, tmp_path: Path
) -> None:
    browser.resize(1200, 1000)
    before = contents(ROOT / "notebooks")
    browser.open(address)
    cards = "document.querySelectorAll('.jp-MarkdownViewer tr').length"
    browser.until(lambda: browser.run(cards) == len(before), "a card for each notebook")
    pictures = "[...document.images].filter(one => one.naturalWidth > 100).length"
    browser.until(lambda: browser.run(pictures) > len(before) / 2, "the key figures")
    text = browser.run("document.querySelector('.jp-MarkdownViewer').textContent")
    assert text.count("recorded on") > len(before) / 2
    in_the_way = "document.querySelectorAll('.jp-Dialog, .Toastify__toast').length"
    assert browser.run(in_the_way) == 0, "no news, no question"
    browser.screenshot("front-door")

    browser.run(f"{LINK.format('03 Value size')}.click()")
    ready = "document.querySelector('#jp-main-statusbar').textContent.includes('| Idle')"
    browser.until(lambda: browser.run(ready), "the notebook and its kernel", within_s=90)
    for act in ("click", "focus"):
        browser.run(f"document.querySelector('.jp-Notebook .jp-Cell').{act}()")
    for _ in range(5):  # title, parameters, investigation, prose, measure
        browser.press("Enter", SHIFT)
    browser.until(
        lambda: "bcc-leaf-size: " in browser.run(OUTPUT), "the measurement to begin", within_s=90
    )
    browser.press("Escape")
    browser.press("i")
    browser.press("i")
    browser.until(lambda: "was stopped" in browser.run(OUTPUT), "the sentence of the stop")
    browser.screenshot("front-door-stopped")
    assert "Traceback" not in browser.run(OUTPUT)
    browser.press("s", CONTROL)
    browser.until(
        lambda: (
            contents(tmp_path / "copies")["03-value-size.ipynb"] != before["03-value-size.ipynb"]
        ),
        "the copy to be saved",
    )
    assert contents(ROOT / "notebooks") == before, "the checkout stays as it is"
