"""What programs do with a map, by the instructions that the verifier left of them.

A program is followed through all of its branches with what each register and each place on the
stack may hold: a map, a pointer into a value of a map, a number that was read from there. Where two
branches meet, only what both agree on is kept. So a finding is one that the instructions show, and
what the walk could not follow is left out, never guessed.

The kernel shows the instructions with the ids of maps in place of their addresses, and calls as
distances to ``__bpf_call_base`` (kernel/bpf/syscall.c, ``bpf_insn_prepare_dump``). Lookups in
arrays and hashes are rewritten by the verifier (kernel/bpf/verifier.c, ``map_gen_lookup``), and
updates and deletes call the map type's own function.
"""

from __future__ import annotations

import functools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from labkit.inspect.diagnostic import Diagnostic, listed
from labkit.kernel import libbpf
from labkit.kernel.objects import MapObject, ProgramObject

MOST_INSTRUCTIONS: Final = 20_000
"""A longer program is not followed."""

MOST_SECONDS: Final = 2.0
"""All programs of a map together are followed for so long."""

_SHOWN: Final = 3
_MOST_LISTED: Final = 6
_NO_DELETE: Final = {"array", "percpu_array"}
_SHARED: Final = {"hash", "array", "lru_hash", "lpm_trie"}

# Instruction classes and operations (include/uapi/linux/bpf_common.h and bpf.h).
_LD, _LDX, _ST, _STX, _ALU, _JMP, _JMP32, _ALU64 = range(8)
_MEM, _ADD, _SUB, _MOV = 0x60, 0x00, 0x10, 0xB0
_JA, _EQUAL, _UNEQUAL, _CALL, _EXIT = 0x00, 0x10, 0x50, 0x80, 0x90
_LOAD_64: Final = 0x18
_BYTES: Final = {0x00: 4, 0x08: 2, 0x10: 1, 0x18: 8}
_FRAME: Final = 10
_ALWAYS_THERE: Final = -1
_CHANGES: Final = {
    "update_elem": "update", "delete_elem": "delete", "push_elem": "push",
    "ringbuf_output": "output",
}  # fmt: skip
_TAIL_CALL: Final = 12  # BPF_FUNC_tail_call, which the kernel shows by its number


class Call(NamedTuple):
    """A call of a program that changes a map.

    Attributes
    ----------
    at : int
        Index of the instruction.
    does : str
        ``update``, ``delete``, ``push`` (into a queue, stack or Bloom filter) or ``output`` (into a
        ring buffer; who reads a perf event array is told of its losses).
    map_id : int
        Of which map.
    heeded : bool
        Whether anything reads its answer.
    source_id : int
        Map whose value is written, where that is a copy of one; else 0.
    """

    at: int
    does: str
    map_id: int
    heeded: bool
    source_id: int = 0


class Addition(NamedTuple):
    """A number of a value that is read, added to, and stored, without a lock.

    Attributes
    ----------
    load, store : int
        Indices of the instructions.
    map_id : int
        Of which map.
    """

    load: int
    store: int
    map_id: int


class Jump(NamedTuple):
    """A tail call to an index that stands in the program.

    Attributes
    ----------
    at : int
        Index of the instruction.
    map_id, place : int
        Program array, and the index in it.
    """

    at: int
    map_id: int
    place: int


@dataclass(frozen=True)
class Code:
    """What one program does with maps.

    Attributes
    ----------
    program : ProgramObject
        The program.
    calls, additions, jumps : tuple
        In the order of the instructions.
    lines : mapping from int to str
        Source line at an instruction, where the program has line information.
    followed : bool
        False where it is too long, or the kernel does not show it.
    named : bool
        Whether the kernel names its functions to this user (/proc/kallsyms).
    """

    program: ProgramObject
    calls: tuple[Call, ...] = ()
    additions: tuple[Addition, ...] = ()
    jumps: tuple[Jump, ...] = ()
    lines: Mapping[int, str] = field(default_factory=dict)
    followed: bool = True
    named: bool = True

    def where(self, at: int) -> str:
        """An instruction, with its source line where that is known."""
        line = max((one for one in self.lines if one <= at), default=None)
        source = f" ({self.lines[line]})" if line is not None and self.lines[line] else ""
        return f"instruction {at}{source}"


