"""Faults to survive: kills, full and unwritable disks, what is not mounted or not installed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from labkit.kernel import objects
from labkit.kernel.tools import MERGED_HEADERS

pytestmark = [
    pytest.mark.usefixtures("kernel", "toys"),
    pytest.mark.timeout(180),
    pytest.mark.outside_vm(
        "starts the lab anew for each fault: half a minute each on an emulated CPU"
    ),
]

COMMAND = [sys.executable, "-m", "labkit"]
WITHIN_S = 60.0
HOLDS = "toy-holds-objects"


def told(words: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"(worker|helper|map) (\d+)", words)}


def wait_for(what: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_nothing_is_left(said: dict[str, int], before: Iterable[str]) -> None:
    """The helper's network namespace lives as long as the helper does."""
    assert set(said) == {"worker", "helper", "map"}
    wait_for(lambda: not alive(said["worker"]), "the worker runs on")
    wait_for(lambda: not alive(said["helper"]), "the helper runs on")
    wait_for(lambda: said["map"] not in objects.snapshot().maps, "the map is still there")
    assert mounts() <= set(before)


def mounts() -> set[str]:
    return set(Path("/proc/self/mountinfo").read_text().splitlines())


@contextlib.contextmanager
def running(command: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def line_with(process: subprocess.Popen[str], word: str) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if word in line:
            return line
    raise AssertionError(f"{word!r} was never said")


@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_kill_9_in_the_middle_of_an_experiment(victim: str, tmp_path: Path) -> None:
    before = mounts()
    with running([*COMMAND, "run", HOLDS, "--folder", str(tmp_path)]) as command:
        said = told(line_with(command, "worker"))
        assert said["map"] in objects.snapshot().maps
        os.kill(said["worker"] if victim == "worker" else command.pid, signal.SIGKILL)
        wait_until_nothing_is_left(said, before)
        if victim == "worker":
            assert command.wait(WITHIN_S) == 4


def test_ctrl_c_in_the_middle_of_an_experiment(tmp_path: Path) -> None:
    before = mounts()
    with running([*COMMAND, "run", HOLDS, "--folder", str(tmp_path)]) as command:
        said = told(line_with(command, "worker"))
        os.killpg(command.pid, signal.SIGINT)
        assert command.wait(WITHIN_S) == 130
        wait_until_nothing_is_left(said, before)


def write_notebook(folder: Path, *cells: str) -> None:
    """A notebook of one investigation with further cells, and its parameters."""
    (folder / "params").mkdir(parents=True)
    (folder / "params" / "quick.yaml").write_text("profile: quick\n")
    parameters = new_code_cell(f'profile = "full"\nruns_folder = {str(folder / "runs")!r}')
    parameters.metadata["tags"] = ["parameters"]
    begin = (
        "from labkit.lab.notebook import Investigation\n"
        "lab = Investigation('toys', profile=profile, runs_folder=runs_folder)"
    )
    notebook = new_notebook(
        cells=[parameters, *map(new_code_cell, (begin, *cells))],
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}},
    )
    nbformat.write(notebook, folder / "00-toys.ipynb")


def report(books: Path, folder: Path) -> list[str]:
    """The command that makes a report of other notebooks than the lab's."""
    script = (
        "import sys; from pathlib import Path; from labkit import __main__; "
        "from labkit.judge import claims; few = claims.read()[:3]; claims.read = lambda: few; "
        "from labkit.lab import report; "
        f"report.make_report.__kwdefaults__['notebooks'] = Path({str(books)!r}); "
        f"sys.exit(__main__.main(['report', '--to', {str(folder)!r}]))"
    )
    return [sys.executable, "-c", script]


# Writes what the worker says to a file: a notebook's own output is not to be had from outside.
TELLS = (
    "from labkit.lab import notebook\n"
    "def say(self, words): open({file!r}, 'a').write(words)\n"
    "notebook._Progress.say = say\n"
    "import os; open({file!r}, 'w').write(f'kernel {{os.getpid()}} ')\n"
    f"lab.measure('{HOLDS}')"
)


@pytest.mark.parametrize("victim", ["kernel", "report", "ctrl-c"])
def test_kill_in_the_middle_of_a_notebook(victim: str, tmp_path: Path) -> None:
    before, file = mounts(), tmp_path / "said"
    write_notebook(tmp_path / "books", TELLS.format(file=str(file)))
    making_report = report(tmp_path / "books", tmp_path / "reports")
    # A socket's path is 107 bytes long at the most.
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
        running(making_report, TMPDIR=folder) as making,
    ):
        folders = Path(folder)
        wait_for(lambda: file.exists() and "map" in file.read_text(), "nothing was measured")
        words = file.read_text()
        kernel = int(words.split()[1])
        if victim == "kernel":
            os.kill(kernel, signal.SIGKILL)
        elif victim == "report":
            making.kill()
        else:
            os.killpg(making.pid, signal.SIGINT)
        wait_until_nothing_is_left(told(words), before)
        status = making.wait(WITHIN_S)
        wait_for(lambda: not alive(kernel), "the notebook's kernel runs on")
        wait_for(lambda: not list(folders.glob(f"labkit-{making.pid}-*")), "its sockets stay")
        assert not list(folders.glob("tmp*.json"))  # where Jupyter puts them unless it is told
        index = tmp_path / "reports" / "index.html"
        if victim == "kernel":
            assert status == 5 and "Its kernel process died" in index.read_text()
        else:
            assert status == {"report": -signal.SIGKILL, "ctrl-c": 130}[victim]
            assert not index.exists()
        # What kill -9 leaves is swept by the next report, and by clean.
        partial = list(tmp_path.glob(".partial-*"))
        assert len(partial) == (victim == "report")


