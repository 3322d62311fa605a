"""The compiled event path against NumPy's: the same histories, every array equal. No kernel."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.errors import BadInput, LabError
from labkit.kernel import native, tools
from labkit.kernel.maps import Snapshot
from labkit.kernel.ringbuf import (
    BUSY,
    DISCARDED,
    Consumer,
    Layout,
    RingReader,
    SharedRing,
    _NativeConsumer,
)
from labkit.sync import replica as replica_module
from labkit.sync.changes import change_dtype, event_dtype
from labkit.sync.replica import Replica
from labkit.sync.ring_events import RingEvents
from tests.unit.test_replica import layout
from tests.unit.test_ringbuf_layout import CAPACITY, FRONT, PlainRing

KEYS = ("u4", "u8", "V3", "V12", "V20", [("a", "u2"), ("b", "u8")])
VALUES = ("u8", [("version", "u4"), ("rest", "V9")], [("version", ">u8")])
FAR = 2**62  # a clock of our own, ahead of the replicas': what was seen lies before it
LARGE = 2**58  # of versions: their steps are added up

RACE = Path(__file__).with_name("ring_race.c")

needs_native = pytest.mark.skipif(native.compiled() is None, reason=f"event path: {native.state()}")


def without_native() -> Any:
    return mock.patch.dict(os.environ, {native.SWITCH: "0"})


# -- replicas -------------------------------------------------------------------------------


def key_of(number: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    # Neighbours differ in the last byte of a key, or in a word in the middle of it.
    raw = np.zeros(dtype.itemsize, np.uint8)
    raw[-1 if number % 2 else dtype.itemsize // 2] = number // 2 + 1
    return raw.view(dtype)[:1]


def values_of(versions: list[int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    values = np.zeros(len(versions), dtype)
    (values["version"] if dtype.names else values)[:] = versions
    if dtype.names and "rest" in dtype.names:
        values["rest"] = np.array(versions, "u8").view("V8").astype("V9")
    return values


versions = st.one_of(st.integers(0, 9), st.integers(0, 9), st.sampled_from([2**31, LARGE]))
rows = st.lists(
    st.tuples(
        st.sampled_from([1, 1, 1, 2, 2, 0]),
        st.integers(0, 11),
        versions,
        st.sampled_from(["unknown", "early", "now", "later"]),
    ),
    max_size=150,
)
snapshots = st.tuples(
    st.dictionaries(st.integers(0, 11), versions, max_size=12),
    st.booleans(),
    st.sampled_from(["long ago", "now"]),
)
history = st.lists(st.one_of(rows, snapshots), max_size=7)


class Twins:
    """One history in both: what they answer and hold is compared after each step."""

    def __init__(self, key: Any, value: Any) -> None:
        self.key, self.value = np.dtype(key), np.dtype(value)
        self.ours = Replica(layout(key, value))
        with without_native():
            self.oracle = Replica(layout(key, value))
        assert self.ours._library is not None and self.oracle._library is None
        self.place = 0

    def keys(self, numbers: list[int]) -> npt.NDArray[Any]:
        made = [key_of(number, self.key) for number in numbers]
        return np.concatenate([np.zeros(0, self.key), *made])

    def step(self, step: Any) -> None:
        self.place += 1
        if isinstance(step, list):
            self.apply(step)
        else:
            self.resync(*step)
        self.compare()

    def apply(self, given_rows: list[tuple[int, int, int, str]]) -> None:
        narrow = 2**32 - 1 if self.value.names and "rest" in self.value.names else LARGE
        times = {"unknown": 0, "early": 1, "now": FAR + self.place - 1, "later": FAR + self.place}
        changes = np.zeros(len(given_rows), change_dtype(self.key, self.value))
        kinds, numbers, versions, when = zip(*given_rows, strict=True) if given_rows else [()] * 4
        changes["kind"], changes["key"] = kinds, self.keys(list(numbers))
        changes["version"] = np.minimum(np.array(versions, "u8"), narrow)
        changes["committed_ns"] = [times[one] for one in when]
        changes["value"] = values_of(changes["version"].tolist(), self.value)
        theirs = changes.copy()
        assert np.array_equal(self.ours.apply(changes), self.oracle.apply(theirs))
        for name in changes.dtype.names or ():
            if name != "seen_ns":
                assert np.array_equal(changes[name], theirs[name]), name
        assert changes["seen_ns"].all() and (np.diff(changes["seen_ns"].view("i8")) >= 0).all()

    def resync(self, entries: dict[int, int], complete: bool, when: str) -> None:
        keys = self.keys(list(entries))
        narrow = 2**32 - 1 if self.value.names and "rest" in self.value.names else LARGE
        values = values_of([min(one, narrow) for one in entries.values()], self.value)
        taken = Snapshot(keys, values, complete=complete, restarts=0)
        started_ns = FAR + self.place if when == "now" else 1
        ours = self.ours.resync(taken, started_ns=started_ns)
        theirs = self.oracle.resync(taken, started_ns=started_ns)
        assert ours.steps == theirs.steps
        same_rows(ours.changes, theirs.changes)
        assert self.ours.differs(taken) == self.oracle.differs(taken)

    def compare(self) -> None:
        ours, theirs = self.ours, self.oracle
        assert (len(ours), ours._table.used) == (len(theirs), theirs._table.used)
        assert int(ours._present[: ours._table.used].sum()) == len(ours)
        same_rows(ours._rows[: ours._table.used], theirs._rows[: theirs._table.used])
        for number in (0, 5, 11):
            found = key_of(number, self.key)
            key = found.tobytes() if self.key.kind == "V" and not self.key.names else found[0]
            one, other = ours.get(key), theirs.get(key)
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.version == other.version
                assert one.value.tobytes() == other.value.tobytes()


def same_rows(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> None:
    """Equal in every field, whatever their order; of times only whether there is one."""

    def sorted_rows(some: npt.NDArray[Any]) -> list[tuple[bytes, ...]]:
        told = [name for name in some.dtype.names or () if name != "seen_ns"]
        columns = [
            np.ascontiguousarray(some[name]).view(np.uint8).reshape(len(some), -1)
            for name in told
            if len(some)
        ]
        seen = (some["seen_ns"] > 0).tolist()
        return sorted(
            (*(column[i].tobytes() for column in columns), bytes([seen[i]]))
            for i in range(len(some))
        )

    assert sorted_rows(ours) == sorted_rows(theirs)


@needs_native
@settings(max_examples=150)
@given(key=st.sampled_from(KEYS), value=st.sampled_from(VALUES), steps=history, few=st.booleans())
def test_both_hold_the_same_after_each_step(key: Any, value: Any, steps: Any, few: bool) -> None:
    few_rows = mock.patch.multiple(
        replica_module, _LEAST_ROWS=2 if few else 1_024, _FEW_TOMBSTONES=1 if few else 4_096
    )
    with few_rows:
        twins = Twins(key, value)
        for step in steps:
            twins.step(step)


@needs_native
@settings(max_examples=20)
@given(key=st.sampled_from(KEYS), count=st.integers(0, 3_000), seed=st.integers(0, 99))
def test_both_load_and_grow_alike(key: Any, count: int, seed: int) -> None:
    dtype, rng = np.dtype(key), np.random.default_rng(seed)
    raw = rng.integers(0, 6, (count, dtype.itemsize), np.uint8)
    keys = np.unique(raw.reshape(-1).view(f"V{dtype.itemsize}")).view(dtype)
    twins = Twins(key, "u8")
    half = len(keys) // 2
    taken = Snapshot(keys[:half], np.ones(half, "u8"), complete=True, restarts=0)
    twins.ours.load(taken, started_ns=3)
    twins.oracle.load(taken, started_ns=3)
    twins.compare()
    chosen = rng.integers(0, len(keys), 2 * count) if len(keys) else np.zeros(0, int)
    changes = np.zeros(len(chosen), change_dtype(dtype, "u8"))
    changes["key"], changes["kind"] = keys[chosen], rng.integers(1, 3, len(chosen))
    changes["version"] = rng.integers(0, 5, len(chosen))
    changes["committed_ns"] = rng.integers(0, 6, len(chosen))
    # A batch need not be contiguous.
    wide = np.zeros(2 * len(chosen), changes.dtype)
    wide[::2] = changes
    assert np.array_equal(twins.ours.apply(wide[::2]), twins.oracle.apply(changes))
    assert np.array_equal(wide["version"][::2], changes["version"])
    twins.compare()


def test_what_are_no_changes_is_refused() -> None:
    copy = Replica(layout())
    frozen = np.zeros(3, copy.change_dtype)
    frozen.flags.writeable = False
    for wrong in (frozen, np.zeros(3, "u8")):
        with pytest.raises(BadInput, match="Changes are an array of the replica's change_dtype"):
            copy.apply(wrong)


def test_changes_that_numpy_packed_are_applied() -> None:
    copy = Replica(layout())
    some = np.zeros(2, copy.change_dtype)
    some["kind"], some["key"], some["version"] = [1, 2], 3, [5, 0]
    packed = np.concatenate([some, some])
    assert packed.dtype.itemsize < copy.change_dtype.itemsize
    assert copy.apply(packed).tolist() == [True, True, False, False]
    assert packed["version"].tolist() == [5, 5, 5, 5] and packed["seen_ns"].all()


# -- rings ----------------------------------------------------------------------------------


class FakeReader(RingReader):
    """A reader of plain memory."""

    def __init__(self, ring: PlainRing, consumer: Consumer) -> None:
        self._fd, self.map_id, self.consumer = -1, 0, consumer
        self._dtype = np.dtype(f"V{ring.payload}")
        self._void = self._dtype
        self._consumed = self._discarded = 0
        self._positions = np.array([ring.position, ring.end], np.uint64)
        self._consumer_position, self._producer_position = self._positions[:1], self._positions[1:]
        self._layout = Layout(ring.memory, FRONT, CAPACITY, ring.payload)
        self._position = ring.position
        self._libbpf = self._native = None
        self._poller = select.poll()
        if consumer == "native":
            self._native = _NativeConsumer(
                self._consumer_position, self._producer_position, self._layout, -1
            )

    def _check_open(self) -> None:
        pass

    def account(self) -> tuple[int, ...]:
        return (*self._positions.tolist(), self._position, self._consumed, self._discarded)


def outcome(reader: FakeReader, what: str, *numbers: int) -> Any:
    """What a read gives, or the error that it ends with."""
    try:
        if what == "one size":
            return reader.read(np.zeros(numbers[0], reader._dtype)).tobytes()
        data, places = reader.read_any(room=numbers[0], limit=numbers[1])
    except LabError as error:
        return type(error), str(error)
    return [(start, data[start : start + size].tobytes()) for start, size in places.tolist()]


records = st.lists(
    st.tuples(
        st.integers(1, 255),
        st.sampled_from([0, 0, 0, 0, 0, DISCARDED, BUSY]),
        st.sampled_from([None, None, None, None, None, None, None, 0, 5, 40, 200]),
    ),
    max_size=60,
)
reads = st.lists(
    st.one_of(
        st.tuples(st.just("one size"), st.integers(1, 40)),
        st.tuples(st.just("any"), st.integers(1, 300), st.integers(1, 20)),
    ),
    max_size=8,
)


@needs_native
@settings(max_examples=300)
@given(
    payload=st.sampled_from([1, 8, 12, 16, 24, 32, 48, 100]),
    start=st.integers(0, 3 * CAPACITY // 8),
    sent=records,
    reads=reads,
    moved=st.sampled_from([0, 0, 0, -16, 3, 40, 2**40]),
)
def test_both_read_a_ring_alike(
    payload: int, start: int, sent: Any, reads: Any, moved: int
) -> None:
    ring = PlainRing(payload, 8 * start)
    for content, state, size in sent:
        if not ring.put(content, state, size):
            break
    ours, oracle = FakeReader(ring, "native"), FakeReader(ring, "numpy")
    for read in reads:
        assert outcome(ours, *read) == outcome(oracle, *read)
        assert ours.account() == oracle.account()
        assert ours._ready() == oracle._ready()
    if moved:  # by another consumer, to any place
        for reader in (ours, oracle):
            reader._positions[:1] += np.uint64(moved % 2**64)
            for read in (("one size", 3), ("any", 300, 20)):
                assert outcome(reader, *read)[0] is SharedRing
        assert ours.account() == oracle.account()
        assert ours.wait(0) == oracle.wait(0)


@needs_native
@settings(max_examples=200)
@given(
    payload=st.sampled_from([1, 8, 12, 32, 100]), start=st.integers(0, 3 * CAPACITY // 8),
    sent=records,
)  # fmt: skip
def test_records_in_place_are_those_that_are_read(payload: int, start: int, sent: Any) -> None:
    ring = PlainRing(payload, 8 * start)
    for content, state, size in sent:
        if not ring.put(content, state, size):
            break
    ours, oracle = FakeReader(ring, "native"), FakeReader(ring, "numpy")
    found, read, error = b"", b"", None
    try:
        while True:
            with ours.in_place() as batch:
                assert not batch.flags.writeable
                found += batch.tobytes()
            if not len(batch):
                break
    except BadInput as refused:
        error = str(refused)
    whole = outcome(oracle, "one size", 1_000)
    while isinstance(whole, bytes) and whole:
        read += whole
        whole = outcome(oracle, "one size", 1_000)
    assert found == read and (error is None) == (whole == b"")
    assert error is None or whole == (BadInput, error)
    assert ours.account() == oracle.account()


@needs_native
def test_records_in_place_come_again_after_an_exception() -> None:
    ring = PlainRing(8)
    assert ring.put(1) and ring.put(2)
    reader = FakeReader(ring, "native")
    with pytest.raises(ZeroDivisionError), reader.in_place() as batch:
        len(batch) // 0
    with reader.in_place() as batch:
        assert len(batch) == 2
    with pytest.raises(BadInput, match="consumer='native'"), FakeReader(ring, "numpy").in_place():
        pass


@needs_native
def test_a_wait_for_what_is_no_ring_any_more_ends() -> None:
    reader = FakeReader(PlainRing(8), "native")
    assert reader._native is not None
    reader._native.ring.fd = 2**31 - 1
    with pytest.raises(LabError, match="Waiting for ring id 0"):
        reader.wait(5)


# -- numbers of events ------------------------------------------------------------------------


EVENT = event_dtype("u8", "u8")
PROGRAMS, CPUS = 2, 3


class FakeFollower(RingEvents):
    """What follows the numbers, and nothing else."""

    def __init__(self, before: npt.NDArray[np.int64]) -> None:
        self._closed, self._table, self._reader = True, None, None
        self._channel = mock.MagicMock()
        self._produced_before, self._dropped_before = before.copy(), before // 3
        self._counts = np.zeros((PROGRAMS * CPUS, 2), np.int64)
        self._count_readers = [int] * PROGRAMS
        self._number_from_now()


@needs_native
@settings(max_examples=200)
@given(
    batches=st.lists(
        st.lists(
            st.tuples(
                st.integers(0, PROGRAMS - 1),
                st.integers(0, CPUS - 1),
                st.sampled_from([0, 0, 0, 0, 1, 2]),
                st.integers(0, 2**32 - 1),
            ),
            min_size=1,
            max_size=20,
        ),
        max_size=5,
    ),
    before=st.lists(st.integers(0, 2**40), min_size=6, max_size=6),
    begin=st.integers(-2, 2),
)
def test_both_follow_numbers_alike(batches: Any, before: list[int], begin: int) -> None:
    ours = FakeFollower(np.array(before, np.int64))
    with without_native():
        oracle = FakeFollower(np.array(before, np.int64))
    following = [max(0, count + begin) for count in before]
    for batch in batches:
        events = np.zeros(len(batch), EVENT)
        for event, (program, cpu, skipped, dropped) in zip(events, batch, strict=True):
            source = program * CPUS + cpu
            event["seq"] = following[source] + skipped
            event["program"], event["cpu"], event["dropped"] = program, cpu, dropped
            following[source] += skipped + 1
        assert ours._number(events) == oracle._number(events)
        for name in ("_expected", "_produced_before", "_dropped_before"):
            assert np.array_equal(getattr(ours, name), getattr(oracle, name)), name


class WholeFollower(FakeFollower):
    """And a ring in plain memory, and a replica."""

    def __init__(self, ring: PlainRing, *, compiled: bool, gather_s: float) -> None:
        self.ring, self._gather_s, self._timer_s = ring, gather_s, 0.1
        super().__init__(np.zeros(PROGRAMS * CPUS, np.int64))
        self._replica, self._closed = Replica(layout("u8", "u8")), False
        self._event, self._change = EVENT, self._replica.change_dtype
        self._version = "version"
        self._slot = 8 + EVENT.itemsize
        self._reader = self.reader = FakeReader(ring, "native" if compiled else "numpy")
        self.reader._dtype = EVENT
        self._native = self._native_follow(self._reader)
        assert (self._native is not None) == compiled
        self._delivered = self._coalesced = self._dropped_seen = 0
        self._half_bytes, self._look_at = CAPACITY // 2, 0.0
        self._resync_at, self._resync_from = float("inf"), 0.0

    def _dropped(self) -> int:
        return 0

    def put(self, event: npt.NDArray[Any], state: int) -> bool:
        """One event of the ring, as the kernel writes it."""
        self.ring.position = int(self.reader._positions[0])
        at = self.ring.end
        if not self.ring.put(0, state):
            return False
        for i, byte in enumerate(event.tobytes()):
            for turn in (0, CAPACITY):
                self.ring.memory[FRONT + turn + (at + 8 + i) % CAPACITY] = byte
        self.reader._positions[1] = self.ring.end
        return True


@needs_native
@settings(max_examples=150)
@given(
    batches=st.lists(
        st.lists(
            st.tuples(
                st.sampled_from([1, 1, 2]),
                st.integers(0, 5),
                st.integers(0, 5),
                st.integers(0, CPUS - 1),
                st.sampled_from([0, 0, 0, 0, DISCARDED]),
            ),
            max_size=20,
        ),
        max_size=8,
    ),
    few=st.booleans(),
    gather_s=st.sampled_from([0.0, 1e-5]),
)
def test_both_follow_a_ring_alike(batches: Any, few: bool, gather_s: float) -> None:
    with mock.patch.object(replica_module, "_LEAST_ROWS", 2 if few else 1_024):
        ours = WholeFollower(PlainRing(EVENT.itemsize), compiled=True, gather_s=gather_s)
        with without_native():
            oracle = WholeFollower(PlainRing(EVENT.itemsize), compiled=False, gather_s=gather_s)
    following = [0] * CPUS
    for batch in batches:
        for kind, key, version, cpu, state in batch:
            event = np.zeros(1, EVENT)
            event["seq"], event["cpu"], event["kind"] = following[cpu], cpu, kind
            event["key"], event["version"], event["value"] = key, version, version
            following[cpu] += 1
            assert ours.put(event, state) == oracle.put(event, state)
        news, theirs = ours._take(), oracle._take()
        for name in news.dtype.names or ():
            if name != "seen_ns":
                assert np.array_equal(news[name], theirs[name]), name
        assert news["seen_ns"].all()
        assert (ours.behind, ours._delivered, ours._coalesced) == (
            oracle.behind, oracle._delivered, oracle._coalesced,
        )  # fmt: skip
        assert ours.reader.account() == oracle.reader.account()
        used = ours.replica._table.used
        assert used == oracle.replica._table.used
        same_rows(ours.replica._rows[:used], oracle.replica._rows[:used])


@pytest.mark.parametrize(("program", "cpu"), [(PROGRAMS, 0), (0, CPUS), (255, 65_535)])
@pytest.mark.parametrize("off", [False, True])
def test_an_event_of_nobody_is_refused(program: int, cpu: int, off: bool) -> None:
    with mock.patch.dict(os.environ, {native.SWITCH: "0"} if off else {}):
        follower = FakeFollower(np.zeros(PROGRAMS * CPUS, np.int64))
        events = np.zeros(3, EVENT)
        events["program"][1], events["cpu"][1] = program, cpu
        with pytest.raises(BadInput, match="names a program or a CPU that"):
            follower._number(events)


# -- how it comes to be -----------------------------------------------------------------------


def test_a_switch_turns_it_off() -> None:
    with without_native():
        assert native.compiled() is None
        assert native.state() == "NumPy: LABKIT_NATIVE=0"


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As in a process that has not asked for it yet, and on a machine that kept none."""
    if os.environ.get(native.SWITCH) == "0":
        pytest.skip(f"event path: {native.state()}")
    monkeypatch.setattr(native, "KEPT", tmp_path / "native")
    native._found.cache_clear()
    yield
    native._found.cache_clear()


