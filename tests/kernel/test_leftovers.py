"""What outlives a process is taken back, however the process ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from labkit.errors import BadInput, Unavailable
from labkit.kernel import leftovers
from labkit.kernel.leftovers import clean, memory_cgroup, temporary_folder, trace_instance
from labkit.kernel.parallel import Child

pytestmark = pytest.mark.outside_vm("a process ends in the same ways on every kernel")

CHECKOUT = Path(leftovers.__file__).resolve().parents[2]
GONE_WITHIN_S = 60.0

OWNER = """
import contextlib, os, subprocess, sys
from labkit.kernel import leftovers
with contextlib.ExitStack() as stack:
    for kind in sys.argv[1:]:
        if kind == "trace_instance":
            print(stack.enter_context(leftovers.trace_instance()))
        elif kind == "memory_cgroup":
            group = stack.enter_context(leftovers.memory_cgroup(64 << 20))
            sleeper = subprocess.Popen(["sleep", "600"])
            group.add(sleeper.pid)
            print(group.path)
        elif kind == "temporary_folder":
            folder = stack.enter_context(leftovers.temporary_folder())
            (folder / "file").write_text("content")
            print(folder)
        elif kind == "helper_process":
            helper = subprocess.Popen(["sleep", "600"])
            stack.enter_context(leftovers.helper_process(helper.pid))
            print(f"/proc/{helper.pid}")
        elif kind == "own_group":
            stack.enter_context(leftovers.own_group())
            helper = subprocess.Popen(["sh", "-c", "sleep 600 & echo /proc/$!; exit"])
            helper.wait()
    guardian = leftovers._this_process()._guardian
    print(guardian.pid, flush=True)
    sys.stdin.read()
