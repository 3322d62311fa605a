"""What a user gives to make reaches a command as it stands: neither make nor a shell runs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from labkit.runs import PROFILES

CHECKOUT = Path(__file__).parents[2]
EXPANDED = [
    "$(shell touch {})", "$$(touch {})", "`touch {}`", '"; touch {}; "', "'; touch {}; '",
    "; touch {}",
]  # fmt: skip
PRINTS = ("ENTER=", "PYTHON=printf '<%s>'")  # in place of running


def said(target: str, **given: str) -> str:
    """What a target of the Makefile would pass on, without the target's own work."""
    words = [f"{name}={value}" for name, value in given.items()]
    done = subprocess.run(
        ["make", "--no-print-directory", "-o", "setup", target, *PRINTS, *words],
        cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("form", EXPANDED)
def test_nothing_given_is_run(form: str, tmp_path: Path) -> None:
    given = form.format(tmp_path / "made")
    for target in ("diagnose", "watch"):
        assert said(target, MAP=given) == f"<-m><labkit><{target}><{given}>"
    for target in ("report", "bench-kernel", "bench-sync", "bench-load", "bench-watch"):
        assert said(target, PROFILE=given).endswith(f"<--profile><{given}>")
    assert not (tmp_path / "made").exists()


def test_the_default_profile_is_the_quick_one() -> None:
    assert said("report") == f"<-m><labkit><report><--profile><{PROFILES[0]}>"


@pytest.mark.skipif(sys.platform != "linux", reason="the lab's processes are looked for in /proc")
def test_clean_removes_nothing_from_under_a_process_that_runs(tmp_path: Path) -> None:
    shutil.copytree(CHECKOUT / "provision", tmp_path / "provision")
    (tmp_path / "runs").mkdir()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(Path(sys.executable).resolve())
    with subprocess.Popen([python, "-c", "import time; time.sleep(60)"]) as running:
        try:
            done = subprocess.run(
                [tmp_path / "provision" / "clean.sh"],
                capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
        finally:
            running.kill()
    assert done.returncode == 1
    assert "end what still runs" in done.stderr and f"  {running.pid} " in done.stderr
    assert python.exists() and (tmp_path / "runs").exists()
