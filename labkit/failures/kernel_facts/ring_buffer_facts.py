"""What a ring buffer takes, when it wakes its reader, and what it tells of losses."""

from __future__ import annotations

import ctypes
import mmap
import select
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput, LabError
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel import programs
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map, MapError
from labkit.kernel.parallel import together
from labkit.kernel.programs import Unit
from labkit.kernel.ringbuf import RingReader, slot_bytes

_PAGE = mmap.PAGESIZE
_SIZES = (  # bytes of a ring: those that the kernel takes, and those that it should not
    *((True, _PAGE << shift) for shift in (0, 1, 4, 6)),
    *((False, size) for size in (1_000, _PAGE // 2, 5_000, _PAGE + 1, 3 * _PAGE, 6 * _PAGE)),
)
_RECORDS = (8, 32, 64, 100, 120)  # bytes
_QUERIES = ("unread bytes", "size", "consumer position", "producer position")
_ASKED = 10  # query flags; those from 4 on mean nothing to the kernel
_SENT_AFTER_S = 0.01  # the reader waits by then
_WOKEN_WITHIN_S = 5.0
_DRAIN_S = 60.0
_FORCE_WAKEUP, _NO_WAKEUP = 2, 1  # BPF_RB_*, include/uapi/linux/bpf.h
_POLL_MS = 10
_NUMBER = ctypes.POINTER(ctypes.c_uint64)


@experiment(
    "ring-buffer-facts",
    number=32,
    family="kernel-facts",
    question="Which sizes does a ring buffer take, when does it wake, and who counts its losses?",
    claims=("4.1",),
    needs=("bpf", "compile", "test_run", "ringbuf", "perf_buffer"),
    quick={"surplus": 144, "waits": 5, "silence_ms": 60, "events": 100_000, "pages": 64},
    full={"surplus": 1_440, "waits": 40, "silence_ms": 200, "events": 1_000_000, "pages": 64},
)
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
        ``counts``: of the sizes an operation is a map creation, an anomaly a refusal; of the
        fillings an operation is a record, an anomaly one that is missing without a note; of the
        wakeups an operation is a wait, an anomaly one that was not ended by the record (in
        the control: one that was ended without a record). ``sizes``: ``bytes``, ``takes``
        (whether it is a power of two and whole pages), ``answer`` (0 or minus the errno).
        ``fillings``: ``ring_bytes``, ``record_bytes``, ``room`` (records that should fit),
        ``sent``, ``refused``, ``answer`` (the refusal), ``delivered``. ``query``:
        ``flag`` (number), ``name``, ``answer``, ``expected``. ``wakeups``: ``case``, ``turn``,
        ``woken`` (bool), ``waited_ms``. ``consumers``: ``consumer``, ``sent``, ``delivered``,
        ``refused`` (counted by the program), ``told_lost`` (by the buffer itself), ``seconds``
        from the first record until the last was delivered. One record more is sent after that,
        so that a buffer which counts its losses can tell of them.
    """
    if pages & (pages - 1):
        raise BadInput(f"pages of ring-buffer-facts is a power of two, not {pages}.")
    triad = Triad("refused size")
    sizes = _sizes(triad)
    say("filling a ring")
    with (
        _ring(_PAGE) as ring,
        programs.load("ring_facts", RING_FD=ring.fd, QUERIES=_ASKED, PAGES=pages) as unit,
    ):
        fillings, query = _fillings(ring, unit, surplus)
        _count_fillings(triad, fillings)
        say("waiting on a ring")
        wakeups = _wakeups(triad, ring, unit, waits, silence_ms)
        consumers = []
        for name, consume in _CONSUMERS.items():
            say(f"{events:,} records against a {name}")
            consumers.append({"consumer": name, **consume(unit, events, pages)})
    return {
        "counts": triad.table(),
        "sizes": sizes,
        "fillings": fillings,
        "query": query,
        "wakeups": wakeups,
        "consumers": pd.DataFrame(consumers),
    }


def _ring(size: int) -> Map:
    return Map.create(MapKind.RINGBUF, key=None, value=None, max_entries=size, name="facts")


def _aim(unit: Unit, *, record_bytes: int = 64, flags: int = 0) -> None:
    """Set what is sent next, and the program's counters to zero."""
    unit.map("control").update(0, (record_bytes, flags, 0, 0, 0))


# -- sizes -------------------------------------------------------------------------------


def _sizes(triad: Triad) -> pd.DataFrame:
    rows = []
    for takes, size in _SIZES:
        try:
            _ring(size).close()
            answer = 0
        except MapError as refused:
            answer = -int(refused.errno or 0)
        rows.append({"bytes": size, "takes": takes, "answer": answer})
    table = pd.DataFrame(rows)
    for variant, case, chosen in (
        ("control", "size: a power of two, whole pages", table["takes"]),
        ("broken", "size: no power of two, or no whole pages", ~table["takes"]),
    ):
        answers = table.loc[chosen, "answer"]
        triad.add(variant, case=case, operations=len(answers), anomalies=int((answers != 0).sum()))
    # What bcc, libbpf and cilium leave to their caller.
    rounded = [_rounded_up(size) for takes, size in _SIZES if not takes]
    refused_now = sum(not _takes(size) for size in rounded)
    triad.add("fixed", case="size: rounded up", operations=len(rounded), anomalies=refused_now)
    return table


def _rounded_up(size: int) -> int:
    return 1 << (max(size, _PAGE) - 1).bit_length()


def _takes(size: int) -> bool:
    try:
        _ring(size).close()
    except MapError:
        return False
    return True


# -- losses ------------------------------------------------------------------------------


def _fillings(ring: Map, unit: Unit, surplus: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Send as many records as fit, then so many more; and ask the ring how it stands."""
    send, query = unit.function("send_ring"), unit.function("query")
    control, rows, asked = unit.map("control"), [], []
    consumed = 0  # bytes, as the ring counts them
    for record_bytes in _RECORDS:
        room = (_PAGE - 1) // slot_bytes(record_bytes)
        for sent in (room, room + surplus):
            _aim(unit, record_bytes=record_bytes, flags=_NO_WAKEUP)
            with RingReader(ring, f"V{record_bytes}") as reader:
                send.test_run(repeat=sent)
                query.test_run()
                if sent == room:
                    asked += _asked(unit, room * slot_bytes(record_bytes), consumed)
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


def _asked(unit: Unit, unread: int, consumed: int) -> list[dict[str, object]]:
    expected = (unread, _PAGE, consumed, consumed + unread)
    answers = np.ravel(unit.map("state").lookup(0)["answers"]).tolist()
    return [
        {
            "flag": flag,
            "name": _QUERIES[flag] if flag < len(_QUERIES) else "unknown",
            "answer": answer,
            "expected": expected[flag] if flag < len(expected) else 0,
        }
        for flag, answer in enumerate(answers)
    ]


def _count_fillings(triad: Triad, fillings: pd.DataFrame) -> None:
    full = fillings["sent"] > fillings["room"]
    missing = fillings["sent"] - fillings["delivered"]
    unaccounted = (missing - fillings["refused"]).abs()
    for variant, case, chosen, lost in (
        ("broken", "full ring, told by the reader", full, missing),
        ("control", "as many records as fit", ~full, missing),
        ("fixed", "full ring, counted by the program", full, unaccounted),
    ):
        triad.add(
            variant,
            case=case,
            operations=int(fillings.loc[chosen, "sent"].sum()),
            anomalies=int(lost[chosen].sum()),
            anomaly="loss without a note",
        )


# -- wakeups -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wakeup:
    variant: str
    case: str
    flags: int
    sends: bool = True
    due: bool = True


_WAKEUPS = (
    _Wakeup("broken", "NO_WAKEUP, reader waits", _NO_WAKEUP, due=False),
    _Wakeup("control", "nothing is sent", 0, sends=False, due=False),
    _Wakeup("fixed", "default, reader waits", 0),
    _Wakeup("fixed", "FORCE_WAKEUP, reader waits", _FORCE_WAKEUP),
)


def _wakeups(triad: Triad, ring: Map, unit: Unit, waits: int, silence_ms: int) -> pd.DataFrame:
    rows: list[dict[str, object]] = []
    send = unit.function("send_ring")
    with RingReader(ring, "V64") as reader:
        for setting in _WAKEUPS:
            limit_s = _WOKEN_WITHIN_S if setting.due else silence_ms / 1e3
            _aim(unit, flags=setting.flags)
            woken = 0
            for turn in range(waits):
                with select.epoll() as epoll:
                    # As libbpf does: once registered, it hears of what wakes it and of no more.
                    epoll.register(ring.fd, select.EPOLLIN)

                    def wait(epoll: select.epoll = epoll, limit_s: float = limit_s) -> float:
                        begun = time.monotonic()
                        told = bool(epoll.poll(limit_s + _SENT_AFTER_S))
                        waited = time.monotonic() - begun
                        return waited if told else -waited

                    def act(setting: _Wakeup = setting) -> None:
                        time.sleep(_SENT_AFTER_S)
                        if setting.sends:
                            send.test_run()

                    waited, _ = together(wait, act)
                if len(reader.read()) != int(setting.sends):
                    raise LabError("The record that was sent did not stand in the ring.")
                woken += waited > 0
                rows.append({"case": setting.case, "turn": turn, "woken": waited > 0,
                             "waited_ms": abs(waited) * 1e3})  # fmt: skip
            triad.add(
                setting.variant,
                case=setting.case,
                operations=waits,
                anomalies=waits - woken if setting.sends else woken,
                anomaly="reader not woken" if setting.sends else "woken for nothing",
            )
    return pd.DataFrame(rows)


# -- consumers ---------------------------------------------------------------------------


@dataclass
class _Delivered:
    """What a callback has seen."""

    records: int = 0
    told_lost: int = 0


def _drained(
    unit: Unit, function: str, events: int, take: Callable[[], None], seen: _Delivered
) -> dict[str, object]:
    """Send at full speed on one CPU, take on another, until nothing comes any more."""
    send, control = unit.function(function), unit.map("control")
    _aim(unit)
    done: list[float] = []

    def produce() -> None:
        send.test_run(repeat=events)
        done.append(time.monotonic())

    def consume() -> float:
        begun = last = time.monotonic()
        while time.monotonic() - begun < _DRAIN_S:
            finished, before = bool(done), seen.records
            take()
            if seen.records > before:
                last = time.monotonic()
            elif finished:
                return last - begun
        raise LabError(f"A consumer did not drain its buffer within {_DRAIN_S:g} s.")

    _, seconds = together(produce, consume)
    # A perf buffer tells of its losses with the next record that finds room, on the same CPU.
    together(lambda: send.test_run())
    take()
    counted = control.lookup(0)
    return {
        "sent": int(counted["sent"]),
        "delivered": seen.records,
        "refused": int(counted["refused"]),
        "told_lost": seen.told_lost,
        "seconds": seconds,
    }


def _by_bcc_ring(unit: Unit, events: int, pages: int) -> dict[str, object]:
    seen, table = _Delivered(), unit.table("ring")

    def record(_context: object, data: int, size: int) -> None:
        seen.records += ctypes.cast(data, _NUMBER)[0] >= 0

    table.open_ring_buffer(record)
    return _drained(
        unit, "send_bcc_ring", events, lambda: table.bpf.ring_buffer_poll(_POLL_MS), seen
    )


def _by_bcc_perf(unit: Unit, events: int, pages: int) -> dict[str, object]:
    seen, table = _Delivered(), unit.table("perf")

    def record(_cpu: int, data: int, size: int) -> None:
        seen.records += ctypes.cast(data, _NUMBER)[0] >= 0

    def lost(count: int) -> None:
        seen.told_lost += count

    table.open_perf_buffer(record, page_cnt=pages, lost_cb=lost)
    return _drained(unit, "send_perf", events, lambda: table.bpf.perf_buffer_poll(_POLL_MS), seen)


def _by_reader(unit: Unit, events: int, pages: int) -> dict[str, object]:
    seen = _Delivered()
    with RingReader(unit.map("ring"), "V64") as reader:

        def take() -> None:
            seen.records += len(reader.poll(_POLL_MS / 1e3))

        return _drained(unit, "send_bcc_ring", events, take, seen)


_CONSUMERS: dict[str, Callable[[Unit, int, int], dict[str, object]]] = {
    "ring buffer, bcc": _by_bcc_ring,
    "perf buffer, bcc": _by_bcc_perf,
    "ring buffer, RingReader": _by_reader,
}
