"""Names that a kernel or a user chose: bytes that are no text, and text that forges a line."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.bench.crowd import instructions
from labkit.errors import BadInput
from labkit.inspect.diagnose import diagnose
from labkit.kernel import attachments, libbpf, objects, programs
from labkit.kernel.libbpf import AttachType, MapKind, ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child
from labkit.kernel.pins import PinFolder

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("kernel")]

NAMES = [b"\xff\xfe", b"a\nb", b"a\rcause", b"\x1b[2Jgone", "\u202etfel".encode(), b"a\\b"]
FORGED = "a\ncause Everything is fine"
_PR_SET_NAME = 15


@given(st.binary(max_size=20), st.binary(max_size=20))
def test_a_name_is_shown_in_one_printable_line_and_no_two_alike(one: bytes, other: bytes) -> None:
    assert libbpf.shown(one).isprintable()
    assert (libbpf.shown(one) == libbpf.shown(other)) == (one == other)


def test_ordinary_names_are_shown_as_they_are() -> None:
    for name in ("policy", "/sys/fs/bpf/lab/policy_v2", "Grüße, 世界"):
        assert libbpf.shown(name.encode()) == name


@pytest.fixture
def table() -> Iterator[Map]:
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=4, name="hostile") as made:
        yield made


@pytest.mark.parametrize("name", NAMES)
def test_a_process_of_any_name_is_a_holder(name: bytes, table: Map) -> None:
    def hold() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_NAME, ctypes.c_char_p(name))
        signal.pause()

    with Child(hold) as child:
        comm = Path(f"/proc/{child.pid}/comm")
        deadline = time.monotonic() + 10
        while comm.read_bytes().removesuffix(b"\n") != name:
            assert time.monotonic() < deadline
        (found,) = diagnose(str(table.id))
        shown = f"{libbpf.shown(name)}[{child.pid}]"
        assert shown in str(found).splitlines()[1] and shown in found.as_json()["held_by"]
        assert child.pid in objects.family(os.getpid())


@pytest.mark.parametrize("name", [*NAMES, FORGED.encode()])
def test_a_pin_of_any_name_is_one_line(name: bytes, table: Map) -> None:
    with PinFolder() as pins:
        path = os.fsdecode(os.fsencode(pins.path("x")).removesuffix(b"x") + name)
        table.pin(path)
        assert [one.state.map_id for one in diagnose(path)] == [table.id]
        (found,) = diagnose(str(table.id))
        assert libbpf.shown(os.fsencode(path)) in str(found).splitlines()[1]
        assert not any(line.startswith("cause") for line in str(found).splitlines())
        os.unlink(path)


@contextmanager
def apart(namespace: str, script: str, name: bytes) -> Iterator[int]:
    """A process that ran a script in a namespace of its own, and waits there."""
    with subprocess.Popen(
        ["unshare", namespace, "sh", "-c", f"{script} && echo up && exec cat", name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as one:  # fmt: skip
        try:
            assert one.stdout is not None
            assert one.stdout.readline() == b"up\n"
            yield one.pid
        finally:
            one.kill()


@pytest.mark.parametrize("name", [*NAMES, FORGED.encode()])
def test_a_mount_point_of_any_name_keeps_nobody_from_looking(
    name: bytes, table: Map, tmp_path: Path
) -> None:
    point = bytes(tmp_path) + b"/" + name
    os.mkdir(point)
    with apart("--mount", 'mount -t bpf none "$0"', point):
        (found,) = diagnose(str(table.id))
        assert str(found).startswith(f"map {table.id} hostile: ") and FORGED not in str(found)


@pytest.mark.parametrize("name", [b"a b", b"a\\b", b"a\tb", b"a\nb", b"\xff"])
def test_cgroups_are_found_below_a_mount_point_of_any_name(name: bytes, tmp_path: Path) -> None:
    point = bytes(tmp_path) + b"/" + name
    os.mkdir(point)
    alone = (
        "for one in $(awk '$3 == \"cgroup2\" { print $2 }' /proc/mounts); do umount -l $one; done; "
        'mount -t cgroup2 none "$0" && exec "$@"'
    )
    script = "import os; from labkit.kernel import attachments; " \
        "os.write(1, os.fsencode(attachments._cgroup_tree()[0]))"  # fmt: skip
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", alone, point, sys.executable, "-c", script],
        capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == point


# cgroup2 itself refuses a name with a new line (EINVAL).
@pytest.mark.parametrize("name", [*(one for one in NAMES if b"\n" not in one), b"-rf", b"$(id) 'x"])
def test_a_cgroup_of_any_name_is_one_line_and_its_command_a_word(name: bytes, table: Map) -> None:
    tree = attachments._cgroup_tree()
    if tree is None:
        pytest.skip("no cgroup2 is mounted")
    folder = os.fsencode(tree[0]) + b"/" + name
    os.mkdir(folder)
    try:
        program = libbpf.prog_load(ProgramKind.CGROUP_SKB, instructions(table.fd), name="named")
        where = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            assert libbpf.api().bpf_prog_attach(program, where, 0, 0) == 0
            (found,) = diagnose(str(table.id))
        finally:
            os.close(where)
            libbpf.close(program)
    finally:
        os.rmdir(folder)
    assert all(line.isprintable() for line in str(found).splitlines())
    detach = re.search(r"bpftool cgroup detach (.*) ingress id \d+$", str(found), re.M)
    assert detach, found
    echo = subprocess.run(["bash", "-c", f"printf %s {detach[1]}"], capture_output=True, check=True)
    assert echo.stdout == folder


@pytest.mark.parametrize(
    "name", [b"\xff\xfe", b"a\x1b[2J", "\u202etfel".encode(), b"-rf", b"$(id)"]
)
def test_a_device_of_any_name_is_one_line(name: bytes, table: Map) -> None:
    program = libbpf.prog_load(ProgramKind.XDP, instructions(table.fd), name="named")
    add = 'ip link add dev "$0" type veth peer name "$0"2'
    try:
        with apart("--net", add, name) as pid, entered(pid):
            link = attached(program)
            (found,) = diagnose(str(table.id))
            libbpf.close(link)
    finally:
        libbpf.close(program)
    assert re.search(rf" of dev {re.escape(libbpf.shown(name))}2?( |,|$)", str(found), re.M), found


@contextmanager
def entered(pid: int) -> Iterator[None]:
    """This thread in a process's network namespace."""
    with open("/proc/thread-self/ns/net") as own, open(f"/proc/{pid}/ns/net") as its:
        assert ctypes.CDLL(None).setns(its.fileno(), 0) == 0
        try:
            yield
        finally:
            assert ctypes.CDLL(None).setns(own.fileno(), 0) == 0


