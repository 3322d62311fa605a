"""All maps of a machine: which of them keep a reader from its newest values, in a bounded time.

The objects are listed once, and what runs the programs is asked once. Each map then gets its share
of the time that is left, so that a large one takes none from the others; of what is read only the
verdict is kept. A cause is told when a second look shows it too: a tool that is just being started
has its programs loaded and not yet attached.
"""

from __future__ import annotations

import errno
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from labkit.inspect import code, kinds
from labkit.inspect.code import Code
from labkit.inspect.diagnose import Diagnosis, examine, paragraph, titled
from labkit.inspect.diagnostic import Diagnostic, listed
from labkit.inspect.prometheus import Metric
from labkit.kernel import attachments, objects
from labkit.kernel.maps import MapError
from labkit.kernel.objects import MapObject, Objects

MOST_SECONDS: Final = 10.0
"""For a whole machine, from the list of its objects on."""

MOST_ENTRIES: Final = 4_096
"""So many entries of each map are read; those behind them are counted as long as its time lasts."""

_SHORTEST_S: Final = 0.002  # for one map, however many there are
_LONGEST_S: Final = 1.0
_FOR_PROGRAMS: Final = 0.3  # share of the time
_FOR_MAPS: Final = 0.3
_AGAIN_AFTER_S: Final = 0.5
_AT_ONCE: Final = 32  # maps whose look waits
_WAITS: Final = kinds.RINGS | {"prog_array"}
_MOST_TOLD: Final = 20
_MOST_NAMED: Final = 6
_MOST_IN_JSON: Final = 2_000
_MOST_SERIES: Final = 100


@dataclass(frozen=True)
class DiagnosedMap:
    """What is to be said of one map: the causes first.

    Attributes
    ----------
    map : MapObject
        The map.
    held_by : tuple of str
        Processes and pins.
    diagnostics : tuple of Diagnostic
        As of `labkit.inspect.diagnose.Diagnosis`.
    whole : bool
        Whether its entries were read, or at least counted, to the end.
    """

    map: MapObject
    held_by: tuple[str, ...]
    diagnostics: tuple[Diagnostic, ...]
    whole: bool = True

    @classmethod
    def of(cls, found: Diagnosis) -> DiagnosedMap:
        """What is kept of a diagnosis; its entries are let go."""
        state = found.state
        counted = state.content is None or state.content.whole
        return cls(
            state.map,
            tuple(state.objects.holders(state.map)),
            found.diagnostics,
            counted and state.inside.complete and not state.refused,
        )

    def some(self, weight: str) -> list[Diagnostic]:
        """Its causes; or its risks, but for those that every map of its kind has."""
        return [one for one in self.diagnostics if one.weight == weight and not one.usual]

    @property
    def state(self) -> str:
        """``cause``, ``risk`` or ``healthy``."""
        return next((weight for weight in ("cause", "risk") if self.some(weight)), "healthy")

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "map": {name: getattr(self.map, name) for name in ("id", "name", "kind")},
            "held_by": list(self.held_by),
            "diagnostics": [asdict(one) for one in self.diagnostics],
            "whole": self.whole,
        }


