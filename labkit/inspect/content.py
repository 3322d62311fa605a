"""What stands in a map: as much of it as can be read in a bounded time, and what it gives away.

Nothing here changes the map: a batch copies elements under the lock of their bucket, and a lookup
by bpf(2) leaves the reference bit of an LRU element as it is (kernel/bpf/hashtab.c,
``htab_lru_map_lookup_elem_sys`` and ``bpf_percpu_hash_copy``).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from ctypes import byref, c_uint32
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from labkit.inspect.diagnostic import Diagnostic, listed
from labkit.kernel import libbpf
from labkit.kernel.btf import Field
from labkit.kernel.libbpf import BatchOpts, MapKind
from labkit.kernel.maps import PER_CPU, Map, Snapshot, map_error

MOST_ENTRIES: Final = 65_536
"""So many entries are kept and judged; those behind them are counted."""

MOST_SECONDS: Final = 2.0
"""Reading ends after that time, wherever it is."""

_MOST_BYTES: Final = 64 << 20
_BY_BUCKET: Final = {
    MapKind.HASH, MapKind.PERCPU_HASH, MapKind.LRU_HASH, MapKind.LRU_PERCPU_HASH,
}  # fmt: skip
_SHOWN: Final = 3
_MAJORITY: Final = 0.6
_FEWEST_KEYS: Final = 4


@dataclass(frozen=True)
class Content:
    """What was read of a map.

    Attributes
    ----------
    snapshot : Snapshot
        The first entries, `MOST_ENTRIES` at most; ``complete`` says whether they are all.
    counted : int
        Entries seen, those behind the first ones too.
    whole : bool
        Whether the reading came to the end, so that ``counted`` is the number of entries.
    """

    snapshot: Snapshot
    counted: int
    whole: bool

    def __str__(self) -> str:
        """How much was read, for a terminal."""
        kept = len(self.snapshot)
        if self.whole and kept == self.counted:
            words = {0: "no entry is there to be read", 1: "its only entry was read"}
            return words.get(kept, f"all {kept:,} entries were read")
        rest = "all were counted" if self.whole else f"{self.counted:,} or more are there"
        return f"the first {kept:,} entries were read, {rest}"


def readable(table: Map) -> bool:
    """Whether an entry of a map is small enough to be read."""
    cpus = libbpf.possible_cpus() if table.kind in PER_CPU else 1
    return table.key_size + cpus * table.value_size <= _MOST_BYTES


def read(
    table: Map, most_entries: int = MOST_ENTRIES, most_seconds: float = MOST_SECONDS
) -> Content:
    """Read the first entries of a map, and count the others, within a bound of time.

    Parameters
    ----------
    table : Map
        Of a type whose keys can be listed.
    most_entries : int
        Entries that are kept.
    most_seconds : float
        Bound of the whole reading, seconds; one batch may end later.

    Returns
    -------
    Content
        Keys and values have the map's layouts; per-CPU values are of shape ``(n, possible_cpus)``.

    Raises
    ------
    MapError
        The kernel's refusal: NotPermitted for a map that user space may not read.
    """
    reading = _Reading(table, most_entries, time.monotonic() + most_seconds)
    return reading.by_batch() or reading.by_key()


class _Reading:
    """One pass over a map; the buffers of a batch are used again and again."""

    def __init__(self, table: Map, most_entries: int, deadline: float) -> None:
        self._table, self._most, self._deadline = table, most_entries, deadline
        self._cpus = libbpf.possible_cpus() if table.kind in PER_CPU else 1
        per_cpu = table.kind in PER_CPU
        self._stride = -(-table.value_size // 8) * 8 if per_cpu else table.value_size
        self._entry_bytes = self._cpus * self._stride
        room = _MOST_BYTES // (table.key_size + self._entry_bytes + 1) + 1
        self._most = min(most_entries, room)
        self._keys: list[bytes] = []
        self._values: list[bytes] = []
        self._kept = self._counted = 0

    def by_batch(self) -> Content | None:
        """None where this type (or this kernel) has no batch for it."""
        table, lib = self._table, libbpf.api()
        # A hash copies a bucket at once; the other types walk to each key, a trie from its root.
        at_once = 16_384 if table.kind in _BY_BUCKET else 1_024
        capacity = max(1, min(table.max_entries, self._most, at_once))
        place = np.zeros(max(table.key_size, 8), np.uint8)
        start: int | None = None
        options, count = BatchOpts(), c_uint32()
        keys, values = self._room(capacity)
        while True:
            count.value = capacity
            result = lib.bpf_map_lookup_batch(
                table.fd, start, place.ctypes.data, keys.ctypes.data, values.ctypes.data,
                byref(count), byref(options),
            )  # fmt: skip
            if start is None and -result in (
                errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP, libbpf.ENOTSUPP,
            ):  # fmt: skip
                return None
            if result == -errno.ENOSPC:  # one bucket holds more than there is room for
                capacity *= 2
                keys, values = self._room(capacity)
                continue
            if result < 0 and result != -errno.ENOENT:
                raise map_error(-result, f"Reading map {table.name} (id {table.id}) by batch")
            self._keep(keys.tobytes(), values.tobytes(), count.value)
            if result == -errno.ENOENT:
                return self._content(whole=True)
            if time.monotonic() > self._deadline:
                return self._content(whole=False)
            start = place.ctypes.data

    def by_key(self) -> Content:
        table, lib = self._table, libbpf.api()
        previous: npt.NDArray[np.uint8] | None = None
        following, value = np.zeros(table.key_size, np.uint8), self._room(1)[1]
        whole = False
        for _ in range(2 * table.max_entries + 16):
            at = None if previous is None else previous.ctypes.data
            result = lib.bpf_map_get_next_key(table.fd, at, following.ctypes.data)
            if result == -errno.ENOENT:
                whole = True
                break
            if result < 0:
                raise map_error(-result, f"Listing the keys of map {table.name} (id {table.id})")
            if self._kept < self._most:
                answer = lib.bpf_map_lookup_elem(table.fd, following.ctypes.data, value.ctypes.data)
                if answer == 0:
                    self._keep(following.tobytes(), value.tobytes(), 1)
                elif answer != -errno.ENOENT:
                    raise map_error(-answer, f"Reading map {table.name} (id {table.id})")
            else:
                self._counted += 1
            previous = following.copy()
            if time.monotonic() > self._deadline:
                break
        return self._content(whole)

    def _room(self, count: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        size = count * self._table.key_size
        return np.empty(size, np.uint8), np.empty(count * self._entry_bytes, np.uint8)

    def _keep(self, keys: bytes, values: bytes, count: int) -> None:
        kept = min(count, self._most - self._kept)
        if kept > 0:
            self._keys.append(keys[: kept * self._table.key_size])
            self._values.append(values[: kept * self._entry_bytes])
            self._kept += kept
        self._counted += count

    def _content(self, whole: bool) -> Content:
        table, count = self._table, self._kept
        keys = _viewed(np.frombuffer(b"".join(self._keys), np.uint8), table.key_dtype)
        raw = np.frombuffer(b"".join(self._values), np.uint8)
        if table.kind in PER_CPU:
            slots = raw.reshape(count, self._cpus, self._stride)[:, :, : table.value_size]
            values = _viewed(np.ascontiguousarray(slots).reshape(-1), table.value_dtype)
            values = values.reshape(count, self._cpus, *table.value_dtype.shape)
        else:
            values = _viewed(raw, table.value_dtype)
        whole_bucket = table.kind is not MapKind.LPM_TRIE
        complete = whole and whole_bucket and count == self._counted
        return Content(Snapshot(keys, values, complete, 0), self._counted, whole)


def _viewed(raw: npt.NDArray[np.uint8], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return raw.view(dtype.base).reshape(-1, *dtype.shape)


# -- judging -----------------------------------------------------------------------------


def bytes_of(rows: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The bytes of an array, one row for each of its first axis, padding as it stands."""
    size = rows.nbytes // max(len(rows), 1)
    return np.frombuffer(rows.tobytes(), np.uint8).reshape(len(rows), size)