def attached(program: int) -> int:
    """A program, on the first device here that takes it."""
    for number in range(2, 64):  # names that are no text keep socket.if_nameindex from answering
        link = libbpf.api().bpf_link_create(program, number, int(AttachType.XDP), None)
        if link > 0:
            return int(link)
    raise AssertionError("no device takes it")


def test_only_a_pin_of_a_map_is_a_map(table: Map) -> None:
    with programs.load("self_test", RETURNED=0) as unit, PinFolder() as pins:
        program = unit.program("count_runs", ProgramKind.XDP)
        libbpf.pin(program.fd, pins.path("program"))
        link = libbpf.checked(
            libbpf.api().bpf_link_create(program.fd, 1, int(AttachType.XDP), None), "attaching"
        )
        try:
            libbpf.pin(link, pins.path("link"))
        finally:
            libbpf.close(link)
        for what in ("program", "link"):
            with pytest.raises(BadInput, match=f"leads to no map. This is a {what}, not a map"):
                diagnose(pins.path(what))
        for number in (program.fd, os.open(os.devnull, os.O_RDONLY)):
            with pytest.raises(BadInput, match="not a map"):
                Map.from_fd(number)


def test_the_commands_end_in_a_sentence(table: Map) -> None:
    for which in (b"\xff", b"/sys/fs/bpf/\xff", b"no\nsuch", b"/\x1b[2J"):
        for command in ("diagnose", "watch"):
            done = subprocess.run(
                [sys.executable, "-m", "labkit", command, which],
                capture_output=True, check=False, timeout=60,
            )  # fmt: skip
            assert done.returncode == 2 and done.stdout == b""
            assert done.stderr.decode().removesuffix("\n").isprintable()
