"""An incident of real maps: it holds what is wrong, and what was changed meanwhile."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from labkit.errors import BadInput
from labkit.inspect import bundle, incident
from labkit.kernel.libbpf import MapKind, UpdateFlag
from labkit.kernel.maps import KeyExists, Map


def policy(name: str = "labkit_incident") -> Map:
    return Map.create(MapKind.HASH, key="u4", value="u8", max_entries=2, name=name)


def test_an_incident_of_a_map(tmp_path: Path) -> None:
    path = tmp_path / "incident.tar.gz"
    ended = threading.Event()
    with policy() as table:
        table.update(1, 1)
        table.update(2, 2)

        def change() -> None:
            while not ended.wait(0.05):
                table.update(1, 7)
                with pytest.raises(KeyExists):
                    table.update(1, 8, UpdateFlag.NOEXIST)

        writer = threading.Thread(target=change)
        writer.start()
        try:
            incident.incident(str(path), [str(table.id)], seconds=1, say=lambda _: None)
        finally:
            ended.set()
            writer.join()
        found = bundle.read(str(path))
        watch = found.watch
        assert found.incident["asked"] == [f"{table.id} labkit_incident"]
        assert table.id in {one["id"] for one in found.objects["maps"]}
    assert found.diagnosis["has_cause"] and "2 of 2 entries" in found.diagnosis["text"]
    assert found.diagnosis["answers"][0]["map"]["name"] == "labkit_incident"
    assert watch["told"] > 0 and watch["refused"] > 0 and not watch["left_out"]
    assert len(watch["events"]) == watch["told"] + watch["refused"] + watch["found"]
    changed = [one for one in watch["events"] if one["what"] == "update" and not one["error"]]
    assert changed[-1]["value"] == 7 == changed[-1]["old"] and changed[-1]["comm"]
    assert "(was 7)" in changed[-1]["line"]
    assert found.doctor["features"] and found.provenance["kernel"] == found.doctor["kernel"]
    assert list(tmp_path.iterdir()) == [path]
    assert "EEXIST" in str(found)


def test_what_has_no_room_is_counted() -> None:
    items = [{"line": "x" * 100} for _ in range(10)]
    kept, left = incident._bounded(items, 350)
    assert (len(kept), left) == (3, 7)


def test_what_cannot_be_watched_is_still_an_incident(tmp_path: Path) -> None:
    path = tmp_path / "incident.tar.gz"
    with Map.create(MapKind.RINGBUF, key=None, value=None, max_entries=4096) as table:
        incident.incident(str(path), [str(table.id)], seconds=0.1, say=lambda _: None)
    found = bundle.read(str(path))
    assert "ringbuf" in found.watch["unavailable"] and not found.watch["events"]
    assert ": ringbuf" in found.diagnosis["text"]


def test_what_is_wrong_is_said_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No file can be written"):
        incident.incident(str(tmp_path / "no" / "x"))
    with pytest.raises(BadInput, match="No map has the name"):
        incident.incident(str(tmp_path / "x"), ["labkit_nowhere"])
    assert not list(tmp_path.iterdir())


@pytest.mark.outside_vm("starts the command anew, and asks nothing else of the kernel")
def test_the_command_makes_and_shows_one(tmp_path: Path) -> None:
    path = tmp_path / "incident.tar.gz"
    command = [sys.executable, "-m", "labkit", "incident", str(path)]
    made = subprocess.run(
        [*command, "--seconds", "0.2"], capture_output=True, text=True, timeout=60
    )
    assert made.returncode == 0, made.stderr
    shown = subprocess.run([*command, "--read"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and "the whole machine" in shown.stdout
    assert bundle.read(str(path)).diagnosis["answers"][0]["maps"] > 0
    path.write_bytes(b"")
    refused = subprocess.run([*command, "--read"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "is no incident that can be opened" in refused.stderr
