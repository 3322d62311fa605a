"""The ledger: every claim of the article, judged from the runs that are on disk.

``data/claims.toml`` has a table for each claim: what it says, what one would see if it were right,
and for each case an experiment and a predicate over its runs. It is TOML because prose and
predicates stand there in lines of their own, so that a change of one claim shows as just that, and
because Python's own library reads it. No verdict and no figure is in it: both come from runs, and
without runs there are none.

A claim is true where its predicate holds in every case, false where it does in none, and depends
where the cases differ: on what, say their names. Where cases are open and the others agree, there
is no verdict yet: it is undecided where runs do not allow one. A verdict changes only from decided
to decided, and only in two runs of one machine.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pandas as pd

from labkit import runs
from labkit.errors import BadInput
from labkit.judge.language import BadPredicate, decide, figure, in_words, reference
from labkit.judge.plainly import plainly
from labkit.runs import RECORDED, BadRun, Complete, Run, RunIndex, Usual

LEDGER: Final = Path(__file__).resolve().parents[2] / "data" / "claims.toml"
"""The claims of the article."""

TRUE, FALSE, DEPENDS = "true", "false", "depends"
UNDECIDED, UNTESTABLE, NOT_RUN = "undecided", "not testable", "not yet run here"
WORDS: Final = (TRUE, FALSE, DEPENDS, UNDECIDED, UNTESTABLE, NOT_RUN)
"""All verdicts, in the order in which they are counted."""

_FIGURE: Final = re.compile(r"\{(?:([a-z0-9-]+): )?([^{}]+)\}")


@dataclass(frozen=True)
class Case:
    """One thing that the article would have to be right about.

    Attributes
    ----------
    experiment
        Whose runs decide; empty where the article's own figures do.
    when
        What distinguishes the case, in words that follow "depends on"; empty for the only one.
    holds
        Predicate that is true where the article is right; see :mod:`labkit.judge.language`.
    """

    experiment: str
    when: str
    holds: str


@dataclass(frozen=True)
class Claim:
    """One claim of the article.

    Attributes
    ----------
    id
        Number of chapter and claim, with a letter for a part: ``"1.2b"``.
    chapter
        The chapter's title.
    says
        The claim, in our words.
    expected
        What one would see if it were right.
    cases
        What decides; empty for a claim that no experiment can test.
    reason
        Why no experiment can; empty where one does.
    happens, instead
        What happens, and what to do. ``{broken.anomalies}`` is a figure from the first case's run,
        ``{map-life: rows(life)}`` one from the run of another experiment.
    """

    id: str
    chapter: str
    says: str
    expected: str
    cases: tuple[Case, ...]
    reason: str = ""
    happens: str = ""
    instead: str = ""

    @property
    def experiments(self) -> tuple[str, ...]:
        """The experiments whose runs decide, each once."""
        return tuple(dict.fromkeys(case.experiment for case in self.cases if case.experiment))


@dataclass(frozen=True)
class Outcome:
    """What one case came to on one kernel.

    Attributes
    ----------
    case
        What was asked.
    holds
        Whether the article is right; None where that is open.
    figures
        The figures that decided, in words.
    run
        Where they come from; None without a run.
    problem
        Why it is open; empty where it is not.
    plain
        The figures for who does not read the language.
    """

    case: Case
    holds: bool | None
    figures: str = ""
    run: Run | None = None
    problem: str = ""
    plain: str = ""

    @property
    def undecided(self) -> bool:
        """Whether it was run, and the run does not allow an answer."""
        return self.holds is None and self.run is not None

    @property
    def word(self) -> str:
        """Whether the article is right, in one word."""
        if self.holds is None:
            return "undecided" if self.undecided else "not run"
        return "yes" if self.holds else "no"

    @property
    def told(self) -> str:
        """What decided, and why nothing did."""
        return "; ".join(filter(None, [self.figures, self.problem]))

    @property
    def in_words(self) -> str:
        """The same for who does not read the language."""
        return "; ".join(filter(None, [self.plain, self.problem]))


@dataclass(frozen=True)
class Verdict:
    """What one claim came to on one kernel.

    Attributes
    ----------
    claim
        What was claimed.
    kernel
        Series of kernels, such as ``"6.18"``.
    outcomes
        What the cases came to, in their order.
    """

    claim: Claim
    kernel: str
    outcomes: tuple[Outcome, ...]

    @property
    def word(self) -> str:
        """One of `WORDS`."""
        if not self.outcomes:
            return UNTESTABLE
        found = {one.holds for one in self.outcomes}
        if {True, False} <= found:
            return DEPENDS
        if None in found:  # what is known so far may be the half of what it depends on
            ran = all(one.holds is not None or one.undecided for one in self.outcomes)
            return UNDECIDED if ran else NOT_RUN
        return TRUE if True in found else FALSE

    @property
    def because(self) -> str:
        """On what it depends, why it cannot be tested, or what is missing; else empty."""
        missing = "; ".join(dict.fromkeys(one.problem for one in self.outcomes if one.problem))
        if self.word == UNTESTABLE:
            return self.claim.reason
        if self.word in (NOT_RUN, UNDECIDED):
            return missing
        words = [
            f"{word}: {'; '.join(one.case.when for one in self.outcomes if one.holds is holds)}"
            for word, holds in (("Yes", True), ("No", False))
            if self.word == DEPENDS
        ]
        return ". ".join(words + ([f"Open: {missing}"] if missing else []))


@dataclass(frozen=True)
class Change:
    """A case that two runs of this machine decide otherwise than the recorded one.

    Attributes
    ----------
    claim
        Of which it is a case.
    was, now
        From the recorded and from the newest run.
    """

    claim: Claim
    was: Outcome
    now: Outcome

    def __str__(self) -> str:
        assert self.was.run is not None and self.now.run is not None
        what = self.claim.id + (f", {self.now.case.when}" if self.now.case.when else "")
        return (
            f"{what}: {self.was.word} on {self.was.run.kernel} as recorded ({self.was.figures}), "
            f"{self.now.word} on {self.now.run.kernel} now ({self.now.figures})"
        )


@dataclass(frozen=True)
class Ledger:
    """All claims with their verdicts.

    Attributes
    ----------
    claims
        In the order of the article.
    kernels
        Series of kernels of which there are runs, oldest first.
    verdicts
        By claim id and kernel series.
    changes
        Cases that the two newest runs of here decide otherwise than the recorded one of the same
        series, or of the nearest older one where the series was never recorded.
    unconfirmed
        Experiments whose newest run of here alone decides a case otherwise: measure them once more
        to see whether that was chance.
    left_out
        Why runs were not looked at: what stands on disk is no whole run.
    """

    claims: tuple[Claim, ...]
    kernels: tuple[str, ...]
    verdicts: Mapping[tuple[str, str], Verdict]
    changes: tuple[Change, ...] = field(default=())
    unconfirmed: tuple[str, ...] = field(default=())
    left_out: tuple[str, ...] = field(default=())

    @property
    def runs(self) -> dict[tuple[str, str], Run]:
        """The runs that decided, by experiment and kernel series."""
        return {
            (one.case.experiment, kernel): one.run
            for (_, kernel), verdict in self.verdicts.items()
            for one in verdict.outcomes
            if one.run is not None
        }

    def of(self, claim: Claim) -> tuple[Verdict, ...]:
        """The verdicts of one claim, one for each kernel."""
        return tuple(self.verdicts[claim.id, kernel] for kernel in self.kernels)

    def tried(self, claim: Claim) -> tuple[str, ...]:
        """The kernels on which a claim was tried."""
        return tuple(one.kernel for one in self.of(claim) if one.word in (TRUE, FALSE, DEPENDS))

    def counts(self) -> dict[str, dict[str, int]]:
        """How many claims have which verdict, by kernel."""
        return {
            kernel: {
                word: sum(self.verdicts[one.id, kernel].word == word for one in self.claims)
                for word in WORDS
            }
            for kernel in self.kernels
        }

    def differing(self) -> tuple[Claim, ...]:
        """The claims that came to something else on one kernel than on another."""

        def differs(claim: Claim) -> bool:
            seen: dict[Case, set[bool]] = {}
            for verdict in self.of(claim):
                for one in verdict.outcomes:
                    if one.holds is not None:
                        seen.setdefault(one.case, set()).add(one.holds)
            return any(len(found) == 2 for found in seen.values())

        return tuple(filter(differs, self.claims))

    def wrong(self) -> tuple[Claim, ...]:
        """The claims that are false, or true in some cases alone, on a kernel at least."""
        return tuple(
            claim
            for claim in self.claims
            if any(one.word in (FALSE, DEPENDS) for one in self.of(claim))
        )

    def undecided(self) -> tuple[Claim, ...]:
        """The claims that a run leaves undecided on a kernel."""
        return tuple(
            claim for claim in self.claims if any(one.word == UNDECIDED for one in self.of(claim))
        )

    def untried(self) -> tuple[Claim, ...]:
        """The claims that could be tested and were on no kernel."""
        return tuple(
            claim
            for claim in self.claims
            if claim.cases and all(one.word == NOT_RUN for one in self.of(claim))
        )

    def newest(self, claim: Claim) -> Verdict | None:
        """The verdict of the newest kernel on which a claim was tried."""
        tried = self.tried(claim)
        return self.verdicts[claim.id, tried[-1]] if tried else None

    def shown(self, claim: Claim) -> Verdict | None:
        """The newest verdict, or where the claim was never tried the first; None without runs."""
        return self.newest(claim) or next(iter(self.of(claim)), None)

    def complaints(self) -> list[str]:
        """What is not as it should be: a verdict that changed, or a claim that has none."""
        return [str(change) for change in self.changes] + [
            f"{claim.id}: no kernel has a run of it" for claim in self.untried()
        ]


def read(file: Path = LEDGER) -> tuple[Claim, ...]:
    """Read the claims.

    Raises
    ------
    BadInput
        When it is no such file, names a claim twice, or leaves one with neither case nor reason.
    """
    content = _content(file)
    claims = tuple(_claim(entry, content.get("chapters", {})) for entry in content.get("claim", []))
    ids = [claim.id for claim in claims]
    if twice := {id for id in ids if ids.count(id) > 1}:
        raise BadInput(f"{file} has the claim {min(twice)} twice.")
    return claims


def judge(
    claims: Sequence[Claim],
    *,
    recorded: Path = RECORDED,
    fresh: Path | None = None,
    needs: Mapping[str, Sequence[str]] | None = None,
    complete: Complete = lambda run: run,
    usual: Usual = lambda experiment, profile: None,
) -> Ledger:
    """Judge claims by the runs that are there.

    Parameters
    ----------
    claims
        From `read`.
    recorded, fresh
        Folders of runs, as `RunIndex` takes them.
    needs
        Kernel features by experiment, to say what a kernel would have to have.
    complete, usual
        As `RunIndex` takes them.

    Returns
    -------
    Ledger
        Without kernels, and so without verdicts, where there are no runs.
    """
    index = RunIndex(recorded, fresh, complete=complete, usual=usual)
    before = RunIndex(recorded, complete=complete)
    ids = dict.fromkeys(id for claim in claims for id in claim.experiments)
    kernels = sorted({kernel for id in ids for kernel in index.kernels(id)}, key=runs.natural)
    verdicts: dict[tuple[str, str], Verdict] = {}
    changes, unconfirmed = [], []
    for claim in claims:
        for kernel in kernels:
            outcomes = []
            for case in claim.cases:
                now = _outcome(case, index, kernel, needs or {})
                # Where no run of here decided, there is nothing that could differ.
                fresh_run = now.run is not None and not now.run.recorded
                was = recorded_outcome(case, kernel, before) if fresh_run else now
                if _differs(was, now):
                    again = _again(case, index, kernel)
                    if again is not None and again.holds == now.holds:
                        changes.append(Change(claim, was, now))
                    else:
                        unconfirmed.append(case.experiment)
                        now = _open(now)
                outcomes.append(now)
            verdicts[claim.id, kernel] = Verdict(claim, kernel, tuple(outcomes))
    return Ledger(
        tuple(claims),
        tuple(kernels),
        verdicts,
        tuple(changes),
        tuple(dict.fromkeys(unconfirmed)),
        tuple(dict.fromkeys(index.left_out)),
    )


def recorded_outcome(case: Case, kernel: str, index: RunIndex) -> Outcome:
    """What the recorded runs say of a case.

    Parameters
    ----------
    case
        Of a claim.
    kernel
        Series of kernels; where it was never recorded, the nearest older one counts.
    index
        Of recorded runs.
    """
    return _outcome(case, index, _baseline(index, case, kernel), {})


def beside(ledger: Ledger, file: Path = LEDGER) -> pd.DataFrame:
    """Put figures of chapter 5 beside ours, where a run has one that means the same.

    Parameters
    ----------
    ledger
        From `judge`; its kernels are compared.
    file
        The ledger of claims, whose ``[[beside]]`` tables say which figure of a run is meant.

    Returns
    -------
    pandas.DataFrame
        One row for each figure of the article: ``figure``, ``method``, ``article`` (with its unit),
        ``where`` (it stands), and a column for each kernel; empty where nothing compares.
    """
    ours = {(one["figure"], one["method"]): one for one in _content(file).get("beside", [])}
    rows = []
    for _, row in reference()["chapter_5"].iterrows():
        line = {
            "figure": row["figure"],
            "method": row["method"],
            "article": f"{in_words(row['value'])} {row['unit']}",
            "where": row["where"],
        }
        one = ours.get((row["figure"], row["method"]))
        for kernel in ledger.kernels:
            run = ledger.runs.get((one["experiment"], kernel)) if one else None
            line[kernel] = figure(_line(one["here"]), run) if one and run else ""
        rows.append(line)
    return pd.DataFrame(rows)


def told(text: str, claim: Claim, verdict: Verdict) -> str:
    """Fill the figures of a run into prose.

    Parameters
    ----------
    text
        The claim's `happens` or `instead`.
    claim
        Whose experiments it may name.
    verdict
        On the kernel whose runs give the figures.

    Returns
    -------
    str
        With "(not measured on 6.1)" in place of a figure that the kernel's runs do not have.
    """
    by_experiment = {one.case.experiment: one.run for one in verdict.outcomes}

    def fill(found: re.Match[str]) -> str:
        experiment = found[1] or "".join(claim.experiments[:1])
        run = by_experiment.get(experiment)
        if not experiment:
            return figure(found[2], None)
        return figure(found[2], run) if run else f"(not measured on {verdict.kernel})"

    return _FIGURE.sub(fill, text)


def _claim(entry: Mapping[str, Any], chapters: Mapping[str, str]) -> Claim:
    id = str(entry.get("id", "one without an id"))
    cases = tuple(
        Case(str(case.get("experiment", "")), str(case.get("when", "")), _line(case["holds"]))
        for case in entry.get("case", [])
    )
    reason = str(entry.get("reason", ""))
    if bool(cases) == bool(reason):
        raise BadInput(f"Claim {id} needs cases that decide it, or else the reason why none can.")
    if len(cases) > 1 and not all(case.when for case in cases):
        raise BadInput(f"Claim {id} has several cases; each must say when it is meant.")
    missing = [name for name in ("says", "expected") if not entry.get(name)]
    if missing or id.split(".")[0] not in chapters:
        raise BadInput(f"Claim {id} lacks {missing[0] if missing else 'a chapter that is named'}.")
    return Claim(
        id,
        chapters[id.split(".")[0]],
        _line(entry["says"]),
        _line(entry["expected"]),
        cases,
        _line(reason),
        _line(entry.get("happens", "")),
        _line(entry.get("instead", "")),
    )


def _content(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} cannot be read as a ledger of claims ({error}).") from None


def _line(text: str) -> str:
    return " ".join(text.split())


def _outcome(
    case: Case, index: RunIndex, kernel: str, needs: Mapping[str, Sequence[str]]
) -> Outcome:
    run = index.newest(case.experiment, kernel) if case.experiment else None
    if case.experiment and run is None:
        features = ", ".join(needs.get(case.experiment, ()))
        wanted = f" (needs {features})" if features else ""
        return Outcome(case, None, problem=f"{case.experiment}{wanted}")
    return _decided(case, run)


def _decided(case: Case, run: Run | BadRun | None) -> Outcome:
    if isinstance(run, BadRun):
        return Outcome(case, None, problem=str(run))
    try:
        answer = decide(case.holds, run)
    except BadPredicate as error:
        return Outcome(case, None, problem=str(error))
    plain = plainly(answer.figures, run)
    return Outcome(case, answer.holds, str(answer), run, answer.why, plain)


def _differs(was: Outcome, now: Outcome) -> bool:
    """Whether a run of here decides a case otherwise than the recorded one did."""
    return None not in (was.holds, now.holds) and was.holds != now.holds


def _again(case: Case, index: RunIndex, kernel: str) -> Outcome | None:
    """What the run of here before the newest one said; None where there is none."""
    run = index.before(case.experiment, kernel)
    return None if run is None else _decided(case, run)


def _open(now: Outcome) -> Outcome:
    """One run alone turns no verdict: a stall of the machine may have decided it."""
    return Outcome(
        now.case,
        None,
        now.figures,
        now.run,
        "decided otherwise than recorded in one run of here alone",
        now.plain,
    )


def _baseline(index: RunIndex, case: Case, kernel: str) -> str:
    """The recorded series to compare with: the same, or the nearest older, or the oldest."""
    known = sorted(index.kernels(case.experiment), key=runs.natural) if case.experiment else []
    older = [one for one in known if runs.natural(one) <= runs.natural(kernel)]
    return (older or known or [kernel])[-1 if older else 0]
