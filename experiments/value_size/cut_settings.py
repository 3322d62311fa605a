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

from experiments.value_size.redis_proxy import Client, RedisRefused, proxy, redis_server
from labkit.errors import BadInput
from labkit.figures import Figure, style
from labkit.kernel import libbpf, programs
from labkit.kernel.maps import Map
from labkit.kernel.pins import PinFolder
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say
from labkit.runs import Run

_OLD_BYTES, _NEW_BYTES = 1024, 512
_HEAD = struct.Struct("=II")  # length and CRC-32 of the text behind it
_LINE_BYTES = 64
_MOST_RULES = (_OLD_BYTES - _HEAD.size) // _LINE_BYTES
_STEP_BYTES = 64

Rule = dict[str, object]


@dataclass(frozen=True)
class _Format:
    """A way to write settings down, and how its reader takes them."""

    id: str
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
    _Format("document", "one JSON document",
            lambda rules: _compact({"rules": rules}).encode(), _from_document),
    _Format("lines", "JSON lines", _lines, _from_lines),
    _Format("tolerant", "JSON lines, tolerant reader", _lines, _from_lines_tolerantly),
    _Format("padded", f"JSON lines of {_LINE_BYTES} B", _padded_lines, _from_lines),
)  # fmt: skip
_WAYS = (
    ("control", "map-1024", "map of 1,024 B"),
    ("broken", "map-512", "map of 512 B"),
    ("fixed", "checksum", "map of 512 B, length and CRC-32"),
    ("fixed", "by-map", "map of 512 B, labkit Map"),
    ("fixed", "version", "layout version in the map's name"),
    ("control", "redis", "Redis"),
    ("broken", "redis-cuts", "Redis, proxy cuts"),
    ("fixed", "redis-checksum", "Redis, proxy cuts, length and CRC-32"),
    ("fixed", "redis-refuses", "Redis, proxy refuses"),
)
_WRONG = {"less": "silently less", "error": "parse error"}
_OUTCOMES = ("intact", "error", "less", "noticed", "refused")
_LOOKS = (
    ("intact", "intact", style.GREEN, ""),
    ("error", "parse error", style.YELLOW, "...."),
    ("less", "silently less", style.VERMILLION, "////"),
)


class _Refused(Exception):
    """The writer was told that its value was not stored."""


class _Noticed(Exception):
    """The reader saw that the value is not the one that was written."""


@dataclass(frozen=True)
class _Way:
    """From a writer to a reader: what the reader gets for a text, or why it gets none."""

    id: str
    carry: Callable[[bytes], bytes]


def _derived(tables: Tables) -> Tables:
    """The counts, and shares of the texts with each outcome.

    ``longer``: of those that do not fit, by way and format; ``arrived``: of all of them, by way;
    ``alike``: how many of those that were cut came to what, by a map and by a Redis.
    """
    outcomes = tables["outcomes"]
    too_long = outcomes[outcomes["above_bytes"] >= _NEW_BYTES]
    counted = pd.concat([outcomes[outcomes["variant"] == "control"],
                         too_long[too_long["variant"] != "control"]])  # fmt: skip
    rows = [
        counted.assign(case=counted["way"] + f"-{outcome}", wrong=counted[outcome])
        for outcome in _WRONG
    ]
    cut = too_long[too_long["variant"] == "broken"]
    by_map, by_redis = (
        cut[cut["way"] == way].groupby("format")[list(_OUTCOMES)].sum().stack()
        for way in ("map-512", "redis-cuts")
    )
    alike = pd.DataFrame({"by_map": by_map, "by_redis": by_redis})
    return {
        "counts": Counted("not what was written", "texts", "wrong", "carry_ns").table(
            pd.concat(rows)
        ),
        "longer": _shares(too_long, "variant", "way", "format"),
        "arrived": _shares(outcomes, "variant", "way"),
        "alike": alike[(by_map > 0) | (by_redis > 0)].reset_index(drop=True),
    }


