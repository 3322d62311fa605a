"""The example of notebook 11: its cause is named, its writes are told, its canary is seen."""

from __future__ import annotations

import time

import pytest

from labkit.errors import Unavailable
from labkit.inspect.canary import canary
from labkit.inspect.diagnose import diagnose
from labkit.inspect.watch import Watch
from labkit.kernel import probe
from labkit.kernel.maps import Map
from labkit.lab.example import CANARY_KEY, Example


def test_what_notebook_11_shows() -> None:
    with Example() as shown:
        (found,) = diagnose(shown.policies)
        assert [one.experiment for one in found.diagnostics if one.weight == "cause"] == [
            "second-map-after-reload"
        ]
        kinds: set[str] = set()
        deadline = time.monotonic() + 20
        with Map.from_id(int(shown.routes)) as table, Watch(table) as watch:
            while kinds != {"update", "delete", "EEXIST"} and time.monotonic() < deadline:
                kinds |= {one.error or one.what for one in watch.poll(1)}
            assert kinds == {"update", "delete", "EEXIST"} and not watch.dropped
        seen = canary(
            shown.policies, shown.command, key=str(CANARY_KEY), per_second=4, seconds=0.5, wait_s=30
        )
        assert len(seen) == 2 and seen.unseen == seen.failed == 0
    shown.close()


def test_where_no_bpf_runs_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: str) -> None:
        raise Unavailable("This needs the feature bpf: run as root.")

    monkeypatch.setattr(probe, "require", refuse)
    said: list[object] = []
    assert Example.where_it_can(said.append) is None
    assert said == ["No live example here. This needs the feature bpf: run as root."]
