"""Policies that are kept under a 32-bit hash of a path: whose packets they drop as well."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from labkit.errors import BadInput
from labkit.figures import Axes, style
from labkit.kernel import programs
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.sockets import GuardedSocket
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment
from labkit.runs import Run

_HALF = 77_163  # random 32-bit keys of which two agree with probability 1/2
_KEYS = 2.0**32
_PATH_BYTES = 24
_MOST_BYTES = 64  # of a path, in the program
_FNV_START, _FNV_FACTOR = 0x811C9DC5, 0x01000193  # FNV-1a, 32 bit
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", np.uint8)
_LEAST_PATHS, _MOST_PATHS = 200_000, 2_000_000

Paths = npt.NDArray[np.bytes_]


def _derived(tables: Tables) -> Tables:
    """What happened by each way, all rounds together, and how many collided in maps by hash."""
    rounds, filled = tables["rounds"], tables["filled"]
    filled = filled[filled["variant"] == "broken"]
    sums = ["policies", "stored", "let_in", "sent", "refused", "expected"]
    ways = rounds.groupby("case", sort=False)[sums].sum()
    layout = rounds.groupby("case", sort=False)[["key_bytes", "value_bytes"]].first()
    return {
        "ways": ways.join(layout).reset_index(names="way"),
        "sizes": filled.assign(
            collisions=filled["paths"] - filled["stored"], expected=_taken(filled["paths"])
        ),
    }


def _taken(paths: pd.Series[int]) -> pd.Series[float]:
    """Keys that are taken already, of so many random ones, in the mean."""
    taken: pd.Series[float] = paths - _KEYS * -np.expm1(paths * np.log1p(-1 / _KEYS))
    return taken


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the collisions that stood in the map beside those that chance makes."""
    from matplotlib.ticker import NullFormatter

    ax = style.axes(ax)
    sizes = run.table("sizes").sort_values("paths")
    paths, expected = sizes["paths"], sizes["expected"]
    # Two standard deviations of a count that is Poisson distributed.
    low, high = expected - 2 * np.sqrt(expected), expected + 2 * np.sqrt(expected)
    ax.fill_between(
        paths, low.clip(0.01), high, color=style.GREY, alpha=0.2, lw=0, label="two deviations"
    )
    ax.plot(paths, expected, color=style.GREY, label="by chance: n² / 2³³")
    some = sizes[sizes["collisions"] > 0]
    none = sizes[sizes["collisions"] == 0]
    look = style.VARIANT["broken"]
    ax.plot(some["paths"], some["collisions"], **look.points(), label="in a map")
    ax.plot(
        none["paths"], np.full(len(none), 3.0), **look.points(), mfc="white",
        label="none (bound at 95 %)",
    )  # fmt: skip
    ax.axvline(_HALF, color=style.BLACK, lw=0.8, ls=":")
    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yscale("log")
    ax.set_ylim(0.02, max(40.0, 2 * float(high.max())))
    ax.set_xlabel(f"paths in the map\n(dotted: {_HALF:,}, a collision in every second map)")
    ax.set_ylabel("paths with another's policy")
    ax.legend(loc="upper left", fontsize=6)
    return ax


