"""Standard output that is closed, full, left by its reader, or read slowly; and long arguments."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from labkit import __main__
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map, map_error
from labkit.kernel.parallel import Child

LABKIT = f"{sys.executable} -m labkit"
kernel = [pytest.mark.kernel, pytest.mark.usefixtures("kernel")]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
STUCK_S = 120.0


def shell(line: str) -> tuple[int, str]:
    """The status of a line of shell, and what it wrote to standard error."""
    done = subprocess.run(
        ["bash", "-c", line], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, errors="replace", check=False, timeout=STUCK_S,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and "error of the lab itself" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", ["list", "list --json", "--help"])
def test_a_full_output_is_said_in_a_sentence(command: str) -> None:
    status, told = shell(f"{LABKIT} {command} > /dev/full")
    assert status == 4
    assert told == (
        "Standard output takes no more (No space left on device): give it another place.\n"
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error(closed: str) -> None:
    assert shell(f"{LABKIT} list {closed}") == (0, "")


def test_a_closed_stream_keeps_its_number(tmp_path: Path) -> None:
    # What is opened next must not become standard output.
    script = "import os, sys; from labkit import console; console.open_missing(); print(1); " \
        "os._exit(os.open('/', os.O_RDONLY) != 3)"  # fmt: skip
    assert shell(f'{sys.executable} -c "{script}" <&- >&- 2>&-') == (0, "")


@pytest.mark.parametrize("told", ["2>/dev/full", "2>&1 | true"])
def test_nobody_who_can_be_told(told: str) -> None:
    status, _ = shell(f"set -o pipefail; {LABKIT} diagnose /nowhere {told}")
    assert status in (2, 3)


@pytest.mark.parametrize("command", ["list", "--help"])
def test_a_reader_that_has_seen_enough(command: str) -> None:
    assert shell(f"{LABKIT} {command} | true")[1] == ""


def a_device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # another /dev/null


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def a_link(path: Path) -> None:
    a_device(path.with_name("behind"))
    path.symlink_to("behind")


@pytest.mark.parametrize("make", [a_device, a_socket, a_link, os.mkfifo, os.mkdir])
def test_no_file_takes_the_place_of_what_is_none(make: Callable[[Path], None]) -> None:
    """As root /dev/null would be a Parquet file from then on, for the whole machine."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a socket's path is short
        path = Path(folder, "there")
        try:
            make(path)
        except PermissionError as refusal:
            pytest.skip(f"only root makes it: {refusal}")
        before = os.lstat(path)
        for words in (
            f"watch 1 --parquet {path}",
            f"canary 1 --prometheus {path} --key 1 -- {{version}}",
        ):
            status, told = shell(f"{LABKIT} {words}")
            assert status == 2 and "is no plain file" in told and told.count("\n") == 1, words
        after = os.lstat(path)
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def fed(table: Map) -> None:
    """Write as fast as it goes, until killed."""
    while True:
        for key in range(4):
            table.update(key, 1)


@pytest.fixture
def table(kernel: None) -> Map:
    return Map.create(MapKind.HASH, key="u4", value="u8", max_entries=4, name="output")


@pytest.mark.parametrize("name", ["", "a" * 250])
@pytest.mark.parametrize("command", ["watch 1 --parquet", "diagnose --prometheus", "incident"])
def test_a_name_that_no_file_can_have_is_said_before_anything_else(name: str, command: str) -> None:
    status, told = shell(f"{LABKIT} {command} '{name}'")
    assert status == 2
    assert "bytes: give such a one" in told or "is no plain file" in told


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict"])
def test_an_output_that_lacks_a_letter_shows_its_escape(
    encoding: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    script = "from labkit import console\nwith console.guarded_output(): print('pin \u754c')"
    command = [sys.executable, "-c", script]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert capfdbinary.readouterr().out == b"pin \\u754c\n"


@pytest.mark.parametrize("limit", ["ulimit -n 12", "ulimit -n 63"])
@pytest.mark.parametrize("command", ["list", "watch --all --seconds 1", "diagnose 1"])
def test_too_few_descriptors_are_said_before_anything_else(limit: str, command: str) -> None:
    status, told = shell(f"{limit}; {LABKIT} {command}")
    assert status == 3 and told.startswith("This process may open ") and told.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ENOMEM, ""),
        map_error(errno.EMFILE, "Opening map id 7"),
        map_error(errno.ENOMEM, "Creating a map"),
    ],
)
def test_a_limit_that_is_reached_is_no_error_of_the_lab(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: object) -> None:
        raise error

    monkeypatch.setattr(signal, "signal", lambda *given: None)
    monkeypatch.setattr(__main__, "_parser", fail)
    assert __main__.main(["list"]) == 4
    assert "limit of this process is reached" in capsys.readouterr().err


@pytest.mark.kernel
def test_a_slow_reader_does_not_keep_a_watch(table: Map) -> None:
    with table, Child(lambda: fed(table)):
        watch = subprocess.Popen(
            [*LABKIT.split(), "watch", str(table.id), "--seconds", "2"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with watch:
            assert watch.stderr is not None and watch.stdout is not None
            first = watch.stderr.readline()
            begun = time.monotonic()
            told = watch.stderr.read()  # nobody reads standard output meanwhile
            assert watch.wait(STUCK_S) == 0
            # By itself it ends: reading would have been needed before, without a bound.
            assert time.monotonic() - begun < STUCK_S
            whole = watch.stdout.read()
    assert first.startswith("Watching") and "lines were left out: whoever reads" in told
    assert whole.endswith("\n") or len(whole) > 4096


@pytest.mark.kernel
def test_a_watch_whose_output_is_full(table: Map) -> None:
    with table, Child(lambda: fed(table)):
        status, told = shell(f"{LABKIT} watch {table.id} --seconds 2 > /dev/full")
    assert status == 4 and told.splitlines()[-1].startswith("Standard output takes no more")


@pytest.mark.kernel
@pytest.mark.usefixtures("kernel")
def test_arguments_of_any_size_and_depth(tmp_path: Path) -> None:
    long, deep = "9" * 5_000, "[" * 2_000
    for words in (
        f"diagnose {long}", f"diagnose {'9' * 4_000}", f"watch {long}", f"watch /{long}",
        f"run map-life --set rounds={deep}", f"run map-life --set rounds={long}",
        f"run {long}", "diagnose ٣", f"soak map-life --times {'9' * 4_000}",
        "soak map-life --times 0", "soak map-life --times -1", "soak map-life --times ٣",
        f"watch 1 --seconds {'9' * 4_000}", f"report --profile {long}",
    ):  # fmt: skip
        status, told = shell(f"{LABKIT} {words}")
        assert status == 2 and len(told) < 10_000, words
    name = tmp_path / ("x" * 300)
    for words in (f"verdicts --folder {name}", f"run map-life --folder {name}"):
        status, told = shell(f"{LABKIT} {words}")
        assert status == 4 and told.count("\n") == 1, words
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", os.devnull, tmp_path):
        status, told = shell(f"{LABKIT} diagnose {path}")
        assert status == 2 and told.count("\n") == 1
