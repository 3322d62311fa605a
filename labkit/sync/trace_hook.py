"""Trace hook: see the writes of programs and processes that know nothing of us."""

from __future__ import annotations

import functools
import platform
import time
from contextlib import ExitStack
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput, Unavailable
from labkit.kernel import libbpf, programs
from labkit.kernel.btf import member_offset
from labkit.kernel.closing import Closing
from labkit.kernel.compiler import LoadFailed
from labkit.kernel.libbpf import AttachType, MapKind, ProgramKind
from labkit.kernel.maps import PER_CPU, Map
from labkit.kernel.programs import BpfObject, Program
from labkit.kernel.ringbuf import wakeup_constants
from labkit.sync.changes import ChangeKind, Changes
from labkit.sync.ring_events import MOST_EVENTS, Channel, RingEvents
from labkit.sync.strategy import bounded

MECHANISMS: Final = ("functions", "syscalls", "kprobes")
"""Ways to hook a map's changes.

``functions``: fexit on the functions of the map's type, which system calls and programs pass.
``syscalls``: the return of bpf(2), which every process passes, and no program. ``kprobes``: kprobes
on the same functions, to show what they miss: the kernel skips them while a system call changes a
map (``bpf_disable_instrumentation``), and they know nothing of success.
"""

_NEVER: Final = float("inf")

_HASH: Final = {
    "htab_map_update_elem": "on_update",
    "htab_map_delete_elem": "on_delete",
    "htab_map_lookup_and_delete_elem": "on_take",
    "htab_map_lookup_and_delete_batch": "on_take_batch",
}
FUNCTIONS: Final[dict[MapKind, dict[str, str]]] = {
    MapKind.HASH: _HASH,
    MapKind.LRU_HASH: {name.replace("htab", "htab_lru"): to for name, to in _HASH.items()},
    MapKind.ARRAY: {"array_map_update_elem": "on_update"},
    MapKind.LPM_TRIE: {"trie_update_elem": "on_update", "trie_delete_elem": "on_delete"},
    MapKind.PERCPU_HASH: {
        "htab_percpu_map_update_elem": "on_update",
        "bpf_percpu_hash_update": "on_update",
        "htab_map_delete_elem": "on_delete",
        "htab_percpu_map_lookup_and_delete_elem": "on_take",
        "htab_percpu_map_lookup_and_delete_batch": "on_take_batch",
    },
    MapKind.LRU_PERCPU_HASH: {
        "htab_lru_percpu_map_update_elem": "on_update",
        "bpf_percpu_hash_update": "on_update",
        "htab_lru_map_delete_elem": "on_delete",
        "htab_lru_percpu_map_lookup_and_delete_elem": "on_take",
        "htab_lru_percpu_map_lookup_and_delete_batch": "on_take_batch",
    },
    MapKind.PERCPU_ARRAY: {
        "array_map_update_elem": "on_update",
        "bpf_percpu_array_update": "on_update",
    },
    MapKind.ARRAY_OF_MAPS: {
        "bpf_fd_array_map_update_elem": "on_update_fd",
        "fd_array_map_delete_elem": "on_delete",
    },
    MapKind.HASH_OF_MAPS: {
        "bpf_fd_htab_map_update_elem": "on_update_fd",
        "htab_map_delete_elem": "on_delete",
        "htab_map_lookup_and_delete_batch": "on_take_batch",
    },
}
"""Kernel functions that change a map, and the program of bpf/trace_hook_functions.bpf.c for each.

A helper is compiled into a call of the type's own function, so that ``bpf_map_update_elem`` itself
is passed by next to nobody; what per-CPU maps and maps of maps do for bpf(2) has its own.
"""

# r0 = 0; exit
_DOES_NOTHING: Final = bytes([0xB7, *[0] * 7, 0x95, *[0] * 7])


@functools.cache
def best_mechanism() -> str:
    """Of `MECHANISMS`, the one that sees most of what this kernel lets us hook; found by trying."""
    hook = AttachType.TRACE_FEXIT
    try:
        fd = libbpf.prog_load(
            ProgramKind.TRACING,
            _DOES_NOTHING,
            name="labkit_fexit",
            attach_type=hook,
            attach_btf_id=libbpf.vmlinux_function_id("htab_map_update_elem", hook),
        )
    except OSError:
        return "syscalls"
    libbpf.close(fd)
    return "functions"


