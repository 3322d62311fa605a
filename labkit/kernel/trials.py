"""How each feature is tried: small programs and maps, made the way the lab makes them.

Every function here runs in a child process of its own (:func:`labkit.kernel.probe.probe`). It
answers in a few words what worked, or raises what did not.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import socket
import struct
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from labkit.errors import LabError
from labkit.kernel import leftovers, libbpf, native, network, programs, tools
from labkit.kernel.libbpf import AttachType, MapFlag, MapKind, ProgramKind, UpdateFlag
from labkit.kernel.maps import PER_CPU, Map, MapError
from labkit.kernel.parallel import cpus
from labkit.kernel.perf_events import perf_event, probe_source
from labkit.kernel.pins import PinFolder

_LIMIT_S: Final = 30.0
_COMPILE_LIMIT_S: Final = 180.0  # an emulated machine takes most of a minute
_HOOKED_FUNCTION: Final = "vfs_read"
_PERF_SET_BPF: Final = 0x40042408
_PERF_ENABLE: Final = 0x2400

_AS_ROOT: Final = "run as root; make's targets do so by sudo"
_SETUP: Final = "make setup installs it"
_OTHER_KERNEL: Final = "use a kernel that has it, such as the one of vagrant up"
_ENTER: Final = "run through provision/enter.sh, as every make target does"


@dataclass(frozen=True)
class Trial:
    """One feature: how to try it, and what to tell where it does not work.

    Attributes
    ----------
    run : callable
        Answers what worked, or raises.
    remedy : str
        What a user can do.
    needs : tuple of str
        Features without which it is not tried.
    essential : bool
        The lab needs it on every kernel.
    limit_s : float
        Bound for the trial, seconds.
    """

    run: Callable[[], str]
    remedy: str
    needs: tuple[str, ...]
    essential: bool
    limit_s: float


class Refused(LabError):
    """A trial failed, and this is the answer."""


TRIALS: Final[dict[str, Trial]] = {}
"""Every feature by its name, in the order of the doctor's table."""


def _trial(
    name: str,
    remedy: str,
    *,
    needs: tuple[str, ...] = ("bpf",),
    essential: bool = False,
    limit_s: float = _LIMIT_S,
) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a function that answers what worked, or raises what did not."""

    def register(run: Callable[[], str]) -> Callable[[], str]:
        TRIALS[name] = Trial(run, remedy, needs, essential, limit_s)
        return run

    return register


def _first_line(command: list[str], *, executable: str | None = None, given: str = "") -> str:
    """First line that a tool prints, or `Refused` with its complaint."""
    try:
        done = subprocess.run(
            command,
            executable=executable,
            input=given,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LIMIT_S / 2,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Refused(f"{Path(command[0]).name} did not answer") from None
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    line = lines[0].strip() if lines else ""
    if done.returncode != 0:
        raise Refused(line or f"{Path(command[0]).name} ended with status {done.returncode}")
    return line


# Machine code of the trials: eight bytes an instruction (include/uapi/linux/bpf.h).


def _op(code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, source << 4 | to, offset, value)


def _load_map(register: int, fd: int) -> bytes:
    return _op(0x18, register, 1, 0, fd) + _op(0)


def _set(register: int, value: int) -> bytes:
    return _op(0xB7, register, value=value)


def _copy(register: int, source: int) -> bytes:
    return _op(0xBF, register, source)


_EXIT = _op(0x95)


def _returning(value: int) -> bytes:
    return _set(0, value) + _EXIT


def _counting(counter: int, returned: int) -> bytes:
    """Code that adds one to the first entry of an array of u64, atomically."""
    return (
        _op(0x62, 10, offset=-4, value=0)  # key 0 on the stack
        + _copy(2, 10)
        + _op(0x07, 2, value=-4)
        + _load_map(1, counter)
        + _op(0x85, value=1)  # bpf_map_lookup_elem
        + _op(0x15, 0, offset=2, value=0)  # NULL: skip the addition
        + _set(1, 1)
        + _op(0xDB, 0, 1)
        + _returning(returned)
    )


def _sending(buffer: int, helper: int, *, by_flags: bool) -> bytes:
    """Code that puts eight bytes into a ring or perf buffer and returns the helper's answer."""
    record = _op(0x7A, 10, offset=-8, value=7)
    if by_flags:  # bpf_perf_event_output(context, map, this CPU, record, size)
        arguments = (
            _load_map(2, buffer)
            + _op(0x18, 3, value=-1)
            + _op(0)  # the upper half of the 64-bit BPF_F_CURRENT_CPU
            + _copy(4, 10)
            + _op(0x07, 4, value=-8)
            + _set(5, 8)
        )
    else:  # bpf_ringbuf_output(map, record, size, flags)
        arguments = (
            _load_map(1, buffer) + _copy(2, 10) + _op(0x07, 2, value=-8) + _set(3, 8) + _set(4, 0)
        )
    return record + arguments + _op(0x85, value=helper) + _EXIT


