"""The ledger of claims for a reader: as text, as JSON, as the report's front page and its pages.

What is judged, and by what, is :mod:`labkit.judge.claims`; here it is only told. A ``ledger`` is
what `evaluate` answers; ``sections`` are the places where an experiment and its figure are shown,
by its id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup, escape

from labkit.judge import claims
from labkit.judge.claims import WORDS, Claim, Ledger, Outcome, Verdict
from labkit.lab.catalogue import catalogue, complete, usual_parameters
from labkit.lab.pages import render
from labkit.runs import Run

_KEY: Final = ("1.1", "1.2", "1.3", "1.6", "3.1a")  # what a reader in a hurry wants to know


def evaluate(fresh: Path | None) -> Ledger:
    """Judge the article's claims by the recorded runs and those of a folder.

    ``fresh`` is a folder of runs that were measured here; None leaves it at the recorded ones. The
    `Ledger.changes` say which cases the fresh runs decide otherwise.

    Raises
    ------
    BadInput
        The ledger of claims cannot be read.
    """
    needs = {one.id: one.needs for one in catalogue().values()}
    return claims.judge(
        claims.read(), fresh=fresh, needs=needs, complete=complete, usual=usual_parameters
    )


def as_text(ledger: Ledger) -> str:
    """Tell the verdicts for a terminal.

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
        shown = ledger.shown(claim)
        assert shown is not None  # there are kernels
        lines += [f"        {_case_text(one)}" for one in shown.outcomes] or [
            f"        {shown.because}"
        ]
    if ledger.changes:
        lines.append("\nChanged since the recorded runs:")
        lines += [f"  {change}" for change in ledger.changes]
    else:
        lines.append("\nNo verdict has changed since the recorded runs.")
    if ledger.unconfirmed:
        lines.append(
            f"One run alone decides otherwise, which changes nothing; measure once more: "
            f"{', '.join(ledger.unconfirmed)}."
        )
    if ledger.left_out:
        lines.append("\nLeft out:")
        lines += [f"  {why}" for why in ledger.left_out]
    return "\n".join(lines)


def as_json(ledger: Ledger) -> dict[str, Any]:
    """Tell the verdicts for scripts.

    Returns
    -------
    dict
        JSON values: ``kernels``, ``counts`` (by kernel and verdict), ``claims`` (each with the
        kernels on which it was tried, and for each kernel verdict, reason and cases), ``changes``,
        ``unconfirmed`` (experiments to measure once more), ``left_out`` (why runs were).
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
        "unconfirmed": list(ledger.unconfirmed),
        "left_out": list(ledger.left_out),
    }


class Shown:
    """A part of the ledger that a notebook shows as a page would.

    Parameters
    ----------
    html, text : str
        The same for a browser and for a terminal.
    """

    def __init__(self, html: str, text: str) -> None:
        self.html, self.text = html, text

    def _repr_html_(self) -> str:
        return str(self.html)

    def __repr__(self) -> str:
        return self.text


def counts(ledger: Ledger) -> Shown:
    """Tell how many claims have which verdict, kernel by kernel."""
    html = render("counts.html", ledger=ledger, counts=ledger.counts(), words=WORDS)
    return Shown(html, _counts_text(ledger))


def published(ledger: Ledger) -> Shown:
    """Tell the article's figures of chapter 5 beside ours."""
    rows = claims.beside(ledger)
    html = rows.to_html(index=False, border=0, na_rep="")
    return Shown(html, rows.to_string(index=False))


def differences(ledger: Ledger) -> Shown:
    """Tell side by side what came to something else on one kernel than on another."""
    rows = [
        (f"{claim.id}, {outcomes[0].case.when or claim.says}", outcomes)
        for claim in ledger.differing()
        for outcomes in zip(*(one.outcomes for one in ledger.of(claim)), strict=True)
        if len({one.holds for one in outcomes} - {None}) == 2
    ]
    if not rows:
        known = " and ".join(ledger.kernels) or "no kernel"
        words = (
            f"Nothing was decided otherwise on one of the kernels {known} than on another."
            if len(ledger.kernels) > 1
            else f"There are runs of {known} alone, so that nothing can differ yet."
        )
        return Shown(words, words)
    lines = [f"{what}: " + "; ".join(map(_case_text, outcomes)) for what, outcomes in rows]
    return Shown(render("differences.html", ledger=ledger, rows=rows), "\n".join(lines))


