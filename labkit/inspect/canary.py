"""How fresh is a map kept by one's own control plane: a key that is there to be measured.

The user names a map, a key that nobody else writes, and the command by which the control plane is
told of a new value. The canary runs that command with one version after the other, at moments set
beforehand, and looks at the key in the map until the version stands there. It writes to no map
itself: if the command's way leads to another map than the one that is read, this shows.

The command is run anew for each version, as a user would type it, with ``{version}`` in the place
of the number. A writer that is kept running and reads versions would save the start of a process,
but would have to be written first, and would go another way than the control plane's own tool.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput, LabError, Unavailable
from labkit.inspect import prometheus
from labkit.inspect.diagnose import map_ids
from labkit.inspect.prometheus import Metric
from labkit.inspect.whole_file import require_writable
from labkit.kernel import objects, programs
from labkit.kernel.closing import Closing
from labkit.kernel.libbpf import MapKind, ProgramKind
from labkit.kernel.maps import Map, map_error
from labkit.kernel.parallel import another_cpu, die_with_parent
from labkit.kernel.perf_events import Clock
from labkit.kernel.ringbuf import RingReader
from labkit.sync.changes import require_version, versions_of

PLACE: Final = "{version}"
"""Stands in the command for the number of the version."""

SHARES: Final = (0.5, 0.9, 0.99)
"""Of the versions, for which the longest age is told; a limit is held against the last one."""

_READ: Final = (MapKind.HASH, MapKind.LRU_HASH, MapKind.ARRAY, MapKind.LPM_TRIE)
_LOOK_S: Final = 0.001
_LAST_WORDS: Final = 4096  # bytes of what a failed command said
_TICKS_PER_SECOND: Final = 1000  # of the clock that runs a reader program

READERS: Final = ("lookups", "program")
"""Who looks at the key: this process, or a BPF program that is attached to a clock."""

SIGHTING: Final = np.dtype([("version", "u8"), ("seen_ns", "u8")])
"""``struct sighting`` of bpf/canary_reader.bpf.c."""

_MOST_VERSIONS: Final = 1_000_000


@dataclass(frozen=True)
class Freshness:
    """What became of every version that the command was run with.

    Times are CLOCK_MONOTONIC nanoseconds, 0 where there was none; arrays have shape ``(n,)``.

    Attributes
    ----------
    map_id : int
        The map that was read.
    map_name : str
        Its name, as it may be shown.
    key : str
        As the user gave it.
    first : int
        The first version; the others count on from it.
    intended_ns, started_ns, ended_ns : numpy.ndarray
        int64: when the schedule wanted the write, when its command was started, and when the
        command was found to have ended.
    seen_ns : numpy.ndarray
        int64: when the key was first seen at this version or a newer one.
    itself : numpy.ndarray
        bool: this very version was seen, and not only a newer one.
    statuses : numpy.ndarray
        int64: exit status of the command, or minus the signal that ended it.
    went_back : int
        How often the key was seen at an older version than before.
    """

    map_id: int
    map_name: str
    key: str
    first: int
    intended_ns: npt.NDArray[np.int64]
    started_ns: npt.NDArray[np.int64]
    ended_ns: npt.NDArray[np.int64]
    seen_ns: npt.NDArray[np.int64]
    itself: npt.NDArray[np.bool_]
    statuses: npt.NDArray[np.int64]
    went_back: int = 0

    def __len__(self) -> int:
        return len(self.seen_ns)

    @property
    def ages_ms(self) -> npt.NDArray[np.float64]:
        """From each version's intended moment until it was seen; infinite where it never was."""
        ages = (self.seen_ns - self.intended_ns) / 1e6
        return np.where(self.seen_ns > 0, ages, math.inf)

    def age_ms(self, share: float) -> float:
        """The age that this share of the versions did not exceed: one that was observed."""
        return float(np.quantile(self.ages_ms, share, method="inverted_cdf"))

    @property
    def passed_over(self) -> int:
        """Versions that nobody saw, because a newer one stood in their place by then."""
        return int((~self.itself & (self.seen_ns > 0)).sum())

    @property
    def unseen(self) -> int:
        """Versions that were not seen to the end, nor any newer one."""
        return int((self.seen_ns == 0).sum())

    @property
    def failed(self) -> int:
        """Commands that did not end with 0."""
        return int((self.statuses != 0).sum())

    @property
    def delayed(self) -> int:
        """Commands that were started late, because the one before them had not ended."""
        return int((self.intended_ns[1:] < self.ended_ns[:-1]).sum())

    def holds(self, limit_ms: float | None) -> bool:
        """Whether all was seen in the end, and 99 % of it within a limit in milliseconds."""
        return self.unseen == 0 and (limit_ms is None or self.age_ms(SHARES[-1]) <= limit_ms)

    def as_text(self, limit_ms: float | None) -> str:
        """The result for a terminal; the limit in milliseconds."""
        ages = [f"{share:.0%} {_ms(self.age_ms(share))}" for share in SHARES]
        lines = [
            f"{self.map_name} (id {self.map_id}), key {self.key}: {len(self)} versions, from "
            f"{self.first} on",
            f"  age     {', '.join([*ages, f'longest {_ms(self.age_ms(1))}'])}",
            f"  missed  {self.passed_over + self.unseen}: {self.passed_over} were passed over for "
            f"a newer one, {self.unseen} were not seen to the end",
        ]
        if self.went_back:
            lines.append(f"  back    {self.went_back} times the key went back in version")
        if self.failed:
            lines.append(f"  failed  {self.failed} commands did not end with 0")
        if self.delayed:
            lines.append(
                f"  late    {self.delayed} commands waited for the one before them; their wait "
                "is part of the age"
            )
        if self.unseen:
            lines.append(
                f"The newest version is not in this map: labkit diagnose {self.map_id} tells what "
                "may be in the way."
            )
        elif limit_ms is not None:
            state = "holds" if self.holds(limit_ms) else "is exceeded"
            lines.append(f"The limit of {_ms(limit_ms)} for {SHARES[-1]:.0%} of them {state}.")
        return "\n".join(lines)

    def as_json(self, limit_ms: float | None) -> dict[str, Any]:
        """The result for scripts; an age that is infinite is null."""
        ages = {f"{share:g}": self.age_ms(share) for share in (*SHARES, 1)}
        return {
            "map": {"id": self.map_id, "name": self.map_name},
            "key": self.key,
            "first_version": self.first,
            "versions": len(self),
            "age_ms": {share: age if age < math.inf else None for share, age in ages.items()},
            "passed_over": self.passed_over,
            "unseen": self.unseen,
            "failed": self.failed,
            "delayed": self.delayed,
            "went_back": self.went_back,
            "limit_ms": limit_ms,
            "holds": self.holds(limit_ms),
        }

    def as_metrics(self, limit_ms: float | None) -> list[Metric]:
        """The result for `labkit.inspect.prometheus.write`; the limit in milliseconds."""
        of = {"map": self.map_name, "map_id": str(self.map_id), "key": self.key}
        states = {
            "seen": int(self.itself.sum()),
            "passed_over": self.passed_over,
            "unseen": self.unseen,
        }
        metrics = [
            Metric(
                "labkit_canary_age_seconds", "gauge",
                "Age of a version when it was seen, that this share of the versions kept to.",
                [({**of, "share": f"{share:g}"}, self.age_ms(share) / 1e3)
                 for share in (*SHARES, 1)],
            ),
            Metric(
                "labkit_canary_versions", "gauge",
                "Versions of the last run, by what became of them.",
                [({**of, "state": state}, count) for state, count in states.items()],
            ),
            Metric(
                "labkit_canary_failed_commands", "gauge",
                "Commands of the last run that did not end with 0.", [(of, self.failed)],
            ),
            Metric(
                "labkit_canary_holds", "gauge",
                "1 where all versions were seen, and 99 % of them within the limit.",
                [(of, self.holds(limit_ms))],
            ),
            Metric(
                "labkit_canary_run_timestamp_seconds", "gauge", "When the last run ended.",
                [(of, time.time())],
            ),
        ]  # fmt: skip
        if limit_ms is not None:
            metrics.append(
                Metric(
                    "labkit_canary_limit_seconds", "gauge", "The limit that the run was held to.",
                    [(of, limit_ms / 1e3)],
                )
            )  # fmt: skip
        return metrics


