"""Settings cut in half: some readers get an error, others get less and do not know it."""

from __future__ import annotations

import ctypes
import json
import struct
import time
import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput
from labkit.failures.experiment import Tables, experiment, say
from labkit.failures.value_size.redis_proxy import Client, RedisRefused, proxy, redis_server
from labkit.kernel import libbpf, programs
from labkit.kernel.maps import Map
from labkit.kernel.pins import PinFolder

_OLD_BYTES, _NEW_BYTES = 1024, 512
_HEAD = struct.Struct("=II")  # length and CRC-32 of the text behind it
_LINE_BYTES = 64
_MOST_RULES = (_OLD_BYTES - _HEAD.size) // _LINE_BYTES
_STEP_BYTES = 64

Rule = dict[str, object]


@dataclass(frozen=True)
class _Format:
    """A way to write settings down, and how its reader takes them."""

    name: str
    encode: Callable[[list[Rule]], bytes]
    decode: Callable[[bytes], list[Rule]]


def _compact(thing: object) -> str:
    return json.dumps(thing, separators=(",", ":"))


def _lines(rules: list[Rule]) -> bytes:
    return "".join(_compact(rule) + "\n" for rule in rules).encode()


def _padded_lines(rules: list[Rule]) -> bytes:
    return "".join(_compact(rule).ljust(_LINE_BYTES - 1) + "\n" for rule in rules).encode()


def _from_document(text: bytes) -> list[Rule]:
    return list(json.loads(text)["rules"])


def _from_lines(text: bytes) -> list[Rule]:
    return [json.loads(line) for line in text.splitlines()]


def _from_lines_tolerantly(text: bytes) -> list[Rule]:
    """As readers of logs do: what is not a whole line yet is left for later."""
    whole, _, _ = text.rpartition(b"\n")
    return _from_lines(whole)


_FORMATS = (
    _Format("one JSON document", lambda rules: _compact({"rules": rules}).encode(), _from_document),
    _Format("JSON lines", _lines, _from_lines),
    _Format("JSON lines, tolerant reader", _lines, _from_lines_tolerantly),
    _Format(f"JSON lines of {_LINE_BYTES} B", _padded_lines, _from_lines),
)


class _Refused(Exception):
    """The writer was told that its value was not stored."""


class _Noticed(Exception):
    """The reader saw that the value is not the one that was written."""


@dataclass(frozen=True)
class _Way:
    """From a writer to a reader: what the reader gets for a text, or why it gets none."""

    variant: str
    case: str
    carry: Callable[[bytes], bytes]


@experiment(
    "cut-settings",
    number=26,
    family="value-size",
    question="Do readers notice that a settings value was cut from 1,024 to 512 bytes?",
    claims=("2.4",),
    needs=("bpf", "compile", "bpffs_detached", "redis-server"),
    quick={"documents": 300, "seed": 26},
    full={"documents": 5_000, "seed": 26},
)
def cut_settings(*, documents: int, seed: int) -> Tables:
    """Carry random settings through maps and a Redis that keep 512 of their bytes.

    The owner of the map was rebuilt with a value of 512 bytes; the writer still hands over
    1,024, by bcc, and the kernel stores the first 512 without an error. The same texts go
    through a real Redis behind a proxy that cuts values at 512 bytes, or refuses them: the
    article's own example.

    Parameters
    ----------
    documents : int
        Settings of every format, each carried every way; of 1 to 15 rules, up to
        960 bytes.
    seed : int
        Of the random settings.

    Returns
    -------
    dict of DataFrame
        ``counts``, where an operation is a text that is longer than 512 bytes in the
        broken and fixed ways, any text in the control, with ``cost_ns`` until the reader has
        parsed it or the writer was told, in Python; and ``outcomes``: one row per way,
        format and length with columns ``variant``, ``case``, ``format``, ``above_bytes``
        (lengths above this, and up to 64 more),
        ``texts``, and of these ``intact``, ``error`` (the parser fails), ``less`` (parsed,
        and not what was written), ``noticed`` (a check by the reader fails), ``refused``
        (the writer is told; all int64) and ``carry_ns`` (float64, median).
    """
    random = np.random.default_rng(seed)
    settings = [_settings(random) for _ in range(documents)]
    rows: list[dict[str, object]] = []
    with closing(_ways()) as ways:
        for way in ways:
            say(f"{documents} settings in {len(_FORMATS)} formats: {way.case}")
            for format in _FORMATS:
                rows += _carry_all(way, format, settings)
    outcomes = _summed(pd.DataFrame(rows))
    return {"counts": _counts(outcomes), "outcomes": outcomes}


def _settings(random: np.random.Generator) -> list[Rule]:
    count = int(random.integers(1, _MOST_RULES + 1))
    octets = random.integers(0, 256, (count, 2)).tolist()
    ports = random.integers(1, 1 << 16, count).tolist()
    drops = random.integers(0, 2, count).tolist()
    return [
        {"id": i, "net": f"10.{a}.{b}.0/24", "port": port, "drop": bool(drop)}
        for i, ((a, b), port, drop) in enumerate(zip(octets, ports, drops, strict=True))
    ]


