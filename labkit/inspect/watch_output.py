"""How the events of a watch are written: lines of text, JSON, a Parquet file; and which of them."""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from labkit.console import require_replaceable
from labkit.errors import BadInput, LabError
from labkit.kernel import libbpf
from labkit.kernel.btf_words import Words, words_of
from labkit.kernel.closing import Closing

if TYPE_CHECKING:
    from labkit.inspect.watch import MapEvent

KINDS: Final = ("update", "delete", "refused", "found", "gone")
"""What an event may be, for filters."""

FORMATS: Final = ("btf", "hex", "ip", "text")
"""How keys or values are shown: by the map's layout, as bytes, addresses, or text up to a NUL."""

_GROUP: Final = 65_536  # rows that a Parquet file takes at once


@dataclass(frozen=True)
class Wanted:
    """Which events are written: those that meet all conditions.

    Attributes
    ----------
    keys : frozenset of str
        Keys as they are shown (``80``, ``{ip: 1, port: 2}``), or as ``0x`` and the hex digits of
        their bytes; empty: any.
    pids : frozenset of int
        Processes; empty: any. What was found by reading has none.
    kinds : frozenset of str
        Of `KINDS`; empty: any.
    shown : str
        Of `FORMATS`: how keys are shown.

    Raises
    ------
    BadInput
        There is no such kind or format.
    """

    keys: frozenset[str] = frozenset()
    pids: frozenset[int] = frozenset()
    kinds: frozenset[str] = frozenset()
    shown: str = "btf"

    def __post_init__(self) -> None:
        """Refuse what no event can meet."""
        _check(self.kinds, KINDS)
        _check({self.shown}, FORMATS)

    def of(self, events: Iterable[MapEvent]) -> list[MapEvent]:
        """Those of the events that are wanted."""
        return [one for one in events if self._has(one)]

    def _has(self, one: MapEvent) -> bool:
        if self.kinds and _kind(one) not in self.kinds:
            return False
        if self.pids and (one.writer is None or one.writer.pid not in self.pids):
            return False
        if not self.keys:
            return True
        if one.key is None:
            return False
        return not self.keys.isdisjoint((shown_as(one.key, self.shown), f"0x{one.raw_key.hex()}"))


