"""A buffer of another size than the value: the kernel writes past its end, or reads past it."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import functools
import mmap
import os
import resource
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import BadInput, LabError
from labkit.figures import Axes, style
from labkit.kernel import libbpf
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.parallel import Child, shared_array
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say
from labkit.runs import Run

_KEY = 0
_CHUNKS = 2_000  # asked of the heap at once, until two of them lie side by side
_MOST_CHUNKS = 1_000_000  # an old heap has many holes of one size, apart from each other


def _derived(tables: Tables) -> Tables:
    """The calls with a short buffer, those of labkit's Map, and the two places."""
    buffers, ends = tables["buffers"], tables["ends"]
    ends = ends.assign(short=ends["buffer_bytes"] < ends["value_bytes"])
    short = buffers[buffers["variant"] == "broken"]
    by_map = buffers[buffers["way"] == "map"]
    return {
        "short": short.assign(
            missing=short["value_bytes"] - short["buffer_bytes"],
            overrun=short["overrun_bytes"] / short["calls"],
        ),
        "closed_page": ends[ends["place"] == "closed-page"],
        "heap": ends[ends["place"] == "heap"],
        "by_map": by_map.assign(fits=by_map["buffer_bytes"] == by_map["value_bytes"]),
    }


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw how far lookups and updates run over buffers of many sizes."""
    ax = style.axes(ax)
    buffers = run.table("buffers")
    plain = buffers[buffers["way"] == "plain"]
    for number, (size, rows) in enumerate(plain.groupby("value_bytes")):
        look = style.look(number)
        read, write = (rows[rows["direction"] == way] for way in ("read", "write"))
        ax.plot(
            read["buffer_bytes"] / read["value_bytes"], read["overrun_bytes"] / read["calls"],
            **look.line(), label=f"value of {size:,} B",
        )  # fmt: skip
        ax.plot(
            write["buffer_bytes"] / write["value_bytes"], write["overrun_bytes"] / write["calls"],
            **look.points(), mfc="none", markersize=8, markeredgewidth=0.8,
        )  # fmt: skip
    ax.plot([], [], color=style.GREY, marker="o", markersize=8, mfc="none", linestyle="none",
            label="large, hollow: update")  # fmt: skip
    bounced = buffers[buffers["case"] == "read-bounced"]
    ax.plot(
        bounced["buffer_bytes"] / bounced["value_bytes"],
        bounced["overrun_bytes"] / bounced["calls"],
        color=style.BLACK, marker=".", linestyle="none", markersize=3, label="bounce buffer",
    )  # fmt: skip
    ax.set_yscale("symlog", base=2, linthresh=4)
    ax.set_yticks([0, *(4**power for power in range(1, 7))])
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.set_ylim(-1, 4 * float(plain["value_bytes"].max()))
    ax.set_xlabel("size of the buffer / size of the value")
    ax.set_ylabel("bytes past its end per call")
    ax.legend(loc="upper right")
    return ax


@experiment(
    "short-read-buffer",
    number=23,
    family="value-size",
    question="What happens to the memory behind a buffer that is smaller than the value?",
    claims=("2.2d",),
    needs=("bpf",),
    quick={"value_bytes": [64, 1024], "steps": 8, "trials": 300, "seed": 23},
    full={"value_bytes": [64, 256, 1024, 4096], "steps": 16, "trials": 1_000, "seed": 23},
    cases=(
        Case("broken", "read-short", "read, plain call, short buffer"),
        Case("broken", "write-short", "write, plain call, short buffer"),
        Case("control", "read-enough", "read, plain call, no short buffer"),
        Case("control", "write-enough", "write, plain call, no short buffer"),
        Case("fixed", "read-bounced", "read, bounce buffer"),
        Case("fixed", "write-bounced", "write, bounce buffer"),
        Case("fixed", "read-map", "read, labkit Map"),
        Case("fixed", "write-map", "write, labkit Map"),
    ),
    counted=Counted("overrun", operations="calls", anomalies="overrun_calls", cost_ns="call_ns",
                    of="buffers"),
    derive=_derived,
    statements=(
        Statement("the kernel reports no error for a short buffer",
                  "none(short(calls > 0).errors > 0)"),
        Statement("every call with a short buffer runs over by exactly the missing bytes",
                  "all(broken) and all(short(missing > 0).overrun == short(missing > 0).missing)"),
        Statement("a buffer of the value's size or more is never overrun", "none(control)"),
        Statement("neither cure overruns a buffer", "none(fixed)"),
        Statement("labkit's Map refuses every buffer of another size, before any call",
                  "all(by_map(fits=0).refused == by_map(fits=0).calls) "
                  "and none(by_map(fits=1).refused > 0)"),
        Statement("only where memory ends does the kernel answer EFAULT, with the buffer filled "
                  "already",
                  'all(closed_page(short=1).answer '
                  f"== {-errno.EFAULT}) "
                  'and all(closed_page(short=1).written_bytes > 0) '
                  'and all(closed_page(short=0).answer == 0)'),
        Statement("on the heap the lookup succeeds, and the process dies when it frees the "
                  "neighbour",
                  'all(heap(short=1).answer == 0) '
                  'and all(heap(short=1).exit_status < 0) '
                  'and all(heap(short=0).exit_status == 0)'),
    ),
    sentence="Every lookup into a short buffer succeeded and overwrote what lay behind it "
    '({sum(short(direction="read").overrun_bytes)} bytes in {broken["read-short"].operations} '
    "calls), and every update from one stored its neighbours "
    '({sum(short(direction="write").overrun_bytes)} bytes). On the heap, '
    '{rows(heap(exit_status < 0, short=1))} of '
    '{rows(heap(short=1))} processes died later, in free(). '
    "Buffers of the value's size: {control}. A lookup took "
    '{us(control["read-enough"].cost_ns)}, through a bounce buffer '
    "{us(fixed[\"read-bounced\"].cost_ns)}, by labkit's prepared reader "
    '{us(fixed["read-map"].cost_ns)}, all in Python.',
    figure=_figure,
)  # fmt: skip
def short_read_buffer(*, value_bytes: list[int], steps: int, trials: int, seed: int) -> Tables:
    """Look values up into buffers of many sizes, and update them from such, between guards.

    ``map_lookup_elem`` (kernel/bpf/syscall.c) ends in ``copy_to_user(uvalue, value,
    value_size)``: the call carries no length of the buffer, so nothing can be checked.
    All of it runs in a child process. The guard bytes are its own, and known; the heap
    that is really damaged dies with it.

    Parameters
    ----------
    value_bytes : list of int
        Value sizes, bytes; multiples of ``steps``.
    steps : int
        Buffer sizes for each value size: ``value_bytes / steps`` apart, up to twice the
        value.
    trials : int
        Lookups and updates with every buffer.
    seed : int
        Of the random bytes.

    Returns
    -------
    dict of DataFrame
        ``buffers``: one row per way to call, value size and buffer size with columns
        ``variant``, ``case``, ``direction`` (``read`` or ``write``), ``way`` (``plain``,
        ``bounced`` or ``map``), ``value_bytes``, ``buffer_bytes``,
        ``calls``, ``errors`` (calls that the kernel refused), ``refused`` (calls that were
        never made), ``overrun_calls``, ``overrun_bytes`` (guard bytes changed by a read;
        guard bytes that a write put into the map; all int64) and ``call_ns`` (float64,
        median); ``ends``: one row per value size, place and size of a buffer with columns
        ``place`` (``closed-page``, before a page that may not be touched, or ``heap``),
        ``value_bytes``, ``buffer_bytes``, ``answer`` (minus the errno of the lookup),
        ``written_bytes`` (into the buffer before the closed page; behind the buffer on the
        heap) and ``exit_status`` (of the child, which on the heap frees the neighbouring
        chunk; minus the signal; all int64).
    """
    for size in value_bytes:
        if size % steps:
            raise BadInput(f"value_bytes of short-read-buffer must divide by {steps}, not {size}.")
        if not 32 <= size <= mmap.PAGESIZE:
            raise BadInput(
                f"value_bytes of short-read-buffer are 32 to {mmap.PAGESIZE}, not {size}."
            )
    rows: list[dict[str, object]] = []
    ends: list[dict[str, object]] = []
    for size in value_bytes:
        say(f"values of {size} B into and out of buffers of {2 * steps} sizes")
        with Map.create(
            MapKind.HASH, key="u4", value=f"V{size}", max_entries=1, name="short_buffer"
        ) as table:
            guarded = functools.partial(_between_guards, table, steps, trials, seed)
            with Child(guarded) as child:
                rows += child.result()
            for length in (size // 2, size):
                ends += [_before_a_closed_page(table, length), _on_the_heap(table, length)]
    return {"buffers": pd.DataFrame(rows), "ends": pd.DataFrame(ends)}


class _Ways:
    """The ways to pass a buffer of ``length`` bytes at the start of ``memory`` to the kernel."""

    def __init__(self, table: Map, memory: npt.NDArray[np.uint8], length: int) -> None:
        lib, fd = libbpf.api(), table.fd
        key, bounce = table.encode_key(_KEY), table.value_buffer()
        at, key_at, bounce_at = memory.ctypes.data, key.ctypes.data, bounce.ctypes.data
        buffer, given = memory[:length], min(length, table.value_size)

        def read_direct(_keep: object = key) -> int:
            return int(lib.bpf_map_lookup_elem(fd, key_at, at))

        def write_direct(_keep: object = key) -> int:
            return int(lib.bpf_map_update_elem(fd, key_at, at, 0))

        def read_bounced(_keep: object = key) -> int:
            answer = int(lib.bpf_map_lookup_elem(fd, key_at, bounce_at))
            buffer[:given] = bounce[:given]
            return answer

        def write_bounced(_keep: object = key) -> int:
            bounce[:given], bounce[given:] = buffer[:given], 0
            return int(lib.bpf_map_update_elem(fd, key_at, bounce_at, 0))

        self.reads: list[tuple[str, Callable[[], int]]] = [
            ("plain", read_direct),
            ("bounced", read_bounced),
            ("map", _prepared(table.reader, buffer)),
        ]
        self.writes: list[tuple[str, Callable[[], int]]] = [
            ("plain", write_direct),
            ("bounced", write_bounced),
            ("map", _prepared(table.updater, buffer)),
        ]


def _prepared(
    prepare: Callable[[int, npt.NDArray[np.uint8]], Callable[[], int]],
    buffer: npt.NDArray[np.uint8],
) -> Callable[[], int]:
    """The Map's prepared call; where it refuses the buffer, a call that repeats the refusal."""
    try:
        return prepare(_KEY, buffer)
    except BadInput as error:
        refusal = error

    def refuse() -> int:
        raise refusal

    return refuse


