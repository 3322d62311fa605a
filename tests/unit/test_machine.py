"""What is said of a whole machine, from diagnoses that are made up."""

from __future__ import annotations

import json
from pathlib import Path

from labkit.inspect import prometheus
from labkit.inspect.diagnostic import Diagnostic
from labkit.inspect.machine import DiagnosedMap, Machine
from labkit.kernel.objects import MapObject

STATES = ("cause", "risk", "healthy")
USUAL = Diagnostic("risk", "It is a hash.", "Look again.", "transient-null", usual=True)
ALONE = Diagnostic("risk", "No program refers to it.", "Look for 1.", "second-map-after-reload")
FULL = Diagnostic("cause", "It is full.", "Give it room.", "ignored-answers")


def diagnosed(map_id: int, *diagnostics: Diagnostic, name: str = "policy") -> DiagnosedMap:
    one = MapObject(map_id, name, "hash", 4, 8, 4, 0, 64, False, (), (), True)
    return DiagnosedMap(one, ("agent[7]",), diagnostics)


def test_causes_come_first_and_the_healthy_are_counted() -> None:
    machine = Machine(
        (diagnosed(1, USUAL), diagnosed(2, USUAL, ALONE), diagnosed(3, FULL, USUAL), diagnosed(4)),
        programs=2,
    )
    assert machine.has_cause
    states = {state: [one.map.id for one in machine.of(state)] for state in STATES}
    assert states == {"cause": [3], "risk": [2], "healthy": [1, 4]}
    text = str(machine)
    places = [
        text.index(words) for words in ("4 maps", "3 policy: It is full", "2 policy: No", "2 of 4")
    ]
    assert places == sorted(places) and "It is a hash" not in text
    assert not Machine((diagnosed(1, USUAL, ALONE),)).has_cause


def test_alike_is_told_once() -> None:
    text = " ".join(str(Machine(tuple(diagnosed(i, ALONE) for i in range(1, 10)))).split())
    assert text.count("No program refers to it") == 1
    assert "maps 1 policy, 2 policy" in text and "and 3 more: No program" in text
    each = (Diagnostic("risk", f"Of {i}.", f"Look for {i}.", "x") for i in range(9))
    text = " ".join(str(Machine(tuple(diagnosed(i, one) for i, one in enumerate(each)))).split())
    assert "Of 0. 8 more maps have a risk of that kind: 1 policy" in text and "Of 1." not in text


def test_answers_are_bounded(tmp_path: Path) -> None:
    causes = (Diagnostic("cause", f"Full {i}.", "Room.", "x") for i in range(5_000))
    machine = Machine(tuple(diagnosed(i, one) for i, one in enumerate(causes)))
    assert len(str(machine)) < 5_000 and "4,980 more" in str(machine)
    told = json.loads(json.dumps(machine.as_json()))
    assert len(told["found"]) + told["left_out"] == 5_000 == told["states"]["cause"]
    assert len(told["found"]) < 5_000
    path = tmp_path / "maps.prom"
    prometheus.write(str(path), machine.as_metrics())
    series = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert len(series) < 120
    assert 'labkit_diagnose_maps{asked="",state="cause"} 5000.0' in series


def test_what_was_not_reached_is_said() -> None:
    machine = Machine(
        (diagnosed(1),), not_reached=(8, 9), refused={5: "Opening map id 5: EPERM"},
        unseen=("2 of 3 network namespaces could not be looked into",),
    )  # fmt: skip
    text = " ".join(str(machine).split())
    assert "4 maps" in text and "no time for maps 8 and 9" in text
    assert "maps 5 could not be looked at (Opening map id 5: EPERM)" in text
    assert "2 of 3 network namespaces" in text and "1 of 1 maps" in text
    assert machine.as_json()["not_reached"] == [8, 9]


def test_a_map_that_was_named_has_its_own_series(tmp_path: Path) -> None:
    machine = Machine((diagnosed(1, FULL, name='a"\\b\n'), diagnosed(2, USUAL, ALONE)))
    path = tmp_path / "map.prom"
    prometheus.write(str(path), machine.as_metrics("pol\udcffcy"))
    text = path.read_text()
    assert (
        r'labkit_diagnose_map_causes{asked="pol?cy",map="a\"\\b\n",map_id="1",kind="hash"} 1.0'
        in text
    )
    assert 'map_id="2",kind="hash"} 0.0' in text
    assert (
        'diagnose_diagnostics{asked="pol?cy",weight="cause",experiment="ignored-answers"} 1.0'
        in text
    )
    assert path.stat().st_mode & 0o777 == 0o644
