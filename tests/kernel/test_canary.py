"""The canary against control planes that work, write elsewhere, gather, fail, or hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from labkit.errors import BadInput, LabError, Unavailable
from labkit.inspect.canary import canary
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map

pytestmark = pytest.mark.outside_vm("commands and lookups are the same on every kernel")

# A control plane's own tool: sets the value of key 80 of a map. What follows the version is done
# before, in its own process.
TOOL = """
import ctypes, sys, time
map_id, version, first = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
exec(first)
lib = ctypes.CDLL("libbpf.so.1")
fd = lib.bpf_map_get_fd_by_id(map_id)
key, value = ctypes.c_uint32(80), ctypes.c_uint64(version)
if fd < 0 or lib.bpf_map_update_elem(fd, ctypes.byref(key), ctypes.byref(value), ctypes.c_uint64()):
    sys.exit("the kernel refuses")
"""


@pytest.fixture
def policy() -> Iterator[Map]:
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8, name="policy") as made:
        yield made


def tool(table: Map, first: str = "") -> list[str]:
    return [sys.executable, "-S", "-E", "-c", TOOL, str(table.id), "{version}", first]


def command(table: Map, *arguments: str) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, "-m", "labkit", "canary", str(table.id), "--key", "80", *arguments]
    return subprocess.run(
        [*given, "--", *tool(table)], capture_output=True, text=True, timeout=100, check=False
    )


def test_every_version_of_a_control_plane_that_works_is_seen(policy: Map) -> None:
    policy.update(80, 41)
    seen = canary(str(policy.id), tool(policy), key="80", per_second=8, seconds=2, wait_s=60)
    assert (len(seen), seen.first, seen.unseen, seen.failed) == (16, 42, 0, 0)
    assert seen.itself.all() and seen.went_back == 0
    assert (seen.ages_ms > 0).all() and (seen.seen_ns >= seen.started_ns).all()
    assert (np.diff(seen.intended_ns) > 0).all() and (np.diff(seen.seen_ns) >= 0).all()
    # Only the command wrote, and only this key.
    assert policy.snapshot().keys.tolist() == [80]
    assert int(policy.lookup(80)) == 57


def test_a_program_sees_what_lookups_see(policy: Map) -> None:
    policy.update(80, 41)
    try:
        seen = canary(
            str(policy.id), tool(policy), key="80", reader="program", per_second=8, seconds=2,
            wait_s=60,
        )  # fmt: skip
    except Unavailable as missing:
        if "by a clock" in str(missing):
            pytest.skip(f"this kernel lacks a clock for programs: {missing}")
        raise
    assert (len(seen), seen.first, seen.unseen, seen.failed) == (16, 42, 0, 0)
    # A version that did not stand for a millisecond may be passed over.
    assert int(seen.itself.sum()) + seen.passed_over == 16
    assert seen.itself.any() and seen.itself[-1] and seen.went_back == 0
    assert (seen.ages_ms > 0).all() and (seen.seen_ns >= seen.started_ns).all()
    assert policy.snapshot().keys.tolist() == [80]


def test_a_control_plane_that_writes_another_map_is_found_out(policy: Map) -> None:
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8, name="policy") as twin:
        seen = canary(str(policy.id), tool(twin), key="80", per_second=8, seconds=0.5, wait_s=5)
    assert (seen.unseen, seen.failed, seen.holds(None)) == (len(seen), 0, False)
    assert not len(policy.snapshot())


def test_two_maps_of_the_name_are_told_apart_by_id(policy: Map) -> None:
    with (
        Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8, name="policy"),
        pytest.raises(BadInput, match="name one by its id"),
    ):
        canary("policy", tool(policy), key="80")


def test_a_control_plane_that_gathers_passes_versions_over(policy: Map, tmp_path: Path) -> None:
    wanted, ended = tmp_path / "wanted", threading.Event()

    def reconcile() -> None:
        """Bring the newest version into the map now and then, as a controller does."""
        while not ended.wait(1.0):
            if wanted.exists() and (text := wanted.read_text()):
                policy.update(80, int(text))

    controller = threading.Thread(target=reconcile)
    controller.start()
    try:
        script = f"echo {{version}} >{wanted}.new && mv {wanted}.new {wanted}"
        asked = ["sh", "-c", script]
        seen = canary(str(policy.id), asked, key="80", per_second=20, seconds=2, wait_s=60)
    finally:
        ended.set()
        controller.join()
    assert (seen.unseen, seen.failed) == (0, 0)
    assert seen.passed_over > len(seen) / 2
    assert int(seen.itself.sum()) + seen.passed_over == len(seen) == 40


def test_an_older_version_that_comes_back_is_counted(policy: Map) -> None:
    undone = tool(policy, "version -= 2 * (version % 4 == 0)")  # 1 2 3 2 5 6 7 6 9
    seen = canary(str(policy.id), undone, key="80", per_second=4, seconds=2.25, wait_s=60)
    assert (len(seen), seen.unseen, seen.failed) == (9, 0, 0)
    assert seen.went_back == 2
    assert np.flatnonzero(~seen.itself).tolist() == [3, 7]


def test_the_first_command_that_fails_ends_it_with_what_it_said(policy: Map) -> None:
    with pytest.raises(LabError, match=r"status 1 \(no such policy\): try it by hand: ") as ended:
        canary(str(policy.id), tool(policy, "sys.exit('no such policy')"), key="80", wait_s=60)
    assert ended.value.status == 4
    with pytest.raises(BadInput, match="'/no/such/tool' cannot be run: No such file"):
        canary(str(policy.id), ["/no/such/tool", "{version}"], key="80")


def test_later_failures_are_counted(policy: Map) -> None:
    fails = tool(policy, "version % 2 or sys.exit(3)")
    seen = canary(str(policy.id), fails, key="80", per_second=4, seconds=1.75, wait_s=60)
    assert (len(seen), seen.failed, seen.unseen, seen.passed_over) == (7, 3, 0, 3)


def test_somebody_else_at_the_key_is_told_of(policy: Map) -> None:
    with pytest.raises(LabError, match="was not asked for it"):
        canary(str(policy.id), tool(policy, "version += 1000"), key="80", wait_s=60)


def running(word: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if word.encode() in words:
                found.append(int(folder.name))
    return found


def ends(word: str, within_s: float = 60.0) -> bool:
    """Whether no process with this argument is left; a kill takes its time."""
    deadline = time.monotonic() + within_s
    while left := running(word):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return not left


def test_a_command_that_hangs_is_killed(policy: Map) -> None:
    word = f"86400.{os.getpid()}"
    hangs = ["sh", "-c", 'sleep "$0"; echo "$1"', word, "{version}"]
    with pytest.raises(LabError, match="signal 9"):
        canary(str(policy.id), hangs, key="80", wait_s=0.5)
    assert ends(word)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("reader", ["lookups", "program"])
def test_no_command_outlives_the_canary(policy: Map, number: signal.Signals, reader: str) -> None:
    word = f"86400.{os.getpid()}{number.value}{reader == 'program':d}"
    given = ["canary", str(policy.id), "--key", "80", "--wait", "600", "--reader", reader, "--"]
    hangs = ["sleep", word, "0.{version}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "labkit", *given, *hangs], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(running(word)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    status = process.wait(60)
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert ends(word)


def test_maps_that_do_not_do_are_refused_before_the_command_runs(policy: Map) -> None:
    fails = tool(policy, "1 / 0")
    with Map.create(MapKind.HASH, key="u4", value="u1", max_entries=8) as narrow:
        narrow.update(80, 250)
        with pytest.raises(BadInput, match="room for 5 more, not for 10"):
            canary(str(narrow.id), fails, key="80", seconds=1)
    with (
        Map.create(MapKind.PERCPU_HASH, key="u4", value="u8", max_entries=8) as per_cpu,
        pytest.raises(BadInput, match="reads one value of a key"),
    ):
        canary(str(per_cpu.id), fails, key="80")
    with (
        Map.create(MapKind.HASH, key="u4", value="V24", max_entries=8) as raw,
        pytest.raises(BadInput, match="carry no version"),
    ):
        canary(str(raw.id), fails, key="80")
    for key in ("[1, 2]", "-1", '"x"', "hex:00", "1.5", "null"):
        with pytest.raises(BadInput):
            canary(str(policy.id), fails, key=key)


def test_the_limit_is_the_exit_status(policy: Map, tmp_path: Path) -> None:
    quick = ("--rate", "4", "--seconds", "0.5", "--wait", "60")
    file = tmp_path / "canary.prom"
    held = command(policy, *quick, "--limit-ms", "1e9", "--json", "--prometheus", str(file))
    assert held.returncode == 0, held.stderr
    told = json.loads(held.stdout)
    assert (told["versions"], told["unseen"], told["holds"]) == (2, 0, True)
    assert f'map_id="{policy.id}",key="80"}} 1.0' in file.read_text()
    exceeded = command(policy, *quick, "--limit-ms", "0.000001")
    assert (exceeded.returncode, exceeded.stderr) == (5, "")
    assert "is exceeded" in exceeded.stdout
    assert int(policy.lookup(80)) == 4
    nowhere = command(policy, *quick, "--prometheus", str(tmp_path / "none" / "a.prom"))
    assert nowhere.returncode == 2 and len(nowhere.stderr.splitlines()) == 1
    assert int(policy.lookup(80)) == 4, "refused before anything was written"