def _between_guards(table: Map, steps: int, trials: int, seed: int) -> list[dict[str, object]]:
    """Work of the child: buffers of many sizes at the start of memory that it knows."""
    size, random = table.value_size, np.random.default_rng(seed)
    memory, value = np.zeros(3 * size, np.uint8), np.zeros(size, np.uint8)
    put, get = table.updater(_KEY, value), table.reader(_KEY, value)
    guard = np.zeros_like(memory)

    def overrun_by_read(length: int, call: Callable[[], int]) -> tuple[int, int, int]:
        value[:] = random.integers(0, 256, size, np.uint8)
        put()
        # Every guard byte differs from the byte that the kernel would write over it.
        guard[:size], guard[size:] = ~value, 0xA5
        memory[:] = guard
        begun = time.perf_counter_ns()
        answer = call()
        spent = time.perf_counter_ns() - begun
        return answer, spent, int(np.count_nonzero(memory[length:] != guard[length:]))

    def foreign_by_write(length: int, call: Callable[[], int]) -> tuple[int, int, int]:
        memory[:] = random.integers(1, 256, len(memory), np.uint8)
        begun = time.perf_counter_ns()
        answer = call()
        spent = time.perf_counter_ns() - begun
        get()
        return answer, spent, int(np.count_nonzero(value[length:] == memory[length:size]))

    rows: list[dict[str, object]] = []
    for length in range(size // steps, 2 * size + 1, size // steps):
        ways = _Ways(table, memory, length)
        for direction, calls, overrun in (
            ("read", ways.reads, overrun_by_read),
            ("write", ways.writes, foreign_by_write),
        ):
            for way, call in calls:
                done = _Done()
                for _ in range(trials):
                    try:
                        done.add(*overrun(length, call))
                    except BadInput:
                        done.refused += 1
                rows.append(
                    {
                        **_named(direction, way, short=length < size),
                        "value_bytes": size,
                        "buffer_bytes": length,
                        **done.row(),
                    }
                )
    return rows


def _named(direction: str, way: str, *, short: bool) -> dict[str, object]:
    if way != "plain":
        variant, how = "fixed", way
    else:
        variant, how = ("broken", "short") if short else ("control", "enough")
    return {"variant": variant, "case": f"{direction}-{how}", "direction": direction, "way": way}


class _Done:
    """What the calls with one buffer did."""

    def __init__(self) -> None:
        self.refused = self.errors = self.overrun_calls = self.overrun_bytes = 0
        self.spent: list[int] = []

    def add(self, answer: int, spent: int, overrun_bytes: int) -> None:
        self.spent.append(spent)
        self.errors += answer != 0
        self.overrun_calls += overrun_bytes > 0
        self.overrun_bytes += overrun_bytes

    def row(self) -> dict[str, object]:
        return {
            "calls": len(self.spent) + self.refused,
            "errors": self.errors,
            "refused": self.refused,
            "overrun_calls": self.overrun_calls,
            "overrun_bytes": self.overrun_bytes,
            "call_ns": float(np.median(self.spent)) if self.spent else np.nan,
        }


def _before_a_closed_page(table: Map, length: int) -> dict[str, object]:
    """A buffer that ends where memory ends: the one place where the kernel can notice."""
    table.update(_KEY, b"\xff" * table.value_size)

    def read() -> tuple[int, int]:
        page = mmap.PAGESIZE
        memory = mmap.mmap(-1, 2 * page)
        view = np.frombuffer(memory, np.uint8)
        start = view.ctypes.data
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0):
            raise LabError(f"mprotect failed: {libbpf.error_name(ctypes.get_errno())}.")
        key = table.encode_key(_KEY)
        answer = libbpf.api().bpf_map_lookup_elem(table.fd, key.ctypes.data, start + page - length)
        return int(answer), int(np.count_nonzero(view[:page]))

    with Child(read) as child:
        answer, written = child.result()
    return _end("closed-page", table, length, answer, written, child)


