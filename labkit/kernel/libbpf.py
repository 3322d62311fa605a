"""libbpf's own C API by ctypes: what bcc's Python does not offer.

libbcc already links libbpf, so nothing new is installed. Functions here are thin: they
raise ``OSError`` with the kernel's errno and check no sizes (the kernel cannot either);
:mod:`labkit.kernel.maps` and :mod:`labkit.kernel.programs` do that before they call.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
from ctypes import byref, c_char, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from enum import IntEnum, IntFlag
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput, Unavailable

ENOTSUPP = 524
"""The kernel's internal "not supported", which leaks to user space from map operations."""


class MapKind(IntEnum):
    """Map types, with the numbers of ``enum bpf_map_type`` (include/uapi/linux/bpf.h).

    A type that a newer kernel has is a member too, named by its number: ``type 99``.
    """

    HASH = 1
    ARRAY = 2
    PROG_ARRAY = 3
    PERF_EVENT_ARRAY = 4
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    STACK_TRACE = 7
    CGROUP_ARRAY = 8
    LRU_HASH = 9
    LRU_PERCPU_HASH = 10
    LPM_TRIE = 11
    ARRAY_OF_MAPS = 12
    HASH_OF_MAPS = 13
    DEVMAP = 14
    SOCKMAP = 15
    CPUMAP = 16
    XSKMAP = 17
    SOCKHASH = 18
    CGROUP_STORAGE = 19
    REUSEPORT_SOCKARRAY = 20
    PERCPU_CGROUP_STORAGE = 21
    QUEUE = 22
    STACK = 23
    SK_STORAGE = 24
    DEVMAP_HASH = 25
    STRUCT_OPS = 26
    RINGBUF = 27
    INODE_STORAGE = 28
    TASK_STORAGE = 29
    BLOOM_FILTER = 30
    USER_RINGBUF = 31
    CGRP_STORAGE = 32
    ARENA = 33

    @classmethod
    def _missing_(cls, value: object) -> MapKind | None:
        if not isinstance(value, int) or value < 0:
            return None
        unknown = int.__new__(cls, value)
        unknown._name_, unknown._value_ = f"type {value}", value
        return unknown


class MapFlag(IntFlag):
    """Flags of map creation."""

    NONE = 0
    NO_PREALLOC = 1 << 0
    NO_COMMON_LRU = 1 << 1
    RDONLY = 1 << 3
    WRONLY = 1 << 4
    ZERO_SEED = 1 << 6
    RDONLY_PROG = 1 << 7
    WRONLY_PROG = 1 << 8
    MMAPABLE = 1 << 10
    INNER_MAP = 1 << 12


class UpdateFlag(IntFlag):
    """Flags of an element operation."""

    ANY = 0
    NOEXIST = 1
    EXIST = 2
    LOCK = 4


class ProgramKind(IntEnum):
    """Program types, with the numbers of ``enum bpf_prog_type``."""

    SOCKET_FILTER = 1
    KPROBE = 2
    TC = 3
    TC_ACTION = 4
    TRACEPOINT = 5
    XDP = 6
    PERF_EVENT = 7
    CGROUP_SKB = 8
    CGROUP_SOCK = 9
    LWT_IN = 10
    LWT_OUT = 11
    LWT_XMIT = 12
    SOCK_OPS = 13
    SK_SKB = 14
    CGROUP_DEVICE = 15
    SK_MSG = 16
    RAW_TRACEPOINT = 17
    CGROUP_SOCK_ADDR = 18
    LWT_SEG6LOCAL = 19
    LIRC_MODE2 = 20
    SK_REUSEPORT = 21
    FLOW_DISSECTOR = 22
    CGROUP_SYSCTL = 23
    RAW_TRACEPOINT_WRITABLE = 24
    CGROUP_SOCKOPT = 25
    TRACING = 26
    STRUCT_OPS = 27
    EXT = 28
    LSM = 29
    SK_LOOKUP = 30
    SYSCALL = 31
    NETFILTER = 32