def _shares(outcomes: pd.DataFrame, *by: str) -> pd.DataFrame:
    sums = outcomes.groupby(list(by), sort=False)[["texts", *_OUTCOMES]].sum()
    sums["untold"] = sums["intact"] + sums["error"] + sums["less"]
    sums["unharmed"] = sums["intact"] + sums["noticed"] + sums["refused"]
    return sums.div(sums.pop("texts"), axis="index").reset_index()


def _figure(run: Run) -> Figure:
    """Draw the shares of the outcomes in the map of 512 bytes, one axes for each format."""
    from matplotlib import pyplot

    outcomes = run.table("outcomes")
    cut = outcomes[outcomes["way"] == "map-512"]
    figure, grid = pyplot.subplots(2, 2, sharex=True, sharey=True)
    for ax, format in zip(grid.flat, _FORMATS, strict=True):
        rows = cut[cut["format"] == format.id].groupby("above_bytes")
        table = rows[["texts", "intact", "error", "less"]].sum()
        below = 0.0 * table["texts"]
        for column, label, color, hatch in _LOOKS:
            share = 100 * table[column] / table["texts"]
            ax.bar(
                table.index, share, width=_STEP_BYTES, align="edge", bottom=below, color=color,
                hatch=hatch, edgecolor="white", linewidth=0, label=label,
            )  # fmt: skip
            below = below + share
        ax.set_title(format.name, fontsize=7, fontweight="normal")
        ax.set_xticks([0, 512, 1024])
        ax.set_yticks([0, 50, 100])
    for ax in grid[:, 0]:
        ax.set_ylabel("share, %")
    for ax in grid[1]:
        ax.set_xlabel("length, bytes")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, handlelength=1.4)
    return figure