def left_over_texts(keys: npt.NDArray[Any], fields: tuple[Field, ...]) -> Iterator[Diagnostic]:
    """Bytes behind the NUL of a text in keys, which are compared and hashed like the text.

    A field of type ``char[]`` counts as text where every key has printable characters in front of
    its first NUL: binary data in such a field is left alone.

    Parameters
    ----------
    keys : numpy.ndarray
        Keys of a hash table, as they were read.
    fields : tuple of Field
        Leaves of the key's type.

    Yields
    ------
    Diagnostic
        For each such field: a *cause* where one text stands in the map under several keys that
        differ in those bytes alone, else a *risk*.
    """
    raw = bytes_of(keys)
    texts = [one for one in fields if one.is_text and _holds_text(raw, one)]
    if not len(raw) or not texts:
        return
    meant = raw.copy()
    for one in texts:
        part = meant[:, one.offset : one.offset + one.size]
        part[_behind_nul(part)] = 0
    _, alike, times = np.unique(meant, axis=0, return_inverse=True, return_counts=True)
    several = times[alike.reshape(-1)] > 1
    for one in texts:
        part = raw[:, one.offset : one.offset + one.size]
        dirty = (_behind_nul(part) & (part != 0)).any(axis=1)
        if not dirty.any():
            continue
        twice = dirty & several
        words = (
            f"{int(dirty.sum()):,} of {len(raw):,} keys have left-over bytes behind the NUL of "
            f"the text {one.path} (char[{one.size}]): whoever has other bytes there does not "
            "find them"
        )
        if twice.any():
            example = bytes(meant[int(np.argmax(twice)), one.offset : one.offset + one.size])
            name = libbpf.shown(example.split(b"\0")[0])
            same = int(times[alike.reshape(-1)[int(np.argmax(twice))]])
            words += f"; {name!r} is there {same} times, each time with other bytes behind its end"
        yield Diagnostic(
            "cause" if twice.any() else "risk",
            words + ".",
            "Set the whole field to zero before the text is copied into it, in the program and in "
            "user space. Write the entries anew.",
            "padded-key",
        )


