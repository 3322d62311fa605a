"""Two kernels side by side: what is known to differ between them, held against recorded runs.

Every `Difference` says what kernels did until a change of the kernel's source, and what they have
done since. The runs tell what the recorded kernels do; a finding holds them together. Whatever
else came out otherwise on one kernel than on the other is found by comparing counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pandas as pd

from experiments.concurrency.nested_update import OWN_RULE, SHARED_RULE, lock_rule, refusal
from experiments.kernel_facts.lru_free_target import FIXED_RULE, SHARE_RULE, rule
from labkit.errors import BadInput
from labkit.judge.findings import FAILS, HOLDS, Check, Finding
from labkit.lab.catalogue import catalogue, complete, judge
from labkit.runs import RECORDED, VARIANTS, Run, RunIndex, natural

KERNELS: Final = ("6.1", "6.18")
"""The series that are held side by side."""

_NEVER, _SOMETIMES = "never", "at some switches"
_WAITS, _AT_ONCE = "waits for all programs", "answers at once"


@dataclass(frozen=True)
class Difference:
    """One thing that kernels do otherwise since a known change.

    Attributes
    ----------
    experiment
        Whose runs show it.
    what
        The question, in words.
    since
        Series of the first kernel with the change.
    commit
        The change, in the kernel's own repository.
    before, after
        What the runs of older and of newer kernels tell.
    tell
        What a run tells: ``before``, ``after`` or something else.
    """

    experiment: str
    what: str
    since: str
    commit: str
    before: str
    after: str
    tell: Callable[[Run], str]

    def expected(self, kernel: str) -> str:
        """What a kernel of that series should do."""
        return self.after if natural(kernel) >= natural(self.since) else self.before


def _null_lookups(run: Run) -> str:
    return _SOMETIMES if run.count("broken", "outer-hash").anomalies else _NEVER


def _waiting_lookups(run: Run) -> str:
    return _WAITS if run.count("broken", "process-lookup").rate > 0.5 else _AT_ONCE


DIFFERENCES: Final = (
    Difference(
        "outer-map-null", "a program finds no inner map in an outer hash", "6.16", "2c304172e031",
        _SOMETIMES, _NEVER, _null_lookups,
    ),
    Difference(
        "outer-lookup-wait", "a process's lookup in an outer map", "6.8", "c26f2a890139",
        _WAITS, _AT_ONCE, _waiting_lookups,
    ),
    Difference(
        "lru-free-target", "keys that a full LRU map evicts at once", "6.16", "d4adf1c9ee77",
        FIXED_RULE, SHARE_RULE, rule,
    ),
    Difference(
        "nested-update", "the answer to an update inside another of its bucket", "6.15",
        "4fa8d68aa53e", "EBUSY", "EDEADLK", refusal,
    ),
    Difference(
        "nested-update", "what is locked while a bucket is changed, for the same CPU", "6.15",
        "4fa8d68aa53e", SHARED_RULE, OWN_RULE, lock_rule,
    ),
)  # fmt: skip
"""Changes of the kernel that an experiment of this lab shows."""


class Pair:
    """The newest recorded run of every experiment on each kernel.

    Parameters
    ----------
    profile : str
        ``quick`` or ``full``: only runs of one profile are compared.
    recorded : Path
        Folder of recorded runs.
    kernels : sequence of str
        Series of kernels, oldest first.

    Raises
    ------
    BadRun
        When one of the runs is damaged.
    """

    def __init__(
        self, profile: str = "quick", recorded: Path = RECORDED, kernels: Sequence[str] = KERNELS
    ) -> None:
        self.kernels = tuple(kernels)
        index = RunIndex(recorded, profile=profile, complete=complete)
        found_ids = {path.parent.name for path in recorded.glob(f"*/{profile}/*/run.json")}
        ids = sorted(found_ids & set(catalogue()))  # a benchmark is no experiment
        self._runs: dict[str, dict[str, Run]] = {}
        for experiment in ids:
            for kernel in self.kernels:
                run = index.newest(experiment, kernel)
                if isinstance(run, Exception):
                    raise run
                if run is not None:
                    self._runs.setdefault(experiment, {})[kernel] = run

    @property
    def both(self) -> tuple[str, ...]:
        """The experiments that were recorded on every kernel."""
        return tuple(id for id, found in self._runs.items() if len(found) == len(self.kernels))

    def runs(self, experiment: str) -> Mapping[str, Run]:
        """The runs of one experiment by kernel; empty where it was recorded on none."""
        return self._runs.get(experiment, {})

    def differences(self) -> pd.DataFrame:
        """Tabulate `DIFFERENCES`: what each kernel does, and since when.

        Returns
        -------
        pandas.DataFrame
            Columns ``what``, ``since``, ``experiment``, and one for each kernel; empty where it
            was not recorded.
        """
        rows = []
        for one in DIFFERENCES:
            told = {kernel: one.tell(run) for kernel, run in self.runs(one.experiment).items()}
            rows.append(
                {
                    "what": one.what,
                    "since": f"{one.since} ({one.commit})",
                    "experiment": one.experiment,
                    **{kernel: told.get(kernel, "") for kernel in self.kernels},
                }
            )
        return pd.DataFrame(rows)

    def hook_points(self) -> pd.DataFrame:
        """Put what became of each hook beside each other.

        Returns
        -------
        pandas.DataFrame
            One row per hook with ``hook``, ``map`` (that was written past it), and for each
            kernel the kernel's refusal, or by whom it is passed.
        """
        columns = {
            kernel: pd.Series(
                {
                    (f"{hook['mechanism']} {hook['where']}", hook["map"]): _fate(hook, run)
                    for _, hook in run.table("hooks").iterrows()
                }
            )
            for kernel, run in self.runs("hook-points").items()
        }
        order = dict.fromkeys(hook for one in columns.values() for hook in one.index)
        rows = [
            {
                "hook": hook,
                "map": written,
                **{
                    kernel: one.get((hook, written), "no such function")
                    for kernel, one in columns.items()
                },
            }
            for hook, written in order
        ]
        return pd.DataFrame(rows)

    def errno(self) -> pd.DataFrame:
        """Answers of map operations that are not the same on every kernel.

        Returns
        -------
        pandas.DataFrame
            Rows of the table ``errno`` of errno-signal, with ``kernel``; none where all agree.

        Raises
        ------
        BadInput
            The experiment was not recorded on every kernel.
        """
        if "errno-signal" not in self.both:
            raise BadInput("errno-signal was not recorded on every kernel: record it there.")
        tables = [
            run.table("errno").assign(kernel=kernel)
            for kernel, run in self.runs("errno-signal").items()
        ]
        whole = pd.concat(tables, ignore_index=True)
        answers = [name for name in whole.columns if name != "kernel"]
        given = whole.groupby(answers)["kernel"].transform("nunique")
        return whole[given < len(tables)]

    def counts(self) -> pd.DataFrame:
        """Find the cases in which something went wrong on one kernel and never on another.

        Returns
        -------
        pandas.DataFrame
            One row per case with ``experiment``, ``variant``, ``case``, and for each kernel
            "anomalies of operations", of all experiments in `both`; cases that one kernel lacks
            are left out.
        """
        rows = []
        for experiment in self.both:
            found = self.runs(experiment)
            first = next(iter(found.values()))
            for variant in VARIANTS:
                for case in first.cases(variant):
                    if all(case in run.cases(variant) for run in found.values()):
                        each = {k: run.count(variant, case) for k, run in found.items()}
                        if len({count.anomalies > 0 for count in each.values()}) > 1:
                            words = {kernel: str(count) for kernel, count in each.items()}
                            rows.append(
                                {
                                    "experiment": experiment,
                                    "variant": variant,
                                    "case": first.label(case),
                                    **words,
                                }
                            )
        return pd.DataFrame(rows, columns=["experiment", "variant", "case", *self.kernels])

    def finding(self) -> Finding:
        """Demand that each kernel does what its age says, and every recorded run its experiment's.

        Returns
        -------
        Finding
            Of ``two-kernels``, which is no experiment.
        """
        checks = []
        for one in DIFFERENCES:
            told = {
                kernel: one.tell(run) if run else "no run"
                for kernel in self.kernels
                for run in [self.runs(one.experiment).get(kernel)]
            }
            contrary = any(
                words not in (one.expected(kernel), "no run") for kernel, words in told.items()
            )
            # What was not recorded is not known to be otherwise.
            unknown = None if "no run" in told.values() else True
            checks.append(
                Check(
                    f"{one.what}: {one.before} until {one.since}, {one.after} since",
                    False if contrary else unknown,
                    "; ".join(f"{kernel}: {words}" for kernel, words in told.items()),
                )
            )
        other = self.errno()
        checks.append(
            Check("the answers of the map's operations are the same", other.empty,
                  f"{len(other)} differ")
        )  # fmt: skip
        states = {
            f"{experiment} on {kernel}": judge(run).state
            for experiment, found in self._runs.items()
            for kernel, run in found.items()
        }
        worse = {name: state for name, state in states.items() if state != HOLDS}
        checks.append(
            Check("every recorded run shows what its experiment expects",
                  False if FAILS in worse.values() else None if worse else bool(states),
                  ", ".join(f"{name} {state}" for name, state in worse.items())
                  or f"{len(self._runs)} experiments")
        )  # fmt: skip
        alone = [id for id in self._runs if id not in self.both]
        return Finding(
            "two-kernels",
            f"{len(self.both)} experiments were recorded on {' and '.join(self.kernels)}; "
            f"{len(DIFFERENCES)} things differ as the kernel's history says, "
            f"{len(self.counts())} cases went wrong on one of them alone, and {len(other)} error "
            f"numbers differ. Recorded on one kernel alone: {', '.join(alone) or 'none'}.",
            tuple(checks),
        )


def _fate(hook: pd.Series[str], run: Run) -> str:
    if hook["answer"]:
        return str(hook["answer"])
    passings = run.table("passings")
    same = [passings[name] == hook[name] for name in ("mechanism", "where", "map")]
    of_hook = passings[same[0] & same[1] & same[2]]
    if (of_hook["passed"] == "never").all():
        return "attached, and nobody passes it"
    once = set(of_hook["writer"][of_hook["passed"] == "once"])
    by = [who for writer, who in (("process", "bpf(2)"), ("program", "programs")) if writer in once]
    return f"passed by {' and '.join(by)}" if by else "not passed as often as is written"