"""


class Owner:
    """A process that has made some things and waits."""

    def __init__(self, *kinds: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, *kinds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            process_group=0,
        )
        lines = [self._line() for _ in range(len(kinds) + 1)]
        self.made = [Path(line) for line in lines[:-1]]
        self.guardian = int(lines[-1])

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "the owner ended early"
        return line

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert isinstance(stream, IO) or stream is not None
            stream.close()


@pytest.fixture
def owner(require_feature: Callable[[str], None]) -> Iterator[Callable[..., Owner]]:
    owners: list[Owner] = []

    def make(*kinds: str) -> Owner:
        for kind, feature in (("trace_instance", "tracefs"), ("memory_cgroup", "memcg")):
            if kind in kinds:
                require_feature(feature)
        owners.append(Owner(*kinds))
        return owners[-1]

    yield make
    for one in owners:
        one.close()
        wait_until(lambda one=one: alive(one.guardian) is False)  # type: ignore[misc]
    clean(lambda words: None)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + GONE_WITHIN_S
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert true()


def alive(pid: int) -> bool:
    return leftovers.start_time(pid) is not None


def gone(path: Path) -> bool:
    if path.parent == Path("/proc"):
        return not alive(int(path.name))
    return not path.exists()


ALL = ("trace_instance", "memory_cgroup", "temporary_folder", "helper_process")


def test_after_the_block_everything_is_gone_and_so_is_the_guardian(
    require_feature: Callable[[str], None],
) -> None:
    require_feature("tracefs")
    require_feature("memcg")
    with trace_instance() as instance, memory_cgroup(64 << 20) as group:
        with temporary_folder() as folder:
            assert (instance / "trace_pipe").exists()
            assert group.path.is_dir() and folder.is_dir()
            guardian = leftovers._this_process()._guardian
            assert guardian is not None and alive(guardian.pid)
            ledger = leftovers._this_process()._path
            kinds = {thing["kind"] for thing in json.loads(ledger.read_text())["things"]}
            assert kinds == {"trace_instance", "cgroup", "folder"}
        assert not folder.exists()
    assert not instance.exists() and not group.path.exists()
    assert not ledger.exists()
    assert not alive(guardian.pid)


def test_an_exception_leaves_nothing() -> None:
    with pytest.raises(ZeroDivisionError), temporary_folder() as folder:
        raise ZeroDivisionError
    assert not folder.exists()


def test_the_guardian_cleans_up_after_kill_9(owner: Callable[..., Owner]) -> None:
    killed = owner(*ALL)
    assert not any(gone(path) for path in killed.made)
    assert os.getsid(killed.guardian) == killed.guardian
    killed.kill()
    wait_until(lambda: all(gone(path) for path in killed.made))
    wait_until(lambda: not alive(killed.guardian))


def test_clean_heals_where_the_guardian_was_killed_too(owner: Callable[..., Owner]) -> None:
    killed = owner(*ALL)
    os.kill(killed.guardian, signal.SIGKILL)
    killed.kill()
    assert not any(gone(path) for path in killed.made)
    said: list[str] = []
    assert clean(said.append) >= len(ALL)
    assert all(gone(path) for path in killed.made)
    text = "\n".join(said)
    for path in killed.made:
        assert path.name in text


@pytest.mark.parametrize("by", ["guardian", "clean", "the end of the block"])
def test_what_a_process_started_ends_with_it(by: str, owner: Callable[..., Owner]) -> None:
    ending = owner("own_group")
    (grandchild,) = ending.made
    said: list[str] = []
    if by == "the end of the block":
        assert ending.process.stdin is not None
        ending.process.stdin.close()
        assert ending.process.wait(GONE_WITHIN_S) == 0
        assert gone(grandchild)
        return
    if by == "clean":
        os.kill(ending.guardian, signal.SIGKILL)
    ending.kill()
    if by == "clean":
        assert not gone(grandchild)
        assert clean(said.append) >= 1
        assert any(f"process group {ending.process.pid} " in words for words in said)
    wait_until(lambda: gone(grandchild))


def test_clean_leaves_the_living_alone(owner: Callable[..., Owner]) -> None:
    living = owner("temporary_folder")
    said: list[str] = []
    clean(said.append)
    assert living.made[0].is_dir()
    assert any(f"Process {living.process.pid} is alive" in words for words in said)


def test_a_reader_that_still_holds_the_instance_is_waited_for(
    require_feature: Callable[[str], None],
) -> None:
    require_feature("tracefs")

    def hold() -> bool:
        with open(instance / "trace_pipe", "rb", buffering=0):
            ready.touch()
            time.sleep(0.5)
        return True

    with temporary_folder() as folder:
        ready = folder / "ready"
        with trace_instance() as instance:
            child = Child(hold)
            wait_until(ready.exists)
        # Either the child was slow to let go and we waited, or it was quick: gone it must be.
        assert not instance.exists()
        assert child.result(60) is True


def test_memory_of_maps_is_charged_and_bounded(require_feature: Callable[[str], None]) -> None:
    require_feature("memcg")
    from labkit.kernel import libbpf
    from labkit.kernel.libbpf import MapKind

    def make(size: int) -> int:
        try:
            fd = libbpf.map_create(
                MapKind.ARRAY, name="labkit_memcg", key_size=4, value_size=size, max_entries=1
            )
        except OSError as error:
            return -(error.errno or 0)
        os.close(fd)
        return 0

    def inside() -> tuple[int, int, int]:
        with memory_cgroup(64 << 20) as group:
            group.add()
            small = make(16 << 20)
            used = group.used_bytes()
            return small, make(128 << 20), used

    with Child(inside) as child:
        small, large, used = child.result(60)
    assert small == 0
    assert large == -12  # ENOMEM
    assert used > 0


def test_a_process_in_the_group_is_killed_and_the_owner_comes_home(
    require_feature: Callable[[str], None],
) -> None:
    require_feature("memcg")

    def inside() -> tuple[bool, str, str]:
        before = Path("/proc/self/cgroup").read_text()
        with memory_cgroup(64 << 20) as group:
            group.add()
            sleeper = subprocess.Popen(["sleep", "600"])  # born in the group
        status = sleeper.wait(30)
        after = Path("/proc/self/cgroup").read_text()
        return status == -signal.SIGKILL and not group.path.exists(), before, after

    with Child(inside) as child:
        killed, before, after = child.result(60)
    assert killed and before == after


def test_a_forked_child_does_not_take_what_is_its_parents() -> None:
    with temporary_folder() as folder:

        def inside() -> bool:
            with temporary_folder() as own:
                assert own != folder
            return folder.is_dir()

        with Child(inside) as child:
            assert child.result(60) is True
        assert folder.is_dir()


def test_a_senseless_limit_is_refused() -> None:
    with pytest.raises(BadInput, match="at least 1 MiB"), memory_cgroup(4096):
        pass


def test_a_dead_process_cannot_be_watched_over() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(BadInput, match="no process"), leftovers.helper_process(child.pid):
        pass


def test_half_written_runs_of_the_dead_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    runs = tmp_path / "transient-null"
    unfinished = runs / f".partial-20250101T000000.000000Z-{dead.pid}-{dead.pid}"
    being_written = runs / f".partial-20250101T000000.000000Z-1-{os.getpid()}"
    finished = runs / f"20250101T000000.000000Z-{dead.pid}"
    for folder in (unfinished, being_written, finished):
        folder.mkdir(parents=True)
        (folder / "counts.parquet").touch()
    said: list[str] = []
    clean(said.append, [tmp_path, tmp_path / "missing"])
    assert not unfinished.exists()
    assert being_written.exists() and finished.exists()
    assert any(unfinished.name in words for words in said)


@pytest.mark.parametrize(
    "things",
    [
        [{"kind": "folder", "name": ["labkit-x"]}], [{"kind": "folder", "name": "labkit-\0"}],
        [{"kind": "process", "name": "x"}], [{"kind": "group", "name": "-1"}],
        [{"kind": "process", "name": "0"}], [{"kind": "folder"}], [1], {"a": 1}, 10**30,
    ],
)  # fmt: skip
def test_a_ledger_of_other_types_is_damaged(
    things: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "_ledger_folder", lambda: tmp_path / "ledgers")
    (tmp_path / "ledgers").mkdir()
    content = {"pid": 1, "started": 1, "boot": leftovers._boot(), "things": things}
    (tmp_path / "ledgers" / "1-1.json").write_text(json.dumps(content))
    (tmp_path / "ledgers" / "2-2.json").write_text("[" * 100_000)
    os.mkfifo(tmp_path / "ledgers" / "3-3.json")
    said: list[str] = []
    clean(said.append)
    assert len(said) == 3 and all("was damaged" in one for one in said)


def test_another_users_ledgers_are_not_heeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "_ledger_folder", lambda: tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(Unavailable, match="belongs to another user"):
        clean(print)


def test_a_damaged_or_foreign_ledger_is_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "_ledger_folder", lambda: tmp_path / "ledgers")
    (tmp_path / "ledgers").mkdir()
    precious = tmp_path / "precious"
    precious.mkdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    leader = subprocess.Popen(["sleep", "600"], process_group=0)
    (tmp_path / "ledgers" / "1-1.json").write_text("{")
    leftovers._write_ledger(
        tmp_path / "ledgers" / "2-2.json",
        dead.pid,
        1,
        [
            leftovers._Thing("folder", str(precious)),
            leftovers._Thing("process", str(os.getpid()), started=1),  # an id used again
            leftovers._Thing("group", str(leader.pid), started=1),
        ],
    )
    said: list[str] = []
    clean(said.append)
    assert precious.exists()
    assert leader.poll() is None
    leader.kill()
    leader.wait()
    assert "damaged" in said[0]
    assert not (tmp_path / "ledgers").exists()