def _behind_nul(part: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    ended: npt.NDArray[np.bool_] = np.logical_or.accumulate(part == 0, axis=1)
    return ended


def _holds_text(raw: npt.NDArray[np.uint8], field: Field) -> bool:
    part = raw[:, field.offset : field.offset + field.size]
    if not part.shape[1] or not part[:, 0].any():
        return False
    for row in np.unique(part, axis=0):
        try:
            text = bytes(row).split(b"\0")[0].decode()
        except UnicodeDecodeError:
            return False
        if not text.isprintable():
            return False
    return True


def left_over_padding(
    values: npt.NDArray[Any], gaps: npt.NDArray[np.bool_], *, per_cpu: bool
) -> Iterator[Diagnostic]:
    """Bytes in the padding of values that are not zero.

    Parameters
    ----------
    values : numpy.ndarray
        Values as they were read; of a per-CPU map a row for each entry.
    gaps : numpy.ndarray of bool
        Which bytes of a value belong to no field.
    per_cpu : bool
        Whether each entry has a value for each CPU.
    """
    raw = bytes_of(values)
    if not len(raw) or not gaps.any():
        return
    parts = raw.reshape(len(raw), -1, len(gaps)) if per_cpu else raw[:, None, :]
    dirty = int(parts[:, :, gaps].any(axis=(1, 2)).sum())
    if dirty:
        yield Diagnostic(
            "risk",
            f"{dirty:,} of {len(raw):,} values have bytes that are not zero in their "
            f"{int(gaps.sum())} bytes of padding: a writer that packs the fields (Go's "
            "encoding/binary does) puts them where a reader in C does not look, and two values "
            "that are equal by their fields differ by their bytes.",
            "Compare the offsets of the fields on both sides; declare the padding as fields, and "
            "set it to zero.",
            "pinned-layout",
        )


def other_byte_order(keys: npt.NDArray[Any], fields: tuple[Field, ...]) -> Iterator[Diagnostic]:
    """Keys of which a few look as if they were written in the other byte order.

    A number of two or four bytes is read both ways. Where most keys are small as they are stored,
    and a few are larger than all of those but small in the other order, or the other way round,
    both readings are shown. It is a guess, and never more than a risk.

    Parameters
    ----------
    keys, fields
        As for `left_over_texts`.
    """
    raw = bytes_of(keys)
    width = raw.shape[1]
    for field in fields:
        if not field.is_integer or field.size not in (2, 4) or field.offset + field.size > width:
            continue
        part = np.ascontiguousarray(raw[:, field.offset : field.offset + field.size])
        stored = np.unique(part.view(f"=u{field.size}").reshape(-1).astype(np.uint64))
        if (odd := _odd_ones(stored, field.size)) is None:
            continue
        others = len(stored) - len(odd)
        shown = listed(
            [f"{int(one):,} ({_swapped(int(one), field.size):,})" for one in odd[:_SHOWN]]
        )
        yield Diagnostic(
            "risk",
            f"{len(odd):,} of the {len(stored):,} different numbers in {field.path or 'the key'} "
            f"look like the other byte order beside the {others:,} others: as stored (and read "
            f"the other way round) {shown}.",
            "Compare with what the program looks up: a port or an address from a packet stands in "
            "network order.",
        )


def bits_behind_prefix(keys: npt.NDArray[Any]) -> Iterator[Diagnostic]:
    """Prefixes of an LPM trie that have bits set behind their length.

    The trie compares the bits before it alone, from the first byte on (kernel/bpf/lpm_trie.c,
    ``longest_prefix_match``): an address whose bytes stand the other way round has its first ones
    behind the length, and many such prefixes are one.

    Parameters
    ----------
    keys : numpy.ndarray
        Keys as they were read: four bytes of length in bits, then the bytes that are compared.
    """
    raw = bytes_of(keys)
    if not len(raw):
        return
    lengths = np.ascontiguousarray(raw[:, :4]).view("=u4")
    bits = np.unpackbits(raw[:, 4:], axis=1)
    behind = bits.astype(bool) & (np.arange(bits.shape[1]) >= lengths)
    odd = np.flatnonzero(behind.any(axis=1))
    if not len(odd):
        return
    shown = [f"{raw[one, 4:].tobytes().hex(' ')} / {int(lengths[one, 0])}" for one in odd[:_SHOWN]]
    yield Diagnostic(
        "risk",
        f"{len(odd):,} of {len(raw):,} prefixes have bits set behind their length: "
        f"{listed(shown)} (bytes / bits). An address in the byte order of this machine looks so: "
        "the trie compares from the first byte on, finds it for other packets than were meant, and "
        "takes two that are equal up to their length for one.",
        "Store addresses in network order, and set the bits behind the length to zero.",
    )


def _odd_ones(stored: npt.NDArray[np.uint64], size: int) -> npt.NDArray[np.uint64] | None:
    if len(stored) < _FEWEST_KEYS:
        return None
    swapped = np.array([_swapped(int(one), size) for one in stored], np.uint64)
    if size == 2:
        plain, turned = stored * 4 <= swapped, swapped * 4 <= stored
    else:  # one half is empty, and the other one when it is turned round
        plain = (stored < 1 << 16) & (swapped >= 1 << 16)
        turned = (swapped < 1 << 16) & (stored >= 1 << 16)
    for few, many, reading in ((turned, plain, stored), (plain, turned, swapped)):
        clear = few.any() and many.sum() >= _MAJORITY * (len(stored) - few.sum())
        # Numbers that simply go on are no other order: 256 comes after 255.
        if clear and many.sum() > 2 * few.sum() and reading[few].min() > 2 * reading[~few].max():
            return stored[few]
    return None


def _swapped(number: int, size: int) -> int:
    return int.from_bytes(number.to_bytes(size, "little"), "big")
