"""What may keep the readers of one map from its newest values: anybody's, not one of ours.

A map is looked at, never written to: who holds it, which programs refer to it, whether another
map has its name, and what its type, flags, layout and content make likely. Each diagnostic names
the experiment of this lab that shows the mechanism.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from labkit.errors import BadInput
from labkit.inspect import code, content, kinds, pinned
from labkit.inspect.code import Code
from labkit.inspect.content import Content
from labkit.inspect.diagnostic import Diagnostic
from labkit.inspect.diagnostic import listed as _listed
from labkit.inspect.kinds import Inside
from labkit.inspect.pinned import Pin
from labkit.kernel import attachments, btf, libbpf, objects
from labkit.kernel.attachments import Standing, Survey
from labkit.kernel.btf import Field
from labkit.kernel.libbpf import MapFlag, MapKind
from labkit.kernel.maps import PER_CPU, Map, MapError, Snapshot
from labkit.kernel.objects import MapObject, Objects, ProgramObject

MOST_MAPS: Final = 100
"""Of one name, that are looked at in one go."""

_HASHES: Final = {"hash", "percpu_hash"}
_LRU: Final = {"lru_hash", "lru_percpu_hash"}
_ARRAYS: Final = {"array", "percpu_array"}
_READ: Final = _HASHES | _LRU | _ARRAYS | {"lpm_trie"}
_BOUNDED: Final = _HASHES | {"lpm_trie", "sockhash", "devmap_hash"}
_STREAMS: Final = {"ringbuf", "user_ringbuf", "perf_event_array", "queue", "stack"}
_SHOWN_BY: Final = {
    "ringbuf": "ring-buffer-facts", "user_ringbuf": "ring-buffer-facts",
    "perf_event_array": "perf-array-lookup",
}  # fmt: skip
_PER_CPU: Final = {kind.name.lower() for kind in PER_CPU}
_ALMOST_FULL: Final = 0.9
_CPU_STOCK: Final = 128  # free elements that a CPU takes at once: kernel/bpf/bpf_lru_list.c
_SHORT_LIST: Final = 16  # entries of a list that may be made to measure though its room is round
_ENDED_BY_HOLDER: Final = {"raw_tracepoint", "tracing", "lsm", "kprobe", "tracepoint"}
_MOST_TWINS: Final = 50
_MOST_LISTED: Final = 4
_MOST_USERS: Final = 20
_NAME_BYTES: Final = 15
_WIDTH: Final = 100
_DIGITS: Final = 10  # of an id, which has 32 bits


@dataclass(frozen=True)
class MapState:
    """What was found out about one map; all that `diagnostics` judges.

    Attributes
    ----------
    map_id : int
        The map.
    objects : Objects
        All maps, programs and links of the same moment.
    key_dtype, value_dtype : numpy.dtype
        Layouts, by the map's BTF where it has some.
    locked : bool
        The value has a ``bpf_spin_lock``, by its BTF.
    snapshot : Snapshot or None
        Its first entries; None where the type has none to read.
    content : Content or None
        How many entries there are, and how much of them was read.
    inside : Inside
        What is in force in a map that is no plain table.
    key_fields : tuple of Field
        Fields of the key, by the map's BTF.
    codes : tuple of Code
        What the programs that refer to it do with it.
    pinned : tuple of Pin
        Who may open its pins.
    refused : str
        Name of the error that reading the entries was answered.
    survey : Survey
        Where the programs run; by default nothing is known of that.
    """

    map_id: int
    objects: Objects
    key_dtype: np.dtype[Any]
    value_dtype: np.dtype[Any]
    locked: bool = False
    snapshot: Snapshot | None = None
    content: Content | None = None
    inside: Inside = kinds.NOTHING
    key_fields: tuple[Field, ...] = ()
    codes: tuple[Code, ...] = ()
    pinned: tuple[Pin, ...] = ()
    refused: str = ""
    survey: Survey = field(default_factory=Survey)

    @property
    def map(self) -> MapObject:
        """The map itself."""
        return self.objects.maps[self.map_id]

    def outer(self, map_id: int) -> list[int]:
        """Ids of the maps of maps that hold this one."""
        return list(self.objects.outer(map_id))

    def users(self, map_id: int) -> list[ProgramObject]:
        """Programs that refer to a map, or to one that holds it, or run for its entries."""
        served = self.survey.for_map(map_id)
        more = [self.objects.programs[one] for one in served if one in self.objects.programs]
        found = self.objects.users(map_id)
        return [*found, *(one for one in more if one not in found)]

    def standing(self, map_id: int) -> Standing | None:
        """Whether any of the programs of a map runs; None where it has none."""
        found = {self.survey.standing(user.id) for user in self.users(map_id)}
        return next((one for one in Standing if one in found), None)


@dataclass(frozen=True)
class Diagnosis:
    """A map, and what is to be said of it: the causes first."""

    state: MapState
    diagnostics: tuple[Diagnostic, ...]

    @property
    def has_cause(self) -> bool:
        """Whether something keeps a reader from the newest values as things stand."""
        return any(one.weight == "cause" for one in self.diagnostics)

    def __str__(self) -> str:
        """The map, who holds and uses it, and the diagnostics, for a terminal."""
        told = [paragraph(one) for one in self.diagnostics]
        return "\n".join([*_heading(self.state), *told, *_extent(self.state)])

    def as_json(self) -> dict[str, Any]:
        """The same for scripts."""
        one = self.state.map
        return {
            "map": asdict(one),
            "entries": _entries(self.state),
            "used_by": [
                {
                    "id": user.id,
                    "name": user.name,
                    "kind": user.kind,
                    "held_by": self.state.objects.holders(user),
                    "standing": self.state.survey.standing(user.id).value,
                    "attached": [asdict(at) for at in self.state.survey.of(user.id)],
                    "unknown": self.state.survey.blind(user.id),
                }
                for user in self.state.users(one.id)
            ],
            "held_by": self.state.objects.holders(one),
            "inside": kinds.described(one, self.state.inside, self.state.objects),
            "pinned": [str(pin) for pin in self.state.pinned],
            "checked": checked(self.state),
            "unseen": unseen(self.state),
            "diagnostics": [asdict(diagnostic) for diagnostic in self.diagnostics],
        }


def diagnose(which: str) -> list[Diagnosis]:
    """Look at a map that somebody else made, and say what may make it look stale.

    Parameters
    ----------
    which : str
        Id, path of a pin, or name. A name may be that of several maps: each is looked at.

    Returns
    -------
    list of Diagnosis
        In ascending order of the maps' ids, at least one.

    Raises
    ------
    BadInput
        There is no such map, or more than `MOST_MAPS` have the name.
    Unavailable
        This user may not look at BPF objects.
    MapError
        The kernel refuses to show the map.
    """
    now = objects.snapshot()
    wanted = map_ids(which, now)
    if len(wanted) > MOST_MAPS:
        raise BadInput(
            f"{len(wanted):,} maps are called {which!r}, and {MOST_MAPS} are looked at in one go: "
            f"name one by its id, such as {wanted[-1]}, the newest."
        )
    where = attachments.survey(now)
    return [examine(map_id, now, where) for map_id in wanted]


def examine(
    map_id: int, now: Objects, where: Survey, most_entries: int = content.MOST_ENTRIES,
    most_seconds: float = content.MOST_SECONDS,
) -> Diagnosis:  # fmt: skip
    """Look at one of the maps of a moment.

    Parameters
    ----------
    map_id : int
        The map.
    now : Objects
        All objects of that moment.
    where : Survey
        Where the programs run.
    most_entries : int
        So many of its entries are read; those behind them are counted.
    most_seconds : float
        Bound, in seconds, of each of: its entries, what else stands in it, its programs.

    Raises
    ------
    MapError
        The kernel refuses to show the map, or it has gone since.
    """
    state = _read(map_id, now, where, most_entries, most_seconds)
    return Diagnosis(state, tuple(sorted(diagnostics(state), key=lambda one: one.weight)))


def map_ids(which: str, now: Objects) -> list[int]:
    """Ids of the maps that an id, a path or a name means; `BadInput` where there is none."""
    if not which:
        raise BadInput("Name a map: by its id, the path of a pin, or its name.")
    if which.isascii() and which.isdecimal() and len(which) <= _DIGITS:
        if int(which) in now.maps:
            return [int(which)]
        raise BadInput(f"There is no map with id {which}: bpftool map show lists them.")
    if "/" in which:
        try:
            with Map.from_pin(which) as opened:
                return [opened.id]
        except MapError as error:
            raise BadInput(
                f"{which!r} is no pin of a map that can be opened "
                f"({libbpf.error_name(error.errno or 0)}): bpftool map show pinned says what it is."
            ) from None
        except BadInput as error:
            raise BadInput(f"{which!r} leads to no map. {error}") from None
    name = libbpf.shown(os.fsencode(which))
    found = [one.id for one in now.maps.values() if one.name in (which, name)]
    if not found:
        raise BadInput(
            f"No map has the name {which!r} (the kernel keeps 15 bytes of one): bpftool map show "
            "lists them."
        )
    return found


def _read(
    map_id: int, now: Objects, where: Survey, most_entries: int, most_seconds: float
) -> MapState:
    one = now.maps[map_id]
    emptied = one.kind == "prog_array" and not (one.program_ids or one.pins)
    if emptied and one.pids:
        # Whoever looks at all maps of the machine holds each of them, for a moment.
        one = replace(one, pids=kinds.still_held_by(map_id, one.pids))
        now = replace(now, maps={**now.maps, map_id: one})
    raw = np.dtype(f"V{one.key_size}"), np.dtype(f"V{one.value_size}")
    state = MapState(map_id, now, *raw, survey=where)
    if one.kind.upper() not in MapKind.__members__:
        return state
    if emptied and not one.pids:
        # To open and close it once more while the kernel clears it would keep it until the next
        # boot: see `labkit.kernel.objects.snapshot`.
        users = state.users(map_id)
        inside = Inside(taken=0, owner=users[0].kind if users else "")
        codes = tuple(code.look(users, now.maps, most_seconds))
        return replace(state, inside=inside, codes=codes)
    with Map.from_id(map_id) as opened:
        info = libbpf.map_info(opened.fd)
        found, refused = None, ""
        if one.kind in _READ and content.readable(opened):
            try:
                found = content.read(opened, most_entries, most_seconds)
            except MapError as error:
                refused = libbpf.error_name(error.errno or 0)
        state = MapState(
            map_id,
            now,
            opened.key_dtype,
            opened.value_dtype,
            locked=btf.has_member_of(info.btf_id, info.btf_value_type_id, "bpf_spin_lock"),
            snapshot=found.snapshot if found else None,
            content=found,
            inside=kinds.look(opened, most_seconds),
            key_fields=btf.fields_of(info.btf_id, info.btf_key_type_id),
            pinned=tuple(pinned.look(one.pins)),
            refused=refused,
            survey=where,
        )
    return replace(state, codes=tuple(code.look(state.users(map_id), now.maps, most_seconds)))


# -- judging -----------------------------------------------------------------------------


def diagnostics(state: MapState) -> Iterator[Diagnostic]:
    """Judge what was found out about a map.

    Parameters
    ----------
    state : MapState
        Nothing else is looked at.

    Yields
    ------
    Diagnostic
        In no particular order.
    """
    yield from _of_its_name(state)
    yield from _of_its_readers(state)
    yield from _of_its_keys(state)
    yield from _of_its_room(state)
    yield from _of_its_values(state)
    yield from _of_its_kind(state)
    users = [one.id for one in state.users(state.map_id)]
    yield from kinds.judge(state.map, state.inside, state.objects, users)
    yield from code.judge(state.map, state.codes, state.objects.maps)
    if state.inside.taken and state.inside.complete:
        yield from code.judge_jumps(state.map, state.codes, dict(state.inside.elements))


def _of_its_name(state: MapState) -> Iterator[Diagnostic]:
    """Other maps of the same name and shape: the program of another load may use one of those.

    Whoever made them, only two facts make a cause: this map has no program that runs and the other
    one has, or programs at one hook decide by different ones. Maps of one load, one for each
    interface, and those of two control planes are many maps of one name as well.
    """
    if _is_constants(state.map):
        return
    nearest = sorted(state.objects.twins(state.map_id), key=lambda one: abs(one.id - state.map_id))
    cut = len(state.map.name) == _NAME_BYTES
    note = (
        f" The kernel cuts a name to {_NAME_BYTES} bytes: the whole ones may differ." if cut else ""
    )
    risks = []
    for twin in sorted(nearest[:_MOST_TWINS], key=lambda one: one.id):
        found = _of_a_twin(state, twin)
        if found.weight == "cause":
            yield replace(found, says=found.says + note)
        else:
            risks.append(found)
    if risks:
        shown = [one.says for one in risks[:_MOST_LISTED]]
        if more := len(nearest) - (len(nearest[:_MOST_TWINS]) - len(risks)) - len(shown):
            shown.append(f"{more:,} more maps have this name.")
        yield Diagnostic("risk", " ".join(shown) + note, risks[0].do, risks[0].experiment)


def _of_a_twin(state: MapState, twin: MapObject) -> Diagnostic:
    one = state.map
    mine, theirs = state.standing(one.id), state.standing(twin.id)
    age = "older" if twin.id < one.id else "newer"
    head = f"The {age} map {twin.id} is called {one.name} too"
    used = f"{head}, and {_used(state, twin.id)}; that map is {_held(state, twin)}"
    same_path = "Pin the map and let every load use that pin again, and open it by pin or id."
    apart = bool(one.pids and twin.pids) and not {*one.pids} & {*twin.pids}

    written = bool(state.objects.holders(one)) and not _is_spare(state, twin)
    if theirs and mine is None and written and not _switched(state, twin.id):
        return Diagnostic(
            "risk" if theirs is Standing.NOWHERE else "cause",
            f"{used}; no program refers to this one, so that none reads what is written here.",
            f"Write to map {twin.id}, or replace its programs by those of this load. {same_path}",
            "second-map-after-reload",
        )
    kinds_of = [{user.kind for user in state.users(each)} for each in (one.id, twin.id)]
    if theirs is Standing.ATTACHED and mine is Standing.NOWHERE and kinds_of[0] & kinds_of[1]:
        return Diagnostic(
            "cause",
            f"{used}, while {_used(state, one.id)}: what is written here reaches no program that "
            "runs.",
            f"Attach the program of this load in the place of the other, or write to map {twin.id}."
            f" {same_path}",
            "second-map-after-reload",
        )
    if theirs is None and twin.pids and mine and not one.pids and not _switched(state, one.id):
        holders = _listed(state.objects.holders(twin)[:_MOST_LISTED])
        return Diagnostic(
            "cause",
            f"{head}; no program refers to it, and what {holders} "
            f"write{'' if len(twin.pids) + len(twin.pins) > 1 else 's'} there reaches none.",
            "Let its holder open the map again, and compare ids before each write.",
            "cached-handle",
        )
    point, renewed = _shared_point(state, twin)
    left_over = not state.objects.holders(one) or not state.objects.holders(twin)
    if point and not apart and (left_over or (renewed and not (one.pins and twin.pins))):
        return Diagnostic(
            "cause",
            f"{used}, while {_used(state, one.id)}: programs of both decide at one hook, "
            f"{point}, each by its own map.",
            f"{_ends(state, min(one.id, twin.id), max(one.id, twin.id))} {same_path}",
            "second-map-after-reload",
        )
    return Diagnostic(
        "risk",
        f"{used}{_why_two(state, twin)}.",
        "Open a map by its pin or its id: by the name one may get the other.",
        "second-map-after-reload" if theirs else "cached-handle",
    )


def _is_spare(state: MapState, twin: MapObject) -> bool:
    """Whether the map is of a tool that runs programs, and had no use for this map in them.

    Its twin is another live process's then. Who only holds a map has it to read or write there.
    """
    mine, others = {*state.map.pids}, {*twin.pids}
    return bool(others) and not mine & others and any(
        mine & {*program.pids} and state.survey.standing(program.id) is Standing.ATTACHED
        for program in state.objects.programs.values()
    )  # fmt: skip


def _why_two(state: MapState, twin: MapObject) -> str:
    """What explains that there are two, as the end of a sentence."""
    one = state.map
    mine, theirs = state.users(one.id), state.users(twin.id)
    both = [f"{user.id} {user.name}".strip() for user in mine if user in theirs]
    words = ""
    if both:
        words = f"; program {both[0]} uses both of them"
    elif {user.btf_id for user in mine} & {user.btf_id for user in theirs} - {0}:
        words = "; both are of one load"
    apart = {*state.outer(twin.id)} - {*state.outer(one.id)}
    if apart:
        words += f"; it stands in the map of maps {_listed(sorted(apart), _MOST_LISTED)}, this one"
        words += " does not"
    return words


def _is_generation(state: MapState) -> bool:
    """Whether a map was filled once, to be switched to as a whole: nobody puts a new key there."""
    return state.map.frozen and _switched(state, state.map_id)


def _switched(state: MapState, map_id: int) -> bool:
    """Whether programs find a map in a map of maps alone: then the next one is made beside it."""
    return bool(state.outer(map_id)) and not any(
        map_id in user.map_ids for user in state.users(map_id)
    )


def _shared_point(state: MapState, twin: MapObject) -> tuple[str, bool]:
    """A hook at which a program of each map decides, and whether the two have one name.

    Empty where there is none, or where the programs are of one load.
    """
    mine, theirs = state.users(state.map_id), state.users(twin.id)
    if {*mine} & {*theirs} or {one.btf_id for one in mine} & {one.btf_id for one in theirs} - {0}:
        return "", False

    def points(users: list[ProgramObject]) -> set[tuple[tuple[str, str, str], str]]:
        return {
            (at.point, user.name) for user in users for at in state.survey.of(user.id) if at.decides
        }

    ours, others = points(mine), points(theirs)
    shared = {point for point, _ in ours} & {point for point, _ in others}
    words = [" of ".join(filter(None, point)) for point in sorted(shared)]
    return next(iter(words), ""), bool(ours & others)


def _used(state: MapState, map_id: int) -> str:
    """Which programs use a map, and where they run, as a clause."""
    users = state.users(map_id)
    if not users:
        return "no program uses it"
    names, places = [], []
    for user in users[:_MOST_LISTED]:
        at = "; ".join(map(str, state.survey.of(user.id)[:_MOST_LISTED]))
        names.append(f"{user.id} {user.name}".strip())
        places.append((f"{user.id}: " if users[1:] else "") + (at or _without_place(state, user)))
    if more := len(users) - len(names):
        names.append(f"{more:,} more")
    this = "it" if map_id != state.map_id else "this one"
    use = f"programs {_listed(names)} use" if users[1:] else f"program {names[0]} uses"
    return f"{use} {this} ({'; '.join(places)})"


def _without_place(state: MapState, user: ProgramObject) -> str:
    """What to say of a program for which no place was found at which it runs."""
    standing, blind = state.survey.standing(user.id), state.survey.blind(user.id)
    if standing is Standing.NOWHERE:
        lost = _lost_link(state, user)
        return f"attached nowhere, {lost}" if lost else "attached nowhere"
    return blind if standing is Standing.HIDDEN else f"no attachment in sight, but {blind}"


def _lost_link(state: MapState, user: ProgramObject) -> str:
    """Which link of a program has lost its device, cgroup or map; or nothing."""
    lost = [one for one in state.survey.detached if one.program_id == user.id]
    return f"its {lost[0].kind} link {lost[0].id} has lost what it led from" if lost else ""


def _held(state: MapState, one: MapObject | ProgramObject) -> str:
    """Who holds an object, as a part of a sentence, and whether from another mount namespace."""
    holders = state.objects.holders(one)
    if not holders:
        return "held by no process and no pin"
    far = any(pinned.process_behind(pin) for pin in one.pins)
    return f"held by {_listed(holders, _MOST_LISTED)}" + (
        " (in another mount namespace)" if far else ""
    )


def _ends(state: MapState, old: int, new: int) -> str:
    """How the older load is ended at the hook that it shares with the newer one."""
    points = {at.point for user in state.users(new) for at in state.survey.of(user.id)}
    commands = [
        at.detach
        for user in state.users(old)
        for at in state.survey.of(user.id)
        if at.point in points and at.detach
    ]
    words = f"Let one load decide there, as a rule the newer one with map {new}"
    return f"{words}: {'; '.join(commands[:_MOST_LISTED])}." if commands else f"{words}."


def _is_constants(one: MapObject) -> bool:
    """Whether a map is a section of constants, such as .rodata, which a loader freezes."""
    by_flags = one.frozen and one.max_entries == 1 and bool(one.flags & MapFlag.RDONLY_PROG)
    return one.kind == "array" and (by_flags or ".rodata" in one.name or one.name == ".kconfig")


def _of_its_readers(state: MapState) -> Iterator[Diagnostic]:
    one = state.map
    users, outer = state.users(one.id), state.outer(one.id)
    if not users and one.kind not in _STREAMS | {"struct_ops"}:
        yield Diagnostic(
            "risk",
            "No program refers to this map, itself or through a map of maps.",
            "Look whether the program that should read it is loaded: bpftool prog show names the "
            "maps of each.",
            "second-map-after-reload",
        )
    if state.standing(one.id) is Standing.NOWHERE:
        yield _of_nowhere(state, users)
    elif state.standing(one.id) is Standing.UNKNOWN:
        yield Diagnostic(
            "risk",
            f"Of program {users[0].id} {users[0].name} no attachment is in sight, but "
            f"{state.survey.blind(users[0].id)}.",
            "Ask as root where all processes, cgroups and network namespaces are in sight: outside "
            "of containers.",
            "second-map-after-reload",
        )
    places = [at for user in users for at in state.survey.of(user.id)]
    if places and all(at.idle for at in places):
        yield Diagnostic(
            "risk",
            f"Nothing gets to a program that uses it as things stand: {places[0]}"
            + (f", and likewise at {len(places) - 1:,} more places." if places[1:] else "."),
            "Set the device up or put a process into the cgroup, or attach the program where the "
            "traffic is.",
        )
    if outer:
        yield Diagnostic(
            "risk",
            f"It is an element of the map of maps {_listed(outer)}: a program that looked that up "
            "before a switch goes on with the map that it found.",
            "Fill a new map for each generation, and wait for sleepable programs before an old one "
            "is filled again.",
            "switch-cost",
            usual=True,
        )
    if one.frozen:
        yield Diagnostic(
            "risk" if _is_constants(one) or _is_generation(state) else "cause",
            "It is frozen: user space cannot write to it, and programs may have its values "
            "compiled in.",
            "Set it before the program is loaded, or keep what changes in an ordinary map.",
            "rodata-folded",
            usual=_is_constants(one),
        )
    if one.flags & MapFlag.MMAPABLE:
        yield Diagnostic(
            "risk",
            "It may be mapped into memory: no hook on bpf(2) sees stores through a mapping, and "
            "the order of two of them is the writer's affair.",
            "Store the data before the flag that announces it, with release and acquire where the "
            "CPU is weakly ordered.",
            "mmap-msync",
            usual=True,
        )


def _of_nowhere(state: MapState, users: list[ProgramObject]) -> Diagnostic:
    """All programs that refer to the map are loaded, and none of them runs.

    Others can take a filter or the program of a cgroup away. What only its own process can end is
    perhaps not meant to be attached, as long as other programs of that load are.
    """
    names = _listed([f"{user.id} {user.name} ({user.kind})" for user in users[:_MOST_LISTED]])
    more = f", as are {len(users) - _MOST_LISTED} more" if users[_MOST_LISTED:] else ""
    lost = next(filter(None, (_lost_link(state, user) for user in users)), "")
    chosen = (
        not lost
        and all(user.kind in _ENDED_BY_HOLDER for user in users)
        and any(
            one.btf_id in {user.btf_id for user in users} - {0}
            and state.survey.standing(one.id) is Standing.ATTACHED
            for one in state.objects.programs.values()
        )
    )
    return Diagnostic(
        "risk" if chosen else "cause",
        f"Program{'s' if users[1:] else ''} {names} {'are' if users[1:] else 'is'} loaded and "
        f"attached nowhere{more}{lost and f' ({lost})'}: "
        + (
            "other programs of this load run, so that their process may have switched this off, "
            "or calls it by BPF_PROG_RUN."
            if chosen
            else "no packet, call or event leads to a program that uses this map, unless a process "
            "calls it by BPF_PROG_RUN."
        ),
        f"Attach it again ({_held(state, users[0])}), and look who took it away: an agent that "
        "starts, or a device that was made anew.",
        "second-map-after-reload",
    )


def _of_its_keys(state: MapState) -> Iterator[Diagnostic]:
    if state.snapshot is not None and state.map.kind in _HASHES | _LRU:
        yield from content.left_over_texts(state.snapshot.keys, state.key_fields)
        yield from content.other_byte_order(state.snapshot.keys, state.key_fields)
    if state.snapshot is not None and state.map.kind == "lpm_trie":
        yield from content.bits_behind_prefix(state.snapshot.keys)
    gaps = padding(state.key_dtype)
    if not gaps.any() or state.map.kind in _ARRAYS:
        return
    clear = "Set the whole key to zero before its fields, or declare the padding as fields."
    dirty = same = 0
    if state.snapshot is not None and len(state.snapshot):
        raw = content.bytes_of(state.snapshot.keys)
        dirty = int(raw[:, gaps].any(axis=1).sum())
        same = len(raw) - len(np.unique(raw[:, ~gaps], axis=0))
    if dirty:
        twice = f"; {same:,} are there once more, but for the padding" if same else ""
        yield Diagnostic(
            "cause",
            f"{dirty:,} of {len(state.snapshot or ()):,} keys have left-over bytes in the "
            f"{int(gaps.sum())} bytes of padding: whoever has other bytes there does not find "
            f"them{twice}.",
            clear + " Write the entries anew.",
            "padded-key",
        )
    else:
        yield Diagnostic(
            "risk",
            f"The key has {int(gaps.sum())} bytes of padding, which are compared and hashed like "
            "the rest.",
            clear,
            "padded-key",
            usual=True,
        )


def _of_its_room(state: MapState) -> Iterator[Diagnostic]:
    one, entries = state.map, _entries(state)
    share = entries / one.max_entries if entries and one.max_entries else 0.0
    full = f"{entries:,} of {one.max_entries:,} entries" if entries is not None else ""
    if one.kind in _LRU:
        yield Diagnostic(
            "risk",
            _of_evictions(state, full, share),
            "Take an absent key for unknown, not for denied; give it twice the entries that must "
            "stay, and 128 for each CPU.",
            "lru-eviction",
            usual=share < _ALMOST_FULL and not _is_small(one),
        )
    elif one.kind in _BOUNDED and share >= _ALMOST_FULL and one.max_entries > 1:
        error = "ENOSPC" if one.kind == "lpm_trie" else "E2BIG"
        left = one.max_entries - (entries or 0)
        made = left <= 0 and _is_made_to_measure(state)
        yield Diagnostic(
            "cause" if left <= 0 and not made and not _is_generation(state) else "risk",
            f"It is full ({full}): a new key is answered {error} and is not stored."
            + (" Perhaps it was made for just these: no program adds to it." if made else "")
            if left <= 0
            else f"It is almost full: {full}, room for {left:,} more; after them a new key is "
            f"answered {error} and is not stored.",
            "Heed the answer of each update, in programs too, and give the map more room.",
            "ignored-answers",
        )
    if one.kind in _HASHES and one.flags & MapFlag.NO_PREALLOC:
        yield Diagnostic(
            "risk",
            "It has no preallocated elements: an insertion may be answered ENOMEM, most of all in "
            "bursts with interrupts off.",
            "Heed the answer of each update, or preallocate.",
            "no-prealloc",
            usual=True,
        )


def _is_made_to_measure(state: MapState) -> bool:
    """Whether a full map looks like a list that was made for what stands in it.

    So does a service manager with the addresses of a unit, and a firewall with the elements of a
    set. No program that runs adds to it, and the room is no round number, or a short list of keys
    that say all by being there.
    """
    one = state.map
    room = one.max_entries
    if state.standing(one.id) is not Standing.ATTACHED or not all(
        each.followed and each.named for each in state.codes
    ):
        return False
    if any(call.map_id == one.id and call.does == "update"
           for each in state.codes for call in each.calls):  # fmt: skip
        return False
    is_round = room & (room - 1) == 0 or room % 10 == 0
    values = content.bytes_of(state.snapshot.values) if state.snapshot is not None else None
    return not is_round or (
        room <= _SHORT_LIST and values is not None and bool((values == values[:1]).all())
    )


def _of_evictions(state: MapState, full: str, share: float) -> str:
    one, cpus = state.map, libbpf.possible_cpus()
    apart = bool(one.flags & MapFlag.NO_COMMON_LRU)
    if share >= _ALMOST_FULL:
        words = f"With {full} it evicts keys that nobody deleted, to make room for new ones."
    else:
        words = "It is an LRU map: near its end it evicts keys that nobody deleted"
        words += ", and with lists for each CPU already at a CPU's share." if apart else "."
    if _is_small(one):
        words += (
            f" It is small, {one.max_entries:,} entries for {cpus} possible CPUs: each CPU keeps a "
            f"stock of free entries for itself, up to {_CPU_STOCK}, and one whose stock is used up "
            "evicts before the map is full."
        )
    return words


def _is_small(one: MapObject) -> bool:
    """Whether the stocks of the CPUs alone may hold all entries of an LRU map."""
    common = not one.flags & MapFlag.NO_COMMON_LRU
    return common and one.max_entries < _CPU_STOCK * libbpf.possible_cpus()


def _of_its_values(state: MapState) -> Iterator[Diagnostic]:
    one = state.map
    if state.snapshot is not None and one.kind in _HASHES | _LRU | _ARRAYS:
        values, gaps = state.snapshot.values, padding(state.value_dtype)
        yield from content.left_over_padding(values, gaps, per_cpu=one.kind in _PER_CPU)
    if state.locked:
        yield Diagnostic(
            "risk",
            "The value has a bpf_spin_lock, which a plain update or lookup passes by.",
            "Update and look up with BPF_F_LOCK.",
            "torn-reads",
            usual=True,
        )
    elif one.value_size > 8 and one.kind in _HASHES | _LRU | _ARRAYS:
        yield Diagnostic(
            "risk",
            f"A value of {one.value_size:,} bytes can be read half old and half new.",
            "Put a bpf_spin_lock into it and use BPF_F_LOCK, or a checksum, or switch a whole map.",
            "torn-reads",
            usual=True,
        )
    if one.kind in _PER_CPU:
        unlike = ""
        if state.snapshot is not None and len(state.snapshot):
            values = state.snapshot.values
            slots = content.bytes_of(values).reshape(len(values), values.shape[1], -1)
            differ = int((slots != slots[:, :1]).any(axis=(1, 2)).sum())
            unlike = (
                f" They are not alike in {differ:,} of {len(values):,} entries."
                if differ
                else f" They are alike in all {len(values):,} entries."
            )
        slot = -(-one.value_size // 8) * 8
        if one.value_size % 8:
            yield Diagnostic(
                "risk",
                f"A value has {one.value_size} bytes, and its slot takes {slot} bytes for each "
                "CPU: who hands over or reads the values side by side mixes up the CPUs, or goes "
                "on beyond the end of what was written.",
                f"Give bpf(2) {slot} bytes for each possible CPU, {slot * libbpf.possible_cpus()} "
                "here.",
                "per-cpu-stride",
                usual=True,
            )
        yield Diagnostic(
            "risk",
            "It has a value for each CPU: a program's update changes that of its own CPU alone, "
            f"bpf(2) writes all of them.{unlike}",
            "Read all slots and combine them, and write from one side only.",
            "per-cpu-slot",
            usual=True,
        )


def _of_its_kind(state: MapState) -> Iterator[Diagnostic]:
    kind = state.map.kind
    if kind in _HASHES:
        yield Diagnostic(
            "risk",
            "It is a hash: at the moment at which a key is overwritten, a program may find it "
            "absent, and an iteration may skip it.",
            "Look again once before you believe that a key is absent; read the map by batch.",
            "transient-null",
            usual=True,
        )
    elif kind in _STREAMS:
        yield Diagnostic(
            "risk",
            "It is a stream: it has no values that could be looked up, and loses what finds no "
            "room.",
            "Consume it, and count in the producer what was dropped.",
            _SHOWN_BY.get(kind, ""),
            usual=True,
        )


def padding(dtype: np.dtype[Any]) -> npt.NDArray[np.bool_]:
    """Which bytes of a layout belong to no field.

    Parameters
    ----------
    dtype : numpy.dtype
        Structured, nested or plain.

    Returns
    -------
    numpy.ndarray
        bool, shape ``(dtype.itemsize,)``.
    """
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return np.tile(padding(base), int(np.prod(shape)))
    if dtype.fields is None:
        return np.zeros(dtype.itemsize, np.bool_)
    gaps = np.ones(dtype.itemsize, np.bool_)
    for inner, at, *_ in dtype.fields.values():
        gaps[at : at + inner.itemsize] = padding(inner)
    return gaps


def _entries(state: MapState) -> int | None:
    if state.map.kind in _ARRAYS:
        return state.map.max_entries
    if state.content is not None:
        return state.content.counted
    return state.inside.taken if state.snapshot is None else len(state.snapshot)


def checked(state: MapState) -> list[str]:
    """What a diagnosis of this map rests on, in words."""
    found = ["its type, flags, layout, holders and pins, and the programs that refer to it"]
    if state.content is not None:
        found.append(str(state.content))
    elif state.inside.taken is not None:
        found.append(f"what is in force: {_room(state)}")
    if followed := [str(one.program.id) for one in state.codes if one.followed]:
        found.append(f"the instructions of program {_listed(followed)}")
    return found


def unseen(state: MapState) -> list[str]:
    """What could not be looked at, in words."""
    one, found = state.map, []
    if state.refused:
        found.append(f"its entries: the kernel answered {state.refused}")
    elif one.kind in _READ and state.content is None:
        found.append(f"its entries: a value has {one.value_size:,} bytes, too many to be read")
    if state.content is not None:
        if not state.content.whole:
            found.append("what lies behind the entries that were counted: time was up")
        if not state.key_fields and one.kind in _HASHES | _LRU:
            found.append("the fields of its keys: no BTF tells them")
        if state.value_dtype.kind == "V" and not state.value_dtype.names:
            found.append(
                "the fields of its values: no BTF tells them, or it has unions or bit fields"
            )
    return [*found, *kinds.unseen(one, state.inside), *code.unseen(state.codes)]


# -- words -------------------------------------------------------------------------------


def _heading(state: MapState) -> list[str]:
    one = state.map
    lines = [
        f"map {one.id} {one.name or '(no name)'}: {one.kind}, key {one.key_size} B, "
        f"value {one.value_size} B, {_room(state)}, {one.memlock_bytes:,} B of memory",
        f"  held by  {', '.join(state.objects.holders(one)) or 'no process and no pin in sight'}",
    ]
    lines += [f"  pinned   {pin}" for pin in state.pinned]
    lines += [f"  inside   {words}" for words in kinds.described(one, state.inside, state.objects)]
    users = state.users(one.id)
    for user in users[:_MOST_USERS]:
        head = f"  used by  program {user.id} {user.name} ({user.kind})"
        places = state.survey.of(user.id)
        if not places:
            lines.append(f"{head}: {_without_place(state, user)}")
            continue
        lines.append(head)
        for at in places[:_MOST_USERS]:
            lines.append(f"           at  {at}")
            if at.detach:
                lines.append(f"               ends by  {at.detach}")
        if more := len(places[_MOST_USERS:]):
            lines.append(f"           at  {more:,} more places")
    if more := len(users[_MOST_USERS:]):
        lines.append(f"  used by  {more:,} more programs")
    return lines if users else [*lines, "  used by  no program"]


def _room(state: MapState) -> str:
    one, entries = state.map, _entries(state)
    unit = kinds.unit(one.kind)
    if entries is None or not one.max_entries:
        words = f"room for {one.max_entries:,} {unit}" if one.max_entries else "no fixed room"
        return words if entries is None else f"{entries:,} {unit}, {words}"
    more = (state.content is not None and not state.content.whole) or not state.inside.complete
    return f"{entries:,}{' or more' if more else ''} of {one.max_entries:,} {unit}"


def _extent(state: MapState) -> Iterator[str]:
    for title, words in (("checked", checked(state)), ("unseen", unseen(state))):
        if words:
            yield titled(title, "; ".join(words) + ".")


def titled(title: str, words: str) -> str:
    """Words behind a title, such as ``checked``, for a terminal."""
    return _filled(words, f"  {title:7}  ")


def paragraph(diagnostic: Diagnostic) -> str:
    """A diagnostic for a terminal; the command that shows it can be pasted as it stands."""
    margin = " " * 9
    lines = [_filled(diagnostic.says, f"  {diagnostic.weight:5}  "), _filled(diagnostic.do, margin)]
    if diagnostic.experiment:
        lines.append(f"{margin}shown by  python -m labkit run {diagnostic.experiment}")
    return "\n".join(lines)


def _filled(words: str, first: str) -> str:
    return textwrap.fill(
        words, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first),
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
