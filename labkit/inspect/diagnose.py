"""What may keep the readers of one map from its newest values: anybody's, not one of ours.

A map is looked at, never written to: who holds it, which programs refer to it, whether another
map has its name, and what its type, flags, layout and content make likely. Each diagnostic names
the experiment of this lab that shows the mechanism.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput
from labkit.kernel import btf, libbpf, objects
from labkit.kernel.libbpf import MapFlag
from labkit.kernel.maps import PER_CPU, Map, MapError, Snapshot
from labkit.kernel.objects import MapObject, Objects, ProgramObject

MOST_BYTES: Final = 256 << 20
"""A larger map is not read whole."""

_HASHES: Final = {"hash", "percpu_hash"}
_LRU: Final = {"lru_hash", "lru_percpu_hash"}
_ARRAYS: Final = {"array", "percpu_array"}
_READ: Final = _HASHES | _LRU | _ARRAYS | {"lpm_trie"}
_STREAMS: Final = {"ringbuf", "user_ringbuf", "perf_event_array", "queue", "stack"}
_PER_CPU: Final = {kind.name.lower() for kind in PER_CPU}
_ALMOST_FULL: Final = 0.9
_WIDTH: Final = 100


@dataclass(frozen=True)
class Diagnostic:
    """One thing to know about a map.

    Attributes
    ----------
    weight : str
        ``cause``: it keeps somebody from the newest value as things stand. ``risk``: it will,
        when the map is used in a certain way.
    says, do : str
        What is so, and what to do about it.
    experiment : str
        Id of the experiment that shows it.
    """

    weight: Literal["cause", "risk"]
    says: str
    do: str
    experiment: str


@dataclass(frozen=True)
class MapState:
    """What was found out about one map; all that `diagnostics` judges.

    Attributes
    ----------
    map_id : int
        The map.
    objects : Objects
        All maps, programs and links of the same moment.
    key_dtype, value_dtype : numpy.dtype
        Layouts, by the map's BTF where it has some.
    locked : bool
        The value has a ``bpf_spin_lock``, by its BTF.
    snapshot : Snapshot or None
        Its entries; None where the type has none to read, or they are more than `MOST_BYTES`.
    """

    map_id: int
    objects: Objects
    key_dtype: np.dtype[Any]
    value_dtype: np.dtype[Any]
    locked: bool = False
    snapshot: Snapshot | None = None

    @property
    def map(self) -> MapObject:
        """The map itself."""
        return self.objects.maps[self.map_id]

    def outer(self, map_id: int) -> list[int]:
        """Ids of the maps of maps that hold this one."""
        return [one.id for one in self.objects.maps.values() if map_id in one.map_ids]

    def users(self, map_id: int) -> list[ProgramObject]:
        """Programs that refer to a map, or to a map of maps that holds it."""
        reached = {map_id, *self.outer(map_id)}
        return [
            one for one in self.objects.programs.values() if not reached.isdisjoint(one.map_ids)
        ]


@dataclass(frozen=True)
class Diagnosis:
    """A map, and what is to be said of it: the causes first."""

    state: MapState
    diagnostics: tuple[Diagnostic, ...]

    @property
    def has_cause(self) -> bool:
        """Whether something keeps a reader from the newest values as things stand."""
        return any(one.weight == "cause" for one in self.diagnostics)

    def __str__(self) -> str:
        """The map, who holds and uses it, and the diagnostics, for a terminal."""
        return "\n".join([*_heading(self.state), *(_paragraph(one) for one in self.diagnostics)])

    def as_json(self) -> dict[str, Any]:
        """The same for scripts."""
        one = self.state.map
        return {
            "map": asdict(one),
            "entries": _entries(self.state),
            "used_by": [
                {
                    "id": user.id,
                    "name": user.name,
                    "kind": user.kind,
                    "attached": self.state.objects.attached(user.id),
                }
                for user in self.state.users(one.id)
            ],
            "held_by": self.state.objects.holders(one),
            "diagnostics": [asdict(diagnostic) for diagnostic in self.diagnostics],
        }


def diagnose(which: str) -> list[Diagnosis]:
    """Look at a map that somebody else made, and say what may make it look stale.

    Parameters
    ----------
    which : str
        Id, path of a pin, or name. A name may be that of several maps: each is looked at.

    Returns
    -------
    list of Diagnosis
        In ascending order of the maps' ids, at least one.

    Raises
    ------
    BadInput
        There is no such map.
    Unavailable
        This user may not look at BPF objects.
    MapError
        The kernel refuses to show the map.
    """
    now = objects.snapshot()
    return [
        Diagnosis(state, tuple(sorted(diagnostics(state), key=lambda one: one.weight)))
        for state in (_read(map_id, now) for map_id in map_ids(which, now))
    ]


def map_ids(which: str, now: Objects) -> list[int]:
    """Ids of the maps that an id, a path or a name means; `BadInput` where there is none."""
    if not which:
        raise BadInput("Name a map: by its id, the path of a pin, or its name.")
    if which.isdecimal():
        if int(which) in now.maps:
            return [int(which)]
        raise BadInput(f"There is no map with id {which}: bpftool map show lists them.")
    if "/" in which:
        try:
            with Map.from_pin(which) as opened:
                return [opened.id]
        except MapError as error:
            raise BadInput(
                f"{which!r} is no pin of a map that can be opened "
                f"({libbpf.error_name(error.errno or 0)}): bpftool map show pinned says what it is."
            ) from None
        except BadInput as error:
            raise BadInput(f"{which!r} leads to no map. {error}") from None
    name = libbpf.shown(os.fsencode(which))
    found = [one.id for one in now.maps.values() if one.name in (which, name)]
    if not found:
        raise BadInput(
            f"No map has the name {which!r} (the kernel keeps 15 bytes of one): bpftool map show "
            "lists them."
        )
    return found


def _read(map_id: int, now: Objects) -> MapState:
    with Map.from_id(map_id) as opened:
        info = libbpf.map_info(opened.fd)
        one = now.maps[map_id]
        slots = libbpf.possible_cpus() if one.kind in _PER_CPU else 1
        small = one.max_entries * (one.key_size + one.value_size * slots) <= MOST_BYTES
        return MapState(
            map_id,
            now,
            opened.key_dtype,
            opened.value_dtype,
            locked=btf.has_member_of(info.btf_id, info.btf_value_type_id, "bpf_spin_lock"),
            snapshot=opened.snapshot() if one.kind in _READ and small else None,
        )


# -- judging -----------------------------------------------------------------------------


def diagnostics(state: MapState) -> Iterator[Diagnostic]:
    """Judge what was found out about a map.

    Parameters
    ----------
    state : MapState
        Nothing else is looked at.

    Yields
    ------
    Diagnostic
        In no particular order.
    """
    yield from _of_its_name(state)
    yield from _of_its_readers(state)
    yield from _of_its_keys(state)
    yield from _of_its_room(state)
    yield from _of_its_values(state)
    yield from _of_its_kind(state)


def _of_its_name(state: MapState) -> Iterator[Diagnostic]:
    """Another map of the same name and shape: the program of an earlier load may use that one.

    Where both are in use, and by live processes that have nothing to do with each other, there are
    rather two control planes of one kind.
    """
    one = state.map

    def shape(of: MapObject) -> tuple[object, ...]:
        return of.name, of.kind, of.key_size, of.value_size

    twins = [
        other
        for other in state.objects.maps.values()
        if one.name and other.id != one.id and shape(other) == shape(one)
    ]
    mine = state.users(one.id)
    for twin in twins:
        theirs, held = state.users(twin.id), state.objects.holders(twin)
        age = "older" if twin.id < one.id else "newer"
        head = f"The {age} map {twin.id} is called {twin.name} too"
        same_path = "Pin the map and let every load use that pin again, and open it by pin or id."
        if theirs and not mine:
            yield Diagnostic(
                "cause",
                f"{head}, and {_programs(theirs)} it; no program refers to this one, so that none "
                "reads what is written here.",
                f"Write to map {twin.id}, or replace its programs by those of this load. "
                + same_path,
                "second-map-after-reload",
            )
        elif theirs and twin.pids and not set(twin.pids) & set(one.pids):
            yield Diagnostic(
                "risk",
                f"{head}, {_listed(held)} hold{'s' if len(held) == 1 else ''} it, and "
                f"{_programs(theirs)} it: who opens a map by its name may have the wrong one.",
                "Open it by pin or id.",
                "second-map-after-reload",
            )
        elif theirs:
            yield Diagnostic(
                "cause",
                f"{head}, and {_programs(theirs)} it, while {_programs(mine)} this one: who "
                "writes to one of them changes nothing for the programs of the other.",
                "Detach the programs of the load that is over. " + same_path,
                "second-map-after-reload",
            )
        elif mine and held:
            yield Diagnostic(
                "cause",
                f"{head}; no program refers to it, and what {_listed(held)} "
                f"write{'s' if len(held) == 1 else ''} there reaches none.",
                "Let its holder open the map again, and compare ids before each write.",
                "cached-handle",
            )


def _of_its_readers(state: MapState) -> Iterator[Diagnostic]:
    one = state.map
    users, outer = state.users(one.id), state.outer(one.id)
    if not users and one.kind not in _STREAMS:
        yield Diagnostic(
            "risk",
            "No program refers to this map, itself or through a map of maps.",
            "Look whether the program that should read it is loaded: bpftool prog show names the "
            "maps of each.",
            "second-map-after-reload",
        )
    if outer:
        yield Diagnostic(
            "risk",
            f"It is an element of the map of maps {_listed(outer)}: a program that looked that up "
            "before a switch goes on with the map that it found.",
            "Fill a new map for each generation, and wait for sleepable programs before an old one "
            "is filled again.",
            "switch-cost",
        )
    if one.frozen:
        yield Diagnostic(
            "cause",
            "It is frozen: user space cannot write to it, and programs may have its values "
            "compiled in.",
            "Set it before the program is loaded, or keep what changes in an ordinary map.",
            "rodata-folded",
        )
    if one.flags & MapFlag.MMAPABLE:
        yield Diagnostic(
            "risk",
            "It may be mapped into memory: no hook on bpf(2) sees stores through a mapping, and "
            "the order of two of them is the writer's affair.",
            "Store the data before the flag that announces it, with release and acquire where the "
            "CPU is weakly ordered.",
            "mmap-msync",
        )


def _of_its_keys(state: MapState) -> Iterator[Diagnostic]:
    gaps = padding(state.key_dtype)
    if not gaps.any() or state.map.kind in _ARRAYS:
        return
    clear = "Set the whole key to zero before its fields, or declare the padding as fields."
    dirty = same = 0
    if state.snapshot is not None and len(state.snapshot):
        raw = _bytes_of(state.snapshot.keys)
        dirty = int(raw[:, gaps].any(axis=1).sum())
        same = len(raw) - len(np.unique(raw[:, ~gaps], axis=0))
    if dirty:
        twice = f"; {same:,} are there once more, but for the padding" if same else ""
        yield Diagnostic(
            "cause",
            f"{dirty:,} of {len(state.snapshot or ()):,} keys have left-over bytes in the "
            f"{int(gaps.sum())} bytes of padding: whoever has other bytes there does not find "
            f"them{twice}.",
            clear + " Write the entries anew.",
            "padded-key",
        )
    else:
        yield Diagnostic(
            "risk",
            f"The key has {int(gaps.sum())} bytes of padding, which are compared and hashed like "
            "the rest.",
            clear,
            "padded-key",
        )


def _of_its_room(state: MapState) -> Iterator[Diagnostic]:
    one, entries = state.map, _entries(state)
    share = 0.0 if entries is None else entries / one.max_entries
    full = f"{entries:,} of {one.max_entries:,} entries" if entries is not None else ""
    if one.kind in _LRU:
        almost = share >= _ALMOST_FULL
        yield Diagnostic(
            "cause" if almost else "risk",
            f"With {full} it evicts keys that nobody deleted, at each insertion."
            if almost
            else "It is an LRU map: near its end it evicts keys that nobody deleted"
            + (
                ", and with lists for each CPU already at a CPU's share."
                if one.flags & MapFlag.NO_COMMON_LRU
                else "."
            ),
            "Take an absent key for unknown, not for denied; give it twice the entries that must "
            "stay, and 128 for each CPU.",
            "lru-eviction",
        )
    elif one.kind in _HASHES | {"lpm_trie"} and share >= 1:
        yield Diagnostic(
            "cause",
            f"It is full ({full}): a new key is answered E2BIG and is not stored.",
            "Heed the answer of each update, in programs too, and give the map more room.",
            "ignored-answers",
        )
    if one.kind in _HASHES and one.flags & MapFlag.NO_PREALLOC:
        yield Diagnostic(
            "risk",
            "It has no preallocated elements: an insertion may be answered ENOMEM, most of all in "
            "bursts with interrupts off.",
            "Heed the answer of each update, or preallocate.",
            "no-prealloc",
        )


def _of_its_values(state: MapState) -> Iterator[Diagnostic]:
    one = state.map
    if state.locked:
        yield Diagnostic(
            "risk",
            "The value has a bpf_spin_lock, which a plain update or lookup passes by.",
            "Update and look up with BPF_F_LOCK.",
            "torn-reads",
        )
    elif one.value_size > 8 and one.kind in _HASHES | _LRU | _ARRAYS:
        yield Diagnostic(
            "risk",
            f"A value of {one.value_size:,} bytes can be read half old and half new.",
            "Put a bpf_spin_lock into it and use BPF_F_LOCK, or a checksum, or switch a whole map.",
            "torn-reads",
        )
    if one.kind in _PER_CPU:
        unlike = ""
        if state.snapshot is not None and len(state.snapshot):
            values = state.snapshot.values
            slots = _bytes_of(values).reshape(len(values), values.shape[1], -1)
            differ = int((slots != slots[:, :1]).any(axis=(1, 2)).sum())
            unlike = f" They are not alike in {differ:,} of {len(values):,} entries."
        yield Diagnostic(
            "risk",
            "It has a value for each CPU: a program's update changes that of its own CPU alone, "
            f"bpf(2) writes all of them.{unlike}",
            "Read all slots and combine them, and write from one side only.",
            "per-cpu-slot",
        )


def _of_its_kind(state: MapState) -> Iterator[Diagnostic]:
    kind = state.map.kind
    if kind in _HASHES:
        yield Diagnostic(
            "risk",
            "It is a hash: at the moment at which a key is overwritten, a program may find it "
            "absent, and an iteration may skip it.",
            "Look again once before you believe that a key is absent; read the map by batch.",
            "transient-null",
        )
    elif kind in _STREAMS:
        yield Diagnostic(
            "risk",
            "It is a stream: it has no values that could be looked up, and loses what finds no "
            "room.",
            "Consume it, and count in the producer what was dropped.",
            "ring-buffer-facts" if "ringbuf" in kind else "perf-array-lookup",
        )


def padding(dtype: np.dtype[Any]) -> npt.NDArray[np.bool_]:
    """Which bytes of a layout belong to no field.

    Parameters
    ----------
    dtype : numpy.dtype
        Structured, nested or plain.

    Returns
    -------
    numpy.ndarray
        bool, shape ``(dtype.itemsize,)``.
    """
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return np.tile(padding(base), int(np.prod(shape)))
    if dtype.fields is None:
        return np.zeros(dtype.itemsize, np.bool_)
    gaps = np.ones(dtype.itemsize, np.bool_)
    for inner, at, *_ in dtype.fields.values():
        gaps[at : at + inner.itemsize] = padding(inner)
    return gaps


def _bytes_of(rows: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The bytes of an array, one row for each of its first axis, padding as it stands."""
    return np.frombuffer(rows.tobytes(), np.uint8).reshape(len(rows), -1)


