"""Policies that are keyed by a 32-bit hash of a path: how many paths get another one's."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.analysis.runs import Triad
from labkit.errors import BadInput
from labkit.failures.experiment import Tables, experiment, say
from labkit.kernel.libbpf import MapFlag, MapKind
from labkit.kernel.maps import Map

_HALF = 77_163  # random 32-bit keys of which two agree with probability 1/2
_FEW = 1_000
_PATH_BYTES = 24
_FNV_START, _FNV_FACTOR = 0x811C9DC5, 0x01000193  # FNV-1a, 32 bit
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", np.uint8)
_COMPARED = np.dtype([("path", f"S{_PATH_BYTES}"), ("action", "u8")])
_MOST_PATHS = 4_000_000

Paths = npt.NDArray[np.bytes_]


@experiment(
    "path-hash",
    number=35,
    family="kernel-facts",
    question="Is a policy found by a 32-bit hash of a path always the policy of that path?",
    claims=("5.5",),
    needs=("bpf", "batch_hash", "no_prealloc"),
    quick={"paths": 300_000, "rounds": 16, "seed": 35},
    full={"paths": 2_000_000, "rounds": 200, "seed": 35},
)
def path_hash(*, paths: int, rounds: int, seed: int) -> Tables:
    """Store policies under the FNV-1a hash of their paths, and look each path's policy up.

    Of n random keys of 32 bits about n * n / 2**33 share theirs with an earlier one; two of
    them do with probability 1/2 at 77,163 keys. A map keeps one value a key, so the later
    policy takes the place of the earlier, and nothing answers an error.

    Parameters
    ----------
    paths : int
        Random paths of the large table; 4,000,000 at most.
    rounds : int
        Tables of 77,163 random paths, each made anew.
    seed : int
        Of the paths.

    Returns
    -------
    dict of DataFrame
        ``counts``: an operation is a path that is looked up, an anomaly one that is given
        the policy of another path. ``cost_ns`` is the time to store one policy. ``ways``: ``way``,
        ``paths``, ``stored`` (entries of the map), ``wrong``, ``unserved`` (paths that were
        told to have no policy), ``key_bytes``, ``value_bytes`` (int64). ``sizes``: ``paths``,
        ``collisions`` (paths whose key was taken already, as the map has it), ``expected``.
        ``birthdays``: one row per round with ``round`` and ``collisions``.
    """
    if paths > _MOST_PATHS:
        raise BadInput(f"paths of path-hash are {_MOST_PATHS:,} at most, not {paths:,}.")
    random, triad = np.random.default_rng(seed), Triad("policy of another path")
    many = _random_paths(random, paths)
    ways = []
    for variant, way, keys, store in (
        ("broken", "32-bit hash as key", many, _by_hash),
        ("control", "32-bit hash as key, few paths", many[:_FEW], _by_hash),
        ("fixed", "32-bit hash as key, path compared", many, _compared),
        ("fixed", "path as key", many, _by_path),
    ):
        say(f"{len(keys):,} paths, {way}")
        row = store(keys)
        ways.append({"way": way, "paths": len(keys), **row})
        triad.add(variant, case=way, operations=len(keys), anomalies=row["wrong"],
                  cost_ns=row.pop("store_ns"))  # fmt: skip
        ways[-1].pop("store_ns")
    say(f"{rounds} tables of {_HALF:,} paths")
    birthdays = [
        {"round": number, "collisions": _collisions(_random_paths(random, _HALF))}
        for number in range(rounds)
    ]
    sizes = [
        {"paths": size, "collisions": _collisions(many[:size]), "expected": _expected(size)}
        for size in np.geomspace(paths / 32, paths, 6).astype(int).tolist()
    ]
    return {
        "counts": triad.table(),
        "ways": pd.DataFrame(ways),
        "sizes": pd.DataFrame(sizes),
        "birthdays": pd.DataFrame(birthdays),
    }


def _expected(paths: int) -> float:
    """Keys of 32 bits that are taken already, of so many random ones, in the mean."""
    slots = 2.0**32
    return float(paths - slots * -np.expm1(paths * np.log1p(-1 / slots)))


def _random_paths(random: np.random.Generator, count: int) -> Paths:
    """Distinct paths such as ``/v1/3f9k2m...``."""
    letters = random.choice(_LETTERS, (count, _PATH_BYTES))
    letters[:, :4] = np.frombuffer(b"/v1/", np.uint8)
    paths: Paths = letters.view(f"S{_PATH_BYTES}").ravel()
    return paths


def _hashed(paths: Paths) -> npt.NDArray[np.uint32]:
    """FNV-1a of every path: the bytes one after the other, all paths at once."""
    letters = np.ascontiguousarray(paths).view(np.uint8).reshape(len(paths), _PATH_BYTES)
    hashed = np.full(len(paths), _FNV_START, np.uint32)
    for column in letters.T:
        hashed ^= column
        hashed *= np.uint32(_FNV_FACTOR)
    return hashed


def _table(key: npt.DTypeLike, value: npt.DTypeLike, entries: int) -> Map:
    return Map.create(
        MapKind.HASH, key=key, value=value, max_entries=entries, flags=MapFlag.NO_PREALLOC,
        name="policies",
    )  # fmt: skip


def _collisions(paths: Paths) -> int:
    """Paths whose key another one had taken: those that the map has no entry for."""
    with _table("u4", "u8", len(paths)) as table:
        table.update_many(_hashed(paths), np.arange(len(paths), dtype=np.uint64))
        return len(paths) - len(table.snapshot())


def _by_hash(paths: Paths) -> dict[str, Any]:
    """The action of a path is its number; who is given another number gets the wrong policy."""
    return _stored(_table("u4", "u8", len(paths)), _hashed(paths), _numbers(paths), paths)


def _compared(paths: Paths) -> dict[str, Any]:
    values = np.zeros(len(paths), _COMPARED)
    values["path"], values["action"] = paths, _numbers(paths)
    return _stored(_table("u4", _COMPARED, len(paths)), _hashed(paths), values, paths)


def _by_path(paths: Paths) -> dict[str, Any]:
    dtype = f"V{_PATH_BYTES}"
    return _stored(_table(dtype, "u8", len(paths)), paths.view(dtype), _numbers(paths), paths)


def _numbers(paths: Paths) -> npt.NDArray[np.uint64]:
    return np.arange(1, len(paths) + 1, dtype=np.uint64)


def _stored(
    table: Map, keys: npt.NDArray[Any], values: npt.NDArray[Any], paths: Paths
) -> dict[str, Any]:
    """Store all policies, then give each path what the map holds under its key."""
    with table:
        begun = time.monotonic_ns()
        table.update_many(keys, values)
        store_ns = (time.monotonic_ns() - begun) / len(keys)
        held = table.snapshot()
        sizes = {"key_bytes": table.key_size, "value_bytes": table.value_size}
    # Stable: NumPy's default sorts by vector instructions, and came out wrong on an emulated CPU.
    order = np.argsort(held.keys, kind="stable")
    given = held.values[order][np.searchsorted(held.keys[order], keys)]
    served = np.ones(len(paths), bool)
    actions = given
    if given.dtype == _COMPARED:
        served, actions = given["path"] == paths, given["action"]
    wrong = served & (actions != _numbers(paths))
    return {
        "stored": len(held),
        "wrong": int(wrong.sum()),
        "unserved": int((~served).sum()),
        "store_ns": store_ns,
        **sizes,
    }
