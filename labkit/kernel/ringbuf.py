"""The ring buffer: records are taken a batch at a time, and no Python runs for a single one.

The kernel maps a ring into user space as a page with the consumer's position, a page with
the producer's, and the data twice in a row, so that a record never breaks at the end
(kernel/bpf/ringbuf.c). Each record is an eight-byte header (its length, with bit 31 while
the producer still writes it and bit 30 once it was discarded) and the payload, rounded up
to eight bytes. ``native.c`` walks from record to record. Where it cannot be compiled NumPy takes
records of one size: headers and payloads are strided arrays then, one comparison checks a few ten
thousand headers, and one assignment copies as many payloads.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import platform
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput, LabError
from labkit.kernel import libbpf, native
from labkit.kernel.closing import Closing
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map, map_error
from labkit.kernel.record_handler import RecordHandler

BUSY: Final = 1 << 31
"""Header bit of a record that its producer has reserved but not yet handed over."""

DISCARDED: Final = 1 << 30
"""Header bit of a record that its producer gave back; consumers skip it."""

HEADER_BYTES: Final = 8
"""Bytes in front of every payload."""

WAKEUPS: Final = {"default": 0, "always": 1, "every-n": 2, "adaptive": 3, "never": 4}
"""Wakeup policies of the programs that include bpf/wakeup.h, by name."""

_LENGTH: Final = DISCARDED - 1
# Headers and copies go in pieces that stay in the CPU's cache between the two passes.
_PIECE: Final = 32_768
# Records in place are few enough that their bytes, walked once, are in the CPU's cache when read.
_IN_PLACE_BYTES: Final = 1 << 20
_MOST_ROOM: Final = 1 << 32
# How long to look away from a record that is still being written, seconds.
_BUSY_PAUSE_S: Final = 50e-6
_POLL_LIMIT_MS: Final = 60_000

# The longest sleep without a look at signals: one that comes just before it does not wake us.
_NATIVE_SLEEP_S: Final = 1.0

Consumer = Literal["native", "numpy", "libbpf"]

_SampleCallback = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)

# Ids of the maps that have a reader in this process.
_being_read: set[int] = set()


def slot_bytes(payload_bytes: int) -> int:
    """Bytes that a record takes in a ring: header and payload, rounded up to eight.

    Examples
    --------
    >>> slot_bytes(32), slot_bytes(33)
    (40, 48)
    """
    return -(-(HEADER_BYTES + payload_bytes) // 8) * 8


def wakeup_constants(policy: str, at: int = 1) -> dict[str, int]:
    """Constants that choose the wakeup policy of a program that includes bpf/wakeup.h.

    Parameters
    ----------
    policy : str
        One of `WAKEUPS`: the kernel's own rule, every record, every N-th record, adaptive (once
        so many bytes stand unread), never.
    at : int
        The N of ``every-n``, or the bytes of ``adaptive``.

    Raises
    ------
    BadInput
        There is no such policy, or ``at`` is less than 1.
    """
    if policy not in WAKEUPS:
        raise BadInput(f"A wakeup policy is one of {', '.join(WAKEUPS)}, not {policy!r}.")
    if at < 1:
        raise BadInput(f"A wakeup comes every 1 record or byte at least, not every {at}.")
    return {"WAKEUP": WAKEUPS[policy], "WAKEUP_AT": at}


class SharedRing(LabError):
    """Two consumers read one ring, and neither gets it whole."""


class Layout:
    """Records of one size in a ring's doubly mapped data; knows no kernel.

    Parameters
    ----------
    data : buffer
        The data twice in a row, and ``start`` bytes in front of it.
    start : int
        Offset of the data in the buffer, bytes.
    capacity : int
        Size of the ring, bytes; a power of two.
    payload : int
        Size of every payload, bytes.

    Attributes
    ----------
    words : numpy.ndarray
        uint32: the data, once.
    """

    def __init__(self, data: mmap.mmap | bytearray, start: int, capacity: int, payload: int):
        self.slot = slot_bytes(payload)
        self._data, self._start, self._mask = data, start, capacity - 1
        self._size = np.uint32(payload)
        self._payload = np.dtype(f"V{payload}")
        self.words = np.frombuffer(data, np.uint32, count=capacity // 4, offset=start)

    def header(self, position: int) -> int:
        """Header of the record at a position: its length and the bits of its state."""
        return int(self.words[(position & self._mask) // 4])

    def payload(self, position: int, length: int) -> npt.NDArray[np.uint8]:
        """Bytes of the record at a position; a view."""
        at = self._start + (position & self._mask) + HEADER_BYTES
        return np.frombuffer(self._data, np.uint8, count=length, offset=at)

    def view(self, position: int, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """See records in a row, where they stand.

        Parameters
        ----------
        position : int
            Of the first, bytes since the ring was made.
        count : int
            How many; they must be ready.
        dtype : dtype
            Of a payload.

        Returns
        -------
        numpy.ndarray
            Shape ``(count,)``, strided and read-only.
        """
        at = self._start + (position & self._mask) + HEADER_BYTES
        seen: npt.NDArray[Any] = np.ndarray((count,), dtype, self._data, at, (self.slot,))
        seen.flags.writeable = False
        return seen

    def take(self, position: int, end: int, out: npt.NDArray[np.void]) -> tuple[int, int]:
        """Copy one piece of the records between two positions.

        Stops in front of a record that is busy or has another size.

        Parameters
        ----------
        position, end : int
            The consumer's and the producer's position, bytes since the ring was made.
        out : numpy.ndarray of void, shape (n,)
            Gets the payloads; at most ``n`` records are passed.

        Returns
        -------
        copied, passed : int
            Payloads in ``out``, and records passed: discarded ones are passed, not copied.
        """
        count = min((end - position) // self.slot, len(out), _PIECE)
        at = self._start + (position & self._mask)
        headers = np.ndarray((count,), np.uint32, self._data, at, (self.slot,))
        payloads: npt.NDArray[np.void] = np.ndarray(
            (count,), self._payload, self._data, at + HEADER_BYTES, (self.slot,)
        )
        if (headers == self._size).all():
            out[:count] = payloads
            return count, count
        # Judged from one copy: the producer clears a busy bit whenever it likes.
        seen = headers.copy()
        ready = ((seen & _LENGTH) == self._size) & (seen < BUSY)
        if not ready.all():
            count = int(ready.argmin())
        kept = (seen[:count] & DISCARDED) == 0
        copied = int(kept.sum())
        out[:copied] = payloads[:count][kept]
        return copied, count


class Records(NamedTuple):
    """Records of any size.

    Attributes
    ----------
    data : numpy.ndarray
        uint8: their payloads, each from a multiple of 8 bytes on.
    places : numpy.ndarray
        Rows of `labkit.kernel.native.PLACE`: ``start`` and ``size`` of each, bytes (uint32).
    """

    data: npt.NDArray[np.uint8]
    places: npt.NDArray[np.void]


@dataclass(frozen=True)
class RingStats:
    """What a reader did, and how its ring stands.

    Attributes
    ----------
    consumed : int
        Records delivered by this reader.
    discarded : int
        Records that the producer had given back; passed, not delivered.
    unread_bytes : int
        Between consumer and producer, headers and busy records included.
    free_bytes : int
        The rest of the ring; the kernel never fills the last byte of it.
    capacity_bytes : int
        Size of the ring.
    """

    consumed: int
    discarded: int
    unread_bytes: int
    free_bytes: int
    capacity_bytes: int


class RingReader(Closing):
    """Reads a ring buffer map whose records all have one size.

    A ring has one consumer. A second reader in this process is refused; another process,
    or bcc's own callback, on the same ring must be kept away by its user.

    Records that found no room are not in the ring, and the kernel does not count them:
    the program that produces has to.

    Parameters
    ----------
    ring : Map or int
        The map, or its file descriptor, which stays the caller's.
    dtype : dtype-like
        Layout of a record; its size is the size that the program reserves.
    batch : int
        Records in the array that the reader owns and fills again at every `read`.
    consumer : {"native", "numpy", "libbpf"}, optional
        ``native`` is compiled C with the loads and stores that every CPU needs. ``numpy``
        relies on loads that are not reordered with other loads, nor stores with earlier loads:
        x86. ``libbpf`` calls back for every record: right everywhere, some hundred times
        slower. By default the first that is to be had and right on this machine.

    Raises
    ------
    BadInput
        No ring buffer map, a dtype that cannot be a record of it, a second reader,
        ``numpy`` on a CPU with weakly ordered memory, or ``native`` where it cannot be compiled.

    Examples
    --------
    >>> from labkit.kernel.maps import Map, MapKind
    >>> with Map.create(
    ...     MapKind.RINGBUF, key=None, value=None, max_entries=4096
    ... ) as ring, RingReader(ring, [("seq", "u8"), ("ns", "u8")]) as reader:
    ...     len(reader.poll(0.01))
    0
    """

    def __init__(
        self,
        ring: Map | int,
        dtype: npt.DTypeLike,
        *,
        batch: int = 65_536,
        consumer: Consumer | None = None,
    ) -> None:
        self._fd = -1
        self._dtype = np.dtype(dtype)
        self.consumer: Consumer = _right_here() if consumer is None else consumer
        info = libbpf.map_info(ring if isinstance(ring, int) else ring.fd)
        name = libbpf.shown(info.name)
        if info.type != MapKind.RINGBUF:
            raise BadInput(
                f"Map {name} (id {info.id}) is a {MapKind(info.type).name.lower()}: "
                "a RingReader takes a ring buffer map."
            )
        self._capacity: int = info.max_entries
        _check_record(self._dtype, self._capacity)
        if batch < 1:
            raise BadInput(f"A batch holds at least 1 record, not {batch}.")
        if self.consumer not in ("native", "numpy", "libbpf"):
            raise BadInput(f"A consumer is 'native', 'numpy' or 'libbpf', not {consumer!r}.")
        if self.consumer == "native" and native.compiled() is None:
            raise BadInput(f"There is no native consumer here ({native.state()}): name another.")
        if self.consumer == "numpy" and _weakly_ordered():
            raise BadInput(
                f"On {platform.machine()} memory is weakly ordered and NumPy has no acquire "
                "load: use consumer='libbpf'."
            )
        if info.id in _being_read:
            raise BadInput(
                f"Ring {name} (id {info.id}) has a reader already, and a ring has one consumer: "
                "close the other one first."
            )
        self.map_id: int = info.id
        self._consumed = self._discarded = 0
        self._void = np.dtype(f"V{self._dtype.itemsize}")
        self._own = np.empty(batch, self._dtype)
        # Touched now: the kernel hands out zeroed pages at their first use, which costs more
        # than the copy itself.
        self._own.view(np.uint8).fill(0)
        self._fd = os.dup(ring if isinstance(ring, int) else ring.fd)
        _being_read.add(self.map_id)
        try:
            self._map()
            self._libbpf = self._native = None
            if self.consumer == "libbpf":
                self._libbpf = _LibbpfConsumer(self._fd, self._void)
            elif self.consumer == "native":
                self._native = _NativeConsumer(
                    self._consumer_position, self._producer_position, self._layout, self._fd
                )
        except BaseException:
            self.close()
            raise
        self._poller = select.poll()
        self._poller.register(self._fd, select.POLLIN)

    def _map(self) -> None:
        page = mmap.PAGESIZE
        try:
            consumer = mmap.mmap(self._fd, page, mmap.MAP_SHARED)
            data = mmap.mmap(
                self._fd,
                page + 2 * self._capacity,
                mmap.MAP_SHARED,
                mmap.PROT_READ,
                offset=page,
            )
        except OSError as error:
            raise map_error(error.errno or 0, f"Mapping ring id {self.map_id}") from error
        # Never closed by hand: the mappings go with the last view of them.
        self._consumer_position = np.frombuffer(consumer, np.uint64, count=1)
        self._producer_position = np.frombuffer(data, np.uint64, count=1)
        self._layout = Layout(data, page, self._capacity, self._dtype.itemsize)
        self._position = int(self._consumer_position[0])

    # -- reading -----------------------------------------------------------------------

    def read(
        self, out: npt.NDArray[Any] | None = None, limit: int | None = None
    ) -> npt.NDArray[Any]:
        """Take what is in the ring now; never blocks.

        A record that is still being written ends the batch: the ones behind it come
        later, in order.

        Parameters
        ----------
        out : numpy.ndarray, optional
            Contiguous array of the reader's dtype to fill. Without it the reader's own
            array is filled, **and the next read overwrites it**: copy what must stay.
        limit : int, optional
            Records at most; by default as many as the array holds.

        Returns
        -------
        numpy.ndarray
            A view of the front of the array that was filled; empty if there was nothing.

        Raises
        ------
        BadInput
            The reader is closed, ``out`` does not fit, or the ring holds a record of
            another size: what stands in front of it is delivered first.
        SharedRing
            Another consumer, of any process, has read from the ring.
        """
        self._check_open()
        if out is None:
            out = self._own
        elif not isinstance(out, np.ndarray) or out.dtype != self._dtype or out.ndim != 1:
            raise BadInput(f"out must be an array of shape (n,) and dtype {self._dtype}.")
        elif not (out.flags.c_contiguous and out.flags.writeable):
            raise BadInput("out must be contiguous and writable.")
        if limit is not None:
            if limit < 1:
                raise BadInput(f"A limit is at least 1 record, not {limit}.")
            out = out[:limit]
        if len(out) == 0:
            raise BadInput("out holds no record: make it longer.")
        if self._native is not None:
            copied = self._native.take(out)
            self.took(copied)
            return out[:copied]
        if self._libbpf is not None:
            copied = self._take_by_libbpf(self._libbpf, out.view(self._void))
        else:
            copied = self._take(out.view(self._void))
        self._consumed += copied
        return out[:copied]

    def read_any(
        self, room: int = 1 << 20, limit: int = 65_536, out: Records | None = None
    ) -> Records:
        """Take records of any size that are in the ring now; never blocks.

        The reader's dtype says nothing of them. A record that is still being written ends the
        batch, and so does one for which there is no room any more.

        Parameters
        ----------
        room : int
            Bytes to hold them, each rounded up to eight; less than 4 GiB.
        limit : int
            Records at most.
        out : Records, optional
            Fill these contiguous arrays, whose lengths are room and limit then: new memory costs
            more at its first use than the records do.

        Returns
        -------
        Records
            Yours to keep; with ``out``, its ``data`` and a view of the front of its ``places``.

        Raises
        ------
        BadInput
            The reader is closed, has libbpf as its consumer, ``out`` does not fit, or the next
            record is larger than ``room``.
        SharedRing
            Another consumer, of any process, has read from the ring.
        """
        self._check_open()
        if out is not None:
            room, limit = len(out.data), len(out.places)
        if not (0 < room < _MOST_ROOM and limit > 0):
            raise BadInput(
                f"Records want room, less than 4 GiB, and a limit, not {room} bytes and {limit} "
                "records."
            )
        out = out or Records(np.empty(room, np.uint8), np.empty(limit, native.PLACE))
        for array, dtype in zip(out, (np.uint8, native.PLACE), strict=True):
            if array.dtype != dtype or not (array.flags.c_contiguous and array.flags.writeable):
                raise BadInput("out is Records of contiguous, writable bytes and places.")
        if self._libbpf is not None:
            raise BadInput("libbpf's consumer takes records of one size: use another one.")
        data, places = out
        if self._native is None:
            taken, refused = self._take_any(data, places)
        else:
            taken, refused = self._native.take_any(data, places)
            self._native.ring.refused = -1  # not for its size: for want of room
            self.took(taken)
        if not taken and refused >= 0:
            raise BadInput(
                f"The next record of ring id {self.map_id} has {refused} bytes, and there is room "
                f"for {room}: give more."
            )
        self._consumed += taken if self._native is None else 0
        return Records(data, places[:taken])

    @contextmanager
    def in_place(self) -> Iterator[npt.NDArray[Any]]:
        """Records where they stand in the ring, without a copy; never blocks.

        The producer gets their room back when the block ends, and not if it ends by an exception:
        then they come again.

        Yields
        ------
        numpy.ndarray
            A view of the records in a row that stand ready, read-only and strided; empty if there
            are none. **It is of no meaning once the block has ended.**

        Raises
        ------
        BadInput
            The reader is closed or no native one, or the ring holds a record of another size.
        SharedRing
            Another consumer, of any process, has read from the ring.
        """
        self._check_open()
        if self._native is None:
            raise BadInput(f"Records are read in place by consumer='native' ({native.state()}).")
        layout, consumer = self._layout, self._native
        ready = consumer.ready(self._dtype.itemsize)
        if ready <= 0:
            self.took(ready)
        yield layout.view(consumer.ring.position, ready, self._dtype)
        self.took(ready if consumer.hand_back(ready * layout.slot) == 0 else -1)

    def each(self, handler: RecordHandler) -> int:
        """Have a compiled function take what is in the ring now; never blocks.

        Parameters
        ----------
        handler : RecordHandler
            Of the reader's dtype (`labkit.kernel.record_handler.record_handler`).

        Returns
        -------
        int
            How many records there were.

        Raises
        ------
        BadInput
            The reader is closed or no native one, the handler is for other records, or the ring
            holds a record of another size.
        SharedRing
            Another consumer, of any process, has read from the ring.
        """
        self._check_open()
        if self._native is None:
            raise BadInput(f"A handler is called by consumer='native' ({native.state()}).")
        if handler.dtype != self._dtype:
            raise BadInput(f"This handler is for records of {handler.dtype}, not {self._dtype}.")
        taken = self._native.each(handler)
        self.took(taken)
        return taken

    @property
    def ring(self) -> native.Ring | None:
        """The ring as compiled code reads it, which then says so by `took`; None: it cannot."""
        self._check_open()
        return None if self._native is None else self._native.ring

    def took(self, records: int) -> None:
        """Take the account of compiled code over: so many records, or the error that it met.

        Raises
        ------
        BadInput
            The ring holds a record of another size.
        SharedRing
            Another consumer, of any process, has read from the ring.
        """
        assert self._native is not None
        ring = self._native.ring
        self._position, self._discarded = ring.position, ring.discarded
        if records < 0:
            raise self._shared()
        if not records and ring.refused >= 0:
            raise self._other_size(ring.refused)
        self._consumed += records

    def _take(self, out: npt.NDArray[np.void]) -> int:
        position, copied = self._own_position(), 0
        # On x86 this load, and those of the headers, acquire: no later load passes them. One
        # read of the end bounds the loop, however fast the producer is.
        end = int(self._producer_position[0])
        while copied < len(out):
            got, passed = self._layout.take(position, end, out[copied:])
            if not passed:
                break
            position += passed * self._layout.slot
            copied += got
            self._discarded += passed - got
            # On x86 this store releases: the copy above is done when the kernel sees it. Piece
            # by piece, so that the producer has room again early.
            self._own_position()
            self._consumer_position[0] = self._position = position
        if not copied and position < end:
            length = self._layout.header(position) & _LENGTH
            if length != self._dtype.itemsize:
                raise self._other_size(length)
        return copied

    def _take_any(
        self, out: npt.NDArray[np.uint8], places: npt.NDArray[np.void]
    ) -> tuple[int, int]:
        """Answers how many records were taken, and the size of one that found no room, or -1."""
        position, end = self._own_position(), int(self._producer_position[0])
        taken = used = 0
        refused = -1
        while taken < len(places) and position < end:
            header = self._layout.header(position)
            length = header & _LENGTH
            padded = slot_bytes(length) - HEADER_BYTES
            if not header & DISCARDED and padded > len(out) - used:
                refused = length
                break
            if header & BUSY:
                break
            if header & DISCARDED:
                self._discarded += 1
            else:
                out[used : used + length] = self._layout.payload(position, length)
                places[taken] = used, length
                taken, used = taken + 1, used + padded
            position += HEADER_BYTES + padded
        self._own_position()
        self._consumer_position[0] = self._position = position
        return taken, refused

    def _take_by_libbpf(self, consumer: _LibbpfConsumer, out: npt.NDArray[np.void]) -> int:
        before = self._own_position()
        copied = consumer.take(out)
        self._position = int(self._consumer_position[0])
        if consumer.refused is None:
            passed = (self._position - before) // self._layout.slot
            self._discarded += passed - copied
        elif not copied:
            raise self._other_size(consumer.refused)
        return copied

    def _own_position(self) -> int:
        """Where we read on; `SharedRing` where somebody else has moved it."""
        if int(self._consumer_position[0]) != self._position:
            raise self._shared()
        return self._position

    def _shared(self) -> SharedRing:
        return SharedRing(
            f"Somebody else reads ring id {self.map_id} too, so that records are lost to one "
            "and seen twice by the other: a ring has one consumer, give each a ring of its own."
        )

    def _other_size(self, length: int) -> BadInput:
        return BadInput(
            f"Ring id {self.map_id} holds a record of {length} bytes and the dtype has "
            f"{self._dtype.itemsize}: give the program's layout; records of several sizes "
            "are read by read_any."
        )

    def wait(self, timeout_s: float) -> bool:
        """Wait until a record can be read.

        Parameters
        ----------
        timeout_s : float
            Bound, seconds; the kernel's timer rounds it up to a millisecond. Where the
            program wakes nobody (``BPF_RB_NO_WAKEUP``) this is the reader's timer.

        Returns
        -------
        bool
            Whether there is one; the ring is checked once more after the deadline.

        Raises
        ------
        BadInput
            The reader is closed, or the timeout is no bound.
        """
        self._check_open()
        deadline = time.monotonic() + _bounded(timeout_s)
        if self._native is not None:
            return self._wait_natively(self._native, deadline)
        # No wakeup is lost between our check and our sleep. By its default rule the kernel
        # wakes us only if it finds the consumer's position at the record that it commits
        # (bpf_ringbuf_commit: xchg of the header, then load of the position), and on x86 our
        # store of the position may still be on its way when we load the header. But poll(2),
        # unlike epoll's ready list, always asks the map itself: ringbuf_map_poll_kern first
        # joins the wait queue, which takes its lock and so is a full barrier, and then
        # compares the two positions. Either it sees the record or the producer sees us.
        while not self._ready():
            left = deadline - time.monotonic()
            if left <= 0:
                return self._ready()
            if self._consumer_position[0] != self._producer_position[0]:
                # A record is being written: for poll(2) that is data, so it would not sleep.
                time.sleep(min(left, _BUSY_PAUSE_S))
            else:
                self._poller.poll(min(math.ceil(left * 1e3), _POLL_LIMIT_MS))
        return True

    def _wait_natively(self, consumer: _NativeConsumer, deadline: float) -> bool:
        _mapped = self._layout  # stays, also if another thread closes the reader meanwhile
        while True:
            left = max(0.0, deadline - time.monotonic())
            answer = consumer.wait(min(left, _NATIVE_SLEEP_S))
            if answer == 1 or (answer == 0 and left <= _NATIVE_SLEEP_S):
                return answer == 1
            # What a signal asks for, Python does now, between two steps.
            if answer not in (0, -errno.EINTR):
                self._check_open()
                raise map_error(-answer, f"Waiting for ring id {self.map_id}")

    def _ready(self) -> bool:
        position = int(self._consumer_position[0])
        if position == int(self._producer_position[0]):
            return False
        return self._layout.header(position) < BUSY

    def poll(
        self,
        timeout_s: float,
        out: npt.NDArray[Any] | None = None,
        limit: int | None = None,
    ) -> npt.NDArray[Any]:
        """`wait` for ``timeout_s`` seconds at most, then `read` with ``out`` and ``limit``.

        Returns
        -------
        numpy.ndarray
            Empty where the timeout passed without an event.
        """
        self.wait(timeout_s)
        return self.read(out, limit)

    def batches(self, for_s: float) -> Iterator[npt.NDArray[Any]]:
        """Yield batches as they come, for a bounded time.

        Parameters
        ----------
        for_s : float
            Seconds after which the iteration ends.

        Yields
        ------
        numpy.ndarray
            As `read` without arguments: valid until the next one.
        """
        deadline = time.monotonic() + _bounded(for_s)
        while (left := deadline - time.monotonic()) > 0:
            batch = self.poll(left)
            if len(batch):
                yield batch

    @property
    def unread_bytes(self) -> int:
        """Bytes that stand in the ring, headers included."""
        self._check_open()
        return int(self._producer_position[0]) - int(self._consumer_position[0])

    def stats(self) -> RingStats:
        """What was read so far, and how full the ring is now."""
        unread = self.unread_bytes
        return RingStats(
            consumed=self._consumed,
            discarded=self._discarded,
            unread_bytes=unread,
            free_bytes=self._capacity - unread,
            capacity_bytes=self._capacity,
        )

    # -- ending ------------------------------------------------------------------------

    def close(self) -> None:
        """Drop the mappings and our reference to the ring; safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        _being_read.discard(self.map_id)
        for name in ("_native", "_layout", "_consumer_position", "_producer_position"):
            self.__dict__.pop(name, None)
        consumer = self.__dict__.pop("_libbpf", None)
        if consumer is not None:
            consumer.close()
        os.close(fd)

    def _check_open(self) -> None:
        if self._fd < 0:
            raise BadInput("This RingReader is closed: make a new one.")

    def __del__(self) -> None:
        if "_fd" in self.__dict__:
            self.close()