def look(
    users: Iterable[ProgramObject],
    maps: Mapping[int, MapObject],
    most_seconds: float = MOST_SECONDS,
) -> list[Code]:
    """Follow programs as far as the kernel shows their instructions.

    Parameters
    ----------
    users : iterable of ProgramObject
        The programs.
    maps : mapping from int to MapObject
        All maps, by id.
    most_seconds : float
        For all of them together; what was found of a program is kept.

    Returns
    -------
    list of Code
        In the same order.
    """
    deadline = time.monotonic() + most_seconds
    return [_look(one, maps, deadline) for one in users]


# What was found of each program; an id is never used twice, and instructions do not change.
_known: dict[int, Code] = {}


def _look(program: ProgramObject, maps: Mapping[int, MapObject], deadline: float) -> Code:
    if program.id in _known:
        return _known[program.id]
    if time.monotonic() > deadline:
        return Code(program, followed=False)
    try:
        fd = libbpf.fd_by_id("prog", program.id)
    except OSError:
        return Code(program, followed=False)
    try:
        instructions = libbpf.prog_instructions(fd)
        if not 0 < len(instructions) <= MOST_INSTRUCTIONS:
            return Code(program, followed=False)
        functions = _functions()
        seen = follow(instructions, maps, functions.get, deadline)
        found = Code(
            program, seen.calls, seen.additions, seen.jumps,
            libbpf.prog_lines(fd) if seen.calls or seen.additions or seen.jumps else {},
            seen.ended, named=bool(functions),
        )  # fmt: skip
        _known[program.id] = found
        return found
    except OSError:
        return Code(program, followed=False)
    finally:
        libbpf.close(fd)


@functools.cache
def _functions() -> dict[int, str]:
    """Names of the functions that matter here, by their distance to ``__bpf_call_base``."""
    wanted = (
        rb"__bpf_call_base|bpf_ringbuf_output|\w*(?:map|trie)_\w*elem\w*"
        rb"|bpf_\w*spin_(?:un)?lock\w*"
    )
    symbols = Path("/proc/kallsyms").read_bytes()
    found = re.findall(rb"^([0-9a-f]+) \w (" + wanted + rb")$", symbols, re.M)
    names = {int(address, 16): name.decode() for address, name in found}
    base = next((at for at, name in names.items() if name == "__bpf_call_base"), 0)
    return {at - base: name for at, name in names.items()} if base else {}


# -- following ---------------------------------------------------------------------------


class _Value(NamedTuple):
    """A pointer into a value of a map: by which instruction it was found, and how far behind."""

    map_id: int
    found_at: int
    offset: int


class _Read(NamedTuple):
    """A number that was read from a value, and whether anything was added to it since."""

    source: _Value
    size: int
    load: int
    added: bool


class _MapPointer(NamedTuple):
    """A map; for an array also the pointer to its values, which lies behind its head."""

    map_id: int


class _Frame(NamedTuple):
    """A pointer to a place on the stack."""

    offset: int


_Holds = _Value | _Read | _MapPointer | _Frame | int | None
"""What a register holds: one of these, a number that is known, or nothing that is known."""


@dataclass
class _State:
    registers: list[_Holds]  # r0 to r10
    stack: dict[tuple[int, int], _Holds]  # by offset and size, bytes
    locked: bool = False

    def copy(self) -> _State:
        return _State(list(self.registers), dict(self.stack), self.locked)

    def join(self, other: _State) -> bool:
        """Keep what both agree on; whether that changed anything here."""
        registers = [_both(*pair) for pair in zip(self.registers, other.registers, strict=True)]
        stack: dict[tuple[int, int], _Holds] = {
            at: held
            for at, mine in self.stack.items()
            if (held := _both(mine, other.stack.get(at))) is not None
        }
        locked = self.locked or other.locked
        changed = (registers, stack, locked) != (self.registers, self.stack, self.locked)
        self.registers, self.stack, self.locked = registers, stack, locked
        return changed


def _both(one: _Holds, other: _Holds) -> _Holds:
    if one == other and type(one) is type(other):
        return one
    # A lookup leaves a pointer or zero, and the program asks which before it uses it.
    if isinstance(one, _Value) and other == 0:
        return one
    if isinstance(other, _Value) and one == 0:
        return other
    return None