def _entries(state: MapState) -> int | None:
    if state.map.kind in _ARRAYS:
        return state.map.max_entries
    return None if state.snapshot is None else len(state.snapshot)


# -- words -------------------------------------------------------------------------------


def _heading(state: MapState) -> list[str]:
    one, entries = state.map, _entries(state)
    room = f"{one.max_entries:,} entries" if entries is None else (
        f"{entries:,} of {one.max_entries:,} entries"
    )  # fmt: skip
    lines = [
        f"map {one.id} {one.name or '(no name)'}: {one.kind}, key {one.key_size} B, "
        f"value {one.value_size} B, {room}, {one.memlock_bytes:,} B of memory",
        f"  held by  {', '.join(state.objects.holders(one)) or 'no process and no pin in sight'}",
    ]
    users = state.users(one.id)
    for user in users:
        where = ", ".join(state.objects.attached(user.id))
        lines.append(
            f"  used by  program {user.id} {user.name} ({user.kind}), "
            + (f"attached: {where}" if where else "no link or perf event holds it")
        )
    return lines if users else [*lines, "  used by  no program"]


def _paragraph(diagnostic: Diagnostic) -> str:
    return "\n".join(
        textwrap.fill(words, _WIDTH, initial_indent=first, subsequent_indent=" " * 9)
        for first, words in (
            (f"  {diagnostic.weight:5}  ", diagnostic.says),
            (" " * 9, f"{diagnostic.do} (python -m labkit run {diagnostic.experiment})"),
        )
    )


def _programs(users: list[ProgramObject]) -> str:
    """Name programs as the subject of a sentence, with the verb."""
    names = [f"{user.id} {user.name}".strip() for user in users]
    return f"program{'s' if len(names) > 1 else ''} {_listed(names)} use{'' if names[1:] else 's'}"


def _listed(items: list[Any]) -> str:
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
