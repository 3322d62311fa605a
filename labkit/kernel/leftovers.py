"""What the kernel does not take back by itself when a process is killed, and who does.

Maps, programs, links, anonymous namespaces and detached mounts go away with the last
descriptor. A trace instance, a control group, a folder do not, nor do the processes that it
started. Whoever makes one through this module has it entered in a ledger first. The first entry
starts a guardian: a small process in a session of its own that waits for the owner's death,
however it comes, removes what the ledger names, and ends. Where the guardian was killed as well,
:func:`clean` does its work.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from labkit.errors import BadInput, Unavailable
from labkit.kernel.tools import tracefs_folder

_PREFIX: Final = "labkit-"
_AT_ONCE_S: Final = 5.0  # how long an owner waits for the kernel to let go of something
_GUARDIAN_S: Final = 30.0
_RETRY_S: Final = 0.02
_SMALLEST_LIMIT: Final = 1 << 20
_MOST_PIDS: Final = 1 << 22  # PID_MAX_LIMIT
# Folders that are written beside their final name; the process that does it ends the name.
_UNFINISHED: Final = re.compile(r"\.(partial|replaced)-.*-(\d+)")


@dataclass(frozen=True)
class _Thing:
    """One entry of a ledger.

    ``kind`` is ``process``, ``group`` (of processes), ``cgroup``, ``trace_instance`` or
    ``folder``; ``started`` belongs to a process or to the leader of its group, whose id alone does
    not identify it.
    """

    kind: str
    name: str
    started: int = 0


# A process is ended before the control group or instance that it may still use.
_ORDER: Final = ("process", "group", "cgroup", "trace_instance", "folder")


class MemoryGroup:
    """A control group with a memory limit; made by :func:`memory_cgroup`.

    Attributes
    ----------
    path : pathlib.Path
        Its folder.
    version : int
        1 or 2: of the hierarchy that it is in.
    """

    def __init__(self, path: Path, version: int) -> None:
        self.path = path
        self.version = version

    def add(self, pid: int | None = None) -> None:
        """Move a process into the group; memory that it had before stays charged elsewhere.

        Parameters
        ----------
        pid : int, optional
            By default this process, which is moved back when the group is removed.
        """
        target = os.getpid() if pid is None else pid
        (self.path / "cgroup.procs").write_text(str(target))

    def used_bytes(self) -> int:
        """Memory that is charged to the group now."""
        name = "memory.usage_in_bytes" if self.version == 1 else "memory.current"
        return int((self.path / name).read_text())


@contextlib.contextmanager
def trace_instance() -> Iterator[Path]:
    """Make a private tracefs instance: its buffer and settings are nobody else's.

    Yields
    ------
    pathlib.Path
        Its folder. Close its files before you leave the block.

    Raises
    ------
    Unavailable
        tracefs is not mounted, or refuses.
    """
    folder = tracefs_folder() / "instances"
    with _registered("trace_instance", _fresh_name()) as thing:
        try:
            (folder / thing.name).mkdir()
        except OSError as error:
            raise Unavailable(
                f"The kernel refuses a trace instance ({error.strerror}): run as root."
            ) from error
        yield folder / thing.name


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Make a control group that may use so much memory, kernel memory such as maps included.

    Parameters
    ----------
    limit_bytes : int
        At least 1 MiB; the kernel rounds it to pages.

    Yields
    ------
    MemoryGroup
        On leaving the block this process is moved back to where it was, any other process
        in the group is killed, and the group is removed.

    Raises
    ------
    BadInput
        A limit that nothing could run under.
    Unavailable
        No memory controller is to be had here.
    """
    if limit_bytes < _SMALLEST_LIMIT:
        raise BadInput(f"A memory limit is in bytes, at least 1 MiB, not {limit_bytes}.")
    parent, version = _memory_hierarchy()
    path = parent / _fresh_name()
    home = _own_group(parent, version)
    with _registered("cgroup", str(path)):
        try:
            path.mkdir()
            limit = "memory.limit_in_bytes" if version == 1 else "memory.max"
            (path / limit).write_text(str(limit_bytes))
        except OSError as error:
            raise Unavailable(
                f"The kernel refuses a control group with a memory limit ({error.strerror}): run "
                "as root."
            ) from error
        try:
            yield MemoryGroup(path, version)
        finally:
            if os.getpid() in _members(path):
                (home / "cgroup.procs").write_text(str(os.getpid()))


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder that goes away with the block, or with this process.

    Yields
    ------
    pathlib.Path
        An empty folder that only this user can read.

    Raises
    ------
    Unavailable
        The disk is full, or cannot be written.
    """
    if sys.platform != "linux":  # no guardian; and a socket needs a shorter path than usual there
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir="/tmp") as name:
            yield Path(name)
        return
    path = Path(tempfile.gettempdir()).resolve() / _fresh_name()
    with _registered("folder", str(path)):
        try:
            path.mkdir(mode=0o700)
        except OSError as error:
            raise Unavailable(
                f"No temporary folder can be made ({error.strerror}): free some space, or name "
                "another place in TMPDIR."
            ) from error
        yield path


@contextlib.contextmanager
def helper_process(pid: int) -> Iterator[None]:
    """Have a process of ours killed if this one dies inside the block.

    For helpers that cannot ask the kernel for it (``PR_SET_PDEATHSIG``) themselves. Leaving
    the block ends it too, if it still runs.

    Parameters
    ----------
    pid : int
        A child of this process.

    Raises
    ------
    BadInput
        There is no such process.
    """
    started = start_time(pid)
    if started is None:
        raise BadInput(f"There is no process {pid} to watch over.")
    with _registered("process", str(pid), started):
        yield


@contextlib.contextmanager
def own_group() -> Iterator[None]:
    """Have the processes that this one starts ended with the block, or with this process.

    This process leads a process group; what it starts, at any depth, is in the group unless it
    leaves it.
    """
    with _registered("group", str(os.getpid()), start_time(os.getpid()) or 0):
        yield


def clean(say: Callable[[str], None], runs: Iterable[Path] = ()) -> int:
    """Remove what processes that are dead by now have left behind.

    Parameters
    ----------
    say : callable
        Gets a sentence for everything that was removed, or could not be.
    runs : iterable of pathlib.Path
        Folders of runs or reports to rid of half-written folders.

    Returns
    -------
    int
        How many things were removed.
    """
    removed = 0
    ledgers = _ledger_folder()
    if ledgers.is_dir():
        _require_own(ledgers)
    for path in sorted(ledgers.glob("*.json")):
        try:
            pid, started, things = _read_ledger(path)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            path.unlink(missing_ok=True)
            say(f"The ledger {path.name} was damaged; removed it.")
            continue
        if start_time(pid) == started:
            say(f"Process {pid} is alive and keeps {_count(things)}.")
            continue
        left = _settle(path, pid, started, things, time.monotonic() + _AT_ONCE_S)
        for thing in things:
            if thing in left:
                say(f"Could not remove the {_spoken(thing)} of process {pid}: try again.")
            else:
                say(f"Removed the {_spoken(thing)} of process {pid}, which is dead.")
                removed += 1
    with contextlib.suppress(OSError):
        _ledger_folder().rmdir()
    for folder in runs:
        removed += _remove_unfinished(folder, say)
    return removed


def _count(things: list[_Thing]) -> str:
    return ", ".join(_spoken(thing) for thing in things) or "nothing"


def _spoken(thing: _Thing) -> str:
    kinds = {
        "group": "process group", "cgroup": "control group", "trace_instance": "trace instance",
    }  # fmt: skip
    return f"{kinds.get(thing.kind, thing.kind)} {Path(thing.name).name}"


def _remove_unfinished(folder: Path, say: Callable[[str], None]) -> int:
    removed = 0
    for parent, names, _ in os.walk(folder):
        for name in list(names):
            if not (match := _UNFINISHED.fullmatch(name)):
                continue
            names.remove(name)
            if _alive(int(match[2])):
                continue
            shutil.rmtree(Path(parent) / name, ignore_errors=True)
            if not (Path(parent) / name).exists():
                say(f"Removed the half-written {name}.")
                removed += 1
    return removed


# Where memory can be limited.


def _memory_hierarchy() -> tuple[Path, int]:
    refusal = "no memory controller is mounted"
    with open("/proc/self/mounts", errors="surrogateescape") as file:
        mounts = [line.split()[1:4] for line in file]
    for point, kind, options in mounts:
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(point), 1
    for point, kind, _ in mounts:
        if kind != "cgroup2":
            continue
        root = Path(point)
        if "memory" not in (root / "cgroup.controllers").read_text().split():
            continue
        try:
            # Already so under systemd. It is a setting of the hierarchy that others may come to
            # rely on, so it is not taken back.
            if "memory" not in (root / "cgroup.subtree_control").read_text().split():
                (root / "cgroup.subtree_control").write_text("+memory")
            return root, 2
        except OSError as error:
            refusal = f"the memory controller cannot be used: {error.strerror}"
    raise Unavailable(f"Memory cannot be limited here ({refusal}): run as root on a whole machine.")


def _own_group(root: Path, version: int) -> Path:
    """Folder of the group that this process is in."""
    for line in Path("/proc/self/cgroup").read_text(errors="surrogateescape").splitlines():
        _, controllers, path = line.split(":", 2)
        if (version == 1 and "memory" in controllers.split(",")) or (
            version == 2 and not controllers
        ):
            return root / path.lstrip("/")
    return root


def _members(path: Path) -> list[int]:
    try:
        return [int(pid) for pid in (path / "cgroup.procs").read_text().split()]
    except OSError:
        return []


# Removing one thing. Each answers whether it is gone.


def _remove(thing: _Thing) -> bool:
    if thing.kind == "process":
        return _end_process(int(thing.name), thing.started)
    if thing.kind == "group":
        return _end_group(int(thing.name), thing.started)
    if not Path(thing.name).name.startswith(_PREFIX):
        return True  # not ours, whatever the ledger says
    if thing.kind == "cgroup":
        return _remove_cgroup(Path(thing.name))
    if thing.kind == "trace_instance":
        return _remove_instance(thing.name)
    shutil.rmtree(thing.name, ignore_errors=True)
    return not os.path.lexists(thing.name)


def _end_process(pid: int, started: int) -> bool:
    if start_time(pid) != started:
        return True
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return start_time(pid) != started


def _end_group(leader: int, started: int) -> bool:
    # As long as a member lives the kernel gives the leader's id to nobody else.
    if start_time(leader) not in (None, started):
        return True
    left = False
    for pid in {int(name) for name in os.listdir("/proc") if name.isdigit()} - {os.getpid()}:
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == leader and start_time(pid) is not None:
                os.kill(pid, signal.SIGKILL)
                left = True
    return not left


def _remove_cgroup(path: Path) -> bool:
    for pid in _members(path):
        if pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):  # busy while a member is on its way out
        path.rmdir()
    return not path.exists()


def _remove_instance(name: str) -> bool:
    try:
        path = tracefs_folder() / "instances" / name
    except Unavailable:
        return False
    with contextlib.suppress(OSError):  # busy while a reader has a file of it open
        path.rmdir()
    return not path.exists()


def _remove_all(things: Iterable[_Thing], deadline: float) -> list[_Thing]:
    """Try until all are gone or time is up; what is still there comes back."""
    left = sorted(things, key=lambda thing: _ORDER.index(thing.kind))
    while True:
        left = [thing for thing in left if not _remove(thing)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(_RETRY_S)


# The ledger: one file per owner, named after it.


def _ledger_folder() -> Path:
    if os.geteuid() == 0 and Path("/run").is_dir():
        return Path("/run/labkit")
    return Path(tempfile.gettempdir()) / f"labkit-{os.geteuid()}"


def start_time(pid: int) -> int | None:
    """Start time of a living process in clock ticks after boot; None where it is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, *fields = stat.rpartition(b")")[2].split()
    return None if state in b"ZX" else int(fields[18])