def _on_the_heap(table: Map, length: int) -> dict[str, object]:
    """A buffer from malloc: if it is short, the next chunk's header goes, and free() finds out."""
    table.update(_KEY, b"\xff" * table.value_size)
    seen = shared_array(2, np.int64)

    def read_then_free() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)  # the allocator's last words
        faulthandler.disable()
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.malloc_usable_size.restype = ctypes.c_size_t
        libc.malloc_usable_size.argtypes = libc.free.argtypes = [ctypes.c_void_p]
        libc.free.restype = None
        chunks: list[int] = []
        buffer = None
        while buffer is None:
            if len(chunks) >= _MOST_CHUNKS:
                raise LabError(f"No two of {len(chunks)} heap chunks of {length} B are neighbours.")
            chunks = sorted([*chunks, *(libc.malloc(length) for _ in range(_CHUNKS))])
            # A chunk's size stands in the word before it, behind the last usable byte of the
            # chunk below.
            usable = libc.malloc_usable_size(chunks[0])
            apart = usable + ctypes.sizeof(ctypes.c_size_t)
            buffer = next((low for low, high in pairwise(chunks) if high - low == apart), None)
        for chunk in (buffer, buffer + apart):
            ctypes.memset(chunk, 0, usable)
        behind = np.ctypeslib.as_array((ctypes.c_ubyte * table.value_size).from_address(buffer))
        before = behind.copy()
        key = table.encode_key(_KEY)
        seen[0] = libbpf.api().bpf_map_lookup_elem(table.fd, key.ctypes.data, buffer)
        seen[1] = np.count_nonzero(behind[length:] != before[length:])
        libc.free(buffer + apart)

    with Child(read_then_free) as child:
        try:
            child.result()
        except LabError:
            if child.exit_status is None or child.exit_status >= 0:
                raise  # it did not die of its memory: it never came so far
    return _end("heap", table, length, int(seen[0]), int(seen[1]), child)


def _end(
    place: str, table: Map, length: int, answer: int, written: int, child: Child
) -> dict[str, object]:
    assert child.exit_status is not None
    return {
        "place": place,
        "value_bytes": table.value_size,
        "buffer_bytes": length,
        "answer": answer,
        "written_bytes": written,
        "exit_status": child.exit_status,
    }