def table(
    ledger: Ledger, sections: Mapping[str, str] | None = None, *, pages: bool = False
) -> Shown:
    """Tell every claim, its verdicts and what decided them.

    Parameters
    ----------
    ledger : Ledger
        From `evaluate`.
    sections : mapping, optional
        Where an experiment and its figure are shown, by its id; without, it is only named.
    pages : bool
        Whether the claims that are wrong have pages beside this one; see `page_name`.
    """
    html = render(
        "ledger.html",
        ledger=ledger,
        sections=sections or {},
        pages={claim.id for claim in ledger.wrong()} if pages else set(),
        page_name=page_name,
        words=WORDS,
    )
    return Shown(html, as_text(ledger))


def opening(ledger: Ledger) -> str:
    """Make what the report's first page says of the article.

    Parameters
    ----------
    ledger : Ledger
        From `evaluate`.

    Returns
    -------
    str
        HTML: what was claimed, how much of it is true, what to do first, and the claims that
        matter most, each with what happens and what to do instead.
    """
    kernel = ledger.kernels[-1]
    return render(
        "opening.html",
        ledger=ledger,
        kernel=kernel,
        counts=ledger.counts()[kernel],
        in_short=list(_in_short(ledger)),
        page_name=page_name,
    )


def all_claims(ledger: Ledger, sections: Mapping[str, str]) -> str:
    """Make the report's page of all claims.

    It loads nothing; its script filters and sorts the table, which is whole without.
    """
    chapters = dict.fromkeys((claim.id.split(".")[0], claim.chapter) for claim in ledger.claims)
    return render(
        "claims.html",
        ledger=ledger,
        counts=counts(ledger).html,
        differences=differences(ledger).html,
        table=table(ledger, sections, pages=True).html,
        verdict_choices=[(word, word) for word in WORDS],
        chapter_choices=[(number, f"{number}. {title}") for number, title in chapters],
    )


def page_name(claim: Claim) -> str:
    """Name the page of a claim."""
    return f"claim-{claim.id}.html"


def wrong_pages(
    ledger: Ledger, sections: Mapping[str, str], pictures: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """Make a page for each claim that the article got wrong.

    Parameters
    ----------
    ledger : Ledger
        From `evaluate`.
    sections : mapping
        Where an experiment and its figure are shown, by its id.
    pictures : mapping
        The figures that the notebooks drew, PNG in base64 by the experiment's id.

    Yields
    ------
    name : str
        Of the page, as `page_name` gives it.
    title : str
        In plain text.
    body : str
        HTML: what the article says, what happens (with figures from the newest kernel's runs,
        and pictures), what to do instead, and the case by case table of all kernels.
    """
    for claim in ledger.wrong():
        newest = ledger.newest(claim)
        assert newest is not None  # a claim is wrong by a run
        body = render(
            "claim.html",
            ledger=ledger,
            claim=claim,
            newest=newest,
            happens=_prose(claim.happens, claim, newest),
            instead=_prose(claim.instead, claim, newest),
            sources=dict.fromkeys(_source(one.run) for one in newest.outcomes if one.run),
            cases=list(zip(*(one.outcomes for one in ledger.of(claim)), strict=True)),
            sections=sections,
            pictures=pictures,
        )
        yield page_name(claim), f"{claim.id} {claim.says}", body


def _case_json(one: Outcome) -> dict[str, Any]:
    return {
        "experiment": one.case.experiment,
        "when": one.case.when,
        "holds_if": one.case.holds,
        "holds": one.holds,
        "figures": one.figures,
        "open": one.problem,
        "kernel": one.run.kernel if one.run else None,
        "recorded": one.run.recorded if one.run else None,
        "measured_at": one.run.provenance["recorded_at"] if one.run else None,
    }


def _case_text(one: Outcome) -> str:
    when = f", {one.case.when}" if one.case.when else ""
    source = one.case.experiment or "the article's figures"
    return f"{one.word}{when}: {one.told} ({source})"


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


def _in_short(ledger: Ledger) -> Iterator[tuple[Claim, Verdict, Markup, Markup]]:
    """The verdicts that say most, with the first sentences of what happens and what to do."""
    for claim in ledger.claims:
        newest = ledger.newest(claim)
        if claim.id in _KEY and newest is not None and claim in ledger.wrong():
            happens, instead = (
                _prose(re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)[0], claim, newest)
                for text in (claim.happens, claim.instead)
            )
            yield claim, newest, happens, instead


def _prose(text: str, claim: Claim, verdict: Verdict) -> Markup:
    """Prose with its figures; what stands in backticks is code."""
    told = str(escape(claims.told(text, claim, verdict)))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", told))


def _source(run: Run) -> str:
    how = "recorded" if run.recorded else "measured here"
    return f"{run.experiment}, {run.profile} profile, {how} on {run.kernel}"
