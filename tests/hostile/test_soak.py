"""Followers and a watch beside a steady load: each change is accounted for, and no process grows.

The same for 30 minutes is ``make soak-follow``; `tests/unit/test_follow_bars.py` spoils its bars.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.bench import follow_bars as bars
from labkit import runs

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.usefixtures("kernel"),
    pytest.mark.outside_vm("asks for more than an emulated CPU does"),
]

SECONDS = 8


def test_accounts_are_exact_and_memory_is_flat(tmp_path: Path) -> None:
    soak = subprocess.run(
        [sys.executable, "-m", "labkit", "soak-follow", "--seconds", str(SECONDS),
         "--folder", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert soak.returncode == 0, soak.stdout + soak.stderr
    (saved,) = tmp_path.rglob("run.json")
    run = runs.load(saved.parent)
    assert bars.judge(run).holds and run.parameters["seconds"] == SECONDS
    accounts = run.table("accounts").set_index("process")
    for figure in ("delivered", "dropped"):
        assert (accounts.loc[list(bars.WRITER), figure] > 0).all(), figure
    assert accounts["refused"][bars.CALLS] > 0
