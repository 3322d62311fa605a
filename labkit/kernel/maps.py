"""Maps as NumPy sees them: every size is checked before a call, every errno has a type.

The kernel is told no length by its caller, so it cannot refuse a buffer that is too
short, and bcc does not look. Here a value that does not fit the map never reaches it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator
from ctypes import byref, c_uint32
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput, LabError
from labkit.kernel import btf, libbpf
from labkit.kernel.closing import Closing
from labkit.kernel.libbpf import MapFlag, MapKind, UpdateFlag

_ROOM_BYTES = 64 << 20
_FEW = 8  # ids that a sentence names

PER_CPU = {MapKind.PERCPU_HASH, MapKind.PERCPU_ARRAY, MapKind.LRU_PERCPU_HASH}
"""Map types whose value is one slot for every possible CPU."""

OF_MAPS = {MapKind.ARRAY_OF_MAPS, MapKind.HASH_OF_MAPS}
"""Map types that hold maps: user space writes a descriptor and reads an id."""


class MapError(LabError, OSError):
    """An operation that the kernel refused; ``errno`` is its answer."""

    def __init__(self, number: int, sentence: str) -> None:
        super().__init__(number, f"{sentence}: {libbpf.error_name(number)}")

    def __str__(self) -> str:
        return str(self.args[1])


class KeyAbsent(MapError):
    """ENOENT: the map holds no such key (or LRU eviction raced with the update)."""


class KeyExists(MapError):
    """EEXIST: the key is there and the flag was NOEXIST."""


class MapFull(MapError):
    """E2BIG: no room for a new key, or an array index past the end."""


class OutOfMemory(MapError):
    """ENOMEM: the element could not be allocated now."""


class MapBusy(MapError):
    """EBUSY, EDEADLK or ETIMEDOUT: the bucket lock could not be had; try again."""


class NotSupported(MapError):
    """This map type (or flag) has no such operation."""


class NotPermitted(MapError):
    """EPERM or EACCES: frozen, read-only, or no privilege."""


class PartialBatch(MapError):
    """A batch stopped in the middle; ``applied`` elements took effect.

    Attributes
    ----------
    applied : int
        How many of the elements, from the first on, were applied.
    """

    def __init__(self, number: int, sentence: str, applied: int) -> None:
        super().__init__(number, sentence)
        self.applied = applied


_BY_ERRNO: dict[int, type[MapError]] = {
    errno.ENOENT: KeyAbsent,
    errno.EEXIST: KeyExists,
    errno.E2BIG: MapFull,
    errno.ENOMEM: OutOfMemory,
    errno.EBUSY: MapBusy,
    errno.EDEADLK: MapBusy,
    errno.ETIMEDOUT: MapBusy,
    errno.EOPNOTSUPP: NotSupported,
    libbpf.ENOTSUPP: NotSupported,
    errno.EPERM: NotPermitted,
    errno.EACCES: NotPermitted,
}


def map_error(number: int, sentence: str) -> MapError:
    """Typed error for a positive errno; ``sentence`` says what was tried."""
    return _BY_ERRNO.get(number, MapError)(number, sentence)


@dataclass(frozen=True)
class Snapshot:
    """All entries of a map as one read saw them.

    Attributes
    ----------
    keys, values : numpy.ndarray
        Parallel arrays of the map's key and value dtype; per-CPU values have shape
        ``(entries, possible_cpus)``.
    complete : bool
        Whether every key that was in the map during the whole read is in here. Hash
        tables are read bucket by bucket under the bucket's lock, so this holds however
        much others insert and delete; an iteration by key, which the other types need, may
        lose its place, and then it is False.
    restarts : int
        How often an iteration lost its place and went on from the start.
    """

    keys: npt.NDArray[Any]
    values: npt.NDArray[Any]
    complete: bool
    restarts: int

    def __len__(self) -> int:
        return len(self.keys)


class Map(Closing):
    """One BPF map, owned by file descriptor.

    Make one with :meth:`create`, or open what exists with :meth:`from_id`,
    :meth:`from_pin`, :meth:`from_name`, :meth:`from_fd`. Closing it drops our reference
    only: the map lives on while a program, pin, outer map or other descriptor holds it.

    Parameters
    ----------
    fd : int
        Descriptor; this object closes it.
    key, value : dtype-like, optional
        Layout of key and value. Without it the map's BTF is asked, and where there is
        none, plain unsigned integers stand for 1, 2, 4 and 8 bytes and raw bytes for
        the rest.

    Examples
    --------
    >>> from labkit.kernel.maps import Map, MapKind
    >>> with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8) as table:
    ...     table.update(1, 10)
    ...     int(table.lookup(1))
    10
    """

    def __init__(
        self, fd: int, *, key: npt.DTypeLike | None = None, value: npt.DTypeLike | None = None
    ) -> None:
        self.fd = fd
        libbpf.require_kind(fd, "map")
        info = libbpf.map_info(fd)
        self.id: int = info.id
        self.name: str = libbpf.shown(info.name)
        self.kind = MapKind(info.type)
        self.flags = MapFlag(info.map_flags)
        self.max_entries: int = info.max_entries
        self.key_size: int = info.key_size
        self.value_size: int = info.value_size
        self.key_dtype = self._layout("key", key, info.key_size, info.btf_id, info.btf_key_type_id)
        self.value_dtype = self._layout(
            "value", value, info.value_size, info.btf_id, info.btf_value_type_id
        )
        # Per-CPU values stand eight bytes aligned, one slot for each possible CPU.
        self._stride = -(-info.value_size // 8) * 8
        self._cpus = libbpf.possible_cpus() if self.kind in PER_CPU else 0
        # Room for one value, made anew for each lookup: whoever got one may keep it.
        self._room = ctypes.c_char * (self._stride * self._cpus or self.value_size)
        self._lib = libbpf.api()

    def _layout(
        self, what: str, given: npt.DTypeLike | None, size: int, btf_id: int, type_id: int
    ) -> np.dtype[Any]:
        if given is not None:
            dtype = np.dtype(given)
            if dtype.itemsize != size:
                raise BadInput(
                    f"The {what} dtype has {dtype.itemsize} bytes but map {self.name} "
                    f"(id {self.id}) has {what}s of {size}: use the layout that the map "
                    "was created with."
                )
            return dtype
        known = btf.dtype_of(btf_id, type_id)
        if known is not None and known.itemsize == size:
            return known
        return np.dtype(f"u{size}") if size in (1, 2, 4, 8) else np.dtype(f"V{size}")

    # -- opening ---------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        kind: MapKind,
        *,
        key: npt.DTypeLike | None,
        value: npt.DTypeLike | None,
        max_entries: int,
        flags: MapFlag = MapFlag.NONE,
        inner: Map | None = None,
        name: str = "labkit",
    ) -> Map:
        """Create a map.

        Parameters
        ----------
        kind : MapKind
            Map type.
        key, value : dtype-like or None
            Layouts; None for types without one (a ring buffer).
        max_entries : int
            Entries; for a ring buffer, bytes (a power of two and whole pages).
        flags : MapFlag
            Creation flags.
        inner : Map, optional
            Template, for a map of maps.
        name : str
            Shown by bpftool; 15 bytes at most.

        Returns
        -------
        Map
            Owns the descriptor.

        Raises
        ------
        BadInput
            Sizes that no kernel accepts.
        MapError
            The kernel's refusal.
        """
        if max_entries < 1:
            raise BadInput(f"A map needs max_entries of at least 1, not {max_entries}.")
        if kind in OF_MAPS and inner is None:
            raise BadInput(f"A {kind.name.lower()} needs inner=, a map to take as template.")
        if len(name.encode()) > 15:
            raise BadInput(f"The kernel keeps 15 bytes of a map name; {name!r} is longer.")
        key_size = 0 if key is None else np.dtype(key).itemsize
        value_size = 0 if value is None else np.dtype(value).itemsize
        try:
            fd = libbpf.map_create(
                kind,
                name=name,
                key_size=key_size,
                value_size=value_size,
                max_entries=max_entries,
                flags=flags,
                inner_fd=None if inner is None else inner.fd,
            )
        except OSError as error:
            raise map_error(
                error.errno or 0,
                f"Creating a {kind.name.lower()} map of {max_entries} entries "
                f"(key {key_size} B, value {value_size} B, flags {int(flags):#x})",
            ) from error
        return cls(fd, key=key, value=value)

    @classmethod
    def from_fd(cls, fd: int, **layout: npt.DTypeLike | None) -> Map:
        """Open the map behind a descriptor, which stays the caller's (it is duplicated).

        A bcc table is opened by its ``map_fd``.
        """
        return cls(os.dup(fd), **layout)

    @classmethod
    def from_id(cls, identifier: int, **layout: npt.DTypeLike | None) -> Map:
        """Open a map by its id, as ``bpftool map show`` prints it."""
        try:
            return cls(libbpf.fd_by_id("map", identifier), **layout)
        except OSError as error:
            raise map_error(error.errno or 0, f"Opening map id {identifier}") from error

    @classmethod
    def from_pin(cls, path: str | os.PathLike[str], **layout: npt.DTypeLike | None) -> Map:
        """Open a pinned map."""
        try:
            return cls(libbpf.open_pin(os.fspath(path)), **layout)
        except OSError as error:
            raise map_error(
                error.errno or 0, f"Opening the pin {libbpf.shown(os.fsencode(path))}"
            ) from error

    @classmethod
    def from_name(cls, name: str, **layout: npt.DTypeLike | None) -> Map:
        """Open the one map that has this name.

        Raises
        ------
        BadInput
            No map, or more than one, has the name: the sentence lists the ids.
        """
        identifiers = []
        for identifier in libbpf.ids("map"):
            try:
                with cls(libbpf.fd_by_id("map", identifier)) as one:
                    if one.name == name:
                        identifiers.append(one.id)
            except OSError:
                continue  # gone between listing and opening
        if len(identifiers) != 1:
            few = f"{', '.join(map(str, identifiers[:_FEW]))}{', ...' * (len(identifiers) > _FEW)}"
            many = f"maps {few} share it: name one by id" if identifiers else "no map has it"
            raise BadInput(f"The name {name!r} does not say which map: {many}.")
        return cls.from_id(identifiers[0], **layout)

    def close(self) -> None:
        """Drop our reference; safe to call twice."""
        fd, self.fd = self.fd, -1
        libbpf.close(fd)

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Map {self.name} id {self.id} {self.kind.name.lower()}>"

    def pin(self, path: str | os.PathLike[str]) -> None:
        """Pin the map at a path in a bpffs (see :mod:`labkit.kernel.pins`)."""
        try:
            libbpf.pin(self.fd, os.fspath(path))
        except OSError as error:
            raise map_error(error.errno or 0, f"Pinning {self!r} at {path}") from error

    def freeze(self) -> None:
        """Refuse all further writes from user space."""
        self._check(self._lib.bpf_map_freeze(self.fd), "Freezing")

    # -- encoding --------------------------------------------------------------------

    def encode_key(self, key: Any) -> npt.NDArray[Any]:
        """Key as an array of shape ``(1,)`` whose padding bytes are zero."""
        return encode([key], self.key_dtype, "key")

    def encode_value(self, value: Any) -> npt.NDArray[Any]:
        """Value as bytes that the kernel takes: for a per-CPU map, one slot a CPU.

        A per-CPU map takes a sequence of ``possible_cpus`` values, or one value for all.
        """
        if self.kind not in PER_CPU:
            return encode([value], self.value_dtype, "value")
        slots = np.zeros((self._cpus, self._stride), np.uint8)
        many = _as_sequence(value, self.value_dtype)
        if many is None:
            many = [value] * self._cpus
        if len(many) != self._cpus:
            raise BadInput(
                f"Map {self.name} holds one value for each of {self._cpus} possible CPUs; "
                f"{len(many)} were given."
            )
        packed = encode(many, self.value_dtype, "value")
        slots[:, : self.value_size] = packed.view(np.uint8).reshape(self._cpus, self.value_size)
        return slots

    def value_buffer(self) -> npt.NDArray[np.uint8]:
        """Zeroed buffer that the kernel may fill with one value."""
        return np.zeros(ctypes.sizeof(self._room), np.uint8)

    def decode_value(self, raw: npt.NDArray[np.uint8]) -> Any:
        """One value from a buffer; shape ``(possible_cpus,)`` for a per-CPU map."""
        if self.kind in PER_CPU:
            return self._decode_slots(raw, 1)[0]
        return _viewed(raw, self.value_dtype)[0]

    def _decoded(self, room: ctypes.Array[ctypes.c_char]) -> Any:
        if self._cpus or self.value_dtype.shape:
            return self.decode_value(np.frombuffer(memoryview(room), np.uint8))
        return np.frombuffer(memoryview(room), self.value_dtype)[0]

    def _decode_slots(self, raw: npt.NDArray[np.uint8], count: int) -> npt.NDArray[Any]:
        slots = raw[: count * self._cpus * self._stride].reshape(count, self._cpus, self._stride)
        values = np.ascontiguousarray(slots[:, :, : self.value_size])
        shape = (count, self._cpus, *self.value_dtype.shape)
        return values.view(self.value_dtype.base).reshape(shape)

    def _check(self, result: int, doing: str) -> int:
        if result < 0:
            raise map_error(-result, f"{doing} in map {self.name} (id {self.id})")
        return result

    # -- one element -----------------------------------------------------------------

    def lookup(self, key: Any, flags: UpdateFlag = UpdateFlag.ANY) -> Any:
        """Value of a key, copied.

        Parameters
        ----------
        key
            A value of the key dtype: int, tuple, dict of fields, bytes of the exact size.
        flags : UpdateFlag
            ``LOCK`` reads under the value's spin lock.

        Returns
        -------
        numpy scalar, void or array
            An array of shape ``(possible_cpus,)`` for a per-CPU map.

        Raises
        ------
        KeyAbsent
            The key is not there.
        BadInput
            The key does not fit the map's key dtype.
        MapError
            Anything else that the kernel refuses.
        """
        packed, room = to_bytes(key, self.key_dtype, "key"), self._room()
        result = self._lib.bpf_map_lookup_elem_flags(self.fd, packed, room, flags)
        if result < 0:
            self._check(result, f"Looking up {key!r}")
        return self._decoded(room)

    def get(self, key: Any, default: Any = None) -> Any:
        """Value of a key, or ``default`` where it is absent."""
        try:
            return self.lookup(key)
        except KeyAbsent:
            return default

    def update(self, key: Any, value: Any, flags: UpdateFlag = UpdateFlag.ANY) -> None:
        """Write one element.

        Parameters
        ----------
        key, value
            Of the map's dtypes; anything that does not fit exactly is refused.
        flags : UpdateFlag
            ``NOEXIST``, ``EXIST``, ``LOCK``.

        Raises
        ------
        KeyExists, KeyAbsent, MapFull, OutOfMemory, MapBusy, NotPermitted, MapError
            The kernel's answer.
        BadInput
            Key or value do not fit the map.
        """
        packed = to_bytes(key, self.key_dtype, "key")
        data = (
            self.encode_value(value).tobytes()
            if self._cpus
            else to_bytes(value, self.value_dtype, "value")
        )
        result = self._lib.bpf_map_update_elem(self.fd, packed, data, flags)
        if result < 0:
            self._check(result, f"Updating {key!r}")

    def delete(self, key: Any) -> None:
        """Delete one element; :class:`KeyAbsent` where it is not there."""
        result = self._lib.bpf_map_delete_elem(self.fd, to_bytes(key, self.key_dtype, "key"))
        if result < 0:
            self._check(result, f"Deleting {key!r}")

    def lookup_and_delete(self, key: Any) -> Any:
        """Take one element out in a single step (hash types since Linux 5.14)."""
        packed, room = to_bytes(key, self.key_dtype, "key"), self._room()
        result = self._lib.bpf_map_lookup_and_delete_elem_flags(self.fd, packed, room, 0)
        if result < 0:
            self._check(result, f"Taking out {key!r}")
        return self._decoded(room)

    def updater(self, key: Any, value: npt.NDArray[Any], flags: int = 0) -> Callable[[], int]:
        """Prepared update for a hot loop: sizes are checked here, once.

        Parameters
        ----------
        key
            Of the map's key dtype.
        value : numpy.ndarray
            C-contiguous buffer of the value's size, read at every call, so the caller
            may change its bytes in between.
        flags : int
            As for :meth:`update`.

        Returns
        -------
        callable
            Answers 0 or minus the errno, and raises nothing.
        """
        packed = self.encode_key(key)
        self._check_buffer(value)
        call, fd = self._lib.bpf_map_update_elem, self.fd
        at, data = packed.ctypes.data, value.ctypes.data

        def update(_keep: object = (packed, value)) -> int:
            return int(call(fd, at, data, flags))

        return update

    def reader(self, key: Any, value: npt.NDArray[Any], flags: int = 0) -> Callable[[], int]:
        """Prepare a lookup of ``key`` with ``flags`` for a hot loop.

        Each call of what is returned fills ``value`` and answers 0 or minus the errno.
        """
        packed = self.encode_key(key)
        self._check_buffer(value)
        call, fd = self._lib.bpf_map_lookup_elem_flags, self.fd
        at, data = packed.ctypes.data, value.ctypes.data

        def read(_keep: object = (packed, value)) -> int:
            return int(call(fd, at, data, flags))

        return read

    def _check_buffer(self, value: npt.NDArray[Any]) -> None:
        wanted = self._stride * self._cpus or self.value_size
        if value.nbytes != wanted or not value.flags.c_contiguous:
            raise BadInput(
                f"Map {self.name} takes one contiguous buffer of {wanted} bytes; "
                f"this one has {value.nbytes}."
            )

    # -- many elements ---------------------------------------------------------------

    def keys(self) -> Iterator[Any]:
        """Walk the keys one by one, as ``BPF_MAP_GET_NEXT_KEY`` gives them.

        Iteration makes no promise while others delete: the kernel starts again at the
        first key when the current one has gone, so keys may come twice. It is bounded by
        twice ``max_entries`` steps. Use :meth:`snapshot` to read a map.
        """
        current = np.zeros(1, self.key_dtype)
        following = np.zeros(1, self.key_dtype)
        at: int | None = None
        for _ in range(2 * self.max_entries):
            result = self._lib.bpf_map_get_next_key(self.fd, at, following.ctypes.data)
            if result == -errno.ENOENT:
                return
            self._check(result, "Walking the keys")
            yield following[0].copy() if self.key_dtype.names else following[0]
            current[:] = following
            at = current.ctypes.data

    def snapshot(self) -> Snapshot:
        """Read the whole map into arrays.

        Returns
        -------
        Snapshot
            No key stands in it twice; ``complete`` says whether keys may be missing.

        Raises
        ------
        NotSupported
            The type cannot be read from user space (a ring buffer, a perf event array).
        """
        try:
            return self._snapshot_by_batch()
        except NotSupported:
            return self._snapshot_by_key()

    def _snapshot_by_batch(self) -> Snapshot:
        stride = self._stride * self._cpus or self.value_size
        # Room for all where that is little; else for a part, and it grows with what is there.
        capacity = min(self.max_entries, _ROOM_BYTES // (self.key_size + stride + 1) + 1)
        keys = np.empty(capacity, self.key_dtype)
        raw = np.empty(capacity * stride, np.uint8)
        place = np.zeros(max(self.key_size, 8), np.uint8)
        options, count = libbpf.BatchOpts(), c_uint32()
        read, start, started = 0, None, False
        while True:
            room = capacity - read
            if room == 0:
                # Others inserted behind the reader while it went: make room and go on.
                keys = np.concatenate([keys, np.empty(capacity, self.key_dtype)])
                raw = np.concatenate([raw, np.empty(capacity * stride, np.uint8)])
                room, capacity = capacity, 2 * capacity
            count.value = room
            result = self._lib.bpf_map_lookup_batch(
                self.fd,
                start,
                place.ctypes.data,
                keys.ctypes.data + read * self.key_size,
                raw.ctypes.data + read * stride,
                byref(count),
                byref(options),
            )
            if result in (-errno.EINVAL, -errno.EFAULT) and not started:
                raise NotSupported(-result, f"Reading map {self.name} by batch")
            if result == -errno.ENOSPC:
                # A bucket holds more than the room left: double, nothing was lost.
                keys = np.concatenate([keys, np.empty(capacity, self.key_dtype)])
                raw = np.concatenate([raw, np.empty(capacity * stride, np.uint8)])
                capacity *= 2
                continue
            if result < 0 and result != -errno.ENOENT:
                self._check(result, "Reading by batch")
            read += count.value
            if result == -errno.ENOENT:
                break
            started, start = True, place.ctypes.data
        if self.kind in PER_CPU:
            values = self._decode_slots(raw, read)
        else:
            values = _viewed(raw[: read * stride], self.value_dtype)
        by_bucket = self.kind not in (MapKind.LPM_TRIE, *OF_MAPS)
        return Snapshot(keys[:read], values, complete=by_bucket, restarts=0)

    def _snapshot_by_key(self) -> Snapshot:
        found: dict[bytes, npt.NDArray[np.uint8]] = {}
        restarts, steps = 0, 0
        previous: npt.NDArray[Any] | None = None
        following = np.zeros(1, self.key_dtype)
        while steps < 4 * self.max_entries + 16:
            steps += 1
            at = None if previous is None else previous.ctypes.data
            result = self._lib.bpf_map_get_next_key(self.fd, at, following.ctypes.data)
            if result == -errno.ENOENT:
                break
            self._check(result, "Walking the keys")
            key = following.tobytes()
            if key in found:
                restarts += 1
            raw = self.value_buffer()
            answer = self._lib.bpf_map_lookup_elem(self.fd, following.ctypes.data, raw.ctypes.data)
            if answer == 0:
                found[key] = raw
            elif answer != -errno.ENOENT:
                self._check(answer, "Reading by key")
            previous = following.copy()
        keys = np.frombuffer(b"".join(found), self.key_dtype)
        joined = np.concatenate(list(found.values())) if found else np.zeros(0, np.uint8)
        if self.kind in PER_CPU:
            values = self._decode_slots(joined, len(found))
        else:
            values = _viewed(joined, self.value_dtype)
        ended = steps < 4 * self.max_entries + 16
        return Snapshot(keys, values, complete=ended and restarts == 0, restarts=restarts)

    def update_many(
        self,
        keys: npt.ArrayLike,
        values: npt.ArrayLike,
        flags: UpdateFlag = UpdateFlag.ANY,
    ) -> int:
        """Write many elements in one call.

        Parameters
        ----------
        keys : array-like, shape (n,)
            Of the map's key dtype.
        values : array-like, shape (n,) or (n, possible_cpus)
            Of the map's value dtype.
        flags : UpdateFlag
            ``LOCK`` or nothing: the kernel takes no other flag in a batch.

        Returns
        -------
        int
            Elements written: always ``n``.

        Raises
        ------
        PartialBatch
            The kernel stopped in the middle: ``applied`` elements stand in the map.
        BadInput
            Shapes or dtypes do not fit.
        """
        if flags & ~UpdateFlag.LOCK:
            raise BadInput(
                f"A batch update takes the flag LOCK alone, not {flags!r}: update key by key."
            )
        packed = encode(keys, self.key_dtype, "key")
        data = self._encode_many(values, len(packed))
        if len(packed) == 0:
            return 0
        options, count = libbpf.BatchOpts(elem_flags=int(flags)), c_uint32(len(packed))
        result = self._lib.bpf_map_update_batch(
            self.fd, packed.ctypes.data, data.ctypes.data, byref(count), byref(options)
        )
        if result in (-libbpf.ENOTSUPP, -errno.EOPNOTSUPP):
            return self._update_by_key(packed, data, flags)
        if result < 0:
            raise self._partial(result, count.value, len(packed), "Updating")
        return len(packed)

    def _update_by_key(
        self, keys: npt.NDArray[Any], data: npt.NDArray[np.uint8], flags: UpdateFlag
    ) -> int:
        stride = data.nbytes // len(keys)
        for i in range(len(keys)):
            result = self._lib.bpf_map_update_elem(
                self.fd,
                keys.ctypes.data + i * self.key_size,
                data.ctypes.data + i * stride,
                int(flags),
            )
            if result < 0:
                raise self._partial(result, i, len(keys), "Updating")
        return len(keys)

    def delete_many(self, keys: npt.ArrayLike) -> int:
        """Delete many elements in one call; :class:`PartialBatch` at the first absent one."""
        packed = encode(keys, self.key_dtype, "key")
        if len(packed) == 0:
            return 0
        options, count = libbpf.BatchOpts(), c_uint32(len(packed))
        result = self._lib.bpf_map_delete_batch(
            self.fd, packed.ctypes.data, byref(count), byref(options)
        )
        if result < 0:
            raise self._partial(result, count.value, len(packed), "Deleting")
        return len(packed)

    def _partial(self, result: int, applied: int, wanted: int, doing: str) -> PartialBatch:
        # The kernel writes the count back only once it has begun: at EINVAL or EPERM of
        # the whole call the count still holds what we asked for.
        done = applied if applied < wanted else 0
        return PartialBatch(
            -result,
            f"{doing} {wanted} elements in map {self.name} (id {self.id}) stopped after {done}",
            done,
        )

    def _encode_many(self, values: npt.ArrayLike, count: int) -> npt.NDArray[np.uint8]:
        if self.kind not in PER_CPU:
            packed = encode(values, self.value_dtype, "value")
            if len(packed) != count:
                raise BadInput(f"{count} keys need {count} values, not {len(packed)}.")
            return packed.view(np.uint8)
        many = np.asarray(values, self.value_dtype)
        if many.shape != (count, self._cpus):
            raise BadInput(
                f"A per-CPU map takes values of shape ({count}, {self._cpus}), not {many.shape}."
            )
        slots = np.zeros((count, self._cpus, self._stride), np.uint8)
        flat = encode(many.reshape(-1), self.value_dtype, "value").view(np.uint8)
        slots[:, :, : self.value_size] = flat.reshape(count, self._cpus, self.value_size)
        return slots.reshape(-1)


def _viewed(raw: npt.NDArray[np.uint8], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Bytes as values; NumPy itself views none as an array type such as ``("u4", (3,))``."""
    return raw.view(dtype.base).reshape(-1, *dtype.shape)


