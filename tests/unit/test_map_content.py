"""What the bytes of a map give away, from bytes that are written down here."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.inspect.content import (
    Content,
    bits_behind_prefix,
    bytes_of,
    left_over_padding,
    left_over_texts,
    other_byte_order,
)  # fmt: skip
from labkit.inspect.diagnostic import Diagnostic
from labkit.kernel.btf import Field
from labkit.kernel.maps import Snapshot

TEXT = (Field("rwbs", "char[8]", 0, 8, True, False), Field("dev", "u32", 8, 4, False, True))
PORT = (Field("", "u16", 0, 2, False, True),)
ADDRESS = (Field("ip", "u32", 0, 4, False, True),)


def keys(*texts: bytes, dev: int = 8) -> npt.NDArray[np.void]:
    raw = b"".join(text.ljust(8, b"\0") + struct.pack("=I", dev) for text in texts)
    return np.frombuffer(raw, "V12")


def texts(*some: bytes) -> list[Diagnostic]:
    return list(left_over_texts(keys(*some), TEXT))


def test_one_text_under_several_keys_is_a_cause() -> None:
    (found,) = texts(b"R", b"R\0\x91\x02\x88\xff\xff\xff", b"R\0WSA", b"RA\0\x41")
    assert found.weight == "cause"
    assert "3 of 4 keys have left-over bytes behind the NUL of the text rwbs" in found.says
    assert "'R' is there 3 times" in found.says


def test_left_over_bytes_alone_are_a_risk() -> None:
    (found,) = texts(b"R", b"W\0W")
    assert found.weight == "risk" and "1 of 2 keys" in found.says


@pytest.mark.parametrize(
    "some",
    [
        (b"R", b"W", b"exactly8"),  # as it should be
        (b"\x20\x01\x0d\xb8\0\0\0\1", b"\xfe\x80\0\0\0\0\0\1"),  # addresses in a char[]
        (b"\0\0\0\1", b"\0\0\0\2"),  # numbers in a char[]
        (b"R\x01", b"R\0\1"),  # one key of which is no text
        (),
    ],
)
def test_what_is_clean_or_no_text_is_left_alone(some: tuple[bytes, ...]) -> None:
    assert texts(*some) == []


def test_texts_of_other_devices_are_other_keys() -> None:
    some = np.concatenate([keys(b"R\0x", dev=1), keys(b"R\0y", dev=2)])
    (found,) = left_over_texts(some, TEXT)
    assert found.weight == "risk"


def test_text_in_other_languages_is_text() -> None:
    (found,) = texts("é".encode(), "é".encode() + b"\0x")
    assert found.weight == "cause" and "'é' is there 2 times" in found.says


def odd(field: tuple[Field, ...], *numbers: int) -> list[str]:
    size = field[0].size
    raw = b"".join(struct.pack("=H" if size == 2 else "=I", one) for one in numbers)
    found = list(other_byte_order(np.frombuffer(raw, f"V{size}"), field))
    assert all(one.weight == "risk" for one in found)
    return [one.says for one in found]


def test_a_port_in_network_order_among_others_is_shown_both_ways() -> None:
    (words,) = odd(PORT, 53, 80, 443, 8080, 0x9000 + 0x1F)  # 0x1f90 is 8,080, turned round
    assert "1 of the 5 different numbers" in words
    assert f"{0x901F:,} ({0x1F90:,})" in words


def test_a_port_as_the_cpu_has_it_among_those_of_services_in_network_order() -> None:
    services = (80, 443, 22, 53, 8443, 9090, 9100, 2379, 2380, 6443, 10250, 179)
    (words,) = odd(PORT, *(_turned(one) for one in services), 8080)
    assert "1 of the 13 different numbers in the key" in words and "8,080 (36,895)" in words


def _turned(port: int) -> int:
    return int.from_bytes(struct.pack(">H", port), "little")


def test_an_address_as_the_cpu_has_it_among_others_in_network_order() -> None:
    stored = [int.from_bytes(struct.pack(">I", one), "little") for one in (1, 2, 3, 9)]
    (words,) = odd(ADDRESS, *stored, 7)
    assert "1 of the 5 different numbers in ip" in words and f"7 ({7 << 24:,})" in words


@pytest.mark.parametrize("count", [4, 255, 256, 257, 300, 512, 1000, 5000])
def test_numbers_that_go_on_are_no_other_byte_order(count: int) -> None:
    assert odd(PORT, *range(1, count + 1)) == odd(ADDRESS, *range(1, count + 1)) == []
    assert odd(PORT, *range(count)) == []


def test_addresses_and_few_or_mixed_ports_are_left_alone() -> None:
    network = [int.from_bytes(bytes(one), "little") for one in (
        (10, 0, 0, 1), (10, 0, 0, 250), (192, 168, 1, 1), (192, 168, 0, 0), (10, 0, 0, 0),
        (127, 0, 0, 1), (0, 0, 0, 0), (255, 255, 255, 255))]  # fmt: skip
    assert odd(ADDRESS, *network) == []
    assert odd(PORT, 53, 5353, 8080) == []
    assert odd(PORT, 53 << 8, 80 << 8, 53, 80) == []


@given(st.binary(max_size=240))
def test_any_bytes_are_judged(raw: bytes) -> None:
    some = np.frombuffer(raw[: len(raw) // 12 * 12], "V12")
    fields = (
        *TEXT,
        *PORT,
        Field("end", "u32", 10, 4, False, True),
        Field("none", "char[0]", 12, 0, True, False),
    )
    for judge in (left_over_texts, other_byte_order):
        assert all(one.says for one in judge(some, fields))


def test_padding_of_values_that_is_not_zero_is_counted() -> None:
    gaps = np.array([False, True, True, True, False, False, False, False])
    rows = np.zeros((3, 8), np.uint8)
    assert list(left_over_padding(rows, gaps, per_cpu=False)) == []
    rows[1, 2] = 7
    (found,) = left_over_padding(rows, gaps, per_cpu=False)
    assert found.weight == "risk" and "1 of 3 values" in found.says
    slots = np.zeros((2, 2, 8), np.uint8)
    slots[0, 1, 3] = 1
    (found,) = left_over_padding(slots, gaps, per_cpu=True)
    assert "1 of 2 values" in found.says


def prefixes(*some: tuple[int, bytes]) -> npt.NDArray[np.void]:
    raw = b"".join(struct.pack("=I", length) + address for length, address in some)
    return np.frombuffer(raw, [("length", "u4"), ("address", "V4")])


def test_an_address_behind_its_prefix_is_shown() -> None:
    turned = prefixes((8, b"\0\0\0\x0a"), (16, b"\xc0\xa8\0\0"))
    (one,) = bits_behind_prefix(turned)
    assert one.weight == "risk" and "1 of 2 prefixes" in one.says and "00 00 00 0a / 8" in one.says


@pytest.mark.parametrize(
    "some",
    [(), ((0, bytes(4)),), ((32, b"\xff" * 4), (12, b"\xac\x10\0\0"), (1, b"\x80\0\0\0"))],
)
def test_a_prefix_that_ends_where_it_says_is_left_alone(
    some: tuple[tuple[int, bytes], ...],
) -> None:
    assert not list(bits_behind_prefix(prefixes(*some)))


def test_how_much_was_read_is_told() -> None:
    def words(kept: int, counted: int, whole: bool) -> str:
        some = np.zeros(kept, "u4")
        return str(Content(Snapshot(some, some, whole, 0), counted, whole))

    assert words(0, 0, True) == "no entry is there to be read"
    assert words(1, 1, True) == "its only entry was read"
    assert words(3, 3, True) == "all 3 entries were read"
    assert words(3, 5, True) == "the first 3 entries were read, all were counted"
    assert words(3, 5, False) == "the first 3 entries were read, 5 or more are there"


def test_bytes_keep_their_rows() -> None:
    assert bytes_of(np.zeros((2, 3), "u4")).shape == (2, 12)
    assert bytes_of(np.zeros(0, "u4")).shape[0] == 0