class Followed(NamedTuple):
    """What a program does, in the order of its instructions.

    Attributes
    ----------
    calls, additions, jumps : tuple
        See their types.
    ended : bool
        False where time was up: then there may be more.
    """

    calls: tuple[Call, ...]
    additions: tuple[Addition, ...]
    jumps: tuple[Jump, ...]
    ended: bool


def follow(
    instructions: npt.NDArray[np.void],
    maps: Mapping[int, MapObject],
    name_of: Callable[[int], str | None],
    deadline: float = float("inf"),
) -> Followed:
    """Follow one program through its branches.

    Parameters
    ----------
    instructions : numpy.ndarray
        As `labkit.kernel.libbpf.prog_instructions` answers them.
    maps : mapping from int to MapObject
        Maps, by id.
    name_of : callable
        Name of the function at a distance from ``__bpf_call_base``; None where it is unknown.
    deadline : float
        When to give up, on the monotonic clock, seconds.

    Returns
    -------
    Followed
        What it does.
    """
    walk = _Walk(instructions, maps, name_of)
    ended = walk.run(deadline)
    return Followed(
        tuple(walk.calls[at] for at in sorted(walk.calls)),
        tuple(walk.additions[at] for at in sorted(walk.additions)),
        tuple(walk.jumps[at] for at in sorted(walk.jumps)),
        ended,
    )


