"""Messages of rtnetlink: what the kernel sends is read, and no bytes whatever make it fail."""

from __future__ import annotations

import struct
import subprocess

from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.kernel import attachments, libbpf
from labkit.kernel.netlink import (
    EGRESS,
    Action,
    Device,
    Filter,
    attributes,
    device,
    messages,
    traffic_actions,
    traffic_filter,
)

U32 = struct.Struct("=I")


def attribute(kind: int, body: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(body), kind) + body + bytes(-len(body) % 4)


def number(kind: int, value: int) -> bytes:
    return attribute(kind, U32.pack(value))


def message(kind: int, body: bytes, flags: int = 2) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body + bytes(-len(body) % 4)


LINK, UP = (struct.pack("=BxHiII", 0, 1, 7, flags, 0) + attribute(3, b"eth0\0") for flags in (2, 3))
XDP = attribute(0x8000 | 43, number(4, 9) + number(5, 9) + number(6, 12) + attribute(2, b"\4"))


def tc(index: int = 7, parent: int = EGRESS, kind: bytes = b"bpf\0", options: bytes = b"") -> bytes:
    head = struct.pack("=BxHiIII", 0, 0, index, 0x9, parent, 7 << 16 | 0x0008)
    return head + attribute(1, kind) + number(11, 3) + attribute(2, options)


def test_a_device_and_its_xdp_programs() -> None:
    assert device(LINK) == Device(7, b"eth0", (), up=False)
    assert device(UP + XDP) == Device(7, b"eth0", (("native", 9), ("generic", 12)), up=True)
    assert device(LINK[:16]) is None and device(b"") is None


def test_a_filter_and_whether_it_is_shared() -> None:
    options = number(11, 55) + number(8, 1) + attribute(7, b"case.o:[tc]\0")
    found = traffic_filter(tc(options=options))
    assert found == Filter(55, EGRESS, None, 7, 0x800, 9, 3, True)
    shared = traffic_filter(tc(index=-1, parent=22, options=number(11, 55)))
    assert shared == Filter(55, 0, 22, 7, 0x800, 9, 3, False)
    assert traffic_filter(tc(kind=b"u32\0", options=options)) is None
    assert traffic_filter(tc(options=number(8, 1))) is None  # classic BPF has no id


def test_actions_that_are_programs() -> None:
    general = struct.pack("=IIiii", 4, 0, 0, 3, 2)
    program = attribute(1, b"bpf\0") + attribute(2, attribute(2, general) + number(9, 55))
    other = attribute(1, b"gact\0") + attribute(2, attribute(2, general))
    table = bytes(4) + attribute(1, attribute(1, other) + attribute(2, program))
    assert traffic_actions(table) == [Action(55, 4, 2)]
    assert traffic_actions(table[:30]) == [] and traffic_actions(b"") == []


def test_several_messages_and_one_that_is_cut() -> None:
    whole = message(16, b"abc") + message(3, b"")
    assert list(messages(whole)) == [(16, 2, b"abc"), (3, 2, b"")]
    assert list(messages(whole[:-1])) == [(16, 2, b"abc")]


def test_lengths_that_cannot_be_end_the_reading() -> None:
    good = number(1, 5)
    for length in (0, 3, 0xFFFF):
        bad = struct.pack("=HH", length, 2)
        assert attributes(good + bad + good) == {1: U32.pack(5)}
    for length in (0, 15, 0xFFFFFFFF):
        assert list(messages(struct.pack("=IHHII", length, 16, 0, 1, 0) + bytes(40))) == []


@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_bytes_are_read_in_few_steps(raw: bytes, at: int) -> None:
    bodies = [LINK + XDP, tc(options=number(11, 55)), raw]
    for body in [*bodies, *(one[:at] + raw + one[at:] for one in bodies)]:
        device(body)
        traffic_filter(body)
        traffic_actions(body)
        assert len(list(messages(body))) <= len(body) // 16
        assert len(attributes(body)) <= len(body) // 4


@settings(max_examples=30)
@given(st.binary(min_size=1, max_size=20).filter(lambda raw: b"\0" not in raw))
def test_a_name_is_a_printable_word_that_bash_reads_back(raw: bytes) -> None:
    word = attachments._word(libbpf.shown(raw))
    assert word.isprintable()
    said = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, timeout=30)
    assert said.stdout == raw