def in_mounts(commands: str, command: list[str]) -> list[str]:
    """Run a command in a mount namespace of its own, after some shell commands."""
    script = f'set -e; {commands}; exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *command]


def ended(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=env
    )


def test_a_full_disk_is_told_and_nothing_is_half_written(tmp_path: Path) -> None:
    disk, listing = tmp_path / "disk", tmp_path / "listing"
    disk.mkdir()
    fills = (
        "import contextlib\n"
        f"with contextlib.suppress(OSError), open({str(disk / 'filler')!r}, 'wb') as file:\n"
        "    while True: file.write(bytes(1 << 16)); file.flush()"
    )
    write_notebook(tmp_path / "books", fills)
    inner = report(tmp_path / "books", disk / "reports")
    keeps = f'status=0; "$@" || status=$?; ls -A {disk} >{listing}; exit $status'
    outcome = ended(
        in_mounts(f"mount -t tmpfs -o size=40m tmpfs {disk}", ["sh", "-c", keeps, "sh", *inner])
    )
    assert outcome.returncode == 4
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("The report could not be written") and "No space left" in last
    assert "Traceback" not in outcome.stderr
    assert listing.read_text().split() == ["filler"]


@pytest.mark.parametrize("option", ["size=4k", "ro"])
def test_a_useless_disk_is_told_before_anything_runs(option: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    write_notebook(tmp_path / "books", f"open({str(tmp_path / 'ran')!r}, 'w')")
    inner = report(tmp_path / "books", disk / "reports")
    outcome = ended(in_mounts(f"mount -t tmpfs -o {option} tmpfs {disk}", inner))
    assert outcome.returncode == 4 and outcome.stderr.count("\n") == 1
    assert "The report could not be written" in outcome.stderr
    assert not (tmp_path / "ran").exists()
    run = [*COMMAND, "run", "toy-counts", "--folder", str(disk / "runs")]
    outcome = ended(in_mounts(f"mount -t tmpfs -o {option} tmpfs {disk}", run))
    assert outcome.returncode == 4 and "saved" in outcome.stderr.splitlines()[-1]
    assert "Traceback" not in outcome.stderr


def test_missing_headers_are_told(tmp_path: Path) -> None:
    hides = "; ".join(
        f"mount -t tmpfs tmpfs {folder}"
        for folder in (MERGED_HEADERS, Path("/lib/modules"))
        if folder.is_dir()
    )
    run = [*COMMAND, "run", "transient-null", "--folder", str(tmp_path)]
    environment = {name: text for name, text in os.environ.items() if name != "BCC_KERNEL_SOURCE"}
    outcome = subprocess.run(
        in_mounts(hides or "true", run), capture_output=True, text=True, timeout=120, check=False,
        env=environment,
    )  # fmt: skip
    assert outcome.returncode == 3 and "headers" in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_unmounted_tracefs_and_bpffs_are_told_or_not_needed(tmp_path: Path) -> None:
    unmounts = "; ".join(
        f"while mountpoint -q {folder}; do umount -l {folder}; done"
        for folder in ("/sys/kernel/tracing", "/sys/kernel/debug", "/sys/fs/bpf")
    )
    seen = ended(in_mounts(unmounts, [*COMMAND, "doctor", "--json"]))
    works = {one["name"]: one for one in json.loads(seen.stdout)["features"]}
    assert not works["tracefs"]["works"] and "enter.sh" in works["tracefs"]["remedy"]
    assert works["bpffs_detached"]["works"]
    listing = json.loads(ended(in_mounts(unmounts, [*COMMAND, "list", "--json"])).stdout)
    needing = [one["id"] for one in listing if "tracefs" in one["lacks"]]
    for experiment in needing[:1]:
        run = [*COMMAND, "run", experiment, "--folder", str(tmp_path)]
        outcome = ended(in_mounts(unmounts, run))
        assert outcome.returncode == 3 and "tracefs" in outcome.stderr
        assert outcome.stderr.count("\n") == 1


def test_clean_removes_what_a_kill_left(tmp_path: Path) -> None:
    """As make clean does, of a run that was being written and of a report."""
    checkout = tmp_path / "checkout"
    source = Path(__file__).parents[2]
    shutil.copytree(source / "labkit", checkout / "labkit")
    dead = subprocess.Popen(["true"])
    dead.wait()
    unfinished = checkout / "runs" / "toy-counts" / f".partial-x-{dead.pid}"
    half_report = checkout / f".partial-reports-{dead.pid}"
    for folder in (unfinished, half_report):
        folder.mkdir(parents=True)
    outcome = subprocess.run(
        [*COMMAND, "clean"], capture_output=True, text=True, timeout=60, check=False, cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert not unfinished.exists() and not half_report.exists()
    again = subprocess.run(
        [*COMMAND, "clean"], capture_output=True, text=True, timeout=60, check=False, cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )  # fmt: skip
    assert again.returncode == 0