class _Walk:
    def __init__(
        self,
        instructions: npt.NDArray[np.void],
        maps: Mapping[int, MapObject],
        name_of: Callable[[int], str | None],
    ) -> None:
        self._code: list[tuple[int, int, int, int, int]] = [
            (code, registers & 15, registers >> 4, offset, immediate)
            for code, registers, offset, immediate in instructions.tolist()
        ]
        self._maps, self._name_of = maps, name_of
        self._heeded: dict[int, bool] = {}
        self._before: dict[int, _State] = {}
        self.calls: dict[int, Call] = {}
        self.additions: dict[int, Addition] = {}
        self.jumps: dict[int, Jump] = {}

    def run(self, deadline: float) -> bool:
        """Until nothing changes; then once more, to note what holds by then."""
        seconds = {i + 1 for i, one in enumerate(self._code) if one[0] == _LOAD_64}
        for start in range(len(self._code)):
            # A function that is called, or called back, is reached by no branch.
            if start in self._before or start in seconds:
                continue
            self._before[start] = _State([*[None] * _FRAME, _Frame(0)], {})
            todo = [start]
            while todo:
                if time.monotonic() > deadline:
                    return False
                at = todo.pop()
                after = self._before[at].copy()
                self._step(at, after)
                for following, is_zero in self._following(at, after):
                    there = after
                    if is_zero is not None:
                        there = after.copy()
                        there.registers[is_zero] = 0
                    if following not in self._before:
                        self._before[following] = there.copy()
                        todo.append(following)
                    elif self._before[following].join(there):
                        todo.append(following)
        self.calls.clear()
        self.additions.clear()
        self.jumps.clear()
        for at, state in self._before.items():
            self._step(at, state.copy())
        return True

    def _following(self, at: int, state: _State | None = None) -> Iterator[tuple[int, int | None]]:
        """What may run next, each with the register that is then known to be zero."""
        code, target, _, offset, immediate = self._code[at]
        kind, operation = code & 7, code & 0xF0
        nexts: list[tuple[int, int | None]]
        if kind in (_JMP, _JMP32) and operation == _EXIT:
            nexts = []
        elif kind in (_JMP, _JMP32) and operation == _JA:
            nexts = [(at + 1 + (immediate if kind == _JMP32 else offset), None)]
        elif kind in (_JMP, _JMP32) and operation != _CALL:
            asks_for_zero = kind == _JMP and not code & 8 and immediate == 0
            nexts = [
                (at + 1, target if asks_for_zero and operation == _UNEQUAL else None),
                (at + 1 + offset, target if asks_for_zero and operation == _EQUAL else None),
            ]
            if asks_for_zero and state is not None and state.registers[target] == 0:
                # A pointer that is none goes one way alone; what is read by it is not looked at.
                nexts = [one for one in nexts if one[1] is not None] or nexts
        else:
            nexts = [(at + (2 if code == _LOAD_64 else 1), None)]
        yield from (one for one in nexts if 0 <= one[0] < len(self._code))

    def _step(self, at: int, state: _State) -> None:
        code, target, source, _, immediate = self._code[at]
        kind, held = code & 7, state.registers
        if kind == _LD:
            held[target] = self._constant(at) if code == _LOAD_64 else None
        elif kind == _LDX:
            held[target] = self._load(at, state)
        elif kind == _STX and code & 0xE0 == _MEM:
            self._store(at, held[source], state)
        elif kind == _ST and code & 0xE0 == _MEM:
            self._store(at, immediate, state)
        elif kind == _STX:
            self._atomic(source, immediate, state)
        elif kind in (_ALU, _ALU64):
            held[target] = self._computed(at, held, wide=kind == _ALU64)
        elif kind == _JMP and code & 0xF0 == _CALL:
            self._call(at, state)

    def _constant(self, at: int) -> _Holds:
        _, _, pseudo, _, low = self._code[at]
        high = self._code[at + 1][4] if at + 1 < len(self._code) else 0
        if pseudo == 1:
            return _MapPointer(low)
        if pseudo == 2:  # a global variable: a value of the array behind the section
            return _Value(low, _ALWAYS_THERE, high) if self._kind(low) == "array" else None
        return low if pseudo == 0 and high == 0 else None

    def _kind(self, map_id: int) -> str:
        return self._maps[map_id].kind if map_id in self._maps else ""

    def _load(self, at: int, state: _State) -> _Holds:
        code, _, source, offset, _ = self._code[at]
        size, base = _BYTES[code & 0x18], state.registers[source]
        if code & 0xE0 not in (_MEM, 0x20, 0x80):  # also where a bad address reads as zero
            return None
        if isinstance(base, _Value):
            place = base._replace(offset=base.offset + offset)
            return _Read(place, size, at, added=False)
        if isinstance(base, _Frame):
            return state.stack.get((base.offset + offset, size))
        return None

    def _store(self, at: int, what: _Holds, state: _State) -> None:
        code, target, _, offset, _ = self._code[at]
        size, base = _BYTES[code & 0x18], state.registers[target]
        if isinstance(base, _Frame):
            self._forget(base.offset + offset, size, state)
            if what is not None:
                state.stack[base.offset + offset, size] = what
        elif isinstance(base, _Value) and isinstance(what, _Read) and what.added:
            place = base._replace(offset=base.offset + offset)
            if place == what.source and size == what.size and not state.locked:
                self.additions[at] = Addition(what.load, at, place.map_id)

    @staticmethod
    def _forget(begin: int, size: int, state: _State) -> None:
        for at, width in list(state.stack):
            if at < begin + size and begin < at + width:
                del state.stack[at, width]

    @staticmethod
    def _forget_numbers(begin: int, state: _State) -> None:
        """After a function that may write there: it cannot write over a pointer that is kept."""
        for (at, width), held in list(state.stack.items()):
            if at >= begin and (isinstance(held, int | _Read)):
                del state.stack[at, width]

    @staticmethod
    def _atomic(source: int, operation: int, state: _State) -> None:
        if operation == 0xF1:  # compare and exchange answers in r0
            state.registers[0] = None
        elif operation & 1:
            state.registers[source] = None

    def _computed(self, at: int, held: list[_Holds], *, wide: bool) -> _Holds:
        code, target, source, _, immediate = self._code[at]
        operation, by_register = code & 0xF0, bool(code & 8)
        mine, other = held[target], held[source] if by_register else immediate
        if operation == _MOV:
            plain = self._code[at][3] == 0  # else it extends the sign, or is another address space
            narrow = isinstance(other, int) or (isinstance(other, _Read) and other.size <= 4)
            return other if plain and (wide or narrow) else None
        if operation not in (_ADD, _SUB):
            return None
        if isinstance(mine, _Read):
            return mine._replace(added=True)
        if isinstance(other, _Read) and operation == _ADD and not isinstance(mine, _Value):
            return other._replace(added=True)
        if not wide:
            return None
        by = other if operation == _ADD or not isinstance(other, int) else -other
        if isinstance(mine, _Value | _Frame) and isinstance(by, int):
            return mine._replace(offset=mine.offset + by)
        if isinstance(mine, _MapPointer) and isinstance(by, int):
            return mine
        # An index was worked out by itself, and is added to where the array's values begin.
        for one in (mine, other):
            if isinstance(one, _MapPointer) and self._kind(one.map_id) == "array":
                return _Value(one.map_id, at, 0)
        return None

    def _call(self, at: int, state: _State) -> None:
        _, _, pseudo, _, distance = self._code[at]
        held = state.registers
        name = (self._name_of(distance) or "") if pseudo != 1 else ""
        first = held[1]
        answer: _Holds = None
        if isinstance(first, _MapPointer):
            kind = self._kind(first.map_id)
            does = next((verb for part, verb in _CHANGES.items() if part in name), "")
            if "lookup_elem" in name and "percpu" not in name and kind in _SHARED:
                answer = _Value(first.map_id, at, 0)
            elif does and "lookup" not in name:
                copied = self._copied_from(held[3], first.map_id, state) if does == "update" else 0
                source_id = copied if copied != first.map_id else 0
                heeded = self._answer_is_read(at + 1)
                self.calls[at] = Call(at, does, first.map_id, heeded, source_id)
        table, index = held[2], held[3]
        tail_call = pseudo == 0 and distance == _TAIL_CALL
        if tail_call and isinstance(table, _MapPointer) and isinstance(index, int):
            self.jumps[at] = Jump(at, table.map_id, index & 0xFFFFFFFF)
        if "spin_lock" in name or "spin_unlock" in name:
            state.locked = "unlock" not in name
        # A function may write wherever it was given a pointer to.
        for one in held[1:6]:
            if isinstance(one, _Frame) and "elem" not in name:
                self._forget_numbers(one.offset, state)
        held[:6] = [answer, None, None, None, None, None]

    def _copied_from(self, value: _Holds, into: int, state: _State) -> int:
        """Id of the map of whose value at least half of the new one is a copy, or 0.

        A global variable or a constant is no source: it is what a new entry begins with.
        """
        if isinstance(value, _Value):
            return value.map_id if value.found_at != _ALWAYS_THERE else 0
        copied: Counter[int] = Counter()
        if isinstance(value, _Frame) and into in self._maps:
            end = value.offset + self._maps[into].value_size
            for (at, width), held in state.stack.items():
                if not isinstance(held, _Read) or held.added or not value.offset <= at < end:
                    continue
                if held.source.found_at != _ALWAYS_THERE:
                    copied[held.source.map_id] += width
            for source_id, width in copied.most_common(1):
                return source_id if 2 * width >= self._maps[into].value_size else 0
        return 0

    def _answer_is_read(self, at: int) -> bool:
        """Whether r0 is read on any path before something else is put into it."""
        if at not in self._heeded:
            self._heeded[at] = self._read_on_some_path(at)
        return self._heeded[at]

    def _read_on_some_path(self, at: int) -> bool:
        todo, seen = [at], set()
        while todo:
            here = todo.pop()
            if here in seen or here >= len(self._code):
                continue
            seen.add(here)
            reads, writes = _uses_r0(*self._code[here])
            if reads:
                return True
            if not writes:
                todo.extend(following for following, _ in self._following(here))
        return False


