"""Ten thousand maps of somebody else: each command keeps to bounds of time, memory and text."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from labkit.errors import CAUSE_FOUND
from labkit.kernel import objects
from tests.hostile.crowd import (
    BY_HUNDRED,
    HUNDRED,
    MAPS,
    NAME,
    NAMESAKES,
    PINS,
    PROGRAMS,
    SHARED,
    Crowd,
    crowd,
)

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.usefixtures("kernel"),
    pytest.mark.outside_vm("takes minutes on an emulated CPU, and asks how the lab counts"),
]

CPU_S, PEAK_MIB, TEXT_BYTES = 20.0, 300.0, 200_000
STUCK_S = 120.0  # waiting for a CPU that others use is no fault of a command
# A process's own peak, since what it inherits from the one that starts it counts for rusage.
MEASURED = """
import os, resource, sys
from labkit.__main__ import main
status = main(sys.argv[2:])
sys.stdout.flush()
self, others = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
cpu_s = sum(one.ru_utime + one.ru_stime for one in (self, others))
os.write(int(sys.argv[1]), f"{cpu_s} {max(peak, others.ru_maxrss) / 1024}".encode())
sys.exit(status)
"""


@pytest.fixture(scope="module")
def made(why_no_kernel: str) -> Iterator[Crowd]:
    if why_no_kernel:
        pytest.skip(why_no_kernel)
    with crowd() as one:
        yield one


def measured(*words: str) -> tuple[int, str, str]:
    """Run a command; its status and what it said. Prints what it took, and holds it to that."""
    with subprocess.Popen(
        [sys.executable, "-c", MEASURED, "2", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as command:  # fmt: skip
        try:
            said, told = command.communicate(timeout=STUCK_S)
        except BaseException:
            command.kill()
            raise
    told, _, figures = told.rpartition("\n")
    cpu_s, peak_mib = map(float, figures.split())
    print(f"{' '.join(words):40} {cpu_s:6.1f} s {peak_mib:6.0f} MiB {len(said):9,} B")
    assert cpu_s < CPU_S and peak_mib < PEAK_MIB and len(said) + len(told) < TEXT_BYTES, words
    return command.returncode, said, told


def test_all_of_them_are_seen(made: Crowd) -> None:
    now = objects.snapshot()
    holder = now.maps[made.alone].pids
    owned = now.owned_by(holder)
    assert (len(owned.maps), len(owned.programs)) == (MAPS + 1, PROGRAMS)
    assert sum(len(one.pins) for one in owned.maps.values()) == PINS
    assert len(now.users(made.shared)) == PROGRAMS // 2
    assert len(now.twins(made.namesake)) == NAMESAKES - 1


def test_every_command_is_bounded(made: Crowd) -> None:
    status, said, _ = measured("diagnose", str(made.alone))
    assert status == 0 and said.startswith(f"map {made.alone} ")
    status, said, _ = measured("diagnose", SHARED)
    assert status == 0 and f"{PROGRAMS // 2 - 20:,} more" in said and len(said) < 20_000
    status, said, _ = measured("diagnose", str(made.namesake))
    assert status in (0, CAUSE_FOUND) and len(said) < TEXT_BYTES / 2
    status, said, _ = measured("diagnose", BY_HUNDRED)
    assert status == 0 and said.count(f" {BY_HUNDRED}: hash, key 4 B") == HUNDRED
    for words in (["diagnose", NAME], ["watch", NAME, "--seconds", "1"]):
        status, said, told = measured(*words)
        assert status == 2 and not said and len(told) < 2_000
        assert f"{NAMESAKES:,} maps are called '{NAME}'" in told
    status, said, told = measured("watch", str(made.alone), "--seconds", "1")
    assert status == 0 and not said and "0 changes were told by hooks, 0 were dropped" in told
    for words in (["list"], ["list", "--json"], ["doctor"]):
        assert measured(*words)[0] == 0
