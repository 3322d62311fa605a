"""Kernel events that are counted without a program, and a clock that runs one."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from labkit.errors import Unavailable
from labkit.inspect.canary import SIGHTING
from labkit.kernel import probe, programs
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import cpus
from labkit.kernel.perf_events import Clock, KprobeCount
from labkit.kernel.ringbuf import RingReader


def test_a_kprobe_without_a_program_counts_this_thread(
    require_feature: Callable[[str], None],
) -> None:
    require_feature("kprobe")
    with open("/dev/zero", "rb", buffering=0) as file, KprobeCount("vfs_read") as count:
        before = count.read()
        for _ in range(101):
            os.read(file.fileno(), 1)
        # Reading the counter is a read as well, the first of which came before its answer.
        assert 101 <= count.read() - before <= 103
        count.close()
        count.close()


def test_where_there_are_no_kprobes_it_says_so() -> None:
    if probe.probe("kprobe").works:
        pytest.skip("this kernel lacks nothing: kprobe works")
    with pytest.raises(Unavailable, match="built without kprobes"):
        KprobeCount("vfs_read")


def test_a_clock_runs_a_program_until_it_is_closed() -> None:
    with (
        Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8) as policy,
        programs.load(
            "canary_reader", TABLE_FD=policy.fd, KEY_SIZE=4, VERSION_AT=0, VERSION_SIZE=8
        ) as unit,
        RingReader(unit.map("sightings"), SIGHTING, batch=8) as ring,
    ):
        looks = unit.program("look", ProgramKind.PERF_EVENT)
        with Clock(looks.fd, frequency=100, cpu=cpus()[0]) as clock:
            for version in (7, 8):  # key 0, which the program looks at unless told otherwise
                policy.update(0, version)
                assert ring.poll(60)["version"].tolist() == [version]
            clock.close()
            policy.update(0, 9)
            assert len(ring.poll(0.2)) == 0


def test_a_clock_takes_programs_alone() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with (
        Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8) as policy,
        pytest.raises(OSError, match="Invalid argument"),
    ):
        Clock(policy.fd, frequency=100, cpu=cpus()[0])
    assert len(os.listdir("/proc/self/fd")) == before