@experiment(
    "path-hash",
    number=35,
    family="kernel-facts",
    question="Is a policy found by a 32-bit hash of a path always the policy of that path?",
    claims=("5.5",),
    needs=("bpf", "compile", "batch_hash"),
    quick={"paths": 200_000, "rounds": 2},
    full={"paths": 400_000, "rounds": 4},
    cases=(
        Case("broken", "hash", "32-bit hash as key"),
        # So few that one of them meets another path once in some thousand runs.
        Case("control", "few", "32-bit hash as key, few policies", policies=5),
        Case("fixed", "compared", "32-bit hash as key, path compared", constants={"COMPARED": 1}),
        Case("fixed", "path", "path as key", constants={"BY_PATH": 1}),
    ),
    counted=Counted("packet refused by another path's policy", operations="sent",
                    anomalies="refused", cost_ns="store_ns"),
    derive=_derived,
    statements=(
        Statement("a path without a policy is refused by that of another", "some(broken)"),
        # Five standard deviations.
        Statement(
            "as many are as the birthday rule says",
            "broken.rate > 0 and (broken.anomalies - sum(rounds(case='hash').expected))"
            " * (broken.anomalies - sum(rounds(case='hash').expected))"
            " <= 25 * sum(rounds(case='hash').expected)",
        ),
        # Of 40 draws fewer than 5, or more than 35, have one once in a hundred thousand runs.
        Statement(
            "about every second draw of 77,163 paths has two of one hash",
            "1 / 8 < share(draws.collisions > 0) < 7 / 8",
        ),
        Statement("a few policies refuse no other path", "none(control)"),
        Statement("with the path compared, or as key, none is refused", "none(fixed)"),
        Statement("every path with a policy is refused by its hash, and by itself",
                  "all(0 == rounds(case=('hash', 'few', 'path')).let_in"
                  " < rounds(case=('hash', 'few', 'path')).policies)"),
        Statement(
            "with the path compared, one of two that collide is let in",
            "all(rounds(case='compared').let_in"
            " == rounds(case='compared').policies - rounds(case='compared').stored"
            " < rounds(case='compared').policies)",
        ),
        Statement("with the path as key every path has its own policy",
                  "all(rounds(case='path').stored == rounds(case='path').policies > 0)"),
    ),
    sentence="By a policy under a 32-bit hash of another path, {broken} packets of paths that "
    "nobody had configured were dropped, without an error; {sum(rounds(case='hash').expected)} "
    "were to be expected by chance. Of {rows(draws)} draws of 77,163 paths "
    "{percent(share(draws.collisions > 0))} had such a pair. With the path kept in the value and "
    "compared, {fixed['compared']} were, and {sum(rounds(case='compared').let_in)} of "
    "{sum(rounds(case='compared').policies)} denied paths were let in; with the path as key, "
    "{fixed['path']}, and {sum(rounds(case='path').let_in)}.",
    figure=_figure,
)  # fmt: skip
def path_hash(case: Case, *, paths: int) -> dict[str, Any]:
    """Deny some paths, and send a packet of each of them and of as many that nobody configured.

    A socket filter hashes the path in the packet (FNV-1a) and drops what is denied under the hash.
    Of n other random paths about n * m / 2**32 have the hash of one of m denied ones; of n
    random paths about n * n / 2**33 have the hash of an earlier one, and two of 77,163 do with
    probability 1/2. A map keeps one value a key, so the later policy takes the place of the
    earlier, and nothing answers an error.

    Parameters
    ----------
    case : Case
        How many policies, and what their key and value are.
    paths : int
        Random paths that are denied, and as many that are not; 200,000 to 2,000,000.

    Returns
    -------
    dict
        ``seed`` (of the paths; drawn from the time), ``policies`` (denied paths, each of which
        sends a packet), ``stored`` (entries of the map), ``let_in`` (denied paths whose packet
        arrived), ``sent`` (packets of paths without a policy), ``refused`` (those that did not
        arrive), ``expected`` (of these by chance, where hashes are the key), ``key_bytes``,
        ``value_bytes``, ``store_ns`` (to store one policy, nanoseconds). ``draws``: for every
        77,163 of the random paths ``collisions``, the paths whose hash another one has.
        ``filled``: ``paths`` that were stored, and ``stored``, the entries of the map by then.
    """
    if not _LEAST_PATHS <= paths <= _MOST_PATHS:
        raise BadInput(
            f"paths of path-hash are {_LEAST_PATHS:,} to {_MOST_PATHS:,}, not {paths:,}."
        )
    seed = time.time_ns()
    drawn = _random_paths(np.random.default_rng(seed), 2 * paths)
    hashes = _hashed(drawn)
    policies, constants = case.get("policies", paths), case.get("constants", {})
    denied, others = drawn[:policies], drawn[paths:]
    with (
        programs.load("path_hash", POLICIES=policies, **constants) as loaded,
        GuardedSocket() as traffic,
    ):
        held = loaded.map("policies", key=f"V{_MOST_BYTES}" if case.id == "path" else "u4")
        keys: npt.NDArray[Any] = hashes[:policies]
        values = np.zeros(policies, held.value_dtype)
        if case.id == "path":
            keys = _datagrams(denied)
        if case.id == "compared":
            values = _datagrams(denied).view(held.value_dtype)
        filled, spent_ns, stored = [], 0, 0
        for size in np.unique(np.geomspace(policies / 32, policies, 6).astype(int)):
            begun = time.monotonic_ns()
            held.update_many(keys[stored:size], values[stored:size])
            spent_ns += time.monotonic_ns() - begun
            stored = size
            filled.append({"paths": size, "stored": len(held.snapshot())})
        traffic.attach(loaded.program("guard", ProgramKind.SOCKET_FILTER))
        let_in = sum(traffic.arrivals(_datagrams(denied).tolist()))
        refused = len(others) - sum(traffic.arrivals(_datagrams(others).tolist()))
        return {
            "seed": seed,
            "policies": policies,
            "stored": filled[-1]["stored"],
            "let_in": let_in,
            "sent": len(others),
            "refused": refused,
            "expected": len(others) * policies / _KEYS,
            "key_bytes": held.key_size,
            "value_bytes": held.value_size,
            "store_ns": spent_ns / policies,
            "draws": pd.DataFrame({"collisions": _collisions(hashes)}),
            "filled": pd.DataFrame(filled),
        }


def _random_paths(random: np.random.Generator, count: int) -> Paths:
    """Distinct paths such as ``/v1/3f9k2m...``."""
    letters = random.choice(_LETTERS, (count, _PATH_BYTES))
    letters[:, :4] = np.frombuffer(b"/v1/", np.uint8)
    paths: Paths = letters.view(f"S{_PATH_BYTES}").ravel()
    return paths


def _datagrams(paths: Paths) -> npt.NDArray[np.void]:
    """What the program gets of every path: its bytes, and zeros up to the most."""
    return paths.astype(f"S{_MOST_BYTES}").view(f"V{_MOST_BYTES}")


def _hashed(paths: Paths) -> npt.NDArray[np.uint32]:
    """FNV-1a of every path: the bytes one after the other, all paths at once."""
    letters = np.ascontiguousarray(paths).view(np.uint8).reshape(len(paths), _PATH_BYTES)
    hashed = np.full(len(paths), _FNV_START, np.uint32)
    for column in letters.T:
        hashed ^= column
        hashed *= np.uint32(_FNV_FACTOR)
    return hashed


def _collisions(hashes: npt.NDArray[np.uint32]) -> list[int]:
    """Of each 77,163 hashes, those that another one has."""
    draws = len(hashes) // _HALF
    return [_HALF - len(set(draw.tolist())) for draw in hashes[: draws * _HALF].reshape(draws, -1)]