class _NativeConsumer:
    """``native.c`` on the mapping of one reader."""

    def __init__(
        self,
        consumer: npt.NDArray[np.uint64],
        producer: npt.NDArray[np.uint64],
        layout: Layout,
        fd: int,
    ) -> None:
        library = native.compiled()
        assert library is not None
        self.ring = native.Ring(
            consumer=native.address(consumer),
            producer=native.address(producer),
            data=native.address(layout.words),
            capacity=4 * len(layout.words),
            position=int(consumer[0]),
            refused=-1,
            fd=fd,
        )
        self.ring.mapped = consumer, producer, layout  # stay as long as it does
        self._at = ctypes.byref(self.ring)
        self._take, self._take_any = library.lab_ring_take, library.lab_ring_take_any
        self._wait, self._ready = library.lab_ring_wait, library.lab_ring_ready
        self._hand_back, self._each = library.lab_ring_hand_back, library.lab_ring_each

    def take(self, out: npt.NDArray[Any]) -> int:
        """Fill an array with records of its size; -1: somebody else reads the ring."""
        return int(self._take(self._at, native.address(out), len(out), out.itemsize))

    def take_any(self, out: npt.NDArray[np.uint8], places: npt.NDArray[np.void]) -> tuple[int, int]:
        """Fill an array with records of any size; also the size of one without room, or -1."""
        taken = self._take_any(
            self._at, native.address(out), len(out), native.address(places), len(places)
        )
        return int(taken), self.ring.refused

    def ready(self, size: int) -> int:
        """Records of a size that stand ready in a row; -1: somebody else reads the ring."""
        return int(self._ready(self._at, size, _IN_PLACE_BYTES // slot_bytes(size) or 1))

    def each(self, handler: RecordHandler) -> int:
        """Have a compiled function take what there is; -1: somebody else reads the ring."""
        size, state = handler.dtype.itemsize, native.address(handler.state)
        return int(self._each(self._at, size, handler.address, state))

    def hand_back(self, size: int) -> int:
        """Give so many bytes back; -1: somebody else reads the ring."""
        return int(self._hand_back(self._at, size))

    def wait(self, seconds: float) -> int:
        """1 with a record, 0 without one in time, else a negative error number."""
        return int(self._wait(self._at, int(seconds * 1e9)))


class _LibbpfConsumer:
    """libbpf's own consumer (its loads acquire on every CPU), one callback a record."""

    def __init__(self, fd: int, void: np.dtype[np.void]) -> None:
        self.refused: int | None = None
        self._size = void.itemsize
        self._at = self._room = self._copied = 0
        self._lib = libbpf.api()
        self._lib.ring_buffer__new.argtypes = [c_int, _SampleCallback, c_void_p, c_void_p]
        self._lib.ring_buffer__new.restype = c_void_p
        self._lib.ring_buffer__consume.argtypes = [c_void_p]
        self._lib.ring_buffer__free.argtypes = [c_void_p]
        self._lib.ring_buffer__free.restype = None
        self._callback = _SampleCallback(self._accept)
        self._rings = self._lib.ring_buffer__new(fd, self._callback, None, None)
        if not self._rings:
            raise map_error(ctypes.get_errno() or errno.ENOMEM, "Opening a ring with libbpf")

    def take(self, out: npt.NDArray[np.void]) -> int:
        """Fill an array; a record of another size ends it and is named in ``refused``."""
        if self.refused is not None:
            return 0
        self._at, self._room, self._copied = out.ctypes.data, len(out), 0
        self._lib.ring_buffer__consume(self._rings)
        return self._copied

    def _accept(self, _context: int, data: int, size: int) -> int:
        if size != self._size:
            self.refused = size
            return -errno.ECANCELED
        ctypes.memmove(self._at, data, size)
        self._at += size
        self._copied += 1
        # A negative answer ends the call behind this record; libbpf counts it as consumed.
        return -errno.ECANCELED if self._copied == self._room else 0

    def close(self) -> None:
        self._lib.ring_buffer__free(self._rings)


def _weakly_ordered() -> bool:
    return platform.machine() not in ("x86_64", "AMD64")


def _right_here() -> Consumer:
    if native.compiled() is not None:
        return "native"
    return "libbpf" if _weakly_ordered() else "numpy"


def _check_record(dtype: np.dtype[Any], capacity: int) -> None:
    if dtype.hasobject or dtype.itemsize == 0:
        raise BadInput(f"A record is plain bytes of a fixed size; {dtype} is not.")
    if slot_bytes(dtype.itemsize) > capacity:
        raise BadInput(
            f"A record of {dtype.itemsize} bytes never fits into a ring of {capacity}: "
            "make the ring larger."
        )


def _bounded(seconds: float) -> float:
    if not 0 <= seconds < math.inf:
        raise BadInput(f"A wait is bounded: give seconds from 0 on, not {seconds}.")
    return seconds
