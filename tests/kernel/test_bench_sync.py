"""The measurements of the strategies' own speed, in small: accounts add up, ratios point right."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import go_program
from experiments.bench import bench_sync, peers
from experiments.bench.sync_bars import (
    APPLY,
    BCC,
    BOOTSTRAP,
    CLOCK,
    EMPTY_POLL,
    EVENTS,
    GO,
    OURS,
    OURS_BESIDE,
    POLL,
    READ,
    C,
)  # fmt: skip
from experiments.go_program import LIBRARIES
from labkit.kernel.tools import find_tool
from labkit.load.workload import Stream

pytestmark = [
    pytest.mark.usefixtures("kernel"),
    pytest.mark.outside_vm("compares speeds, which an emulated CPU distorts"),
]


@pytest.mark.parametrize("way", BCC)
def test_a_follower_on_bccs_callback_follows_as_the_strategy_does(way: str) -> None:
    with (
        bench_sync.CallbackRing(1 << 16, way) as ring,
        Stream(keys=7, ring_bytes=1 << 16, channel=ring.channel) as stream,
    ):
        for turn in range(2):  # one ring, followers in turns
            with bench_sync.CallbackEvents(ring) as strategy:
                flow = stream.run(strategy, rate=20_000, changes=5_003)
                replica = strategy.replica
            stats = flow.stats
            assert stats.delivered + stats.dropped + stats.coalesced == stats.produced == 5_003
            assert replica.differs(stream.table.snapshot()) == 0
            assert replica.contents()[1].max() == -(-(turn + 1) * 5_003 // 7)


def test_events_are_sooner_than_a_poll() -> None:
    table = bench_sync.path(rate=20_000, seconds=0.2, keys=50, rounds=2)
    assert table["strategy"].value_counts().to_dict() == {EVENTS: 2, POLL: 2}
    assert (table["unseen"] == 0).all()
    median = table.groupby("strategy")["p50_ns"].median()
    assert median[EVENTS] < median[POLL]


def test_peers_follow_as_we_do() -> None:
    table = bench_sync.beside((1_000, 20_000), seconds=0.1, keys=50, rounds=1, unjudged=1)
    followers = set(table["follower"])
    assert {OURS_BESIDE, C} <= followers
    assert (GO in followers) == go_is_here()
    assert len(table) == len(followers) * len(bench_sync.POLICIES) * 2
    assert (table["operations"] == table["delivered"] + table["dropped"]).all()
    assert (table["unseen"] == 0).all() and (table["cpu_ns"] > 0).all()


def go_is_here() -> bool:
    return find_tool("go") is not None and (LIBRARIES / "github.com/cilium/ebpf").is_dir()


def test_without_go_its_rows_are_left_out_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(go_program, "LIBRARIES", tmp_path)
    with peers.running(cpu=0) as found:
        assert [peer.name for peer in found] == [C]
    said = capfd.readouterr().err
    assert f"without {GO}: " in said and "missing" in said


def test_the_search_finds_a_rate_for_every_way() -> None:
    best, trials = bench_sync.sustained(1 << 19, rings=3, keys=50, rounds=2)
    assert sorted(best["way"].unique()) == sorted((OURS, *BCC))
    assert (trials["operations"] == trials["operations"].iloc[0]).all()
    # The best of each: other load, which keeps a reader from its CPU, only lowers what it carries.
    rate = best.groupby("way")["rate"].max()
    assert rate[OURS] > rate[BCC[0]]


def test_a_large_replica_is_built_and_takes_changes() -> None:
    table = bench_sync.replica(keys=20_000, batch=1_000, applied=5_000, rounds=2)
    assert table.groupby("way")["things"].sum().to_dict() == {
        READ: 40_000, BOOTSTRAP: 40_000, APPLY: 10_000,
    }  # fmt: skip
    assert (table["ns"] > 0).all()


def test_the_floor_is_below_what_is_measured() -> None:
    floor = bench_sync.floor(3).groupby("what")["ns"].median()
    assert 0 < floor[CLOCK] < floor[EMPTY_POLL]
