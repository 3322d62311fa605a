"""A checkout that belongs to somebody else, whose git settings name programs to be run."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkit.kernel import provenance

pytestmark = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or shutil.which("git") is None,
    reason="needs root and git",
)
OTHER = 54_321


@pytest.fixture
def checkout() -> Iterator[Path]:
    """Another user's, in a folder that this user can reach."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = Path(folder, "checkout")
        (root / "labkit").mkdir(parents=True)
        (root / "labkit" / "a.py").write_text("1\n")
        git = ("git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b")
        for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "one")):
            subprocess.run([*git, *words], check=True, timeout=60)
        hook, said = root / "hook", root / "said"
        hook.write_text(f"#!/bin/sh\nid -u >> {said}\ncat\n")
        hook.chmod(0o755)
        (root / ".gitattributes").write_text("* filter=evil\n")
        for name, value in (
            ("core.fsmonitor", hook), ("filter.evil.clean", hook), ("core.pager", hook),
            ("core.hooksPath", root), ("core.sshCommand", hook),
        ):  # fmt: skip
            subprocess.run([*git, "config", name, str(value)], check=True, timeout=60)
        (root / "labkit" / "a.py").write_text("2\n")
        for path in (root, *root.rglob("*")):
            os.chown(path, OTHER, OTHER)
        yield root


def test_nothing_of_it_runs_as_root(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_CHECKOUT", checkout)
    code = provenance._code()
    said = checkout / "said"
    ran_by = set(said.read_text().split()) if said.exists() else set()
    assert ran_by == {str(OTHER)}  # the trap is one: it was run, and not by root
    assert isinstance(code["commit"], str) and len(code["commit"]) == 40
    assert code["modified"] is True


def test_what_is_ones_own_is_asked_as_before(checkout: Path) -> None:
    os.chown(checkout, 0, 0)
    assert provenance._as_owner(checkout) == {}
