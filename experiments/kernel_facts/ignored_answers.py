"""Updates that vanish without an error, for those who do not read the answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import BadInput
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment

_MOST_KEYS = 4_000

Answers = npt.NDArray[np.int64]


def _derived(tables: Tables) -> Tables:
    """The answers of all rounds."""
    asked = tables["replies"].groupby(["writer", "room", "answer"])["times"]
    return {"answers": asked.sum().reset_index()}


@experiment(
    "ignored-answers",
    number=54,
    family="kernel-facts",
    question="Do updates vanish without an error, or is the error there and nobody looks?",
    claims=("1.3c",),
    needs=("bpf", "compile", "test_run", "hash"),
    quick={"keys": 1_000, "rounds": 5},
    full={"keys": 4_000, "rounds": 20},
    cases=(
        Case("broken", "user-ignored", "user space, answer ignored", writer="user"),
        Case("fixed", "user-heeded", "user space, answer heeded", beside="user-ignored"),
        Case("control", "user-fits", "user space, answer ignored, all fit", writer="user"),
        Case("broken", "program-ignored", "program, answer ignored", writer="program"),
        Case("fixed", "program-heeded", "program, answer heeded", beside="program-ignored"),
        Case("control", "program-fits", "program, answer ignored, all fit", writer="program"),
    ),
    counted=Counted("key believed wrongly", operations="keys", anomalies="wrong"),
    derive=_derived,
    statements=(
        Statement("who ignores answers believes in keys that are not there", "some(broken)"),
        Statement("each of them was answered E2BIG, to user space and to the program",
                  "all(answers(answer != 0).answer == -7)"
                  " and sum(answers(answer != 0, writer='user').times)"
                  " == broken['user-ignored'].anomalies"
                  " and sum(answers(answer != 0, writer='program').times)"
                  " == broken['program-ignored'].anomalies"),
        Statement("who heeds them knows what is there", "none(fixed)"),
        Statement("where all fit, none is missing", "none(control)"),
    ),
    sentence="Of {broken.operations} keys that were stored without a look at the answer, "
    "{broken.anomalies} were not in the map; {sum(answers(answer=-7).times)} had been answered "
    "E2BIG. Who heeded the answers was wrong about {fixed.anomalies}.",
)  # fmt: skip
def ignored_answers(case: Case, *, keys: int) -> list[dict[str, Any]]:
    """Store keys in a map that has room for half of them, or in one that has room for all.

    A full hash table answers E2BIG to a new key (kernel/bpf/hashtab.c, ``alloc_htab_elem``), to
    the system call and to a program alike; the helper returns it as a negative number.

    Parameters
    ----------
    case : Case
        Who stores them, and whether all fit.
    keys : int
        Keys that are stored; 2 to 4,000.

    Returns
    -------
    list of dict
        ``keys``, and ``wrong``, those of which the writer believes something else than the map
        holds: who ignores answers believes that every key is there. ``replies``: ``writer``,
        ``room``, ``answer`` (0 or minus the errno), ``times``.
    """
    if not 2 <= keys <= _MOST_KEYS:
        raise BadInput(f"keys of ignored-answers are 2 to {_MOST_KEYS:,}, not {keys:,}.")
    room = keys if case.variant == "control" else keys // 2
    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=room) as table:
        given = (_by_user if case.writer == "user" else _by_program)(table, keys)
        there = np.isin(np.arange(keys), table.snapshot().keys)
    answers, times = np.unique(given, return_counts=True)
    replies = pd.DataFrame({"writer": case.writer, "room": room, "answer": answers, "times": times})
    observed = {"keys": keys, "wrong": int((~there).sum()), "replies": replies}
    if case.variant == "control":
        return [observed]
    heeded = {"case": f"{case.writer}-heeded", "keys": keys}
    return [observed, {**heeded, "wrong": int(((given == 0) != there).sum())}]


def _by_user(table: Map, keys: int) -> Answers:
    update = libbpf.api().bpf_map_update_elem
    key, value = np.zeros(1, np.uint32), np.zeros(1, np.uint64)
    key_at, value_at, answers = key.ctypes.data, value.ctypes.data, np.zeros(keys, np.int64)
    for number in range(keys):
        key[0] = value[0] = number
        answers[number] = update(table.fd, key_at, value_at, 0)
    return answers


def _by_program(table: Map, keys: int) -> Answers:
    with programs.load("ignored_answers", TABLE_FD=table.fd, KEYS=keys) as loaded:
        loaded.program("store").test_run(repeat=keys)
        answers: Answers = loaded.map("answers", value="i8").snapshot().values
        return answers
