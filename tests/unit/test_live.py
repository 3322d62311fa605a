"""What the panel calls, without a browser and without a kernel."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from labkit import figures, runs
from labkit.errors import BadInput
from labkit.figures.live_load import live_load
from labkit.lab import live, panels
from labkit.lab.experiment import say
from labkit.lab.live import Ended, Order, Progress, Session
from labkit.runs import Run

WAIT_S = 60.0
PROGRESS = Progress(1.5, 64_000.0, math.nan, 1_000, 900, 60, 40)


def a_run() -> Run:
    """A run as the worker saves it, made up."""
    windows = pd.DataFrame(
        {
            "at_s": [0.3, 0.6], "operations": [500, 500], "produced": [500, 500],
            "delivered": [500, 400], "dropped": [0, 60], "coalesced": [0, 40], "unseen": [0, 1],
            "p50_ns": [64_000.0, 70_000.0], "p99_ns": [math.nan, 900_000.0],
            "late_p99_ns": [1_000.0, 1_000.0], "follower_cpu": [0.1, 0.1],
        }
    )  # fmt: skip
    counts = pd.DataFrame(
        {"variant": ["fixed"], "case": ["events"], "operations": [1_000], "anomalies": [1],
         "anomaly": ["write never seen"], "cost_ns": [math.nan]}
    )  # fmt: skip
    tables = {"counts": counts, "windows": windows}
    tables |= live._summary(np.sort(np.arange(1, 1_001) * 1_000))
    facts: dict[str, object] = {"kernel": "6.18.44", "recorded_at": "2026-11-24T19:00:00+00:00"}
    parameters: dict[str, object] = {
        "strategy": "events", "rate": 2_000, "value_bytes": 8, "ring_bytes": 4_096, "seconds": 1,
    }  # fmt: skip
    return Run(live.EXPERIMENT, "quick", parameters, facts, tables)


def worker_that_saves(order: dict[str, Any], folder: str, stop: int) -> str:
    say(json.dumps(vars(PROGRESS)))
    say("a warning of somebody")
    return str(runs.save(a_run(), Path(folder)))


def worker_that_waits(order: dict[str, Any], folder: str, stop: int) -> str:
    import select

    say(json.dumps(vars(PROGRESS)))
    assert select.select([stop], [], [], WAIT_S)[0], "nobody asked it to stop"
    return worker_that_saves(order, folder, stop)


def worker_that_lacks(order: dict[str, Any], folder: str, stop: int) -> str:
    from labkit.errors import Unavailable

    raise Unavailable("This kernel lacks ringbuf: use Linux 5.8 or later.")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"strategy": "guess"}, "A strategy is one of poll 1 ms, .*not 'guess'"),
        ({"rate": 0}, "rate is 100 to 1,000,000 changes/s with events, not 0"),
        ({"rate": 2_000_000}, "not 2,000,000"),
        ({"rate": 1.5}, "rate is a whole number, not 1.5"),
        ({"strategy": "hook", "rate": 200_000}, "100 to 100,000 changes/s with hook"),
        ({"strategy": "double map", "rate": 1_000}, "4,000 to 100,000 changes/s with double map"),
        ({"value_bytes": 12}, "whole words of 8, not 12"),
        ({"value_bytes": 2_048}, "8 to 1,024 bytes"),
        ({"ring_bytes": 5_000}, "power of two from 4,096 .*not 5,000"),
        ({"ring_bytes": 0}, "power of two"),
        ({"ring_bytes": 1 << 30}, "power of two"),
        ({"seconds": 0}, "1 to 60 s, not 0"),
        ({"rate": 1_000_000, "seconds": 20}, "more than 10,000,000 changes: run at most 10 s"),
    ],
)
def test_what_cannot_be_is_one_sentence(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Order(**{"strategy": "events", "rate": 10_000, **changed})


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    bundles: list[Any] = []
    monkeypatch.setattr(panels, "display", lambda bundle, raw: bundles.append(bundle))
    yield bundles
    assert live.stop_newest(WAIT_S)


def until(met: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def work(monkeypatch: pytest.MonkeyPatch, instead: Any) -> None:
    """Let the session's worker call a function of this module instead of measuring."""
    from labkit.lab.worker import Worker

    class Told(Worker):
        def answer(self, function: str, arguments: Any, **others: Any) -> Any:
            if function == "labkit.lab.live:measured":
                function = f"{__name__}:{instead.__name__}"
            return super().answer(function, arguments, **others)

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr(live, "Worker", Told)