class _Bench:
    """Makes the small objects of one trial, and closes them."""

    def __init__(self) -> None:
        self._closing = ExitStack()

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def own(self, fd: int) -> int:
        self._closing.callback(libbpf.close, fd)
        return fd

    def map(self, kind: MapKind, *, flags: MapFlag = MapFlag.NONE, inner: Map | None = None) -> Map:
        value = "u8" if inner is None else "u4"
        made = Map.create(kind, key="u4", value=value, max_entries=4, flags=flags, inner=inner)
        return self._closing.enter_context(made)

    def program(
        self,
        kind: ProgramKind,
        code: bytes,
        attach_type: AttachType = AttachType.NONE,
        hook: str | None = None,
        flags: int = 0,
    ) -> int:
        target = 0 if hook is None else libbpf.vmlinux_function_id(hook, attach_type)
        return self.own(
            libbpf.prog_load(
                kind,
                code,
                name="labkit_probe",
                attach_type=attach_type,
                attach_btf_id=target,
                flags=flags,
            )
        )

    def counting_program(
        self,
        kind: ProgramKind,
        attach_type: AttachType = AttachType.NONE,
        hook: str | None = None,
        returned: int = 0,
    ) -> int:
        self._counter = self.map(MapKind.ARRAY)
        return self.program(kind, _counting(self._counter.fd, returned), attach_type, hook)

    def runs_seen(self, trigger: Callable[[], object]) -> str:
        """Answer that the counting program runs; `Refused` where it does not."""
        for _ in range(100):
            trigger()
        if not self._counter.lookup(0):
            raise Refused("attached, but the kernel never runs it")
        # The rest of the machine triggers it as well, so the count itself would say nothing.
        return "attached, and seen to run"


# The kernel as such.


@_trial("bpf", _AS_ROOT, needs=(), essential=True)
def _bpf() -> str:
    with _Bench() as bench:
        bench.map(MapKind.ARRAY)
        return f"makes maps, and lists them ({len(libbpf.ids('map'))} in the kernel now)"


@_trial("btf", _OTHER_KERNEL, essential=True)
def _btf() -> str:
    size = os.stat("/sys/kernel/btf/vmlinux").st_size
    libbpf.vmlinux_function_id("sys_enter", AttachType.TRACE_RAW_TP)
    return f"{size / 2**20:.1f} MiB of the kernel's types"


@_trial("jit", "sysctl net.core.bpf_jit_enable=1, where the kernel has a compiler")
def _jit() -> str:
    with _Bench() as bench:
        program = bench.program(ProgramKind.SOCKET_FILTER, _returning(0))
        if not (size := libbpf.prog_info(program).jited_prog_len):
            raise Refused("programs are interpreted")
        return f"two instructions became {size} bytes of machine code"


@_trial("two_cpus", "give the machine a second CPU", needs=(), essential=True)
def _two_cpus() -> str:
    usable = cpus()
    if len(usable) < 2:
        raise Refused("this process may use one CPU only, so nothing can race")
    return f"{len(usable)} CPUs for this process"


# Programs.


def _run_once(program: int, **more: int) -> libbpf.TestRunOpts:
    options = libbpf.TestRunOpts(**more)
    packet = ctypes.create_string_buffer(64)
    if "ctx_in" not in more:
        options.data_in, options.data_size_in = ctypes.addressof(packet), len(packet)
    libbpf.checked(
        libbpf.api().bpf_prog_test_run_opts(program, ctypes.byref(options)), "running in place"
    )
    return options