def way_to_map() -> dict[str, int]:
    """Constants of bpf/map_of_fd.h: where the kernel keeps which map a descriptor means."""
    return {
        "TASK_FILES_AT": member_offset("task_struct", "files"),
        "FILES_TABLE_AT": member_offset("files_struct", "fdt"),
        "TABLE_FILES_AT": member_offset("fdtable", "fd"),
        "FILE_PRIVATE_AT": member_offset("file", "private_data"),
        "MAP_ID_AT": member_offset("bpf_map", "id"),
    }


class Hooks(Closing):
    """Programs that emit an event for every change of one map; a context manager.

    An event has the value that was written, as `RingEvents` reads it. Per-CPU maps: that of the
    first CPU, or of the CPU whose program wrote. Maps of maps: the writer's own descriptor of
    the inner map.

    Parameters
    ----------
    table : Map
        The only map whose changes are reported; the programs themselves look at its id.
    channel : Channel
        Where events and counts go; with room for one program.
    mechanism : str, optional
        One of `MECHANISMS`; by default `best_mechanism`.
    version : str
        Name of the value's version field, ignored where the value is a plain integer.
    wakeup, wakeup_at
        When the follower is woken, as for `labkit.kernel.ringbuf.wakeup_constants`.

    Attributes
    ----------
    mechanism : str
        The one that is used.
    channel : Channel
        As given.
    map_id : int
        Id of the map whose changes are reported.
    hooked : tuple of str
        The kernel functions or tracepoints that are hooked.
    refused : dict of str to str
        Functions that could not be hooked, with the kernel's answer.

    Raises
    ------
    Unavailable
        The kernel refuses the hooks, or this CPU's system calls are not known here.
    BadInput
        The map's type has no hook.
    """

    def __init__(
        self,
        table: Map,
        channel: Channel,
        *,
        mechanism: str | None = None,
        version: str = "version",
        wakeup: str = "default",
        wakeup_at: int = 1,
    ) -> None:
        _check_mechanism(mechanism)
        if table.kind not in FUNCTIONS:
            raise BadInput(
                f"Changes of a {table.kind.name.lower()} cannot be hooked; those of "
                f"{', '.join(kind.name.lower() for kind in FUNCTIONS)} can."
            )
        self.mechanism = best_mechanism() if mechanism is None else mechanism
        self.channel, self.map_id = channel, table.id
        self.refused: dict[str, str] = {}
        self._programs: dict[str, Program] = {}
        self._places: list[tuple[BpfObject, Program, str | None]] = []
        self._held: list[tuple[BpfObject, int]] = []
        dtype, at = table.value_dtype, 0
        if dtype.fields is not None and version in dtype.fields:
            dtype, at = dtype.fields[version][:2]
        slots = libbpf.possible_cpus() if table.kind in PER_CPU else 0
        constants = {
            "RING_FD": channel.ring.fd,
            "COUNTS_FD": channel.counts.fd,
            "MAP_ID": table.id,
            "MAP_ID_AT": member_offset("bpf_map", "id"),
            "KEY_SIZE": table.key_size,
            "VALUE_SIZE": table.value_size,
            "USER_VALUE_SIZE": slots * -(-table.value_size // 8) * 8 or table.value_size,
            "VERSION_AT": at,
            "VERSION_SIZE": min(dtype.itemsize, 8),
            **wakeup_constants(wakeup, wakeup_at),
        }
        self._open = ExitStack()
        try:
            if self.mechanism == "syscalls":
                self._hook_syscalls(constants, table.max_entries)
            else:
                self._hook_functions(constants, table.kind)
        except BaseException:
            self.close()
            raise

    def detach(self) -> None:
        """Take the programs off their hooks, so that they cost nobody anything; twice is safe."""
        for unit, held in self._held:
            unit.detach(held)
        self._held = []

    def attach(self) -> None:
        """Put them back after `detach`, without compiling and loading them again.

        Raises
        ------
        LoadFailed
            The kernel refuses.
        """
        if not self._held:
            for unit, program, where in self._places:
                self._held.append((unit, unit.attach(program, where)))

    def _hook(self, unit: BpfObject, program: Program, where: str | None = None) -> None:
        self._held.append((unit, unit.attach(program, where)))
        self._places.append((unit, program, where))

    @property
    def hooked(self) -> tuple[str, ...]:
        """The kernel functions or tracepoints that are hooked."""
        return tuple(self._programs)

    def missed(self) -> int:
        """How often the kernel skipped one of the programs, because it ran on that CPU already."""
        return sum(
            libbpf.prog_info(program.fd).recursion_misses for program in self._programs.values()
        )

    def _hook_syscalls(self, constants: dict[str, int], max_entries: int) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise Unavailable(
                f"The hook on bpf(2) knows the registers of x86-64, not those of "
                f"{platform.machine()}: use mechanism='functions'."
            )
        unit = self._open.enter_context(
            programs.load(
                "trace_hook_syscalls",
                MAP_ENTRIES=max_entries,
                **{**constants, **way_to_map()},
            )
        )
        try:
            loaded = unit.program("on_return", hook="tp_btf:sys_exit")
            self._hook(unit, loaded)
        except LoadFailed as error:
            raise Unavailable(f"This kernel refuses the hook on bpf(2): {error}") from error
        self._programs["sys_exit"] = loaded

    def _hook_functions(self, constants: dict[str, int], kind: MapKind) -> None:
        by_kprobe = self.mechanism == "kprobes"
        if by_kprobe:
            constants["BY_KPROBE"] = 1
        unit = self._open.enter_context(programs.load("trace_hook_functions", **constants))
        for name, program in FUNCTIONS[kind].items():
            if by_kprobe and program.startswith("on_take"):
                continue  # what was taken is known only when the function returns
            try:
                if by_kprobe:
                    loaded = unit.program(program, ProgramKind.KPROBE)
                    self._hook(unit, loaded, name)
                else:
                    loaded = unit.program(program, hook=f"fexit:{name}")
                    self._hook(unit, loaded)
            except LoadFailed as error:
                self.refused[name] = str(error).removesuffix(".")
                if program.startswith("on_update"):
                    raise Unavailable(
                        f"This kernel refuses the hook on {name} ({self.refused[name]}): use "
                        "mechanism='syscalls', which sees no change that a program makes."
                    ) from error
            else:
                self._programs[name] = loaded

    def close(self) -> None:
        """Unhook everything; safe to call twice."""
        self._programs, self._places, self._held = {}, [], []
        self._open.close()


class TraceHook(RingEvents):
    """Follows a map by hooks on its changes, and reads it whole every so often.

    It needs no help from the writers, and may see every version of every key. What it sees hangs
    on the mechanism (`MECHANISMS`; the experiment coverage-matrix measures it). No mechanism sees
    stores through a pointer that a program has looked up, stores through a mapping of the map
    into memory, or what an LRU map evicts: for these the map is read every ``pull_s``, and after
    any event that was dropped. A hook sees no version in a delete, and two writers' events of one
    key may arrive in another order than their changes did: versions set updates right at once, a
    delete that was overtaken stands until the next pull.

    The mechanism ``syscalls`` tells of batches up to 512 elements; a longer one, and one that
    failed in the middle, counts as dropped.

    Parameters
    ----------
    mechanism : str, optional
        One of `MECHANISMS`; by default `best_mechanism`.
    pull_s : float or None
        From one read of the whole map to the next, seconds; None: never, so that what the hooks do
        not see stays unseen.
    ring_bytes : int
        Size of the ring that the events pass; a power of two and whole pages.
    wakeup, wakeup_at
        When we are woken, as for `labkit.kernel.ringbuf.wakeup_constants`.
    hooks : Hooks, optional
        Hooks on the map that stand already, detached or not: to follow again and again without
        compiling each time. They and their channel stay the caller's, and take the place of
        ``mechanism``, ``ring_bytes``, ``wakeup`` and ``wakeup_at``; `close` detaches them.
    version, timer_s, gather_s, resync_gap_s
        As for `RingEvents`.

    Raises
    ------
    BadInput
        No such mechanism, or a time that is no bound. `attach` also refuses maps whose value is
        not one (per-CPU maps and maps of maps), and another map than that of ``hooks``.
    Unavailable
        By `attach`: this kernel refuses the mechanism.

    Examples
    --------
    >>> import subprocess, sys
    >>> from labkit.kernel.libbpf import MapKind
    >>> foreign_writer = '''
    ... import ctypes, sys
    ... lib = ctypes.CDLL("libbpf.so.1")
    ... fd = lib.bpf_map_get_fd_by_id(int(sys.argv[1]))
    ... key, value = ctypes.c_uint32(80), ctypes.c_uint64(7)
    ... lib.bpf_map_update_elem(fd, ctypes.byref(key), ctypes.byref(value), ctypes.c_uint64(0))
    ... '''
    >>> with (
    ...     Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8) as table,
    ...     TraceHook() as strategy,
    ... ):
    ...     replica = strategy.attach(Map.from_id(table.id))
    ...     done = subprocess.run([sys.executable, "-c", foreign_writer, str(table.id)])
    ...     for changes in strategy.changes(for_s=1):
    ...         break
    ...     [(int(row["key"]), int(row["version"])) for row in changes]
    [(80, 7)]
    """

    def __init__(
        self,
        *,
        mechanism: str | None = None,
        pull_s: float | None = 1.0,
        ring_bytes: int = 1 << 22,
        wakeup: str = "default",
        wakeup_at: int = 1,
        hooks: Hooks | None = None,
        version: str | None = "version",
        timer_s: float = 0.1,
        gather_s: float = 0.0,
        resync_gap_s: float = 0.05,
    ) -> None:
        _check_mechanism(mechanism)
        if pull_s is not None and bounded(pull_s) == 0:
            raise BadInput("A pull every 0 s would leave no time for events: give more.")
        self._mechanism = mechanism
        self._wakeup = (wakeup, wakeup_at)
        wakeup_constants(*self._wakeup)
        self._pull_s = _NEVER if pull_s is None else pull_s
        self._next_pull = _NEVER
        self._given = hooks
        self._hooks: Hooks | None = None
        self._missed_before = 0
        super().__init__(
            hooks.channel if hooks else Channel.create(ring_bytes),
            version=version,
            timer_s=timer_s,
            gather_s=gather_s,
            resync_gap_s=resync_gap_s,
        )

    @property
    def hooks(self) -> Hooks:
        """The hooks that are in place: which mechanism, and on what."""
        if self._hooks is None:
            raise BadInput("This strategy follows no map: attach one.")
        return self._hooks

    def close(self) -> None:
        """Unhook and stop following; safe to call twice."""
        super().close()
        if self._given is None:
            self._channel.close()

    def _subscribe(self) -> None:
        if self._given is not None and self._given.map_id != self.table.id:
            raise BadInput(f"The hooks are on the map with id {self._given.map_id}, not on this.")
        super()._subscribe()
        wakeup, at = self._wakeup
        if self._given is None:
            self._hooks = Hooks(
                self.table,
                self._channel,
                mechanism=self._mechanism,
                version=self._version or "",
                wakeup=wakeup,
                wakeup_at=at,
            )
        else:
            self._hooks = self._given
            self._missed_before = self._given.missed()
            self._given.attach()
        # The first pull comes with the first poll: what the ring holds by then may have happened
        # before the first snapshot, and a delete among it would hit a version that came later.
        self._next_pull = _NEVER if self._pull_s == _NEVER else time.monotonic()

    def _unsubscribe(self) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None and hooks is self._given:
            hooks.detach()
        elif hooks is not None:
            hooks.close()
        super()._unsubscribe()

    def _count(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        produced, dropped = super()._count()
        missed = self._missed()
        produced[0] += missed
        dropped[0] += missed
        return produced, dropped

    def _dropped(self) -> int:
        return super()._dropped() + self._missed()

    def _missed(self) -> int:
        return 0 if self._hooks is None else self._hooks.missed() - self._missed_before

    def _resync(self) -> Changes:
        if self._version is None:
            return super()._resync()
        started_ns = time.monotonic_ns()
        snapshot = self.table.snapshot()
        # What happened before the snapshot comes before it: a delete that names no version is one
        # of the version that the events before it brought, not of what the snapshot shows.
        news = self._take_all()
        found = self.replica.resync(snapshot, started_ns=started_ns).changes
        self._resyncs += 1
        self._repaired += len(found)
        events = np.concatenate([self._nothing(), *news])
        deleted = events["key"][events["kind"] == ChangeKind.DELETE]
        back = found["key"][found["kind"] == ChangeKind.UPDATE]
        if np.isin(_as_bytes(back), _as_bytes(deleted)).any():
            # The snapshot shows a version whose event was dropped, and then or before that there
            # was a delete: nothing here tells which came first, the next snapshot does.
            self._resync_at = time.monotonic() + self._resync_gap_s
        return np.concatenate([events, found])

    def _take_all(self) -> list[Changes]:
        assert self._reader is not None
        unread = self._reader.unread_bytes
        news = []
        while unread > 0:
            news.append(self._take())
            unread -= MOST_EVENTS * self._slot
        return news

    def _pull_at(self) -> float:
        return min(super()._pull_at(), self._next_pull)

    def _pull(self) -> Changes:
        begun = time.monotonic()
        news = super()._pull()
        ended = time.monotonic()
        self._next_pull = ended + max(self._pull_s, ended - begun)
        return news


def _as_bytes(keys: npt.NDArray[Any]) -> npt.NDArray[np.void]:
    packed = np.ascontiguousarray(keys)
    return packed.view(f"V{packed.dtype.itemsize}").reshape(-1)


def _check_mechanism(mechanism: str | None) -> None:
    if mechanism is not None and mechanism not in MECHANISMS:
        raise BadInput(f"A mechanism is one of {', '.join(MECHANISMS)}, not {mechanism!r}.")