@dataclass
class Output(Closing):
    """Where events go; a context manager.

    Attributes
    ----------
    as_json : bool
        One JSON object a line instead of text.
    parquet : Path or None
        A file that is written instead, whole or not at all, when the output is closed.
    keys, values : str
        Of `FORMATS`.
    several : bool
        Several maps are watched: each line names its map.

    Raises
    ------
    BadInput
        The file cannot be written, or there is no such format.
    """

    as_json: bool = False
    parquet: Path | None = None
    keys: str = "btf"
    values: str = "btf"
    several: bool = False
    _since_epoch_ns: int = field(default_factory=lambda: time.time_ns() - time.monotonic_ns())
    _names: dict[int, str] = field(default_factory=dict)
    _words: dict[int, dict[str, Words | None]] = field(default_factory=dict)
    _second: tuple[int, str, str] = (-1, "", "")
    _file: _ParquetFile | None = None

    def __post_init__(self) -> None:
        """Open the file, so that what is wrong with it is said at the start."""
        _check({self.keys, self.values}, FORMATS)
        if self.parquet is not None:
            self._file = _ParquetFile(self.parquet)

    def write(self, events: list[MapEvent]) -> int:
        """Write events; answers how many."""
        if self._file is not None:
            self._file.add(
                [{**self.as_dict(one), "time": self._micros(one.at_ns)} for one in events]
            )
        elif self.as_json:
            for one in events:
                print(json.dumps(self.as_dict(one)))
        else:
            for one in events:
                print(self.line(one))
        if events:
            sys.stdout.flush()
        return len(events)

    def close(self) -> None:
        """Finish the file; safe to call twice."""
        if self._file is not None:
            self._file.close()

    def __exit__(self, *error: object) -> None:
        """Finish the file, or leave none where an error ends the watch."""
        if self._file is not None and isinstance(error[1], Exception):
            self._file.discard()
        self.close()

    def _moment(self, at_ns: int) -> str:
        """The local time with its zone by ISO 8601; what stays the same in a second is kept."""
        second, micros = divmod(self._micros(at_ns), 1_000_000)
        if second != self._second[0]:
            whole = datetime.fromtimestamp(second).astimezone().isoformat()
            self._second = (second, whole[:19], whole[19:])
        return f"{self._second[1]}.{micros:06d}{self._second[2]}"

    def _micros(self, at_ns: int) -> int:
        return (self._since_epoch_ns + at_ns) // 1_000

    def _clock(self, at_ns: int) -> str:
        return self._moment(at_ns).partition("T")[2]

    def _name(self, map_id: int) -> str:
        if map_id not in self._names:
            self._names[map_id] = _map_name(map_id)
        return self._names[map_id]

    def line(self, one: MapEvent) -> str:
        """One event as a line of text."""
        parts = [self._clock(one.at_ns)]
        if self.several:
            parts.append(f"{self._name(one.map_id)} id {one.map_id}")
        parts.append(f"{one.what:6}")
        content = self._content(one)
        if content:
            parts.append(content)
        if one.writer is not None:
            parts.append(f"by {one.writer}")
        if one.after_ns:
            parts.append(f"after {self._clock(one.after_ns)}")
        return "  ".join(parts)

    def _content(self, one: MapEvent) -> str:
        words = [] if one.key is None else [self._key(one)]
        if one.value is not None:
            words.append(f"= {self._value(one)}")
        if one.error:
            words.append(f"refused: {one.error}")
        if one.old is not None:
            words.append(f"({'last seen' if one.error else 'was'} {self._old(one)})")
        elif one.is_new:
            words.append("(new)")
        return " ".join(words)

    def _key(self, one: MapEvent) -> str:
        return self._show(one.map_id, "key", self.keys)(one.key)

    def _value(self, one: MapEvent) -> str:
        return _slots(one.value, self._show(one.map_id, "value", self.values), one.cpu)

    def _old(self, one: MapEvent) -> str:
        return _slots(one.old, self._show(one.map_id, "value", self.values), None)

    def _show(self, map_id: int, part: str, how: str) -> Callable[[Any], str]:
        """How to say a key or value of a map; names of enumerators come from its BTF."""
        if how != "btf":
            return lambda item: shown_as(item, how)
        if map_id not in self._words:
            self._words[map_id] = _map_words(map_id)
        words = self._words[map_id][part]
        return in_words if words is None else lambda item: words(item.tobytes())

    def as_dict(self, one: MapEvent) -> dict[str, Any]:
        """One event for scripts; names and units as in the line, times in ISO 8601."""
        who = one.writer
        show_key = plain if self.keys == "btf" else lambda item: shown_as(item, self.keys)
        show_value = plain if self.values == "btf" else lambda item: shown_as(item, self.values)
        return {
            "time": self._moment(one.at_ns),
            "at_ns": one.at_ns,
            "map_id": one.map_id,
            "map": self._name(one.map_id),
            "what": one.what,
            "error": one.error or None,
            "key": None if one.key is None else show_key(one.key),
            "value": _each_cpu(one.value, show_value),
            "old": _each_cpu(one.old, show_value),
            "is_new": one.is_new,
            "cpu": one.cpu,
            "pid": who.pid if who else None,
            "tid": who.tid if who else None,
            "comm": who.comm if who else None,
            "cgroup": who.cgroup if who else None,
            "program_id": who.program_id or None if who else None,
            "program": who.program or None if who else None,
            "after": self._moment(one.after_ns) if one.after_ns else None,
            "after_ns": one.after_ns or None,
        }


