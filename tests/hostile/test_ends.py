"""However something ends, or whoever starts it: nothing of it lives on."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from experiments.bench import follow_bars
from labkit import runs
from labkit.errors import FALLS_SHORT
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("kernel")]

CHECKOUT = Path(__file__).parents[2]
WITHIN_S = 90.0
MAKE = ("make", "--no-print-directory", "-o", "setup")


def until(holds: Callable[[], object], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


class Marked:
    """Starts a command whose descendants are known by their environment, wherever they went."""

    def __init__(self, folder: Path) -> None:
        self._mark = f"HOSTILE_MARK={uuid.uuid4()}"
        self.log, self.temporary = folder / "log", folder / "tmp"
        self.temporary.mkdir()
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str | Path, **given: str) -> subprocess.Popen[bytes]:
        name, _, value = self._mark.partition("=")
        environment = {
            key: known for key, known in os.environ.items() if key not in ("MAKELEVEL", "LAB_BOUND")
        }
        environment |= {name: value, "TMPDIR": str(self.temporary), **given}
        with self.log.open("wb") as log:
            one = subprocess.Popen(
                command, cwd=CHECKOUT, env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.started.append(one)
        return one

    def alive(self) -> dict[int, str]:
        """Command lines by number of process; the dead that nobody has waited for are not alive."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self._mark.encode() in (process / "environ").read_bytes():
                    words = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(process.name)] = words.decode(errors="replace")
        return found

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def await_word(self, word: str) -> None:
        until(lambda: word in self.said(), lambda: f"it never said {word!r}: {self.said()}")

    def await_no_process(self) -> None:
        until(lambda: not self.alive(), lambda: f"still alive: {self.alive()}\n{self.said()}")

    def await_end(self) -> None:
        self.await_no_process()
        until(lambda: not any(self.temporary.iterdir()), lambda: list(self.temporary.rglob("*")))


@pytest.fixture
def marked() -> Iterator[Marked]:
    # A socket's path is 107 bytes long at the most.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        one = Marked(Path(folder))
        yield one
        for started in one.started:
            started.kill()
            started.wait()
        for pid in one.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def table() -> Iterator[Map]:
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=4, name="ends") as made:
        yield made


def labkit(*words: str) -> list[str]:
    return [sys.executable, "-m", "labkit", *words]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize("ignored", ["INT", "TERM"])
def test_a_command_ends_by_each_signal_whatever_was_ignored(
    number: int, ignored: str, marked: Marked, table: Map
) -> None:
    shell = f"trap '' {ignored}; exec \"$@\""
    watch = marked.start("sh", "-c", shell, "sh", *labkit("watch", str(table.id)))
    marked.await_word("Watching")
    watch.send_signal(number)
    assert watch.wait(WITHIN_S) == (0 if number == signal.SIGINT else 128 + number)
    marked.await_end()
    assert "Traceback" not in marked.said()


def test_nohup_is_heeded(marked: Marked, table: Map) -> None:
    watch = marked.start("nohup", *labkit("watch", str(table.id), "--seconds", "3"))
    marked.await_word("Watching")
    watch.send_signal(signal.SIGHUP)
    assert watch.wait(WITHIN_S) == 0
    marked.await_end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
def test_an_experiment_ends_with_all_its_processes(
    number: int, marked: Marked, tmp_path: Path
) -> None:
    run = marked.start(*labkit("run", "map-life", "--folder", str(tmp_path / "runs")))
    marked.await_word("measurements")
    assert len(marked.alive()) > 1
    run.send_signal(number)
    run.wait(WITHIN_S)
    marked.await_end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_soak_that_is_stopped_keeps_what_it_has(
    number: int, marked: Marked, tmp_path: Path
) -> None:
    folder = tmp_path / "runs"
    soak = marked.start(*labkit("soak-follow", "--seconds", "30", "--folder", str(folder)))
    until(lambda: re.search(r"of 30 s: [1-9]", marked.said()), marked.said)
    soak.send_signal(number)
    status = soak.wait(WITHIN_S)
    marked.await_end()
    assert status == FALLS_SHORT, marked.said()  # too little to tell whether memory is flat
    (saved,) = folder.rglob("run.json")
    lines = [str(one) for one in follow_bars.results(runs.load(saved.parent))]
    assert f"saved as {saved.parent}" in marked.said()
    assert {line for line in lines if "falls short" in line} == {
        line for line in lines if follow_bars.GROWTH in line
    }


def test_a_killed_compiler_leaves_nothing(
    marked: Marked, require_feature: Callable[[str], None], tmp_path: Path
) -> None:
    require_feature("go")
    run = marked.start(*labkit("run", "go-map", "--folder", str(tmp_path / "runs")))
    until(lambda: any(marked.temporary.rglob("go-build*")), marked.said)
    run.kill()
    run.wait()
    marked.await_end()


@pytest.mark.parametrize("target", ["watch", "lab"])
def test_what_make_started_ends_with_it(target: str, marked: Marked, table: Map) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    make = marked.start(*MAKE, target, f"MAP={table.id}", f"LAB_PORT={port}")
    until(lambda: re.search(r"Watching|lab\S*\?token=\w{8}", marked.said()), marked.said)
    make.kill()
    make.wait()
    marked.await_end()


def test_tests_end_with_make_and_end_what_they_started(
    marked: Marked, table: Map, tmp_path: Path
) -> None:
    slow = tmp_path / "test_slow.py"
    slow.write_text(
        "import subprocess, sys\n"
        "def test_slow():\n"
        "    print('begun', file=sys.__stderr__, flush=True)\n"
        f"    subprocess.run({labkit('watch', str(table.id))!r})\n"
    )
    # As the recipe runs it: the last of several commands of one shell.
    shell = 'provision/test.sh "$0" --capture=no --override-ini=addopts=; true'
    make = marked.start("sh", "-c", shell, str(slow), MAKELEVEL="1")
    marked.await_word("Watching")
    make.kill()
    make.wait()
    marked.await_no_process()  # pytest keeps its own folders
