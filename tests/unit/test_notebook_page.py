"""What a notebook's page makes of the numbers in its prose."""

from __future__ import annotations

import pytest

from labkit.lab.notebook_page import Section, _linked

EVERY = {number: Section(f"5.{number}", "", f"page.html#{number}") for number in (4, 20, 42, 83)}


@pytest.mark.parametrize(
    ("prose", "linked"),
    [
        ("see section 42.", "see section [5.42](page.html#42)."),
        ("sections 20, 83 and 42", "sections [5.20](page.html#20), [5.83](page.html#83) and [5.42]"
         "(page.html#42)"),
        ("sections 4 to 20 say", "sections [5.4](page.html#4) to [5.20](page.html#20) say"),
        ("of the article's section 4.2 no Go", "of the article's section 4.2 no Go"),
        ("section 99", "section 99"),
    ],
)  # fmt: skip
def test_sections_are_linked_wherever_they_are_named(prose: str, linked: str) -> None:
    assert _linked(prose, EVERY) == linked
