"""Maps that are no plain tables: what is in force in them, how full they are, what nobody can see.

Program arrays, maps of devices, CPUs and sockets, stack traces, ring buffers, ``struct_ops``. Each
is looked at as far as that changes nothing, for two seconds at most.
"""

from __future__ import annotations

import mmap
import re
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from ctypes import create_string_buffer
from dataclasses import dataclass, replace
from pathlib import Path
from socket import if_indextoname
from typing import Final

from labkit.inspect.diagnostic import Diagnostic, listed
from labkit.kernel import libbpf
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.maps import Map, map_error
from labkit.kernel.objects import MapObject, Objects
from labkit.kernel.ringbuf import BUSY, DISCARDED, slot_bytes

MOST_SECONDS: Final = 2.0
"""A look at the elements of a map ends after that time."""

LOOKED_AGAIN_AFTER_S: Final = 0.2
"""Pause between the two looks at a ring's positions, seconds."""

_MOST_RECORDS: Final = 4096
_SHOWN: Final = 8
_PRESERVE_ELEMENTS, _OVERWRITE = 1 << 11, 1 << 19  # BPF_F_PRESERVE_ELEMS, BPF_F_RB_OVERWRITE

RINGS: Final = {"ringbuf", "user_ringbuf"}
_DEVICES: Final = {"devmap", "devmap_hash"}
_SOCKETS: Final = {"sockmap", "sockhash", "reuseport_sockarray"}
_BY_LOOKUP: Final = {"prog_array", "cpumap", "sockmap", "reuseport_sockarray"} | _DEVICES
_BY_KEY: Final = {"stack_trace", "sockhash", "cgroup_storage", "percpu_cgroup_storage"}
_WAITING: Final = {"queue", "stack"}
_STORAGE: Final = {
    "sk_storage": "socket", "inode_storage": "inode", "task_storage": "task",
    "cgrp_storage": "cgroup",
}  # fmt: skip
_UNITS: Final = {
    "stack_trace": "buckets", "ringbuf": "bytes", "user_ringbuf": "bytes", "arena": "pages",
    "cgroup_storage": "cgroups", "percpu_cgroup_storage": "cgroups",
}  # fmt: skip
_READY: Final = "ready for a link"
_STATES: Final = ("not registered yet", "in use", "being taken away", _READY)

_UNSEEN: Final = {
    "prog_array": "whether an index that is empty should hold a program",
    "devmap": "devices of other network namespaces by their names",
    "devmap_hash": "devices of other network namespaces by their names",
    "sockmap": "which process has a socket that stands in it",
    "sockhash": "which process has a socket that stands in it",
    "reuseport_sockarray": "which process has a socket that stands in it",
    "cpumap": "how many packets wait for each CPU",
    "xskmap": "which sockets stand in it: bpf(2) shows none; one that is closed leaves it",
    "perf_event_array": "which events stand in it and how full their buffers are: only who mapped "
    "them knows",
    "cgroup_array": "which cgroups stand in it: bpf(2) shows none",
    "stack_trace": "the stacks: to look one up takes it out of the map for a moment",
    "queue": "how many elements wait: bpf(2) shows the next one alone",
    "stack": "how many elements wait: bpf(2) shows the next one alone",
    "bloom_filter": "what was put in: it tells of a value only whether it may be there",
    "arena": "its memory: to read a page that is not there allocates it",
    "ringbuf": "how many records found no room: the kernel does not count them, the program must",
    "user_ringbuf": "how many records found no room: the kernel does not count them",
    "struct_ops": "whether the kernel calls its programs",
    "cgroup_storage": "the values, one for each cgroup and attachment",
    "percpu_cgroup_storage": "the values, one for each cgroup and attachment",
    "array_of_maps": "which map stands at which index",
    "hash_of_maps": "which map stands under which key",
}  # fmt: skip


