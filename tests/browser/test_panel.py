"""The panel of notebook 06 as its user meets it: JupyterLab, a keyboard, a figure that changes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from labkit.kernel import objects
from labkit.lab.live import CHOICES
from tests.browser.chromium import CONTROL, SHIFT, Browser

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("kernel")]

ROOT = Path(__file__).parents[2]
GONE_WITHIN_S = 10.0
LABELS = ["Rate (changes/s)", "Value size (B)", "Ring size (B)", "At most (s)"]
READY = """(() => {
    const indicator = document.querySelector('.jp-Notebook-ExecutionIndicator');
    const status = document.querySelector('.jp-StatusBar-Widget, #jp-main-statusbar');
    return document.querySelectorAll('.jp-Notebook .jp-Cell').length === 6 &&
        indicator?.dataset.status === 'idle' && status?.textContent.includes('| Idle');
})()"""
PROMPT = "document.querySelectorAll('.jp-Notebook .jp-Cell')[{}].querySelector('.jp-InputPrompt')"
FOCUSED = """(() => {
    const one = document.activeElement;
    return (one.labels?.length ? one.labels[0] : one).textContent.trim();
})()"""


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    """Notebook 06 without its benchmark, with a cell below the panel, saving runs elsewhere."""
    made = nbformat.read(ROOT / "notebooks" / "06-benchmark.ipynb", as_version=4)
    cells = {cell.id: cell for cell in made.cells}
    kept = [cells[id] for id in ("title", "parameters", "investigation", "panel-prose", "panel")]
    runs_folder = f'runs_folder = "{tmp_path / "runs"}"'
    cells["parameters"].source += f"\n{runs_folder}"
    made.cells = [*kept, nbformat.v4.new_code_cell("6 * 7")]
    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(made, folder / "06-benchmark.ipynb")
    return folder / "06-benchmark.ipynb"


@pytest.fixture
def address(
    notebook: Path, tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Where JupyterLab serves the notebook, with its token; started as ``make lab`` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for place in ("JUPYTER_CONFIG", "JUPYTER_DATA", "JUPYTERLAB_SETTINGS", "JUPYTERLAB_WORKSPACES"):
        monkeypatch.setenv(f"{place}_DIR", str(tmp_path / place.lower()))
    # JupyterLab asks a new user whether it may fetch news: a question on top of the page.
    settings = tmp_path / "jupyterlab_settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    monkeypatch.setenv("LAB_PORT", str(port))
    monkeypatch.setenv("LAB_NOTEBOOKS", str(notebook.parent))
    log = tmp_path / "lab.log"
    with log.open("wb") as file:
        lab = subprocess.Popen(
            ROOT / "provision" / "lab.sh",
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            process_group=0,
        )
    try:
        found = browser.until(
            lambda: re.search(r"http://127\.0\.0\.1:\d+/lab\?token=(\w+)", log.read_text()),
            "JupyterLab to start",
        )
        # The token buys a cookie; the page would load twice otherwise.
        browser.open(f"http://127.0.0.1:{port}/api/status?token={found[1]}")
        yield f"http://127.0.0.1:{port}/lab/tree/{notebook.name}"
    finally:
        os.killpg(lab.pid, signal.SIGTERM)  # Jupyter ends its kernels
        lab.wait(20)


def family_named(words: str) -> set[int]:
    """Processes below this one whose command line has these words."""
    found = set()
    for pid in objects.family(os.getpid()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if words in command and state not in "ZX":
            found.add(pid)
    return found


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


class Panel:
    """What a user does at the keyboard and sees."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    def wait_until_run(self, place: int) -> None:
        """Wait until the cell in that place, if it holds code, has a number as its prompt."""
        kind = f"document.querySelectorAll('.jp-Notebook .jp-Cell')[{place}].className"
        if "jp-CodeCell" in self.browser.run(kind):
            self.browser.until(
                lambda: re.search(r"\d", self.browser.run(f"{PROMPT.format(place)}.textContent")),
                f"cell {place} to end",
            )

    def tab_to(self, label: str) -> list[str]:
        """Press Tab until the control with this label has the focus; what had it on the way."""
        passed = []
        for _ in range(40):
            self.browser.press("Tab")
            passed.append(str(self.browser.run(FOCUSED)))
            if passed[-1] == label:
                return passed
        raise AssertionError(f"Tab does not reach {label!r}: {passed}")

    def enter(self, label: str, text: str) -> None:
        self.tab_to(label)
        self.browser.press("a", CONTROL)
        for key in text:
            self.browser.press(key)
        self.browser.press("Tab")  # it is taken when the control is left
        self.wait_for("message", f"{label}: {int(text):,}")

    def press(self, button: str, key: str) -> None:
        self.tab_to(button)
        self.browser.press(key)

    def back_to(self, label: str) -> None:
        for _ in range(40):
            self.browser.press("Tab", SHIFT)
            if self.browser.run(FOCUSED) == label:
                return
        raise AssertionError(f"Shift+Tab does not reach {label!r}")

    def text(self, of: str) -> str:
        script = f"(document.querySelector('.labkit-{of}') || {{textContent: ''}}).textContent"
        return str(self.browser.run(script))

    def figure(self) -> str:
        """The picture's address, once it is drawn."""
        script = """(() => {
            const one = document.querySelector('.labkit-figure');
            return one && one.complete && one.naturalWidth > 100 ? one.src : '';
        })()"""
        return str(self.browser.run(script))

    def wait_for(self, of: str, words: str, within_s: float = 30.0) -> None:
        self.browser.until(
            lambda: words in self.text(of), f"{words!r} in the panel's {of}", within_s=within_s
        )

    def figures_seen(self, of: str, least: int) -> list[str]:
        """As many different live figures, in order."""
        seen: list[str] = []

        def more() -> bool:
            if (now := self.text(of)) not in ("", "–", *seen):
                seen.append(now)
            return len(seen) >= least

        self.browser.until(more, f"{least} live figures of {of}")
        return seen


