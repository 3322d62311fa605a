"""Go programs: what is missing is said, and the compiler's words come back whole."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from experiments import go_program
from experiments.go import go_snippets
from labkit.errors import Unavailable
from labkit.kernel.tools import find_tool


def log(root: Path, version: str) -> None:
    folder = root / "usr/share/doc/golang-github-cilium-ebpf-dev"
    folder.mkdir(parents=True)
    text = f"golang-github-cilium-ebpf ({version}) unstable; urgency=medium\n\n  * A change.\n"
    (folder / "changelog.Debian.gz").write_bytes(gzip.compress(text.encode()))


def test_each_suite_has_its_version_and_the_newest_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(go_program, "_FETCHED", tmp_path)
    with pytest.raises(Unavailable, match="make setup"):
        go_program.versions()
    log(tmp_path, "0.22.0+ds1-1")
    log(tmp_path / "bookworm", "0.9.1-1")
    (tmp_path / "trixie/usr").mkdir(parents=True)
    assert list(go_program.versions()) == ["0.9.1", "0.22.0"]


def test_a_missing_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"no/such is missing.*make setup"):
        go_program.build(go_program.MODULE, tmp_path, modules=("no/such",))


def test_complaints_are_those_of_the_packages_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not find_tool("go"):
        pytest.skip("there is no Go toolchain")
    monkeypatch.setattr(go_program, "MODULE", tmp_path)
    for name, text in {
        "good": "package good\n",
        "bad/printed": "package bad\n\nfunc f() { unused := 1 }\n",
    }.items():
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "printed.go").write_text(text)
    folder = tmp_path / "build"
    folder.mkdir()
    (line,) = go_program.complaints("packages", tmp_path, folder)
    assert line == "bad/printed/printed.go:3:12: declared and not used: unused"
    found = go_snippets._LINE.fullmatch(line)
    assert found and found.groups() == ("bad", "printed", "3", "declared and not used: unused")