def canary(
    which: str,
    command: Sequence[str],
    *,
    key: str,
    field: str = "version",
    reader: str = "lookups",
    per_second: float = 10.0,
    seconds: float = 10.0,
    wait_s: float = 5.0,
) -> Freshness:
    """Have versions of one key written, and look when each stands in a map.

    Parameters
    ----------
    which : str
        The map: id, path of a pin, or name.
    command : sequence of str
        Program and arguments, `PLACE` in at least one of them. It is no shell's text.
    key : str
        That nobody else writes: JSON (a number, a list or object of the key's fields), or ``hex:``
        and its bytes.
    field : str
        The value's field that is the version; ignored where the value is a plain unsigned integer.
    reader : str
        One of `READERS`. The program sees what programs see, and when, whatever this process waits
        for; it needs bcc and kernel headers.
    per_second : float
        Versions a second. Each falls on some moment of its own part of the time, so that no clock
        of the control plane keeps step with them.
    seconds : float
        How long to go on.
    wait_s : float
        How long a command may take, and how long the last version may take to be seen, seconds.
        A command that takes longer is killed, and has failed.

    Returns
    -------
    Freshness
        Each age holds the start of the command, and up to a millisecond between two looks.

    Raises
    ------
    BadInput
        There is no such map, or several; its type or layout, the key, or the command do not do.
    LabError
        The first command fails, or somebody else writes the key.
    MapError
        The kernel refuses to show the key.
    Unavailable
        By the program: bcc or the headers are missing, or the kernel has no such clock.
    """
    if reader not in READERS:
        raise BadInput(f"A reader is one of {', '.join(READERS)}, not {reader!r}.")
    for name, number in (("rate", per_second), ("time", seconds), ("wait", wait_s)):
        if not 0 < number < math.inf:
            raise BadInput(f"The {name} of a canary is more than 0 and finite, not {number}.")
    count = max(1, round(per_second * seconds))
    if count > _MOST_VERSIONS:
        raise BadInput(f"A canary writes {_MOST_VERSIONS:,} versions at most, not {count:,}.")
    if not any(PLACE in one for one in command):
        raise BadInput(
            f"The command has no place for the version: write {PLACE} where it belongs, as in "
            f"policyctl set 80 {PLACE}."
        )
    found = map_ids(which, objects.snapshot())
    if len(found) > 1:
        raise BadInput(f"Maps {found} are all called {which!r}: name one by its id.")
    with ExitStack() as stack:
        table = stack.enter_context(Map.from_id(found[0]))
        writer = stack.enter_context(_Writer(command, wait_s))
        if table.kind not in _READ:
            kinds = ", ".join(kind.name.lower() for kind in _READ)
            raise BadInput(f"A canary reads one value of a key: of {kinds}, not of {table!r}.")
        require_version(table, field)
        look = stack.enter_context(
            (_ByProgram if reader == "program" else _Look)(table, key, field)
        )
        first = (look.version() or 0) + 1
        room = look.most - first + 1
        if count > room:
            raise BadInput(
                f"The version has room for {room:,} more, not for {count:,}: take a wider field, "
                "or delete the key."
            )
        moments = (np.arange(count) + np.random.default_rng().uniform(size=count)) / per_second
        intended = time.monotonic_ns() + (moments * 1e9).astype(np.int64)
        run = _Run(writer, look, first, intended, wait_s)
        run.to_its_end()
        return Freshness(
            map_id=table.id,
            map_name=table.name,
            key=key,
            first=first,
            intended_ns=intended,
            started_ns=run.started,
            ended_ns=run.ended,
            seen_ns=run.seen,
            itself=run.itself,
            statuses=run.statuses,
            went_back=run.went_back,
        )