def encode(items: Any, dtype: np.dtype[Any], what: str) -> npt.NDArray[Any]:
    """Pack items into a contiguous array of ``dtype`` whose padding bytes are zero.

    Parameters
    ----------
    items : sequence or numpy.ndarray, shape (n,)
        Integers, tuples, dicts of fields, ``bytes`` of the exact size, or an array.
    dtype : numpy.dtype
        Layout that the map demands.
    what : str
        "key" or "value", for the sentence of a refusal.

    Returns
    -------
    numpy.ndarray
        Shape ``(n,)``.

    Raises
    ------
    BadInput
        An item has another size or layout, or an integer does not fit.
    """
    base, shape = (dtype.base, dtype.shape) if dtype.subdtype else (dtype, ())
    if isinstance(items, np.ndarray) and items.dtype == dtype and not dtype.names:
        return np.ascontiguousarray(items)
    out = np.zeros(len(items), dtype)
    if isinstance(items, np.ndarray):
        if items.dtype.names is not None or dtype.names is not None:
            if items.dtype.names != dtype.names:
                raise BadInput(
                    f"The {what}s have fields {items.dtype.names}, the map's are {dtype.names}."
                )
            _copy_fields(items, out, what)
            return out
        if base.kind in "iu" and items.dtype.kind in "iub":
            low, high = _limits(base)
            if items.size and (int(items.min()) < low or int(items.max()) > high):
                raise BadInput(f"A {what} does not fit {base}: it must be {low} to {high}.")
            out[...] = items.astype(base)
            return out
        if items.dtype.itemsize != dtype.itemsize and base.kind == "V":
            raise BadInput(
                f"The {what}s have {items.dtype.itemsize} bytes, the map's have {dtype.itemsize}."
            )
        if base.kind in "iu":
            raise BadInput(f"The {what}s are {items.dtype}, the map's are {dtype}.")
        out[...] = items
        return out
    for i, item in enumerate(items):
        _encode_one(out, i, item, dtype, shape, what)
    return out