class _ParquetFile(Closing):
    """A Parquet file that has no name until it is complete: nothing is left of half of one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None
        require_replaceable(path)
        try:
            fd = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o644)
        except OSError as error:
            raise BadInput(self._refusal(error)) from None
        self._file = os.fdopen(fd, "wb")

    def add(self, rows: list[dict[str, Any]]) -> None:
        self._rows += rows
        if len(self._rows) >= _GROUP:
            try:
                self._flush()
            except OSError as error:
                raise LabError(self._refusal(error)) from None

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, _schema(pa))
        rows, self._rows = self._rows, []
        schema = _schema(pa)
        columns = {name: _column(rows, name) for name in schema.names}
        self._writer.write_table(pa.table(columns, schema=schema))

    def close(self) -> None:
        """Finish the file and give it its name; safe to call twice."""
        if self._file.closed:
            return
        named = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._flush()
            self._writer.close()
            self._file.flush()
            # With a descriptor, which an absolute path ignores, this is linkat, which follows.
            fd = self._file.fileno()
            named.unlink(missing_ok=True)
            os.link(f"/proc/self/fd/{fd}", named, src_dir_fd=fd)
            named.replace(self._path)
        except OSError as error:
            raise LabError(self._refusal(error)) from None
        finally:
            self.discard()

    def discard(self) -> None:
        """Let what was written so far go."""
        with suppress(OSError):  # the disk is full: what is let go need not be written
            self._file.close()

    def _refusal(self, error: OSError) -> str:
        why = error.strerror or str(error)
        if error.errno == errno.EOPNOTSUPP:
            why = "this file system has no files without a name (O_TMPFILE), such as /tmp has"
        return f"{str(self._path)!r} cannot be written: {why}."


def _column(rows: list[dict[str, Any]], name: str) -> list[Any]:
    """A column of a Parquet file: keys and values, which are of any layout, stand in it as JSON."""
    column = [row[name] for row in rows]
    if name not in ("key", "value", "old"):
        return column
    return [None if one is None else _json(one) for one in column]


def _json(item: Any) -> str:
    return str(item) if type(item) is int else json.dumps(item)


def _schema(pa: Any) -> Any:
    text, number = pa.string(), pa.int64()
    return pa.schema(
        [
            ("time", pa.timestamp("us", tz="UTC")), ("at_ns", number), ("map_id", number),
            ("map", text), ("what", text), ("error", text), ("key", text), ("value", text),
            ("old", text), ("is_new", pa.bool_()), ("cpu", number), ("pid", number),
            ("tid", number), ("comm", text), ("cgroup", pa.uint64()), ("program_id", number),
            ("program", text), ("after_ns", number),
        ]
    )  # fmt: skip


def in_words(item: Any) -> str:
    """A key or value of any layout, short enough for a line: fields by name, raw bytes in hex.

    An array of signed bytes is C's ``char[]``, and is shown as text where it is text.
    """
    if isinstance(item, np.integer):
        return str(item)
    if getattr(item, "dtype", None) is not None and item.dtype.names:
        return "{" + ", ".join(f"{name}: {in_words(item[name])}" for name in item.dtype.names) + "}"
    if isinstance(item, np.ndarray):
        text = _text_of(item)
        return "[" + ", ".join(map(in_words, item)) + "]" if text is None else text
    return item.tobytes().hex() if isinstance(item, np.void) else str(item)


def plain(item: Any) -> Any:
    """A key or value of any layout as JSON has it: objects, lists, numbers, hex for raw bytes."""
    if getattr(item, "dtype", None) is not None and item.dtype.names:
        return {name: plain(item[name]) for name in item.dtype.names}
    if isinstance(item, np.ndarray):
        text = _text_of(item)
        return list(map(plain, item)) if text is None else text
    if isinstance(item, np.void):
        return item.tobytes().hex()
    return item.item() if isinstance(item, np.generic) else item


def shown_as(item: Any, how: str) -> str:
    """A key or value in one of `FORMATS`."""
    if how == "btf":
        return in_words(item)
    if how == "ip" and getattr(item, "dtype", None) is not None and item.dtype.names:
        shown = (f"{name}: {shown_as(item[name], how)}" for name in item.dtype.names)
        return "{" + ", ".join(shown) + "}"
    raw: bytes = item.tobytes()
    if how == "text":
        return libbpf.shown(raw.split(b"\0", 1)[0])
    if how == "ip":
        return str(ipaddress.ip_address(raw)) if len(raw) in (4, 16) else in_words(item)
    return raw.hex(" ")


def _text_of(item: np.ndarray[Any, Any]) -> str | None:
    """Text up to the first NUL, where an array is ``char[]`` and holds some; else None."""
    if item.ndim != 1 or item.dtype != np.int8:
        return None
    text, _, rest = item.tobytes().partition(b"\0")
    if not text or rest.strip(b"\0") or not all(32 <= byte < 127 for byte in text):
        return None
    return json.dumps(text.decode())


def _slots(item: Any, show: Callable[[Any], str], cpu: int | None) -> str:
    """A value, or the values of all CPUs of a per-CPU map (as a tuple), each by its CPU."""
    if cpu is not None:
        return f"CPU {cpu}: {show(item)}"
    if not isinstance(item, tuple):
        return show(item)
    return ", ".join(f"CPU {i}: {show(one)}" for i, one in enumerate(item))


def _each_cpu(item: Any, show: Callable[[Any], Any]) -> Any:
    if item is None:
        return None
    return [show(one) for one in item] if isinstance(item, tuple) else show(item)


def _check(given: Iterable[str], known: tuple[str, ...]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise BadInput(f"One of {', '.join(known)} is meant, not {unknown[0]!r}.")


def _kind(one: MapEvent) -> str:
    return "refused" if one.error else one.what


def _map_name(map_id: int) -> str:
    try:
        fd = libbpf.fd_by_id("map", map_id)
    except OSError:
        return "?"
    try:
        return libbpf.shown(libbpf.map_info(fd).name)
    finally:
        libbpf.close(fd)


def _map_words(map_id: int) -> dict[str, Words | None]:
    try:
        fd = libbpf.fd_by_id("map", map_id)
    except OSError:  # it has gone meanwhile
        return {"key": None, "value": None}
    try:
        info = libbpf.map_info(fd)
    finally:
        libbpf.close(fd)
    return {
        "key": words_of(info.btf_id, info.btf_key_type_id),
        "value": words_of(info.btf_id, info.btf_value_type_id),
    }
