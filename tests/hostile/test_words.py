"""Enumerators, bit fields and unions in words, against what bpftool says of the same bytes."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from labkit.inspect.watch_output import in_words, plain
from labkit.kernel import libbpf, tools
from labkit.kernel.btf_words import words_of
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from tests.kernel.test_btf import ENUM, SIGNED, WIDTHS, Types

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("kernel")]

SIZE, ENTRIES = 32, 200


def mixed(types: Types) -> int:
    """A struct with all of it."""
    word = types.integer(4)
    names = [types._name(name) for name in ("IDLE", "BUSY", "GONE")]
    state = types.add(ENUM, 4, names[0], 0, names[1], 1, names[2], 7, name="state", info=3)
    inner = types.struct(
        8, ("low", word, 3 << 24), ("state", state, 2 << 24 | 3), ("high", word, 11 << 24 | 5),
        ("odd", word, 20 << 24 | 39), name="inner", widths=WIDTHS,
    )  # fmt: skip
    either = types.struct(4, ("number", word, 0), ("state", state, 0), name="either", kind=5)
    return types.struct(
        SIZE, ("state", state, 0), ("states", types.array(state, 2), 32), ("inner", inner, 96),
        ("either", either, 160), ("signed", types.integer(8, SIGNED), 192), name="mixed",
    )  # fmt: skip


@pytest.fixture
def table() -> Iterator[Map]:
    types = Types()
    value, key = mixed(types), types.integer(4)
    held = libbpf.btf_load(types.raw())
    try:
        fd = libbpf.map_create(
            MapKind.HASH, name="words", key_size=4, value_size=SIZE, max_entries=ENTRIES,
            btf=(held, key, value),
        )  # fmt: skip
    finally:
        libbpf.close(held)
    with Map(fd, value=f"V{SIZE}") as made:
        yield made


def flat(said: object) -> str:
    """What bpftool says as JSON, in the lab's way of writing."""
    if isinstance(said, dict):
        return "{" + ", ".join(f"{name}: {flat(one)}" for name, one in said.items()) + "}"
    if isinstance(said, list):
        return "[" + ", ".join(map(flat, said)) + "]"
    return str(said)


def test_bpftool_says_the_same(table: Map) -> None:
    chosen = random.Random(7)
    values = {}
    for key in range(ENTRIES):
        raw = bytearray(chosen.randbytes(SIZE))
        for at in (0, 4, 8, 20):  # else a known enumerator would hardly come up
            raw[at : at + 4] = chosen.choice((0, 1, 2, 7, 2**31)).to_bytes(4, sys.byteorder)
        values[key] = bytes(raw)
        table.update(key, bytes(raw))
    info = libbpf.map_info(table.fd)
    words = words_of(info.btf_id, info.btf_value_type_id)
    assert words is not None and words_of(info.btf_id, info.btf_key_type_id) is None
    done = subprocess.run(
        [tools.bpftool_command(), "--json", "map", "dump", "id", str(table.id)],
        capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    told = {one["formatted"]["key"]: one["formatted"]["value"] for one in json.loads(done.stdout)}
    assert {key: words(raw) for key, raw in values.items()} == {
        key: flat(one) for key, one in told.items()
    }
    assert any("state: BUSY" in words(raw) for raw in values.values())


def test_a_watch_shows_them(table: Map) -> None:
    watch = subprocess.Popen(
        [sys.executable, "-m", "labkit", "watch", str(table.id), "--seconds", "6"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with watch:
        assert watch.stderr is not None
        assert watch.stderr.readline().startswith("Watching")
        time.sleep(0.2)
        table.update(3, (7).to_bytes(4, sys.byteorder) + bytes(SIZE - 4))
        said, _ = watch.communicate(timeout=60)
    assert "3 = {state: GONE, states: [IDLE, IDLE], inner: {low: 0x0, state: 0x0," in said


def one_in_another(kind: int, depth: int, width: int) -> Callable[[Types], tuple[int, int]]:
    """Structs or unions of one byte, each of which has the one before in it several times."""

    def made(types: Types) -> tuple[int, int]:
        one = types.integer(1)
        for _ in range(depth):
            one = types.struct(1, *((f"m{i}", one, 0) for i in range(width)), kind=kind)
        return one, 1

    return made


def many_arrays(kind: int, members: int, *counts: int) -> Callable[[Types], tuple[int, int]]:
    """The same array many times, at the same place."""

    def made(types: Types) -> tuple[int, int]:
        one = types.integer(1)
        for count in counts:
            one = types.array(one, count)
        size = math.prod(counts)
        return types.struct(size, *((f"m{i}", one, 0) for i in range(members)), kind=kind), size

    return made


def empty_arrays(types: Types) -> tuple[int, int]:
    """Arrays without elements of arrays without elements, in many elements."""
    none = types.array(types.integer(1), 0)
    one = types.struct(1, *((f"m{i}", none, 0) for i in range(4000)))
    return types.array(one, 1024), 1024


def bit_fields(types: Types) -> tuple[int, int]:
    """Tens of thousands of bit fields at one place, in many elements."""
    word = types.integer(4)
    one = types.struct(4, *((f"m{i}", word, 1 << 24) for i in range(20_000)), widths=WIDTHS)
    return types.array(one, 64), 256


STRUCT, UNION = 4, 5


@pytest.mark.parametrize(
    "made",
    [
        one_in_another(STRUCT, 18, 2), one_in_another(UNION, 18, 2),
        one_in_another(STRUCT, 3, 60), one_in_another(UNION, 3, 60),
        many_arrays(STRUCT, 2000, 64, 64), many_arrays(UNION, 2000, 64, 64),
        many_arrays(STRUCT, 4000, 65_536), empty_arrays, bit_fields,
    ],
)  # fmt: skip
def test_members_that_overlap_are_not_shown_without_end(
    made: Callable[[Types], tuple[int, int]],
) -> None:
    types = Types()
    key, (value, size) = types.integer(4), made(types)
    held = libbpf.btf_load(types.raw())
    try:
        fd = libbpf.map_create(
            MapKind.HASH, name="overlap", key_size=4, value_size=size, max_entries=1,
            btf=(held, key, value),
        )  # fmt: skip
    finally:
        libbpf.close(held)
    with Map(fd) as opened:
        info = libbpf.map_info(fd)
        words = words_of(info.btf_id, info.btf_value_type_id)
        if words is None:
            raw = np.zeros(1, opened.value_dtype)[0]
            shown = in_words(raw), json.dumps(plain(raw))
        else:
            shown = words(bytes(size)), ""
        assert max(map(len, shown)) < 400_000


@pytest.mark.parametrize("widths", [0, WIDTHS])
def test_types_that_contain_each_other_without_end_are_bounded(widths: int) -> None:
    types = Types()
    key, one = types.integer(4), types.struct(0, name="empty")
    for _ in range(24):
        one = types.struct(0, ("a", one, 0), ("b", one, 0))
    word = types.integer(4)
    value = types.struct(
        4, ("word", word, bool(widths) * 5 << 24), ("all", one, 0), name="v", widths=widths
    )
    held = libbpf.btf_load(types.raw())
    try:
        fd = libbpf.map_create(
            MapKind.HASH, name="deep", key_size=4, value_size=4, max_entries=1,
            btf=(held, key, value),
        )  # fmt: skip
    finally:
        libbpf.close(held)
    with Map(fd) as opened:
        assert opened.value_dtype == "u4"
        info = libbpf.map_info(fd)
        words = words_of(info.btf_id, info.btf_value_type_id)
        assert (words is None) == (widths == 0)
        assert words is None or len(words(bytes(4))) < 200_000