class _Run:
    """One thread that starts commands when they are due, and looks at the key meanwhile."""

    def __init__(
        self,
        writer: _Writer,
        look: _Look,
        first: int,
        intended: npt.NDArray[np.int64],
        wait_s: float,
    ) -> None:
        self._writer, self._look, self._wait_s = writer, look, wait_s
        self._first, self._intended = first, intended
        self._next = 0  # the version that is to be written, by its place
        self._newest = -1  # the newest that was seen
        self._last = -1  # the one that was seen last
        self.went_back = 0
        count = len(intended)
        self.started = np.zeros(count, np.int64)
        self.ended = np.zeros(count, np.int64)
        self.seen = np.zeros(count, np.int64)
        self.itself = np.zeros(count, np.bool_)
        self.statuses = np.zeros(count, np.int64)

    def to_its_end(self) -> None:
        count = len(self._intended)
        while self._next < count or self._writer.running:
            # A look between the end of one command and the start of the next: what a control
            # plane has put there by the time its command ends is not passed over.
            self._collect()
            self._see()
            self._start()
            time.sleep(_LOOK_S)
        deadline = time.monotonic() + self._wait_s
        while self._newest < count - 1 and time.monotonic() < deadline:
            self._see()
            time.sleep(_LOOK_S)

    def _collect(self) -> None:
        if not self._writer.running or (status := self._writer.ended()) is None:
            return
        at = self._next - 1
        self.statuses[at], self.ended[at] = status, time.monotonic_ns()
        if at == 0 and status:
            raise self._writer.failure(status, self._first)

    def _start(self) -> None:
        if self._writer.running or self._next == len(self._intended):
            return
        now = time.monotonic_ns()
        if now >= self._intended[self._next]:
            self._writer.start(self._first + self._next)
            self.started[self._next] = now
            self._next += 1

    def _see(self) -> None:
        for version, seen_ns in self._look():
            at = version - self._first
            if at >= self._next:
                raise LabError(
                    f"Version {version} stands at this key, and the command was not asked for it: "
                    "give the canary a key of its own, and see that the command writes the number "
                    "as it is."
                )
            self.went_back += at < self._last
            self._last = at
            if at >= 0:
                self.itself[at] = True
            if at > self._newest:
                self.seen[self._newest + 1 : at + 1] = seen_ns
                self._newest = at


