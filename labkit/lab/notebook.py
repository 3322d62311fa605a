"""What a notebook calls: measure, show, draw, conclude; the last cells assert and document.

One notebook holds one `Investigation`. An experiment that cannot run, or whose finding
fails, does not stop the notebook: it is shown, remembered, and named by
:meth:`Investigation.assert_findings`, so that no failure hides another.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import DisplayHandle, display

from labkit import figures, runs
from labkit.errors import BadInput, LabError, Unavailable
from labkit.figures import Drawing, as_png
from labkit.judge.claims import Ledger
from labkit.judge.findings import FindingFailed
from labkit.judge.language import in_words
from labkit.kernel import probe
from labkit.lab import measure as worker
from labkit.lab.catalogue import draw, find, judge, latest, recorded
from labkit.lab.experiment import Experiment
from labkit.lab.pages import render, table
from labkit.lab.progress import KEPT
from labkit.lab.turns import turn
from labkit.lab.verdicts import evaluate
from labkit.lab.worker import Worker
from labkit.runs import PROFILES, Run

FINDING_MIME = "application/vnd.labkit.finding+json"
"""Output type under which the report finds what a notebook concluded; see `Outcome`."""

KEY_FIGURE = "labkit_key_figure"
"""Metadata of the figure that stands for its notebook on the report's first page."""

_CHECKOUT = Path(__file__).resolve().parents[2]
_BETWEEN_UPDATES_S = 0.25  # progress lines: enough to read, too few to flood a front end


@dataclass
class Outcome:
    """What became of one experiment in a notebook, as the report reads it.

    Attributes
    ----------
    experiment, number, question
        As in the catalogue.
    state
        ``"holds"``, ``"fails"``, ``"undecided"``, ``"error"`` (no finding came about) or
        ``"lacks"`` (this kernel lacks a feature, and no recorded run stands in).
    sentence
        The finding, or what went wrong, or what is missing.
    live
        Whether it was measured on the running kernel.
    kernel
        Release that it was measured on; empty without a run.
    run
        Directory of the run, relative to the checkout where it is inside; empty without.
    lacks
        What this kernel lacks, as a sentence; empty where it lacks nothing.
    """

    experiment: str
    number: int
    question: str
    state: str
    sentence: str
    live: bool = False
    kernel: str = ""
    run: str = ""
    lacks: str = ""


