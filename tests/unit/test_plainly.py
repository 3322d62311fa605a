"""Figures in words: no name of the statements' language is left in them."""

from __future__ import annotations

import pytest

from labkit.judge.claims import Ledger
from labkit.judge.plainly import plainly


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("control.anomalies", "0 of 5 rows", "anomalies: 0 of 5 rows"),
        ("answers.left > 0", "3 of 3 rows", "left (answers) above 0: 3 of 3 rows"),
        ("rows(table(case='late', value=2))", "0", "rows of table (late, 2): 0"),
        ("a.x_ns == -17 and b.y == 0", "no", "x in ns (a) equal to −17 and y (b) equal to 0: no"),
        ("2 * (a.x - b.x)", "1", "2 × (x (a) − x (b)): 1"),
        ("max(t(way='slow').ms)", "4", "largest ms (slow): 4"),
        (
            "ratio(usual(strategy='events', rate=10000).p99_ns, "
            "usual(strategy='poll', rate=10000).p99_ns)",
            "13.6 [9 to 15]",
            "p99 of events was 13.6x that of poll (9 to 15)",
        ),
        (
            "ratio(longest.mean_ms, shortest.mean_ms)",
            "160 [96 to 212]",
            "mean of longest was 160x that of shortest (96 to 212)",
        ),
        (
            "ratio(a.x - b.x, c.y)",
            "2 [1 to 3]",
            "ratio of x (a) − x (b) to y (c): 2x (1 to 3)",
        ),
    ],
)
def test_a_figure_is_told_in_words(name: str, value: str, words: str) -> None:
    assert plainly([(name, value)], None) == words


def test_every_outcome_of_the_ledger_is_told_in_words(recorded_ledger: Ledger) -> None:
    told = [
        one
        for claim in recorded_ledger.claims
        for verdict in recorded_ledger.of(claim)
        for one in verdict.outcomes
        if one.figures
    ]
    assert len(told) > 100
    for one in told:
        assert one.plain and not any(sign in one.plain for sign in ("==", "['", "_ns", "=")), one
    assert any(one.plain.startswith("evicted: ") for one in told)
