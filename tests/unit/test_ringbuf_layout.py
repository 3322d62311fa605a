"""The layout of a ring, in plain memory: no kernel is asked."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.kernel import ringbuf
from labkit.kernel.ringbuf import BUSY, DISCARDED, Layout, slot_bytes

CAPACITY = 1024
FRONT = 16  # bytes in front of the data, as the producer's page is in a real mapping


@dataclass
class PlainRing:
    """The data of a ring twice in a row, written as the kernel writes it."""

    payload: int
    position: int = 0
    memory: bytearray = field(default_factory=lambda: bytearray(FRONT + 2 * CAPACITY))

    def __post_init__(self) -> None:
        self.end = self.position

    def put(self, content: int, state: int = 0, size: int | None = None) -> bool:
        size = self.payload if size is None else size
        if self.end + slot_bytes(size) - self.position > CAPACITY - 1:
            return False
        header = (size | state).to_bytes(4, "little") + b"\xa5\xa5\xa5\xa5"
        for i, byte in enumerate(header + bytes([content]) * size):
            at = (self.end + i) % CAPACITY
            self.memory[FRONT + at] = self.memory[FRONT + CAPACITY + at] = byte
        self.end += slot_bytes(size)
        return True

    def take(self, room: int) -> tuple[list[int], int]:
        out = np.zeros(room, f"V{self.payload}")
        layout = Layout(self.memory, FRONT, CAPACITY, self.payload)
        copied, passed = layout.take(self.position, self.end, out)
        assert not out[copied:].tobytes().strip(b"\0"), "wrote behind what it reports"
        return [item.tobytes()[0] for item in out[:copied]], passed


def test_a_slot_is_header_and_payload_rounded_up_to_eight() -> None:
    assert [slot_bytes(n) for n in (1, 8, 9, 32)] == [16, 16, 24, 40]


@pytest.mark.parametrize("payload", [1, 4, 7, 8, 16, 24, 32, 100])
def test_a_batch_runs_over_the_end_of_the_ring(payload: int) -> None:
    for position in range(0, 2 * CAPACITY, 8):
        ring = PlainRing(payload, position)
        sent = [i for i in range(1, 256) if ring.put(i)]
        assert sent and ring.take(1000) == (sent, len(sent))


def test_a_busy_record_ends_the_batch() -> None:
    ring = PlainRing(32)
    ring.put(1)
    ring.put(2, BUSY)
    ring.put(3)
    assert ring.take(10) == ([1], 1)
    ring.position += slot_bytes(32)
    assert ring.take(10) == ([], 0)


def test_discarded_records_are_passed_and_not_delivered() -> None:
    ring = PlainRing(32)
    for i, state in enumerate([DISCARDED, 0, DISCARDED, DISCARDED, 0, BUSY, DISCARDED]):
        ring.put(i + 1, state)
    assert ring.take(10) == ([2, 5], 5)


def test_another_size_ends_the_batch_even_where_a_size_divides_the_other() -> None:
    ring = PlainRing(8)
    ring.put(1)
    ring.put(2, size=24)
    ring.put(3)
    assert ring.take(10) == ([1], 1)


def test_a_record_smaller_than_the_layout_is_not_taken() -> None:
    ring = PlainRing(100)
    ring.put(1, size=8)
    assert ring.take(10) == ([], 0)


def test_no_more_is_taken_than_there_is_room() -> None:
    ring = PlainRing(8)
    for i in range(5):
        ring.put(i + 1)
    assert ring.take(2) == ([1, 2], 2)


def test_a_piece_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ringbuf, "_PIECE", 3)
    ring = PlainRing(8)
    for i in range(5):
        ring.put(i + 1)
    assert ring.take(10) == ([1, 2, 3], 3)


records = st.lists(
    st.tuples(
        st.integers(1, 255),
        st.sampled_from([0, 0, 0, 0, 0, DISCARDED, BUSY]),
        st.sampled_from([None, None, None, None, None, None, None, 5, 40]),
    ),
    max_size=60,
)


@given(
    payload=st.sampled_from([1, 8, 12, 32]),
    start=st.integers(0, 3 * CAPACITY // 8),
    sent=records,
    room=st.integers(1, 80),
)
def test_taking_equals_walking_record_by_record(
    payload: int, start: int, sent: list[tuple[int, int, int | None]], room: int
) -> None:
    ring = PlainRing(payload, 8 * start)
    expected: list[int] = []
    passed, stopped = 0, False
    for content, state, size in sent:
        if not ring.put(content, state, size):
            break
        stopped |= state == BUSY or (size is not None and size != payload) or passed == room
        if not stopped:
            passed += 1
            expected += [content] if state == 0 else []
    assert ring.take(room) == (expected, passed)
