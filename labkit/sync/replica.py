"""A copy of a map in NumPy arrays: a batch of changes is applied without a loop over rows.

Keys live in slots of an open-addressing hash table. A row, once a key's, stays that key's: a
deleted key keeps its version there (a tombstone), so that an older change which arrives late
cannot bring it back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput
from labkit.kernel.maps import Map, Snapshot, encode
from labkit.sync.changes import ChangeKind, Changes, change_dtype, versions_of

Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]
Words = list[npt.NDArray[np.uint64]]

_EMPTY = -1
_LEAST_ROWS = 1_024
_SLOTS_PER_ROW = 2  # half of the slots are free at least: probes stay short
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: spreads neighbouring keys


@dataclass(frozen=True)
class Reading:
    """Answer of a replica.

    Attributes
    ----------
    value
        A scalar or void of the map's value dtype.
    version : int
        Of that value.
    age_ns : int
        Nanoseconds since the replica learnt of this version.
    """

    value: Any
    version: int
    age_ns: int


class Resynced(NamedTuple):
    """What a snapshot changed in a replica.

    Attributes
    ----------
    changes : numpy.ndarray
        The changes that took effect, rows of `change_dtype`.
    steps : int
        How many writes they stand for, if each write adds 1 to the version of its key.
    """

    changes: Changes
    steps: int


class Replica:
    """Copy of one map, fed with changes in any order, that never goes back in version.

    Parameters
    ----------
    table : Map
        The map that is copied: its layouts are taken over, it is not read.
    version : str
        Name of the value's field that only grows with each write of a key.

    Examples
    --------
    >>> from labkit.kernel.maps import Map, MapKind
    >>> layout = np.dtype([("version", "u8"), ("action", "u8")])
    >>> with Map.create(MapKind.HASH, key="u4", value=layout, max_entries=8) as policy:
    ...     policy.update(80, (1, 7))
    ...     replica = Replica(policy)
    ...     replica.load(policy.snapshot(), started_ns=0)
    ...     int(replica.get(80).value["action"])
    7
    """

    def __init__(self, table: Map, *, version: str = "version") -> None:
        self.key_dtype = table.key_dtype
        self.value_dtype = table.value_dtype
        self._field = version
        self._used = 0
        self._keys: Words = [np.zeros(0, np.uint64) for _ in range(-(-table.key_size // 8))]
        self._versions = np.zeros(0, np.uint64)
        self._known = np.zeros(0, np.bool_)  # a change of this key was applied
        self._present = np.zeros(0, np.bool_)
        self._seen_ns = np.zeros(0, np.uint64)
        # When the newest snapshot began in which the key was missing: what was committed before
        # that is older than its absence.
        self._missing_ns = np.zeros(0, np.uint64)
        self._values = np.zeros(0, self.value_dtype)
        self._latest = np.zeros(0, np.int64)  # scratch of `apply`
        self._slots = np.zeros(0, np.int32)
        self._complete_ns = 0  # when the newest complete snapshot began
        self._grow(_LEAST_ROWS)

    def __len__(self) -> int:
        return int(self._present[: self._used].sum())

    @property
    def nbytes(self) -> int:
        """Bytes that the copy takes, its index included."""
        flags = self._known.nbytes + self._present.nbytes
        times = self._versions.nbytes + self._seen_ns.nbytes + self._missing_ns.nbytes
        index = sum(column.nbytes for column in self._keys) + self._slots.nbytes
        return index + flags + times + self._values.nbytes + self._latest.nbytes

    # -- reading -----------------------------------------------------------------------

    def get(self, key: Any) -> Reading | None:
        """Value of a key with version and age; None where it is absent."""
        row = int(self._find(self._as_words(encode([key], self.key_dtype, "key")))[0])
        if row == _EMPTY or not self._present[row]:
            return None
        age = time.monotonic_ns() - int(self._seen_ns[row])
        return Reading(self._values[row].copy(), int(self._versions[row]), age)

    def contents(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint64], npt.NDArray[Any]]:
        """Keys, versions and values of all keys that are present, in no order."""
        here = np.flatnonzero(self._present[: self._used])
        return self._as_keys(here), self._versions[here], self._values[here]

    def differs(self, snapshot: Snapshot) -> int:
        """Keys that are here and not there, there and not here, or of another version."""
        rows = self._find(self._as_words(snapshot.keys))
        known = rows != _EMPTY
        rows, versions = rows[known], versions_of(snapshot.values, self._field)[known]
        here = self._present[rows]
        same = here & (self._versions[rows] == versions)
        return len(snapshot) - int(same.sum()) + len(self) - int(here.sum())

    # -- applying ----------------------------------------------------------------------

    def load(self, snapshot: Snapshot, *, started_ns: int) -> None:
        """Fill an empty replica with a snapshot, at the least cost.

        Parameters
        ----------
        snapshot : Snapshot
            Its arrays become the replica's own: do not write into them afterwards.
        started_ns : int
            When the snapshot began, CLOCK_MONOTONIC nanoseconds. A change of a key that it
            lacks is passed over if it was committed before.

        Raises
        ------
        BadInput
            The replica is not empty: use `resync`.
        """
        if self._used:
            raise BadInput("This replica holds keys already: bring it up to date by resync.")
        count = len(snapshot)
        if snapshot.complete:
            self._complete_ns = started_ns
        if count == 0:
            return
        self._keys = self._as_words(snapshot.keys)
        self._versions = versions_of(snapshot.values, self._field)
        self._values = np.ascontiguousarray(snapshot.values)
        self._known = np.ones(count, np.bool_)
        self._present = np.ones(count, np.bool_)
        self._seen_ns = np.full(count, time.monotonic_ns(), np.uint64)
        self._missing_ns = np.zeros(count, np.uint64)
        self._latest = np.empty(count, np.int64)
        self._used = count
        self._index_anew(count)

    def apply(self, changes: Changes) -> Bools:
        """Apply a batch; a change that is older than what its key was at is passed over.

        A delete with version 0 names none (a hook sees no value): it is a delete of the newest
        version that came before it.

        Parameters
        ----------
        changes : numpy.ndarray
            Rows of `labkit.sync.changes.change_dtype` in the order of their arrival; several
            of one key may stand in it. ``seen_ns`` is filled in, and so is the version of a
            delete that named none.

        Returns
        -------
        numpy.ndarray
            bool, shape ``(n,)``: the change was newer than all before it of its key.
        """
        count = len(changes)
        if count == 0:
            return np.zeros(0, np.bool_)
        rows = self._find_or_add(self._as_words(changes["key"]))
        deletes = changes["kind"] == ChangeKind.DELETE
        any_deletes = bool(deletes.any())
        chosen: Bools | Rows
        position = np.arange(count)
        # A repeated index keeps the last assignment: this finds the last change of each key.
        latest = self._latest
        latest[rows] = position
        last = latest[rows] == position
        if last.all() and not any_deletes:
            version = changes["version"]
            fresh = ~self._known[rows] | (version > self._versions[rows])
            committed = changes["committed_ns"]
            fresh &= (committed >= self._missing_ns[rows]) | (committed == 0)
            target, chosen = rows[fresh], fresh
        elif not any_deletes and self._all_in_order(changes, rows):
            version, fresh = changes["version"], np.ones(count, np.bool_)
            chosen = np.flatnonzero(last)
            target = rows[chosen]
        else:
            fresh, version = self._fresh_in_order(changes, rows, deletes)
            # Of each key, its last change that was newer than all before it.
            position = np.flatnonzero(fresh)
            latest[rows[position]] = position
            chosen = np.zeros(count, np.bool_)
            chosen[position[latest[rows[position]] == position]] = True
            target = rows[chosen]
        self._known[target] = True
        self._versions[target] = version[chosen]
        self._present[target] = ~deletes[chosen]
        self._values[target] = changes["value"][chosen]
        now = time.monotonic_ns()
        self._seen_ns[target] = now
        changes["seen_ns"] = now
        return fresh

    def _all_in_order(self, changes: Changes, rows: Rows) -> bool:
        """Whether each change is newer than all before it of its key, deletes apart."""
        order = _grouped(rows, self._used)
        row, version = rows[order], changes["version"][order]
        further = row[1:] == row[:-1]
        if (further & (version[1:] <= version[:-1])).any():
            return False
        first = np.flatnonzero(np.append(True, ~further))
        head = row[first]
        if (self._known[head] & (version[first] <= self._versions[head])).any():
            return False
        missing_ns = int(self._missing_ns[head].max())
        return not missing_ns or int(changes["committed_ns"].min()) >= missing_ns

    def _fresh_in_order(
        self, changes: Changes, rows: Rows, deletes: Bools
    ) -> tuple[Bools, npt.NDArray[np.uint64]]:
        """Which changes are newer than all before them of their key, and their versions."""
        order = _grouped(rows, self._used)
        row, delete = rows[order], deletes[order].astype(np.uint64)
        version = changes["version"][order]
        committed = changes["committed_ns"][order]
        first = np.append(True, row[1:] != row[:-1])
        group = np.cumsum(first)
        # One number for all that orders the changes of a key: 0 before any is known, and behind
        # each version its delete.
        known = 2 * self._versions[row] + ~self._present[row] + 1
        known[~self._known[row]] = 0
        state = 2 * version + delete + 1
        # What was committed before the key was found missing is older than that.
        untimely = (committed < self._missing_ns[row]) & (committed > 0)
        state[untimely] = 0
        untold = (delete == 1) & (version == 0)
        if untold.any():
            state[untold] = 0
            before = _newest_before(group, first, known, state)
            at = before[untold]
            version[untold] = (np.maximum(at, 1) - 1) // 2
            state[untold] = np.where(at > 0, 2 * version[untold] + 2, 0)
            state[untimely] = 0
            changes["version"][order[untold]] = version[untold]
        answer, versions = np.empty(len(rows), np.bool_), np.empty(len(rows), np.uint64)
        answer[order] = state > _newest_before(group, first, known, state)
        versions[order] = version
        return answer, versions

    def resync(self, snapshot: Snapshot, *, started_ns: int) -> Resynced:
        """Bring the copy to a snapshot; answers what that changed.

        Parameters
        ----------
        snapshot : Snapshot
            If it is complete, keys that it lacks are deleted here, unless their last change
            arrived after it had begun: such a key may have been inserted behind the reader.
            Nobody told of such a delete: its version is the last known one.
        started_ns : int
            When the snapshot began, CLOCK_MONOTONIC nanoseconds.

        Returns
        -------
        Resynced
            The changes, and the writes that they stand for.
        """
        versions = versions_of(snapshot.values, self._field)
        rows = self._find_or_add(self._as_words(snapshot.keys), distinct=True)
        known = np.where(self._known[rows], self._versions[rows], 0)
        # A delete that named no version may have been that of an older one.
        back = ~self._present[rows] & (versions == known)
        back &= self._seen_ns[rows] < np.uint64(started_ns)
        newer = np.flatnonzero(~self._known[rows] | (versions > known) | back)
        target = rows[newer]
        # A delete that was inferred is counted already when the key comes back.
        step = (versions[newer] - known[newer]).astype(np.int64)
        inferred = self._known[target] & ~self._present[target] & (self._missing_ns[target] > 0)
        step -= inferred.astype(np.int64)
        steps = int(np.maximum(step, 1).sum())
        absent = np.zeros(0, np.int64)
        if snapshot.complete:
            self._complete_ns = max(started_ns, 1)
            used = slice(0, self._used)
            missing = self._present[used] & (self._seen_ns[used] < np.uint64(started_ns))
            missing[rows] = False
            absent = np.flatnonzero(missing)
        changes = np.zeros(
            len(target) + len(absent), change_dtype(self.key_dtype, self.value_dtype)
        )
        updates, deletes = changes[: len(target)], changes[len(target) :]
        updates["kind"], deletes["kind"] = ChangeKind.UPDATE, ChangeKind.DELETE
        updates["key"], deletes["key"] = snapshot.keys[newer], self._as_keys(absent)
        updates["version"], deletes["version"] = versions[newer], self._versions[absent]
        updates["value"] = snapshot.values[newer]
        self._known[target] = True
        self._versions[target] = versions[newer]
        self._present[target] = True
        self._values[target] = snapshot.values[newer]
        self._present[absent] = False
        self._missing_ns[absent] = self._complete_ns
        now = time.monotonic_ns()
        self._seen_ns[target] = self._seen_ns[absent] = now
        changes["seen_ns"] = now
        return Resynced(changes, steps + len(absent))

    # -- the index ---------------------------------------------------------------------

    def _as_words(self, keys: npt.NDArray[Any]) -> Words:
        """Keys as columns of whole words, the rest zero: equal bytes are equal rows."""
        size, count = self.key_dtype.itemsize, len(keys)
        if size in (4, 8):
            return [np.ascontiguousarray(keys).view(f"u{size}").reshape(count).astype(np.uint64)]
        packed = np.zeros((count, 8 * len(self._keys)), np.uint8)
        packed[:, :size] = np.ascontiguousarray(keys).view(np.uint8).reshape(count, size)
        return [column.copy() for column in packed.view(np.uint64).T]

    def _as_keys(self, rows: Rows) -> npt.NDArray[Any]:
        words = np.stack([column[rows] for column in self._keys], axis=1)
        raw = words.view(np.uint8).reshape(len(rows), 8 * len(self._keys))
        packed = np.ascontiguousarray(raw[:, : self.key_dtype.itemsize])
        return packed.reshape(-1).view(self.key_dtype.base).reshape(-1, *self.key_dtype.shape)

    def _first_slots(self, words: Words) -> npt.NDArray[np.int64]:
        mixed = words[0] * _MIX
        for word in words[1:]:
            mixed = (mixed ^ (mixed >> np.uint64(29)) ^ word) * _MIX
        mixed >>= np.uint64(32)
        mixed &= np.uint64(len(self._slots) - 1)
        return mixed.view(np.int64)

    def _find(self, words: Words) -> Rows:
        """Row of each key, or -1."""
        slots = self._first_slots(words)
        rows = self._slots[slots].astype(np.int64)
        mask = len(self._slots) - 1
        pending = np.flatnonzero((rows != _EMPTY) & self._other(rows, words))
        slots = slots[pending]
        while pending.size:
            slots = (slots + 1) & mask
            candidates = self._slots[slots].astype(np.int64)
            rows[pending] = candidates
            further = candidates != _EMPTY
            further &= self._other(candidates, [word[pending] for word in words])
            pending, slots = pending[further], slots[further]
        return rows

    def _other(self, rows: Rows, words: Words) -> Bools:
        """Whether the keys of rows are other ones; of no meaning in rows that are -1."""
        other: Bools = self._keys[0][rows] != words[0]
        for column, word in zip(self._keys[1:], words[1:], strict=True):
            other |= column[rows] != word
        return other

    def _find_or_add(self, words: Words, *, distinct: bool = False) -> Rows:
        """Row of each key; keys that are not here yet get one. ``distinct``: none comes twice."""
        rows = self._find(words)
        missing = np.flatnonzero(rows == _EMPTY)
        if missing.size == 0:
            return rows
        new, which = [word[missing] for word in words], np.arange(missing.size)
        if not distinct:
            joined = new[0] if len(new) == 1 else np.stack(new, axis=1).view(f"V{8 * len(new)}")
            _, first, which = np.unique(joined.reshape(-1), return_index=True, return_inverse=True)
            new = [word[first] for word in new]
        added = np.arange(self._used, self._used + len(new[0]))
        if self._used + len(added) > len(self._versions):
            self._grow(self._used + len(added))
        for column, word in zip(self._keys, new, strict=True):
            column[added] = word
        self._missing_ns[added] = self._complete_ns
        self._used += len(added)
        if _SLOTS_PER_ROW * self._used > len(self._slots):
            self._index_anew(self._used)
        else:
            self._index(added)
        rows[missing] = added[which]
        return rows

    def _index(self, rows: Rows) -> None:
        """Give every row a slot; none of their keys has one yet."""
        mask = len(self._slots) - 1
        slots = self._first_slots([column[rows] for column in self._keys])
        while rows.size:
            free = self._slots[slots] == _EMPTY
            # Several rows may want one free slot: the last one written has it, the others go on.
            self._slots[slots[free]] = rows[free]
            further = self._slots[slots] != rows
            rows, slots = rows[further], (slots[further] + 1) & mask

    def _index_anew(self, rows: int) -> None:
        self._slots = np.full(_SLOTS_PER_ROW << (rows - 1).bit_length(), _EMPTY, np.int32)
        self._index(np.arange(self._used))

    def _grow(self, rows: int) -> None:
        """Make room for that many rows at least, and for as many again as there are."""
        room = max(rows, 2 * self._used)

        def grown(part: npt.NDArray[Any]) -> npt.NDArray[Any]:
            larger = np.zeros((room, *part.shape[1:]), part.dtype)
            larger[: self._used] = part[: self._used]
            return larger

        self._keys = [grown(column) for column in self._keys]
        self._versions = grown(self._versions)
        self._known = grown(self._known)
        self._present = grown(self._present)
        self._seen_ns = grown(self._seen_ns)
        self._missing_ns = grown(self._missing_ns)
        self._values = grown(self._values)
        self._latest = np.empty(room, np.int64)
        if _SLOTS_PER_ROW * room > len(self._slots):
            self._index_anew(room)


def _grouped(rows: Rows, used: int) -> Rows:
    """Order in which changes of one row stand together, the earlier first."""
    # Of 16 bits NumPy's stable sort is a radix sort.
    return np.argsort(rows.astype(np.uint16) if used <= 1 << 16 else rows, kind="stable")


def _newest_before(
    group: npt.NDArray[np.int64],
    first: Bools,
    known: npt.NDArray[np.uint64],
    state: npt.NDArray[np.uint64],
) -> npt.NDArray[np.uint64]:
    """Largest state of the same group before each row, what was known before the batch included."""
    newest = np.maximum(known, state)
    falls = (newest[1:] < newest[:-1]) & ~first[1:]
    if falls.any():
        values, rank = np.unique(newest, return_inverse=True)
        newest = values[np.maximum.accumulate(group * len(values) + rank) % len(values)]
    return np.where(first, known, np.append(known[:1], newest[:-1]))