def _alive(pid: int) -> bool:
    """Whether a process has this id, on any system; one that has just died may count."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _read_ledger(path: Path) -> tuple[int, int, list[_Thing]]:
    if not path.is_file():
        raise ValueError("a FIFO would be waited for")
    content = json.loads(path.read_text())
    things = [_Thing(**thing) for thing in content["things"]]
    for thing in things:
        if thing.kind not in _ORDER or not isinstance(thing.name, str) or "\0" in thing.name:
            raise ValueError("unknown kind or name")
        if thing.kind in ("process", "group") and not 0 < int(thing.name) <= _MOST_PIDS:
            raise ValueError("no process has that number")
    started = content["started"] if content["boot"] == _boot() else -1
    if started == -1:  # of another boot: its processes and kernel objects are gone with that
        things = [thing for thing in things if thing.kind == "folder"]
    return int(content["pid"]), int(started), things


def _require_own(folder: Path) -> None:
    """Refuse a folder that another user made: what its ledgers name would be removed."""
    if folder.stat().st_uid != os.geteuid():
        raise Unavailable(f"The folder {folder.name} belongs to another user: remove it.")


def _write_ledger(path: Path, pid: int, started: int, things: Iterable[_Thing]) -> None:
    content = {
        "pid": pid,
        "started": started,
        "boot": _boot(),
        "things": [asdict(thing) for thing in things],
    }
    fresh = path.with_suffix(f".{os.getpid()}")
    for _ in range(100):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(path.parent)
        with contextlib.suppress(FileNotFoundError):  # somebody's clean() removed the folder
            fresh.write_text(json.dumps(content))
            fresh.replace(path)
            return
    raise Unavailable("The ledger of leftovers cannot be written: another process removes it.")


def _settle(
    path: Path, pid: int, started: int, things: list[_Thing], deadline: float
) -> list[_Thing]:
    """Remove what a dead owner's ledger names, then the ledger; what resists stays in it."""
    left = _remove_all(things, deadline)
    if left:
        _write_ledger(path, pid, started, left)
    else:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another owner's ledger is there
            path.parent.rmdir()
    return left


