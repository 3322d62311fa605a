"""What a ring buffer takes, when it wakes its reader, and what it tells of losses."""

from __future__ import annotations

import ctypes
import mmap
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from labkit.errors import BadInput, LabError
from labkit.figures import Axes, style
from labkit.kernel import programs
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map, MapError
from labkit.kernel.parallel import together
from labkit.kernel.programs import BccObject, Program
from labkit.kernel.ringbuf import RingReader, slot_bytes
from labkit.lab.experiment import Case, Statement, Tables, experiment, say
from labkit.runs import Run, Triad

_PAGE = mmap.PAGESIZE
_TAKEN = [_PAGE << shift for shift in (0, 1, 4, 6)]  # bytes of a ring
_OTHERS = [1_000, _PAGE // 2, 5_000, _PAGE + 1, 3 * _PAGE, 6 * _PAGE]
_RECORDS = (8, 32, 64, 100, 120)  # bytes
_QUERIES = ("unread bytes", "size", "consumer position", "producer position")
_ASKED = 10  # query flags; those from 4 on mean nothing to the kernel
_SENT_AFTER_S = 0.01  # the reader waits by then
_WOKEN_WITHIN_S = 5.0
_DRAIN_S = 60.0
_FORCE_WAKEUP, _NO_WAKEUP = 2, 1  # BPF_RB_*, include/uapi/linux/bpf.h
_POLL_MS = 10
_NUMBER = ctypes.POINTER(ctypes.c_uint64)
_RECORD_BYTES = 64

_WAKEUPS = (
    Case("broken", "no-wakeup", "NO_WAKEUP, reader waits", flags=_NO_WAKEUP),
    Case("control", "nothing-sent", "nothing is sent"),
    Case("fixed", "default", "default, reader waits", flags=0),
    Case("fixed", "force-wakeup", "FORCE_WAKEUP, reader waits", flags=_FORCE_WAKEUP),
)
_CONSUMERS = {
    "ring-bcc": "ring buffer,\nbcc",
    "perf-bcc": "perf buffer,\nbcc",
    "ring-reader": "ring buffer,\nRingReader",
}


def _counted(tables: Tables) -> Tables:
    """Refused sizes, records that are missing without a note, and waits that end otherwise."""
    sizes, fillings, wakeups = (tables[name] for name in ("sizes", "fillings", "wakeups"))
    triad = Triad("refused size")
    for variant, case in (
        ("control", "size-power"),
        ("broken", "size-other"),
        ("fixed", "size-rounded"),
    ):
        answers = sizes.loc[sizes["case"] == case, "answer"]
        triad.add(variant, case=case, operations=len(answers), anomalies=int((answers != 0).sum()))
    full = fillings["sent"] > fillings["room"]
    missing = fillings["sent"] - fillings["delivered"]
    for variant, case, chosen, lost in (
        ("broken", "full-reader", full, missing),
        ("control", "fits", ~full, missing),
        ("fixed", "full-program", full, (missing - fillings["refused"]).abs()),
    ):
        triad.add(variant, case=case, operations=int(fillings.loc[chosen, "sent"].sum()),
                  anomalies=int(lost[chosen].sum()), anomaly="loss without a note")  # fmt: skip
    for wait in _WAKEUPS:
        woken = wakeups.loc[wakeups["case"] == wait.id, "woken"]
        sends = "flags" in wait.settings
        triad.add(wait.variant, case=wait.id, operations=len(woken),
                  anomalies=int((woken != sends).sum()),
                  anomaly="reader not woken" if sends else "woken for nothing")  # fmt: skip
    return {"counts": triad.table()}


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the share of records that each consumer was delivered, and the share dropped."""
    ax = style.axes(ax, height=2.0)
    consumers = run.table("consumers")
    delivered = 100 * consumers["delivered"] / consumers["sent"]
    dropped = 100 * consumers["refused"] / consumers["sent"]
    ax.barh(consumers.index, delivered, height=0.5, color=style.BLUE, label="delivered")
    ax.barh(
        consumers.index, dropped, left=delivered, height=0.5, color=style.VERMILLION, hatch="//",
        edgecolor="white", label="dropped",
    )  # fmt: skip
    for y, (count, seconds) in enumerate(
        zip(consumers["delivered"], consumers["seconds"], strict=True)
    ):
        ax.text(2, y - 0.42, f"{count / seconds / 1e3:,.0f} k/s delivered", fontsize=6)
    ax.set_yticks(consumers.index, [_CONSUMERS[one] for one in consumers["consumer"]])
    ax.set_ylim(len(consumers) - 0.5, -0.6)
    ax.set_xlim(0, 100)
    ax.grid(False, axis="y")
    ax.set_xlabel("records sent at full speed (%)")
    style.legend_above(ax, 2)
    return ax


@experiment(
    "ring-buffer-facts",
    number=32,
    family="kernel-facts",
    question="Which sizes does a ring buffer take, when does it wake, and who counts its losses?",
    claims=("4.1",),
    needs=("bpf", "compile", "test_run", "ringbuf", "perf_buffer"),
    quick={"surplus": 144, "waits": 5, "silence_ms": 60, "events": 100_000, "pages": 64},
    full={"surplus": 1_440, "waits": 40, "silence_ms": 200, "events": 1_000_000, "pages": 64},
    cases=(
        Case("control", "size-power", "size: a power of two, whole pages"),
        Case("broken", "size-other", "size: no power of two, or no whole pages"),
        Case("fixed", "size-rounded", "size: rounded up"),
        Case("broken", "full-reader", "full ring, told by the reader"),
        Case("control", "fits", "as many records as fit"),
        Case("fixed", "full-program", "full ring, counted by the program"),
        *_WAKEUPS,
    ),
    derive=_counted,
    statements=(
        Statement("a size that is no power of two, or no whole pages, is refused with EINVAL",
                  "all(sizes(case='size-other').answer == -22)"),
        Statement("a power of two of whole pages is taken",
                  "none(control['size-power'], like=broken['size-other'])"),
        Statement("so is a size that is rounded up to it",
                  "none(fixed['size-rounded'], like=broken['size-other'])"),
        Statement("as many records fit as there is room for",
                  "none(control['fits'], like=broken['full-reader'])"),
        Statement("of more, exactly floor((size - 1) / (header + record)) are delivered",
                  "all(0 < fillings(sent > room).room == fillings(sent > room).delivered)"),
        Statement("a full ring drops, with EAGAIN to the program",
                  "some(broken['full-reader']) and all(fillings(sent > room).answer == -11)"),
        Statement("what was sent is what was delivered and what the program counted",
                  "none(fixed['full-program'], like=broken['full-reader'])"),
        Statement("queries tell unread bytes, size and positions, and nothing else",
                  "all(query.answer == query.expected)"
                  " and all(query(name=('unread bytes', 'size')).answer > 0)"),
        Statement("NO_WAKEUP leaves the waiting reader asleep", "all(broken['no-wakeup'])"),
        Statement("the default and FORCE_WAKEUP wake it",
                  "none(fixed['default', 'force-wakeup'], like=broken['no-wakeup'])"),
        Statement("nothing wakes it where nothing is sent",
                  "none(control['nothing-sent'], like=1)"),
        Statement("of every consumer, what was sent is what was delivered or refused",
                  "all(0 < consumers.sent == consumers.delivered + consumers.refused)"),
        Statement("a perf buffer tells its losses with the next record",
                  "all(0 < overflows(buffer='perf').refused"
                  " == overflows(buffer='perf').told_lost)"),
        Statement("a ring buffer never tells them",
                  "all(0 == overflows(buffer='ring').told_lost"
                  " < overflows(buffer='ring').refused)"),
    ),
    sentence="A ring took every size that is a power of two and whole pages, and refused "
    "{broken['size-other']} others. Full, it lost {broken['full-reader']} records, and none of its "
    "four queries tells that; the program's own count left {fixed['full-program']} unexplained. "
    "NO_WAKEUP left the waiting reader asleep in {broken['no-wakeup']} waits. At full speed, of "
    "{max(consumers.sent)} records each, a ring buffer delivered "
    "{consumers(consumer='ring-bcc').delivered} to bcc and "
    "{consumers(consumer='ring-reader').delivered} to RingReader, a perf buffer "
    "{consumers(consumer='perf-bcc').delivered} to bcc.",
    figure=_figure,
)  # fmt: skip
def ring_buffer_facts(
    *, surplus: int, waits: int, silence_ms: int, events: int, pages: int
) -> Tables:
    """Make rings of many sizes, fill one, wait on one, and drain one as fast as Python can.

    ``ringbuf_map_alloc`` (kernel/bpf/ringbuf.c) takes powers of two that are whole pages.
    ``__bpf_ringbuf_reserve`` never fills the last byte, answers NULL (``bpf_ringbuf_output``:
    EAGAIN) when there is no room, and counts nothing: of losses the program alone knows.
    ``bpf_ringbuf_commit`` wakes the reader if it stands at this record, or as the flags say.

    Parameters
    ----------
    surplus : int
        Records sent to a ring beyond those that fit.
    waits : int
        Waits of a reader under each wakeup flag.
    silence_ms : int
        How long to wait where no wakeup is due, milliseconds.
    events : int
        Records of 64 B sent at full speed against each consumer.
    pages : int
        Pages of the ring, and of the perf buffer of each CPU, that they are sent through; a
        power of two.

    Returns
    -------
    dict of DataFrame
        ``sizes``: ``case``, ``bytes``, ``answer`` (0 or minus the errno).
        ``fillings``: ``ring_bytes``, ``record_bytes``, ``room`` (records that should fit),
        ``sent``, ``refused``, ``answer`` (the refusal), ``delivered``. ``query``:
        ``flag`` (number), ``name``, ``answer``, ``expected``. ``wakeups``: ``case``, ``turn``,
        ``woken`` (bool), ``waited_ms``. ``consumers``: ``consumer``, ``buffer`` (ring or perf),
        ``sent``, ``delivered``, ``refused`` (counted by the program), ``told_lost`` (by the buffer
        itself), ``seconds`` from the first record until the last was delivered. ``overflows``: the
        same but for the time, where twice as much as fits is sent while nobody takes it. One record
        more is sent at the end of both, so that a buffer which counts its losses can tell them.
    """
    if pages & (pages - 1):
        raise BadInput(f"pages of ring-buffer-facts is a power of two, not {pages}.")
    say("filling a ring")
    with (
        _ring(_PAGE) as ring,
        programs.load_by_bcc("ring_facts", RING_FD=ring.fd, QUERIES=_ASKED, PAGES=pages) as loaded,
    ):
        fillings, query = _fillings(ring, loaded, surplus)
        say("waiting on a ring")
        wakeups = _wakeups(ring, loaded, waits, silence_ms)
        consumers, overflows = [], []
        for taker in _takers(loaded, pages):
            say(f"{events:,} records against {taker.consumer}")
            about = {"consumer": taker.consumer, "buffer": taker.consumer.partition("-")[0]}
            consumers.append({**about, **_drained(loaded, taker, events)})
            overflows.append({**about, **_overflowed(loaded, taker, pages)})
    return {
        "sizes": _sizes(),
        "fillings": fillings,
        "query": query,
        "wakeups": wakeups,
        "consumers": pd.DataFrame(consumers),
        "overflows": pd.DataFrame(overflows),
    }


def _ring(size: int) -> Map:
    return Map.create(MapKind.RINGBUF, key=None, value=None, max_entries=size, name="facts")


def _aim(loaded: BccObject, *, record_bytes: int = _RECORD_BYTES, flags: int = 0) -> None:
    """Set what is sent next, and the program's counters to zero."""
    loaded.map("control").update(0, (record_bytes, flags, 0, 0, 0))


# -- sizes -------------------------------------------------------------------------------


def _sizes() -> pd.DataFrame:
    # What bcc, libbpf and cilium leave to their caller.
    rounded = [_rounded_up(size) for size in _OTHERS]
    return pd.DataFrame(
        [
            {"case": case, "bytes": size, "answer": _answer(size)}
            for case, sizes in (
                ("size-power", _TAKEN),
                ("size-other", _OTHERS),
                ("size-rounded", rounded),
            )
            for size in sizes
        ]
    )


def _rounded_up(size: int) -> int:
    return 1 << (max(size, _PAGE) - 1).bit_length()


def _answer(size: int) -> int:
    try:
        _ring(size).close()
    except MapError as refused:
        return -int(refused.errno or 0)
    return 0


# -- losses ------------------------------------------------------------------------------


def _fillings(ring: Map, loaded: BccObject, surplus: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Send as many records as fit, then so many more; and ask the ring how it stands."""
    send, query = loaded.program("send_ring"), loaded.program("query")
    control, rows, asked = loaded.map("control"), [], []
    consumed = 0  # bytes, as the ring counts them
    for record_bytes in _RECORDS:
        room = (_PAGE - 1) // slot_bytes(record_bytes)
        for sent in (room, room + surplus):
            _aim(loaded, record_bytes=record_bytes, flags=_NO_WAKEUP)
            with RingReader(ring, f"V{record_bytes}") as reader:
                send.test_run(repeat=sent)
                query.test_run()
                if sent == room:
                    asked += _asked(loaded, room * slot_bytes(record_bytes), consumed)
                delivered = len(reader.read())
            consumed += delivered * slot_bytes(record_bytes)
            seen = control.lookup(0)
            rows.append(
                {
                    "ring_bytes": _PAGE,
                    "record_bytes": record_bytes,
                    "room": room,
                    "sent": int(seen["sent"]),
                    "refused": int(seen["refused"]),
                    "answer": int(seen["refusal"]),
                    "delivered": delivered,
                }
            )
    return pd.DataFrame(rows), pd.DataFrame(asked)


def _asked(loaded: BccObject, unread: int, consumed: int) -> list[dict[str, object]]:
    expected = (unread, _PAGE, consumed, consumed + unread)
    answers = np.ravel(loaded.map("state").lookup(0)["answers"]).tolist()
    return [
        {
            "flag": flag,
            "name": _QUERIES[flag] if flag < len(_QUERIES) else "unknown",
            "answer": answer,
            "expected": expected[flag] if flag < len(expected) else 0,
        }
        for flag, answer in enumerate(answers)
    ]


# -- wakeups -----------------------------------------------------------------------------


def _wakeups(ring: Map, loaded: BccObject, waits: int, silence_ms: int) -> pd.DataFrame:
    rows: list[dict[str, object]] = []
    send = loaded.program("send_ring")
    with RingReader(ring, f"V{_RECORD_BYTES}") as reader:
        for case in _WAKEUPS:
            sends = "flags" in case.settings
            due = sends and case.flags != _NO_WAKEUP
            limit_s = _WOKEN_WITHIN_S if due else silence_ms / 1e3
            _aim(loaded, flags=case.get("flags", 0))
            for turn in range(waits):
                with select.epoll() as epoll:
                    # As libbpf does: once registered, it hears of what wakes it and of no more.
                    epoll.register(ring.fd, select.EPOLLIN)

                    def wait(epoll: select.epoll = epoll, limit_s: float = limit_s) -> float:
                        begun = time.monotonic()
                        told = bool(epoll.poll(limit_s + _SENT_AFTER_S))
                        waited = time.monotonic() - begun
                        return waited if told else -waited

                    def act(sends: bool = sends) -> None:
                        time.sleep(_SENT_AFTER_S)
                        if sends:
                            send.test_run()

                    waited, _ = together(wait, act)
                if len(reader.read()) != int(sends):
                    raise LabError("The record that was sent did not stand in the ring.")
                rows.append({"case": case.id, "turn": turn, "woken": waited > 0,
                             "waited_ms": abs(waited) * 1e3})  # fmt: skip
    return pd.DataFrame(rows)


# -- consumers ---------------------------------------------------------------------------


@dataclass
class _Taker:
    """A consumer of a buffer, and what it has seen."""

    consumer: str
    function: str  # that sends into its buffer
    take: Callable[[], None] = lambda: None
    records: int = 0
    told_lost: int = 0

    def take_all(self, finished: Callable[[], bool]) -> float:
        """Take until nothing comes any more; seconds until the last record came."""
        begun = last = time.monotonic()
        while time.monotonic() - begun < _DRAIN_S:
            done, before = finished(), self.records
            self.take()
            if self.records > before:
                last = time.monotonic()
            elif done:
                return last - begun
        raise LabError(f"A consumer did not drain its buffer within {_DRAIN_S:g} s.")


def _takers(loaded: BccObject, pages: int) -> Iterator[_Taker]:
    """Each consumer, one after the other."""
    by_ring = _Taker("ring-bcc", "send_bcc_ring")
    by_perf = _Taker("perf-bcc", "send_perf")
    by_reader = _Taker("ring-reader", "send_bcc_ring")
    bpf = loaded.table("ring").bpf  # not the tables themselves: closing the object must end them

    def from_ring(_context: object, data: int, size: int) -> None:
        by_ring.records += ctypes.cast(data, _NUMBER)[0] >= 0

    def from_perf(_cpu: int, data: int, size: int) -> None:
        by_perf.records += ctypes.cast(data, _NUMBER)[0] >= 0

    def lost(count: int) -> None:
        by_perf.told_lost += count

    loaded.table("ring").open_ring_buffer(from_ring)
    by_ring.take = lambda: bpf.ring_buffer_poll(_POLL_MS)
    yield by_ring
    loaded.table("perf").open_perf_buffer(from_perf, page_cnt=pages, lost_cb=lost)
    by_perf.take = lambda: bpf.perf_buffer_poll(_POLL_MS)
    yield by_perf
    with RingReader(loaded.map("ring"), f"V{_RECORD_BYTES}") as reader:

        def take() -> None:
            by_reader.records += len(reader.poll(_POLL_MS / 1e3))

        by_reader.take = take
        yield by_reader


def _drained(loaded: BccObject, taker: _Taker, events: int) -> dict[str, float]:
    """Send at full speed on one CPU, take on another, until nothing comes any more."""
    send = loaded.program(taker.function)
    _aim(loaded)
    done: list[float] = []

    def produce() -> None:
        send.test_run(repeat=events)
        done.append(time.monotonic())

    _, seconds = together(produce, lambda: taker.take_all(lambda: bool(done)))
    return {**_seen(loaded, send, taker), "seconds": seconds}


def _overflowed(loaded: BccObject, taker: _Taker, pages: int) -> dict[str, int]:
    """Send twice as much as fits while nobody takes it, and then take it."""
    send = loaded.program(taker.function)
    _aim(loaded)
    taker.records = taker.told_lost = 0
    together(lambda: send.test_run(repeat=2 * pages * _PAGE // _RECORD_BYTES))
    taker.take_all(lambda: True)
    return _seen(loaded, send, taker)


def _seen(loaded: BccObject, send: Program, taker: _Taker) -> dict[str, int]:
    """What a consumer has seen when one record more was sent, and what the program counted."""
    # A perf buffer tells of its losses with the next record that finds room, on the same CPU.
    together(lambda: send.test_run())
    taker.take_all(lambda: True)
    counted = loaded.map("control").lookup(0)
    return {
        "sent": int(counted["sent"]),
        "delivered": taker.records,
        "refused": int(counted["refused"]),
        "told_lost": taker.told_lost,
    }
