"""Every experiment of the catalogue on this kernel, through its worker; its finding must hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkit.analysis.findings import judge
from labkit.failures.experiment import catalogue, find
from labkit.measure import measure

pytestmark = pytest.mark.outside_vm(
    "takes an hour on an emulated CPU; make vm-report runs every experiment"
)

LACKS = "this kernel lacks "


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("experiment", list(catalogue()))
def test_it_holds_on_this_kernel(experiment: str, tmp_path: Path) -> None:
    if missing := find(experiment).missing():
        pytest.skip(LACKS + ", ".join(f"{one.name} ({one.answer})" for one in missing))
    run = measure(experiment, "quick", folder=tmp_path, time_limit_s=120.0, say=lambda words: None)
    judge(run).require()
    assert run.kernel and not run.recorded
    # Recorded runs of all experiments together must stay under 10 MiB.
    assert run.path is not None
    assert sum(file.stat().st_size for file in run.path.iterdir()) < 300_000
