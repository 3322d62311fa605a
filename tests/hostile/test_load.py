"""Ten thousand maps of somebody else: each command keeps to bounds of time, memory and text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.bench import bench_load, load_bars
from experiments.bench.crowd import (
    BY_HUNDRED,
    HUNDRED,
    MAPS,
    NAME,
    NAMESAKES,
    PINS,
    PROGRAMS,
    Crowd,
    crowd,
)
from labkit import runs
from labkit.errors import CAUSE_FOUND
from labkit.kernel import objects
from labkit.runs import Run

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.usefixtures("kernel"),
    pytest.mark.timeout(300),
    pytest.mark.outside_vm("takes minutes on an emulated CPU, and asks how the lab counts"),
]


@pytest.fixture(scope="module")
def made(why_no_kernel: str) -> Iterator[Crowd]:
    if why_no_kernel:
        pytest.skip(why_no_kernel)
    with crowd() as one:
        yield one


def test_all_of_them_are_seen(made: Crowd) -> None:
    now = objects.snapshot()
    holder = now.maps[made.alone].pids
    owned = now.owned_by(holder)
    assert (len(owned.maps), len(owned.programs)) == (MAPS + 1, PROGRAMS)
    assert sum(len(one.pins) for one in owned.maps.values()) == PINS
    assert len(now.users(made.shared)) == PROGRAMS // 2
    assert len(now.twins(made.namesake)) == NAMESAKES - 1


def test_every_command_is_bounded(made: Crowd, tmp_path: Path) -> None:
    every = {name: bench_load.measured(name, words)
             for name, words in bench_load.commands(made).items()}  # fmt: skip
    run = Run(
        load_bars.EXPERIMENT, "quick", {"maps": MAPS},
        {"kernel": "6.18.44", "recorded_at": "2026-11-22T22:00:00+00:00"},
        {"commands": bench_load.as_table(list(every.values()))},
    )  # fmt: skip
    finding = load_bars.judge(runs.load(runs.save(run, tmp_path)))
    assert finding.holds and len(finding.checks) == len(load_bars.MOST) * len(every), finding

    one, shared = every["diagnose ONE"], every["diagnose SHARED"]
    assert one.status == 0 and one.said.startswith(f"map {made.alone} ")
    assert shared.status == 0 and f"{PROGRAMS // 2 - 20:,} more" in shared.said
    assert len(shared.said) < 20_000
    namesake, hundred = every["diagnose NAMESAKE"], every["diagnose HUNDRED"]
    assert namesake.status in (0, CAUSE_FOUND)
    assert len(namesake.said) < load_bars.MOST["text_bytes"] / 2
    assert hundred.status == 0
    assert hundred.said.count(f" {BY_HUNDRED}: hash, key 4 B") == HUNDRED
    for refused in (every["diagnose THOUSAND"], every["watch THOUSAND"]):
        assert refused.status == 2 and not refused.said and len(refused.told) < 2_000
        assert f"{NAMESAKES:,} maps are called '{NAME}'" in refused.told
    watch = every["watch ONE"]
    assert watch.status == 0 and not watch.said
    assert "0 changes were told by hooks, 0 were dropped" in watch.told
    for name in ("watch --all", "list", "list --json", "doctor"):
        assert every[name].status == 0