class Investigation:
    """The thread that runs through one notebook.

    `measure` and `load` answer a run, or None where there is none; whatever takes a run then does
    nothing.

    Parameters
    ----------
    name : str
        The notebook's file name without its ending.
    profile : str
        ``quick`` or ``full``.
    runs_folder : str or Path
        Where runs are saved; relative paths start at the checkout.
    changes : mapping, optional
        Parameters that differ from the profile's, by experiment id:
        ``{"transient-null": {"rounds": 5}}``.
    time_limit_s : float, optional
        Bound for each experiment, seconds, by default the profile's; times
        `labkit.lab.measure.patience`.

    Raises
    ------
    BadInput
        Unknown profile, experiment or parameter, or a value that cannot be meant.

    Examples
    --------
    >>> lab = Investigation("01-stale-reads", profile="quick")  # doctest: +SKIP
    >>> run = lab.measure("transient-null")  # doctest: +SKIP
    >>> lab.draw(run)  # doctest: +SKIP
    >>> lab.conclude(run)  # doctest: +SKIP
    >>> lab.assert_findings()  # doctest: +SKIP
    """

    def __init__(
        self,
        name: str,
        *,
        profile: str,
        runs_folder: str | Path = "runs",
        changes: Mapping[str, Mapping[str, Any]] | None = None,
        time_limit_s: float | None = None,
    ) -> None:
        if profile not in PROFILES:
            raise BadInput(f"A profile is {' or '.join(PROFILES)}, not {profile!r}.")
        if time_limit_s is not None and not (
            isinstance(time_limit_s, int | float) and time_limit_s > 0
        ):
            raise BadInput(f"time_limit_s is a number of seconds above 0, not {time_limit_s!r}.")
        wanted = {} if changes is None else changes
        if not isinstance(wanted, Mapping) or not all(
            isinstance(changed, Mapping) for changed in wanted.values()
        ):
            raise BadInput(f"changes maps experiment ids to parameters, unlike {changes!r}.")
        self.name = name
        self.profile = profile
        self.runs_folder = _CHECKOUT / runs_folder
        self.changes = {id: dict(changed) for id, changed in wanted.items()}
        for id, changed in self.changes.items():
            find(id).parameters(profile, changed)
        self.time_limit_s = time_limit_s
        self._outcomes: dict[str, Outcome] = {}
        self._pending: dict[str, str] = {}  # measured, not concluded: what the kernel lacks
        self._parameters: dict[str, object] = {}  # of each experiment, as it was run
        self._ledger: Ledger | None = None
        self._ready: Worker | None = None
        _show(f"<style>{render('parts.css')}</style>", "")

    def measure(self, experiment: str) -> Run | None:
        """Run an experiment in a worker process, and load what it saved.

        Where this kernel cannot, the recorded run of one that can stands in, marked.

        Parameters
        ----------
        experiment : str
            Id, as ``python -m labkit list`` shows it.

        Returns
        -------
        Run or None
            None where there is nothing to judge; `show`, `draw` and `conclude` take it and
            do nothing.

        Raises
        ------
        BadInput
            There is no such experiment.
        """
        subject = find(experiment)
        progress = _Progress(experiment)
        try:
            if "bpf" in subject.needs:
                # Where none runs at all, no worker is started to find that out once more.
                probe.require("bpf")
            run = self._measured(experiment, progress)
            lacks = ""
        except Unavailable as error:
            lacks = str(error)
            stand_in = self._recorded(subject, progress, lacks)
            if stand_in is None:
                return None
            run = stand_in
        except Exception as error:
            progress.end("", "")
            self._failed(subject, error)
            return None
        line = (
            f"Recorded on kernel {run.kernel} ({run.provenance['recorded_at']}), not measured "
            f"here. {lacks}"
            if run.recorded
            else f"Measured in {_seconds(run)} on kernel {run.kernel}, saved as {_place(run)}."
        )
        if isinstance(known := run.provenance.get("continued"), dict):
            line += (
                f" It was begun at {known['begun_at']} and stopped, and continued after "
                f"{known['parts_before']} parts."
            )
        html = _banner(line) if run.recorded else f"<p>{escape(line)}</p>"
        progress.end(html, line)
        _show(_counts_html(run), run.counts.to_string(index=False))
        self._pending[experiment] = lacks
        self._parameters[experiment] = run.parameters
        return run

    def load(self, experiment: str) -> Run | None:
        """The newest saved run of this profile, measured by another notebook; nothing is measured.

        Where there is none, the recorded run stands in, marked.

        Parameters
        ----------
        experiment : str
            Id, as ``python -m labkit list`` shows it.

        Returns
        -------
        Run or None
            None where there is none to show.

        Raises
        ------
        BadInput
            There is no such experiment.
        """
        subject = find(experiment)
        run = latest(self.runs_folder, experiment, self.profile)
        if run is None:
            lacks = f"{experiment} was not measured here yet."
            progress = _Progress(experiment)
            run = self._recorded(subject, progress, lacks)
            progress.end("", "")
        if run is not None:
            line = f"{'Recorded' if run.recorded else 'Measured'} on kernel {run.kernel}, read "
            line += f"from {_place(run)}."
            _show(_banner(line) if run.recorded else f"<p>{escape(line)}</p>", line)
        return run

    def tabulate(self, run: Run | None, table: Callable[[Run], pd.DataFrame]) -> None:
        """Show a table that is made from a run."""
        if run is None:
            return
        try:
            rows = table(run)
        except Exception as error:
            self._failed(find(run.experiment), error)
            return
        _show_table(rows)

    def show(self, run: Run | None, table: str) -> None:
        """Show one table of a run, at most its first twenty rows."""
        if run is None:
            return
        try:
            rows = run.table(table)
        except LabError as error:
            self._failed(find(run.experiment), error)
            return
        rest = f"<p>{len(rows) - 20} more rows are in the run.</p>" if len(rows) > 20 else ""
        _show_table(rows.head(20), rest)

    def draw(self, run: Run | None, *, of: str | None = None, key: bool = False) -> None:
        """Draw the experiment's figure from the run, as a static picture.

        The figure itself says where its run was recorded, if it was.

        Parameters
        ----------
        run : Run or None
            From `measure`; nothing is drawn for None.
        of : str, optional
            Another figure than the experiment's own, where its runs have several.
        key : bool
            This figure stands for the notebook on the report's first page; the first one
            does where none is marked.
        """
        if run is None:
            return
        subject = find(run.experiment)
        try:
            picture = as_png(draw(run, of or ""))
        except Exception as error:
            self._failed(subject, error)
            return
        _show_picture(picture, f"Figure of {run.experiment}: {subject.question}", key=key)

    def draw_benchmark(self, name: str, drawing: Drawing, about: str) -> None:
        """Draw the newest recorded run of a benchmark with bars; the full profile goes first.

        Parameters
        ----------
        name : str
            ``bench-kernel`` or ``bench-sync``.
        drawing : callable
            Takes the run and draws it.
        about : str
            What it shows, in a sentence.
        """
        found = runs.recorded(name, profile="full") or runs.recorded(name, profile="quick")
        if not found:
            _show(_banner(said := f"There is no recorded run of {name}."), said)
            return
        newest = max(found, key=lambda run: str(run.provenance["recorded_at"]))
        _show_picture(as_png(figures.draw(drawing, newest)), about)

    def conclude(self, run: Run | None) -> None:
        """Judge the run and show its finding; `assert_findings` demands it later."""
        if run is None:
            return
        subject = find(run.experiment)
        lacks = self._pending.pop(run.experiment, "")
        try:
            finding = judge(run)
        except Exception as error:
            self._failed(subject, error)
            return
        outcome = Outcome(
            subject.id,
            subject.number,
            subject.question,
            finding.state,
            finding.sentence,
            live=not run.recorded,
            kernel=run.kernel,
            run=_place(run),
            lacks=lacks,
        )
        kernel = run.kernel if run.recorded else ""
        html, text = render("finding.html", finding=finding, recorded=kernel), str(finding)
        if run.recorded:
            text += f"\n  recorded on kernel {run.kernel}"
        # A section whose table or figure failed stays failed, whatever the counts say.
        if self._state(subject.id) == "error":
            _show(html, text)
        else:
            self._remember(outcome, html, text)

    def verdicts(self) -> Ledger:
        """Judge every claim of the article, by the recorded runs and the newest of this folder.

        Where one run decides a claim otherwise than the recorded one, its experiment is measured
        once more: two runs change a verdict, one leaves it undecided. `assert_findings` demands
        that no verdict has changed, and that every claim was tried on some kernel.

        Returns
        -------
        Ledger
            What :mod:`labkit.lab.verdicts` tells.
        """
        self._ledger = evaluate(self.runs_folder)
        for id in self._ledger.unconfirmed:
            progress = _Progress(id)
            try:
                self._measured(id, progress)
                line = f"{id} decided a claim otherwise than recorded, so it was measured again."
            except LabError as error:
                line = f"{id} could not be measured again: {error}"
            progress.end(f"<p>{escape(line)}</p>", line)
        if self._ledger.unconfirmed:
            self._ledger = evaluate(self.runs_folder)
        return self._ledger

    def doctor(self) -> None:
        """Show what this kernel can do, found out by trying."""
        _show(render("doctor.html", features=probe.features()), probe.doctor()[0])

    def assert_findings(self) -> None:
        """Demand that no finding of this notebook fails; one that is undecided fails nothing.

        Raises
        ------
        FindingFailed
            Names every experiment whose finding fails, that ended in an error, or that was
            measured and never concluded; and every verdict that changed.
        """
        bad = [f"{one.experiment}: {one.sentence}" for one in self._all("fails", "error")]
        bad += [f"{id}: measured, but never concluded" for id in self._pending]
        good = self._all("holds")
        live = sum(one.live for one in good)
        words = [f"{_number(live, 'finding')} held on this kernel"]
        changed = []
        if self._ledger is not None:
            changed = self._ledger.complaints()
            words.insert(0, f"{len(self._ledger.claims)} claims were judged")
        if len(good) > live:
            words.append(f"{_number(len(good) - live, 'recorded run')} stood in and held")
        if undecided := self._all("undecided"):
            words.append(f"{', '.join(one.experiment for one in undecided)} stayed undecided")
        if lacking := self._all("lacks"):
            words.append(f"{', '.join(one.experiment for one in lacking)} could not run")
        if bad or changed:
            heads = [
                f"{len(bad)} of {len(self._outcomes) + len(self._pending)} experiments failed"
            ] * bool(bad)
            heads += [f"{_number(len(changed), 'verdict')} changed"] * bool(changed)
            raise FindingFailed(
                f"{' and '.join(heads)} ({', '.join(words)}):\n"
                + "\n".join(f"- {one}" for one in bad + changed)
            )
        summary = "; ".join(words) + "."
        _show(f"<p><b>{escape(summary)}</b></p>", summary)

    def provenance(self) -> None:
        """Show what this notebook ran on, and with which code and parameters."""
        from labkit.kernel.provenance import provenance

        facts = {
            **provenance(),
            "profile": self.profile,
            "runs folder": _shown(self.runs_folder),
            **{f"parameters of {id}": used for id, used in self._parameters.items()},
        }
        rows = [[name.replace("_", " "), _plain(value)] for name, value in facts.items()]
        _show(
            table(["fact", "value"], rows, words=2),
            "\n".join(f"{name}: {value}" for name, value in rows),
        )

    def _measured(self, experiment: str, progress: _Progress) -> Run:
        """Measure by a worker; the next one gets ready while this run is drawn."""
        ready, self._ready = self._ready, None
        limit_s = self.time_limit_s or worker.TIME_LIMIT_S[self.profile]
        try:
            who = f"{self.name} measures {experiment}"
            with turn(self.runs_folder, who, progress.say, limit_s * worker.patience()):
                return worker.measure(
                    experiment,
                    self.profile,
                    self.changes.get(experiment),
                    folder=self.runs_folder,
                    time_limit_s=self.time_limit_s,
                    say=progress.say,
                    worker=ready,
                )
        except KeyboardInterrupt:
            raise Stopped(experiment) from None
        finally:
            self._ready = Worker()

    def _recorded(self, subject: Experiment, progress: _Progress, lacks: str) -> Run | None:
        """The recorded run of the newest kernel, of this profile if there is one."""
        others = [name for name in PROFILES if name != self.profile]
        try:
            for profile in [self.profile, *others]:
                if known := recorded(subject.id, profile=profile):
                    return known[-1]
        except LabError as error:
            progress.end("", "")
            self._failed(subject, error)
            return None
        line = f"{lacks} No recorded run stands in for it."
        progress.end("", "")
        outcome = Outcome(subject.id, subject.number, subject.question, "lacks", line, lacks=lacks)
        self._remember(outcome, _banner(line), line)
        return None

    def _failed(self, subject: Experiment, error: Exception) -> None:
        """Show an error and remember it; the notebook goes on."""
        self._pending.pop(subject.id, None)
        if isinstance(error, LabError):
            sentence, detail = str(error), ""
        else:
            sentence = f"{type(error).__name__}: {error}"
            detail = "".join(traceback.format_exception(error))
        outcome = Outcome(subject.id, subject.number, subject.question, "error", sentence)
        html = render("error.html", experiment=subject.id, sentence=sentence, trace=detail)
        self._remember(outcome, html, f"{subject.id} came to no finding: {sentence}")

    def _remember(self, outcome: Outcome, html: str, text: str) -> None:
        self._outcomes[outcome.experiment] = outcome
        _display({"text/html": html, "text/plain": text, FINDING_MIME: vars(outcome)})

    def _state(self, experiment: str) -> str:
        known = self._outcomes.get(experiment)
        return known.state if known else ""

    def _all(self, *states: str) -> list[Outcome]:
        return [one for one in self._outcomes.values() if one.state in states]


