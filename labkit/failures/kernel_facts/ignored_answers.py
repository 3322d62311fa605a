"""Updates that vanish without an error, for those who do not read the answer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput
from labkit.failures.experiment import Tables, experiment
from labkit.kernel import libbpf, programs
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map

_MOST_KEYS = 4_000

Answers = npt.NDArray[np.int64]


@experiment(
    "ignored-answers",
    number=54,
    family="kernel-facts",
    question="Do updates vanish without an error, or is the error there and nobody looks?",
    claims=("1.3c",),
    needs=("bpf", "compile", "test_run", "hash"),
    quick={"keys": 1_000, "rounds": 5},
    full={"keys": 4_000, "rounds": 20},
)
def ignored_answers(*, keys: int, rounds: int) -> Tables:
    """Store keys in a map that has room for half of them, and in one that has room for all.

    A full hash table answers E2BIG to a new key (kernel/bpf/hashtab.c, ``alloc_htab_elem``), to
    the system call and to a program alike; the helper returns it as a negative number.

    Parameters
    ----------
    keys : int
        Keys that are stored; 4,000 at most.
    rounds : int
        Maps that are filled in each setting.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a key, an anomaly one of which the writer believes something
        else than the map holds: who ignores answers believes that every key is there.
        ``answers``: ``writer``, ``room``, ``answer`` (0 or minus the errno), ``times``.
    """
    if not 2 <= keys <= _MOST_KEYS:
        raise BadInput(f"keys of ignored-answers are 2 to {_MOST_KEYS:,}, not {keys:,}.")
    triad, rows = Triad("key believed wrongly"), []
    for writer, write in (("user space", _by_user), ("program", _by_program)):
        for room in (keys // 2, keys):
            answers, wrong_ignored, wrong_heeded = [], 0, 0
            for _ in range(rounds):
                with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=room) as table:
                    given = write(table, keys)
                    there = np.isin(np.arange(keys), table.snapshot().keys)
                answers.append(given)
                wrong_ignored += int((~there).sum())
                wrong_heeded += int(((given == 0) != there).sum())
            rows += [
                {"writer": writer, "room": room, "answer": int(answer), "times": int(times)}
                for answer, times in zip(*np.unique(answers, return_counts=True), strict=True)
            ]
            settings = (
                (("control", "answer ignored, all fit", wrong_ignored),)
                if room == keys
                else (
                    ("broken", "answer ignored", wrong_ignored),
                    ("fixed", "answer heeded", wrong_heeded),
                )
            )
            for variant, case, wrong in settings:
                triad.add(variant, case=f"{writer}, {case}", operations=keys * rounds,
                          anomalies=wrong)  # fmt: skip
    return {"counts": triad.table(), "answers": pd.DataFrame(rows)}


def _by_user(table: Map, keys: int) -> Answers:
    update = libbpf.api().bpf_map_update_elem
    key, value = np.zeros(1, np.uint32), np.zeros(1, np.uint64)
    key_at, value_at, answers = key.ctypes.data, value.ctypes.data, np.zeros(keys, np.int64)
    for number in range(keys):
        key[0] = value[0] = number
        answers[number] = update(table.fd, key_at, value_at, 0)
    return answers


def _by_program(table: Map, keys: int) -> Answers:
    with programs.load("ignored_answers", TABLE_FD=table.fd, KEYS=keys) as unit:
        unit.function("store").test_run(repeat=keys)
        answers: Answers = unit.map("answers", value="i8").snapshot().values
        return answers