class _Owner:
    """The ledger of this process and its guardian."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._pid = os.getpid()
        self._started = start_time(self._pid) or 0
        self._path = _ledger_folder() / f"{self._pid}-{self._started}.json"
        self._things: list[_Thing] = []
        self._guardian: subprocess.Popen[bytes] | None = None

    def fresh_name(self) -> str:
        return f"{_PREFIX}{self._pid}-{self._started}-{next(self._numbers)}"

    def enter(self, thing: _Thing) -> None:
        with self._lock:
            try:
                _write_ledger(self._path, self._pid, self._started, [*self._things, thing])
                if self._guardian is None:
                    self._guardian = _start_guardian(self._path)
            except OSError as error:
                if not self._things:
                    self._path.unlink(missing_ok=True)
                raise Unavailable(
                    f"What must be removed later cannot be noted down ({error.strerror}): free "
                    "some space, on Linux 5.3 or later."
                ) from error
            self._things.append(thing)

    def settle(self, thing: _Thing) -> None:
        # What resists, because somebody uses it still, is left to the guardian.
        if _remove_all([thing], time.monotonic() + _AT_ONCE_S):
            return
        with self._lock:
            self._things.remove(thing)
            if self._things:
                _write_ledger(self._path, self._pid, self._started, self._things)
                return
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._path.parent.rmdir()
            guardian, self._guardian = self._guardian, None
            if guardian is not None:
                guardian.kill()
                guardian.wait()


_owner: _Owner | None = None


def _this_process() -> _Owner:
    global _owner
    if _owner is None:
        _owner = _Owner()
    return _owner


def _forget() -> None:
    global _owner
    _owner = None


if hasattr(os, "register_at_fork"):
    # A child must not take what its parent has made for its own.
    os.register_at_fork(after_in_child=_forget)


def _fresh_name() -> str:
    return _this_process().fresh_name()


@contextlib.contextmanager
def _registered(kind: str, name: str, started: int = 0) -> Iterator[_Thing]:
    owner, maker = _this_process(), os.getpid()
    thing = _Thing(kind, name, started)
    owner.enter(thing)
    try:
        yield thing
    finally:
        if os.getpid() == maker:  # a child that was forked inside the block leaves it alone
            owner.settle(thing)


def _start_guardian(ledger: Path) -> subprocess.Popen[bytes]:
    checkout = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH", "")]))
    owner = os.pidfd_open(os.getpid())
    try:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(ledger), str(owner)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=[owner],
            start_new_session=True,
        )
    finally:
        os.close(owner)


def _guard(ledger: Path, owner: int) -> None:
    """Wait for the owner's death, then remove what its ledger names."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    poll = select.poll()
    poll.register(owner, select.POLLIN)
    poll.poll()
    if ledger.exists():  # else the owner has removed everything itself
        _settle(ledger, *_read_ledger(ledger), time.monotonic() + _GUARDIAN_S)


if __name__ == "__main__":
    _guard(Path(sys.argv[1]), int(sys.argv[2]))
