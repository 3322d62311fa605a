"""The report without BPF: whole, and in a browser readable on a phone, filtered and sorted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from labkit.judge.claims import FALSE, Ledger
from labkit.lab import verdicts
from labkit.lab.catalogue import catalogue
from labkit.runs import RECORDED
from tests.browser.chromium import Browser

pytestmark = pytest.mark.timeout(700)  # the first to ask for the report waits until it is made

WIDTHS = (1000, 400)
SHOWN = "[...document.querySelectorAll('table.ledger tbody tr')].filter(row => !row.hidden)"
TOO_WIDE = """
[...document.querySelectorAll('body *')].filter(one => {
  for (let box = one.parentElement; box; box = box.parentElement)
    if (getComputedStyle(box).overflowX !== 'visible') return false;
  return one.getBoundingClientRect().right > innerWidth + 1;
}).map(one => one.outerHTML.slice(0, 120))
"""


@pytest.fixture(scope="module")
def report_without_bpf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the whole report as somebody without privilege, and so from recorded runs."""
    folder = tmp_path_factory.mktemp("without_bpf") / "reports"
    command = [sys.executable, "-m", "labkit", "report", "--to", str(folder)]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Not live: " in ended.stderr
    return folder


def test_without_bpf_the_report_stands_on_recorded_runs(report_without_bpf: Path) -> None:
    """No privilege, no BPF: every experiment is shown all the same, and how to make it live."""
    index = (report_without_bpf / "findings.html").read_text()
    shown = set(re.findall(r"#cell-id=exp[^>]*>([a-z0-9-]+)</a>", index))
    assert shown == set(catalogue())
    # A Go map needs no BPF, so it is live here too; the benchmark is in no notebook.
    recorded = {run.parent.name for run in RECORDED.glob("*/quick/*/run.json")}
    standing_in = [id for id, one in catalogue().items() if "bpf" in one.needs and id in recorded]
    assert index.count(">recorded on ") >= len(standing_in) > 0
    assert "run as root" in index and "Not everything was measured on this machine" in index


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_wider_than_the_screen(
    browser: Browser, report_without_bpf: Path, recorded_ledger: Ledger, width: int
) -> None:
    browser.resize(width, 1000)
    pages = sorted(report_without_bpf.glob("*.html"))
    assert len(pages) > len(recorded_ledger.wrong())
    for page in pages:
        browser.open(page.as_uri())
        if page.stem == "index":
            browser.screenshot(f"report-{width}")
        assert browser.run(TOO_WIDE) == [], page.name
        assert browser.run("document.documentElement.scrollWidth") <= width, page.name


def test_the_first_page_is_read_in_minutes(browser: Browser, report_without_bpf: Path) -> None:
    """Five verdicts with what to do instead, within a screen, and no predicate."""
    browser.resize(1200, 1000)
    browser.open((report_without_bpf / "index.html").as_uri())
    words = browser.run("document.body.innerText")
    assert len(words.split()) <= 800
    assert browser.run("document.querySelectorAll('.headlines > li').length") == 5
    assert browser.run("document.querySelector('.states').getBoundingClientRect().bottom") < 1000
    assert words.count("Instead:") == 5 and "anomalies" not in words and "broken" not in words
    browser.screenshot("report-first-screen")