def to_bytes(item: Any, dtype: np.dtype[Any], what: str) -> bytes:
    """Pack one item as `encode` does; a plain integer without an array, which takes longer.

    Parameters
    ----------
    item, dtype, what
        As for `encode`, but a single item.

    Raises
    ------
    BadInput
        As `encode`.
    """
    if type(item) is int and dtype.kind in "iu" and dtype.isnative:
        low, high = _limits(dtype)
        if low <= item <= high:
            return item.to_bytes(dtype.itemsize, sys.byteorder, signed=low < 0)
    return encode([item], dtype, what).tobytes()


def _encode_one(
    out: npt.NDArray[Any],
    i: int,
    item: Any,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    what: str,
) -> None:
    if isinstance(item, bytes | bytearray):
        if len(item) != dtype.itemsize:
            raise BadInput(f"This {what} has {len(item)} bytes, the map's have {dtype.itemsize}.")
        out[i : i + 1].view(np.uint8)[...] = np.frombuffer(item, np.uint8).reshape(
            out[i : i + 1].view(np.uint8).shape
        )
        return
    if dtype.names:
        _encode_struct(out[i : i + 1], item, dtype, what)
        return
    size = getattr(item, "nbytes", None)
    if isinstance(item, ctypes.Structure | ctypes.Array):
        raise BadInput(f"Give a {what} of a ctypes type as bytes(…), so that its size shows.")
    if dtype.kind == "V" and not shape:
        raise BadInput(f"The {what}s of this map are {dtype.itemsize} raw bytes: give bytes.")
    if shape and np.shape(item) != shape:
        raise BadInput(f"The {what}s of this map have shape {shape}, not {np.shape(item)}.")
    base = dtype.base
    if base.kind in "iu":
        low, high = _limits(base)
        if type(item) is int:
            least = most = item
        else:
            numbers = np.asarray(item)
            if numbers.dtype.kind not in "iub":
                raise BadInput(f"The {what}s of this map are {base}; {item!r} is no whole number.")
            least, most = (int(numbers.min()), int(numbers.max())) if numbers.size else (low, high)
        if least < low or most > high:
            raise BadInput(f"{item!r} does not fit a {what} of {base}: it must be {low} to {high}.")
    elif size is not None and size != dtype.itemsize:
        raise BadInput(f"This {what} has {size} bytes, the map's have {dtype.itemsize}.")
    out[i] = item