@_trial("test_run", _OTHER_KERNEL, essential=True)
def _test_run() -> str:
    with _Bench() as bench:
        done = _run_once(bench.program(ProgramKind.TC, _returning(7)), repeat=1000)
        if done.retval != 7:
            raise Refused(f"a program that returns 7 returned {done.retval}")
        return f"ran a program 1000 times in place, {done.duration} ns each by the kernel's clock"


@_trial("syscall_program", _OTHER_KERNEL, essential=True)
def _syscall_program() -> str:
    with _Bench() as bench:
        program = bench.program(ProgramKind.SYSCALL, _returning(7), flags=libbpf.PROGRAM_SLEEPABLE)
        context = ctypes.c_uint64()
        done = _run_once(program, ctx_in=ctypes.addressof(context), ctx_size_in=8)
        if done.retval != 7:
            raise Refused(f"a program that returns 7 returned {done.retval}")
        return "ran a sleepable program in place"


def _run_on(event: int, program: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for request, argument in ((_PERF_SET_BPF, program), (_PERF_ENABLE, 0)):
        if libc.ioctl(event, ctypes.c_ulong(request), argument) != 0:
            libbpf.checked(-ctypes.get_errno(), "attaching to a perf event")


def _here() -> int:
    """The one CPU that this process is then pinned to: perf events belong to a CPU."""
    cpu = cpus()[0]
    os.sched_setaffinity(0, {cpu})
    return cpu


@_trial("tracefs", _ENTER, needs=(), essential=True)
def _tracefs() -> str:
    with leftovers.trace_instance():
        return "mounted; made an instance and removed it"


@_trial("tracepoint", _OTHER_KERNEL, needs=("bpf", "tracefs"), essential=True)
def _tracepoint() -> str:
    number = (tools.tracefs_folder() / "events/syscalls/sys_enter_getppid/id").read_text()
    with _Bench() as bench:
        program = bench.counting_program(ProgramKind.TRACEPOINT)
        event = bench.own(perf_event(2, int(number), cpu=_here()))
        _run_on(event, program)
        return bench.runs_seen(os.getppid)


@_trial("raw_tracepoint", _OTHER_KERNEL, essential=True)
def _raw_tracepoint() -> str:
    with _Bench() as bench:
        program = bench.counting_program(ProgramKind.RAW_TRACEPOINT)
        attach = libbpf.api().bpf_raw_tracepoint_open
        bench.own(libbpf.checked(attach(b"sys_enter", program), "attaching to sys_enter"))
        return bench.runs_seen(os.getppid)


def _traced(
    attach_type: AttachType,
    hook: str,
    trigger: Callable[[], object],
    kind: ProgramKind = ProgramKind.TRACING,
) -> str:
    with _Bench() as bench:
        program = bench.counting_program(kind, attach_type, hook)
        attach = libbpf.api().bpf_raw_tracepoint_open
        bench.own(libbpf.checked(attach(None, program), f"attaching to {hook}"))
        return bench.runs_seen(trigger)


def _read_a_file() -> None:
    with open("/dev/zero", "rb", buffering=0) as file:
        file.read(1)


@_trial("tp_btf", _OTHER_KERNEL, needs=("bpf", "btf"))
def _tp_btf() -> str:
    return _traced(AttachType.TRACE_RAW_TP, "sys_enter", os.getppid)


@_trial("fentry", _OTHER_KERNEL, needs=("bpf", "btf"))
def _fentry() -> str:
    return _traced(AttachType.TRACE_FENTRY, _HOOKED_FUNCTION, _read_a_file)


@_trial("fexit", _OTHER_KERNEL, needs=("bpf", "btf"))
def _fexit() -> str:
    return _traced(AttachType.TRACE_FEXIT, _HOOKED_FUNCTION, _read_a_file)


@_trial("lsm", "boot with bpf in the list of lsm=, on a kernel that has it", needs=("bpf", "btf"))
def _lsm() -> str:
    return _traced(AttachType.LSM_MAC, "file_open", _read_a_file, ProgramKind.LSM)


@_trial("iter", _OTHER_KERNEL, needs=("bpf", "btf"))
def _iter() -> str:
    lib = libbpf.api()
    with _Bench() as bench:
        program = bench.counting_program(ProgramKind.TRACING, AttachType.TRACE_ITER, "bpf_map")
        link = lib.bpf_link_create(program, 0, int(AttachType.TRACE_ITER), None)
        bench.own(libbpf.checked(link, "attaching an iterator over maps"))

        def read() -> None:
            fd = libbpf.checked(lib.bpf_iter_create(link), "making an iterator")
            try:
                os.read(fd, 64)
            finally:
                os.close(fd)

        return bench.runs_seen(read)


@_trial("kprobe", _OTHER_KERNEL)
def _kprobe() -> str:
    source = probe_source("kprobe")
    function = ctypes.create_string_buffer(_HOOKED_FUNCTION.encode())
    with _Bench() as bench:
        program = bench.counting_program(ProgramKind.KPROBE)
        event = perf_event(source, 0, name=ctypes.addressof(function), cpu=_here())
        _run_on(bench.own(event), program)
        return bench.runs_seen(_read_a_file)


@_trial("uprobe", _OTHER_KERNEL)
def _uprobe() -> str:
    source = probe_source("uprobe")
    libc = ctypes.CDLL(None)
    address = ctypes.cast(libc.getppid, ctypes.c_void_p).value or 0
    file, offset = _place_in_file(address)
    path = ctypes.create_string_buffer(file.encode())
    with _Bench() as bench:
        program = bench.counting_program(ProgramKind.KPROBE)
        event = perf_event(
            source, 0, name=ctypes.addressof(path), offset=offset, pid=os.getpid(), cpu=-1
        )
        _run_on(bench.own(event), program)
        return bench.runs_seen(libc.getppid)


def _place_in_file(address: int) -> tuple[str, int]:
    """File and offset that the memory at an address of this process was mapped from."""
    for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        extent, _, offset, _, _, *file = line.split(maxsplit=5)
        start, end = (int(bound, 16) for bound in extent.split("-"))
        if start <= address < end and file:
            return file[0], address - start + int(offset, 16)
    raise Refused("the C library is mapped from no file")


@_trial(
    "netns_veth", "install iproute2 (make setup does), on a kernel that has veth", needs=("bpf",)
)
def _netns_veth() -> str:
    network.enter_own_network()
    near, far = map(network.packet_socket, network.ENDS)
    with near as sender, far as receiver:
        receiver.settimeout(5.0)
        sender.send(_PACKET)
        for _ in range(100):  # the new interfaces chatter by themselves
            if receiver.recv(2048) == _PACKET:
                return "a packet went through a pair in a network namespace of its own"
    raise Refused("a packet sent into the pair never came out")


_PACKET: Final = network.frame(b"labkit")


def _sees_a_packet(kind: ProgramKind, hook: AttachType, returned: int) -> str:
    network.enter_own_network()
    index = socket.if_nametoindex(network.ENDS[0])
    with _Bench() as bench, network.packet_socket(network.ENDS[1]) as sender:
        program = bench.counting_program(kind, hook, returned=returned)
        link = libbpf.api().bpf_link_create(program, index, int(hook), None)
        bench.own(libbpf.checked(link, "attaching to a veth"))
        return bench.runs_seen(lambda: sender.send(_PACKET))


@_trial("xdp", _OTHER_KERNEL, needs=("bpf", "netns_veth"))
def _xdp() -> str:
    return _sees_a_packet(ProgramKind.XDP, AttachType.XDP, 2)


@_trial("tcx", _OTHER_KERNEL, needs=("bpf", "netns_veth"))
def _tcx() -> str:
    return _sees_a_packet(ProgramKind.TC, AttachType.TCX_INGRESS, 0)


# Maps.


def _keeps_a_value(kind: MapKind, flags: MapFlag = MapFlag.NONE) -> None:
    """Store in a map of that kind and read back, as a user does."""
    with _Bench() as bench:
        table = bench.map(kind, flags=flags)
        stored = [*range(7, 7 + libbpf.possible_cpus())] if kind in PER_CPU else 7
        table.update(1, stored)
        if not np.array_equal(found := table.lookup(1), stored):
            raise Refused(f"{stored} was stored, {found} came back")


@_trial("hash", _OTHER_KERNEL, essential=True)
def _hash() -> str:
    _keeps_a_value(MapKind.HASH)
    return "stored and read back"


@_trial("no_prealloc", _OTHER_KERNEL, essential=True)
def _no_prealloc() -> str:
    _keeps_a_value(MapKind.HASH, MapFlag.NO_PREALLOC)
    return "stored and read back"


@_trial("lru", _OTHER_KERNEL, essential=True)
def _lru() -> str:
    _keeps_a_value(MapKind.LRU_HASH)
    _keeps_a_value(MapKind.LRU_HASH, MapFlag.NO_COMMON_LRU)
    return "stored and read back, with common and with per-CPU lists"


@_trial("percpu", _OTHER_KERNEL, essential=True)
def _percpu() -> str:
    _keeps_a_value(MapKind.PERCPU_ARRAY)
    _keeps_a_value(MapKind.PERCPU_HASH)
    cpus = libbpf.possible_cpus()
    return f"stored and read back one value for each of {cpus} CPUs, array and hash"


@_trial("map_in_map", _OTHER_KERNEL, essential=True)
def _map_in_map() -> str:
    for kind in (MapKind.ARRAY_OF_MAPS, MapKind.HASH_OF_MAPS):
        with _Bench() as bench:
            inner = bench.map(MapKind.ARRAY)
            outer = bench.map(kind, inner=inner)
            outer.update(1, inner.fd)
            if outer.lookup(1) != inner.id:
                raise Refused("an inner map was placed, another came back")
    return "inner maps placed in an array and in a hash"


def _batch(kind: MapKind, words: int = 1) -> None:
    lib = libbpf.api()  # not by `Map`, which goes on key by key where there are no batches
    with _Bench() as bench:
        fd = bench.map(kind).fd
        count = ctypes.c_uint32(4)
        keys, stored = (ctypes.c_uint32 * 4)(*range(4)), (ctypes.c_uint64 * (4 * words))()
        stored[:] = list(range(1, 4 * words + 1))
        options = libbpf.BatchOpts()
        done = lib.bpf_map_update_batch(
            fd, keys, stored, ctypes.byref(count), ctypes.byref(options)
        )
        libbpf.checked(done, "updating in a batch")
        found_keys, found = (ctypes.c_uint32 * 8)(), (ctypes.c_uint64 * (8 * words))()
        position, count = ctypes.c_uint64(), ctypes.c_uint32(8)
        done = lib.bpf_map_lookup_batch(
            fd, None, ctypes.byref(position), found_keys, found, ctypes.byref(count),
            ctypes.byref(options),
        )  # fmt: skip
        if done != -2:  # ENOENT: that was all of it
            libbpf.checked(done, "looking up in a batch")
        pairs = {
            found_keys[i]: list(found[i * words : (i + 1) * words]) for i in range(count.value)
        }
        if pairs != {i: list(stored[i * words : (i + 1) * words]) for i in range(4)}:
            raise Refused("a batch came back otherwise than it was stored")


@_trial("batch_array", _OTHER_KERNEL, essential=True)
def _batch_array() -> str:
    _batch(MapKind.ARRAY)
    return "stored and read back in a batch"


@_trial("batch_hash", _OTHER_KERNEL, essential=True)
def _batch_hash() -> str:
    _batch(MapKind.HASH)
    _batch(MapKind.LRU_HASH)
    return "stored and read back in a batch, hash and LRU hash"


@_trial("batch_percpu", _OTHER_KERNEL)
def _batch_percpu() -> str:
    words = libbpf.possible_cpus()
    _batch(MapKind.PERCPU_HASH, words)
    _batch(MapKind.PERCPU_ARRAY, words)
    return "stored and read back in a batch, per-CPU hash and array"


def _spin_lock_types() -> bytes:
    """BTF of ``struct { struct bpf_spin_lock lock; unsigned int value; }`` as type 3."""
    names = b"\0unsigned int\0bpf_spin_lock\0val\0labkit\0lock\0value\0"

    def at(name: bytes) -> int:
        return names.index(b"\0" + name + b"\0") + 1

    integer = struct.pack("=IIII", at(b"unsigned int"), 1 << 24, 4, 32)
    lock = struct.pack("=III", at(b"bpf_spin_lock"), 4 << 24 | 1, 4)
    lock += struct.pack("=III", at(b"val"), 1, 0)
    value = struct.pack("=III", at(b"labkit"), 4 << 24 | 2, 8)
    value += struct.pack("=IIIIII", at(b"lock"), 2, 0, at(b"value"), 1, 32)
    types = integer + lock + value
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names))
    return header + types + names