def _uses_r0(code: int, target: int, source: int, offset: int, immediate: int) -> tuple[bool, bool]:
    """Whether an instruction reads r0, and whether it puts something else into it."""
    kind, operation = code & 7, code & 0xF0
    by_register = bool(code & 8)
    if kind == _LD:
        return False, target == 0 or code != _LOAD_64
    if kind == _LDX:
        return source == 0, target == 0
    if kind == _ST:
        return target == 0, False
    if kind == _STX:
        compares = code & 0xE0 != _MEM and immediate == 0xF1
        return target == 0 or source == 0 or compares, False
    if kind in (_ALU, _ALU64):
        moves = operation == _MOV
        return (by_register and source == 0) or (target == 0 and not moves), target == 0
    if operation == _CALL:
        return False, True
    if operation == _EXIT:
        return True, False
    if operation == _JA:
        return False, False
    return target == 0 or (by_register and source == 0), False


# -- judging -----------------------------------------------------------------------------


def judge(
    one: MapObject, codes: Sequence[Code], maps: Mapping[int, MapObject]
) -> Iterator[Diagnostic]:
    """Judge what programs do with a map.

    Parameters
    ----------
    one : MapObject
        The map.
    codes : list of Code
        Of the programs that refer to it.
    maps : mapping from int to MapObject
        All maps, by id.

    Yields
    ------
    Diagnostic
        Risks alone: whether a program runs is not known here.
    """
    for code in codes:
        yield from _of_additions(one, code)
        yield from _of_calls(one, code)
        yield from _of_copies(one, code, maps)


