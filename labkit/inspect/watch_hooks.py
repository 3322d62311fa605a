"""Hooks on the changes of any maps, told with who asked for each and what the kernel answered.

They are for looking on: an event says which process or program asked, whether it was refused and
why. `labkit.sync.trace_hook` has the leaner ones that a strategy follows one map by.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final

import numpy as np

from labkit.errors import BadInput, Unavailable
from labkit.kernel import libbpf, programs
from labkit.kernel.btf import member_offset
from labkit.kernel.closing import Closing
from labkit.kernel.compiler import LoadFailed
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import OF_MAPS, PER_CPU, Map
from labkit.kernel.programs import BpfObject, Program
from labkit.sync import trace_hook
from labkit.sync.ring_events import Channel

MECHANISMS: Final = ("functions", "syscalls")
"""As `labkit.sync.trace_hook.MECHANISMS`; kprobes know no answer, and so are none here."""

UPDATE: Final = 1
DELETE: Final = 2
LACKS_KEY: Final = 1
LACKS_VALUE: Final = 2
_FRAMES: Final = 8
_EVENTS, _BATCHES = 0, 1  # elements of the counters

TARGET: Final = np.dtype(
    [("key_size", "u4"), ("value_size", "u4"), ("call_value_size", "u4"), ("content", "u4")]
)
"""``struct target`` of bpf/watch_event.h: how the elements of one watched map are laid out."""

HOLD_OBJECTS: Final = {MapKind.PROG_ARRAY, *OF_MAPS}
"""Maps whose elements are programs or maps: given as descriptors, and read as ids."""

HOLD_SOCKETS: Final = {MapKind.SOCKMAP, MapKind.SOCKHASH}
"""Maps whose elements are sockets: given as descriptors, and read as cookies."""

UNTOLD_KINDS: Final = {
    MapKind.RINGBUF, MapKind.USER_RINGBUF, MapKind.ARENA, MapKind.STRUCT_OPS,
}  # fmt: skip
"""Kinds without elements that bpf(2) or a helper changes one by one."""

_PER_CPU_CALL: Final = {"bpf_percpu_hash_update": "on_update_slots"}
_DESCRIPTORS: Final = {
    "bpf_fd_array_map_update_elem": "on_update_fd",
    "fd_array_map_delete_elem": "on_delete",
}
_ARRAY_DELETE: Final = {"array_map_delete_elem": "on_delete"}  # it always answers EINVAL
FUNCTIONS: Final[dict[MapKind, dict[str, str]]] = {
    **trace_hook.FUNCTIONS,
    MapKind.ARRAY: {**trace_hook.FUNCTIONS[MapKind.ARRAY], **_ARRAY_DELETE},
    MapKind.PERCPU_HASH: {**trace_hook.FUNCTIONS[MapKind.PERCPU_HASH], **_PER_CPU_CALL},
    MapKind.LRU_PERCPU_HASH: {**trace_hook.FUNCTIONS[MapKind.LRU_PERCPU_HASH], **_PER_CPU_CALL},
    MapKind.PERCPU_ARRAY: {
        "array_map_update_elem": "on_update",
        "bpf_percpu_array_update": "on_update_slots",
        **_ARRAY_DELETE,
    },
    MapKind.PROG_ARRAY: _DESCRIPTORS,
    MapKind.PERF_EVENT_ARRAY: _DESCRIPTORS,
    MapKind.CGROUP_ARRAY: _DESCRIPTORS,
    MapKind.DEVMAP: {
        "dev_map_update_elem": "on_update",
        "dev_map_delete_elem": "on_delete",
    },
    MapKind.DEVMAP_HASH: {
        "dev_map_hash_update_elem": "on_update",
        "dev_map_hash_delete_elem": "on_delete",
    },
    MapKind.CPUMAP: {
        "cpu_map_update_elem": "on_update",
        "cpu_map_delete_elem": "on_delete",
    },
    MapKind.SOCKMAP: {
        "sock_map_update_elem_sys": "on_update",
        "sock_map_delete_elem": "on_delete",
    },
    MapKind.SOCKHASH: {
        "sock_map_update_elem_sys": "on_update",
        "sock_hash_delete_elem": "on_delete",
    },
    MapKind.QUEUE: {
        "queue_stack_map_push_elem": "on_push",
        "queue_map_pop_elem": "on_pop",
    },
    MapKind.STACK: {
        "queue_stack_map_push_elem": "on_push",
        "stack_map_pop_elem": "on_pop",
    },
}
"""Kernel functions that change or refuse to change a map, and the program of
bpf/watch_functions.bpf.c for each."""


def event_dtype(key_room: int, value_room: int, *, with_frames: bool) -> np.dtype[np.void]:
    """Layout of ``struct watch_event`` in bpf/watch_event.h, as it stands in a ring.

    Parameters
    ----------
    key_room, value_room : int
        Bytes for the longest key and value of the watched maps; 0: none is told.
    with_frames : bool
        Whether there are return addresses, as the mechanism ``functions`` has them.

    Returns
    -------
    numpy.dtype
        ``at_ns`` (uint64, CLOCK_MONOTONIC, when the kernel had answered), ``cgroup`` (uint64),
        ``map_id``, ``pid``, ``tid`` (uint32), ``result`` (int32, 0 or the negative errno),
        ``value_size`` (uint32, bytes of ``value`` that count), ``cpu`` (uint16), ``kind`` (uint8,
        `UPDATE` or `DELETE`), ``lacks`` (uint8, bits `LACKS_KEY`, `LACKS_VALUE`), ``comm``
        (16 raw bytes), ``frames`` (uint64, innermost first), ``key``, ``value`` (raw bytes).
    """
    fields: list[Any] = [
        ("at_ns", "u8"), ("cgroup", "u8"), ("map_id", "u4"), ("pid", "u4"), ("tid", "u4"),
        ("result", "i4"), ("value_size", "u4"), ("cpu", "u2"), ("kind", "u1"), ("lacks", "u1"),
        ("comm", "V16"),
    ]  # fmt: skip
    if with_frames:
        fields.append(("frames", "u8", (_FRAMES,)))
    for name, room in (("key", key_room), ("value", value_room)):
        if room:
            fields.append((name, f"V{room}"))
            if padding := -room % 8:
                fields.append((f"{name}_padding", f"V{padding}"))
    return np.dtype(fields)


def hookable(kind: MapKind, mechanism: str) -> bool:
    """Whether changes of this kind of map pass a hook of a mechanism."""
    return kind not in UNTOLD_KINDS and (mechanism == "syscalls" or kind in FUNCTIONS)


def call_value_size(table: Map) -> int:
    """Bytes of a value as bpf(2) takes it: a per-CPU map has a slot for each possible CPU."""
    if table.kind in PER_CPU:
        return libbpf.possible_cpus() * (-(-table.value_size // 8) * 8)
    return table.value_size


class WatchHooks(Closing):
    """Programs that tell of every change that is asked for of some maps; a context manager.

    Parameters
    ----------
    tables : sequence of Map
        The maps; empty: all of the machine, without their keys and values.
    ring_bytes : int
        Size of the ring that the events pass; a power of two and whole pages.
    mechanism : str, optional
        One of `MECHANISMS`; by default `labkit.sync.trace_hook.best_mechanism`.

    Attributes
    ----------
    mechanism : str
        The one that is used.
    channel : Channel
        The ring of events, each of ``event``.
    event : numpy.dtype
        `event_dtype` of these maps.
    program_ids : tuple of int
        Ids of the hooks' own programs.
    refused : dict of str to str
        Functions that could not be hooked, with the kernel's answer.

    Raises
    ------
    BadInput
        A map's kind has no changes to hook, or there is no such mechanism.
    Unavailable
        The kernel refuses the hooks, or this CPU's system calls are not known here.
    """

    def __init__(
        self, tables: Sequence[Map], *, ring_bytes: int, mechanism: str | None = None
    ) -> None:
        if mechanism is not None and mechanism not in MECHANISMS:
            raise BadInput(f"A mechanism is one of {', '.join(MECHANISMS)}, not {mechanism!r}.")
        self.mechanism = trace_hook.best_mechanism() if mechanism is None else mechanism
        self._check_kinds(tables)
        self.refused: dict[str, str] = {}
        self._programs: list[Program] = []
        self._held: list[tuple[BpfObject, int]] = []
        key_room = max((table.key_size for table in tables), default=0)
        value_room = max(map(call_value_size, tables), default=0)
        by_functions = self.mechanism == "functions"
        self.event = event_dtype(key_room, value_room, with_frames=by_functions)
        self._open = ExitStack()
        try:
            self.channel = self._open.enter_context(Channel.create(ring_bytes, programs=2))
            constants = {
                **trace_hook.way_to_map(),
                "PROG_AUX_AT": member_offset("bpf_prog", "aux"),
                "AUX_ID_AT": member_offset("bpf_prog_aux", "id"),
                "KEY_ROOM": key_room,
                "VALUE_ROOM": value_room,
                "RING_FD": self.channel.ring.fd,
                "COUNTS_FD": self.channel.counts.fd,
            }
            if tables:
                constants["TARGETS_FD"] = self._targets(tables).fd
            if by_functions:
                kinds = {table.kind for table in tables} or set(FUNCTIONS)
                self._hook_functions(constants, kinds)
            else:
                self._hook_syscalls(constants)
        except BaseException:
            self.close()
            raise

    def _check_kinds(self, tables: Sequence[Map]) -> None:
        for table in tables:
            if not hookable(table.kind, self.mechanism):
                raise BadInput(
                    f"Changes of a {table.kind.name.lower()} cannot be hooked: {table!r} has no "
                    "elements whose changes pass a hook that is known here."
                )

    def _targets(self, tables: Sequence[Map]) -> Map:
        made = self._open.enter_context(
            Map.create(
                MapKind.HASH, key="u4", value=TARGET, max_entries=len(tables), name="watch_targets"
            )
        )
        for table in tables:
            content = 1 if table.kind in OF_MAPS else 2 if table.kind in HOLD_OBJECTS else 0
            sizes = (table.key_size, table.value_size, call_value_size(table))
            made.update(table.id, (*sizes, content))
        return made

    def _hook_syscalls(self, constants: dict[str, int]) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise Unavailable(
                f"The hook on bpf(2) knows the registers of x86-64, not those of "
                f"{platform.machine()}, and this kernel lets nobody hook its functions (fexit)."
            )
        unit = self._open.enter_context(programs.load("watch_syscalls", **constants))
        try:
            batches = unit.program("on_batch", hook="tp_btf:sys_exit")
            jumps = unit.map("next", key="u4", value="u4")
            jumps.update(0, batches.fd)
            # It holds a program that holds it. The kernel unties the two when nobody has the map
            # open any more; who opens it in between, and closes it, keeps it there for good
            # (kernel/bpf/arraymap.c, prog_array_map_clear: a second reference for the same work).
            self._open.callback(jumps.delete, 0)
            self._hook(unit, unit.program("on_return", hook="tp_btf:sys_exit"))
        except LoadFailed as error:
            raise Unavailable(f"This kernel refuses the hook on bpf(2): {error}") from error

    def _hook_functions(self, constants: dict[str, int], kinds: set[MapKind]) -> None:
        unit = self._open.enter_context(
            programs.load(
                "watch_functions",
                **constants,
                MAP_TYPE_AT=member_offset("bpf_map", "map_type"),
                WITH_STACK=1,
            )
        )
        wanted = {name: to for kind in kinds for name, to in FUNCTIONS[kind].items()}
        for name, program in wanted.items():
            try:
                self._hook(unit, unit.program(program, hook=f"fexit:{name}"))
            except LoadFailed as error:
                self.refused[name] = str(error).removesuffix(".")
        if not self._programs:
            name, why = next(iter(self.refused.items()))
            raise Unavailable(f"This kernel refuses the hook on {name}: {why}.")

    def _hook(self, unit: BpfObject, program: Program) -> None:
        self._held.append((unit, unit.attach(program)))
        self._programs.append(program)

    @property
    def program_ids(self) -> tuple[int, ...]:
        """Ids of the hooks' own programs."""
        return tuple(one.id for one in self._programs)

    def counts(self) -> tuple[int, int, int]:
        """What became of the changes so far.

        Returns
        -------
        tuple of int
            Events that went into the ring; events that found no room, or whose hook the kernel
            skipped; elements of long batches that had no event.
        """
        events = self.channel.counts.lookup(_EVENTS)
        batches = self.channel.counts.lookup(_BATCHES)
        missed = sum(libbpf.prog_info(one.fd).recursion_misses for one in self._programs)
        dropped = int(events["dropped"].sum()) + missed
        return int(events["emitted"].sum()), dropped, int(batches["dropped"].sum())

    def detach(self) -> None:
        """Take the programs off their hooks; twice is safe."""
        for unit, held in self._held:
            unit.detach(held)
        self._held = []

    def close(self) -> None:
        """Unhook everything; safe to call twice."""
        self.detach()
        self._programs = []
        self._open.close()
