"""Incidents in a file: what was written comes back, and no strange file does anything."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labkit.errors import BadInput, LabError
from labkit.inspect import bundle
from labkit.inspect.bundle import FORMAT, SHAPES
from labkit.runs import RECORDED

DOCUMENTS: dict[str, Any] = {
    "incident": {"format": FORMAT, "made_at": "then", "labkit": "1", "asked": ["7 policy"]},
    "objects": {"maps": [{}], "programs": [], "links": [], "left_out": 0},
    "diagnosis": {"text": "map 7 policy\nfull", "has_cause": True, "answers": [{}]},
    "watch": {
        "seconds": 1.0, "maps": ["policy"], "mechanism": "syscalls", "blind": "a lot",
        "unavailable": "", "told": 60, "dropped": 2, "refused": 1, "found": 0, "left_out": 3,
        "events": [
            {"time": "t", "what": "update", "map": "policy", "line": f"update {i}"}
            for i in range(60)
        ],
    },
    "doctor": {
        "kernel": "6.18", "ready": True,
        "features": [{"name": "fexit", "works": False, "answer": "EPERM", "remedy": "none"}],
    },
    "provenance": {"kernel": "6.18"},
}  # fmt: skip


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**DOCUMENTS, name: {**DOCUMENTS[name], **fields}}


def archive(
    documents: dict[str, Any] | list[tuple[str, Any]],
    change: Callable[[tarfile.TarInfo], object] = lambda one: None,
) -> bytes:
    """As `bundle.write` makes it, but for what is changed about each member."""
    made = b""
    pairs = documents.items() if isinstance(documents, dict) else documents
    for name, document in pairs:
        content = document if type(document) is bytes else json.dumps(document).encode()
        member = tarfile.TarInfo(f"{name}.json")
        member.size = len(content)
        change(member)
        made += member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)
    return gzip.compress(made + bytes(1024))


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "incident.tar.gz"
    bundle.write(str(path), DOCUMENTS)
    found = bundle.read(str(path))
    assert vars(found) == DOCUMENTS and found.watch["told"] == 60
    assert path.stat().st_mode & 0o777 == 0o600  # keys and values stand in it
    text = str(found)
    assert "map 7 policy\nfull" in text and "update 39\n" in text and "update 40" not in text
    assert "and 23 more, 3 of which are not in the file" in text and "fexit" in text
    assert list(tmp_path.iterdir()) == [path]
    with tarfile.open(path) as plain:  # any tool reads it
        assert plain.getnames() == [f"{name}.json" for name in SHAPES]


def test_the_recorded_one_is_read_by_this_version() -> None:
    found = bundle.read(str(RECORDED.parent / "incident.tar.gz"))
    assert found.diagnosis["has_cause"] and found.watch["refused"] and "EEXIST" in str(found)


def test_what_could_not_be_watched_is_said() -> None:
    text = str(bundle.Bundle(**changed("watch", unavailable="This needs bcc.")))
    assert "not watched: This needs bcc." in text


def test_a_terminal_obeys_nothing_of_it() -> None:
    text = str(bundle.Bundle(**changed("diagnosis", text="a\x1b[2Jb\nc\r\x07")))
    assert "\x1b" not in text and "\r" not in text and "\x07" not in text and "b\nc" in text


def test_only_a_diagnosis_has_several_lines() -> None:
    forged = "policy\nobjects: none"
    events = [{"time": "t", "what": "update", "map": "policy", "line": forged}]
    for change in (
        changed("incident", asked=[forged]), changed("incident", labkit=forged),
        changed("watch", events=events), changed("watch", unavailable=forged),
        changed("doctor", kernel=forged),
    ):  # fmt: skip
        lines = str(bundle.Bundle(**change)).splitlines()
        assert [one for one in lines if one.startswith("objects")] == [lines[1]], change


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(LabError, match="cannot be written"):
        bundle.write(str(tmp_path / "folder"), DOCUMENTS)
    assert [one.name for one in tmp_path.iterdir()] == ["folder"]


def of_type(kind: bytes) -> Callable[[tarfile.TarInfo], object]:
    def change(member: tarfile.TarInfo) -> None:
        if member.name == "watch.json":
            member.type, member.linkname = kind, "/etc/passwd"

    return change


def without(name: str) -> dict[str, Any]:
    return {known: one for known, one in DOCUMENTS.items() if known != name}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "traversal": (archive({"../../watch": {}}), "does not belong"),
    "absolute": (archive({"/watch": {}}), "does not belong"),
    "long name": (archive({"a" * 5_000: {}}), "does not belong"),
    "stranger": (archive({**DOCUMENTS, "more": {}}), "does not belong"),
    "symbolic link": (archive(DOCUMENTS, of_type(tarfile.SYMTYPE)), "does not belong"),
    "hard link": (archive(DOCUMENTS, of_type(tarfile.LNKTYPE)), "does not belong"),
    "device": (archive(DOCUMENTS, of_type(tarfile.CHRTYPE)), "does not belong"),
    "folder": (archive(DOCUMENTS, of_type(tarfile.DIRTYPE)), "does not belong"),
    "twice": (archive([*DOCUMENTS.items(), *DOCUMENTS.items()]), "stands in it twice"),
    "bomb": (gzip.compress(bytes(bundle.MOST_BYTES + 1)), "larger than"),
    "no archive": (gzip.compress(b"x" * 4096), "damaged"),
    "negative size": (archive(DOCUMENTS, lambda one: setattr(one, "size", -512)), "no size that"),
    "size beyond the end": (
        archive([("incident", {})], lambda one: setattr(one, "size", 1 << 20)), "no size that"
    ),
    "large number": (
        archive(DOCUMENTS, lambda one: setattr(one, "size", 1 << 80)), "no size that"
    ),
    "large member": (
        archive({"incident": b" " * (17 << 20)}), "no size that can be",
    ),
    "missing": (archive(without("doctor")), "'doctor' is missing"),
    "deep": (archive({**DOCUMENTS, "provenance": b"[" * 200_000}), "too deep"),
    "no JSON": (archive({**DOCUMENTS, "provenance": b"{"}), "no JSON"),
    "many digits": (
        archive({**DOCUMENTS, "provenance": b"1" * 100_000}), "no JSON|not what it should be",
    ),
    "list": (archive({**DOCUMENTS, "provenance": []}), "provenance is not what"),
    "field": (archive(changed("watch", told=True)), "watch: told is not what"),
    "event": (
        archive(changed("watch", events=[{"time": 1}])),
        r"watch: events\[0\]: time is not what",
    ),
    "time without end": (archive(changed("watch", seconds=10**400)), "watch: seconds is not what"),
    "time that is none": (archive(changed("watch", seconds=float("nan"))), "watch: seconds is not"),
    "no field": (archive({**DOCUMENTS, "watch": {}}), "watch: seconds is not what"),
    "version": (archive(changed("incident", format="9")), "another version"),
    "not packed": (b"hello", "not packed by gzip"),
    "empty": (b"", "its end is missing"),
    "cut": (archive(DOCUMENTS)[:-20], "its end is missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    content, why = HOSTILE[kind]
    path = tmp_path / "incident.tar.gz"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=why) as refused:
        bundle.read(str(path))
    assert "is no incident that can be opened" in str(refused.value)
    assert len(str(refused.value)) < 400 + len(str(path))
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("pipe", "no plain file"), ("", "director|plain"), ("x", "No such file")):
        with pytest.raises(BadInput, match=why):
            bundle.read(str(tmp_path / name))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(gzip.decompress(archive(DOCUMENTS)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "incident.tar.gz"
    path.write_bytes(gzip.compress(bytes(content), 1))
    with contextlib.suppress(BadInput):
        str(bundle.read(str(path)))
