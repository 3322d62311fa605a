"""The report in a browser: readable on a phone, its claims filtered and sorted."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkit import verdicts
from labkit.analysis.claims import FALSE
from tests.browser.chromium import Browser

pytestmark = pytest.mark.timeout(700)  # the first to ask for the report waits until it is made

WIDTHS = (1000, 400)
LEDGER = verdicts.evaluate(None)
SHOWN = "[...document.querySelectorAll('table.ledger tbody tr')].filter(row => !row.hidden)"
TOO_WIDE = """
[...document.querySelectorAll('body *')].filter(one => {
  for (let box = one.parentElement; box; box = box.parentElement)
    if (getComputedStyle(box).overflowX !== 'visible') return false;
  return one.getBoundingClientRect().right > innerWidth + 1;
}).map(one => one.outerHTML.slice(0, 120))
"""


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_wider_than_the_screen(
    browser: Browser, report_without_bpf: Path, width: int
) -> None:
    browser.resize(width, 1000)
    pages = sorted(report_without_bpf.glob("*.html"))
    assert len(pages) > len(LEDGER.wrong())
    for page in pages:
        browser.open(page.as_uri())
        if page.stem == "index":
            browser.screenshot(f"report-{width}")
        assert browser.run(TOO_WIDE) == [], page.name
        assert browser.run("document.documentElement.scrollWidth") <= width, page.name


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
    browser: Browser, report_without_bpf: Path, width: int
) -> None:
    browser.resize(width, 1000)
    browser.open((report_without_bpf / "index.html").as_uri())

    def choose(name: str, value: str) -> list[str]:
        browser.run(
            f"(() => {{ const one = document.querySelector('.filters').elements['{name}'];"
            f" one.value = '{value}';"
            " one.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
        ids: list[str] = browser.run(f"{SHOWN}.map(row => row.id.replace('claim-', ''))")
        return ids

    everything = [one.id for one in LEDGER.claims]
    wrong = [one.id for one in LEDGER.claims if FALSE in {v.word for v in LEDGER.of(one)}]
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
    browser: Browser, report_without_bpf: Path
) -> None:
    browser.resize(400, 1000)
    for claim in LEDGER.wrong():
        browser.open((report_without_bpf / verdicts.page_name(claim)).as_uri())
        targets = browser.run(
            "[...document.querySelectorAll('table.ledger a')].map(a => a.getAttribute('href'))"
        )
        for target in targets:
            page, _, cell = target.partition("#")
            assert f'id="{cell}"' in (report_without_bpf / page).read_text(), target
