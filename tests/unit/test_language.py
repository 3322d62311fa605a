"""Statements: what holds, what fails, what is undecided, and what every mutant does to them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.judge.findings import FAILS, HOLDS, UNDECIDED, Statement, conclude, fill
from labkit.judge.language import BadPredicate, decide, reads
from labkit.judge.mutants import mutate
from labkit.judge.statistics import sign_interval
from labkit.runs import Run, Triad

CASES = pd.DataFrame(
    {
        "variant": ["broken", "broken", "control", "fixed"],
        "case": ["plain", "spare", "quiet", "lock"],
        "label": ["a plain hash", "a spare hash", "nobody writes", "a lock"],
        "size": [8, 64, 8, 8],
    }
)


def run(
    broken: tuple[int, int] = (1_000, 50),
    spare: tuple[int, int] = (1_000, 10),
    control: tuple[int, int] = (1_000, 0),
    fixed: tuple[int, int] = (10_000, 0),
    **tables: pd.DataFrame,
) -> Run:
    triad = Triad("lost")
    for variant, case, (operations, anomalies) in (
        ("broken", "plain", broken), ("broken", "spare", spare), ("control", "quiet", control),
        ("fixed", "lock", fixed),
    ):  # fmt: skip
        triad.add(variant, case=case, operations=operations, anomalies=anomalies)
    facts: dict[str, object] = {"kernel": "6.18.44", "recorded_at": "2026-11-22T22:00:00+00:00"}
    return Run(
        "made-up",
        "quick",
        {"rounds": 3},
        facts,
        {"counts": triad.table(), "cases": CASES, **tables},
    )


def rounds(case: str, ns: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"case": case, "round": range(len(ns)), "ns": ns})


TIMES = pd.concat(
    [rounds("slow", [20.0, 21, 19, 20, 22, 20, 21]), rounds("fast", [10.0, 11, 9, 10, 10, 11, 9])],
    ignore_index=True,
)
# The same with one stall of the machine, and with noise throughout.
STALLED = TIMES.assign(ns=[20.0, 21, 19, 20, 22, 20, 21, 10, 11, 900, 10, 10, 11, 9])
NOISY = TIMES.assign(ns=[20.0, 5, 19, 5, 22, 5, 21, 10, 11, 9, 10, 10, 11, 9])
RATIO = 'ratio(times(case="slow").ns, times(case="fast").ns) > 1.5'


@pytest.mark.parametrize(
    ("statement", "changes", "holds"),
    [
        ("some(broken)", {}, True),
        ("some(broken)", {"spare": (1_000, 0)}, False),
        ("some(broken, like=1e-6)", {"spare": (1_000, 0)}, None),
        ("some(broken, like=0.1)", {"spare": (1_000, 0)}, False),
        ("all(broken)", {}, False),
        ("all(broken)", {"broken": (7, 7), "spare": (1, 1)}, True),
        ("none(control)", {}, True),
        ("none(control)", {"control": (1_000, 1)}, False),
        # The broken rate of 3 % shows three in a hundred: that none came tells nothing.
        ("none(control)", {"control": (100, 0)}, None),
        ("none(control)", {"control": (100, 1)}, False),
        # Where every operation goes wrong, one that does not is enough.
        ("none(control)", {"control": (1, 0), "broken": (3, 3), "spare": (2, 2)}, True),
        ('none(control, like=broken["plain"])', {"control": (300, 0)}, True),
        ('none(control, like=broken["spare"])', {"control": (300, 0)}, None),
        ("not none(control)", {}, False),
        ("not none(control)", {"control": (100, 0)}, None),
        ("none(control) or some(broken)", {"control": (100, 0)}, True),
        ("none(control) and some(broken)", {"control": (100, 0)}, None),
        ("none(control) and none(broken)", {"control": (100, 0)}, False),
        ("some(broken(size=64))", {"broken": (1_000, 0)}, True),
        ('some(broken["plain", "spare"])', {}, True),
    ],
)
def test_quantifiers_carry_their_guards(
    statement: str, changes: dict[str, tuple[int, int]], holds: bool | None
) -> None:
    answer = decide(statement, run(**changes))  # type: ignore[arg-type]
    assert answer.holds is holds
    assert bool(answer.why) == (holds is None)


@pytest.mark.parametrize("statement", ["none(control)", "some(control)", "all(control)"])
def test_no_operation_shows_nothing(statement: str) -> None:
    with pytest.raises(BadPredicate, match="nobody writes did no operation"):
        decide(statement, run(control=(0, 0)))


@pytest.mark.parametrize(
    ("times", "holds"), [(TIMES, True), (STALLED, None), (NOISY, None), (TIMES.iloc[[0, 7]], None)]
)
def test_times_are_decided_by_intervals(times: pd.DataFrame, holds: bool | None) -> None:
    answer = decide(RATIO, run(times=times))
    assert answer.holds is holds
    assert bool(answer.why) == (holds is None)


def test_one_stall_among_nine_decides_nothing() -> None:
    slow, fast = [20.0] * 9, [10.0] * 8 + [900.0]
    times = pd.concat([rounds("slow", slow), rounds("fast", fast)], ignore_index=True)
    assert decide(RATIO, run(times=times)).holds is True


def test_rows_that_have_one_value_stand_for_it_beside_rows_of_another_table() -> None:
    said = pd.DataFrame({"ns": [15.0, 15.0], "other": [15.0, 16.0]})
    both = run(times=TIMES, said=said)
    assert decide("share(times.ns < said.ns) == 0.5", both).holds
    assert decide("share(2 * said.ns > times.ns) == 1", both).holds
    with pytest.raises(BadPredicate, match="14 and 2 rows are no pairs"):
        decide("share(times.ns < said.other) == 0.5", both)


def test_a_ratio_pairs_repetitions() -> None:
    few = pd.concat([TIMES, rounds("slow", [1.0] * 9)], ignore_index=True)
    with pytest.raises(BadPredicate, match="9 and 7 repetitions are no pairs"):
        decide(RATIO, run(times=few))
    with pytest.raises(BadPredicate, match="more or less than a number"):
        decide(RATIO.replace("> 1.5", "== 2"), run(times=TIMES))


KINDS = pd.DataFrame({"kind": ["array", "hash"], "made": [5, 7], "seen": [5, 7], "size": [8, 64]})


@pytest.mark.parametrize(
    ("statement", "holds"),
    [
        ("all(kinds.seen == kinds.made)", True),
        ("none(kinds.seen > kinds.made)", True),
        ("some(kinds.seen > 6)", True),
        ("all(kinds.seen > 6 and kinds.made > 6)", False),
        ("all(kinds(size > 8).seen == 7)", True),
        ('all(kinds(kind=("array", "hash")).made / kinds.made == 1)', True),
        ("rows(kinds(size > 8)) == 1 and share(kinds.seen == 5) == 0.5", True),
        ("first(kinds.seen) < last(kinds.seen)", True),
        ("all(not kinds.seen == 0)", True),
    ],
)
def test_rows_are_quantified_over_too(statement: str, holds: bool) -> None:
    assert decide(statement, run(kinds=KINDS)).holds is holds


@pytest.mark.parametrize(
    "statement", ["all(kinds(size=9).seen == 7)", "none(kinds(size > 99).seen > 0)"]
)
def test_no_row_shows_nothing(statement: str) -> None:
    with pytest.raises(BadPredicate, match="no row of"):
        decide(statement, run(kinds=KINDS))


STATEMENTS = (
    Statement("updates are lost", "some(broken)"),
    Statement("none is lost by itself", "none(control)"),
    Statement("a lock is slower", RATIO),
)


def test_a_finding_has_three_answers_and_a_check_for_each_case() -> None:
    finding = conclude(run(times=TIMES), STATEMENTS, "{broken} were lost, {1 + 1} times.")
    assert finding.state == HOLDS and finding.sentence == "60 of 2,000 were lost, 2 times."
    assert [check.statement for check in finding.checks] == [
        "updates are lost: a plain hash", "updates are lost: a spare hash",
        "none is lost by itself", "a lock is slower",
    ]  # fmt: skip
    assert conclude(run(times=NOISY), STATEMENTS, "").state == UNDECIDED
    lost = conclude(run(times=NOISY, control=(1_000, 1)), STATEMENTS, "")
    assert lost.state == FAILS and "1 of 1,000" in str(lost)
    # What the run does not have is told, and fails: it shows nothing.
    missing = conclude(run(), STATEMENTS, "{median(times.ns)} ns.")
    assert missing.state == FAILS and missing.sentence == "(not measured) ns."


def test_undecided_fails_nothing() -> None:
    assert conclude(run(times=NOISY), STATEMENTS, "").require().state == UNDECIDED


def test_every_column_that_is_read_is_told() -> None:
    assert reads(RATIO, run(times=TIMES)) == (("times", "case"), ("times", "ns"))
    assert reads("none(control)", run()) == (("counts", "anomalies"), ("counts", "operations"))


def survivors(made: Run, *statements: Statement) -> list[str]:
    return [str(one) for one in mutate(made, statements) if one.survived]


def test_mutants_turn_a_statement_that_says_something() -> None:
    assert survivors(run(times=TIMES, kinds=KINDS), *STATEMENTS) == []


@pytest.mark.parametrize(
    ("idle", "column"),
    [
        ("sum(kinds.seen) >= 0 or 1 > 0", "kinds.seen"),
        ("control.anomalies == 0", "counts in which nothing was done"),
        ("rows(kinds) >= 0", "kinds without rows"),
    ],
)
def test_mutants_name_a_statement_that_cannot_fail(idle: str, column: str) -> None:
    found = survivors(run(kinds=KINDS), Statement("idle", idle))
    assert any(column in words for words in found), found


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40))
def test_the_sign_interval_is_made_of_repetitions(values: list[float]) -> None:
    interval = sign_interval(values)
    assert interval.estimate == float(np.median(values))
    if len(values) < 6:
        assert math.isnan(interval.low)
    else:
        assert interval.low in values and interval.high in values
        assert interval.low <= interval.estimate <= interval.high


def test_the_sign_interval_holds_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    for n in (6, 9, 20):
        held = 0
        for _ in range(2_000):
            held += sign_interval(rng.exponential(1.0, n)).holds(math.log(2))
        assert held / 2_000 > 0.94


def test_a_label_is_the_cases_own_and_an_id_stands_for_itself() -> None:
    made = run()
    assert made.label("plain") == "a plain hash" and made.label("other") == "other"
    bare = replace(made, tables={"counts": made.counts})
    assert bare.label("plain") == "plain"
    assert fill("{fixed}", bare) == "0 of 10,000"


@pytest.mark.parametrize(
    "bad", ["like", "ratio(1)", "none()", "none(1)", "broken[3]", "share(1)", "between(1) > 0"]
)
def test_what_means_nothing_is_refused(bad: str) -> None:
    with pytest.raises(BadPredicate):
        decide(bad, run())


def test_one_repetition_decides_nothing_and_is_no_error() -> None:
    one = run(times=TIMES.groupby("case", sort=False).head(1))
    for statement in (RATIO, 'spread(times(case="slow").ns) > 1', "spread(times.ns / 30) > 0"):
        answer = decide(statement, one)
        assert answer.holds is None and "too few" in answer.why


def test_between_two_values_decides_only_what_both_do() -> None:
    assert decide("between(2, 3) > 1", run()).holds is True
    assert decide("between(3, 2) > 4", run()).holds is False
    answer = decide("between(2, 3) > 2.5", run())
    assert answer.holds is None and answer.why == "3 [2 to 3] does not decide against 2.5"


def test_a_statement_may_ask_for_the_architecture_and_not_for_one_that_nobody_noted() -> None:
    noted = replace(run(), provenance={**run().provenance, "architecture": "aarch64"})
    assert decide('machine.architecture == "aarch64"', noted).holds
    with pytest.raises(BadPredicate, match="architecture"):
        decide('machine.architecture != "x86_64"', run())
