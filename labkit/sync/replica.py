"""A copy of a map in NumPy arrays: a batch of changes is applied without a loop over rows.

Keys live in slots of an open-addressing hash table. A slot, once a key's, stays that key's:
a deleted key keeps its version there (a tombstone), so that an older change which arrives
late cannot bring it back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.kernel.maps import Map, Snapshot, encode
from labkit.sync.changes import ChangeKind, Changes, change_dtype, versions_of

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
    ...     _ = replica.resync(policy.snapshot(), started_ns=0)
    ...     int(replica.get(80).value["action"])
    7
    """

    def __init__(self, table: Map, *, version: str = "version") -> None:
        self.key_dtype = table.key_dtype
        self.value_dtype = table.value_dtype
        self._field = version
        self._words = -(-table.key_size // 8)
        self._used = 0
        self._keys = np.zeros((0, self._words), np.uint64)
        self._versions = np.zeros(0, np.uint64)
        self._known = np.zeros(0, np.bool_)  # a change of this key was applied
        self._present = np.zeros(0, np.bool_)
        self._seen_ns = np.zeros(0, np.uint64)
        self._values = np.zeros(0, self.value_dtype)
        self._slots = np.zeros(0, np.int64)
        self._make_room(_LEAST_ROWS)

    def __len__(self) -> int:
        return int(self._present[: self._used].sum())

    @property
    def nbytes(self) -> int:
        """Bytes that the copy takes, its index included."""
        parts = (self._keys, self._versions, self._known, self._present, self._seen_ns)
        return sum(part.nbytes for part in (*parts, self._values, self._slots))

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
        theirs = self._find(self._as_words(snapshot.keys))
        versions = versions_of(snapshot.values, self._field)
        known = theirs != _EMPTY
        same = np.zeros(len(theirs), np.bool_)
        rows = theirs[known]
        same[known] = self._present[rows] & (self._versions[rows] == versions[known])
        return int((~same).sum()) + len(self) - int(self._present[rows].sum())

    # -- applying ----------------------------------------------------------------------

    def apply(self, changes: Changes) -> int:
        """Apply a batch; changes that are older than what is here are passed over.

        Parameters
        ----------
        changes : numpy.ndarray
            Rows of `labkit.sync.changes.change_dtype`; several of one key may stand in it.

        Returns
        -------
        int
            Changes that took effect.
        """
        if len(changes) == 0:
            return 0
        rows = self._find_or_add(self._as_words(changes["key"]))
        # The newest change of each key alone decides: order the rows so that it comes last.
        order = np.lexsort((changes["kind"], changes["version"], rows))
        last = order[np.append(rows[order][1:] != rows[order][:-1], True)]
        target = rows[last]
        version, deletes = changes["version"][last], changes["kind"][last] == ChangeKind.DELETE
        newer = ~self._known[target] | (version > self._versions[target])
        gone = deletes & (version == self._versions[target]) & self._present[target]
        chosen = newer | gone
        target, last, deletes = target[chosen], last[chosen], deletes[chosen]
        self._known[target] = True
        self._versions[target] = version[chosen]
        self._present[target] = ~deletes
        self._seen_ns[target] = changes["seen_ns"][last]
        self._values[target] = changes["value"][last]
        return int(chosen.sum())

    def resync(self, snapshot: Snapshot, *, started_ns: int) -> Changes:
        """Bring the copy to a snapshot; answers what that changed.

        Parameters
        ----------
        snapshot : Snapshot
            If it is complete, keys that it lacks are deleted here, unless their last change
            arrived after it had begun: such a key may have been inserted behind the reader.
        started_ns : int
            When the snapshot began, CLOCK_MONOTONIC nanoseconds.

        Returns
        -------
        numpy.ndarray
            The changes that took effect, rows of `change_dtype`.
        """
        dtype = change_dtype(self.key_dtype, self.value_dtype)
        now = time.monotonic_ns()
        versions = versions_of(snapshot.values, self._field)
        rows = self._find_or_add(self._as_words(snapshot.keys), distinct=True)
        newer = ~self._known[rows] | (versions > self._versions[rows])
        target = rows[newer]
        updates = np.zeros(len(target), dtype)
        updates["kind"] = ChangeKind.UPDATE
        updates["key"] = snapshot.keys[newer]
        updates["version"] = versions[newer]
        updates["seen_ns"] = now
        updates["value"] = snapshot.values[newer]
        self._known[target] = True
        self._versions[target] = versions[newer]
        self._present[target] = True
        self._seen_ns[target] = now
        self._values[target] = snapshot.values[newer]
        if not snapshot.complete:
            return updates
        listed = np.zeros(self._used, np.bool_)
        listed[rows] = True
        used = slice(0, self._used)
        missing = self._present[used] & ~listed & (self._seen_ns[used] < np.uint64(started_ns))
        absent = np.flatnonzero(missing)
        deletes = np.zeros(len(absent), dtype)
        deletes["kind"] = ChangeKind.DELETE
        deletes["key"] = self._as_keys(absent)
        deletes["version"] = self._versions[absent]
        deletes["seen_ns"] = now
        self._present[absent] = False
        self._seen_ns[absent] = now
        return np.concatenate([updates, deletes])

    # -- the index ---------------------------------------------------------------------

    def _as_words(self, keys: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
        """Keys as rows of whole words, the rest zero: equal bytes are equal rows."""
        size = self.key_dtype.itemsize
        packed = np.zeros((len(keys), 8 * self._words), np.uint8)
        packed[:, :size] = np.ascontiguousarray(keys).view(np.uint8).reshape(len(keys), size)
        return packed.view(np.uint64)

    def _as_keys(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        raw = self._keys[rows].view(np.uint8).reshape(len(rows), 8 * self._words)
        packed = np.ascontiguousarray(raw[:, : self.key_dtype.itemsize])
        return packed.view(self.key_dtype).reshape(len(rows))

    def _first_slots(self, words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        mixed = words[:, 0] * _MIX
        for i in range(1, self._words):
            mixed = (mixed ^ (mixed >> np.uint64(29)) ^ words[:, i]) * _MIX
        mask = np.uint64(len(self._slots) - 1)
        return ((mixed >> np.uint64(32)) & mask).astype(np.int64)

    def _find(self, words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Row of each key, or -1."""
        rows = np.full(len(words), _EMPTY, np.int64)
        mask = len(self._slots) - 1
        pending, slots = np.arange(len(words)), self._first_slots(words)
        while pending.size:
            candidates = self._slots[slots]
            taken = candidates != _EMPTY
            match = taken.copy()
            match[taken] = (self._keys[candidates[taken]] == words[pending[taken]]).all(axis=1)
            rows[pending[match]] = candidates[match]
            further = taken & ~match
            pending, slots = pending[further], (slots[further] + 1) & mask
        return rows

    def _find_or_add(
        self, words: npt.NDArray[np.uint64], *, distinct: bool = False
    ) -> npt.NDArray[np.int64]:
        """Row of each key; keys that are not here yet get one. ``distinct``: none comes twice."""
        rows = self._find(words)
        missing = np.flatnonzero(rows == _EMPTY)
        if missing.size == 0:
            return rows
        new, which = words[missing], np.arange(missing.size)
        if not distinct:
            flat = new.reshape(-1) if self._words == 1 else new.view(f"V{8 * self._words}").ravel()
            _, first, which = np.unique(flat, return_index=True, return_inverse=True)
            new = new[first]
        if self._used + len(new) > len(self._versions):
            self._make_room(self._used + len(new))
        added = np.arange(self._used, self._used + len(new))
        self._keys[added] = new
        self._used += len(new)
        self._index(added)
        rows[missing] = added[which]
        return rows

    def _index(self, rows: npt.NDArray[np.int64]) -> None:
        """Give every row a slot; none of their keys has one yet."""
        mask = len(self._slots) - 1
        slots = self._first_slots(self._keys[rows])
        while rows.size:
            free = self._slots[slots] == _EMPTY
            # Several rows may want one free slot: the last one written has it, the others go on.
            self._slots[slots[free]] = rows[free]
            further = self._slots[slots] != rows
            rows, slots = rows[further], (slots[further] + 1) & mask

    def _make_room(self, rows: int) -> None:
        """Grow to a power of two of rows at least, and index what is here anew."""
        room = 1 << (rows - 1).bit_length()

        def grown(part: npt.NDArray[Any]) -> npt.NDArray[Any]:
            larger = np.zeros((room, *part.shape[1:]), part.dtype)
            larger[: self._used] = part[: self._used]
            return larger

        self._keys = grown(self._keys)
        self._versions = grown(self._versions)
        self._known = grown(self._known)
        self._present = grown(self._present)
        self._seen_ns = grown(self._seen_ns)
        self._values = grown(self._values)
        self._slots = np.full(_SLOTS_PER_ROW * room, _EMPTY, np.int64)
        self._index(np.arange(self._used))