@dataclass(frozen=True)
class Ring:
    """Positions of a ring buffer, looked at twice.

    Attributes
    ----------
    consumer, producer : tuple of int
        Bytes since the ring was made, at the first and the second look.
    records : int
        Records that wait, of the first 4,096.
    largest : int
        Bytes of the largest of them, header included; 0 where none waits.
    front_busy : bool
        The record in front is reserved and not submitted yet.
    """

    consumer: tuple[int, int]
    producer: tuple[int, int]
    records: int
    largest: int
    front_busy: bool

    @property
    def unread(self) -> tuple[int, int]:
        """Bytes between the positions, at both looks."""
        return self.producer[0] - self.consumer[0], self.producer[1] - self.consumer[1]


@dataclass(frozen=True)
class Inside:
    """What is in force in a map of a special kind.

    Attributes
    ----------
    taken : int or None
        Elements, buckets or bytes; None where that cannot be seen.
    complete : bool
        Whether all of it was looked at in time.
    elements : tuple of (key, value)
        Where both are numbers: index and program id, key and ifindex.
    devices : tuple of (ifindex, name)
        Those of the first elements that have a name in this network namespace.
    owner : str
        Type of the programs that a program array takes, once it is known: that of its users.
    ring : Ring or None
        Of a ring buffer.
    state : str
        Of a ``struct_ops`` map, in words.
    waiting : bool or None
        Whether anything waits in a queue or stack.
    refused : str
        Name of the error that the look was answered.
    """

    taken: int | None = None
    complete: bool = True
    elements: tuple[tuple[int, int], ...] = ()
    devices: tuple[tuple[int, str], ...] = ()
    owner: str = ""
    ring: Ring | None = None
    state: str = ""
    waiting: bool | None = None
    refused: str = ""


NOTHING: Final = Inside()
"""Nothing was seen: of the plain tables, and of types that show nothing."""


def look(table: Map, most_seconds: float = MOST_SECONDS) -> Inside:
    """Look into a map, and change nothing.

    Parameters
    ----------
    table : Map
        Of any type.
    most_seconds : float
        When to end, wherever it is.

    Returns
    -------
    Inside
        `NOTHING` for a type that shows nothing, and for the plain tables.
    """
    kind = table.kind.name.lower()
    try:
        if kind in RINGS:
            ring = _ring(table)
            return Inside(taken=ring.unread[1], ring=ring)
        if kind in _BY_LOOKUP | _BY_KEY:
            inside = _elements(table, most_seconds, by_lookup=kind in _BY_LOOKUP)
            if kind == "prog_array":
                return replace(inside, owner=_owner(table.fd))
            return replace(inside, devices=_names(inside)) if kind in _DEVICES else inside
        if kind == "struct_ops":
            return _struct_ops(table)
        if kind in _WAITING:
            answer = libbpf.api().bpf_map_lookup_elem(
                table.fd, None, create_string_buffer(table.value_size)
            )
            return Inside(waiting=answer == 0)
    except OSError as error:
        return Inside(refused=libbpf.error_name(error.errno or 0))
    return NOTHING


def still_held_by(map_id: int, pids: Iterable[int]) -> tuple[int, ...]:
    """Which processes still hold a descriptor of a map after `LOOKED_AGAIN_AFTER_S`.

    Parameters
    ----------
    map_id : int
        The map.
    pids : iterable of int
        Those that did.
    """
    time.sleep(LOOKED_AGAIN_AFTER_S)
    line = re.compile(rb"^map_id:\s+%d$" % map_id, re.M)
    return tuple(pid for pid in pids if _has_descriptor(pid, line))


def _has_descriptor(pid: int, line: re.Pattern[bytes]) -> bool:
    with suppress(OSError):
        for info in Path(f"/proc/{pid}/fdinfo").iterdir():
            with suppress(OSError):
                if line.search(info.read_bytes()):
                    return True
    return False


