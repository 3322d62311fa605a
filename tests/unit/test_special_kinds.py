"""What is said of maps that are no plain tables, from facts that are made up."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from labkit.inspect import kinds, pinned
from labkit.inspect.kinds import Inside, Ring
from labkit.kernel.libbpf import MapKind
from labkit.kernel.objects import LinkObject, MapObject, Objects


def made(kind: str, **changes: Any) -> MapObject:
    usual: dict[str, Any] = {
        "key_size": 4, "value_size": 4, "max_entries": 8, "flags": 0, "memlock_bytes": 64,
        "frozen": False, "map_ids": (), "program_ids": (), "elements_complete": True,
    }  # fmt: skip
    return MapObject(id=1, name="special", kind=kind, **{**usual, **changes})


def said(one: MapObject, inside: Inside, users: tuple[int, ...] = (7,), **now: Any) -> list[str]:
    found = kinds.judge(one, inside, Objects({one.id: one}, **now), list(users))
    return [f"{each.weight}: {each.says}" for each in found]


def ring(consumer: tuple[int, int], producer: tuple[int, int], largest: int = 16) -> Inside:
    seen = Ring(consumer, producer, records=1, largest=largest, front_busy=False)
    return Inside(taken=seen.unread[1], ring=seen)


def test_an_empty_program_array_is_a_cause_where_nobody_can_fill_it_again() -> None:
    empty = Inside(taken=0, owner="xdp")
    (words,) = said(made("prog_array"), empty)
    assert words.startswith("cause") and "EINVAL" in words
    for held in ({"pids": (4,)}, {"pins": ("/sys/fs/bpf/x",)}):
        assert said(made("prog_array", **held), empty)[0].startswith("risk")
    assert said(made("prog_array"), empty, users=())[0].startswith("risk")
    assert said(made("prog_array"), Inside(taken=0, complete=False)) == []
    assert said(made("prog_array"), Inside(taken=2)) == []


@pytest.mark.parametrize("kind", ["devmap", "devmap_hash"])
def test_an_empty_map_of_devices_is_a_cause_where_a_program_uses_it(kind: str) -> None:
    assert said(made(kind), Inside(taken=0))[0].startswith("cause: It is empty")
    assert said(made(kind), Inside(taken=0), users=()) == []
    assert said(made(kind), Inside(taken=1)) == said(made(kind), Inside(taken=None)) == []


@pytest.mark.parametrize("kind", ["sockmap", "sockhash", "reuseport_sockarray", "cpumap"])
def test_another_empty_map_of_targets_is_a_risk(kind: str) -> None:
    assert said(made(kind), Inside(taken=0))[0].startswith("risk: Nothing stands in it")
    assert said(made(kind), Inside(taken=1)) == said(made(kind), Inside()) == []


@pytest.mark.parametrize(("taken", "weight"), [(3, ""), (4, "risk"), (8, "cause")])
def test_buckets_of_stacks_are_counted_to_the_next_power_of_two(taken: int, weight: str) -> None:
    found = said(made("stack_trace", max_entries=6), Inside(taken=taken))
    assert [one.split(":")[0] for one in found] == ([weight] if weight else [])


def test_a_ring_is_full_where_its_next_record_finds_no_room() -> None:
    one = made("ringbuf", max_entries=4096)
    (words,) = said(one, ring((0, 0), (4080, 4080)))
    assert words.startswith("cause: It is full, 4,080 of 4,096 bytes (99.6%)")
    assert said(one, ring((0, 0), (3000, 3000), largest=1200))[0].startswith("cause")
    assert said(one, ring((0, 0), (3000, 3000)))[0].startswith("risk")
    assert said(one, ring((0, 4000), (4080, 4080)))[0].startswith("risk")  # it is being emptied
    assert said(one, ring((0, 100), (200, 300))) == []  # it is read
    assert said(one, ring((200, 200), (200, 200))) == []  # all is read
    overwrites = made("ringbuf", max_entries=4096, flags=1 << 19)
    assert said(overwrites, ring((0, 0), (4080, 4080))) == []


def test_a_perf_array_that_nobody_holds_has_no_events() -> None:
    assert said(made("perf_event_array"), Inside())[0].startswith("risk")
    for fine in ({"pids": (4,)}, {"flags": 1 << 11}):
        assert said(made("perf_event_array", **fine), Inside()) == []
    assert said(made("perf_event_array"), Inside(), users=()) == []


def test_struct_ops_without_a_link_are_called_by_nobody() -> None:
    ready = Inside(state="ready for a link")
    assert said(made("struct_ops"), ready)[0].startswith("cause")
    link = LinkObject(3, "struct_ops", 0, "map_id=1")
    assert said(made("struct_ops"), ready, links={3: link}) == []
    assert said(made("struct_ops"), Inside(state="in use")) == []


def test_every_kind_of_map_is_worth_a_word() -> None:
    silent = [
        kind.name.lower() for kind in MapKind
        if not kinds.unseen(made(kind.name.lower()), Inside())
    ]  # fmt: skip
    # Of these the entries themselves are read.
    assert silent == ["hash", "array", "percpu_hash", "percpu_array", "lru_hash",
                      "lru_percpu_hash", "lpm_trie"]  # fmt: skip
    assert "does not know its type" in kinds.unseen(made("type 99"), Inside())[0]
    assert "EPERM" in kinds.unseen(made("prog_array"), Inside(refused="EPERM"))[0]
    assert "time was up" in kinds.unseen(made("cpumap"), Inside(taken=3, complete=False))[0]


def test_who_may_open_a_pin_is_told_by_its_mode_and_its_folders(tmp_path: Path) -> None:
    pin = tmp_path / "policy"
    pin.touch()
    pin.chmod(0o600)
    tmp_path.chmod(0o755)
    for folder in (*tmp_path.parents,):
        if not folder.stat().st_mode & stat.S_IXOTH:
            break
    else:
        assert "mode 0600" in (words := str(pinned.look([str(pin)])[0]))
        assert words.endswith("another user is answered EACCES")
    pin.chmod(0o666)
    tmp_path.chmod(0o700)
    (found,) = pinned.look([str(pin)])
    assert "EACCES by the folder" in str(found)
    assert pinned.look([str(tmp_path / "gone")]) == []
