"""Long measurements in parts: each is kept as it is done, so that a stop loses one of them.

What was kept goes into a run only beside parts of the same code, kernel, machine and parameters.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from labkit.kernel.closing import Closing
from labkit.lab.progress import keep
from labkit.runs import SaveFailed

UNFINISHED: Final = ".unfinished"
"""Folder in a folder of runs that holds the parts of runs which are not whole yet."""

_WAIT_S = 5.0  # for a process that was killed and still holds the lock
_NOW = ("recorded_at", "load", "stolen_share")  # of a provenance: of the moment alone


class Parts(Closing):
    """The parts of one measurement that are done; a context manager.

    Only one process at a time keeps parts of a measurement; another one that comes meanwhile
    measures all the same, and keeps none.

    Parameters
    ----------
    folder : Path, optional
        Folder of runs; without one, nothing is kept.
    experiment, profile : str
        What is measured.
    parameters : mapping
        Its parameters, JSON values.
    facts : mapping
        Provenance of this moment. Parts that were measured under other facts are dropped.

    Attributes
    ----------
    before : int
        Parts that were done by an earlier process.
    begun_at : str
        When the first of them was begun, UTC, ISO 8601.
    spent_s : float
        What all parts took that are done, seconds.

    Raises
    ------
    SaveFailed
        The folder cannot be written.
    """

    def __init__(
        self,
        folder: Path | None = None,
        experiment: str = "",
        profile: str = "",
        parameters: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.before, self.spent_s = 0, 0.0
        self.begun_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._experiment = experiment
        self._folder: Path | None = None
        self._done: dict[str, Any] = {}
        self._lock = -1
        if folder is None:
            return
        place = place_of(folder, experiment, profile, parameters or {})
        try:
            self._lock = _locked(place, _WAIT_S)
            if self._lock < 0:
                keep(
                    f"Another process measures {experiment} with the same parameters: this run "
                    "begins anew, and could not be continued."
                )
                return
            self._folder = place
            self._load(_conditions(facts or {}))
        except OSError as error:
            self.close()
            raise SaveFailed(
                f"Parts of {experiment} cannot be kept in {folder} ({error.strerror or error}); "
                "free some space or name a folder that can be written."
            ) from None

    def _load(self, conditions: dict[str, Any]) -> None:
        assert self._folder is not None
        known = _read(self._folder / "conditions.json")
        kept = _kept(self._folder)
        if known is None or known["conditions"] != conditions:
            if known is not None and kept:
                other = [
                    name
                    for name in sorted({*conditions, *known["conditions"]})
                    if conditions.get(name) != known["conditions"].get(name)
                ]
                keep(
                    f"An unfinished run of {self._experiment} was measured under other conditions "
                    f"({', '.join(other)}): its {len(kept)} parts are dropped, and all is measured "
                    "anew."
                )
            for path in kept.values():
                path.unlink()
            _write(
                self._folder / "conditions.json",
                {"conditions": conditions, "begun_at": self.begun_at},
            )
            return
        self.begun_at = known["begun_at"]
        for name, path in kept.items():
            # What is damaged is measured again.
            if (part := _read(path)) is not None:
                self._done[name] = part["value"]
                self.spent_s += part["took_s"]
        self.before = len(self._done)
        if self.before:
            keep(
                f"Continuing the run of {self._experiment} that was begun at {self.begun_at} and "
                f"stopped: {self.before} parts are done and stay."
            )

    def __contains__(self, name: str) -> bool:
        return name in self._done

    def __len__(self) -> int:
        return len(self._done)

    def measure(self, name: str, measure: Callable[[], Any]) -> Any:
        """Measure a part and keep it, or answer what was kept.

        Parameters
        ----------
        name : str
            Of the part: lower case letters, digits and hyphens.
        measure : callable
            Answers JSON values; NaN may be among them.

        Returns
        -------
        JSON value
            Through JSON in either case, so that a run that was continued has the same types.

        Raises
        ------
        SaveFailed
            The disk is full.
        """
        if name in self._done:
            return self._done[name]
        begun = time.monotonic()
        value = json.loads(json.dumps(measure()))
        took_s = time.monotonic() - begun
        if self._folder is not None:
            try:
                _write(self._folder / f"part-{name}.json", {"took_s": took_s, "value": value})
            except OSError as error:
                raise SaveFailed(
                    f"A part of {self._experiment} could not be kept ({error.strerror or error}); "
                    "free some space: what was kept before stays."
                ) from None
        self._done[name] = value
        self.spent_s += took_s
        return value

    def forget(self) -> None:
        """Remove what was kept: the run is saved, or not wanted."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._folder.parent.rmdir()

    def close(self) -> None:
        """Let others continue; safe to call twice. What was kept stays."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def place_of(folder: Path, experiment: str, profile: str, parameters: Mapping[str, Any]) -> Path:
    """Where the parts of a measurement are kept.

    ``parameters`` are those of the measurement, of that ``profile`` of the ``experiment``, in a
    ``folder`` of runs.
    """
    text = json.dumps([profile, parameters], sort_keys=True)
    name = f"{experiment}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return Path(folder) / UNFINISHED / name


def waiting(folder: Path, experiment: str, profile: str, parameters: Mapping[str, Any]) -> int:
    """How many parts of a measurement are kept, so that it can be continued.

    It is named by ``folder``, ``experiment``, ``profile`` and ``parameters`` as for `place_of`.
    """
    return len(_kept(place_of(folder, experiment, profile, parameters)))


def forget_all(folder: Path, tell: Callable[[str], None]) -> int:
    """Remove the parts of all unfinished runs that nobody is measuring.

    ``tell`` gets a sentence for each; answers how many were removed.
    """
    removed = 0
    for place in sorted((folder / UNFINISHED).glob("*")):
        lock = _locked(place, 0.0)
        if lock < 0:
            continue
        kept = len(_kept(place))
        shutil.rmtree(place, ignore_errors=True)
        os.close(lock)
        tell(f"Removed the unfinished run {place.name}, {kept} parts.")
        removed += 1
    with contextlib.suppress(OSError):
        (folder / UNFINISHED).rmdir()
    return removed


def _conditions(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What of a provenance must be the same, as JSON gives it back."""
    lasting = {name: fact for name, fact in facts.items() if name not in _NOW}
    if isinstance(code := lasting.get("code"), Mapping):
        lasting["code"] = code.get("digest")
    known: dict[str, Any] = json.loads(json.dumps(lasting))
    return known


def _locked(place: Path, wait_s: float) -> int:
    """A descriptor that locks a place, made if it is missing; -1 if another process has it."""
    deadline = time.monotonic() + wait_s
    while True:
        place.mkdir(parents=True, exist_ok=True)
        lock = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                # Whoever had it may have removed the place meanwhile.
                if os.stat(place / "lock").st_ino == os.fstat(lock).st_ino:
                    return lock
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(lock)
                return -1
            time.sleep(0.05)
        os.close(lock)


def _kept(place: Path) -> dict[str, Path]:
    return {path.stem.removeprefix("part-"): path for path in sorted(place.glob("part-*.json"))}


def _read(path: Path) -> Any:
    """What a file says, None where there is none or a crash of the machine cut it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path, value: Any) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps(value), encoding="utf-8")
    partial.replace(path)
