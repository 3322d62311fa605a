"""A browser for the tests here; where there is none, they are skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.chromium import Browser, missing


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """Start a headless Chromium with a profile of its own."""
    if reason := missing():
        pytest.skip(reason)
    with Browser(tmp_path / "profile") as started:
        yield started