def _elements(table: Map, most_seconds: float, *, by_lookup: bool) -> Inside:
    lib, deadline = libbpf.api(), time.monotonic() + most_seconds
    key, following = (create_string_buffer(max(table.key_size, 1)) for _ in range(2))
    value = create_string_buffer(max(table.value_size, 8))
    numbers = table.key_size == 4 and by_lookup
    found: list[tuple[int, int]] = []
    taken, previous, complete = 0, None, False
    for _ in range(2 * table.max_entries + 65_536):
        result = lib.bpf_map_get_next_key(table.fd, previous, following)
        if result == -2:  # ENOENT: there is no other
            complete = True
            break
        if result < 0:
            raise map_error(-result, f"Listing the keys of map {table.name} (id {table.id})")
        answer = lib.bpf_map_lookup_elem(table.fd, following, value) if by_lookup else 0
        if answer == 0:
            taken += 1
            if numbers:
                found.append((_word(following.raw), _word(value.raw)))
        elif answer != -2:
            raise map_error(-answer, f"Reading map {table.name} (id {table.id})")
        key, following = following, key
        previous = key
        if time.monotonic() > deadline:
            break
    return Inside(taken=taken, complete=complete, elements=tuple(found))


def _names(inside: Inside) -> tuple[tuple[int, str], ...]:
    found = []
    for _, number in inside.elements[:_SHOWN]:
        with suppress(OSError):  # it is of another network namespace
            found.append((number, if_indextoname(number)))
    return tuple(found)


def _word(raw: bytes) -> int:
    return int(struct.unpack_from("=I", raw)[0])


def _owner(fd: int) -> str:
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "owner_prog_type":
            try:
                return ProgramKind(int(value)).name.lower()
            except ValueError:
                return f"type {int(value)}"
    return ""


def _struct_ops(table: Map) -> Inside:
    value = create_string_buffer(max(table.value_size, 8))
    answer = libbpf.api().bpf_map_lookup_elem(table.fd, struct.pack("=I", 0), value)
    if answer < 0:
        raise map_error(-answer, f"Reading map {table.name} (id {table.id})")
    number = struct.unpack_from("=II", value.raw)[1]  # behind the count of references
    return Inside(state=_STATES[number] if number < len(_STATES) else f"state {number}")


def _ring(table: Map) -> Ring:
    page, capacity = mmap.PAGESIZE, table.max_entries
    with (
        mmap.mmap(table.fd, page, mmap.MAP_SHARED, mmap.PROT_READ) as consumer,
        mmap.mmap(
            table.fd, page + 2 * capacity, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
        ) as producer,
    ):

        def positions() -> tuple[int, int]:
            # The consumer's first: it follows, so that the difference is never negative.
            return (
                int(struct.unpack_from("=Q", consumer)[0]),
                int(struct.unpack_from("=Q", producer)[0]),
            )

        first = positions()
        if first[0] != first[1]:
            time.sleep(LOOKED_AGAIN_AFTER_S)
        second = positions()
        records, largest, busy = _waiting(producer, page, capacity, second)
    return Ring((first[0], second[0]), (first[1], second[1]), records, largest, busy)


def _waiting(
    data: mmap.mmap, start: int, capacity: int, positions: tuple[int, int]
) -> tuple[int, int, bool]:
    """Records between two positions, the size of the largest, and whether the front is busy."""
    at, end = positions
    records = largest = 0
    front_busy = False
    while at < end and records < _MOST_RECORDS:
        header = int(struct.unpack_from("=I", data, start + (at & (capacity - 1)))[0])
        slot = slot_bytes(header & (DISCARDED - 1))
        if slot > capacity:
            break  # the producer has gone on meanwhile
        front_busy |= records == 0 and header >= BUSY
        records, largest, at = records + 1, max(largest, slot), at + slot
    return records, largest, front_busy


# -- judging -----------------------------------------------------------------------------


