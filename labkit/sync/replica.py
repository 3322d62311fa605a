"""A copy of a map in one NumPy array: a batch of changes is applied without Python for each.

Keys are found by slots of an open-addressing hash table. A deleted key keeps its row and its
version there (a tombstone), so that an older change which arrives late cannot bring it back, until
a snapshot tells the same of it (see `Replica.resync`). ``labkit/kernel/native.c`` applies changes
and compares snapshots; where it cannot be compiled NumPy does, with the same outcome.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput
from labkit.kernel import native
from labkit.kernel.maps import Map, Snapshot, encode
from labkit.sync.changes import ChangeKind, Changes, change_dtype, versions_of

Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]
Words = list[npt.NDArray[np.uint64]]

_EMPTY = -1
_LEAST_ROWS = 1_024
_SLOTS_PER_ROW = 2  # half of the slots are free at least: probes stay short
_FEW_TOMBSTONES = 4_096
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
    version : str or None
        Name of the value's field that only grows with each write of a key. None: values have
        none; changes are numbered as they come (`number`), and snapshots compared by bytes.

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

    def __init__(self, table: Map, *, version: str | None = "version") -> None:
        self.key_dtype = table.key_dtype
        self.value_dtype = table.value_dtype
        self._field = version
        self._numbered = 0  # changes so far, where values have no version
        self.change_dtype = change_dtype(self.key_dtype, self.value_dtype)
        self._library = native.compiled()
        # Rows and slots as compiled code takes them, and what it counts as well as we do.
        self._table = native.Table()
        self.shared = ctypes.pointer(self._table)
        # Rows; the compiled code keeps as many bits of their keys beside each.
        self._slot_dtype = np.int32 if self._library is None else np.int64
        self._slots = np.full(_SLOTS_PER_ROW * _LEAST_ROWS, _EMPTY, self._slot_dtype)
        self._latest = np.empty(0, np.int64)  # scratch of `_apply_by_numpy`
        self._hold(np.zeros(_LEAST_ROWS, _row_dtype(table.key_size, self.value_dtype)))

    def __len__(self) -> int:
        return int(self._table.live)

    @property
    def nbytes(self) -> int:
        """Bytes that the copy takes, its index included."""
        return self._rows.nbytes + self._slots.nbytes + self._latest.nbytes

    @property
    def crowded(self) -> bool:
        """Whether rows of absent keys are many: a resync from a complete snapshot forgets some."""
        live = len(self)
        return int(self._table.used) - live > max(_FEW_TOMBSTONES, 2 * live)

    # -- reading -----------------------------------------------------------------------

    def get(self, key: Any) -> Reading | None:
        """Value of a key with version and age; None where it is absent."""
        row = int(self._find(encode([key], self.key_dtype, "key"))[0])
        if row == _EMPTY or not self._present[row]:
            return None
        age = time.monotonic_ns() - int(self._seen_ns[row])
        return Reading(self._values[row].copy(), int(self._versions[row]), age)

    def contents(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint64], npt.NDArray[Any]]:
        """Keys, versions and values of all keys that are present, in no order."""
        here = np.flatnonzero(self._present[: self._table.used])
        rows = self._rows[here]
        return self._as_keys(rows), rows["version"].copy(), rows["value"].copy()

    def differs(self, snapshot: Snapshot) -> int:
        """Keys that are here and not there, there and not here, or of another version."""
        rows = self._find(snapshot.keys)
        known = rows != _EMPTY
        rows, values = rows[known], snapshot.values[known]
        here = self._present[rows]
        if self._field is None:
            same = here & _same_bytes(self._values[rows], values)
        else:
            same = here & (self._versions[rows] == versions_of(values, self._field))
        return len(snapshot) - int(same.sum()) + len(self) - int(here.sum())

    # -- applying ----------------------------------------------------------------------

    def load(self, snapshot: Snapshot, *, started_ns: int) -> None:
        """Fill an empty replica with a snapshot, at the least cost.

        Parameters
        ----------
        snapshot : Snapshot
            It is copied.
        started_ns : int
            When the snapshot began, CLOCK_MONOTONIC nanoseconds. A change of a key that it
            lacks is passed over if it was committed before.

        Raises
        ------
        BadInput
            The replica is not empty: use `resync`.
        """
        if self._table.used:
            raise BadInput("This replica holds keys already: bring it up to date by resync.")
        if snapshot.complete:
            self._table.complete_ns = started_ns
        count = len(snapshot)
        rows = np.zeros(max(count, _LEAST_ROWS), self._rows.dtype)
        for column, word in zip(rows["key"].T, self._as_words(snapshot.keys), strict=True):
            column[:count] = word
        new = rows[:count]
        new["value"] = snapshot.values
        if self._field is None:
            new["missing_ns"] = started_ns  # as in `resync`
        else:
            new["version"] = versions_of(snapshot.values, self._field)
        new["known"] = new["present"] = True
        new["seen_ns"] = time.monotonic_ns()
        self._table.used = self._table.live = count
        self._hold(rows)
        self._index_anew()

    def number(self, changes: npt.NDArray[Any]) -> None:
        """Give changes, where values have no version, the order of their arrival as ``version``."""
        changes["version"] = np.arange(1, len(changes) + 1) + self._numbered
        self._numbered += len(changes)

    def apply(self, changes: Changes) -> Bools:
        """Apply a batch; a change that is older than what its key was at is passed over.

        A delete with version 0 names none (a hook sees no value): it is a delete of the newest
        version that came before it.

        Parameters
        ----------
        changes : numpy.ndarray
            Rows of ``change_dtype`` in the order of their arrival; several of one key may stand
            in it. ``seen_ns`` is filled in, and so is the version of a delete that named none.

        Returns
        -------
        numpy.ndarray
            bool, shape ``(n,)``: the change was newer than all before it of its key.

        Raises
        ------
        BadInput
            An array of something else, or one that cannot be written.
        """
        if changes.dtype.names != self.change_dtype.names or not changes.flags.writeable:
            raise BadInput(
                "Changes are an array of the replica's change_dtype that can be written, not one "
                f"of {changes.dtype}."
            )
        if len(changes) == 0:
            return np.zeros(0, np.bool_)
        if changes.dtype is not self.change_dtype and changes.dtype != self.change_dtype:
            # NumPy packs the fields closer when it joins arrays.
            laid_out = changes.astype(self.change_dtype)
            fresh = self.apply(laid_out)
            for name in ("seen_ns", "version"):
                changes[name] = laid_out[name]
            return fresh
        return self._apply_by_numpy(changes) if self._library is None else self._apply(changes)

    def _apply(self, changes: Changes) -> Bools:
        assert self._library is not None
        count, (stride,), done = len(changes), changes.strides, 0
        fresh = np.empty(count, np.bool_)
        first, said = native.address(changes), native.address(fresh)
        while True:
            done += self._library.lab_table_apply(
                self.shared, first + done * stride, stride, self._value_at, count - done,
                said + done,
            )  # fmt: skip
            if done == count:
                return fresh
            self._grow(self._table.used + 1)

    def _apply_by_numpy(self, changes: Changes) -> Bools:
        count = len(changes)
        rows = self._find_or_add(changes["key"])
        deletes = changes["kind"] == ChangeKind.DELETE
        any_deletes = bool(deletes.any())
        chosen: Bools | Rows
        position = np.arange(count)
        # A repeated index keeps the last assignment: this finds the last change of each key.
        if len(self._latest) < len(self._rows):
            self._latest = np.empty(len(self._rows), np.int64)
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
        self._table.live -= int(np.count_nonzero(self._present[target]))
        self._table.live += int(np.count_nonzero(~deletes[chosen]))
        self._present[target] = ~deletes[chosen]
        self._values[target] = changes["value"][chosen]
        now = time.monotonic_ns()
        self._seen_ns[target] = now
        changes["seen_ns"] = now
        return fresh

    def _all_in_order(self, changes: Changes, rows: Rows) -> bool:
        """Whether each change is newer than all before it of its key, deletes apart."""
        order = _grouped(rows, self._table.used)
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
        order = _grouped(rows, self._table.used)
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

        Where the rows of absent keys are too many (`crowded`), those are forgotten that a complete
        snapshot lacks, and whose last change had arrived before the complete snapshot in front of
        it began. Nothing older than such a change comes back by that. A late change that was
        committed before this snapshot began is passed over, since the new row that its key gets is
        one of a key that was missing then. One that was committed later is newer than what was
        forgotten. And a program that stops between its commit and its look at the clock would have
        to stand still from one resync to the next. So the copy takes memory for the keys that are
        present, and for those deleted within two resyncs, however many there have been.

        Parameters
        ----------
        snapshot : Snapshot
            Each key stands in it once. If it is complete, keys that it lacks are deleted here,
            unless their last change arrived after it had begun: such a key may have been inserted
            behind the reader. Nobody told of such a delete: its version is the last known one.
        started_ns : int
            When the snapshot began, CLOCK_MONOTONIC nanoseconds.

        Returns
        -------
        Resynced
            The changes, and the writes that they stand for; a key that was forgotten is a new one.
        """
        before_ns = self._table.complete_ns
        compare = self._compare_by_numpy if self._library is None else self._compare
        if self._field is None:
            versions = self._numbers_of_differing(snapshot)
        else:
            versions = versions_of(snapshot.values, self._field)
        rows, newer, steps = compare(snapshot, versions, started_ns)
        if self._field is None:
            steps = len(newer)
            # Events that are still on their way, and were committed before, tell of nothing newer.
            self._missing_ns[rows] = started_ns
        absent = np.zeros(0, np.int64)
        if snapshot.complete:
            self._table.complete_ns = max(started_ns, 1)
            used = slice(0, self._table.used)
            missing = self._present[used] & (self._seen_ns[used] < np.uint64(started_ns))
            missing[rows] = False
            absent = np.flatnonzero(missing)
        changes = np.zeros(len(newer) + len(absent), self.change_dtype)
        updates, deletes = changes[: len(newer)], changes[len(newer) :]
        updates["kind"], deletes["kind"] = ChangeKind.UPDATE, ChangeKind.DELETE
        updates["key"], updates["value"] = snapshot.keys[newer], snapshot.values[newer]
        updates["version"] = versions[newer]
        deletes["key"], deletes["version"] = (
            self._as_keys(self._rows[absent]),
            self._versions[absent],
        )
        self._present[absent] = False
        self._table.live -= len(absent)
        self._missing_ns[absent] = self._table.complete_ns
        now = time.monotonic_ns()
        self._seen_ns[rows[newer]] = self._seen_ns[absent] = now
        changes["seen_ns"] = now
        if snapshot.complete and self.crowded:
            self._forget(rows, before_ns)
        return Resynced(changes, steps + len(absent))

    def _compare(
        self, snapshot: Snapshot, versions: npt.NDArray[np.uint64], started_ns: int
    ) -> tuple[Rows, Rows, int]:
        assert self._library is not None
        count = len(snapshot)
        keys, values = np.ascontiguousarray(snapshot.keys), np.ascontiguousarray(snapshot.values)
        rows, newer = np.empty(count, np.int64), np.empty(count, np.int64)
        diff = native.Diff(
            keys=native.address(keys),
            values=native.address(values),
            versions=native.address(versions),
            count=count,
            started_ns=started_ns,
            rows=native.address(rows),
            newer=native.address(newer),
        )
        while diff.done < count:
            self._library.lab_table_diff(self.shared, ctypes.byref(diff))
            if diff.done < count:
                self._grow(self._table.used + 1)
        return rows, newer[: diff.news], int(diff.steps)

    def _compare_by_numpy(
        self, snapshot: Snapshot, versions: npt.NDArray[np.uint64], started_ns: int
    ) -> tuple[Rows, Rows, int]:
        """Take the newer entries over; answers the row of each, which they are, and their steps."""
        rows = self._find_or_add(snapshot.keys, distinct=True)
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
        self._table.live += int(np.count_nonzero(~self._present[target]))
        self._known[target] = True
        self._versions[target] = versions[newer]
        self._present[target] = True
        self._values[target] = snapshot.values[newer]
        return rows, newer, int(np.maximum(step, 1).sum())

    def _numbers_of_differing(self, snapshot: Snapshot) -> npt.NDArray[np.uint64]:
        """A new number for each entry whose bytes are not those that are here; else 0."""
        rows = self._find(snapshot.keys)
        # Row -1 is any row, and not asked about.
        same = (rows != _EMPTY) & self._present[rows]
        same &= _same_bytes(self._values[rows], snapshot.values)
        numbers = np.where(same, 0, np.cumsum(~same) + self._numbered).astype(np.uint64)
        self._numbered += int(np.count_nonzero(~same))
        return numbers

    def _forget(self, seen: Rows, before_ns: int) -> None:
        """Drop rows of absent keys that changed before then; not those that a snapshot showed."""
        used = slice(0, self._table.used)
        kept = self._present[used] | (self._seen_ns[used] >= np.uint64(before_ns))
        kept[seen] = True
        self._table.used = int(np.count_nonzero(kept))
        rows = np.zeros(max(self._table.used, _LEAST_ROWS), self._rows.dtype)
        rows[: self._table.used] = self._rows[used][kept]
        self._hold(rows)
        self._latest = np.empty(0, np.int64)
        self._index_anew()

    # -- the rows ----------------------------------------------------------------------

    def _hold(self, rows: npt.NDArray[np.void]) -> None:
        """Keep everything in these rows from now on."""
        self._rows = rows
        self._keys: Words = list(rows["key"].T)
        self._versions: npt.NDArray[np.uint64] = rows["version"]
        self._known: Bools = rows["known"]  # a change of this key was applied
        self._present: Bools = rows["present"]
        self._seen_ns: npt.NDArray[np.uint64] = rows["seen_ns"]
        # When the newest snapshot began in which the key was missing: what was committed before
        # that is older than its absence.
        self._missing_ns: npt.NDArray[np.uint64] = rows["missing_ns"]
        self._values: npt.NDArray[Any] = rows["value"]
        self._share()

    def _share(self) -> None:
        """Tell the compiled code where everything is."""
        self._value_at = self.change_dtype.fields["value"][1]  # type: ignore[index]
        table = self._table
        table.rows, table.room = native.address(self._rows), len(self._rows)
        table.slots, table.mask = native.address(self._slots), len(self._slots) - 1
        table.row_bytes, table.key_bytes = self._rows.dtype.itemsize, self.key_dtype.itemsize
        table.words, table.value_bytes = len(self._keys), self.value_dtype.itemsize
        table.value_at = self._rows.dtype.fields["value"][1]  # type: ignore[index]

    # -- the index ---------------------------------------------------------------------

    def _as_words(self, keys: npt.NDArray[Any]) -> Words:
        """Keys as columns of whole words, the rest zero: equal bytes are equal rows."""
        size, count = self.key_dtype.itemsize, len(keys)
        if size in (4, 8):
            return [np.ascontiguousarray(keys).view(f"u{size}").reshape(count).astype(np.uint64)]
        packed = np.zeros((count, 8 * len(self._keys)), np.uint8)
        packed[:, :size] = np.ascontiguousarray(keys).view(np.uint8).reshape(count, size)
        return [column.copy() for column in packed.view(np.uint64).T]

    def _as_keys(self, rows: npt.NDArray[np.void]) -> npt.NDArray[Any]:
        raw = rows["key"].copy().view(np.uint8).reshape(len(rows), 8 * len(self._keys))
        packed = np.ascontiguousarray(raw[:, : self.key_dtype.itemsize])
        return packed.reshape(-1).view(self.key_dtype.base).reshape(-1, *self.key_dtype.shape)

    def _first_slots(self, words: Words) -> npt.NDArray[np.int64]:
        mixed = words[0] * _MIX
        for word in words[1:]:
            mixed = (mixed ^ (mixed >> np.uint64(29)) ^ word) * _MIX
        mixed >>= np.uint64(32)
        mixed &= np.uint64(len(self._slots) - 1)
        return mixed.view(np.int64)

    def _find(self, keys: npt.NDArray[Any]) -> Rows:
        """Row of each key, or -1."""
        if self._library is None:
            return self._find_by_numpy(self._as_words(keys))
        packed, rows = np.ascontiguousarray(keys), np.empty(len(keys), np.int64)
        self._library.lab_table_find(
            self.shared, native.address(packed), self.key_dtype.itemsize, len(rows),
            native.address(rows),
        )  # fmt: skip
        return rows

    def _find_by_numpy(self, words: Words) -> Rows:
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

    def _find_or_add(self, keys: npt.NDArray[Any], *, distinct: bool = False) -> Rows:
        """Row of each key; keys that are not here yet get one. ``distinct``: none comes twice."""
        words = self._as_words(keys)
        rows = self._find_by_numpy(words)
        missing = np.flatnonzero(rows == _EMPTY)
        if missing.size == 0:
            return rows
        new, which = [word[missing] for word in words], np.arange(missing.size)
        if not distinct:
            joined = new[0] if len(new) == 1 else np.stack(new, axis=1).view(f"V{8 * len(new)}")
            _, first, which = np.unique(joined.reshape(-1), return_index=True, return_inverse=True)
            new = [word[first] for word in new]
        added = np.arange(self._table.used, self._table.used + len(new[0]))
        if self._table.used + len(added) > len(self._rows):
            self._grow(self._table.used + len(added))
        for column, word in zip(self._keys, new, strict=True):
            column[added] = word
        self._missing_ns[added] = self._table.complete_ns
        self._table.used += len(added)
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

    def _index_anew(self) -> None:
        """Make slots for all rows that there is room for."""
        bits = (len(self._rows) - 1).bit_length()
        self._slots = np.full(_SLOTS_PER_ROW << bits, _EMPTY, self._slot_dtype)
        self._share()
        if self._library is None:
            self._index(np.arange(self._table.used))
        else:
            self._library.lab_table_index(self.shared, 0)

    def _grow(self, rows: int) -> None:
        """Make room for that many rows at least, and for as many again as there are."""
        larger = np.zeros(max(rows, 2 * self._table.used), self._rows.dtype)
        larger[: self._table.used] = self._rows[: self._table.used]
        self._hold(larger)
        if _SLOTS_PER_ROW * len(larger) > len(self._slots):
            self._index_anew()


def _row_dtype(key_bytes: int, value: np.dtype[Any]) -> np.dtype[np.void]:
    """``struct row`` of native.c, and the value behind its key."""
    words = -(-key_bytes // 8)
    at = 32 + 8 * words
    return np.dtype(
        {
            "names": ["version", "seen_ns", "missing_ns", "known", "present", "key", "value"],
            "formats": ["u8", "u8", "u8", "?", "?", ("u8", (words,)), value],
            "offsets": [0, 8, 16, 24, 25, 32, at],
            "itemsize": at + -(-value.itemsize // 8) * 8,
        }
    )


def _same_bytes(some: npt.NDArray[Any], others: npt.NDArray[Any]) -> Bools:
    """Whether items of one dtype are equal byte by byte, shape ``(n,)``."""
    one, other = (
        np.ascontiguousarray(items).view(np.uint8).reshape(len(items), items[:1].nbytes)
        for items in (some, others)
    )
    same: Bools = (one == other).all(axis=1)
    return same


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