@cache
def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Smallest and largest integer of a dtype."""
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


@cache
def _all_limits(dtype: np.dtype[Any]) -> tuple[tuple[int, int], ...]:
    """Those of each field; empty where a field is no single integer."""
    fields = [dtype[name] for name in dtype.names or ()]
    if any(field.kind not in "iu" or field.shape for field in fields):
        return ()
    return tuple(_limits(field) for field in fields)


def _encode_struct(out: npt.NDArray[Any], item: Any, dtype: np.dtype[Any], what: str) -> None:
    assert dtype.names is not None and dtype.fields is not None
    limits = _all_limits(dtype)
    if limits and type(item) is tuple and len(item) == len(limits):
        # The usual case, and worth the lines: what follows takes several times as long.
        for number, (low, high) in zip(item, limits, strict=True):
            if type(number) is not int or not low <= number <= high:
                break
        else:
            out[0] = item
            return
    if isinstance(item, np.void | np.ndarray):
        if item.dtype.names != dtype.names:
            raise BadInput(
                f"The {what} has fields {item.dtype.names}, the map's are {dtype.names}."
            )
        fields = {name: item[name] for name in dtype.names}
    elif isinstance(item, dict):
        fields = item
    elif isinstance(item, tuple) and len(item) == len(dtype.names):
        fields = dict(zip(dtype.names, item, strict=True))
    else:
        raise BadInput(
            f"A {what} of this map has the fields {dtype.names}: give a tuple or a dict of them, "
            f"not {item!r}."
        )
    if set(fields) != set(dtype.names):
        raise BadInput(f"The {what} has fields {sorted(fields)}, the map's are {dtype.names}.")
    for name in dtype.names:
        field = dtype.fields[name][0]
        holder = np.zeros(1, field)
        base_shape = field.shape if field.subdtype else ()
        if field.subdtype:
            given = np.asarray(fields[name], field.base)
            if given.shape != base_shape:
                raise BadInput(
                    f"Field {name} of the {what} has shape {base_shape}, not {given.shape}."
                )
            out[name][0] = given
            continue
        _encode_one(holder, 0, fields[name], field, base_shape, what)
        out[name] = holder[0]


def _copy_fields(source: npt.NDArray[Any], out: npt.NDArray[Any], what: str) -> None:
    # Field by field: NumPy copies equal structured dtypes whole, padding bytes included.
    assert out.dtype.names is not None
    for name in out.dtype.names:
        if out[name].dtype.names:
            _copy_fields(source[name], out[name], what)
        elif source[name].dtype != out[name].dtype:
            raise BadInput(
                f"Field {name} of the {what}s is {source[name].dtype}, "
                f"the map's is {out[name].dtype}."
            )
        else:
            out[name] = source[name]


def _as_sequence(value: Any, dtype: np.dtype[Any]) -> Any | None:
    """The values for each CPU, or None where one value was given for all."""
    if isinstance(value, list):
        return value
    if isinstance(value, np.ndarray) and value.ndim == 1 + len(dtype.shape):
        return value
    return None