def judge(one: MapObject, inside: Inside, now: Objects, users: list[int]) -> Iterator[Diagnostic]:
    """Judge what is in force in a map.

    Parameters
    ----------
    one : MapObject
        The map.
    inside : Inside
        What was seen in it.
    now : Objects
        All objects of the same moment.
    users : list of int
        Ids of the programs that refer to it.

    Yields
    ------
    Diagnostic
        In no particular order.
    """
    if one.kind == "prog_array":
        yield from _of_a_program_array(one, inside, users)
    elif one.kind in _DEVICES:
        yield from _of_devices(one, inside, users)
    elif one.kind in _SOCKETS | {"cpumap"} and inside.taken == 0 and inside.complete and users:
        yield Diagnostic(
            "risk",
            f"Nothing stands in it (0 of {one.max_entries:,}): what programs redirect through it "
            "finds no target"
            + ("." if one.kind == "cpumap" else ", and a socket that is closed leaves it."),
            "Look whether its writer runs, and whether it writes to this map.",
        )
    elif one.kind == "stack_trace":
        yield from _of_stacks(one, inside)
    elif inside.ring is not None:
        yield from _of_a_ring(one, inside.ring, now.holders(one))
    elif one.kind == "perf_event_array" and users and not one.pids:
        if not one.flags & _PRESERVE_ELEMENTS:
            yield Diagnostic(
                "risk",
                "No process in sight holds it, and its events go with the descriptor by which they "
                "were put in: what programs send is answered ENOENT.",
                "Start the reader again.",
                "perf-array-lookup",
            )
    elif one.kind == "struct_ops" and inside.state == _READY and not _linked(one, now):
        yield Diagnostic(
            "cause",
            "It is ready for a link and has none: the kernel calls its programs while a link to it "
            "lives.",
            "Attach it, and keep the link or pin it.",
        )


def _linked(one: MapObject, now: Objects) -> bool:
    return any(
        link.kind == "struct_ops" and f"map_id={one.id}" in link.target.split()
        for link in now.links.values()
    )


def _of_a_program_array(one: MapObject, inside: Inside, users: list[int]) -> Iterator[Diagnostic]:
    if inside.taken != 0 or not inside.complete:
        return
    takes = (
        f" It takes programs of type {inside.owner} alone, that of its first user: another one is "
        "answered EINVAL."
        if inside.owner
        else ""
    )
    empty = f"It is empty: none of its {one.max_entries:,} indices holds a program"
    if users and not one.pids and not one.pins:
        yield Diagnostic(
            "cause",
            f"{empty}, and neither a process nor a pin in sight holds it: each tail call through "
            "it falls through. The kernel clears a program array when its last descriptor and its "
            f"last pin go, though a program goes on to use it.{takes}",
            "Pin it, or let its loader keep it open, and put the programs in again: bpftool map "
            f"update id {one.id} key ... value id ..., while something holds it.",
            "map-life",
        )
    else:
        yield Diagnostic(
            "risk",
            f"{empty}: a tail call through it falls through.{takes}",
            "Heed the answer of each update, and put in programs of the type that it takes.",
            "ignored-answers",
        )


def _of_devices(one: MapObject, inside: Inside, users: list[int]) -> Iterator[Diagnostic]:
    if inside.taken == 0 and inside.complete and users:
        yield Diagnostic(
            "cause",
            f"It is empty: none of its {one.max_entries:,} entries is a device, so that no "
            "redirect through it finds one. The kernel takes an entry away with its device.",
            "Write the entries anew whenever a device is made again, for its number is another "
            "one then.",
        )


def _of_stacks(one: MapObject, inside: Inside) -> Iterator[Diagnostic]:
    buckets = 1 << max(one.max_entries - 1, 0).bit_length()
    if inside.taken is None or inside.taken * 2 < buckets:
        return
    full = inside.taken >= buckets
    yield Diagnostic(
        "cause" if full else "risk",
        f"{inside.taken:,} of its {buckets:,} buckets are taken: a new stack whose bucket another "
        "one has is answered EEXIST"
        + (", and as it is full, that is every new one." if full else "."),
        "Delete the stacks that were read, or give it more room.",
        "ignored-answers",
    )