class Stopped(KeyboardInterrupt):
    """The user stopped a measurement: a notebook shows a sentence, and no traceback.

    Parameters
    ----------
    experiment : str
        What was measured.
    """

    def __init__(self, experiment: str) -> None:
        super().__init__(
            f"{experiment} was stopped, and no run of it was saved; run the cell again to measure."
        )

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class _Progress:
    """One line that each new one replaces, so that a report keeps only the last."""

    def __init__(self, experiment: str) -> None:
        self._experiment = experiment
        self._handle = _display({"text/plain": f"{experiment}: starting"})
        self._shown = time.monotonic()

    def say(self, words: str) -> None:
        if words.startswith(KEPT):
            line = f"{self._experiment}: {words.removeprefix(KEPT)}"
            _show(f"<p>{escape(line)}</p>", line)
        elif time.monotonic() - self._shown >= _BETWEEN_UPDATES_S:
            self._update({"text/plain": f"{self._experiment}: {words}"})

    def end(self, html: str, text: str) -> None:
        self._update({"text/html": html, "text/plain": text})

    def _update(self, bundle: dict[str, str]) -> None:
        self._shown = time.monotonic()
        if self._handle is not None:
            self._handle.update(bundle, raw=True)  # type: ignore[no-untyped-call]


def _display(
    bundle: dict[str, Any], metadata: dict[str, Any] | None = None
) -> DisplayHandle | None:
    """Show one output; the handle changes it later, and is None outside a notebook."""
    handle: DisplayHandle | None = display(  # type: ignore[no-untyped-call]
        bundle, raw=True, display_id=True, metadata=metadata
    )
    return handle