class AttachType(IntEnum):
    """The attach types that the lab uses (``enum bpf_attach_type``)."""

    NONE = 0
    TRACE_RAW_TP = 23
    TRACE_FENTRY = 24
    TRACE_FEXIT = 25
    LSM_MAC = 27
    TRACE_ITER = 28
    XDP = 37
    TCX_INGRESS = 46


PROGRAM_SLEEPABLE = 1 << 4

_LINE = 80  # characters of a source line that are kept

INSTRUCTION = np.dtype([("code", "u1"), ("registers", "u1"), ("offset", "i2"), ("immediate", "i4")])
"""``struct bpf_insn``."""


class _Opts(ctypes.Structure):
    """A libbpf option block: ``sz`` says which fields this caller knows."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.sz = ctypes.sizeof(self)


class _MapCreateOpts(_Opts):
    _fields_ = [
        ("sz", c_size_t),
        ("btf_fd", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("inner_map_fd", c_uint32),
        ("map_flags", c_uint32),
        ("map_extra", c_uint64),
        ("numa_node", c_uint32),
        ("map_ifindex", c_uint32),
    ]


class BatchOpts(_Opts):
    """``struct bpf_map_batch_opts``."""

    _fields_ = [("sz", c_size_t), ("elem_flags", c_uint64), ("flags", c_uint64)]


class _ProgLoadOpts(_Opts):
    _fields_ = [
        ("sz", c_size_t),
        ("attempts", c_int),
        ("expected_attach_type", c_int),
        ("prog_btf_fd", c_uint32),
        ("prog_flags", c_uint32),
        ("prog_ifindex", c_uint32),
        ("kern_version", c_uint32),
        ("attach_btf_id", c_uint32),
        ("attach_prog_fd", c_uint32),
        ("attach_btf_obj_fd", c_uint32),
        ("fd_array", c_void_p),
        ("func_info", c_void_p),
        ("func_info_cnt", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("line_info", c_void_p),
        ("line_info_cnt", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("log_level", c_uint32),
        ("log_size", c_uint32),
        ("log_buf", c_void_p),
    ]


class TestRunOpts(_Opts):
    """``struct bpf_test_run_opts``; ``retval`` and ``duration`` are filled by the kernel."""

    _fields_ = [
        ("sz", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    ]


class ObjectOpenOpts(_Opts):
    """The head of ``struct bpf_object_open_opts``."""

    _fields_ = [("sz", c_size_t), ("object_name", c_char_p)]


class MapInfo(ctypes.Structure):
    """``struct bpf_map_info``."""

    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
        ("name", c_char * 16),
        ("ifindex", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("netns_dev", c_uint64),
        ("netns_ino", c_uint64),
        ("btf_id", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
        ("btf_vmlinux_id", c_uint32),
        ("map_extra", c_uint64),
    ]


class ProgInfo(ctypes.Structure):
    """``struct bpf_prog_info``."""

    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", c_char * 8),
        ("jited_prog_len", c_uint32),
        ("xlated_prog_len", c_uint32),
        ("jited_prog_insns", c_uint64),
        ("xlated_prog_insns", c_uint64),
        ("load_time", c_uint64),
        ("created_by_uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
        ("name", c_char * 16),
        ("ifindex", c_uint32),
        ("gpl_compatible", c_uint32),
        ("netns_dev", c_uint64),
        ("netns_ino", c_uint64),
        ("nr_jited_ksyms", c_uint32),
        ("nr_jited_func_lens", c_uint32),
        ("jited_ksyms", c_uint64),
        ("jited_func_lens", c_uint64),
        ("btf_id", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("func_info", c_uint64),
        ("nr_func_info", c_uint32),
        ("nr_line_info", c_uint32),
        ("line_info", c_uint64),
        ("jited_line_info", c_uint64),
        ("nr_jited_line_info", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("jited_line_info_rec_size", c_uint32),
        ("nr_prog_tags", c_uint32),
        ("prog_tags", c_uint64),
        ("run_time_ns", c_uint64),
        ("run_cnt", c_uint64),
        ("recursion_misses", c_uint64),
        ("verified_insns", c_uint32),
        ("attach_btf_obj_id", c_uint32),
        ("attach_btf_id", c_uint32),
    ]


class LinkInfo(ctypes.Structure):
    """The common head of ``struct bpf_link_info``; the rest is a union by link type."""

    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("prog_id", c_uint32),
        ("reserved", c_uint32),
        ("by_type", c_uint64 * 16),
    ]


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "bpf_map_create": (c_int, c_char_p, c_uint32, c_uint32, c_uint32, c_void_p),
    "bpf_map_update_elem": (c_int, c_void_p, c_void_p, c_uint64),
    "bpf_map_lookup_elem": (c_int, c_void_p, c_void_p),
    "bpf_map_lookup_elem_flags": (c_int, c_void_p, c_void_p, c_uint64),
    "bpf_map_lookup_and_delete_elem_flags": (c_int, c_void_p, c_void_p, c_uint64),
    "bpf_map_delete_elem_flags": (c_int, c_void_p, c_uint64),
    "bpf_map_delete_elem": (c_int, c_void_p),
    "bpf_map_get_next_key": (c_int, c_void_p, c_void_p),
    "bpf_map_freeze": (c_int,),
    "bpf_map_lookup_batch": (c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "bpf_map_lookup_and_delete_batch": (
        c_int,
        c_void_p,
        c_void_p,
        c_void_p,
        c_void_p,
        c_void_p,
        c_void_p,
    ),
    "bpf_map_update_batch": (c_int, c_void_p, c_void_p, c_void_p, c_void_p),
    "bpf_map_delete_batch": (c_int, c_void_p, c_void_p, c_void_p),
    "bpf_obj_pin": (c_int, c_char_p),
    "bpf_obj_get": (c_char_p,),
    "bpf_obj_get_info_by_fd": (c_int, c_void_p, c_void_p),
    "bpf_map_get_next_id": (c_uint32, c_void_p),
    "bpf_prog_get_next_id": (c_uint32, c_void_p),
    "bpf_link_get_next_id": (c_uint32, c_void_p),
    "bpf_map_get_fd_by_id": (c_uint32,),
    "bpf_prog_get_fd_by_id": (c_uint32,),
    "bpf_link_get_fd_by_id": (c_uint32,),
    "bpf_prog_attach": (c_int, c_int, c_uint32, c_uint32),
    "bpf_prog_detach2": (c_int, c_int, c_uint32),
    "bpf_prog_query": (c_int, c_int, c_uint32, c_void_p, c_void_p, c_void_p),
    "bpf_btf_load": (c_void_p, c_size_t, c_void_p),
    "bpf_prog_load": (c_int, c_char_p, c_char_p, c_void_p, c_size_t, c_void_p),
    "bpf_prog_test_run_opts": (c_int, c_void_p),
    "bpf_raw_tracepoint_open": (c_char_p, c_int),
    "bpf_link_create": (c_int, c_int, c_int, c_void_p),
    "bpf_link_update": (c_int, c_int, c_void_p),
    "bpf_link_detach": (c_int,),
    "libbpf_find_vmlinux_btf_id": (c_char_p, c_int),
    "libbpf_num_possible_cpus": (),
    "btf__find_by_name_kind": (c_void_p, c_char_p, c_uint32),
    "btf__resolve_type": (c_void_p, c_uint32),
    "bpf_object__load": (c_void_p,),
    "bpf_map__fd": (c_void_p,),
    "bpf_map__set_initial_value": (c_void_p, c_char_p, c_size_t),
    "bpf_map__set_pin_path": (c_void_p, c_char_p),
    "bpf_program__fd": (c_void_p,),
}

_ANSWERS_POINTER: dict[str, tuple[Any, ...]] = {
    "bpf_object__open_mem": (c_char_p, c_size_t, c_void_p),
    "bpf_object__find_map_by_name": (c_void_p, c_char_p),
    "bpf_object__find_program_by_name": (c_void_p, c_char_p),
    "btf__load_vmlinux_btf": (),
    "btf__new": (c_char_p, c_uint32),
    "btf__load_from_kernel_by_id": (c_uint32,),
    "btf__type_by_id": (c_void_p, c_uint32),
    "btf__raw_data": (c_void_p, c_void_p),
}


@functools.cache
def api() -> ctypes.CDLL:
    """Load ``libbpf.so.1`` once, with the signatures of the calls that the lab makes.

    Hot loops may call the returned functions themselves: they answer 0 or more, or
    minus the errno (libbpf 1.0 and later).

    Returns
    -------
    ctypes.CDLL
        The library; every call releases the interpreter's lock.

    Raises
    ------
    Unavailable
        The shared library is not on this machine.
    """
    try:
        lib = ctypes.CDLL("libbpf.so.1")
    except OSError as error:
        raise Unavailable(
            "libbpf.so.1 is missing: install Debian's libbpf1 (make setup does)."
        ) from error
    for name, arguments in _SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes = list(arguments)
        function.restype = c_int
    for name, arguments in _ANSWERS_POINTER.items():
        function = getattr(lib, name)
        function.argtypes = list(arguments)
        function.restype = c_void_p
    lib.btf__name_by_offset.argtypes = [c_void_p, c_uint32]
    lib.btf__name_by_offset.restype = c_char_p
    for frees in (lib.bpf_object__close, lib.btf__free):
        frees.argtypes = [c_void_p]
        frees.restype = None
    silent = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)(lambda *_: 0)
    lib.libbpf_set_print.restype = c_void_p
    lib.libbpf_set_print(silent)
    # The callback must outlive every later call into the library.
    lib.silent_print = silent  # type: ignore[attr-defined]
    return lib


def checked(result: int, doing: str) -> int:
    """Return a libbpf result, or raise ``OSError`` with its errno and what was tried."""
    if result < 0:
        raise OSError(-result, f"{doing}: {error_name(-result)}")
    return result


def error_name(number: int) -> str:
    """Name of a positive errno as the kernel's sources write it, its internal ENOTSUPP too.

    Examples
    --------
    >>> error_name(524), error_name(errno.EDEADLK)
    ('ENOTSUPP', 'EDEADLK')
    """
    # Python knows the number of EDEADLK by its other name.
    kernels = {ENOTSUPP: "ENOTSUPP", errno.EDEADLK: "EDEADLK"}
    return kernels.get(number) or errno.errorcode.get(number, f"errno {number}")


def map_create(
    kind: MapKind,
    *,
    name: str,
    key_size: int,
    value_size: int,
    max_entries: int,
    flags: int = 0,
    inner_fd: int | None = None,
    btf: tuple[int, int, int] | None = None,
) -> int:
    """Create a map and return its file descriptor.

    Parameters
    ----------
    kind : MapKind
        Map type.
    name : str
        At most 15 bytes are kept by the kernel.
    key_size, value_size : int
        Bytes.
    max_entries : int
        Entries; for a ring buffer, bytes.
    flags : int
        Creation flags.
    inner_fd : int, optional
        Template of the inner maps, for a map of maps.
    btf : tuple of int, optional
        BTF file descriptor, key type id, value type id.

    Returns
    -------
    int
        File descriptor, owned by the caller.

    Raises
    ------
    OSError
        With the kernel's errno.
    """
    opts = _MapCreateOpts(map_flags=flags)
    if inner_fd is not None:
        opts.inner_map_fd = inner_fd
    if btf is not None:
        opts.btf_fd, opts.btf_key_type_id, opts.btf_value_type_id = btf
    result = api().bpf_map_create(
        int(kind), name.encode()[:15], key_size, value_size, max_entries, byref(opts)
    )
    return checked(result, f"creating {kind.name.lower()} map {name}")


def btf_load(raw: bytes) -> int:
    """Load types into the kernel and return their descriptor, owned by the caller.

    Raises
    ------
    OSError
        With the kernel's errno.
    """
    return checked(api().bpf_btf_load(raw, len(raw), None), "loading the types of maps")


def prog_load(
    kind: ProgramKind,
    instructions: bytes,
    *,
    name: str,
    attach_type: AttachType = AttachType.NONE,
    attach_btf_id: int = 0,
    flags: int = 0,
) -> int:
    """Load a program and return its file descriptor.

    Parameters
    ----------
    kind : ProgramKind
        Program type.
    instructions : bytes
        Encoded instructions, 8 bytes each, map file descriptors already in place.
    name : str
        Shown by bpftool; at most 15 bytes are kept.
    attach_type : AttachType
        Expected attach type, for tracing, LSM and XDP links.
    attach_btf_id : int
        BTF id of the kernel function to attach to, for tracing and LSM.
    flags : int
        For example ``PROGRAM_SLEEPABLE``.

    Returns
    -------
    int
        File descriptor, owned by the caller.

    Raises
    ------
    OSError
        The kernel's errno; its text ends with the last words of the verifier, if it spoke.
    """
    log = ctypes.create_string_buffer(1 << 20)
    opts = _ProgLoadOpts(
        prog_flags=flags, expected_attach_type=int(attach_type), attach_btf_id=attach_btf_id
    )

    def load() -> int:
        return int(
            api().bpf_prog_load(
                int(kind),
                name.encode()[:15],
                b"GPL",
                instructions,
                len(instructions) // 8,
                byref(opts),
            )
        )

    result = load()
    if result < 0:
        # A second try with the log on: asking for it at once costs every good load.
        opts.log_level, opts.log_size = 1, len(log)
        opts.log_buf = ctypes.addressof(log)
        result = load()
    if result < 0:
        lines = log.value.decode(errors="replace").strip().splitlines()
        words = [line for line in lines if not line.startswith("processed ")]
        reason = f": {words[-1].strip()}" if words else ""
        raise OSError(
            -result, f"loading program {name} as {kind.name.lower()}: "
            f"{error_name(-result)}{reason}"
        )  # fmt: skip
    return result


def vmlinux_function_id(function: str, attach_type: AttachType) -> int:
    """BTF id of a kernel function (or hook) for a tracing attach.

    Raises
    ------
    OSError
        ESRCH where the kernel has no such function in its BTF.
    """
    return checked(
        api().libbpf_find_vmlinux_btf_id(function.encode(), int(attach_type)),
        f"finding {function} in the kernel's BTF",
    )


def object_info(fd: int, info: ctypes.Structure) -> None:
    """Fill an info structure of a map, program or link from its file descriptor."""
    length = c_uint32(ctypes.sizeof(info))
    checked(api().bpf_obj_get_info_by_fd(fd, byref(info), byref(length)), "reading object info")


def map_info(fd: int) -> MapInfo:
    """What the kernel says of the map behind a file descriptor."""
    info = MapInfo()
    object_info(fd, info)
    return info


def map_memory(fd: int) -> int:
    """Bytes that the kernel says a map takes (``memlock`` in its fdinfo).

    Since Linux 6.4 this follows what is allocated; before, it is a bound worked out at
    creation (90a5527d7686).
    """
    with open(f"/proc/self/fdinfo/{fd}") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == "memlock":
                return int(value)
    return 0


def prog_info(fd: int) -> ProgInfo:
    """What the kernel says of the program behind a file descriptor."""
    info = ProgInfo()
    object_info(fd, info)
    return info


def prog_map_ids(fd: int) -> list[int]:
    """Ids of the maps that a program refers to."""
    counted = prog_info(fd).nr_map_ids
    ids = (c_uint32 * max(counted, 1))()
    info = ProgInfo(nr_map_ids=counted, map_ids=ctypes.addressof(ids))
    object_info(fd, info)
    return list(ids[: info.nr_map_ids])


def prog_instructions(fd: int) -> npt.NDArray[np.void]:
    """The instructions of a program as the verifier left them (``xlated``).

    Returns
    -------
    numpy.ndarray
        Structured, one row per 8-byte instruction: ``code`` (u1), ``registers`` (u1),
        ``offset`` (i2), ``immediate`` (i4).

    Raises
    ------
    OSError
        The kernel does not show them to this user.
    """
    size = prog_info(fd).xlated_prog_len
    body = ctypes.create_string_buffer(max(size, 1))
    object_info(fd, ProgInfo(xlated_prog_len=size, xlated_prog_insns=ctypes.addressof(body)))
    return np.frombuffer(body.raw[:size], INSTRUCTION)


def prog_lines(fd: int) -> dict[int, str]:
    """Source lines of a program that was built with debug information.

    Returns
    -------
    dict
        By the index of an instruction at which a line begins: ``file:number: text``. Empty where
        the program has no line information.

    Raises
    ------
    OSError
        The kernel does not show it to this user.
    """
    known = prog_info(fd)
    count, size = known.nr_line_info, known.line_info_rec_size
    if not count or not known.btf_id:
        return {}
    raw = ctypes.create_string_buffer(count * size)
    info = ProgInfo(nr_line_info=count, line_info_rec_size=size, line_info=ctypes.addressof(raw))
    object_info(fd, info)
    types = api().btf__load_from_kernel_by_id(known.btf_id)
    try:
        lines = {}
        for begin in range(0, info.nr_line_info * size, size):
            at, file, text, place = struct.unpack_from("=IIII", raw, begin)
            words = [api().btf__name_by_offset(types, one) or b"" for one in (file, text)]
            name, line = (shown(one.strip()) for one in words)
            if line and place >> 10:
                lines[at] = f"{os.path.basename(name)}:{place >> 10}: {line[:_LINE]}"
        return lines
    finally:
        api().btf__free(types)


def shown(name: bytes) -> str:
    r"""A name as it may be shown: what is no printable text in it, and the backslash, is escaped.

    Names of maps, programs, processes and pins are bytes; nothing keeps a newline out of some.

    Examples
    --------
    >>> print(shown(b"a\xff\n"))
    a\xff\n
    """
    text = name.decode(errors="surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(one if one.isprintable() and one != "\\" else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    if character in "\n\r\t\\":
        return character.encode("unicode_escape").decode()
    return "".join(f"\\x{byte:02x}" for byte in character.encode(errors="surrogateescape"))


def require_kind(fd: int, of: str) -> None:
    """Refuse a descriptor that is not of a ``map``, ``prog`` or ``link``, as is wanted.

    The kernel answers a question about one kind with the facts of another.

    Raises
    ------
    BadInput
        Says what it is.
    """
    target = os.readlink(f"/proc/self/fd/{fd}").replace("_", "-")
    kinds = {"anon-inode:bpf-map": "map", "anon-inode:bpf-prog": "prog",
             "anon-inode:bpf-link": "link"}  # fmt: skip
    words = {"map": "a map", "prog": "a program", "link": "a link"}
    if (found := kinds.get(target)) != of:
        raise BadInput(
            f"This is {words[found] if found else 'no BPF object'}, not {words[of]}: name another "
            "one."
        )


def ids(of: str) -> list[int]:
    """Ids of all ``map``, ``prog`` or ``link`` objects in the kernel, ascending."""
    next_id = getattr(api(), f"bpf_{of}_get_next_id")
    found: list[int] = []
    current, following = 0, c_uint32()
    while (result := next_id(current, byref(following))) == 0:
        current = following.value
        found.append(current)
    if result != -errno.ENOENT:
        checked(result, f"listing {of}s")
    return found


def fd_by_id(of: str, identifier: int) -> int:
    """Open a ``map``, ``prog`` or ``link`` by its id; the caller owns the descriptor."""
    open_by_id = getattr(api(), f"bpf_{of}_get_fd_by_id")
    return checked(open_by_id(identifier), f"opening {of} {identifier}")


def pin(fd: int, path: str) -> None:
    """Pin an object at a path in a bpffs."""
    checked(api().bpf_obj_pin(fd, os.fsencode(path)), f"pinning at {shown(os.fsencode(path))}")


def open_pin(path: str) -> int:
    """Open a pinned object; the caller owns the descriptor."""
    raw = os.fsencode(path)
    return checked(api().bpf_obj_get(raw), f"opening the pin {shown(raw)}")


@functools.cache
def possible_cpus() -> int:
    """Number of possible CPUs, which sizes every per-CPU value."""
    return checked(api().libbpf_num_possible_cpus(), "counting possible CPUs")


def close(fd: int) -> None:
    """Close a descriptor that may be closed already."""
    if fd >= 0:
        try:
            os.close(fd)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