@_trial("spin_lock", _OTHER_KERNEL, essential=True)
def _spin_lock() -> str:
    raw = _spin_lock_types()
    for kind in (MapKind.HASH, MapKind.ARRAY):
        with _Bench() as bench:
            types = bench.own(libbpf.btf_load(raw))
            made = libbpf.map_create(
                kind, name="labkit", key_size=4, value_size=8, max_entries=4, btf=(types, 1, 3)
            )
            with Map.from_fd(bench.own(made)) as table:
                table.update(1, ((0,), 7))
                table.update(1, ((0,), 7), UpdateFlag.LOCK)
                found = table.lookup(1, UpdateFlag.LOCK)["value"]
            if found != 7:
                raise Refused(f"7 was stored, {found} came back")
    return "stored and read back with BPF_F_LOCK, hash and array"


@_trial("mmapable_array", _OTHER_KERNEL, essential=True)
def _mmapable_array() -> str:
    with _Bench() as bench:
        table = bench.map(MapKind.ARRAY, flags=MapFlag.MMAPABLE)
        with mmap.mmap(table.fd, mmap.PAGESIZE) as memory:
            struct.pack_into("=Q", memory, 8, 7)
            found = table.lookup(1)
        if found != 7:
            raise Refused(f"7 was stored through the mapping, a lookup found {found}")
        return "a store through the mapping is what a lookup finds"


