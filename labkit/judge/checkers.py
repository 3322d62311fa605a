"""Checkers: which operations of a history went wrong, and by how much.

Each is a pure function over arrays, with its definition in words, its cost and its source. A
checker that takes a `history` expects a valid one (`history.build`, `history.validate`) and
returns one answer per row, so that the answers of several can be combined. ``n`` is the number of
rows.

Definitions
-----------
A read that saw version v is *at* v. A read that found its key absent is at the newest delete that
had begun by the read's end, or at 0 where there is none: the choice that favours the map.
A torn read is at no version; it counts in `torn` and nowhere else.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from labkit.errors import BadInput
from labkit.judge.history import History, Mask, Op, applied, committed, placeable

Ints = NDArray[np.int64]
Unsigned = NDArray[np.uint64]


def stale(history: History) -> Mask:
    """Mark reads that are at a version older than one committed before the read began.

    Regularity of a register, "safety (b)" of Lamport ("On Interprocess Communication", 1986): a
    read returns the newest write that completed before it, or one that overlaps it. O(n log n).
    """
    reads = placeable(history)
    mask = np.zeros(len(history), np.bool_)
    mask[reads] = _positions(history)[reads] < _newest_before(history)[reads]
    return mask


def t_staleness(history: History) -> Ints:
    """For how long, when each read began, the oldest change that it misses had been committed.

    t-staleness of PBS (Bailis et al., "Probabilistically Bounded Staleness for Practical Partial
    Quorums", VLDB 2012). O(n log n).

    Returns
    -------
    numpy.ndarray
        int64 nanoseconds, shape (n,); 0 for a fresh read, -1 in rows that are no read or a torn
        one.
    """
    reads = placeable(history)
    age = np.full(len(history), -1, np.int64)
    age[reads] = 0
    late = np.flatnonzero(stale(history))
    if late.size == 0:
        return age
    changes = np.flatnonzero(committed(history))
    order = changes[np.lexsort((history["version"][changes], history["key"][changes]))]
    key, end = history["key"][order], history["end_ns"][order]
    earliest = _earliest_from(key, end)
    first_missed = _search(
        key, history["version"][order], history["key"][late], _positions(history)[late]
    )
    age[late] = (history["start_ns"][late] - earliest[first_missed]).astype(np.int64)
    return age


def t_visibility(history: History, edges_ns: ArrayLike) -> pd.DataFrame:
    """Probability that a read sees the newest committed change, by the time since that commit.

    t-visibility of PBS (see `t_staleness`). Reads before the first commit of their key have
    nothing to miss and do not count. O(n log n).

    Parameters
    ----------
    history
        Rows of one or more writers and readers.
    edges_ns
        Increasing bounds of the bins of time since the commit, nanoseconds, shape (m + 1,).

    Returns
    -------
    pandas.DataFrame
        One row per bin: from_ns, to_ns (int64; to_ns excluded), reads, fresh (int64), probability
        (float64, NaN without reads).
    """
    edges = np.asarray(edges_ns, dtype=np.int64)
    if edges.ndim != 1 or edges.size < 2 or (np.diff(edges) <= 0).any():
        raise BadInput("The bins of t-visibility need at least two increasing edges.")
    newest = _newest_before(history)
    reads = np.flatnonzero(placeable(history) & (newest > 0))
    changes = np.flatnonzero(committed(history))
    order = changes[np.lexsort((history["version"][changes], history["key"][changes]))]
    index = _search(
        history["key"][order], history["version"][order], history["key"][reads], newest[reads]
    )
    end = history["end_ns"][order][index - 1]
    since = (history["start_ns"][reads] - end).astype(np.int64)
    fresh = ~stale(history)[reads]
    total, _ = np.histogram(since[since < edges[-1]], edges)
    seen, _ = np.histogram(since[fresh & (since < edges[-1])], edges)
    return pd.DataFrame(
        {
            "from_ns": edges[:-1],
            "to_ns": edges[1:],
            "reads": total.astype(np.int64),
            "fresh": seen.astype(np.int64),
            "probability": np.divide(
                seen, total, out=np.full(total.size, np.nan), where=total > 0
            ),
        }
    )  # fmt: skip


def first_seen(history: History, follower: int) -> Unsigned:
    """When a follower first had returned each change or a newer one of the same key.

    ``first_seen - intended_ns`` is the latency of a change in an open loop. Absence names no
    version, so it shows no change; a follower that is told of a delete has that delete's version
    in its row. O(n log n).

    Parameters
    ----------
    history
        Rows of the writers and of the follower.
    follower
        Actor whose reads count.

    Returns
    -------
    numpy.ndarray
        uint64 nanoseconds, shape (n,): the end of that read; 0 in rows that are no applied change
        and for changes never seen.
    """
    seen = np.zeros(len(history), np.uint64)
    reads = np.flatnonzero(
        placeable(history) & (history["actor"] == follower) & (history["version"] > 0)
    )
    changes = np.flatnonzero(applied(history))
    if reads.size == 0 or changes.size == 0:
        return seen
    order = reads[np.lexsort((history["version"][reads], history["key"][reads]))]
    key, at, end = history["key"][order], history["version"][order], history["end_ns"][order]
    earliest = _earliest_from(key, end)
    wanted = history["key"][changes]
    index = _search(key, at, wanted, history["version"][changes] - np.uint64(1))
    found = index < key.size
    found[found] = key[index[found]] == wanted[found]
    seen[changes[found]] = earliest[index[found]]
    return seen


def torn(history: History) -> Mask:
    """Mark reads whose value mixes two versions, by its own check (``intact`` is false). O(n)."""
    mask: Mask = (history["op"] == Op.READ) & (history["outcome"] == 0) & ~history["intact"]
    return mask


def torn_values(words: NDArray[np.unsignedinteger]) -> Mask:
    """Mark values that are not of one version throughout.

    For values that the writer filled with its version, over and over. O(words).

    Parameters
    ----------
    words
        Values as they were read, shape (n, words per value).

    Returns
    -------
    numpy.ndarray
        bool, shape (n,).
    """
    if words.ndim != 2 or words.shape[1] == 0:
        raise BadInput(f"Values are a table of words, (values, words), not {words.shape}.")
    mask: Mask = (words != words[:, :1]).any(axis=1)
    return mask


def unwritten(history: History) -> Mask:
    """Mark reads of a version that no change of their key had begun to make by the read's end.

    A value from nowhere: foreign bytes, another key's value, or a clock that is wrong. Safety of a
    register (Lamport 1986) in the form of Jepsen's "phantom". O(n log n).
    """
    mask = np.zeros(len(history), np.bool_)
    reads = np.flatnonzero(placeable(history) & (history["version"] > 0))
    changes = np.flatnonzero(applied(history))
    order = changes[np.lexsort((history["version"][changes], history["key"][changes]))]
    key, version = history["key"][reads], history["version"][reads]
    index = _search(history["key"][order], history["version"][order], key, version) - 1
    found = index >= 0
    match = order[index[found]]
    found[found] = (
        (history["key"][match] == key[found])
        & (history["version"][match] == version[found])
        & (history["start_ns"][match] <= history["end_ns"][reads][found])
    )
    mask[reads] = ~found
    return mask


def non_monotonic(history: History) -> Mask:
    """Mark reads by which a reader goes back: at an older version than it was at before.

    Per actor and key, in the order of start; an actor does one thing at a time. A reader that
    found the key absent is taken to be at the first delete not older than where it was, and went
    back only if no such delete had begun by the read's end. "Monotonic reads" of Terry et al.
    ("Session Guarantees for Weakly Consistent Replicated Data", 1994). O(n log n).
    """
    mask = np.zeros(len(history), np.bool_)
    reads = np.flatnonzero(placeable(history))
    columns = (history["start_ns"][reads], history["key"][reads], history["actor"][reads])
    order = reads[np.lexsort(columns)]
    if order.size == 0:
        return mask
    key, actor = history["key"][order], history["actor"][order]
    changed = (key[1:] != key[:-1]) | (actor[1:] != actor[:-1])
    group = np.concatenate([[0], np.cumsum(changed)])
    latest = _positions(history)[order]
    at = history["version"][order]
    seen, rank = np.unique(at, return_inverse=True)
    value = seen[_running_max(group, rank)]  # newest value so far
    absent = np.flatnonzero((at == 0) & (value > 0))
    following = _next_delete(history, key[absent], value[absent])
    at[absent] = np.where(following <= latest[absent], following, 0)
    places, rank = np.unique(at, return_inverse=True)
    best = places[_running_max(group, rank)]
    mask[order[1:]] = ~changed & (latest[1:] < best[:-1])
    return mask


def lost(history: History, keys: ArrayLike, versions: ArrayLike) -> Mask:
    """Mark acknowledged changes whose effect is gone from the map's final state.

    A change is lost when the key ends at an older version. A key that ends absent is at its newest
    delete, or at 0. The state must have been read after all writers stopped. O(n log n).

    Parameters
    ----------
    history
        Rows of all writers.
    keys, versions
        The final state, shapes (m,); a key that is not there is absent.
    """
    keys, versions = np.asarray(keys, np.uint64), np.asarray(versions, np.uint64)
    if keys.shape != versions.shape or keys.ndim != 1 or np.unique(keys).size != keys.size:
        raise BadInput("The final state needs one version per key, and no key twice.")
    order = np.argsort(keys)
    acknowledged = np.flatnonzero(committed(history))
    wanted = history["key"][acknowledged]
    index = np.searchsorted(keys, wanted, sorter=order)
    present = index < keys.size
    present[present] = keys[order[index[present]]] == wanted[present]
    final = np.zeros(acknowledged.size, np.uint64)
    final[present] = versions[order[index[present]]]
    gone = final == 0
    final[gone] = _newest(
        history,
        (history["op"] == Op.DELETE) & applied(history),
        "start_ns",
        wanted[gone],
        np.full(int(gone.sum()), np.iinfo(np.uint64).max, np.uint64),
    )
    mask = np.zeros(len(history), np.bool_)
    mask[acknowledged] = history["version"][acknowledged] > final
    return mask


def missed(history: History, follower: int) -> Mask:
    """Mark writes that a follower never saw although it looked before and after.

    Counted are the writes that started and were committed between the start of the follower's
    first read and the start of its last one; of these, a write is missed when no intact read of
    the follower has its key and version. Deletes do not count: absence names no version.
    O(n log n).

    Parameters
    ----------
    history
        Rows of the writers and of the follower.
    follower
        Actor whose reads count.
    """
    mask = np.zeros(len(history), np.bool_)
    reads = np.flatnonzero(placeable(history) & (history["actor"] == follower))
    if reads.size == 0:
        return mask
    begun = history["start_ns"][reads]
    writes = np.flatnonzero(
        (history["op"] == Op.WRITE)
        & committed(history)
        & (history["start_ns"] >= begun.min())
        & (history["end_ns"] <= begun.max())
    )
    order = reads[np.lexsort((history["version"][reads], history["key"][reads]))]
    key, version = history["key"][writes], history["version"][writes]
    index = _search(history["key"][order], history["version"][order], key, version) - 1
    seen = index >= 0
    match = order[index[seen]]
    seen[seen] = (history["key"][match] == key[seen]) & (history["version"][match] == version[seen])
    mask[writes] = ~seen
    return mask


def mixed_generations(history: History) -> pd.DataFrame:
    """Tell for each read of several keys whether it saw one generation or several.

    The rows of one such read share actor, start and end; their version is the generation that all
    keys get by one change. "Fractured reads" of Bailis et al. ("Scalable Atomic Visibility with
    RAMP Transactions", SIGMOD 2014). O(n log n).

    Returns
    -------
    pandas.DataFrame
        One row per read, ordered by start: actor, start_ns, end_ns, keys (int64), oldest, newest
        (uint64, 0 where a key was absent), mixed (bool).
    """
    rows = history[placeable(history)]
    rows = rows[np.lexsort((rows["actor"], rows["end_ns"], rows["start_ns"]))]
    same = np.ones(max(len(rows) - 1, 0), np.bool_)
    for name in ("actor", "start_ns", "end_ns"):
        same &= rows[name][1:] == rows[name][:-1]
    first = np.flatnonzero(np.concatenate([np.ones(min(len(rows), 1), np.bool_), ~same]))
    if first.size:
        oldest = np.minimum.reduceat(rows["version"], first)
        newest = np.maximum.reduceat(rows["version"], first)
    else:
        oldest = newest = np.empty(0, np.uint64)
    return pd.DataFrame(
        {
            "actor": rows["actor"][first],
            "start_ns": rows["start_ns"][first],
            "end_ns": rows["end_ns"][first],
            "keys": np.diff(np.append(first, len(rows))).astype(np.int64),
            "oldest": oldest,
            "newest": newest,
            "mixed": oldest != newest,
        }
    )


def accounting(*, produced: int, delivered: int, dropped: int, coalesced: int = 0) -> int:
    """Return how many events an event path cannot account for; 0 is the invariant. O(1).

    Parameters
    ----------
    produced, delivered, dropped
        Counters of the program and of the follower, read after the producer stopped and the path
        was drained.
    coalesced
        Events that the follower merged into a newer one of the same key.

    Returns
    -------
    int
        ``produced - delivered - dropped - coalesced``: positive where events vanished unnoticed,
        negative where some were counted twice.
    """
    parts = {
        "produced": produced,
        "delivered": delivered,
        "dropped": dropped,
        "coalesced": coalesced,
    }
    for name, count in parts.items():
        if count < 0:
            raise BadInput(f"The count of {name} events cannot be {count}; read the counter again.")
    return produced - delivered - dropped - coalesced


def told_of(changes: ArrayLike, told: ArrayLike, refused: ArrayLike) -> list[str]:
    """Say how often each of several changes was told of. O(n).

    Parameters
    ----------
    changes, told
        How many there were and were told, shapes (n,), one for each hook or group of hooks.
    refused
        Whether the kernel refused the hook, shape (n,).

    Returns
    -------
    list of str
        ``refused``, ``not tried`` (without a change), ``never``, ``sometimes``, ``once`` (each of
        them), ``too often``.
    """
    many, heard, no = np.asarray(changes, np.int64), np.asarray(told, np.int64), np.asarray(refused)
    words: list[str] = np.select(
        [no.astype(np.bool_), heard > many, many == 0, heard == 0, heard < many],
        ["refused", "too often", "not tried", "never", "sometimes"],
        "once",
    ).tolist()
    return words


def diverged(
    map_keys: ArrayLike, map_versions: ArrayLike, keys: ArrayLike, versions: ArrayLike
) -> Unsigned:
    """Return the keys in which a replica differs from its map, in order. O(n log n).

    Parameters
    ----------
    map_keys, map_versions
        The map, read once writes had stopped, shapes (m,).
    keys, versions
        The replica, shapes (n,); it has converged when nothing is returned.
    """
    sides = []
    for key, version, what in ((map_keys, map_versions, "map"), (keys, versions, "replica")):
        side = np.asarray(key, np.uint64), np.asarray(version, np.uint64)
        if side[0].ndim != 1 or side[0].shape != side[1].shape:
            raise BadInput(f"The {what} needs one version per key.")
        if np.unique(side[0]).size != side[0].size:
            raise BadInput(f"The {what} has a key twice; read it again.")
        sides.append(side)
    every, versions = (np.concatenate(columns) for columns in zip(*sides, strict=True))
    order = np.lexsort((versions, every))
    every, versions = every[order], versions[order]
    same = (every[1:] == every[:-1]) & (versions[1:] == versions[:-1])
    agreed = np.zeros(every.size, np.bool_)
    agreed[1:] |= same
    agreed[:-1] |= same
    return np.unique(every[~agreed])


def _positions(history: History) -> Unsigned:
    """Version that each read is at; meaningless in rows that are no placeable read."""
    at: Unsigned = history["version"].copy()
    absent = np.flatnonzero(placeable(history) & (at == 0))
    deletes = (history["op"] == Op.DELETE) & applied(history)
    at[absent] = _newest(
        history, deletes, "start_ns", history["key"][absent], history["end_ns"][absent]
    )
    return at


def _newest_before(history: History) -> Unsigned:
    """Newest version of its key that was committed when each read began; 0 where there is none."""
    newest = np.zeros(len(history), np.uint64)
    reads = np.flatnonzero(placeable(history))
    newest[reads] = _newest(
        history, committed(history), "end_ns", history["key"][reads], history["start_ns"][reads]
    )
    return newest


def _newest(
    history: History, chosen: Mask, clock: str, keys: Unsigned, until_ns: Unsigned
) -> Unsigned:
    """Largest version, among the chosen rows of a key, whose clock is at most the given time."""
    rows = np.flatnonzero(chosen)
    if rows.size == 0 or keys.size == 0:
        return np.zeros(keys.size, np.uint64)
    order = rows[np.lexsort((history[clock][rows], history["key"][rows]))]
    key = history["key"][order]
    _, group = np.unique(key, return_inverse=True)
    values, rank = np.unique(history["version"][order], return_inverse=True)
    newest = values[_running_max(group, rank)]
    index = _search(key, history[clock][order], keys, until_ns) - 1
    found = index >= 0
    found[found] = key[index[found]] == keys[found]
    answer = np.zeros(keys.size, np.uint64)
    answer[found] = newest[index[found]]
    return answer


def _next_delete(history: History, keys: Unsigned, versions: Unsigned) -> Unsigned:
    """Smallest version of a delete of the key not below the given one; 2**64 - 1 without one."""
    rows = np.flatnonzero((history["op"] == Op.DELETE) & applied(history))
    order = rows[np.lexsort((history["version"][rows], history["key"][rows]))]
    key = history["key"][order]
    index = _search(key, history["version"][order], keys, versions - np.uint64(1))
    found = index < key.size
    found[found] = key[index[found]] == keys[found]
    answer = np.full(keys.size, np.iinfo(np.uint64).max, np.uint64)
    answer[found] = history["version"][order][index[found]]
    return answer


def _search(
    major: Unsigned, minor: Unsigned, wanted_major: Unsigned, wanted_minor: Unsigned
) -> Ints:
    """Position after the last pair that is not larger than the wanted one; pairs are sorted."""
    n = major.size
    order = np.lexsort(
        (np.concatenate([minor, wanted_minor]), np.concatenate([major, wanted_major]))
    )
    passed = np.cumsum(order < n)  # equal pairs keep their order: the given before the wanted
    answer = np.empty(wanted_major.size, np.int64)
    asked = order >= n
    answer[order[asked] - n] = passed[asked]
    return answer


def _earliest_from(key: Unsigned, time: Unsigned) -> Unsigned:
    """Smallest time from each row to the last row of its key; keys are sorted."""
    times, rank = np.unique(time, return_inverse=True)
    _, group = np.unique(key, return_inverse=True)
    # A running minimum from the end is a running maximum of everything counted backwards.
    backwards = _running_max(group.max(initial=0) - group[::-1], times.size - 1 - rank[::-1])
    earliest: Unsigned = times[times.size - 1 - backwards][::-1]
    return earliest


def _running_max(group: Ints, rank: Ints) -> Ints:
    """Running maximum of small ranks within groups that are numbered in increasing order."""
    span = int(rank.max(initial=0)) + 1
    return np.maximum.accumulate(group.astype(np.int64) * span + rank) % span
