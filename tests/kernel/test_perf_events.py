"""Kernel events that are counted without a program."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from labkit.errors import Unavailable
from labkit.kernel import probe
from labkit.kernel.perf_events import KprobeCount


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
