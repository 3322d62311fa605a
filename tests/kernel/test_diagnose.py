"""A diagnosis of real maps: the causes that were planted are named, and nothing is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from labkit.errors import BadInput
from labkit.inspect.diagnose import diagnose
from labkit.kernel import programs
from labkit.kernel.libbpf import MapFlag, MapKind, ProgramKind
from labkit.kernel.maps import Map
from labkit.kernel.pins import PinFolder

NAME = "labkit_policy"


def policy(**changes: object) -> Map:
    usual: dict[str, object] = {
        "kind": MapKind.HASH, "key": "u4", "value": "u8", "max_entries": 4, "name": NAME,
    }  # fmt: skip
    return Map.create(**{**usual, **changes})  # type: ignore[arg-type]


def test_a_second_map_after_a_reload_is_the_cause() -> None:
    with policy() as old, policy() as new, programs.load("held_map", TABLE_FD=old.fd) as unit:
        program = unit.program("look_up", ProgramKind.RAW_TRACEPOINT)
        name = program.name
        unit.attach(program, "sys_enter")
        ours = {one.state.map_id: one for one in diagnose(NAME)}
        assert list(ours) == [old.id, new.id]
        cause = ours[new.id].diagnostics[0]
        assert (cause.weight, cause.experiment) == ("cause", "second-map-after-reload")
        assert f"The older map {old.id}" in cause.says and name in cause.says
        assert [one.name for one in ours[old.id].state.users(old.id)] == [name]
        assert "raw_tracepoint of sys_enter" in cause.says
        seen = ours[old.id].diagnostics[0]
        assert seen.experiment == "cached-handle"  # we hold the new one, and this one too
        assert seen.weight == "risk" and f"The newer map {new.id}" in seen.says


def test_a_full_map_without_preallocation() -> None:
    with policy(flags=MapFlag.NO_PREALLOC) as table:
        for key in range(4):
            table.update(key, key)
        (found,) = diagnose(str(table.id))
        assert found.has_cause
        assert {"ignored-answers", "no-prealloc"} <= {one.experiment for one in found.diagnostics}
        assert "4 of 4 entries" in str(found)
        assert table.lookup(3) == 3 and len(table.snapshot()) == 4


def test_a_lock_in_the_value_is_found_by_its_btf() -> None:
    with programs.load("lost_updates", INCREMENTS=1) as unit:
        (locked,) = diagnose(str(unit.map("counter_locked").id))
        (plain,) = diagnose(str(unit.map("counter").id))
    assert locked.state.locked and not plain.state.locked
    assert "torn-reads" in {one.experiment for one in locked.diagnostics}


def test_a_pin_names_a_map(tmp_path: Path) -> None:
    with policy() as table, PinFolder() as folder:
        path = folder.path("policy")
        table.pin(path)
        (found,) = diagnose(path)
        assert found.state.map_id == table.id
    with pytest.raises(BadInput, match="is no pin of a map"):
        diagnose(str(tmp_path / "nothing"))


@pytest.mark.outside_vm("starts the command anew, and asks nothing else of the kernel")
def test_the_command_tells_by_its_status_whether_there_is_a_cause() -> None:
    with policy(max_entries=2) as table:
        command = [sys.executable, "-m", "labkit", "diagnose", str(table.id), "--json"]
        before = subprocess.run(command, capture_output=True, text=True, timeout=60)
        table.update(1, 1)
        table.update(2, 2)
        after = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (before.returncode, after.returncode) == (0, 1), before.stderr + after.stderr
        (told,) = json.loads(after.stdout)
        assert told["map"]["name"] == NAME and told["entries"] == 2
        assert told["diagnostics"][0]["weight"] == "cause"