class _Look(Closing):
    """Looks a key up, and answers with its version and the time."""

    def __init__(self, table: Map, key: str, field: str) -> None:
        self._table, self._field = table, field
        buffer = table.value_buffer()
        self._value = buffer.view(table.value_dtype)
        item = _parsed(key)
        try:
            self.key = table.encode_key(item).tobytes()
        except BadInput:
            raise
        except (TypeError, ValueError):
            raise BadInput(f"{key} is no key of {table!r}: its are {table.key_dtype}.") from None
        self._read = table.reader(self.key, buffer)
        self.most = int(np.iinfo(_version_dtype(table.value_dtype, field)[0]).max)

    def version(self) -> int | None:
        """Version of the key; None where it is absent."""
        result = self._read()
        if result == -errno.ENOENT:
            return None
        if result < 0:
            raise map_error(-result, f"Looking up the canary's key in {self._table!r}")
        return int(versions_of(self._value, self._field)[0])

    def __call__(self) -> list[tuple[int, int]]:
        """What was seen since the last call: versions, and when."""
        version = self.version()
        return [] if version is None else [(version, time.monotonic_ns())]

    def close(self) -> None:
        """Nothing of the kernel is held: the map is the caller's."""


class _ByProgram(_Look):
    """Has a program look at the key a thousand times a second."""

    def __init__(self, table: Map, key: str, field: str) -> None:
        super().__init__(table, key, field)
        version, at = _version_dtype(table.value_dtype, field)
        self._open = ExitStack()
        try:
            unit = self._open.enter_context(
                programs.load(
                    "canary_reader",
                    TABLE_FD=table.fd,
                    KEY_SIZE=table.key_size,
                    VERSION_AT=at,
                    VERSION_SIZE=version.itemsize,
                )
            )
            unit.map("wanted", value=f"V{table.key_size}").update(0, self.key)
            # The clock may tick before anybody asks for the first version.
            before = np.array([(self.version() or 0, 0)], SIGHTING)
            unit.map("newest", value=SIGHTING).update(0, before[0])
            self._ring = self._open.enter_context(
                RingReader(unit.map("sightings"), SIGHTING, batch=1024)
            )
            looks = unit.program("look", ProgramKind.PERF_EVENT)
            self._open.enter_context(
                Clock(looks.fd, frequency=_TICKS_PER_SECOND, cpu=another_cpu(1))
            )
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, LabError):
                raise Unavailable(
                    f"This kernel runs no program by a clock ({error.strerror}): take the reader "
                    "lookups."
                ) from error
            raise

    def __call__(self) -> list[tuple[int, int]]:
        return [(int(one["version"]), int(one["seen_ns"])) for one in self._ring.read()]

    def close(self) -> None:
        """Stop the clock, and unload the program."""
        self._open.close()


