"""Maps whose values have no version: followed by the order of arrival, and by their bytes."""

from __future__ import annotations

import time
from unittest.mock import patch

import numpy as np
import pytest

from labkit.errors import BadInput
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.sync import Poll, TraceHook

ACTION = np.dtype([("action", "u1"), ("name", "V7")])


def any_follower(name: str) -> Poll | TraceHook:
    """A strategy that asks for no version."""
    return Poll(0.002, version=None) if name == "poll" else TraceHook(pull_s=None, version=None)


@pytest.mark.parametrize("name", ["poll", "hook"])
def test_a_map_without_versions_is_followed(name: str) -> None:
    """Values come and go back; what is missed by a batch too long for the hook is repaired."""
    with (
        Map.create(MapKind.HASH, key="u4", value=ACTION, max_entries=2_048) as table,
        any_follower(name) as follower,
    ):
        table.update(80, (3, b"web-pod"))
        with pytest.raises(BadInput, match="or version=None"), Poll() as refused:
            refused.attach(table)
        replica = follower.attach(table)
        seen: list[tuple[int, int, int]] = []

        def settle() -> None:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                changes = follower.poll(0.05)
                seen.extend(
                    (int(one["key"]), int(one["kind"]), int(one["value"]["action"]))
                    for one in changes
                )
                if not len(changes) and not follower.behind:
                    break
            keys, _, values = replica.contents()
            snapshot = table.snapshot()
            assert sorted(zip(keys.tolist(), values.tolist(), strict=True)) == sorted(
                zip(snapshot.keys.tolist(), snapshot.values.tolist(), strict=True)
            )
            assert replica.differs(snapshot) == 0
            stats = follower.stats()
            assert stats.produced == stats.delivered + stats.dropped + stats.coalesced

        for action in (1, 2, 1, 3):
            table.update(80, (action, b"web-pod"))
            settle()
        table.delete(80)
        settle()
        assert seen == [(80, 1, 1), (80, 1, 2), (80, 1, 1), (80, 1, 3), (80, 2, 0)]
        keys, values = np.arange(1_500, dtype="u4"), np.zeros(1_500, ACTION)
        for values["action"] in (5, 4):
            table.update_many(keys, values)
            settle()
        table.delete_many(keys[::2])
        settle()
        assert len(replica) == 750
        stats = follower.stats()
        assert stats.unknown == (("coalesced",) if name == "poll" else ("order",))
        if isinstance(follower, TraceHook) and follower.hooks.mechanism == "syscalls":
            assert stats.dropped > 0 and stats.repaired > 0 and stats.resyncs > 0
        versions = replica.contents()[1]
        assert len(np.unique(versions)) == 750, "a number is given once"


def test_events_of_before_a_reading_take_nothing_back() -> None:
    """What was committed before the map was read is in what was read."""
    with (
        Map.create(MapKind.HASH, key="u4", value="u4", max_entries=8) as table,
        TraceHook(pull_s=None, version=None) as follower,
    ):
        replica = follower.attach(table)
        for value in (1, 2):
            table.update(7, value)
        follower._resync_at = 0.0  # as if something had been dropped
        with patch.object(follower, "_take", follower._nothing):
            assert [int(one) for one in follower.poll(0)["value"]] == [2]
        assert len(follower.poll(0)) == 0
        now = replica.get(7)
        assert now is not None and int(now.value) == 2
        assert follower.stats().coalesced == 2
