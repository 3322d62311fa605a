"""Every program of docs/sync.md runs as it stands there, but for the place of the pins."""

from __future__ import annotations

import itertools
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from labkit.errors import Unavailable
from labkit.kernel import libbpf, tools
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import die_with_parent
from labkit.kernel.pins import PinFolder
from labkit.kernel.programs import Program

pytestmark = pytest.mark.outside_vm("starts Python for each program, and asks nothing of a kernel")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sync.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"(?:# |// |/\* )([\w.]+)(?: \*/)?\n")
WITHIN_S = 60.0


def program(name: str) -> str:
    """The program of the page whose first line is its name."""
    return next(text for _, text in BLOCKS if (head := NAMED.match(text)) and head[1] == name)


def shell(having: str) -> str:
    return next(text for language, text in BLOCKS if language == "sh" and having in text)


@pytest.fixture
def pins() -> Iterator[PinFolder]:
    with PinFolder() as folder:
        yield folder


@contextmanager
def running(*command: str) -> Iterator[Callable[[str], re.Match[str]]]:
    """A process; what is yielded waits for a line of its output, and is given the pattern."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=die_with_parent,
    )  # fmt: skip
    said: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.put(line)
        said.put(None)

    reader = threading.Thread(target=read)
    reader.start()

    def line(pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + WITHIN_S
        while True:
            try:
                one = said.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"{command} said nothing like {pattern!r}")
            if one is None:
                assert process.stderr is not None
                pytest.fail(process.stderr.read())
            if match := re.search(pattern, one):
                return match

    try:
        yield line
    finally:
        process.kill()
        process.wait()
        reader.join()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def python(name: str, pins: PinFolder) -> tuple[str, str, str]:
    return sys.executable, "-c", program(name).replace("/sys/fs/bpf/", pins.path(""))


@contextmanager
def writing(write: Callable[[], object]) -> Iterator[None]:
    """Somebody who writes again and again; a follower may begin at any moment."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(0.02):
            write()

    writer = threading.Thread(target=work)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()


def test_all_that_the_page_imports_is_there() -> None:
    looks = "\nimport sys\nprint('pandas' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program("imports.py") + looks],
        capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == "False\n"


def test_poll(pins: PinFolder) -> None:
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8, name="policies") as table:
        table.pin(pins.path("policies"))
        versions = iter(range(1, 1_000_000))
        with (
            writing(lambda: table.update(80, next(versions))),
            running(*python("poll.py", pins)) as line,
        ):
            first = int(line(r"^key 80 version (\d+)$")[1])
            assert int(line(r"^80 has version (\d+) since \d+ ns$")[1]) >= first
            assert int(line(r"^key 80 version (\d+)$")[1]) > first


def test_a_map_without_versions(pins: PinFolder) -> None:
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8, name="actions") as table:
        table.pin(pins.path("actions"))
        values = itertools.cycle([7, 5])  # no version: it goes down as well
        with (
            writing(lambda: table.update(80, next(values))),
            running(*python("any_map.py", pins)) as line,
        ):
            first = line(r"^key 80 value (\d+)$")[1]
            arrivals = line(r"^arrivals \[(\d+)\] unknown \('coalesced',\)$")
            other = line(rf"^key 80 value (?!{first}$)(\d+)$")[1]
            later = line(r"^arrivals \[(\d+)\] unknown \('coalesced',\)$")
        assert {first, other} == {"5", "7"} and int(arrivals[1]) < int(later[1])


def test_ring_events_of_a_libbpf_program(pins: PinFolder, tmp_path: Path) -> None:
    if tools.find_tool("clang-14") is None:
        pytest.skip("clang-14 is missing")
    (tmp_path / "policy.bpf.c").write_text(program("policy.bpf.c"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    built = subprocess.run(
        ["bash", "-ec", shell("clang-14").replace("/sys/fs/bpf", pins.path("").rstrip("/"))],
        cwd=tmp_path, env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr
    fd = libbpf.open_pin(pins.path("count_packet"))
    try:
        loaded = Program("count_packet", ProgramKind.TC, fd)
        with (
            writing(lambda: loaded.test_run(data=np.zeros(64, np.uint8))),
            running(*python("ring_events.py", pins)) as line,
        ):
            one, other = (line(r"^key 0 version (\d+) packets (\d+)$") for _ in range(2))
        assert one[1] == one[2] and other[1] == other[2]
        assert int(other[1]) == int(one[1]) + 1, "every version is told"
    finally:
        libbpf.close(fd)


def test_a_go_program_is_followed_without_its_knowledge(pins: PinFolder, tmp_path: Path) -> None:
    try:
        go = tools.go_command()
    except Unavailable as missing:
        pytest.skip(str(missing))
    source = tmp_path / "control_plane.go"
    source.write_text(program("control_plane.go"))
    cache = ROOT / ".lab" / "go-cache"
    environment = {
        **os.environ, "GOCACHE": str(cache), "GOPROXY": "off", "GOTOOLCHAIN": "local",
        "GO111MODULE": "off", "CGO_ENABLED": "0",
    }  # fmt: skip
    built = subprocess.run(
        [go, "build", "-o", str(tmp_path / "control_plane"), str(source)], env=environment,
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    with running(str(tmp_path / "control_plane")):
        deadline = time.monotonic() + WITHIN_S
        while not maps_called("go_policies") and time.monotonic() < deadline:
            time.sleep(0.05)
        with running(*python("trace_hook.py", pins)) as line:
            versions = [int(line(r"^key 80 version (\d+)$")[1]) for _ in range(3)]
    assert versions == list(range(versions[0], versions[0] + 3))


def maps_called(name: str) -> list[int]:
    from labkit.kernel import objects

    return [one.id for one in objects.snapshot().maps.values() if one.name == name]


def test_generations_of_a_double_map(pins: PinFolder) -> None:
    with running(*python("publish.py", pins)) as published:
        published(r"^published generation 1$")
        with running(*python("double_map.py", pins)) as line:
            for _ in range(3):
                told = line(r"^generation (\d+) versions \[(.+)\]$")
                assert told[1] == told[2], "all keys have the version of the generation"


def test_the_page_has_no_program_that_is_not_run() -> None:
    tests = Path(__file__).read_text()
    for language, text in BLOCKS:
        head = NAMED.match(text)
        assert language == "sh" or (head and f'"{head[1]}"' in tests), text