def _version_dtype(value: np.dtype[Any], field: str) -> tuple[np.dtype[Any], int]:
    """Type of the version, and where it stands in the value, bytes."""
    if value.fields is None:
        return value, 0
    dtype, at = value.fields[field][:2]
    return dtype, at


class _Writer:
    """Runs the user's command for one version at a time; what still runs in the end is killed."""

    def __init__(self, command: Sequence[str], limit_s: float) -> None:
        self._command, self._limit_s = command, limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._deadline = 0.0
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)

    @property
    def running(self) -> bool:
        """Whether a command was started whose end has not been collected."""
        return self._process is not None

    def _for(self, version: int) -> list[str]:
        return [one.replace(PLACE, str(version)) for one in self._command]

    def start(self, version: int) -> None:
        """Start the command for a version; `BadInput` where there is none to be started."""
        self._said.seek(0)
        self._said.truncate()
        try:
            self._process = subprocess.Popen(
                self._for(version),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise BadInput(f"{self._command[0]!r} cannot be run: {why}.") from error
        self._deadline = time.monotonic() + self._limit_s

    def ended(self) -> int | None:
        """Exit status of the command that was started; None while it runs."""
        assert self._process is not None
        status = self._process.poll()
        if status is None:
            if time.monotonic() < self._deadline:
                return None
            self._kill()
            status = self._process.wait()
        self._process = None
        return status

    def failure(self, status: int, version: int) -> LabError:
        """What to say of a command that failed."""
        size = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, size - _LAST_WORDS))
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        how = f"status {status}" if status > 0 else f"signal {-status}"
        said = f" ({lines[-1].strip()})" if lines else ""
        shown = shlex.join(self._for(version))
        return LabError(f"The writer's command ended with {how}{said}: try it by hand: {shown}")

    def _kill(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process is not None:
            self._kill()
            self._process.wait()
        self._said.close()


def show(
    which: str,
    command: Sequence[str],
    *,
    key: str,
    field: str,
    reader: str,
    per_second: float,
    seconds: float,
    wait_s: float,
    limit_ms: float | None,
    as_json: bool,
    prometheus_file: str | None,
) -> bool:
    """Print how fresh a map is kept, and put it where Prometheus finds it.

    Parameters
    ----------
    which, command, key, field, reader, per_second, seconds, wait_s
        As for `canary`.
    limit_ms : float or None
        To which 99 % of the versions are held, milliseconds.
    as_json : bool
        Print JSON instead of text.
    prometheus_file : str or None
        Replaced as a whole when the run has ended.

    Returns
    -------
    bool
        As `Freshness.holds`.

    Raises
    ------
    LabError
        As `canary`, or the file cannot be written.
    """
    if prometheus_file is not None:
        require_writable(prometheus_file)
    seen = canary(
        which,
        command,
        key=key,
        field=field,
        reader=reader,
        per_second=per_second,
        seconds=seconds,
        wait_s=wait_s,
    )
    print(json.dumps(seen.as_json(limit_ms), indent=1) if as_json else seen.as_text(limit_ms))
    if prometheus_file is not None:
        prometheus.write(prometheus_file, seen.as_metrics(limit_ms))
    return seen.holds(limit_ms)


def _parsed(key: str) -> Any:
    """A key as text: JSON, or bytes in hex."""
    digits = key.removeprefix("hex:")
    try:
        if digits != key:
            return bytes.fromhex(digits)
        item = json.loads(key)
    except ValueError:
        raise BadInput(
            f"{key!r} is no key: give JSON such as 80 or [6, 80], or bytes such as hex:0a000001."
        ) from None
    return tuple(item) if isinstance(item, list) else item


def _ms(age: float) -> str:
    if age == math.inf:
        return "never"
    return f"{age:,.0f} ms" if age >= 100 else f"{age:.3g} ms"
