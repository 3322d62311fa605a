"""Pinned threads and children that cannot outlive us."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from labkit.errors import LabError, TimedOut
from labkit.kernel.parallel import Child, cpus, shared_array, together

pytestmark = pytest.mark.outside_vm("asks nothing of the kernel that differs between kernels")


def test_tasks_run_on_their_own_cpus() -> None:
    affinity = together(*[lambda: os.sched_getaffinity(0)] * len(cpus()))
    assert affinity == [{cpu} for cpu in cpus()]


def test_the_first_error_comes_through() -> None:
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        together(fail, lambda: 1)


def test_tasks_are_bounded() -> None:
    with pytest.raises(TimedOut):
        together(lambda: time.sleep(3), timeout_s=0.2)


def test_a_child_answers_and_writes_shared_memory() -> None:
    shared = shared_array(4, np.uint64)

    def work() -> int:
        shared[:] = 7
        return os.getpid()

    with Child(work) as child:
        assert child.result() == child.pid
    assert shared.tolist() == [7] * 4


def test_a_child_that_raises_is_killed_or_hangs_is_told() -> None:
    def fail() -> None:
        raise ValueError("in the child")

    with Child(fail) as child, pytest.raises(ValueError, match="in the child"):
        child.result()
    with (
        Child(lambda: os.kill(os.getpid(), signal.SIGKILL)) as child,
        pytest.raises(LabError, match="status -9"),
    ):
        child.result()
    with Child(lambda: time.sleep(60)) as child, pytest.raises(TimedOut):
        child.result(timeout_s=0.2)


def test_a_child_dies_with_its_parent() -> None:
    read, write = os.pipe()

    def parent() -> None:
        inner = Child(lambda: time.sleep(60))
        os.write(write, str(inner.pid).encode())
        os.kill(os.getpid(), signal.SIGKILL)

    with Child(parent) as child, pytest.raises(LabError):
        child.result()
    grandchild = int(os.read(read, 32))
    os.close(read)
    os.close(write)
    for _ in range(200):
        try:
            with open(f"/proc/{grandchild}/stat") as stat:
                if stat.read().split()[2] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.01)
    pytest.fail("the grandchild lives on")
