"""The ledger of claims for a reader: as text, as JSON, as the report's front page and its pages.

What is judged, and by what, is :mod:`labkit.analysis.claims`; here it is only told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from labkit.analysis import claims
from labkit.analysis.claims import (
    DEPENDS,
    FALSE,
    TRUE,
    UNTESTABLE,
    WORDS,
    Claim,
    Ledger,
    Outcome,
    Verdict,
)
from labkit.analysis.runs import Run
from labkit.failures.experiment import catalogue

_KEY: Final = ("1.1", "1.2", "1.3", "1.6", "3.1a")  # what a reader in a hurry wants to know

STYLE: Final = """
.mixed { color: #0b5a8a; }
.badge.mixed { background: #eaf3f9; }
table.counts td, table.counts th { padding-right: 1.2rem; }
td.number { text-align: right; }
.ledger ul { list-style: none; margin: 0; padding: 0; } .ledger li { margin: 0 0 0.3rem; }
.ledger p { margin: 0; } .ledger code { font-size: 0.85em; }
.ledger .id { white-space: nowrap; } .ledger td { overflow-wrap: anywhere; }
.figures { color: #555; } .sign { font-size: 0.85em; }
.filters { display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; align-items: end; }
.filters[hidden] { display: none; }
.filters input, .filters select { font: inherit; max-width: 100%; padding: 0.3rem; }
figure { margin: 1rem 0; }
@media (max-width: 40rem) {
  table.ledger, .ledger tbody, .ledger tr, .ledger td { display: block; }
  .ledger thead { display: none; }
  .ledger tr { border: 1px solid #ccc; border-radius: 0.4rem; padding: 0.5rem 0.7rem;
    margin: 0.7rem 0; }
  .ledger tr[hidden] { display: none; }
  .ledger td { border: 0; padding: 0.15rem 0; font-size: 0.95rem; }
  .ledger td:first-child { font-weight: 700; }
  .ledger td[data-label]::before { content: attr(data-label) " "; color: #555; }
  .filters label { flex: 1 1 100%; } .filters input, .filters select { width: 100%; }
}
"""
"""Style of everything that is told here; a phone gets a card for each row of the ledger."""

_SCRIPT: Final = """
(() => {
  const form = document.querySelector('.filters');
  const body = document.querySelector('table.ledger tbody');
  const rows = [...body.rows];
  const by = (name) => form.elements[name].value;
  const show = () => {
    let seen = 0;
    for (const row of rows) {
      row.hidden = !(row.textContent.toLowerCase().includes(by('words').toLowerCase())
        && row.dataset.words.includes(by('verdict'))
        && (!by('chapter') || row.dataset.chapter === by('chapter')));
      seen += !row.hidden;
    }
    const order = by('order');
    const key = (row) => order === 'experiment' ? row.dataset.experiment : +row.dataset[order];
    rows.sort((a, b) => key(a) < key(b) ? -1 : key(a) > key(b) ? 1
      : a.dataset.place - b.dataset.place);
    body.append(...rows);
    form.querySelector('output').textContent = seen + ' of ' + rows.length + ' claims';
  };
  form.addEventListener('input', show);
  form.addEventListener('submit', (event) => event.preventDefault());
  form.hidden = false;
  show();
})();
"""


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


class Told:
    """A part of the ledger that a notebook shows as a page would.

    Parameters
    ----------
    html, text : str
        The same for a browser and for a terminal.
    """

    def __init__(self, html: str, text: str) -> None:
        self.html, self.text = html, text

    def _repr_html_(self) -> str:
        return f"<style>{STYLE}</style>{self.html}"

    def __repr__(self) -> str:
        return self.text


def counts(ledger: Ledger) -> Told:
    """Tell how many claims have which verdict, kernel by kernel.

    Parameters
    ----------
    ledger : Ledger
        From `evaluate`.
    """
    found = ledger.counts()
    rows = "".join(
        f"<tr><td>{_badge(word)}</td>"
        + "".join(f"<td class='number'>{found[kernel][word]}</td>" for kernel in ledger.kernels)
        + "</tr>"
        for word in WORDS
    )
    html = (
        f"<table class='counts'><thead><tr><th>{len(ledger.claims)} claims</th>"
        f"{_heads(ledger)}</tr></thead><tbody>{rows}</tbody></table>"
    )
    return Told(html, _counts_text(ledger))


def published(ledger: Ledger) -> Told:
    """Tell the article's figures of chapter 5 beside ours.

    Parameters
    ----------
    ledger : Ledger
        From `evaluate`.
    """
    rows = claims.beside(ledger)
    html = rows.to_html(index=False, border=0, na_rep="")
    return Told(html, rows.to_string(index=False))


def differences(ledger: Ledger) -> Told:
    """Tell side by side what came to something else on one kernel than on another.

    Parameters
    ----------
    ledger : Ledger
        From `evaluate`.
    """
    rows, lines = [], []
    for claim in ledger.differing():
        for outcomes in zip(*(one.outcomes for one in ledger.of(claim)), strict=True):
            if len({one.holds for one in outcomes} - {None}) < 2:
                continue
            what = f"{claim.id}, {outcomes[0].case.when or claim.says}"
            cells = "".join(f"<td>{_decision(one)}</td>" for one in outcomes)
            rows.append(f"<tr><td>{escape(what)}</td>{cells}</tr>")
            lines.append(f"{what}: " + "; ".join(map(_case_text, outcomes)))
    if not rows:
        known = " and ".join(ledger.kernels) or "no kernel"
        words = (
            f"Nothing was decided otherwise on one of the kernels {known} than on another."
            if len(ledger.kernels) > 1
            else f"There are runs of {known} alone, so that nothing can differ yet."
        )
        return Told(f"<p>{words}</p>", words)
    head = f"<thead><tr><th>claim</th>{_heads(ledger)}</tr></thead>"
    return Told(f"<table>{head}<tbody>{''.join(rows)}</tbody></table>", "\n".join(lines))


def table(
    ledger: Ledger, sections: Mapping[str, str] | None = None, *, pages: bool = False
) -> Told:
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
    wrong = {claim.id for claim in ledger.wrong()} if pages else set()
    rows = "".join(
        _row(ledger, claim, place, sections or {}, claim.id in wrong)
        for place, claim in enumerate(ledger.claims)
    )
    html = (
        "<table class='ledger'><thead><tr><th>no.</th><th>the article says</th><th>verdict</th>"
        f"<th>decided by</th></tr></thead><tbody>{rows}</tbody></table>"
    )
    return Told(html, as_text(ledger))


def front(ledger: Ledger, sections: Mapping[str, str]) -> str:
    """Make the part of the report's first page that tells the verdicts.

    Parameters
    ----------
    ledger : Ledger
        From `evaluate`.
    sections : mapping
        Where an experiment and its figure are shown, by its id.

    Returns
    -------
    str
        HTML that loads nothing; its script filters and sorts the table, which is whole without.
    """
    parts = ["<section id='verdicts'><h2>What the article says, and what the kernel does</h2>"]
    if ledger.changes:
        items = "".join(f"<li>{escape(str(change))}</li>" for change in ledger.changes)
        parts.append(
            f"<div class='problem'><p>{_badge(FALSE, 'CHANGED')} This kernel decides otherwise "
            f"than the recorded runs:</p><ul>{items}</ul></div>"
        )
    parts += [counts(ledger).html, _in_short(ledger)]
    if len(ledger.kernels) > 1:
        parts += ["<h3>What differs between the kernels</h3>", differences(ledger).html]
    chapters = dict.fromkeys((claim.id.split(".")[0], claim.chapter) for claim in ledger.claims)
    parts += [
        "<h3>Every claim</h3>",
        "<form class='filters' hidden><label>Search <input type='search' name='words'></label> ",
        _select("verdict", [(word, word) for word in WORDS]),
        _select("chapter", [(number, f"{number}. {title}") for number, title in chapters]),
        _select("order", [("place", "as in the article"), ("verdict", "by verdict"),
                          ("experiment", "by experiment")], every=""),
        "<output></output></form>",
        table(ledger, sections, pages=True).html,
        f"<script>{_SCRIPT}</script></section>",
    ]  # fmt: skip
    return "\n".join(parts)


def page_name(claim: Claim) -> str:
    """Name the page of a claim.

    Parameters
    ----------
    claim : Claim
        One of `Ledger.wrong`.
    """
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
        title = f"{claim.id} {claim.says}"
        yield page_name(claim), title, _page(ledger, claim, newest, sections, pictures)


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


def _page(
    ledger: Ledger,
    claim: Claim,
    newest: Verdict,
    sections: Mapping[str, str],
    pictures: Mapping[str, str],
) -> str:
    cases = []
    for outcomes in zip(*(one.outcomes for one in ledger.of(claim)), strict=True):
        case = outcomes[0].case
        cells = "".join(
            f"<td data-label='{escape(kernel)}'>{_decision(one)}</td>"
            for kernel, one in zip(ledger.kernels, outcomes, strict=True)
        )
        cases.append(
            f"<tr><td>{escape(case.when or 'always')}<br><code>{escape(case.holds)}</code></td>"
            f"<td data-label='experiment'>{_link(case.experiment, sections)}</td>{cells}</tr>"
        )
    runs = [one.run for one in newest.outcomes if one.run is not None]
    shown = [id for id in claim.experiments if id in pictures]
    return "\n".join(
        [
            "<p class='small'>The article says:</p>",
            f"<h1>{escape(claim.id)} {escape(claim.says)}</h1>",
            f"<p>{_verdicts(ledger, claim)}</p>",
            f"<h2>What one would see if it were right</h2><p>{escape(claim.expected)}</p>",
            f"<h2>What happens</h2><p>{_prose(claim.happens, claim, newest)}</p>",
            f"<p class='small'>Figures of kernel {escape(newest.kernel)}: "
            + ", ".join(dict.fromkeys(map(_source, runs)))
            + ".</p>",
            *(
                f"<figure><img src='data:image/png;base64,{pictures[experiment]}' "
                f"alt='Figure of {experiment}'><figcaption class='small'>"
                f"{_link(experiment, sections)}</figcaption></figure>"
                for experiment in shown
            ),
            f"<h2>What to do instead</h2><p>{_prose(claim.instead, claim, newest)}</p>",
            "<h2>Case by case</h2><p>The article is right in a case where the statement below it "
            "holds for the run.</p>",
            f"<table class='ledger'><thead><tr><th>case</th><th>experiment</th>{_heads(ledger)}"
            f"</tr></thead><tbody>{''.join(cases)}</tbody></table>",
        ]
    )


def _row(
    ledger: Ledger, claim: Claim, place: int, sections: Mapping[str, str], has_page: bool
) -> str:
    newest = ledger.newest(claim)
    told = newest or next(iter(ledger.of(claim)), None)
    says = (
        f"<a href='{page_name(claim)}'>{escape(claim.says)}</a>" if has_page else escape(claim.says)
    )
    decided = "".join(
        f"<li>{_sign(one)} {escape(one.case.when)}{': ' if one.case.when else ''}"
        f"{_link(one.case.experiment, sections)} "
        f"<span class='figures'>{escape(one.figures or one.problem)}</span></li>"
        for one in (told.outcomes if told else ())
    )
    decided = f"<ul>{decided}</ul>" if decided else f"<p>{escape(claim.reason)}</p>"
    words = " ".join(dict.fromkeys(one.word for one in ledger.of(claim)))
    rank = WORDS.index(told.word) if told else len(WORDS)
    return (
        f"<tr id='claim-{claim.id}' data-place='{place}' data-words='{words}' "
        f"data-verdict='{rank}' data-chapter='{claim.id.split('.')[0]}' "
        f"data-experiment='{escape(' '.join(claim.experiments) or '~')}'>"
        f"<td class='id'>{escape(claim.id)}</td><td>{says}</td><td>{_verdicts(ledger, claim)}</td>"
        f"<td>{decided}</td></tr>"
    )


def _in_short(ledger: Ledger) -> str:
    """The verdicts that say most, each with the first sentence of what happens."""
    items = []
    for claim in ledger.claims:
        newest = ledger.newest(claim)
        if claim.id in _KEY and newest is not None and claim in ledger.wrong():
            first = re.split(r"(?<=[.!?])\s+(?=[A-Z])", claims.told(claim.happens, claim, newest))[
                0
            ]
            items.append(
                f"<li>{_badge(newest.word)} <a href='{page_name(claim)}'>{escape(claim.says)}</a>"
                f"<br>{escape(first)}</li>"
            )
    return f"<ul class='findings'>{''.join(items)}</ul>"


def _verdicts(ledger: Ledger, claim: Claim) -> str:
    words = {one.kernel: one.word for one in ledger.of(claim)}
    if len(words) < 2 or set(words.values()) == {UNTESTABLE}:
        return "".join(_badge(word) for word in dict.fromkeys(words.values()))
    return "<br>".join(
        f"<span class='small'>{escape(kernel)}</span> {_badge(word)}"
        for kernel, word in words.items()
    )


def _badge(word: str, said: str = "") -> str:
    look = {TRUE: "good", FALSE: "bad", DEPENDS: "mixed"}.get(word, "aside")
    return f"<span class='badge {look}'>{escape(said or word)}</span>"


def _sign(one: Outcome) -> str:
    look, word = {True: ("good", "so"), False: ("bad", "not so"), None: ("aside", "open")}[
        one.holds
    ]
    return f"<b class='{look} sign'>{word}</b>"


def _decision(one: Outcome) -> str:
    return f"{_sign(one)} {escape(one.figures or one.problem)}"


def _heads(ledger: Ledger) -> str:
    return "".join(f"<th>{escape(kernel)}</th>" for kernel in ledger.kernels)


def _link(experiment: str, sections: Mapping[str, str]) -> str:
    if not experiment:
        return "the article's own figures"
    where = sections.get(experiment)
    return f"<a href='{escape(where)}'>{escape(experiment)}</a>" if where else escape(experiment)


def _prose(text: str, claim: Claim, verdict: Verdict) -> str:
    """Prose with its figures; what stands in backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(claims.told(text, claim, verdict)))


def _source(run: Run) -> str:
    how = "recorded" if run.recorded else "measured here"
    return escape(f"{run.experiment}, {run.profile} profile, {how} on {run.kernel}")


def _select(name: str, options: Sequence[tuple[str, str]], every: str = "all") -> str:
    first = f"<option value=''>{every}</option>" if every else ""
    listed = "".join(f"<option value='{value}'>{escape(word)}</option>" for value, word in options)
    return f"<label>{name.capitalize()} <select name='{name}'>{first}{listed}</select></label> "