def _program(code: Code) -> str:
    return f"Program {code.program.id} {code.program.name}".rstrip()


def _of_additions(one: MapObject, code: Code) -> Iterator[Diagnostic]:
    found = [each for each in code.additions if each.map_id == one.id]
    if not found or libbpf.possible_cpus() == 1:
        return
    places = [f"{code.where(each.load)} to {each.store}" for each in found[:_SHOWN]]
    yield Diagnostic(
        "risk",
        f"{_program(code)} increments a value by a load, an addition and a store, not by an "
        f"atomic addition: {listed(places)}. Where two CPUs do so with one value at once, "
        "an addition is lost.",
        "Use __sync_fetch_and_add, a per-CPU map, or a bpf_spin_lock.",
        "lost-updates",
    )


def _of_calls(one: MapObject, code: Code) -> Iterator[Diagnostic]:
    mine = [each for each in code.calls if each.map_id == one.id]
    deletes = [each for each in mine if each.does == "delete"]
    if one.kind in _NO_DELETE and deletes:
        places = [code.where(each.at) for each in deletes[:_SHOWN]]
        yield Diagnostic(
            "risk",
            f"{_program(code)} deletes from it, and it is an array: its elements are always there, "
            f"the delete is answered EINVAL and the old value stays ({listed(places)}).",
            "Write a value that means nothing, or take a hash.",
            "untouched-entries",
        )
        mine = [each for each in mine if each.does != "delete"]
    if one.kind in _NO_DELETE:
        return  # an update of an element that is there is not refused
    ignored = [each for each in mine if not each.heeded]
    if ignored:
        places = [f"{each.does} at {code.where(each.at)}" for each in ignored[:_SHOWN]]
        yield Diagnostic(
            "risk",
            f"{_program(code)} throws away the answer of {len(ignored)} of its {len(mine)} "
            f"calls that write to this map: {listed(places)}. Whether one was refused, nobody "
            "knows.",
            "Look at the answer, and count refusals.",
            "ignored-answers",
        )


def _of_copies(one: MapObject, code: Code, maps: Mapping[int, MapObject]) -> Iterator[Diagnostic]:
    for each in code.calls:
        if not each.source_id or one.id not in (each.source_id, each.map_id):
            continue
        to_other = one.id == each.source_id
        other = each.map_id if to_other else each.source_id
        name = f"map {other} {maps[other].name if other in maps else ''}".rstrip()
        yield Diagnostic(
            "risk",
            (
                f"{_program(code)} copies a value of this map to {name} ({code.where(each.at)}): a "
                "new value here is not in that copy until the program copies it again."
                if to_other
                else f"{_program(code)} copies values of {name} into this one "
                f"({code.where(each.at)}): a new value there is not in here until the program "
                "copies it again."
            ),
            "Put a version into the value and compare it, or delete the copy with each change.",
            "copied-value",
        )


def judge_jumps(
    one: MapObject, codes: Sequence[Code], programs: Mapping[int, int]
) -> Iterator[Diagnostic]:
    """Judge tail calls to indices of a program array that hold no program, while others do.

    Parameters
    ----------
    one, codes
        As for `judge`.
    programs : mapping from int to int
        Program ids by their index, as they are in force.
    """
    for code in codes:
        missing = [
            jump for jump in code.jumps if jump.map_id == one.id and jump.place not in programs
        ]
        if missing:
            places = [f"{jump.place} ({code.where(jump.at)})" for jump in missing[:_SHOWN]]
            yield Diagnostic(
                "risk",
                f"{_program(code)} jumps to index {listed(places)} of it, where no program stands: "
                "the tail call falls through.",
                "Put a program there, unless the code behind the tail call is what is wanted.",
                "ignored-answers",
            )


def unseen(codes: Sequence[Code]) -> list[str]:
    """What could not be looked at of the programs, in words."""
    found = []
    if left := [code.program.id for code in codes if not code.followed]:
        found.append(f"the instructions of program {listed(left, _MOST_LISTED)}")
    if any(code.followed and not code.named for code in codes):
        found.append(
            "which functions the programs call: /proc/kallsyms has no addresses for this user"
        )
    return found