def test_a_session_tells_saves_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work(monkeypatch, worker_that_saves)
    told: list[Progress] = []
    ended: list[Ended] = []
    session = Session(Order("events", 2_000), told.append, ended.append, folder=tmp_path)
    assert session.join(WAIT_S)
    assert ended[0].problem == ""
    assert [vars(one) | {"p99_ns": 0} for one in told] == [vars(PROGRESS) | {"p99_ns": 0}]
    assert ended[0].picture.startswith(b"\x89PNG")
    assert ended[0].run is not None and ended[0].run.path is not None
    assert ended[0].run.path.is_relative_to(tmp_path)


def test_the_second_session_stops_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(monkeypatch, worker_that_waits)
    begun = threading.Event()
    ended: list[str] = []
    order = Order("events", 2_000)
    first = Session(
        order, lambda _one: begun.set(), lambda one: ended.append("first"), folder=tmp_path
    )
    assert begun.wait(WAIT_S) and first.running
    second = Session(order, lambda _one: None, lambda one: ended.append("second"), folder=tmp_path)
    assert first.join(WAIT_S) and second.running
    assert live.stop_newest(WAIT_S) and not second.running
    assert ended == ["first", "second"]
    second.stop()  # once more does nothing


def test_the_panel_shows_what_is_wrong_and_starts_nothing(
    shown: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "Worker", None)
    panel = panels.live_panel(tmp_path)
    panel.ring_bytes.value = 1_000
    panel.run.click()
    assert "role='alert'" in panel.message.value and "power of two" in panel.message.value
    panel.stop.click()
    assert "Nothing runs." in panel.message.value


def test_the_panel_runs_stops_and_draws(
    shown: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(monkeypatch, worker_that_waits)
    panel = panels.live_panel(tmp_path)
    panel.run.click()
    until(lambda: "Running." in panel.message.value)
    assert ">0.064<" in panel.live.value and ">&ndash;<" in panel.live.value
    panel.stop.click()
    until(lambda: "Saved as" in panel.message.value)
    assert "1,000 produced = 900 delivered + 60 dropped + 40 passed over" in panel.message.value
    assert "src='data:image/png;base64,iVBOR" in panel.figure.value


def test_the_panel_says_what_the_kernel_lacks(
    shown: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(monkeypatch, worker_that_lacks)
    panel = panels.live_panel(tmp_path)
    panel.run.click()
    until(lambda: "lacks ringbuf: use Linux 5.8" in panel.message.value)
    assert panel.figure.value == ""


def test_where_there_are_no_widgets_a_sentence_stands(shown: list[Any], tmp_path: Path) -> None:
    panels.live_panel(tmp_path)
    assert "make lab" in shown[0]["text/plain"] and "<i>" in shown[0]["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in shown[0]


def test_a_double_map_has_no_ring_to_choose(shown: list[Any], tmp_path: Path) -> None:
    panel = panels.live_panel(tmp_path)
    panel.strategy.value = "double map"
    assert panel.ring_bytes.disabled and "double map is chosen" in panel.message.value
    panel.strategy.value = "events"
    assert not panel.ring_bytes.disabled


def test_every_control_has_a_label(shown: list[Any], tmp_path: Path) -> None:
    panel = panels.live_panel(tmp_path)
    controls = [panel.strategy, panel.rate, panel.value_bytes, panel.ring_bytes, panel.seconds]
    assert all(one.description for one in [*controls, panel.run, panel.stop])


def test_the_figure_is_drawn_also_of_few_changes() -> None:
    assert figures.as_png(figures.draw(live_load, a_run())).startswith(b"\x89PNG")
    run = a_run()
    few = run.tables | live._summary(np.array([5, 6, 7]))
    few["windows"] = run.table("windows").assign(p50_ns=math.nan, p99_ns=math.nan)
    assert figures.as_png(
        figures.draw(live_load, Run(run.experiment, "quick", run.parameters, run.provenance, few))
    )