@_trial("frozen_map", _OTHER_KERNEL)
def _frozen_map() -> str:
    with _Bench() as bench:
        table = bench.map(MapKind.ARRAY, flags=MapFlag.RDONLY_PROG)
        table.freeze()
        try:
            table.update(0, 7)
        except MapError as refusal:
            return f"frozen; an update then gets {libbpf.error_name(refusal.errno or 0)}"
        raise Refused("a frozen map could be updated")


@_trial("ringbuf", _OTHER_KERNEL, essential=True)
def _ringbuf() -> str:
    page = mmap.PAGESIZE
    with _Bench() as bench:
        with Map.create(MapKind.RINGBUF, key=None, value=None, max_entries=page) as ring:
            _run_once(bench.program(ProgramKind.TC, _sending(ring.fd, 130, by_flags=False)))
            with mmap.mmap(ring.fd, 3 * page, prot=mmap.PROT_READ, offset=page) as produced:
                (position,) = struct.unpack_from("=Q", produced)
                header, record = struct.unpack_from("=QQ", produced, page)
        if (position, record) != (16, 7):
            raise Refused(f"one record was sent, the ring is at {position}")
        return f"a record of {header & 0xFFFFFFFF} bytes came through"


@_trial("perf_buffer", _OTHER_KERNEL, essential=True)
def _perf_buffer() -> str:
    cpu, most = _here(), libbpf.possible_cpus()
    with (
        _Bench() as bench,
        Map.create(MapKind.PERF_EVENT_ARRAY, key="u4", value="u4", max_entries=most) as events,
    ):
        event = bench.own(perf_event(1, 10, cpu=cpu))  # PERF_COUNT_SW_BPF_OUTPUT
        with mmap.mmap(event, 2 * mmap.PAGESIZE) as buffer:
            events.update(cpu, event)
            libc = ctypes.CDLL(None, use_errno=True)
            libc.ioctl(event, ctypes.c_ulong(_PERF_ENABLE), 0)
            sent = _run_once(bench.program(ProgramKind.TC, _sending(events.fd, 25, by_flags=True)))
            libbpf.checked(ctypes.c_int32(sent.retval).value, "sending")
            (head,) = struct.unpack_from("=Q", buffer, 1024)
        if not head:
            raise Refused("an event was sent, and never came")
        return f"an event of {head} bytes came through"


