"""Checkers against naive oracles, on planted anomalies, on clean histories, and for speed."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.errors import BadInput
from labkit.judge import checkers
from labkit.judge.history import PENDING, History, Op, build, concatenate

WRITER, READER = 1, 2


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Any valid history, however absurd: few keys and times, so that everything collides."""
    parts = []
    for key in range(draw(st.integers(1, 3))):
        changes = draw(st.integers(0, 5))
        # A mere permutation: several writers may commit out of the order of versions.
        versions = draw(st.permutations(range(1, changes + 1)))
        for version in versions:
            start = draw(st.integers(0, 20))
            end = draw(st.one_of(st.integers(start, 24), st.just(PENDING)))
            parts.append(
                build(
                    draw(st.sampled_from([Op.WRITE, Op.WRITE, Op.DELETE])),
                    key=key,
                    version=version,
                    start_ns=start,
                    end_ns=end,
                    actor=WRITER,
                    outcome=draw(st.sampled_from([0, 0, 0, -errno.E2BIG])),
                )
            )
        for _ in range(draw(st.integers(0, 5))):
            start = draw(st.integers(0, 20))
            outcome = draw(st.sampled_from([0, 0, 0, -errno.ENOENT, -errno.EFAULT]))
            parts.append(
                build(
                    Op.READ,
                    key=key,
                    version=draw(st.integers(0, changes + 1)) if outcome == 0 else 0,
                    start_ns=start,
                    end_ns=draw(st.integers(start, 24)),
                    actor=draw(st.integers(READER, READER + 1)),
                    outcome=outcome,
                    intact=draw(st.sampled_from([True, True, True, False])),
                    length=draw(st.integers(0, 16)),
                )
            )
    return concatenate(*parts)


# The definitions, word by word.


def is_read(row: Any) -> bool:
    return bool(
        row["op"] == Op.READ and row["outcome"] in (0, -errno.ENOENT) and row["intact"]
    )  # fmt: skip


def changes_of(history: History, key: int) -> list[Any]:
    return [w for w in history if w["op"] != Op.READ and w["outcome"] == 0 and w["key"] == key]


def commits_of(history: History, key: int) -> list[Any]:
    return [w for w in changes_of(history, key) if w["end_ns"] != PENDING]


def position(history: History, read: Any) -> int:
    if read["version"]:
        return int(read["version"])
    deletes = [w for w in changes_of(history, read["key"]) if w["op"] == Op.DELETE]
    return max((int(d["version"]) for d in deletes if d["start_ns"] <= read["end_ns"]), default=0)


def missing(history: History, read: Any) -> list[Any]:
    at = position(history, read)
    return [
        w
        for w in commits_of(history, read["key"])
        if w["end_ns"] <= read["start_ns"] and w["version"] > at
    ]


def naive_stale(history: History) -> list[bool]:
    return [is_read(row) and bool(missing(history, row)) for row in history]


def naive_t(history: History) -> list[int]:
    def age(read: Any) -> int:
        start = int(read["start_ns"])
        return max((start - int(w["end_ns"]) for w in missing(history, read)), default=0)

    return [age(row) if is_read(row) else -1 for row in history]


def naive_unwritten(history: History) -> list[bool]:
    def known(read: Any) -> bool:
        return any(
            w["version"] == read["version"] and w["start_ns"] <= read["end_ns"]
            for w in changes_of(history, read["key"])
        )

    return [is_read(row) and row["version"] > 0 and not known(row) for row in history]


def naive_non_monotonic(history: History) -> list[bool]:
    at: dict[tuple[int, int], int] = {}  # where each reader of a key is
    answers = []
    for row in history:  # ordered by start
        if not is_read(row):
            answers.append(False)
            continue
        reader = int(row["actor"]), int(row["key"])
        best = at.get(reader, 0)
        answers.append(position(history, row) < best)
        if answers[-1]:
            continue
        if row["version"]:
            at[reader] = int(row["version"])
        elif best:
            deletes = [w for w in changes_of(history, row["key"]) if w["op"] == Op.DELETE]
            at[reader] = min(int(d["version"]) for d in deletes if d["version"] >= best)
    return answers


def naive_first_seen(history: History) -> list[int]:
    def seen(change: Any) -> int:
        ends = [
            int(r["end_ns"])
            for r in history
            if is_read(r)
            and r["actor"] == READER
            and r["key"] == change["key"]
            and r["version"] >= change["version"]
        ]
        return min(ends, default=0)

    return [seen(r) if r["op"] != Op.READ and r["outcome"] == 0 else 0 for r in history]


def naive_missed(history: History) -> list[bool]:
    reads = [r for r in history if is_read(r) and r["actor"] == READER]

    def is_missed(row: Any) -> bool:
        if row["op"] != Op.WRITE or row["outcome"] != 0 or row["end_ns"] == PENDING:
            return False
        looked_before = any(r["start_ns"] <= row["start_ns"] for r in reads)
        looked_after = any(r["start_ns"] >= row["end_ns"] for r in reads)
        saw = any(r["key"] == row["key"] and r["version"] == row["version"] for r in reads)
        return looked_before and looked_after and not saw

    return [is_missed(row) for row in history]