@dataclass(frozen=True)
class Machine:
    """What was found out about the maps of a machine.

    Attributes
    ----------
    maps : tuple of DiagnosedMap
        Of each map that was looked at, by ascending id.
    not_reached : tuple of int
        Ids of the maps for which there was no time.
    refused : mapping from int to str
        Why a map could not be opened, by its id.
    programs, links : int
        How many there are.
    unseen : tuple of str
        What could not be looked at of the machine, as clauses.
    seconds : float
        How long it took.
    """

    maps: tuple[DiagnosedMap, ...]
    not_reached: tuple[int, ...] = ()
    refused: Mapping[int, str] = field(default_factory=dict)
    programs: int = 0
    links: int = 0
    unseen: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def has_cause(self) -> bool:
        """Whether any map has a cause."""
        return any(one.state == "cause" for one in self.maps)

    def of(self, state: str) -> list[DiagnosedMap]:
        """The maps that are ``cause``, ``risk`` or ``healthy``."""
        return [one for one in self.maps if one.state == state]

    def __str__(self) -> str:
        """The causes, then the risks, then how many maps are healthy, for a terminal."""
        count = len(self.maps) + len(self.not_reached) + len(self.refused)
        lines = [
            f"this machine: {count:,} maps, {self.programs:,} programs and {self.links:,} links, "
            f"looked at in {self.seconds:.1f} s"
        ]
        for weight in ("cause", "risk"):
            groups = _alike(self.maps, weight)
            lines += [paragraph(one) for one in groups[:_MOST_TOLD]]
            if len(groups) > _MOST_TOLD:
                lines.append(f"  {weight:5}  {len(groups) - _MOST_TOLD:,} more: --json has them.")
        return "\n".join([*lines, *(titled(*one) for one in self._rest())])

    def _rest(self) -> Iterator[tuple[str, str]]:
        yield (
            "healthy",
            f"{len(self.of('healthy')):,} of {len(self.maps):,} maps: no cause, and no risk "
            "but what all maps of their kind have.",
        )
        yield (
            "checked",
            "the type, flags, layout, holders and programs of each map, and what stands in it: of "
            f"its entries the first {MOST_ENTRIES:,}. python -m labkit diagnose MAP looks further.",
        )
        if self.not_reached:
            yield "unseen", f"there was no time for maps {listed(self.not_reached, _MOST_NAMED)}."
        if self.refused:
            why = next(iter(self.refused.values()))
            yield (
                "unseen",
                f"maps {listed([*self.refused], _MOST_NAMED)} could not be looked at ({why}).",
            )
        if cut := [one.map.id for one in self.maps if not one.whole]:
            yield "unseen", f"the entries of maps {listed(cut, _MOST_NAMED)} were not all counted."
        for words in self.unseen:
            yield "unseen", f"{words}."

    def as_json(self) -> dict[str, Any]:
        """The same for scripts; maps without cause and risk are counted alone."""
        told = [*self.of("cause"), *self.of("risk")]
        return {
            "maps": len(self.maps) + len(self.not_reached) + len(self.refused),
            "programs": self.programs,
            "links": self.links,
            "seconds": round(self.seconds, 3),
            "states": self._states(),
            "found": [one.as_json() for one in told[:_MOST_IN_JSON]],
            "left_out": max(0, len(told) - _MOST_IN_JSON),
            "not_reached": list(self.not_reached),
            "refused": {str(id): why for id, why in self.refused.items()},
            "not_counted": [one.map.id for one in self.maps if not one.whole],
            "unseen": list(self.unseen),
        }

    def _states(self) -> dict[str, int]:
        counts = {state: len(self.of(state)) for state in ("cause", "risk", "healthy")}
        return {**counts, "not_reached": len(self.not_reached), "refused": len(self.refused)}

    def as_metrics(self, asked: str = "") -> list[Metric]:
        """The same for `labkit.inspect.prometheus.write`, in a bounded number of series.

        Parameters
        ----------
        asked : str
            What the user named, so that the files of two questions do not contradict each other;
            empty for the whole machine.
        """
        of = {"asked": asked}
        diagnostics = Counter(
            (one.weight, one.experiment)
            for each in self.maps
            for one in each.diagnostics
            if not one.usual
        )
        told = self.of("cause") if not asked else [*self.maps]
        return [
            Metric(
                "labkit_diagnose_maps", "gauge", "Maps, by what the last diagnosis came to.",
                [({**of, "state": state}, count) for state, count in self._states().items()],
            ),
            Metric(
                "labkit_diagnose_diagnostics", "gauge",
                "Causes and risks of the last diagnosis, by the experiment that shows them.",
                [({**of, "weight": weight, "experiment": experiment}, count)
                 for (weight, experiment), count in sorted(diagnostics.items())],
            ),
            Metric(
                "labkit_diagnose_map_causes", "gauge",
                "Causes of a map: of the first maps that have any, or of the map that was named.",
                [({**of, "map": one.map.name, "map_id": str(one.map.id), "kind": one.map.kind},
                  len(one.some("cause"))) for one in told[:_MOST_SERIES]],
            ),
            Metric(
                "labkit_diagnose_run_timestamp_seconds", "gauge", "When the last diagnosis ended.",
                [(of, time.time())],
            ),
        ]  # fmt: skip