# Places.


@_trial("bpffs_detached", _OTHER_KERNEL, essential=True)
def _bpffs_detached() -> str:
    with _Bench() as bench, PinFolder() as pins:
        bench.map(MapKind.ARRAY).pin(pins.path("labkit"))
        Map.from_pin(pins.path("labkit")).close()
        return "pinned and opened in a bpffs that is mounted nowhere"


@_trial("memcg", "run as root, where a memory controller is mounted under /sys/fs/cgroup")
def _memcg() -> str:
    with leftovers.memory_cgroup(64 << 20) as group:
        return f"set a limit of 64 MiB on a new group (cgroup v{group.version})"


# Tools.


@_trial("bcc", _SETUP, needs=(), essential=True)
def _bcc() -> str:
    # Without the demand for headers, which have a line of their own.
    return f"bcc {tools.import_bcc().__version__}"


@_trial("headers", _SETUP, needs=(), essential=True)
def _headers() -> str:
    version, running = tools.headers_version(), platform.release()
    if version == running:
        return f"of the running kernel, {running}"
    return (
        f"of {version or 'an unknown kernel'} on {running}: good for maps, helpers and "
        "tracepoints, not for the kernel's own structures"
    )


@_trial(
    "compile",
    "make setup sets up compiler and headers",
    needs=("bpf", "bcc", "headers"),
    essential=True,
    limit_s=_COMPILE_LIMIT_S,
)
def _compile() -> str:
    with programs.load("self_test", RETURNED=7) as unit:
        answer = unit.program("count_runs").test_run().value
    if answer != 7:
        raise Refused(f"a program that returns 7 returned {answer}")
    return "compiled a small program, loaded it and ran it"


