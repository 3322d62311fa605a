"""The runs that count: of each experiment, for each series of kernels, the newest."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from labkit.runs.disk import RECORDED, described, load
from labkit.runs.run import BadRun, Run

Complete = Callable[[Run], Run]
"""Derives what follows from the tables of a run."""

Usual = Callable[[str, str], Mapping[str, Any] | None]
"""The parameters of an experiment's profile."""


class RunIndex:
    """Recorded runs, and the newest of those that were measured here.

    Parameters
    ----------
    recorded
        Folder of recorded runs.
    fresh
        Folder of runs measured here; None leaves them out. One with other parameters than
        ``usual`` has does not count: it may have been too short to see anything.
    profile
        Only runs of this profile; None takes any.
    complete
        Derives what follows from the tables of a run.
    usual
        The parameters of an experiment's profile; None where they are not known, and any count.

    Attributes
    ----------
    left_out
        Why runs were left out, of all experiments that were asked for so far.
    """

    def __init__(
        self,
        recorded: Path = RECORDED,
        fresh: Path | None = None,
        profile: str | None = None,
        complete: Complete = lambda run: run,
        usual: Usual = lambda experiment, profile: None,
    ) -> None:
        self._recorded, self._fresh, self._profile = Path(recorded), fresh, profile
        self._complete, self._usual = complete, usual
        self._found: dict[str, dict[str, list[tuple[Path, bool]]]] = {}
        self.left_out: list[str] = []
        self._loaded: dict[Path, Run | BadRun] = {}

    def kernels(self, experiment: str) -> list[str]:
        """The series of kernels that an experiment has runs of."""
        return list(self._all(experiment))

    def newest(self, experiment: str, kernel: str) -> Run | BadRun | None:
        """The newest run of an experiment on a series of kernels; None where there is none."""
        known = self._all(experiment).get(kernel)
        return self._load(*known[0]) if known else None

    def before(self, experiment: str, kernel: str) -> Run | BadRun | None:
        """The run measured here before the newest one, if that is of here too; else None."""
        newest = self._all(experiment).get(kernel, [])[:2]
        return self._load(*newest[1]) if len(newest) == 2 else None

    def _all(self, experiment: str) -> dict[str, list[tuple[Path, bool]]]:
        if experiment not in self._found:
            self._found[experiment] = dict(self._newest(experiment))
        return self._found[experiment]

    def _newest(self, experiment: str) -> Iterator[tuple[str, list[tuple[Path, bool]]]]:
        found: dict[str, list[tuple[str, bool, Path]]] = {}
        for path, fresh in self._paths(experiment):
            try:
                meta = described(path)
            except BadRun as error:
                self.left_out.append(str(error))  # it stands for no kernel
                continue
            if self._profile not in (None, meta["profile"]):
                continue
            facts: Any = meta["provenance"]
            kernel, made = series(str(facts["kernel"])), str(facts["recorded_at"])
            usual = self._usual(experiment, str(meta["profile"]))
            if fresh and usual is not None and usual != meta["parameters"]:
                continue
            found.setdefault(kernel, []).append((made, fresh, path))
        for kernel, several in found.items():
            newest = sorted(several, key=lambda one: one[0], reverse=True)
            # Behind the newest one only what was measured here, too, tells of this machine.
            kept = newest[:1] + [one for one in newest[1:] if one[1] and newest[0][1]][:1]
            yield kernel, [(path, fresh) for _, fresh, path in kept]

    def _load(self, path: Path, fresh: bool) -> Run | BadRun:
        if path not in self._loaded:
            try:
                self._loaded[path] = self._complete(replace(load(path), recorded=not fresh))
            except BadRun as error:
                self._loaded[path] = error
        return self._loaded[path]

    def _paths(self, experiment: str) -> Iterator[tuple[Path, bool]]:
        for file in sorted(self._recorded.glob(f"*/*/{experiment}/run.json")):
            yield file.parent, False
        if self._fresh is not None:
            for file in sorted(self._fresh.glob(f"{experiment}/[!.]*/run.json")):
                yield file.parent, True


def series(release: str) -> str:
    """The series of a kernel release: ``6.18`` of ``6.18.44-fc``; else the release itself."""
    found = re.match(r"\d+\.\d+", release)
    return found.group() if found else release
