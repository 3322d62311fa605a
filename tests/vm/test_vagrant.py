"""The Vagrantfile, as Vagrant understands it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from provision import vm


def vagrant(tmp_path: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("vagrant") is None:
        pytest.skip("there is no Vagrant here")
    own = {"VAGRANT_HOME": str(tmp_path / "home"), "VAGRANT_DOTFILE_PATH": str(tmp_path / "state")}
    return subprocess.run(
        ["vagrant", *words], cwd=vm.CHECKOUT, env={**os.environ, **own, **settings},
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("accelerator", ["", "tcg"])
def test_it_is_valid(tmp_path: Path, accelerator: str) -> None:
    settings = {"VAGRANT_DEFAULT_PROVIDER": "libvirt", "LAB_VM_ACCEL": accelerator}
    done = vagrant(tmp_path, "validate", **settings)
    assert done.returncode == 0, done.stderr
    assert "validated successfully" in done.stdout


def test_a_port_that_is_taken_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        settings = {"VAGRANT_DEFAULT_PROVIDER": "libvirt", "LAB_VM_BOX": "none"}
        done = vagrant(tmp_path, "up", LAB_PORT=str(port), **settings)
    assert done.returncode != 0
    assert f"Something else listens on port {port}" in done.stderr, done.stdout + done.stderr
    assert not list((tmp_path / "state").rglob("id"))


def test_a_mistake_in_it_is_found(tmp_path: Path) -> None:
    done = vagrant(tmp_path, "validate", LAB_PORT="-1", VAGRANT_DEFAULT_PROVIDER="libvirt")
    assert done.returncode != 0, done.stdout