def test_without_clang_numpy_does_it(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find_tool", lambda *_: None)
    assert native.compiled() is None
    assert (
        native.state()
        == "NumPy: clang is missing; make setup installs it, or apt-get install clang"
    )
    assert Replica(layout())._library is None


def test_what_does_not_compile_is_said(
    anew: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "native.c"
    broken.write_text("int half(")
    monkeypatch.setattr(native, "SOURCE", broken)
    if tools.find_tool("clang-14", "clang") is None:
        pytest.skip("there is no clang")
    assert native.compiled() is None
    assert "does not compile native.c: expected" in native.state()
    assert str(tmp_path) not in native.state()
    assert list(native.KEPT.iterdir()) == [], "half of something stays"


def test_a_folder_that_cannot_be_written_is_said(
    anew: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "native").write_text("no folder")
    if tools.find_tool("clang-14", "clang") is None:
        pytest.skip("there is no clang")
    assert native.compiled() is None
    assert "native.c cannot be compiled and kept: " in native.state()


@needs_native
def test_it_is_compiled_once_and_what_is_not_whole_is_made_again(anew: None) -> None:
    assert native.compiled() is not None
    (kept,) = native.KEPT.iterdir()
    made = kept.stat().st_mtime_ns
    native._found.cache_clear()
    assert native.compiled() is not None
    assert kept.stat().st_mtime_ns == made
    part = kept.read_bytes()[:-100]
    kept.unlink()  # and not shortened in place: it is mapped into this very process
    kept.write_bytes(part)
    native._found.cache_clear()
    assert native.compiled() is not None
    assert [file.name for file in native.KEPT.iterdir()] == [kept.name]


@needs_native
def test_what_a_killed_compilation_left_is_cleared_away(anew: None) -> None:
    native.KEPT.mkdir()
    left, young = native.KEPT / "partial-old", native.KEPT / "partial-young"
    for folder in (left, young):
        folder.mkdir()
    os.utime(left, (1, 1))
    old = [native.KEPT / f"{number}.so" for number in range(12)]
    for file in old:
        file.touch()
        os.utime(file, (1, 1))
    assert native.compiled() is not None
    assert not left.exists() and young.exists()
    assert len(list(native.KEPT.glob("*.so"))) == native._MOST_KEPT


# -- under the sanitizers -----------------------------------------------------------------------

_SANITIZED = """
import sys
from pathlib import Path
import pytest
from labkit.kernel import native
library = native.bound(Path(sys.argv[1]))
native._found = lambda: (library, "under the sanitizers")
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "alike or same_after", sys.argv[2]]))
"""


def sanitizing_compiler(folder: Path) -> tuple[str, str] | None:
    """A compiler that links with its sanitizers, and the runtime to load in front of Python."""
    probe = folder / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    for name in ("clang-14", "clang", "gcc"):
        compiler = tools.find_tool(name)
        runtime = "libclang_rt.asan-x86_64.so" if "clang" in name else "libasan.so"
        if compiler is None:
            continue
        flags = ["-fsanitize=address,undefined", *["-shared-libasan"] * ("clang" in name)]
        command = [compiler, *flags, str(probe), "-o", str(folder / "probe")]
        found = subprocess.run(
            [compiler, f"-print-file-name={runtime}"], capture_output=True, text=True, check=False
        ).stdout.strip()
        linked = subprocess.run(command, capture_output=True, check=False).returncode == 0
        if linked and Path(found).is_file():
            return compiler, found
    return None


@needs_native
@pytest.mark.timeout(400)
def test_the_sanitizers_have_nothing_to_say(tmp_path: Path) -> None:
    found = sanitizing_compiler(tmp_path)
    if found is None:
        pytest.skip("neither clang's sanitizers nor gcc's are installed")
    compiler, runtime = found
    made = tmp_path / "sanitized.so"
    flags = [flag for flag in native.FLAGS if flag != "-O2"]
    # Each batch above 64 bytes is streamed, as it is above 1 MiB else.
    more = ["-O1", "-g", "-DNEAR=64", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    more += ["-shared-libasan"] * ("clang" in compiler)
    subprocess.run([compiler, *flags, *more, str(native.SOURCE), "-o", str(made)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", _SANITIZED, str(made), __file__],
        env={
            **os.environ,
            "LD_PRELOAD": runtime,
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONMALLOC": "malloc",
        },
        capture_output=True, text=True, errors="replace", check=False, timeout=360,
    )  # fmt: skip
    said = (done.stdout + done.stderr)[-4_000:]
    assert done.returncode == 0, said
    assert "passed" in said and "ERROR: AddressSanitizer" not in said


def test_a_producer_and_its_reader_do_not_race(tmp_path: Path) -> None:
    """The thread sanitizer finds nothing, and does find a planted race."""
    program = tmp_path / "race"
    for planted in (False, True):
        for compiler in filter(None, map(tools.find_tool, ("clang-14", "clang", "gcc"))):
            command = [compiler, "-std=gnu11", "-O1", "-g", "-pthread", "-fsanitize=thread"]
            command += ["-DPLANTED"] * planted
            command += [f'-DNATIVE="{native.SOURCE}"', str(RACE), "-o", str(program)]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                break
        else:
            pytest.skip("no compiler here has the thread sanitizer")
        # Of addresses chosen at random the sanitizer may not like some.
        done = subprocess.run(
            ["setarch", "-R", str(program)], capture_output=True, text=True, check=False, timeout=60
        )
        said = done.stdout + done.stderr
        if "unexpected memory mapping" in said:
            pytest.skip("the thread sanitizer does not run on this kernel")
        assert ("WARNING: ThreadSanitizer: data race" in said) == planted, said[-2_000:]
        assert "42857 records" in said, said[-2_000:]
