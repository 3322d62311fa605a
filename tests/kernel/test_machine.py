"""A diagnosis of all maps of this machine: what was planted is found among whatever is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from labkit.inspect import machine
from labkit.inspect.machine import DiagnosedMap, diagnose_machine
from labkit.kernel import objects, programs
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.maps import Map

SELDOM = "sched_process_exec"


def made(room: int = 2, kind: MapKind = MapKind.HASH) -> Map:
    return Map.create(kind, key="u4", value="u8", max_entries=room, name="labkit_machine")


def full(table: Map) -> Map:
    for key in range(table.max_entries):
        table.update(key, key)
    return table


def by_id() -> dict[int, DiagnosedMap]:
    return {one.map.id: one for one in diagnose_machine().maps}


def test_one_look_finds_the_cause_and_lets_the_healthy_be() -> None:
    with (
        full(made()) as table,
        made(room=64) as read,
        programs.load("held_map", TABLE_FD=read.fd) as unit,
    ):
        unit.attach(unit.program("look_up", ProgramKind.RAW_TRACEPOINT), SELDOM)
        found = by_id()
        assert [one.experiment for one in found[table.id].some("cause")] == [
            "second-map-after-reload", "ignored-answers",
        ]  # fmt: skip
        assert not found[read.id].some("cause")
        assert all(one.held_by for one in (found[table.id], found[read.id]))
        assert len(table.snapshot()) == 2  # nothing was written


def test_a_cause_that_passes_is_told_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    with full(made()) as table, full(made()) as stays, full(made()) as goes:
        again = machine._Look.again

        def later(look: machine._Look, ids: list[int]) -> None:
            table.delete(0)
            goes.close()
            again(look, ids)

        monkeypatch.setattr(machine._Look, "again", later)
        gone = goes.id
        found = by_id()
        assert not found[table.id].some("cause") and found[stays.id].some("cause")
        assert gone not in found


def test_objects_are_listed_twice_at_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, look = [], objects.snapshot

    def snapshot() -> objects.Objects:
        calls.append(1)
        return look()

    monkeypatch.setattr(objects, "snapshot", snapshot)
    tables = [full(made()) for _ in range(100)]
    try:
        assert {one.id for one in tables} <= by_id().keys()
        assert len(calls) <= 2
    finally:
        for one in tables:
            one.close()


def test_when_time_is_up_the_rest_is_named() -> None:
    with full(made()) as table:
        nothing = diagnose_machine(most_seconds=0)
        assert table.id in nothing.not_reached and not nothing.maps
        assert "no time for maps" in " ".join(str(nothing).split())


def test_a_giant_is_not_counted_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_LONGEST_S", 0.0)
    with made(room=1 << 18, kind=MapKind.ARRAY) as giant:
        seen = diagnose_machine()
        (found,) = [one for one in seen.maps if one.map.id == giant.id]
        assert not found.whole and giant.id in seen.as_json()["not_counted"]
        assert "were not all counted" in " ".join(str(seen).split())


@pytest.mark.outside_vm("starts the command anew, and asks nothing else of the kernel")
def test_the_command_without_a_map(tmp_path: Path) -> None:
    path = tmp_path / "maps.prom"
    with full(made()) as table:
        command = [sys.executable, "-m", "labkit", "diagnose", "--json", "--prometheus", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1, done.stderr
        told = json.loads(done.stdout)
        assert table.id in {one["map"]["id"] for one in told["found"]}
        assert told["states"]["cause"] >= 1
        assert f'map_id="{table.id}",kind="hash"}} 1.0' in path.read_text()
        command[4:5] = [str(table.id)]  # in the place of --json
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and f"map {table.id} labkit_machine" in done.stdout
        assert f'{{asked="{table.id}",state="cause"}} 1.0' in path.read_text()


def test_a_file_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "is no plain file"), (tmp_path / "none" / "a", "can be written")):
        command = [sys.executable, "-m", "labkit", "diagnose", "--prometheus", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and why in done.stderr and not done.stdout
