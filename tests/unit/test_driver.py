"""The driver: turns, tables, and more rounds where they decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import pytest

from labkit.errors import BadInput
from labkit.judge.findings import HOLDS, UNDECIDED, conclude
from labkit.lab import catalogue, driver, experiment
from labkit.lab.catalogue import find
from labkit.lab.experiment import Case, Counted, Experiment, Statement, case_table
from labkit.lab.experiment import experiment as declare

CASES = (
    Case("broken", "bare", "a bare map", size=8),
    Case("control", "quiet", "nobody writes", size=16),
    Case("fixed", "lock", "a lock"),
    Case("fixed", "retry", "one retry", beside="bare"),
)
FASTER = 'ratio(rounds(case="lock").ns, rounds(case="bare").ns) > 1'
Measure = Callable[..., Any]


@pytest.fixture
def made() -> Iterator[Callable[..., Experiment]]:
    def make(measure: Measure, *statements: Statement, **more: Any) -> Experiment:
        given: dict[str, Any] = {
            "number": 2000, "family": "sync", "question": "Is it?", "claims": (), "needs": (),
            "quick": {"rounds": 3}, "full": {"rounds": 7}, "cases": CASES,
            "counted": Counted("lost", operations="made", anomalies="lost", cost_ns="ns"),
        }  # fmt: skip
        declare("made-up", statements=statements, **(given | more))(measure)
        return experiment._registered["made-up"]

    yield make
    experiment._registered.pop("made-up", None)


def measure_one(case: Case) -> list[dict[str, Any]]:
    """Lose one in ten where nothing guards."""
    lost = {"bare": 10}.get(case.id, 0)
    events = pd.DataFrame({"at_ns": [1, 2]})
    row = {"made": 100, "lost": lost, "ns": 5.0, "events": events}
    beside = [{"case": "retry", "made": 100, "lost": 0, "ns": 6.0}] if case.id == "bare" else []
    return [row, *beside]


def test_every_case_is_measured_once_a_round(made: Callable[..., Experiment]) -> None:
    run = driver.measured(made(measure_one))
    rounds = run.table("rounds")
    assert list(rounds["case"]) == ["bare", "quiet", "lock", "retry"] * 3
    assert list(rounds["round"]) == [0] * 4 + [1] * 4 + [2] * 4
    assert len(run.table("events")) == 3 * 3 * 2 and set(run.table("events")) >= {"case", "round"}
    assert str(run.count("broken")) == "30 of 300" and str(run.count("fixed")) == "0 of 600"
    assert run.derived_tables == {"counts"}
    cases = run.table("cases")
    assert list(cases["label"]) == [case.label for case in CASES]
    assert cases["size"].iloc[1] == 16 and pd.isna(cases["size"].iloc[2])


def test_the_order_of_the_cases_changes_from_round_to_round() -> None:
    order = [thing for _, thing in driver.in_turns(range(8), 20)]
    rounds = [tuple(order[at : at + 8]) for at in range(0, len(order), 8)]
    assert len(set(rounds)) > 15 and all(sorted(one) == list(range(8)) for one in rounds)


@pytest.mark.parametrize(("noisy", "state", "again"), [(0, HOLDS, 1), (99, UNDECIDED, 4)])
def test_what_is_undecided_is_measured_again_within_bounds(
    made: Callable[..., Experiment], noisy: int, state: str, again: int
) -> None:
    """Three rounds give no interval, six do; noise that does not end stays undecided."""
    turns = {"bare": 0, "lock": 0}

    def measure(case: Case) -> dict[str, Any]:
        """Be slow in every other turn, while there is noise."""
        turns[case.id] = turns.get(case.id, 0) + 1
        late = case.id == "bare" and turns["bare"] % 2 and turns["bare"] < noisy
        ns = {"bare": 5.0, "lock": 9.0}.get(case.id, 1.0)
        return {"made": 100, "lost": int(case.id == "bare"), "ns": 50.0 if late else ns}

    one = made(measure, Statement("a lock costs more", FASTER), cases=CASES[:3])
    run = driver.measured(one)
    assert run.provenance["measured_again"] == again
    assert run.table("rounds")["round"].nunique() == 3 * (1 + again)
    assert run.count("broken").operations == 300 * (1 + again)
    assert conclude(run, one.statements, "").state == state


def test_a_case_that_nobody_declared_is_refused(made: Callable[..., Experiment]) -> None:
    def measure(case: Case) -> dict[str, Any]:
        """Name another case."""
        return {"case": "other", "made": 1, "lost": 0, "ns": 1.0}

    with pytest.raises(BadInput, match="a case 'other', which its table of cases does not have"):
        driver.measured(made(measure))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"cases": [*CASES, CASES[0]]}, "Two cases of made-up call themselves 'bare'"),
        ({"quick": {"keys": 3}}, "must name"),
        ({"family": "kitchen"}, "names the family"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(
    made: Callable[..., Experiment], more: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        made(measure_one, **more)


def test_a_case_says_what_it_lacks() -> None:
    assert CASES[0].size == 8 and CASES[2].get("size", 4) == 4
    with pytest.raises(AttributeError, match="no setting 'size'"):
        _ = CASES[2].size
    with pytest.raises(BadInput, match="A variant is one of"):
        Case("mended", "x", "x")


def test_a_number_that_is_given_twice_is_refused(made: Callable[..., Experiment]) -> None:
    made(measure_one, number=find("transient-null").number)
    catalogue.catalogue.cache_clear()
    try:
        with pytest.raises(BadInput, match="both have the number 5"):
            catalogue.catalogue()
    finally:
        catalogue.catalogue.cache_clear()


def test_settings_that_are_no_values_stay_out_of_the_table() -> None:
    table = case_table([Case("fixed", "a", "A", call=len, many=3)])
    assert list(table) == ["variant", "case", "label", "many"]


def test_no_round_is_told_twice_where_a_case_is_measured_again(
    made: Callable[..., Experiment],
) -> None:
    def measure(case: Case, *, turn: int) -> dict[str, Any]:
        """Keep the round that was told."""
        return {"told": turn, "made": 1, "lost": 0, "ns": 1.0}

    never = Statement("nothing tells", "some(broken, like=0.001)")
    run = driver.measured(made(measure, never, cases=CASES[:3]))
    rounds = run.table("rounds")
    assert run.provenance["measured_again"] == driver.MOST_AGAIN
    assert (rounds["told"] == rounds["round"]).all()
    assert sorted(rounds["told"].unique()) == list(range(3 * (driver.MOST_AGAIN + 1)))