def _ways() -> Generator[_Way]:
    """Every way, made when it is asked for and gone when the next one is."""
    with (
        programs.load("cut_settings", OLD_BYTES=_OLD_BYTES, NEW_BYTES=_NEW_BYTES) as unit,
        PinFolder() as pins,
    ):
        for name in ("settings_v1", "settings_v2"):
            unit.map(name).pin(pins.path(name))
        by_bcc = _by_bcc(unit, "settings_v2")
        yield _Way("control", "map of 1,024 B", _by_bcc(unit, "settings_v1"))
        yield _Way("broken", "map of 512 B", by_bcc)
        yield _Way("fixed", "map of 512 B, length and CRC-32", _with_head(by_bcc))
        yield _Way("fixed", "map of 512 B, labkit Map", _by_map(unit.map("settings_v2")))
        yield _Way("fixed", "layout version in the map's name", _by_version(pins))
    with redis_server() as server:
        with closing(Client(server)) as client:
            yield _Way("control", "Redis", _by_redis(client))
        # The client is closed first: its proxy ends with it.
        with (
            proxy(server, limit=_NEW_BYTES, refuse=False) as path,
            closing(Client(path)) as client,
        ):
            by_redis = _by_redis(client)
            yield _Way("broken", "Redis, proxy cuts", by_redis)
            yield _Way("fixed", "Redis, proxy cuts, length and CRC-32", _with_head(by_redis))
        with (
            proxy(server, limit=_NEW_BYTES, refuse=True) as path,
            closing(Client(path)) as client,
        ):
            yield _Way("fixed", "Redis, proxy refuses", _by_redis(client))


def _by_bcc(unit: programs.Unit, name: str) -> Callable[[bytes], bytes]:
    """The writer hands 1,024 bytes to bcc; the reader has room for 1,024 too."""
    table, key = unit.table(name), ctypes.c_uint32(0)
    leaf = (ctypes.c_char * _OLD_BYTES)()
    room = np.zeros(_OLD_BYTES, np.uint8)
    look_up = libbpf.api().bpf_map_lookup_elem

    def carry(text: bytes) -> bytes:
        leaf.raw = text.ljust(_OLD_BYTES, b"\0")
        table[key] = leaf
        room[:] = 0
        libbpf.checked(
            look_up(table.map_fd, ctypes.addressof(key), room.ctypes.data), "reading the settings"
        )
        return room.tobytes().rstrip(b"\0")

    return carry


def _by_map(table: Map) -> Callable[[bytes], bytes]:
    def carry(text: bytes) -> bytes:
        try:
            table.update(0, text.ljust(_OLD_BYTES, b"\0"))
        except BadInput as error:
            raise _Refused from error
        return bytes(table.lookup(0)).rstrip(b"\0")

    return carry


def _by_version(pins: PinFolder) -> Callable[[bytes], bytes]:
    """Writer and reader of layout 1 open the map of layout 1; layout 2 stands beside it."""

    def carry(text: bytes) -> bytes:
        with Map.from_pin(pins.path("settings_v1"), value=f"V{_OLD_BYTES}") as table:
            table.update(0, text.ljust(_OLD_BYTES, b"\0"))
            return bytes(table.lookup(0)).rstrip(b"\0")

    return carry


def _by_redis(client: Client) -> Callable[[bytes], bytes]:
    def carry(text: bytes) -> bytes:
        try:
            client.set(b"settings", text)
        except RedisRefused as error:
            raise _Refused from error
        return client.get(b"settings")

    return carry


def _with_head(carry: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """The same way, with length and checksum before the text."""

    def carry_checked(text: bytes) -> bytes:
        raw = carry(_HEAD.pack(len(text), zlib.crc32(text)) + text)
        length, checksum = _HEAD.unpack_from(raw)
        got = raw[_HEAD.size : _HEAD.size + length]
        if len(got) != length or zlib.crc32(got) != checksum:
            raise _Noticed
        return got

    return carry_checked


def _carry_all(way: _Way, format: _Format, settings: list[list[Rule]]) -> list[dict[str, object]]:
    rows = []
    for rules in settings:
        text = format.encode(rules)
        begun = time.perf_counter_ns()
        outcome = _outcome(way, format, rules, text)
        spent = time.perf_counter_ns() - begun
        rows.append(
            {
                "variant": way.variant,
                "case": way.case,
                "format": format.name,
                "above_bytes": (len(text) - 1) // _STEP_BYTES * _STEP_BYTES,
                "outcome": outcome,
                "carry_ns": float(spent),
            }
        )
    return rows


def _outcome(way: _Way, format: _Format, rules: list[Rule], text: bytes) -> str:
    try:
        got = format.decode(way.carry(text))
    except _Refused:
        return "refused"
    except _Noticed:
        return "noticed"
    except ValueError:  # the parser's
        return "error"
    return "intact" if got == rules else "less"


def _summed(rows: pd.DataFrame) -> pd.DataFrame:
    by: list[Any] = ["variant", "case", "format", "above_bytes"]
    for outcome in ("intact", "error", "less", "noticed", "refused"):
        rows[outcome] = (rows["outcome"] == outcome).astype(np.int64)
    return (
        rows.groupby(by, sort=False)
        .agg(
            texts=("outcome", "size"),
            intact=("intact", "sum"),
            error=("error", "sum"),
            less=("less", "sum"),
            noticed=("noticed", "sum"),
            refused=("refused", "sum"),
            carry_ns=("carry_ns", "median"),
        )
        .reset_index()
    )


def _counts(outcomes: pd.DataFrame) -> pd.DataFrame:
    triad = Triad("silently less")
    counted = outcomes[(outcomes["variant"] == "control") | (outcomes["above_bytes"] >= _NEW_BYTES)]
    for (variant, case), group in counted.groupby(["variant", "case"], sort=False):
        texts, cost = int(group["texts"].sum()), float(group["carry_ns"].median())
        for column, anomaly in (("less", "silently less"), ("error", "parse error")):
            triad.add(
                str(variant),
                case=f"{case}: {anomaly}",
                operations=texts,
                anomalies=int(group[column].sum()),
                anomaly=anomaly,
                cost_ns=cost,
            )
    return triad.table()
