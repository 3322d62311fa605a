"""A browser for the tests here; where there is none, they are skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser.chromium import Browser, missing


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Start a headless Chromium with a profile of its own, for all tests of a file."""
    if reason := missing():
        pytest.skip(reason)
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as started:
        yield started