def _show_picture(picture: bytes, about: str, *, key: bool = False) -> None:
    _display(
        {"image/png": picture, "text/plain": about},
        {"image/png": {"alt": about}, KEY_FIGURE: key},
    )


def _show(html: str, text: str) -> None:
    _display({"text/html": html, "text/plain": text})


def _show_table(rows: pd.DataFrame, rest: str = "") -> None:
    with pd.option_context("display.max_colwidth", None, "display.float_format", in_words):
        _show(rows.to_html(index=False, border=0) + rest, rows.to_string(index=False))


def _counts_html(run: Run) -> str:
    words = run.counts["anomaly"].unique()
    # One word for all rows heads the column; several stand beside their numbers.
    bad = words[0] if len(words) == 1 else "anomalies"
    titles = ["variant", "case", "operations", bad, "ns per operation"]
    rows = [
        [
            row["variant"],
            run.label(row["case"]),
            f"{row['operations']:,}",
            f"{row['anomalies']:,}" + ("" if len(words) == 1 else f" {row['anomaly']}"),
            _cost(row["cost_ns"]),
        ]
        for _, row in run.counts.iterrows()
    ]
    if run.counts["cost_ns"].isna().all():
        titles, rows = titles[:-1], [row[:-1] for row in rows]
    return table(titles, rows, words=2)


def _cost(nanoseconds: float) -> str:
    if pd.isna(nanoseconds):
        return ""
    return f"{nanoseconds:,.3g}" if nanoseconds < 1e3 else f"{nanoseconds:,.0f}"


def _banner(words: str) -> str:
    return f"<p class='recorded'>{escape(words)}</p>"


def _place(run: Run) -> str:
    return "" if run.path is None else _shown(run.path)


def _shown(path: Path) -> str:
    """A path as the user knows it: from the checkout, or its last part."""
    absolute = path.absolute()
    return str(
        absolute.relative_to(_CHECKOUT) if absolute.is_relative_to(_CHECKOUT) else absolute.name
    )


def _seconds(run: Run) -> str:
    return f"{run.provenance.get('duration_s', 0):.1f} s"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _plain(value: object) -> str:
    """A JSON value as words: nested names and values follow each other."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items() if one != "")
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "unknown"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)