def naive_lost(history: History, final: dict[int, int]) -> list[bool]:
    def is_lost(row: Any) -> bool:
        if row["op"] == Op.READ or row["outcome"] != 0 or row["end_ns"] == PENDING:
            return False
        at = final.get(int(row["key"]), 0)
        if at == 0:
            deletes = [w for w in changes_of(history, row["key"]) if w["op"] == Op.DELETE]
            at = max((int(d["version"]) for d in deletes), default=0)
        return bool(row["version"] > at)

    return [is_lost(row) for row in history]


@pytest.mark.parametrize(
    ("checker", "oracle"),
    [
        (checkers.stale, naive_stale),
        (checkers.t_staleness, naive_t),
        (checkers.unwritten, naive_unwritten),
        (checkers.non_monotonic, naive_non_monotonic),
        (lambda history: checkers.first_seen(history, READER), naive_first_seen),
        (lambda history: checkers.missed(history, READER), naive_missed),
    ],
    ids=["stale", "t", "unwritten", "non-monotonic", "first-seen", "missed"],
)
@given(history=histories())
@settings(max_examples=150)
def test_checker_equals_its_definition(
    checker: Callable[[History], Any], oracle: Callable[[History], list[Any]], history: History
) -> None:
    assert checker(history).tolist() == oracle(history)


@given(history=histories(), final=st.dictionaries(st.integers(0, 3), st.integers(0, 6)))
@settings(max_examples=150)
def test_lost_equals_its_definition(history: History, final: dict[int, int]) -> None:
    answer = checkers.lost(
        history,
        np.array(list(final), np.uint64),
        np.array(list(final.values()), np.uint64),
    )
    assert answer.tolist() == naive_lost(history, final)


@given(history=histories())
@settings(max_examples=150)
def test_visibility_counts_every_read_that_can_miss_something(history: History) -> None:
    edges = [0, 1, 3, 8, 30]
    expected = [[0, 0] for _ in edges[1:]]
    for read in history:
        commits = [
            w
            for w in commits_of(history, read["key"])
            if is_read(read) and w["end_ns"] <= read["start_ns"]
        ]
        if commits:
            newest = max(commits, key=lambda w: int(w["version"]))
            since = int(read["start_ns"]) - int(newest["end_ns"])
            cell = next(i for i in range(4) if edges[i] <= since < edges[i + 1])
            expected[cell][0] += 1
            expected[cell][1] += not missing(history, read)
    table = checkers.t_visibility(history, edges)
    assert table[["reads", "fresh"]].to_numpy().tolist() == expected
    assert (table["probability"].isna() == (table["reads"] == 0)).all()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), max_size=30))
def test_mixed_generations_equals_its_definition(rows: list[tuple[int, int, int]]) -> None:
    history = concatenate(
        *(
            build(Op.READ, key=i, version=version, start_ns=start, end_ns=start + 5, actor=actor)
            for i, (actor, start, version) in enumerate(rows)
        )
    )
    table = checkers.mixed_generations(history)
    expected: dict[tuple[int, int], list[int]] = {}
    for actor, start, version in rows:
        expected.setdefault((start, actor), []).append(version)
    columns = ["start_ns", "actor", "keys", "oldest", "newest", "mixed"]
    found = {
        (row[0], row[1]): row[2:] for row in zip(*(table[c].tolist() for c in columns), strict=True)
    }
    assert found == {
        read: (len(seen), min(seen), max(seen), len(set(seen)) > 1)
        for read, seen in expected.items()
    }


@given(
    st.dictionaries(st.integers(0, 6), st.integers(0, 3)),
    st.dictionaries(st.integers(0, 6), st.integers(0, 3)),
)
def test_diverged_equals_its_definition(ours: dict[int, int], theirs: dict[int, int]) -> None:
    answer = checkers.diverged(
        list(ours), list(ours.values()), list(theirs), list(theirs.values())
    )  # fmt: skip
    assert answer.tolist() == sorted(
        key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)
    )