def _compiles(compiler: str | None, *options: str) -> str:
    if compiler is None:
        raise Refused("not installed")
    with leftovers.temporary_folder() as folder:
        command = [compiler, *options, "-x", "c", "-", "-o", f"{folder}/out"]
        _first_line(command, given="#include <stddef.h>\nint main(void) { return 0; }\n")
    return _first_line([compiler, "--version"])


@_trial("clang", _SETUP, needs=())
def _clang() -> str:
    versions = [f"clang-{number}" for number in range(30, 10, -1)]
    return _compiles(tools.find_tool("clang", *versions), "--target=bpf", "-c")


@_trial("native", "make setup installs clang; until then NumPy follows events, slower", needs=())
def _native() -> str:
    if native.compiled() is None:
        raise Refused(native.state())
    return f"the event path, {native.state()}"


@_trial("gcc", _SETUP, needs=())
def _gcc() -> str:
    return _compiles(tools.find_tool("gcc"))


@_trial("bpftool", _SETUP, needs=())
def _bpftool() -> str:
    return _first_line([tools.bpftool_command(), "version"]).rpartition("/")[2]


@_trial("redis-server", "make setup installs Debian's redis-tools", needs=())
def _redis_server() -> str:
    executable, name = tools.redis_server_command()
    answer = _first_line([name, "--version"], executable=executable)
    if not answer.startswith("Redis server"):
        raise Refused(f"it says of itself: {answer}")
    return answer.partition(" sha=")[0]


@_trial("kafka", _SETUP, needs=())
def _kafka() -> str:
    try:
        import confluent_kafka
    except ImportError as error:
        raise Refused("confluent-kafka is missing") from error
    return f"librdkafka {confluent_kafka.libversion()[0]}"


@_trial("go", "install the optional package: .venv/bin/pip install -e '.[go]'", needs=())
def _go() -> str:
    return _first_line([tools.go_command(), "version"])


@_trial("cilium_ebpf", "remove .lab/go-libraries, and make setup fetches it", needs=("go",))
def _cilium_ebpf() -> str:
    modules = "usr/share/gocode/src/github.com/cilium/ebpf/go.mod"
    folder = tools.go_libraries()
    if not (found := [*folder.glob(modules), *folder.glob(f"*/{modules}")]):
        raise Refused("make setup did not fetch Debian's golang-github-cilium-ebpf-dev")
    return f"{len(found)} versions of its source"