def test_a_notebooks_page_has_contents_neighbours_and_code_on_demand(
    browser: Browser, report_without_bpf: Path
) -> None:
    notebooks = sorted(page.stem for page in report_without_bpf.glob("[0-9][0-9]-*.html"))
    browser.resize(1200, 1000)
    for place, name in enumerate(notebooks):
        browser.open((report_without_bpf / f"{name}.html").as_uri())
        headings = browser.run("[...document.querySelectorAll('h2')].map(one => one.textContent)")
        numbers = [one.split()[0] for one in headings]
        assert numbers == [f"{int(name[:2])}.{at + 1}" for at in range(len(numbers))], name
        listed = "[...document.querySelectorAll('.contents a')].map(one => one.hash.slice(1))"
        targets = browser.run(listed)
        assert len(targets) == len(numbers)
        assert browser.run(f"{targets!r}.every(one => document.getElementById(one))"), name
        for kind, at in (("prev", place - 1), ("next", place + 1)):
            asked = f"document.querySelector('nav a[rel={kind}]')?.getAttribute('href') ?? ''"
            known = f"{notebooks[at]}.html" if 0 <= at < len(notebooks) else ""
            assert browser.run(asked) == known, (name, kind)
        seen = "[...document.querySelectorAll('.input_area')].filter(one => one.checkVisibility())"
        assert browser.run(f"{seen}.length") == 0, f"{name}: code is shown unasked"
    assert "Section 5.3" in re.sub(
        r"<[^>]+>", "", (report_without_bpf / "05-watching-writes.html").read_text()
    )
    browser.open((report_without_bpf / "01-stale-reads.html").as_uri())
    wide = "Math.max(...[...document.images].map(one => one.getBoundingClientRect().width))"
    article = "document.querySelector('article').getBoundingClientRect().width"
    assert browser.run(wide) >= 0.98 * browser.run(article)


def test_pages_ask_nobody_for_anything(browser: Browser, report_without_bpf: Path) -> None:
    for name in ("index.html", "09-verdicts.html", "01-stale-reads.html"):
        browser.open((report_without_bpf / name).as_uri())
    asked = {
        one["params"]["request"]["url"].split(":")[0]
        for one in browser.events
        if one["method"] == "Network.requestWillBeSent"
    }
    assert asked <= {"file", "data"}


@pytest.mark.parametrize("width", WIDTHS)
def test_claims_can_be_filtered_and_sorted(
    browser: Browser, report_without_bpf: Path, recorded_ledger: Ledger, width: int
) -> None:
    browser.resize(width, 1000)
    browser.open((report_without_bpf / "claims.html").as_uri())

    def choose(name: str, value: str) -> list[str]:
        browser.run(
            f"(() => {{ const one = document.querySelector('.filters').elements['{name}'];"
            f" one.value = '{value}';"
            " one.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
        ids: list[str] = browser.run(f"{SHOWN}.map(row => row.id.replace('claim-', ''))")
        return ids

    everything = [one.id for one in recorded_ledger.claims]
    wrong = [
        one.id
        for one in recorded_ledger.claims
        if FALSE in {v.word for v in recorded_ledger.of(one)}
    ]
    assert choose("words", "") == everything
    assert choose("verdict", FALSE) == wrong
    assert browser.run("document.querySelector('.filters output').textContent") == (
        f"{len(wrong)} of {len(everything)} claims"
    )
    assert choose("chapter", "1") == [id for id in wrong if id.startswith("1.")]
    assert choose("chapter", "") == wrong
    assert choose("verdict", "") == everything
    assert choose("words", "msync") and len(choose("words", "msync")) < len(everything)
    assert sorted(choose("words", "")) == sorted(everything)
    ranks = browser.run(
        f"({choose('order', 'verdict')!r}, {SHOWN}.map(row => +row.dataset.verdict))"
    )
    assert ranks == sorted(ranks) and len(set(ranks)) > 1
    assert choose("order", "place") == everything


def test_a_claim_leads_to_its_page_and_on_to_its_experiment(
    browser: Browser, report_without_bpf: Path, recorded_ledger: Ledger
) -> None:
    browser.resize(400, 1000)
    texts = {page.name: page.read_text() for page in report_without_bpf.glob("*.html")}
    for claim in recorded_ledger.wrong():
        browser.open((report_without_bpf / verdicts.page_name(claim)).as_uri())
        targets = browser.run(
            "[...document.querySelectorAll('table.ledger a')].map(a => a.getAttribute('href'))"
        )
        for target in targets:
            page, _, cell = target.partition("#")
            assert f'id="{cell}"' in texts[page], target
