"""The ledger of claims for a reader: as text, as JSON, as the report's front page and its pages.

What is judged, and by what, is :mod:`labkit.analysis.claims`; here it is only told.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labkit.analysis import claims
from labkit.analysis.claims import (
    WORDS,
    Claim,
    Ledger,
    Outcome,
)
from labkit.failures.experiment import catalogue


def evaluate(fresh: Path | None) -> Ledger:
    """Judge the article's claims by the recorded runs and those of a folder.

    Parameters
    ----------
    fresh : Path or None
        Folder of runs that were measured here; None leaves it at the recorded ones.

    Returns
    -------
    Ledger
        Its `changes` say which cases the fresh runs decide otherwise.

    Raises
    ------
    BadInput
        The ledger of claims cannot be read.
    """
    needs = {one.id: one.needs for one in catalogue().values()}
    return claims.judge(claims.read(), fresh=fresh, needs=needs)


def as_text(ledger: Ledger) -> str:
    """Tell the verdicts for a terminal.

    Parameters
    ----------
    ledger : Ledger
        From `evaluate`.

    Returns
    -------
    str
        Counts, then each claim with what decided, then what changed.
    """
    if not ledger.kernels:
        return "There is no run of any experiment, and so there are no verdicts."
    lines, chapter = [_counts_text(ledger)], ""
    for claim in ledger.claims:
        if claim.chapter != chapter:
            chapter = claim.chapter
            lines.append(f"\n{claim.id.split('.')[0]}. {chapter}")
        lines.append(f"  {claim.id:5} {_verdict_text(ledger, claim)}: {claim.says}")
        newest = ledger.newest(claim)
        told = newest or ledger.verdicts[claim.id, ledger.kernels[-1]]
        lines += [f"        {_case_text(one)}" for one in told.outcomes] or [
            f"        {told.because}"
        ]
    if ledger.changes:
        lines.append("\nOther than recorded:")
        lines += [f"  {change}" for change in ledger.changes]
    else:
        lines.append("\nNo verdict is other than recorded.")
    return "\n".join(lines)


def as_json(ledger: Ledger) -> dict[str, Any]:
    """Tell the verdicts for scripts.

    Parameters
    ----------
    ledger : Ledger
        From `evaluate`.

    Returns
    -------
    dict
        JSON values: ``kernels``, ``counts`` (by kernel and verdict), ``claims`` (each with the
        kernels on which it was tried, and for each kernel verdict, reason and cases), ``changes``.
    """
    return {
        "kernels": list(ledger.kernels),
        "counts": ledger.counts(),
        "claims": [
            {
                "id": claim.id,
                "chapter": claim.chapter,
                "says": claim.says,
                "expected": claim.expected,
                "experiments": list(claim.experiments),
                "tried": list(ledger.tried(claim)),
                "verdicts": {
                    verdict.kernel: {
                        "verdict": verdict.word,
                        "because": verdict.because,
                        "cases": [_case_json(one) for one in verdict.outcomes],
                    }
                    for verdict in ledger.of(claim)
                },
            }
            for claim in ledger.claims
        ],
        "changes": [
            {
                "claim": change.claim.id,
                "was": _case_json(change.was),
                "now": _case_json(change.now),
            }
            for change in ledger.changes
        ],
    }


def _case_json(one: Outcome) -> dict[str, Any]:
    return {
        "experiment": one.case.experiment,
        "when": one.case.when,
        "holds_if": one.case.holds,
        "holds": one.holds,
        "figures": one.figures,
        "missing": one.problem,
        "kernel": one.run.kernel if one.run else None,
        "recorded": one.run.recorded if one.run else None,
        "measured_at": one.run.provenance["recorded_at"] if one.run else None,
    }


def _case_text(one: Outcome) -> str:
    sign = {True: "so", False: "not so", None: "open"}[one.holds]
    when = f", {one.case.when}" if one.case.when else ""
    source = one.case.experiment or "the article's figures"
    return f"{sign}{when}: {one.figures or one.problem} ({source})"


def _counts_text(ledger: Ledger) -> str:
    counts = ledger.counts()
    head = f"{f'{len(ledger.claims)} claims':18}" + "".join(f"{one:>8}" for one in ledger.kernels)
    rows = [
        f"{word:18}" + "".join(f"{counts[kernel][word]:8}" for kernel in ledger.kernels)
        for word in WORDS
    ]
    return "\n".join([head, *rows])


def _verdict_text(ledger: Ledger, claim: Claim) -> str:
    words = {verdict.kernel: verdict.word for verdict in ledger.of(claim)}
    if len(set(words.values())) == 1:
        return words[ledger.kernels[0]]
    return ", ".join(f"{word} on {kernel}" for kernel, word in words.items())