def diagnose_machine(most_seconds: float = MOST_SECONDS) -> Machine:
    """Look at all maps of the machine, and say what may make any of them look stale.

    Parameters
    ----------
    most_seconds : float
        Bound of all of it, seconds, as long as the lists of objects and attachments, which have
        bounds of their own, take no more than most of it.

    Returns
    -------
    Machine
        What was found, and what there was no time for.

    Raises
    ------
    Unavailable
        This user may not look at BPF objects.
    """
    begun = time.monotonic()
    now = objects.snapshot()
    look = _Look(now)
    # However long the lists took, which have bounds of their own, some maps are looked at.
    lists_s = time.monotonic() - begun
    look.at(list(now.maps), max(most_seconds - lists_s, _FOR_MAPS * most_seconds))
    suspects = [id for id, one in look.found.items() if one.state == "cause"]
    if suspects and look.left_s > _AGAIN_AFTER_S + lists_s:
        time.sleep(_AGAIN_AFTER_S)
        look.again(suspects)
    return Machine(
        tuple(look.found[id] for id in sorted(look.found)),
        tuple(look.not_reached),
        look.refused,
        len(now.programs),
        len(now.links),
        (*look.where.unseen.values(), *code.unseen(look.codes)),
        time.monotonic() - begun,
    )


class _Look:
    """The maps, as they are diagnosed."""

    def __init__(self, now: Objects) -> None:
        self._deadline = 0.0
        self.found: dict[int, DiagnosedMap] = {}
        self.refused: dict[int, str] = {}
        self.not_reached: list[int] = []
        self.codes: list[Code] = []
        self._enter(now)

    def _enter(self, now: Objects) -> None:
        self._now, self.where = now, attachments.survey(now)

    @property
    def left_s(self) -> float:
        """Seconds for which it goes on."""
        return self._deadline - time.monotonic()

    def at(self, ids: Sequence[int], most_seconds: float) -> None:
        """Look at maps; those whose look waits are looked at side by side meanwhile."""
        self._deadline = time.monotonic() + most_seconds
        self.codes = code.look(
            self._now.programs.values(), self._now.maps, _FOR_PROGRAMS * most_seconds
        )
        waiting = [id for id in ids if self._now.maps[id].kind in _WAITS]
        with ThreadPoolExecutor(_AT_ONCE, "maps that wait") as pool:
            asked = [pool.submit(self._one, id, _LONGEST_S) for id in waiting]
            rest = [id for id in ids if self._now.maps[id].kind not in _WAITS]
            for turn, id in enumerate(rest):
                share_s = self.left_s / (len(rest) - turn)
                self._one(id, min(max(share_s, _SHORTEST_S), _LONGEST_S))
            for one in asked:
                one.result()
        self.not_reached.sort()

    def again(self, ids: Sequence[int]) -> None:
        """Look at maps with a cause once more, as things stand now; one that is gone has none."""
        self._enter(objects.snapshot())
        for id in ids:
            if self.left_s <= 0:
                return
            first = self.found.pop(id)
            if id in self._now.maps:
                self._one(id, _LONGEST_S)
            if id in self.not_reached:  # time was up in between
                self.not_reached.remove(id)
                self.found[id] = first

    def _one(self, id: int, most_seconds: float) -> None:
        if self.left_s <= 0:
            self.not_reached.append(id)
            return
        try:
            found = examine(id, self._now, self.where, MOST_ENTRIES, most_seconds)
        except MapError as error:
            if error.errno != errno.ENOENT:  # else it has gone meanwhile
                self.refused[id] = str(error)
        else:
            self.found[id] = DiagnosedMap.of(found)


def _alike(maps: Iterable[DiagnosedMap], weight: str) -> list[Diagnostic]:
    """Each cause or risk once, with the maps that have it in front of its words.

    What is the same but for numbers is told of the first map, and counted for the others.
    """
    groups: dict[tuple[str, ...], list[tuple[MapObject, Diagnostic]]] = {}
    for one in maps:
        for found in one.some(weight):
            alike = found.says if weight == "cause" else found.experiment
            key = (alike, re.sub(r"\d[\d,]*", "#", found.do))
            groups.setdefault(key, []).append((one.map, found))
    told = []
    for group in groups.values():
        (first, found), others = group[0], group[1:]
        same = all(each.says == found.says for _, each in others)
        if others and same:
            head = f"maps {_named([one for one, _ in group])}"
        else:
            head = f"map {_named([first])}"
        words = f"{head}: {found.says}"
        if others and not same:
            more = _named([one for one, _ in others])
            words += f" {len(others):,} more maps have a risk of that kind: {more}."
        told.append(replace(found, says=words))
    return told


def _named(maps: Sequence[MapObject]) -> str:
    return listed([f"{one.id} {one.name}".strip() for one in maps], _MOST_NAMED)
