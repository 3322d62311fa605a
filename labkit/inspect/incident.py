"""Collect an incident while it lasts: who holds what, what is wrong, who changes what right now."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

import labkit
from labkit.errors import BadInput, LabError
from labkit.inspect import bundle
from labkit.inspect.diagnose import MOST_MAPS, diagnose, map_ids
from labkit.inspect.machine import diagnose_machine
from labkit.inspect.watch import Watch
from labkit.inspect.watch_output import Output
from labkit.inspect.whole_file import require_writable
from labkit.kernel import objects, probe
from labkit.kernel.maps import Map
from labkit.kernel.objects import Objects
from labkit.kernel.provenance import provenance

_MOST_EVENTS: Final = 6 << 20  # bytes; so that all documents together stay below what is read
_MOST_OBJECTS: Final = 3 << 20  # bytes, of each kind
_MOST_ANSWERS: Final = 6 << 20
_MOST_TEXT: Final = 1 << 20
_STEP_S: Final = 0.2


def incident(
    path: str,
    names: Sequence[str] = (),
    *,
    seconds: float = 10.0,
    say: Callable[[str], object] = print,
) -> None:
    """Put all that may explain a stale map into one file, for somebody on another machine.

    Keys and values of the maps that are named are part of it; of a whole machine only the few that
    a diagnostic shows.

    Parameters
    ----------
    path : str
        The file, written whole in the end or not at all; only its owner may read it.
    names : sequence of str
        Ids, paths of pins, or names of maps. None: the whole machine.
    seconds : float
        For which the maps are watched.
    say : callable
        Takes a sentence before each part.

    Raises
    ------
    BadInput
        There is no such map, there are too many of the name, or the file cannot be written.
    Unavailable
        This user may not look at BPF objects.
    LabError
        The file could not be written in the end.
    """
    require_writable(path)
    now = objects.snapshot()
    ids = list(dict.fromkeys(id for name in names for id in map_ids(name, now)))
    if len(ids) > MOST_MAPS:
        raise BadInput(f"{len(ids):,} maps are meant, and {MOST_MAPS} go into one file: name less.")
    say(f"Diagnosing {'maps ' + ', '.join(map(str, ids)) if ids else 'the whole machine'}.")
    diagnosis = _diagnosis(ids)
    say(f"Watching for {seconds:g} s.")
    watched = _watched(ids, seconds)
    say("Trying what this kernel can do.")
    doctor, _ = probe.doctor(json=True)
    bundle.write(
        path,
        {
            "incident": {
                "format": bundle.FORMAT,
                "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "labkit": labkit.__version__,
                "asked": [f"{id} {now.maps[id].name}".strip() for id in ids],
            },
            "objects": _objects(now),
            "diagnosis": diagnosis,
            "watch": watched,
            "doctor": json.loads(doctor),
            "provenance": provenance(),
        },
    )


def _objects(now: Objects) -> dict[str, Any]:
    kinds: dict[str, Any] = {"maps": now.maps, "programs": now.programs, "links": now.links}
    left_out = 0
    for kind, some in kinds.items():
        kinds[kind], left = _bounded(map(asdict, some.values()), _MOST_OBJECTS)
        left_out += left
    holders, left = _bounded(
        ({"pid": pid, "name": name} for pid, name in now.processes.items()), _MOST_OBJECTS
    )
    return {**kinds, "processes": holders, "left_out": left_out + left}


def _diagnosis(ids: Sequence[int]) -> dict[str, Any]:
    if not ids:
        machine = diagnose_machine()
        text, has_cause, answers = str(machine), machine.has_cause, [machine.as_json()]
        found = answers[0]["found"]
        answers[0]["found"], left = _bounded(found, _MOST_ANSWERS)
        answers[0]["left_out"] += left
    else:
        each = [one for id in ids for one in diagnose(str(id))]
        text, has_cause = "\n\n".join(map(str, each)), any(one.has_cause for one in each)
        answers, _ = _bounded((one.as_json() for one in each), _MOST_ANSWERS)
    return {"text": text[:_MOST_TEXT], "has_cause": has_cause, "answers": answers}


def _watched(ids: Sequence[int], seconds: float) -> dict[str, Any]:
    """Changes told and found in a time; why there are none where they cannot be watched."""
    about: dict[str, Any] = {
        "seconds": seconds, "maps": [], "mechanism": "", "blind": "", "unavailable": "",
        "told": 0, "dropped": 0, "refused": 0, "found": 0, "left_out": 0, "events": [],
    }  # fmt: skip
    try:
        with ExitStack() as stack:
            tables = [stack.enter_context(Map.from_id(id)) for id in ids]
            watch, out = stack.enter_context(Watch(*tables)), Output(several=len(tables) != 1)
            events, left = _bounded(_told(watch, out, seconds), _MOST_EVENTS)
            return {
                **about,
                "maps": [repr(one) for one in tables],
                "mechanism": watch.mechanism,
                "blind": watch.blind,
                "told": watch.seen,
                "dropped": watch.dropped,
                "refused": watch.refused,
                "found": watch.found,
                "left_out": left,
                "events": events,
            }
    except LabError as error:
        return {**about, "unavailable": str(error)}


def _told(watch: Watch, out: Output, seconds: float) -> Iterable[dict[str, Any]]:
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        for one in watch.poll(min(left, _STEP_S)):
            yield out.as_dict(one) | {"line": out.line(one)}
    for one in watch.end():
        yield out.as_dict(one) | {"line": out.line(one)}


def _bounded(items: Iterable[dict[str, Any]], most_bytes: int) -> tuple[list[dict[str, Any]], int]:
    """The first of some items, as many as find room in a document; and how many are left out."""
    kept: list[dict[str, Any]] = []
    size = left_out = 0
    for one in items:
        size += len(json.dumps(one, indent=1)) if not left_out else 0
        if size <= most_bytes:
            kept.append(one)
        else:
            left_out += 1
    return kept, left_out
