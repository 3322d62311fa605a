"""Every map, program and link in the kernel, who holds it, and who refers to whom.

The kernel keeps an object as long as anything refers to it: a file descriptor, a pin, a
program, an outer map, a link, an attachment. This module draws that graph, for diagnosis
(which map does the attached program really use?) and for the leak check around tests.

It reads what is there at that moment. Objects, processes and mounts that vanish in the
meantime are left out without a word.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from labkit.errors import Unavailable
from labkit.kernel import libbpf
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.provenance import emulated

_BPF_FS_MAGIC: Final = 0xCAFE4A11
_ELEMENTS_READ_S: Final = 0.05  # before Linux 6.8 each read of an outer map waits for RCU,
_EMULATED_READ_S: Final = 0.5  # which takes longer than that where the CPUs are emulated
_FULL_READS: Final = (
    40  # so many maps may take all of that time; where more do, the rest goes unread
)
_OWN, _NAMED, _OF_PROCESS, _ELSEWHERE = range(4)  # which path opens a network namespace best
_LINK_KINDS: Final = (
    "unspec", "raw_tracepoint", "tracing", "cgroup", "iter", "netns", "xdp", "perf_event",
    "kprobe_multi", "struct_ops", "netfilter", "tcx", "uprobe_multi", "netkit", "sockmap",
)  # fmt: skip
_PERF_KINDS: Final = (
    "raw_tracepoint", "tracepoint", "kprobe", "kretprobe", "uprobe", "uretprobe",
)  # fmt: skip
_COMMON_FIELDS: Final = frozenset(
    ("pos", "flags", "mnt_id", "ino", "link_type", "link_id", "prog_tag", "prog_id")
)


@dataclass(frozen=True)
class MapObject:
    """One map.

    Attributes
    ----------
    id : int
        The kernel's id; never used twice before a reboot, so equal ids are the same map.
    name : str
        At most 15 bytes; not unique.
    kind : str
        ``hash``, ``array_of_maps``, ...
    key_size, value_size : int
        Bytes.
    max_entries : int
        Entries; for a ring buffer, bytes.
    flags : int
        Creation flags.
    memlock_bytes : int
        Memory that the kernel charges for it.
    frozen : bool
        User space may not write to it any more.
    map_ids, program_ids : tuple of int
        Elements of a map of maps, and of a program array: it keeps these alive.
    elements_complete : bool
        False where there were more elements than could be read in a bounded time.
    pids : tuple of int
        Processes that hold a descriptor of it, or a private bpffs with a pin of it.
    pins : tuple of str
        Paths of its pins, as this process can reach them.
    """

    id: int
    name: str
    kind: str
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    memlock_bytes: int
    frozen: bool
    map_ids: tuple[int, ...]
    program_ids: tuple[int, ...]
    elements_complete: bool
    pids: tuple[int, ...] = ()
    pins: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProgramObject:
    """One loaded program.

    Attributes
    ----------
    id : int
        The kernel's id.
    name, kind, tag : str
        Name (15 bytes), type, and the kernel's hash of the instructions.
    memlock_bytes : int
        Memory that the kernel charges for it.
    jited_bytes : int
        Machine code; 0 where it is interpreted, or hidden from this user.
    map_ids : tuple of int
        The maps it refers to: these very ones, whatever else has the same name.
    btf_id : int
        Its BTF, which the programs of one loaded object have in common; 0 where it has none.
    attach_btf_id : int
        The kernel's function, by BTF, that it was loaded for; 0 where it is not of such a type.
    pids : tuple of int
        Processes that hold a descriptor of it, a perf event that runs it, or a private
        bpffs with a pin of it.
    pins : tuple of str
        Paths of its pins.
    """

    id: int
    name: str
    kind: str
    tag: str
    memlock_bytes: int
    jited_bytes: int
    map_ids: tuple[int, ...]
    pids: tuple[int, ...] = ()
    pins: tuple[str, ...] = ()
    btf_id: int = 0
    attach_btf_id: int = 0


@dataclass(frozen=True)
class LinkObject:
    """One link: the attachment of a program, as an object.

    Attributes
    ----------
    id : int
        The kernel's id.
    kind : str
        ``raw_tracepoint``, ``tracing``, ``xdp``, ...
    program_id : int
        The program that it runs.
    target : str
        What the kernel says it is attached to, such as ``tp_name=sys_enter``.
    pids, pins : tuple
        As of a map.
    fields : mapping from str to str
        The same as ``target``, by the names of the kernel: ``ifindex``, ``attach_type``, ...
    """

    id: int
    kind: str
    program_id: int
    target: str
    pids: tuple[int, ...] = ()
    pins: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class PerfAttachment:
    """A program that runs through a perf event: tracepoints and probes without a link.

    Attributes
    ----------
    pid : int
        Process that holds the event.
    program_id : int
        The program that it runs; 0 where the kernel does not tell (type ``perf_event``).
    kind, target : str
        ``tracepoint``, ``kprobe``, ...; and the event or function.
    """

    pid: int
    program_id: int
    kind: str
    target: str


_AnyObject = MapObject | ProgramObject | LinkObject


@dataclass(frozen=True)
class Objects:
    """Objects of one moment, by id.

    Attributes
    ----------
    maps, programs, links : mapping from id to object
        In ascending order of their ids.
    perf_attachments : tuple of PerfAttachment
        Attachments that are no objects of their own.
    processes : mapping from pid to str
        Names of the processes that hold any of them.
    network_namespaces : mapping from int to str
        Every network namespace that a process is in, holds open or has mounted: a path that opens
        it, by the number of its inode. That of this process comes first.
    """

    maps: Mapping[int, MapObject] = field(default_factory=dict)
    programs: Mapping[int, ProgramObject] = field(default_factory=dict)
    links: Mapping[int, LinkObject] = field(default_factory=dict)
    perf_attachments: tuple[PerfAttachment, ...] = ()
    processes: Mapping[int, str] = field(default_factory=dict)
    network_namespaces: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """Count of maps, programs and links."""
        return len(self.maps) + len(self.programs) + len(self.links)

    def owned_by(self, pids: Iterable[int]) -> Objects:
        """Objects that live because of these processes.

        Parameters
        ----------
        pids : iterable of int
            For example ``family(os.getpid())``.

        Returns
        -------
        Objects
            What they hold themselves, and what that refers to: the program of a link, the
            maps of a program, the elements of an outer map.
        """
        wanted = set(pids)
        return self._reached(lambda one: not wanted.isdisjoint(one.pids))

    def orphans(self) -> Objects:
        """Objects without a holder in sight.

        Returns
        -------
        Objects
            Neither a process nor a pin keeps them, directly or through another object. Such
            a one is attached through netlink or a cgroup, lives in a mapping or a socket, is
            an element of an outer map that could not be read in full, or is being freed.
        """
        held = self._reached(lambda one: bool(one.pids or one.pins))
        return self._without(held)

    def holders(self, one: _AnyObject) -> list[str]:
        """Processes with a descriptor of an object, as ``name[pid]``, and its pins."""
        return [*(f"{self.processes.get(pid, '?')}[{pid}]" for pid in one.pids), *one.pins]

    def outer(self, map_id: int) -> tuple[int, ...]:
        """Ids of the maps of maps that hold a map, ascending."""
        return self._outer.get(map_id, ())

    def users(self, map_id: int) -> tuple[ProgramObject, ...]:
        """Programs that refer to a map, or to a map of maps that holds it, by ascending id."""
        found = {i for one in (map_id, *self.outer(map_id)) for i in self._users.get(one, ())}
        return tuple(self.programs[i] for i in sorted(found))

    def twins(self, map_id: int) -> tuple[MapObject, ...]:
        """Other maps of the same name, type, key size and value size, by ascending id."""
        alike = self._alike.get(_shape(self.maps[map_id]), ())
        return tuple(self.maps[i] for i in alike if i != map_id)

    @functools.cached_property
    def _outer(self) -> dict[int, tuple[int, ...]]:
        return _grouped((inner, one.id) for one in self.maps.values() for inner in one.map_ids)

    @functools.cached_property
    def _users(self) -> dict[int, tuple[int, ...]]:
        return _grouped((used, one.id) for one in self.programs.values() for used in one.map_ids)

    @functools.cached_property
    def _alike(self) -> dict[object, tuple[int, ...]]:
        return _grouped((_shape(one), one.id) for one in self.maps.values() if one.name)

    def _reached(self, begins: Callable[[_AnyObject], bool]) -> Objects:
        links = {i for i, link in self.links.items() if begins(link)}
        programs = {i for i, program in self.programs.items() if begins(program)}
        programs |= {self.links[i].program_id for i in links}
        maps = {i for i, one in self.maps.items() if begins(one)}
        while True:
            before = len(maps) + len(programs)
            for i in maps & self.maps.keys():
                maps = maps.union(self.maps[i].map_ids)
                programs = programs.union(self.maps[i].program_ids)
            for i in programs & self.programs.keys():
                maps = maps.union(self.programs[i].map_ids)
            if len(maps) + len(programs) == before:
                return self._only(maps, programs, links)

    def _only(self, maps: set[int], programs: set[int], links: set[int]) -> Objects:
        kept = Objects(
            {i: one for i, one in self.maps.items() if i in maps},
            {i: one for i, one in self.programs.items() if i in programs},
            {i: one for i, one in self.links.items() if i in links},
            tuple(one for one in self.perf_attachments if one.program_id in programs),
        )
        holders = {pid for one in kept._each() for pid in one.pids}
        names = {pid: name for pid, name in self.processes.items() if pid in holders}
        return replace(kept, processes=names, network_namespaces=self.network_namespaces)

    def _without(self, others: Objects) -> Objects:
        return self._only(
            self.maps.keys() - others.maps.keys(),
            self.programs.keys() - others.programs.keys(),
            self.links.keys() - others.links.keys(),
        )

    def _each(self) -> Iterator[_AnyObject]:
        yield from self.maps.values()
        yield from self.programs.values()
        yield from self.links.values()

    def __str__(self) -> str:
        """One line per object, for messages of failed checks."""
        orphans = set(self.orphans()._each())
        lines = []
        for one in self._each():
            what = type(one).__name__.removesuffix("Object").lower()
            label = one.target if isinstance(one, LinkObject) else one.name
            held = ", ".join(self.holders(one)) or (
                "no holder in sight" if one in orphans else "held through another object"
            )
            lines.append(f"{what} {one.id} {label} ({one.kind}): {held}")
        return "\n".join(lines) or "no objects"


def snapshot() -> Objects:
    """Look at every map, program and link in the kernel.

    To look at an object is to open it. Whoever opens a program array, with this, bpftool or
    anything else, between its last close and the kernel's own clearing of it a moment later,
    makes the kernel count one reference too many, and the empty array stays until the next boot:
    ``prog_array_map_clear`` (kernel/bpf/arraymap.c) takes a reference for a work item that may be
    queued already.

    Returns
    -------
    Objects
        As of about now; it takes a few milliseconds where there are few processes.

    Raises
    ------
    Unavailable
        This user may not list BPF objects, or the machine has no libbpf.
    """
    try:
        listed = {of: libbpf.ids(of) for of in ("map", "prog", "link")}
    except OSError as error:
        raise Unavailable(
            f"The kernel refuses to list BPF objects ({libbpf.error_name(error.errno or 0)}): "
            "run as root."
        ) from error
    # In this order: a descriptor that is open while it is looked at must not count as a holder.
    elements = _Elements()
    maps = [one for id in listed["map"] if (one := _read_map(id, elements))]
    programs = [one for one in map(_read_program, listed["prog"]) if one]
    links = [one for one in map(_read_link, listed["link"]) if one]
    held = _Held()
    names = {pid: _process_name(pid) for pid in set().union(*held.pids.values())}
    return Objects(
        {one.id: replace(one, **held.by("map", one.id)) for one in maps},
        {one.id: replace(one, **held.by("prog", one.id)) for one in programs},
        {one.id: replace(one, **held.by("link", one.id)) for one in links},
        tuple(held.perf),
        names,
        held.network_namespaces(),
    )


@dataclass(frozen=True)
class Difference:
    """What changed between two snapshots.

    Attributes
    ----------
    added, removed : Objects
        Objects of the later one alone, and of the earlier one alone.
    """

    added: Objects
    removed: Objects


def difference(before: Objects, after: Objects) -> Difference:
    """Compare two snapshots by id.

    Parameters
    ----------
    before, after : Objects
        In the order in which they were taken.

    Returns
    -------
    Difference
        Objects of all processes; ``difference(...).added.owned_by(family(os.getpid()))`` is
        what this process and its children have left open in between.
    """
    return Difference(after._without(before), before._without(after))


def family(pid: int) -> set[int]:
    """Return the ids of a process and of all that descend from it, as far as they live."""
    parents: dict[int, list[int]] = {}
    for child in _processes():
        with suppress(OSError, ValueError, IndexError):
            stat = Path(f"/proc/{child}/stat").read_bytes()
            parents.setdefault(int(stat.rpartition(b")")[2].split()[1]), []).append(child)
    found: set[int] = set()
    new = {pid}
    while new:
        found |= new
        new = {child for one in new for child in parents.get(one, ())} - found
    return found


@contextmanager
def _opened(of: str, identifier: int) -> Iterator[int]:
    fd = libbpf.fd_by_id(of, identifier)
    try:
        yield fd
    finally:
        libbpf.close(fd)


def _read_map(identifier: int, reading: _Elements) -> MapObject | None:
    with suppress(OSError), _opened("map", identifier) as fd:
        info = libbpf.map_info(fd)
        known = _fdinfo(os.getpid(), fd)
        kind = _kind_name(MapKind, info.type)
        elements: tuple[int, ...] = ()
        complete = True
        if kind in ("array_of_maps", "hash_of_maps", "prog_array"):
            elements, complete = reading.of(fd, kind, info.key_size, info.max_entries)
        return MapObject(
            id=info.id,
            name=libbpf.shown(info.name),
            kind=kind,
            key_size=info.key_size,
            value_size=info.value_size,
            max_entries=info.max_entries,
            flags=info.map_flags,
            memlock_bytes=int(known.get("memlock", "0")),
            frozen=known.get("frozen") == "1",
            map_ids=() if kind == "prog_array" else elements,
            program_ids=elements if kind == "prog_array" else (),
            elements_complete=complete,
        )
    return None


class _Elements:
    """Reads the elements of maps, in a bounded time for each and for all of them."""

    def __init__(self) -> None:
        self._most_s = _EMULATED_READ_S if emulated() else _ELEMENTS_READ_S
        self._left_s = _FULL_READS * self._most_s

    def of(
        self, fd: int, kind: str, key_size: int, max_entries: int
    ) -> tuple[tuple[int, ...], bool]:
        """Ids of the objects that a map holds as its elements, and whether these are all.

        Where a read does not wait, only the time counts in which it runs: a busy machine is no
        reason to leave elements out.
        """
        clock = time.thread_time if kind == "prog_array" else time.monotonic
        begun = clock()
        deadline = begun + min(self._most_s, self._left_s)
        lookup, value = libbpf.api().bpf_map_lookup_elem, ctypes.c_uint32()
        where = ctypes.byref(value)
        found: set[int] = set()
        keys = _listed(fd, key_size) if kind == "hash_of_maps" else _indices(max_entries)
        complete = True
        for turn, key in enumerate(keys):
            if lookup(fd, key, where) == 0:
                found.add(value.value)
            elif turn % 64:
                continue  # an index without an element is passed over at once
            if clock() > deadline:
                complete = False
                break
        self._left_s -= clock() - begun
        return tuple(sorted(found)), complete


def _indices(count: int) -> Iterator[Any]:
    """Each index as a key of an array; the same place in memory every time."""
    key = ctypes.c_uint32()
    where = ctypes.byref(key)
    for key.value in range(count):
        yield where


def _listed(fd: int, key_size: int) -> Iterator[Any]:
    """Each key of a hash, as long as the next one is not asked for."""
    following = libbpf.api().bpf_map_get_next_key
    key, spare = (ctypes.create_string_buffer(key_size) for _ in range(2))
    previous = None
    while following(fd, previous, spare) == 0:
        yield spare
        key, spare = spare, key
        previous = key


def _read_program(identifier: int) -> ProgramObject | None:
    with suppress(OSError), _opened("prog", identifier) as fd:
        info = libbpf.prog_info(fd)
        known = _fdinfo(os.getpid(), fd)
        return ProgramObject(
            id=info.id,
            name=libbpf.shown(info.name),
            kind=_kind_name(ProgramKind, info.type),
            tag=known.get("prog_tag", ""),
            memlock_bytes=int(known.get("memlock", "0")),
            jited_bytes=info.jited_prog_len,
            map_ids=tuple(libbpf.prog_map_ids(fd)),
            btf_id=info.btf_id,
            attach_btf_id=info.attach_btf_id,
        )
    return None


def _read_link(identifier: int) -> LinkObject | None:
    with suppress(OSError), _opened("link", identifier) as fd:
        info = libbpf.LinkInfo()
        libbpf.object_info(fd, info)
        known = _fdinfo(os.getpid(), fd)
        fields = {k: v for k, v in known.items() if k not in _COMMON_FIELDS}
        known_kind = info.type < len(_LINK_KINDS)
        return LinkObject(
            id=info.id,
            kind=_LINK_KINDS[info.type] if known_kind else f"type {info.type}",
            program_id=info.prog_id,
            target=" ".join(f"{name}={value}" for name, value in fields.items()),
            fields=fields,
        )
    return None


def _kind_name(kinds: type[MapKind] | type[ProgramKind], number: int) -> str:
    try:
        return kinds(number).name.lower()
    except ValueError:
        return f"type {number}"


def _shape(one: MapObject) -> tuple[object, ...]:
    return one.name, one.kind, one.key_size, one.value_size


def _grouped(pairs: Iterable[tuple[Any, int]]) -> dict[Any, tuple[int, ...]]:
    found: dict[Any, list[int]] = {}
    for key, number in pairs:
        found.setdefault(key, []).append(number)
    return {key: tuple(numbers) for key, numbers in found.items()}


class _Held:
    """Who holds which object: descriptors of every process, and pins in every bpffs."""

    def __init__(self) -> None:
        self.pids: dict[tuple[str, int], set[int]] = {}
        self.perf: list[PerfAttachment] = []
        self._pins: dict[tuple[str, int], list[str]] = {}
        self._walked: set[int] = set()
        self._networks: list[tuple[int, int, str]] = []
        mounts: dict[str, list[int]] = {}  # processes of every mount namespace
        private: list[tuple[int, str]] = []
        ours = os.getpid()
        for pid in [ours, *(one for one in _processes() if one != ours)]:
            with suppress(OSError):
                mounts.setdefault(os.readlink(f"/proc/{pid}/ns/mnt"), []).append(pid)
                path = f"/proc/{pid}/ns/net"
                self._network(_OWN if pid == ours else _OF_PROCESS, os.readlink(path), path)
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    self._descriptor(pid, fd, private)
        for pids in mounts.values():
            for pid in pids:
                try:
                    mounted = _mounts(pid)
                except OSError:
                    continue  # it has ended since; another one shows the same mounts
                root = "" if pid == ours else f"/proc/{pid}/root"
                for kind, inside, point in mounted:
                    if kind == "bpf":
                        self._walk(root + point, None)
                    else:
                        self._network(_ELSEWHERE if root else _NAMED, inside, root + point)
                break
        for pid, folder in private:
            self._walk(folder, pid)

    def by(self, of: str, identifier: int) -> dict[str, Any]:
        """Fields ``pids`` and ``pins`` of one object."""
        return {
            "pids": tuple(sorted(self.pids.get((of, identifier), ()))),
            "pins": tuple(sorted(self._pins.get((of, identifier), ()))),
        }

    def network_namespaces(self) -> dict[int, str]:
        """Paths by inode: our own first, then what has a name, a process, or but a descriptor."""
        found: dict[int, str] = {}
        for _, inode, path in sorted(self._networks):
            found.setdefault(inode, path)
        return found

    def _network(self, rank: int, called: str, path: str) -> None:
        if match := re.fullmatch(r"net:\[(\d+)\]", called):
            self._networks.append((rank, int(match[1]), path))

    def _descriptor(self, pid: int, fd: str, private: list[tuple[int, str]]) -> None:
        path = f"/proc/{pid}/fd/{fd}"
        with suppress(OSError):
            target = os.readlink(path)
            if target.startswith("anon_inode:bpf"):
                if what := _identity(_fdinfo(pid, fd)):
                    self.pids.setdefault(what, set()).add(pid)
            elif target == "anon_inode:[perf_event]":
                self._perf_event(pid, int(fd))
            elif target.startswith("net:["):
                self._network(_ELSEWHERE, target, path)
            elif target == "/" and _is_bpffs(path):  # the root of a mount without a place
                private.append((pid, path))

    def _perf_event(self, pid: int, fd: int) -> None:
        target, size = ctypes.create_string_buffer(256), ctypes.c_uint32(256)
        program, kind = ctypes.c_uint32(), ctypes.c_uint32()
        offset, address = ctypes.c_uint64(), ctypes.c_uint64()
        result = libbpf.api().bpf_task_fd_query(
            pid, fd, 0, target, *map(ctypes.byref, (size, program, kind, offset, address))
        )
        if result == -errno.EOPNOTSUPP:  # it runs a program of type perf_event, not told which
            self.perf.append(PerfAttachment(pid, 0, "perf_event", ""))
            return
        if result != 0:
            return  # an event that runs no program
        self.pids.setdefault(("prog", program.value), set()).add(pid)
        known = kind.value < len(_PERF_KINDS)
        self.perf.append(
            PerfAttachment(
                pid=pid,
                program_id=program.value,
                kind=_PERF_KINDS[kind.value] if known else f"type {kind.value}",
                target=libbpf.shown(target.value),
            )
        )

    def _walk(self, folder: str, holder: int | None) -> None:
        with suppress(OSError):
            device = os.stat(folder).st_dev
            if device in self._walked and holder is None:
                return  # mounted at several places
            self._walked.add(device)
            for parent, _, names in os.walk(folder):
                for name in names:
                    self._pin(os.path.join(parent, name), holder)

    def _pin(self, path: str, holder: int | None) -> None:
        with suppress(OSError):
            fd = libbpf.open_pin(path)
            try:
                what = _identity(_fdinfo(os.getpid(), fd))
            finally:
                libbpf.close(fd)
            if what:
                self._pins.setdefault(what, []).append(libbpf.shown(os.fsencode(path)))
                if holder is not None:
                    self.pids.setdefault(what, set()).add(holder)


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _process_name(pid: int) -> str:
    try:
        return libbpf.shown(Path(f"/proc/{pid}/comm").read_bytes().removesuffix(b"\n"))
    except OSError:
        return "?"


def _fdinfo(pid: int, fd: int | str) -> dict[str, str]:
    with open(f"/proc/{pid}/fdinfo/{fd}", "rb") as file:
        pairs = (libbpf.shown(line.strip().replace(b"\t", b" ")).partition(":") for line in file)
        return {name.strip(): value.strip() for name, _, value in pairs}


def _identity(known: Mapping[str, str]) -> tuple[str, int] | None:
    # A link's descriptor names its program too, and a program array's its owner.
    for of in ("link", "map", "prog"):
        if f"{of}_id" in known:
            return of, int(known[f"{of}_id"])
    return None


def _is_bpffs(path: str) -> bool:
    answer = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None).statfs(os.fsencode(path), answer) != 0:
        return False
    return ctypes.c_long.from_buffer(answer).value == _BPF_FS_MAGIC


def mount_point(line: bytes) -> bytes:
    """Where a line of ``mountinfo`` says that something is mounted, its octal escapes undone."""
    escaped = line.split(b" ")[4]
    return re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), escaped)


def _mounts(pid: int) -> list[tuple[str, str, str]]:
    """Type, root and point of what is mounted of bpffs and nsfs where a process is.

    Whole file systems come before parts of them.
    """
    found = []
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        for line in file:
            mount, _, rest = line.partition(b" - ")
            kind = rest.split()[0]
            if kind in (b"bpf", b"nsfs"):
                root, point = mount.split(b" ")[3], mount_point(mount)
                found.append((root != b"/", kind.decode(), os.fsdecode(root), os.fsdecode(point)))
    return [(kind, root, point) for _, kind, root, point in sorted(found)]
