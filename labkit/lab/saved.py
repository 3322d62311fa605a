"""Saved runs for a reader: which there are, what one shows, and what differs between two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from labkit import runs
from labkit.errors import BadInput
from labkit.judge.findings import Finding
from labkit.kernel.libbpf import shown
from labkit.lab.catalogue import judge, load
from labkit.runs import BadRun, Run

_OF_THE_MOMENT: Final = ("recorded_at", "duration_s")  # they differ between any two


def listed(folder: Path, pattern: str = "") -> list[dict[str, str]]:
    """List the runs of a folder, the newest first.

    Parameters
    ----------
    folder : Path
        Folder of runs: ``<experiment>/<name>/run.json``.
    pattern : str
        Only experiments whose id contains it.

    Returns
    -------
    list of dict
        ``experiment``, ``profile``, ``kernel``, ``recorded_at`` and ``path``; of a run that cannot
        be read ``problem`` in place of the last ones but ``path``.
    """
    found = []
    for file in folder.glob("*/*/run.json"):
        if pattern not in file.parts[-3] or file.parent.name.startswith("."):
            continue
        entry = {"experiment": file.parts[-3], "path": str(file.parent)}
        try:
            meta: Any = runs.described(file.parent)
        except BadRun as error:
            found.append(entry | {"recorded_at": "", "problem": str(error)})
            continue
        about = {name: _printable(meta["provenance"][name]) for name in ("kernel", "recorded_at")}
        found.append(entry | {"profile": _printable(meta["profile"])} | about)
    return sorted(found, key=lambda one: (one["recorded_at"], one["path"]), reverse=True)


def find(name: str, folder: Path) -> Run:
    """Load a run by its folder's path, or the newest one of an experiment.

    Parameters
    ----------
    name : str
        ``"runs/transient-null/…"``, or ``"transient-null"``.
    folder : Path
        Folder of runs, for the second form.

    Raises
    ------
    BadInput
        There is none of that name.
    BadRun
        It is damaged.
    """
    if (Path(name) / "run.json").is_file():
        return load(Path(name))
    for entry in listed(folder) if name else []:
        if name in (entry["experiment"], Path(entry["path"]).name) and "problem" not in entry:
            return load(Path(entry["path"]))
    raise BadInput(
        f"There is no run {name!r}: give its folder, or an experiment that has runs here; "
        "labkit runs lists them."
    )


def facts(run: Run) -> dict[str, Any]:
    """Tell what a run shows, as JSON values.

    Parameters
    ----------
    run : Run
        Of an experiment.

    Returns
    -------
    dict
        ``experiment``, ``profile``, ``state``, ``sentence``, ``statements`` (each with ``words``,
        ``state`` and ``measured``), ``parameters``, ``provenance``.
    """
    finding = judge(run)
    return {
        "experiment": run.experiment,
        "profile": run.profile,
        "state": finding.state,
        "sentence": finding.sentence,
        "statements": [
            {"words": one.statement, "state": one.state, "measured": one.measured}
            for one in finding.checks
        ],
        "parameters": run.parameters,
        "provenance": run.provenance,
    }


def compared(one: Run, other: Run) -> dict[str, Any]:
    """Tell what differs between two runs of an experiment.

    Parameters
    ----------
    one, other : Run
        The earlier and the later.

    Returns
    -------
    dict
        ``statements``: those that came to something else, each with ``words``, ``was``, ``is``,
        ``was_measured`` and ``is_measured``; ``same``: how many did not; ``parameters`` and
        ``provenance``: what differs, each name with ``[was, is]``.

    Raises
    ------
    BadInput
        They are of two experiments.
    """
    if one.experiment != other.experiment:
        raise BadInput(
            f"A run of {one.experiment} and one of {other.experiment} cannot be compared: "
            "give two runs of one experiment."
        )
    before, after = (_by_words(judge(run)) for run in (one, other))
    nothing = ("not stated", "")
    pairs = {
        words: (before.get(words, nothing), after.get(words, nothing))
        for words in {**before, **after}
    }
    return {
        "experiment": one.experiment,
        "statements": [
            {
                "words": words, "was": was[0], "is": now[0],
                "was_measured": was[1], "is_measured": now[1],
            }
            for words, (was, now) in pairs.items() if was[0] != now[0]
        ],
        "same": sum(was[0] == now[0] for was, now in pairs.values()),
        "parameters": _differing(
            {"profile": one.profile, **one.parameters},
            {"profile": other.profile, **other.parameters},
        ),
        "provenance": {
            name: values
            for name, values in _differing(one.provenance, other.provenance).items()
            if name not in _OF_THE_MOMENT
        },
    }  # fmt: skip


def compared_text(difference: Mapping[str, Any]) -> str:
    """Tell for a terminal what `compared` found."""
    changed, same = difference["statements"], difference["same"]
    lines = [
        f"{difference['experiment']}: {len(changed)} of {len(changed) + same} statements changed"
    ]
    for one in changed:
        lines.append(f"  {one['words']}")
        lines += [
            f"    {when} {one[when]}"
            + (f": {one[f'{when}_measured']}" if one[f"{when}_measured"] else "")
            for when in ("was", "is")
        ]
    for what in ("parameters", "provenance"):
        lines.append(f"{what} that differ:" if difference[what] else f"no {what} differ")
        lines += [f"  {name}: {was} -> {now}" for name, (was, now) in difference[what].items()]
    return "\n".join(map(_printable, lines))


def _printable(text: str) -> str:
    """What a file says, for a terminal."""
    return shown(text.encode(errors="surrogateescape"))


def _by_words(finding: Finding) -> dict[str, tuple[str, str]]:
    return {one.statement: (one.state, one.measured) for one in finding.checks}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What differs, with the names of nested facts joined by dots."""
    flat, other_flat = _flat(one), _flat(other)
    return {
        name: [flat.get(name), other_flat.get(name)]
        for name in {**flat, **other_flat}
        if flat.get(name) != other_flat.get(name)
    }


def _flat(facts: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in facts.items():
        nested = isinstance(value, Mapping)
        found |= _flat(value, f"{above}{name}.") if nested else {f"{above}{name}": value}
    return found