@st.composite
def clean_histories(draw: st.DrawFn) -> History:
    """What a correct map can show: each operation takes effect at a moment within its bounds."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return clean(rng, changes=draw(st.integers(1, 40)), reads=draw(st.integers(1, 60)))


def clean(rng: np.random.Generator, changes: int, reads: int, keys: int = 3) -> History:
    parts = []
    for key in range(keys):
        # Changes follow each other; the moment of effect is somewhere inside.
        steps = np.cumsum(rng.integers(1, 10, 3 * changes + 1)).astype(np.uint64)
        start, effect, end = steps[0:-1:3], steps[1::3], steps[2::3]
        op = np.where(rng.random(changes) < 0.2, Op.DELETE, Op.WRITE)
        version = np.arange(1, changes + 1)
        parts.append(
            build(op, key=key, version=version, start_ns=start, end_ns=end, actor=WRITER)
        )  # fmt: skip
        # The reader of a key does one thing after another.
        steps = np.sort(rng.choice(int(end[-1]) + 3 * reads, 3 * reads, replace=False))
        index = np.searchsorted(effect, steps[1::3], side="right") - 1
        seen = np.where((index >= 0) & (op[index] == Op.WRITE), version[index], 0)
        parts.append(
            build(
                Op.READ, key=key, version=seen, start_ns=steps[::3], end_ns=steps[2::3],
                actor=READER,
            )
        )  # fmt: skip
    return concatenate(*parts)


@given(clean_histories())
@settings(max_examples=300)
def test_clean_histories_are_silent(history: History) -> None:
    reads = history["op"] == Op.READ
    for checker in (
        checkers.stale,
        checkers.unwritten,
        checkers.non_monotonic,
        checkers.torn,
        checkers.t_staleness,
    ):
        assert not checker(history)[reads].any(), checker


@given(clean_histories(), st.data())
def test_a_planted_stale_read_is_found(history: History, data: st.DataObject) -> None:
    history = history.copy()
    history["op"][history["op"] == Op.DELETE] = Op.WRITE
    reads = np.flatnonzero((history["op"] == Op.READ) & (checkers._newest_before(history) > 0))
    history["version"][history["op"] == Op.READ] = checkers._newest_before(history)[
        history["op"] == Op.READ
    ]
    assert not checkers.stale(history).any()
    if reads.size == 0:
        return
    row = data.draw(st.sampled_from(reads.tolist()))
    history["version"][row] -= 1
    assert np.flatnonzero(checkers.stale(history)).tolist() == [row]


def test_planted_torn_reads_are_found() -> None:
    history = build(
        Op.READ, key=1, version=[3, 3, 3, 0], start_ns=[1, 2, 3, 4], end_ns=9,
        intact=[True, False, True, True], length=[64, 64, 48, 0],
    )  # fmt: skip
    assert checkers.torn(history).tolist() == [False, True, False, False]
    words = np.array([[7, 7, 7], [7, 8, 8], [8, 8, 7]], np.uint64)
    assert checkers.torn_values(words).tolist() == [False, True, True]


def test_a_torn_read_is_not_called_stale() -> None:
    write = build(Op.WRITE, key=1, version=2, start_ns=0, end_ns=1)
    read = build(Op.READ, key=1, version=1, start_ns=5, end_ns=6, intact=False)
    history = concatenate(write, read)
    assert not checkers.stale(history).any()


def test_a_write_without_an_answer_may_show_but_need_not() -> None:
    first = build(Op.WRITE, key=1, version=1, start_ns=0, end_ns=1)
    killed = build(Op.WRITE, key=1, version=2, start_ns=2, end_ns=PENDING)
    reads = build(Op.READ, key=1, version=[1, 2], start_ns=[5, 7], end_ns=[6, 8])
    history = concatenate(first, killed, reads)
    assert not checkers.stale(history).any()
    assert not checkers.unwritten(history).any()
    assert not checkers.lost(history, [1], [1]).any()


def test_accounting() -> None:
    assert checkers.accounting(produced=10, delivered=6, dropped=3, coalesced=1) == 0
    assert checkers.accounting(produced=10, delivered=6, dropped=3) == 1
    assert checkers.accounting(produced=10, delivered=8, dropped=3) == -1
    with pytest.raises(BadInput, match="dropped"):
        checkers.accounting(produced=1, delivered=1, dropped=-1)


def test_what_was_told_of_twice_is_not_told_of_once() -> None:
    changes, told = [5, 5, 5, 5, 0, 0, 5], [5, 10, 0, 3, 0, 1, 0]
    words = checkers.told_of(changes, told, [False] * 6 + [True])
    assert words == ["once", "too often", "never", "sometimes", "not tried", "too often", "refused"]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda h: checkers.t_visibility(h, [0]), "increasing edges"),
        (lambda h: checkers.t_visibility(h, [3, 1]), "increasing edges"),
        (lambda h: checkers.lost(h, [1, 1], [2, 3]), "no key twice"),
        (lambda h: checkers.diverged([1, 1], [2, 3], [1], [2]), "map has a key twice"),
        (lambda h: checkers.torn_values(np.zeros(3, np.uint64)), "table of words"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[History], Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        call(clean(np.random.default_rng(0), changes=3, reads=3))


def test_a_million_rows_cost_about_what_sorting_them_costs() -> None:
    history = clean(np.random.default_rng(0), changes=2_000, reads=3_000, keys=200)
    assert len(history) == 1_000_000

    def cpu(work: Callable[[], object]) -> float:
        begun = time.process_time()
        work()
        return time.process_time() - begun

    by_key = (history["start_ns"], history["version"], history["key"])
    sort = min(cpu(lambda: np.lexsort(by_key)) for _ in range(3))
    for checker in (
        checkers.stale,
        checkers.t_staleness,
        checkers.unwritten,
        checkers.non_monotonic,
        checkers.mixed_generations,
        lambda h: checkers.missed(h, READER),
        lambda h: checkers.first_seen(h, READER),
        lambda h: checkers.lost(h, [0], [1]),
    ):
        # About 1 to 5 sorts; a quadratic checker would take thousands.
        assert cpu(lambda run=checker: run(history)) < 40 * sort  # type: ignore[misc]
