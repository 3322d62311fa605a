"""Programs: compiled, loaded, run, attached, and gone when closed."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from labkit.errors import BadInput
from labkit.kernel import libbpf, programs
from labkit.kernel.compiler import LoadFailed
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.parallel import together


def test_a_program_runs_in_place_on_two_cpus_at_once() -> None:
    with programs.load("self_test", RETURNED=3) as unit:
        count = unit.program("count_runs")
        first, second = together(
            lambda: count.test_run(repeat=20_000), lambda: count.test_run(repeat=20_000)
        )
        assert first.value == second.value == 3
        assert unit.map("runs").lookup(0) == 40_000


def test_a_sleepable_program_changes_its_context() -> None:
    with programs.load("self_test", RETURNED=5) as unit:
        answer = unit.program("answer", ProgramKind.SYSCALL)
        context = np.array([41, 0], np.uint64)
        assert answer.test_run(context=context).value == 5
        assert context[0] == 42
        with pytest.raises(BadInput, match="once a call"):
            answer.test_run(repeat=2)


def test_a_map_knows_its_layout_from_btf() -> None:
    with programs.load("self_test", RETURNED=0) as unit:
        padded = unit.map("padded")
        assert padded.key_dtype.names == ("family", "address")
        assert padded.key_dtype.fields is not None
        assert padded.key_dtype.fields["address"][1] == 4


def test_a_raw_tracepoint_runs_until_detached() -> None:
    with programs.load("self_test", RETURNED=0) as unit:
        count = unit.program("count_runs", ProgramKind.RAW_TRACEPOINT)
        runs = unit.map("runs")
        held = unit.attach(count, "sys_enter")
        for _ in range(101):
            os.getppid()
        unit.detach(held)
        seen = int(runs.lookup(0))
        assert seen >= 101
        assert int(runs.lookup(0)) == seen


def test_closing_leaves_nothing() -> None:
    with programs.load("self_test", RETURNED=0) as unit:
        program, table = unit.program("count_runs").id, unit.map("runs").id
        assert program in libbpf.ids("prog") and table in libbpf.ids("map")
    unit.close()
    # The kernel frees a program, and with it the maps that it holds, after a grace period.
    for _ in range(500):
        if program not in libbpf.ids("prog") and table not in libbpf.ids("map"):
            return
        time.sleep(0.01)
    pytest.fail("the program or its map is still in the kernel")


def test_refusals_are_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="no program"):
        programs.load("no_such_program")
    with pytest.raises(BadInput, match="no constant WRONG"):
        programs.load("self_test", WRONG=1)
    with pytest.raises(LoadFailed, match="RETURNED"):
        programs.load("self_test")
    with programs.load("self_test", RETURNED=0) as unit:
        with pytest.raises(LoadFailed, match="map_value_or_null"):
            unit.program("never_verifies")
        with pytest.raises(BadInput, match="no program"):
            unit.program("no_such_function")
        with pytest.raises(BadInput, match="no map"):
            unit.map("no_such_map")
        with pytest.raises(BadInput, match="A hook is"):
            unit.program("count_runs", hook="nonsense")
        with pytest.raises(LoadFailed, match="no_such_function"):
            unit.program("count_runs", hook="fentry:no_such_function")
        count = unit.program("count_runs")
        with pytest.raises(BadInput, match="does not attach"):
            unit.attach(count, "anything")
        with pytest.raises(BadInput, match="at least 1"):
            count.test_run(repeat=0)
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""