@experiment(
    "cut-settings",
    number=26,
    family="value-size",
    question="Do readers notice that a settings value was cut from 1,024 to 512 bytes?",
    claims=("2.4",),
    needs=("bpf", "compile", "bpffs_detached", "redis-server"),
    quick={"documents": 300, "seed": 26},
    full={"documents": 5_000, "seed": 26},
    cases=tuple(
        Case(variant, f"{way}-{outcome}", f"{label}: {words}", way=way, outcome=outcome)
        for variant, way, label in _WAYS
        for outcome, words in _WRONG.items()
    ),
    derive=_derived,
    statements=(
        Statement("some of the cut values come out so", "some(broken)"),
        Statement("nobody tells the writer or the reader of a cut",
                  'all(longer(variant="broken").untold == 1)'),
        Statement("one JSON document does not parse any more once it is cut",
                  'all(longer(variant="broken", format="document").error == 1)'),
        Statement("lines that end at the cut, or a tolerant reader, give less without an error",
                  'all(longer(variant="broken", format=("padded", "tolerant")).less == 1)'),
        Statement("lines of any length mostly give an error, and less where the cut falls between "
                  "two of them", 'all(longer(variant="broken", format="lines").error '
                  '> longer(variant="broken", format="lines").less)'),
        Statement("a Redis behind a cutting proxy gives what the map gives",
                  "all(alike(by_map > 0).by_redis == alike(by_map > 0).by_map) "
                  "and none(alike.by_map == 0)"),
        Statement("without a limit every text arrives",
                  'none(control) and all(arrived(variant="control").intact == 1)'),
        Statement("with length and checksum in the value the reader notices every cut",
                  'all(longer(way=("checksum", "redis-checksum")).noticed == 1)'),
        Statement("labkit's Map and a refusing proxy tell the writer of every value that is too "
                  "long", 'all(longer(way=("by-map", "redis-refuses")).refused == 1)'),
        Statement("writer and reader that find the map by layout version get every text",
                  'all(arrived(way="version").intact == 1)'),
        Statement("no cure lets a reader parse anything but what was written",
                  'none(fixed) and all(arrived(variant="fixed").unharmed == 1)'),
    ),
    sentence='Of {sum(outcomes(above_bytes >= 512, variant="broken").texts)} settings that were '
    "cut to 512 bytes, in a map and in a real Redis, "
    '{sum(outcomes(above_bytes >= 512, variant="broken").less)} parsed without an error to less '
    'than was written and {sum(outcomes(above_bytes >= 512, variant="broken").error)} gave a '
    "parse error, all by their format; no writer was told. Length and checksum in the value showed "
    '{percent(min(longer(way=("checksum", "redis-checksum")).noticed))} of the cuts, at '
    '{us(median(outcomes(above_bytes < 448, way="checksum").carry_ns) - '
    'median(outcomes(above_bytes < 448, way="map-512").carry_ns))} a text in Python; refusing told '
    'the writer of {percent(min(longer(way=("by-map", "redis-refuses")).refused))}; and with a '
    "layout version in the map's name {percent(arrived(way=\"version\").intact)} of the texts "
    "arrived intact.",
    figure=_figure,
)  # fmt: skip
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
        ``outcomes``: one row per way, format and length with columns ``variant``, ``way``,
        ``format``, ``above_bytes`` (lengths above this, and up to 64 more), ``texts``, and of
        these ``intact``, ``error`` (the parser fails), ``less`` (parsed, and not what was
        written), ``noticed`` (a check by the reader fails), ``refused`` (the writer is told; all
        int64) and ``carry_ns`` (float64, median; until the reader has parsed the text or the
        writer was told, in Python).
    """
    random = np.random.default_rng(seed)
    settings = [_settings(random) for _ in range(documents)]
    rows: list[dict[str, object]] = []
    with closing(_ways()) as ways:
        for way in ways:
            say(f"{documents} settings in {len(_FORMATS)} formats: {way.id}")
            for format in _FORMATS:
                rows += _carry_all(way, format, settings)
    return {"outcomes": _summed(pd.DataFrame(rows))}


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
        programs.load_by_bcc("cut_settings", OLD_BYTES=_OLD_BYTES, NEW_BYTES=_NEW_BYTES) as loaded,
        PinFolder() as pins,
    ):
        for name in ("settings_v1", "settings_v2"):
            loaded.map(name).pin(pins.path(name))
        by_bcc = _by_bcc(loaded, "settings_v2")
        yield _Way("map-1024", _by_bcc(loaded, "settings_v1"))
        yield _Way("map-512", by_bcc)
        yield _Way("checksum", _with_head(by_bcc))
        yield _Way("by-map", _by_map(loaded.map("settings_v2")))
        yield _Way("version", _by_version(pins))
    with redis_server() as server:
        with closing(Client(server)) as client:
            yield _Way("redis", _by_redis(client))
        # The client is closed first: its proxy ends with it.
        with (
            proxy(server, limit=_NEW_BYTES, refuse=False) as path,
            closing(Client(path)) as client,
        ):
            by_redis = _by_redis(client)
            yield _Way("redis-cuts", by_redis)
            yield _Way("redis-checksum", _with_head(by_redis))
        with (
            proxy(server, limit=_NEW_BYTES, refuse=True) as path,
            closing(Client(path)) as client,
        ):
            yield _Way("redis-refuses", _by_redis(client))


def _by_bcc(loaded: programs.BccObject, name: str) -> Callable[[bytes], bytes]:
    """The writer hands 1,024 bytes to bcc; the reader has room for 1,024 too."""
    table, key = loaded.table(name), ctypes.c_uint32(0)
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
    variants = {id: variant for variant, id, _ in _WAYS}
    for rules in settings:
        text = format.encode(rules)
        begun = time.perf_counter_ns()
        outcome = _outcome(way, format, rules, text)
        spent = time.perf_counter_ns() - begun
        rows.append(
            {
                "variant": variants[way.id],
                "way": way.id,
                "format": format.id,
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
    by: list[Any] = ["variant", "way", "format", "above_bytes"]
    for outcome in _OUTCOMES:
        rows[outcome] = (rows["outcome"] == outcome).astype(np.int64)
    return (
        rows.groupby(by, sort=False)
        .agg(
            texts=("outcome", "size"),
            **{outcome: (outcome, "sum") for outcome in _OUTCOMES},
            carry_ns=("carry_ns", "median"),
        )
        .reset_index()
    )
