"""What a run is: what an experiment observed, with what, and where."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from labkit.errors import BadInput, LabError

VARIANTS: Final = ("broken", "control", "fixed")
"""The three variants of every experiment, in the order in which they are shown."""

PROFILES: Final = ("quick", "full")
"""How much work a run does: enough to see, or enough to quote."""

SLOWER: Final = 10
"""Times as slow, or worse, is a CPU whose instructions are emulated."""

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
        Data frames by name. Two are known to all: ``counts``, with the columns variant (``broken``,
        ``control`` or ``fixed``), case (its id, empty if there is one only), operations and
        anomalies (int64), anomaly (the word, singular), cost_ns (float64, nanoseconds per
        operation, NaN where not timed); and ``cases``, with variant, case, label (its words) and
        a column for each setting. A run whose counts are derived from what was observed has them
        once somebody who knows the experiment has derived them (`labkit.lab.experiment.complete`).
    path
        The directory it was loaded from or saved in.
    recorded
        True when it stands in for a kernel that is not running here.
    derived_tables
        Names of the tables that follow from the others; they are made anew when the run is
        judged, and never saved.
    """

    experiment: str
    profile: str
    parameters: dict[str, object]
    provenance: dict[str, object]
    tables: dict[str, pd.DataFrame]
    path: Path | None = None
    recorded: bool = False
    derived_tables: frozenset[str] = frozenset()

    def derived(self, tables: Mapping[str, pd.DataFrame]) -> Run:
        """The run with tables that follow from its own; they are not saved.

        One that the run has already is replaced.
        """
        return replace(
            self,
            tables={**self.tables, **tables},
            derived_tables=self.derived_tables | frozenset(tables),
        )

    @property
    def counts(self) -> pd.DataFrame:
        """The counts table."""
        return self.table("counts")

    @property
    def case_table(self) -> pd.DataFrame:
        """The table of cases; where there is none, the cases of the counts, which name themselves.

        Columns variant, case, label, and one for each setting.
        """
        if "cases" in self.tables:
            return self.tables["cases"]
        cases = self.counts[["variant", "case"]].drop_duplicates()
        return cases.assign(label=cases["case"].where(cases["case"] != "", cases["variant"]))

    def label(self, case: str) -> str:
        """The words of a case; its id where the run has none for it."""
        rows = self.case_table
        found = rows.loc[rows["case"] == case, "label"]
        return str(found.iloc[0]) if len(found) else case

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

    def count(self, variant: str, case: str | Sequence[str] | None = None) -> Count:
        """Add up the rows of one variant.

        Parameters
        ----------
        variant
            ``"broken"``, ``"control"`` or ``"fixed"``.
        case
            One case, or several; None adds up all of them.

        Raises
        ------
        BadRun
            When the run has no such row: a missing measurement must not look like zero anomalies.
        """
        rows = self.counts[self.counts["variant"] == variant]
        if case is not None:
            wanted_ids = {case} if isinstance(case, str) else set(case)
            rows = rows[rows["case"].isin(wanted_ids)]
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
        self._rows: list[tuple[object, ...]] = []

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
        """
        word = anomaly or self._anomaly
        self._rows.append((variant, case, operations, anomalies, word, cost_ns))

    def table(self) -> pd.DataFrame:
        """Return the counts table.

        Raises
        ------
        BadInput
            A variant was never added, or is unknown; numbers are negative; there are more
            anomalies than operations.
        """
        counts = pd.DataFrame(self._rows, columns=list(_COUNTS)).astype(
            {name: kind for name, kind in _COUNTS.items() if kind != "text"}
        )
        _check_counts(counts)
        if missing := [one for one in VARIANTS if one not in set(counts["variant"])]:
            raise BadInput(
                f"The counts lack the variant {' and '.join(missing)}; "
                f"an experiment measures broken, control and fixed."
            )
        return counts


def check(run: Run) -> None:
    """Refuse what would not come back from disk as it went, or would make a path of its own.

    Raises
    ------
    BadInput
        The run breaks the contract of `Run`.
    """
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
    if not run.tables:
        raise BadInput(f"A run of {run.experiment} needs at least one table.")
    if "counts" in run.tables:
        _check_counts(run.counts)
    if "cases" in run.tables:
        _check_cases(run.tables["cases"])


def _check_cases(cases: pd.DataFrame) -> None:
    if missing := [name for name in ("variant", "case", "label") if name not in cases.columns]:
        raise BadInput(f"The table of cases lacks the column {' and '.join(missing)}.")
    if twice := sorted(cases["case"][cases["case"].duplicated()]):
        raise BadInput(f"Two cases call themselves {twice[0]!r}.")


def _check_counts(counts: pd.DataFrame) -> None:
    if missing := [name for name in _COUNTS if name not in counts.columns]:
        raise BadInput(f"The counts lack the column {' and '.join(missing)}.")
    for name, kind in _COUNTS.items():
        if kind != "text" and str(counts[name].dtype) != kind:
            raise BadInput(f"The column {name} of the counts is {kind}, not {counts[name].dtype}.")
    unknown = sorted(set(map(str, counts["variant"].unique())) - set(VARIANTS))
    if unknown:
        raise BadInput(f"A variant is one of {', '.join(VARIANTS)}, not {unknown[0]!r}.")
    anomalies, operations, cost = counts["anomalies"], counts["operations"], counts["cost_ns"]
    for wrong, what in (
        ((anomalies < 0) | (operations < 0), "are negative"),
        (anomalies > operations, "are more than operations: count each operation once"),
        ((cost < 0) | np.isinf(cost), "have a cost that is no number of nanoseconds"),
    ):
        for row in counts[wrong].to_dict("records"):
            raise BadInput(
                f"Counts {what} ({row['variant']}, case {row['case']!r}: {row['anomalies']:,} "
                f"anomalies in {row['operations']:,} operations, {row['cost_ns']} ns each)."
            )


