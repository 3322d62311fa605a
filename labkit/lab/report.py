"""The report: every notebook run on this kernel, as pages that need nothing else.

Notebooks run one after the other, so that they do not disturb each other's measurements; pages
are made afterwards. One that fails does not stop the rest. The folder of the report appears
complete or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from labkit.errors import FALLS_SHORT, BadInput, LabError
from labkit.judge.claims import Ledger
from labkit.kernel import leftovers
from labkit.lab import verdicts
from labkit.lab.catalogue import catalogue
from labkit.lab.measure import patience
from labkit.lab.notebook import FINDING_MIME, KEY_FIGURE, Outcome
from labkit.lab.notebook_page import Section, sections
from labkit.lab.notebook_page import body as notebook_body
from labkit.lab.pages import render
from labkit.runs import PARTIAL, PROFILES, REPLACED
from labkit.runs.disk import put_in_place

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
"""The notebooks of the checkout, with their parameters in ``params/<profile>.yaml``."""

_CHECKOUT = NOTEBOOKS.parent

TIME_LIMIT_S = {"quick": 900.0, "full": 7200.0}
"""Bound for one notebook, seconds."""

# What checks notebooks would parse a grammar of IRIs as it is imported, and no notebook has one:
# 0.7 s of every report.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

Say = Callable[[str], None]

_WORDS = {"holds": "holds", "undecided": "undecided", "fails": "FAILS", "error": "NO FINDING",
          "lacks": "cannot run here"}  # fmt: skip

_SPACE_BYTES = 32 << 20  # a report is smaller by far; below this a disk is as good as full
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
_GENERATOR = '<meta name="generator" content="map freshness lab">'
_MEASURES = re.compile(r"""\.measure\(\s*["']([a-z0-9-]+)["']""")
_PICTURE = re.compile(r"Figure of ([a-z0-9-]+):")


class ReportFailed(LabError):
    """The report could not be written; nothing of it was left."""


@dataclass
class _Page:
    """One notebook of the report."""

    name: str
    duration_s: float = 0.0
    problem: str = ""  # why the notebook did not end well; empty where it did
    title: str = ""
    sections: list[Section] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    anchors: dict[str, str] = field(default_factory=dict)  # of the experiments' sections
    pictures: dict[str, str] = field(default_factory=dict)  # the experiments' first; as below
    key_figure: str = ""  # PNG in base64
    key_words: str = ""

    @property
    def failed(self) -> bool:
        """Whether it did not end well, or a finding of it fails."""
        return bool(self.problem) or any(one.state in ("fails", "error") for one in self.outcomes)

    @property
    def kernels(self) -> list[str]:
        """Where its runs were measured."""
        return sorted({one.kernel for one in self.outcomes if one.kernel}) or [platform.release()]

    @property
    def tally(self) -> str:
        """How many of its findings hold."""
        return _tally([self])

    def section(self, experiment: str) -> str:
        """Where an experiment is shown."""
        return f"{self.name}.html#cell-id={self.anchors.get(experiment, '')}"


def make_report(
    profile: str,
    folder: Path,
    *,
    notebooks: Path = NOTEBOOKS,
    parameters: Mapping[str, Any] | None = None,
    time_limit_s: float | None = None,
    say: Say = lambda words: None,
    done: Say = lambda words: None,
) -> int:
    """Run the notebooks and write the report.

    Parameters
    ----------
    profile : str
        ``quick`` or ``full``: which of the notebooks' parameter files is used.
    folder : Path
        Becomes the report: ``index.html``, and a page and the executed notebook for each.
    notebooks : Path
        Folder of ``<two digits>-*.ipynb`` and ``params/``.
    parameters : mapping, optional
        Further parameters of every notebook.
    time_limit_s : float, optional
        Bound for one notebook, seconds, by default `TIME_LIMIT_S` of the profile; times
        `labkit.lab.measure.patience`.
    say : callable
        Gets what goes on now, to be written over by the next.
    done : callable
        Gets the lines to keep.

    Returns
    -------
    int
        Exit status: 0 where every notebook ended with all findings held, else `FALLS_SHORT`.

    Raises
    ------
    BadInput
        No notebooks, a parameter that one of them does not have, or a folder that holds
        something else; before anything runs.
    ReportFailed
        The folder cannot be written or the disk is full. Nothing is left of this report,
        and an older one stays.
    """
    if profile not in PROFILES:
        raise BadInput(f"A profile is {' or '.join(PROFILES)}, not {profile!r}.")
    files = sorted(notebooks.glob("[0-9][0-9]-*.ipynb"))
    if not files:
        raise BadInput(f"There are no notebooks in {notebooks}.")
    given = {**_parameters(notebooks / "params" / f"{profile}.yaml"), **(parameters or {})}
    _check_parameters(files, given)
    limit = (TIME_LIMIT_S[profile] if time_limit_s is None else time_limit_s) * patience()
    folder = folder.absolute()
    try:
        with _building(folder) as partial:
            begun, pages = time.monotonic(), []
            with _kernel_environment() as sockets:
                # A notebook that only reads runs wants those of the others: its turn comes after.
                for file in sorted(files, key=lambda file: not measured_by(file)):
                    pages.append(_execute(file, partial, sockets, given, limit, say))
                    done(_summary(pages[-1]))
            say("making the pages")
            pages.sort(key=lambda page: page.name)
            _write_pages(pages, partial)
            ledger, no_verdicts = Ledger((), (), {}), ""
            try:
                ledger = verdicts.evaluate(_CHECKOUT / str(given.get("runs_folder", "runs")))
            except LabError as error:  # the notebooks' pages are worth keeping all the same
                no_verdicts = str(error)
            shown = _write_claims(pages, partial, ledger)
            _write_index(
                pages, ledger if shown else None, profile, time.monotonic() - begun, partial
            )
            with _locked(folder.parent):
                put_in_place(partial, folder)
    except OSError as error:
        raise ReportFailed(
            f"The report could not be written in {folder} ({error.strerror or error}); free some "
            "space or name a folder that can be written."
        ) from None
    for words in _missing(pages):
        done(f"Not live: {words}")
    if no_verdicts:
        done(f"No verdicts: {no_verdicts}")
    done(f"{_tally(pages)} Open {folder / 'index.html'}")
    return FALLS_SHORT if no_verdicts or any(page.failed for page in pages) else 0


def measured_by(file: Path) -> list[str]:
    """The experiments that a notebook measures, in order.

    Parameters
    ----------
    file : Path
        Of a notebook.
    """
    return _MEASURES.findall(file.read_text(encoding="utf-8").replace('\\"', '"'))


def _write_claims(pages: list[_Page], partial: Path, ledger: Ledger) -> bool:
    """Write the pages of the claims; none for a report of other notebooks than the lab's."""
    addresses = {
        one.experiment: page.section(one.experiment) for page in pages for one in page.outcomes
    }
    pictures: dict[str, str] = {}
    for page in pages:
        pictures = {**page.pictures, **pictures}
    if not any(id in addresses for claim in ledger.claims for id in claim.experiments):
        return False
    made = [
        ("claims.html", "The claims", verdicts.all_claims(ledger, addresses)),
        *verdicts.wrong_pages(ledger, addresses, pictures),
    ]
    for name, title, body in made:
        (partial / name).write_text(_html(title, body), encoding="utf-8")
    return True


def _parameters(file: Path) -> dict[str, Any]:
    from papermill.iorw import read_yaml_file

    try:
        given = read_yaml_file(str(file))
    except Exception as error:  # the parser's own errors, and what the file system answers
        reason = str(error).splitlines()[0]
        raise BadInput(f"The parameters in {file} cannot be read ({reason}).") from None
    if not isinstance(given, dict):
        raise BadInput(f"{file} must map names of parameters to values.")
    return given


def _check_parameters(files: list[Path], given: Mapping[str, Any]) -> None:
    """Refuse names that a notebook does not have; papermill would only warn."""
    import papermill

    for file in files:
        known = papermill.inspect_notebook(str(file))
        if unknown := [name for name in given if name not in known]:
            raise BadInput(
                f"{file.name} has no parameter {unknown[0]!r}; it has {', '.join(known) or 'none'}."
            )


def _execute(
    file: Path,
    partial: Path,
    sockets: Path,
    given: Mapping[str, Any],
    limit_s: float,
    say: Say,
) -> _Page:
    """Run one notebook into the folder of the report; its failure is noted on the page."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    page, begun = _Page(file.stem), time.monotonic()

    def tell(cell: Any, cell_index: int) -> None:
        for experiment in _MEASURES.findall(cell.source):
            say(f"{page.name}: measuring {experiment}")

    say(f"{page.name}: starting its kernel")
    try:
        papermill.execute_notebook(
            str(file),
            str(partial / file.name),
            parameters=dict(given),
            kernel_name="python3",
            cwd=str(file.parent),
            progress_bar=False,
            # Engine options, handed on to nbclient.
            timeout_func=lambda cell: max(1, int(begun + limit_s - time.monotonic())),
            iopub_timeout=60,  # a flood of output is late, not lost
            shutdown_kernel="immediate",
            store_widget_state=False,  # a page has no kernel that could answer
            on_cell_start=tell,
            # No port is opened, and the file with the key goes with the folder.
            config=Config(
                KernelManager={
                    "transport": "ipc",
                    "ip": str(sockets / "kernel"),
                    "connection_file": str(sockets / "connection.json"),
                }
            ),
        )
    except PapermillExecutionError as error:
        page.problem = (
            error.evalue if error.ename == "FindingFailed" else (f"{error.ename}: {error.evalue}")
        )
    except CellTimeoutError:
        page.problem = f"It did not end within {limit_s:g} s and was stopped."
    except DeadKernelError:
        page.problem = "Its kernel process died."
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise
        page.problem = f"It could not be run: {error}"
    except Exception as error:
        page.problem = f"It could not be run: {type(error).__name__}: {error}"
    page.duration_s = time.monotonic() - begun
    if not (partial / file.name).exists():
        shutil.copyfile(file, partial / file.name)
    _collect(page, partial / file.name)
    return page


@contextlib.contextmanager
def _kernel_environment() -> Iterator[Path]:
    """Give notebooks' kernels this interpreter, no user's settings, and no noise.

    Yields a folder for their sockets, which goes away also where we are killed.
    """
    logger = logging.getLogger("papermill")
    level, before = logger.level, dict(os.environ)
    with leftovers.temporary_folder() as folder:
        os.environ.update(
            JUPYTER_PREFER_ENV_PATH="1",
            JUPYTER_RUNTIME_DIR=str(folder),
            IPYTHONDIR=str(folder),
            PYDEVD_DISABLE_FILE_VALIDATION="1",
        )
        for name in ("JUPYTER_PATH", "PYTEST_CURRENT_TEST"):
            os.environ.pop(name, None)
        logger.setLevel(logging.CRITICAL)
        try:
            yield folder
        finally:
            logger.setLevel(level)
            os.environ.clear()
            os.environ.update(before)


def _collect(page: _Page, file: Path) -> None:
    """Read from an executed notebook what it found."""
    import nbformat

    notebook = nbformat.read(file, as_version=4)
    outcomes: dict[str, Outcome] = {}
    section, measured, figures = "", [], []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            section = cell.id
            page.title = page.title or _heading(cell.source)
            continue
        for experiment in _MEASURES.findall(cell.source):
            measured.append(experiment)
            page.anchors[experiment] = section
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if FINDING_MIME in data:
                outcome = Outcome(**data[FINDING_MIME])
                outcomes[outcome.experiment] = outcome
            if "image/png" in data:
                figures.append(output)
                if about := _PICTURE.match(data.get("text/plain", "")):
                    page.pictures.setdefault(about[1], data["image/png"].replace("\n", ""))
    for experiment in measured:
        if experiment not in outcomes:
            known = catalogue().get(experiment)
            outcomes[experiment] = Outcome(
                experiment,
                known.number if known else 0,
                known.question if known else "",
                "error",
                "The notebook stopped before it came to a finding.",
            )
    page.title = page.title or page.name
    page.outcomes = sorted(outcomes.values(), key=lambda one: one.number)
    for figure in sorted(figures, key=lambda one: not one.metadata.get(KEY_FIGURE))[:1]:
        page.key_figure = figure.data["image/png"].replace("\n", "")
        page.key_words = figure.data.get("text/plain", "")


def _write_pages(pages: list[_Page], partial: Path) -> None:
    """Write the page of each executed notebook, which leads to the one before and the next."""
    import nbformat

    read = [nbformat.read(partial / f"{page.name}.ipynb", as_version=4) for page in pages]
    for page, notebook in zip(pages, read, strict=True):
        page.sections = list(sections(notebook, page.name))
    by_number = {one.experiment: one for page in pages for one in page.sections if one.experiment}
    for place, (page, notebook) in enumerate(zip(pages, read, strict=True)):
        body = render(
            "notebook.html",
            page=page,
            body=notebook_body(notebook, page.sections, by_number),
            before=pages[place - 1] if place else None,
            after=pages[place + 1] if place + 1 < len(pages) else None,
        )
        (partial / f"{page.name}.html").write_text(_html(page.title, body), encoding="utf-8")


@contextlib.contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """Yield a folder beside the report's, which is removed in the end where it still exists.

    It is locked while we live, so that the next report knows what a killed one left.
    """
    if folder.exists() and not _replaceable(folder):
        raise BadInput(
            f"{folder} holds something that is no report of this lab; name another folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder.parent).free < _SPACE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    sweep(folder)
    partial = folder.with_name(f"{PARTIAL}{folder.name}-{os.getpid()}")
    with _locked(folder.parent):
        partial.mkdir()
        holding = contextlib.ExitStack()
        holding.callback(shutil.rmtree, partial, ignore_errors=True)
        holding.enter_context(_locked(partial))
    with holding:
        yield partial


def sweep(folder: Path) -> int:
    """Remove the unfinished folders that killed reports left beside a report's folder.

    ``folder`` is as given to `make_report`; answers how many there were.

    Raises
    ------
    OSError
        The folder's parent cannot be read.
    """
    folder, swept = folder.absolute(), 0
    with _locked(folder.parent):
        for prefix in (PARTIAL, REPLACED):
            for left in folder.parent.glob(f"{prefix}{folder.name}-*"):
                with contextlib.suppress(OSError), _locked(left, wait=False):
                    shutil.rmtree(left)
                    swept += 1
    return swept


def _replaceable(folder: Path) -> bool:
    """Whether a folder is empty or an earlier report."""
    if not folder.is_dir():
        return False
    index = folder / "index.html"
    if index.is_file():
        return _GENERATOR in index.read_text(encoding="utf-8", errors="replace")
    return not any(folder.iterdir())


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock on a folder; OSError where it is taken and we do not wait."""
    held = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(held)


def _counted(pages: list[_Page]) -> dict[str, int]:
    """Outcomes of all pages by what became of them."""
    every = [one for page in pages for one in page.outcomes]
    return {
        "hold on this kernel": sum(one.state == "holds" and one.live for one in every),
        "hold in recorded runs": sum(one.state == "holds" and not one.live for one in every),
        "undecided": sum(one.state == "undecided" for one in every),
        "fail": sum(one.state in ("fails", "error") for one in every),
        "could not run here": sum(one.state == "lacks" for one in every),
    }


def _tally(pages: list[_Page]) -> str:
    counts = _counted(pages)
    words = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    total = sum(counts.values())
    return f"{total} experiment{'' if total == 1 else 's'}: {words}." if total else "No experiment."


def _summary(page: _Page) -> str:
    state = "FAILED" if page.failed else "ok"
    lines = [f"{page.name}: {state}, {page.duration_s:.0f} s. {_tally([page])}"]
    lines += [
        f"  {one.experiment}: {one.sentence}"
        for one in page.outcomes
        if one.state in ("fails", "error")
    ]
    if page.problem and len(lines) == 1:
        lines.append(f"  {page.problem}")
    return "\n".join(lines)


def _missing(pages: list[_Page]) -> list[str]:
    """What this machine lacks, each once."""
    return list(dict.fromkeys(one.lacks for page in pages for one in page.outcomes if one.lacks))


def _html(title: str, body: str) -> str:
    """Wrap a page that loads nothing from anywhere."""
    from pygments.formatters import HtmlFormatter

    colours = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    return render("page.html", title=title, body=body, colours=colours, generator=_GENERATOR)


def _write_index(
    pages: list[_Page], ledger: Ledger | None, profile: str, duration_s: float, partial: Path
) -> None:
    """Write the first page, and the one of all findings."""
    facts = {
        "pages": pages,
        "lacks": _missing(pages),
        "outcome_words": _WORDS,
    }
    index = render(
        "index.html",
        states=list(_states(pages, ledger)),
        opening=verdicts.opening(ledger) if ledger else "",
        profile=profile,
        duration_s=duration_s,
        system=f"{platform.system()} {platform.release()}",
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **facts,
    )
    for name, title, body in (
        ("index.html", "Map freshness lab", index),
        ("findings.html", "All findings", render("findings.html", **facts)),
    ):
        (partial / name).write_text(_html(title, body), encoding="utf-8")


def _states(pages: list[_Page], ledger: Ledger | None) -> Iterator[tuple[str, str, str]]:
    """How findings, verdicts and notebooks stand, each apart: look, word and sentence."""
    states = {one.state for page in pages for one in page.outcomes}
    if states & {"fails", "error"}:
        yield "bad", "FAILS", _tally(pages)
    elif "undecided" in states:
        yield "open", "undecided", _tally(pages)
    else:
        yield "good", "holds", _tally(pages)
    if ledger is not None:
        left = [claim.id for claim in ledger.undecided()]
        words = f"{len(ledger.claims)} claims judged: {len(ledger.changes)} verdicts changed"
        words += f", {len(left)} undecided ({', '.join(left)})." if left else "."
        if ledger.changes:
            yield "bad", "CHANGED", words
        else:
            yield ("open", "undecided", words) if left else ("good", "as recorded", words)
    if stopped := [page.name for page in pages if page.problem]:
        yield "bad", "FAILED", f"Notebooks that did not end well: {', '.join(stopped)}."


def _heading(text: str) -> str:
    """The first heading of a Markdown cell, or nothing."""
    found = re.search(r"^#\s+(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""
