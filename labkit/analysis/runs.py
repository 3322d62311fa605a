"""Runs on disk: what an experiment measured, with what, and where.

A run is one directory: ``run.json`` (experiment, profile, parameters, provenance, schema version)
and one Parquet file per table. Measuring writes it, judging reads it, and nothing else passes
between the two.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from labkit.errors import BadInput, LabError

SCHEMA_VERSION: Final = 1
"""Version of the layout on disk; raised by every change that an older reader would misread."""

VARIANTS: Final = ("broken", "control", "fixed")
"""The three variants of every experiment, in the order in which they are shown."""

PROFILES: Final = ("quick", "full")
"""How much work a run does: enough to see, or enough to quote."""

PARTIAL: Final = ".partial-"
"""Prefix of a directory that is still being written; one that a killed process left is rubbish."""

RECORDED: Final = Path(__file__).resolve().parents[2] / "data" / "runs"
"""The recorded runs of the checkout, one folder per kernel."""

SLOWER: Final = 10
"""Times as slow, or worse, is a CPU whose instructions are emulated."""

REPLACED: Final = ".replaced-"
"""Prefix of a directory that is being replaced at this moment."""

_COUNTS: Final = {
    "variant": "text",
    "case": "text",
    "operations": "int64",
    "anomalies": "int64",
    "anomaly": "text",
    "cost_ns": "float64",
}


class BadRun(LabError):
    """A directory does not hold a run that this version can read."""


class SaveFailed(LabError):
    """A run could not be written; nothing of it was left on disk."""


@dataclass(frozen=True)
class Count:
    """Rows of the counts table added up.

    Attributes
    ----------
    operations, anomalies
        Totals over the rows.
    cost_ns
        Nanoseconds per operation, the mean over the timed rows weighted by their operations;
        NaN where no row was timed.
    """

    operations: int
    anomalies: int
    cost_ns: float

    @property
    def rate(self) -> float:
        """Anomalies per operation; NaN without operations."""
        return self.anomalies / self.operations if self.operations else math.nan

    def __str__(self) -> str:
        return f"{self.anomalies:,} of {self.operations:,}"


@dataclass(frozen=True, eq=False)
class Run:
    """One run of one experiment.

    Attributes
    ----------
    experiment
        Id such as ``"transient-null"``: lower case, digits and hyphens.
    profile
        ``"quick"`` or ``"full"``.
    parameters
        JSON values; the experiment's docstring has their units.
    provenance
        JSON values about machine and code; at least ``kernel`` (release as ``uname`` gives it) and
        ``recorded_at`` (UTC, ISO 8601).
    tables
        Data frames by name. ``counts`` is always there, with the columns variant (``broken``,
        ``control`` or ``fixed``), case (text, empty if there is one only), operations and
        anomalies (int64), anomaly (the word, singular), cost_ns (float64, nanoseconds per
        operation, NaN where not timed).
    path
        The directory it was loaded from or saved in.
    recorded
        True when it stands in for a kernel that is not running here.
    """

    experiment: str
    profile: str
    parameters: dict[str, object]
    provenance: dict[str, object]
    tables: dict[str, pd.DataFrame]
    path: Path | None = None
    recorded: bool = False

    @property
    def counts(self) -> pd.DataFrame:
        """The counts table."""
        return self.tables["counts"]

    @property
    def kernel(self) -> str:
        """Release of the kernel that it was measured on."""
        return str(self.provenance["kernel"])

    @property
    def cpus(self) -> int:
        """CPUs of the machine that it was measured on; 0 where the provenance does not say."""
        return int(self._fact("cpu", "count") or 0)

    @property
    def emulated(self) -> bool:
        """Whether that machine was emulated, so that its times compare with nothing outside it."""
        return bool(self._fact("virtual", "emulated"))

    def _fact(self, group: str, name: str) -> Any:
        facts = self.provenance.get(group)
        return facts.get(name) if isinstance(facts, dict) else None

    def table(self, name: str) -> pd.DataFrame:
        """Return one table; BadRun where the run has none of that name."""
        try:
            return self.tables[name]
        except KeyError:
            raise BadRun(
                f"The run of {self.experiment} has no table {name!r}, "
                f"it has {', '.join(sorted(self.tables))}; run the experiment again."
            ) from None

    def cases(self, variant: str | None = None) -> list[str]:
        """Return the cases of the counts, of one variant if given, in the order of the table."""
        rows = self.counts if variant is None else self.counts[self.counts["variant"] == variant]
        return [str(case) for case in rows["case"].unique()]

    def count(self, variant: str, case: str | None = None) -> Count:
        """Add up the rows of one variant.

        Parameters
        ----------
        variant
            ``"broken"``, ``"control"`` or ``"fixed"``.
        case
            One case; None adds up all of them.

        Raises
        ------
        BadRun
            When the run has no such row: a missing measurement must not look like zero anomalies.
        """
        rows = self.counts[self.counts["variant"] == variant]
        if case is not None:
            rows = rows[rows["case"] == case]
        if rows.empty:
            wanted = variant if case is None else f"{variant}, case {case!r}"
            raise BadRun(
                f"The run of {self.experiment} has no counts for {wanted}; "
                f"its cases are {', '.join(map(repr, self.cases()))}."
            )
        operations = rows["operations"].to_numpy(np.int64)
        cost = rows["cost_ns"].to_numpy(np.float64)
        timed = ~np.isnan(cost) & (operations > 0)
        return Count(
            operations=int(operations.sum()),
            anomalies=int(rows["anomalies"].sum()),
            cost_ns=float(np.average(cost[timed], weights=operations[timed]))
            if timed.any()
            else math.nan,
        )


class Triad:
    """Collects the counts of the three variants of one experiment.

    Parameters
    ----------
    anomaly
        The word for what goes wrong, singular: ``"stale"``, ``"torn"``, ``"lost"``, ...

    Examples
    --------
    >>> triad = Triad("torn")
    >>> triad.add("broken", case="array, 64 B", operations=1000, anomalies=7)
    >>> triad.add("control", case="array, 8 B", operations=1000, anomalies=0)
    >>> triad.add("fixed", case="array, 64 B", operations=1000, anomalies=0, cost_ns=84.0)
    >>> list(triad.table()["anomalies"])
    [7, 0, 0]
    """

    def __init__(self, anomaly: str) -> None:
        if not anomaly:
            raise BadInput("A triad needs the word for its anomaly, such as 'torn'.")
        self._anomaly = anomaly
        self._rows: list[dict[str, object]] = []

    def add(
        self,
        variant: str,
        *,
        case: str = "",
        operations: int,
        anomalies: int,
        cost_ns: float = math.nan,
        anomaly: str | None = None,
    ) -> None:
        """Add one row.

        Parameters
        ----------
        variant
            ``"broken"``, ``"control"`` or ``"fixed"``.
        case
            What distinguishes this row within the variant; free text.
        operations, anomalies
            How many were done, and how many of them went wrong.
        cost_ns
            Nanoseconds per operation; leave it out where not timed.
        anomaly
            Another word than the triad's, for a row in which something else goes wrong.

        Raises
        ------
        BadInput
            For an unknown variant, negative numbers, or more anomalies than operations.
        """
        operations, anomalies, cost_ns = int(operations), int(anomalies), float(cost_ns)
        if variant not in VARIANTS:
            raise BadInput(f"A variant is one of {', '.join(VARIANTS)}, not {variant!r}.")
        where = f"{variant}, case {case!r}"
        if operations < 0 or anomalies < 0:
            raise BadInput(
                f"Counts cannot be negative ({where}: {operations} operations, "
                f"{anomalies} anomalies)."
            )
        if anomalies > operations:
            raise BadInput(
                f"{where} counts {anomalies} anomalies in {operations} operations; "
                f"count each operation once."
            )
        if cost_ns < 0 or math.isinf(cost_ns):
            raise BadInput(f"A cost is in nanoseconds, not {cost_ns} ({where}).")
        self._rows.append(
            {
                "variant": variant,
                "case": case,
                "operations": operations,
                "anomalies": anomalies,
                "anomaly": anomaly or self._anomaly,
                "cost_ns": cost_ns,
            }
        )

    def add_cases(
        self,
        rows: pd.DataFrame,
        *,
        operations: pd.Series[int],
        anomalies: pd.Series[int],
        cost_ns: pd.Series[float],
    ) -> None:
        """Add one row for each case of a table that has several, such as one for each round.

        Parameters
        ----------
        rows
            With columns ``variant`` and ``case``.
        operations, anomalies
            Of each row; they are summed.
        cost_ns
            Of each row; its median is taken.

        Raises
        ------
        BadInput
            As `add`.
        """
        for (variant, case), group in rows.groupby(["variant", "case"], sort=False):
            self.add(
                str(variant),
                case=str(case),
                operations=int(operations[group.index].sum()),
                anomalies=int(anomalies[group.index].sum()),
                cost_ns=float(cost_ns[group.index].median()),
            )

    def table(self) -> pd.DataFrame:
        """Return the counts table; BadInput when a variant was never added."""
        missing = [v for v in VARIANTS if not any(row["variant"] == v for row in self._rows)]
        if missing:
            raise BadInput(
                f"The counts lack the variant {' and '.join(missing)}; "
                f"an experiment measures broken, control and fixed."
            )
        return pd.DataFrame(self._rows, columns=list(_COUNTS)).astype(
            {"operations": "int64", "anomalies": "int64", "cost_ns": "float64"}
        )


def save(run: Run, folder: Path) -> Path:
    """Write a run into a directory of its own.

    The directory ``<folder>/<experiment>/<UTC stamp>-<pid>`` appears complete or not at all.

    Parameters
    ----------
    run
        What to write.
    folder
        Folder of runs; made if it is missing.

    Returns
    -------
    Path
        The new directory.

    Raises
    ------
    BadInput
        When the run breaks the contract of `Run`; nothing is written.
    SaveFailed
        When the disk is full or the folder not writable; nothing is left.
    """
    _check(run)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    target = Path(folder) / run.experiment / f"{stamp}-{os.getpid()}"
    _write(run, target)
    return target


def record(run: Run, data: Path = RECORDED) -> Path:
    """Keep a run as the recorded one of its kernel, profile and experiment.

    Replaces the one that was there once the new one is complete.

    Parameters
    ----------
    run
        What to keep.
    data
        Folder of recorded runs, ``data/runs`` of the checkout.

    Returns
    -------
    Path
        ``<data>/<kernel>/<profile>/<experiment>``.

    Raises
    ------
    BadInput, SaveFailed
        As `save`; what was there before stays.
    """
    _check(run)
    target = Path(data) / run.kernel / run.profile / run.experiment
    _write(run, target)
    return target


def load(path: Path) -> Run:
    """Read a run from its directory.

    Parameters
    ----------
    path
        A directory that `save` or `record` made.

    Raises
    ------
    BadRun
        When it is no run, is of another schema version, lacks a table, or is damaged.
    """
    path = Path(path)
    meta = described(path)
    names = meta["tables"]
    assert isinstance(names, dict)
    tables = {str(name): _read_table(path, str(name), rows) for name, rows in names.items()}
    parameters, provenance = meta["parameters"], meta["provenance"]
    assert isinstance(parameters, dict) and isinstance(provenance, dict)
    run = Run(
        experiment=str(meta["experiment"]),
        profile=str(meta["profile"]),
        parameters=parameters,
        provenance=provenance,
        tables=tables,
        path=path,
    )
    try:
        _check(run)
    except BadInput as error:
        raise BadRun(f"The run in {path} is not valid: {error}") from None
    return run


def latest(folder: Path, experiment: str, profile: str | None = None) -> Run | None:
    """Return the newest run of an experiment, or None where there is none.

    Parameters
    ----------
    folder
        Folder of runs as given to `save`.
    experiment
        Its id.
    profile
        Only runs of this profile; None takes any.

    Raises
    ------
    BadRun
        When the newest one is damaged.
    """
    for path in sorted(_runs_in(Path(folder) / experiment), reverse=True):
        if profile is None or described(path)["profile"] == profile:
            return load(path)
    return None


def recorded(experiment: str, *, profile: str, data: Path = RECORDED) -> list[Run]:
    """Return the recorded runs of an experiment, one per kernel, ordered by kernel release.

    Parameters
    ----------
    experiment
        Its id.
    profile
        ``"quick"`` or ``"full"``.
    data
        Folder of recorded runs.

    Raises
    ------
    BadRun
        When one of them is damaged.
    """
    kernels = sorted(_runs_in(Path(data), marker=""), key=lambda path: natural(path.name))
    paths = [kernel / profile / experiment for kernel in kernels]
    return [replace(load(path), recorded=True) for path in paths if path.is_dir()]


def described(path: Path) -> Mapping[str, object]:
    """Read what a run says of itself, without its tables.

    Parameters
    ----------
    path
        A directory that `save` or `record` made.

    Returns
    -------
    mapping
        ``run.json``: experiment, profile, parameters, provenance, and the rows of each table.

    Raises
    ------
    BadRun
        When it is no run, is of another schema version, or is damaged.
    """
    try:
        meta = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadRun(f"There is no run in {path}; name a directory that has a run.json.") from None
    except (OSError, ValueError) as error:
        raise BadRun(
            f"The run.json in {path} cannot be read ({_first_line(error)}); "
            f"run the experiment again."
        ) from None
    if not isinstance(meta, dict) or meta.get("schema_version") != SCHEMA_VERSION:
        version = meta.get("schema_version") if isinstance(meta, dict) else None
        raise BadRun(
            f"The run in {path} has schema version {version!r}, this lab reads {SCHEMA_VERSION}; "
            f"run the experiment again."
        )
    kinds = {
        "experiment": str,
        "profile": str,
        "parameters": dict,
        "provenance": dict,
        "tables": dict,
    }
    for name, kind in kinds.items():
        if not isinstance(meta.get(name), kind):
            raise BadRun(f"The run.json in {path} lacks {name!r}; run the experiment again.")
    return meta


def natural(text: str) -> list[tuple[int, str]]:
    """Return what to sort kernel releases by: 6.9 comes before 6.18.

    Parameters
    ----------
    text
        A release, or a series of them.
    """
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def _runs_in(folder: Path, marker: str = "run.json") -> Iterator[Path]:
    """Yield the directories in a folder that are complete."""
    if folder.is_dir():
        for path in folder.iterdir():
            if not path.name.startswith(".") and (path / marker).exists() and path.is_dir():
                yield path


def _check(run: Run) -> None:
    """Refuse what would not come back from disk as it went, or would make a path of its own."""
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", run.experiment):
        raise BadInput(
            f"An experiment id has lower case letters, digits and hyphens, not {run.experiment!r}."
        )
    if run.profile not in PROFILES:
        raise BadInput(f"A profile is quick or full, not {run.profile!r}.")
    for name in ("kernel", "recorded_at"):
        if not isinstance(run.provenance.get(name), str):
            raise BadInput(f"The provenance of a run of {run.experiment} must have {name!r}.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+~-]*", run.kernel):
        raise BadInput(f"A kernel release such as 6.1.0-25-amd64 was expected, not {run.kernel!r}.")
    for name in run.tables:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise BadInput(f"A table's name has lower case letters and underscores, not {name!r}.")
    if "counts" not in run.tables:
        raise BadInput(f"A run of {run.experiment} needs the table 'counts'.")
    _check_counts(run.counts)


def _check_counts(counts: pd.DataFrame) -> None:
    if missing := [name for name in _COUNTS if name not in counts.columns]:
        raise BadInput(f"The counts lack the column {' and '.join(missing)}.")
    for name, kind in _COUNTS.items():
        if kind != "text" and str(counts[name].dtype) != kind:
            raise BadInput(f"The column {name} of the counts is {kind}, not {counts[name].dtype}.")
    unknown = sorted(set(map(str, counts["variant"].unique())) - set(VARIANTS))
    if unknown:
        raise BadInput(f"A variant is one of {', '.join(VARIANTS)}, not {unknown[0]!r}.")
    anomalies, operations = counts["anomalies"], counts["operations"]
    if bool(((anomalies < 0) | (anomalies > operations)).any()):
        raise BadInput("The counts have a row with negative anomalies or more than operations.")


def _write(run: Run, target: Path) -> None:
    """Write a run beside its target and rename it; replaces what is there."""
    partial = target.with_name(f"{PARTIAL}{target.name}-{os.getpid()}")
    meta = {
        "schema_version": SCHEMA_VERSION,
        "experiment": run.experiment,
        "profile": run.profile,
        "parameters": run.parameters,
        "provenance": run.provenance,
        "tables": {name: len(frame) for name, frame in run.tables.items()},
    }
    try:
        text = json.dumps(meta, indent=1, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"Parameters and provenance of {run.experiment} must be JSON values: {error}."
        ) from None
    try:
        partial.mkdir(parents=True)
        for name, frame in run.tables.items():
            pq.write_table(
                pa.Table.from_pandas(frame, preserve_index=False),
                partial / f"{name}.parquet",
                compression="zstd",
                write_page_checksum=True,
            )
        (partial / "run.json").write_text(text + "\n", encoding="utf-8")
        _replace(partial, target)
    except OSError as error:
        raise SaveFailed(
            f"The run of {run.experiment} could not be saved in {target.parent} "
            f"({error.strerror or error}); free some space or name a folder that can be written."
        ) from None
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise BadInput(
            f"A table of {run.experiment} does not fit into Parquet: {_first_line(error)}."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, target: Path) -> None:
    """Put a complete directory in the place of another; a failure leaves the other in place."""
    if not target.exists():
        partial.rename(target)
        return
    old = target.with_name(f"{REPLACED}{target.name}-{os.getpid()}")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _read_table(path: Path, name: str, rows: object) -> pd.DataFrame:
    file = path / f"{name}.parquet"
    try:
        frame: pd.DataFrame = pq.read_table(file, page_checksum_verification=True).to_pandas()
    except FileNotFoundError:
        raise BadRun(
            f"The run in {path} lacks its table {name!r}; run the experiment again."
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise BadRun(
            f"{file} is damaged ({_first_line(error)}); run the experiment again."
        ) from None
    if len(frame) != rows:
        raise BadRun(
            f"{file} has {len(frame)} rows where run.json says {rows}; run the experiment again."
        )
    return frame


def _plain(value: object) -> object:
    """Turn what NumPy returns into JSON's own numbers and lists."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