def _of_a_ring(one: MapObject, ring: Ring, held: list[str]) -> Iterator[Diagnostic]:
    if ring.unread[1] <= 0 or one.flags & _OVERWRITE:
        return
    smallest = slot_bytes(1)
    full = [unread + max(ring.largest, smallest) > one.max_entries - 1 for unread in ring.unread]
    share = (
        f"{ring.unread[1]:,} of {one.max_entries:,} bytes ({ring.unread[1] / one.max_entries:.1%})"
    )
    still = ring.consumer[0] == ring.consumer[1]
    pace = (
        f"its consumer did not move for {LOOKED_AGAIN_AFTER_S:g} s"
        if still
        else "its consumer moves, and does not keep up"
    )
    reader = f"It is held by {listed(held)}." if held else "No process in sight holds it."
    front = " The record in front is reserved and not submitted." if ring.front_busy else ""
    who = "a program" if one.kind == "ringbuf" else "user space"
    if all(full):
        yield Diagnostic(
            "cause",
            f"It is full, {share} are not read, and {pace}: what {who} sends now is lost.{front} "
            f"{reader}",
            "Look whether its reader runs and consumes; give it more room, and count in the "
            "producer what was lost.",
            "ring-buffer-facts",
        )
    elif any(full) or still:
        yield Diagnostic(
            "risk",
            f"{share} are not read, and {pace}.{front} {reader}",
            "Look whether its reader runs; who sees an event late acts on old state.",
            "ring-buffer-facts",
        )


# -- words -------------------------------------------------------------------------------


def unit(kind: str) -> str:
    """What is counted in a map of this kind: ``entries``, ``bytes``, ``buckets``."""
    return _UNITS.get(kind, "entries")


def described(one: MapObject, inside: Inside, now: Objects) -> list[str]:
    """Lines of a heading that tell what is in force in a map.

    Parameters
    ----------
    one, inside, now
        As for `judge`.

    Returns
    -------
    list of str
        None for a kind of which there is nothing to be told.
    """
    told = []
    if inside.elements:
        first = inside.elements[:_SHOWN]
        words = [_element(one.kind, key, value, inside, now) for key, value in first]
        more = "" if inside.taken == len(words) else ", ..."
        told.append(f"{', '.join(words)}{more}")
    if inside.owner:
        told.append(f"takes programs of type {inside.owner} alone")
    if one.map_ids:
        told.append(
            f"maps {', '.join(map(str, one.map_ids[:_SHOWN]))}"
            + (", ..." if len(one.map_ids) > _SHOWN or not one.elements_complete else "")
        )
    if inside.ring is not None:
        ring = inside.ring
        records = f"{ring.records:,}{' or more' if ring.records == _MOST_RECORDS else ''}"
        told.append(
            f"{records} records wait, consumer at {ring.consumer[1]:,}, producer at "
            f"{ring.producer[1]:,}"
        )
    if inside.state:
        told.append(inside.state)
    if inside.waiting is not None:
        told.append("an element waits" if inside.waiting else "it is empty: nothing waits")
    if one.kind in _STORAGE:
        owner = _STORAGE[one.kind]
        told.append(f"a value stands at its {owner} and goes with it")
    return told


def _element(kind: str, key: int, value: int, inside: Inside, now: Objects) -> str:
    if kind == "prog_array":
        name = now.programs[value].name if value in now.programs else ""
        return f"{key}: program {value} {name}".rstrip()
    if kind in _DEVICES:
        here = dict(inside.devices).get(value)
        return f"{key}: ifindex {value}" + (f" ({here} here)" if here else "")
    if kind == "cpumap":
        return f"CPU {key}: a queue of {value}"
    return str(key)


def unseen(one: MapObject, inside: Inside) -> list[str]:
    """What could not be looked at in a map of this kind, in words."""
    found = []
    if inside.refused:
        found.append(f"its elements: the kernel answered {inside.refused}")
    if not inside.complete:
        found.append(f"what lies behind the first {inside.taken or 0:,}: time was up")
    if one.kind in _STORAGE:
        found.append(f"its values: the kernel does not list them, ask for a {_STORAGE[one.kind]}")
    if one.kind in _UNSEEN:
        found.append(_UNSEEN[one.kind])
    if one.kind.startswith("type "):
        found.append("anything inside: this lab does not know its type")
    return found