@pytest.mark.timeout(300)  # some 50 s; beside other load the worker's start alone may take as long
def test_a_run_by_keyboard_and_nothing_left_when_the_kernel_is_killed(
    address: str, browser: Browser, notebook: Path, tmp_path: Path
) -> None:
    browser.open(address)
    browser.until(lambda: browser.run(READY), "the notebook and its kernel", within_s=60)
    panel = Panel(browser)
    for place in range(5):
        browser.press("Enter", SHIFT)
        panel.wait_until_run(place)
    panel.wait_for("message", "Ready.")
    assert not family_named("labkit.lab.worker"), "nothing runs until it is asked for"

    # Every control has a label, and Tab goes through them in order.
    passed = panel.tab_to("Stop")
    order = [*CHOICES, *LABELS, "Run", "Stop"]
    assert passed[-len(order) :] == order

    # What cannot be is one sentence, and starts nothing.
    panel.back_to("events")
    panel.enter("Ring size (B)", "5000")
    panel.press("Run", "Enter")
    panel.wait_for("message", "power of two")
    assert not family_named("labkit.lab.worker")

    panel.back_to("events")
    panel.enter("Rate (changes/s)", "20000")
    panel.enter("Ring size (B)", "65536")
    panel.press("Run", "Enter")
    panel.wait_for("message", "Running.", within_s=60)
    produced = panel.figures_seen("produced", 3)
    counts = [int(one.replace(",", "")) for one in produced]
    assert counts == sorted(counts) and counts[0] % 5000 == 0, "20,000/s for a quarter of a second"
    assert float(panel.text("p50_ns")) > 0 and int(panel.text("dropped").replace(",", "")) >= 0
    browser.screenshot("panel-running")

    # The notebook is free meanwhile: its next cell runs.
    browser.press("Escape")
    browser.run("document.querySelectorAll('.jp-Cell')[5].click()")
    browser.run("document.querySelectorAll('.jp-Cell')[5].focus()")
    browser.press("Enter", CONTROL)
    browser.until(
        lambda: "42" in browser.run("document.querySelectorAll('.jp-Cell')[5].textContent"),
        "a cell to run beside the panel",
        within_s=20,
    )
    assert family_named("labkit.lab.worker"), "it goes on"

    browser.run("document.querySelector('.widget-toggle-button').focus()")
    panel.press("Stop", " ")
    panel.wait_for("message", "Saved as")
    first = browser.until(panel.figure, "the figure")
    assert not family_named("labkit.lab.worker")
    saved = list((tmp_path / "runs" / "live-load").glob("*/run.json"))
    assert len(saved) == 1 and saved[0].parent.name in panel.text("message")
    browser.screenshot("panel-figure")

    # Another strategy, another figure.
    panel.back_to("poll 1 ms")
    browser.press(" ")
    panel.wait_for("message", "poll 1 ms is chosen")
    panel.press("Run", " ")
    panel.wait_for("message", "Running.", within_s=60)
    panel.figures_seen("produced", 2)
    panel.press("Stop", "Enter")
    panel.wait_for("message", "poll 1 ms: ")
    second = browser.until(
        lambda: (now := panel.figure()) != first and now, "another figure", within_s=20
    )
    assert second != first
    browser.screenshot("panel-second-figure")

    # A kernel that dies by -9 leaves no process, map or program.
    panel.back_to("events")
    panel.press("Run", "Enter")
    panel.wait_for("message", "Running.", within_s=60)
    workers = family_named("labkit.lab.worker")

    def all_made() -> objects.Objects | None:
        held = objects.snapshot().owned_by(workers)
        return held if held.maps and held.programs else None

    held = browser.until(all_made, "maps and programs of the worker", within_s=60)
    (kernel,) = family_named("ipykernel_launcher")
    os.kill(kernel, signal.SIGKILL)
    deadline = time.monotonic() + GONE_WITHIN_S
    while alive(workers) or set(held.maps) & set(objects.snapshot().maps):
        assert time.monotonic() < deadline, f"left: {alive(workers)}, {held}"
        time.sleep(0.05)
    assert not set(held.programs) & set(objects.snapshot().programs)
