"""The front door of JupyterLab: copies that are the user's, and a page that leads to them."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from labkit.lab import front, turns

ROOT = Path(__file__).parents[2]


def notebook(text: str) -> str:
    return json.dumps({"cells": [{"cell_type": "markdown", "id": "title", "source": [text]}]})


def test_a_copy_follows_its_original_until_it_is_worked_in(tmp_path: Path) -> None:
    originals, folder = tmp_path / "originals", tmp_path / "deep" / "copies"
    originals.mkdir()
    original, copied = originals / "00-toy.ipynb", folder / "00-toy.ipynb"
    newer = folder / "00-toy.new.ipynb"
    original.write_text("one")
    front.copy(originals, folder)
    original.write_text("two")
    front.copy(originals, folder)
    assert copied.read_text() == "two"
    copied.write_text("mine")
    front.copy(originals, folder)
    assert copied.read_text() == "mine" and not newer.exists()
    original.write_text("three")
    front.copy(originals, folder)
    front.copy(originals, folder)
    assert copied.read_text() == "mine" and newer.read_text() == "three"
    copied.write_text("three")  # taken over
    front.copy(originals, folder)
    assert not newer.exists()
    (folder / ".copied.json").write_text("[half")
    front.copy(originals, folder)
    assert copied.read_text() == "three" and original.read_text() == "three"
    assert sorted(one.name for one in folder.iterdir()) == [".copied.json", "00-toy.ipynb"]


def test_the_page_tells_what_is_offered_and_escapes_what_files_say(tmp_path: Path) -> None:
    (tmp_path / "00-toy.ipynb").write_text(notebook("# A <script>\n\n**Why?**"))
    (tmp_path / "00-toy.new.ipynb").write_text(notebook("# Newer"))
    (tmp_path / "01-half.ipynb").write_text("{")
    front.write(tmp_path, None)
    page = (tmp_path / front.START).read_text()
    assert "A &lt;script&gt;" in page and "<b>Why?</b>" in page
    assert '<a href="00-toy.new.ipynb">open the newer one</a>' in page
    assert page.count("<tr>") == 2 and "no notebook that can be read" in page


def test_a_card_has_state_time_and_figure_from_the_recorded_runs(tmp_path: Path) -> None:
    name = "03-value-size.ipynb"
    (tmp_path / name).write_bytes((ROOT / "notebooks" / name).read_bytes())
    front.write(tmp_path, tmp_path / "runs")
    page = (tmp_path / front.START).read_text()
    assert "findings: 6 hold; never run here; recorded on 6.18; its experiments took" in page
    assert '<img src="figures/03-value-size.png"' in page
    assert (tmp_path / "figures" / "03-value-size.png").read_bytes().startswith(b"\x89PNG")


def test_two_that_measure_wait_for_each_other(tmp_path: Path) -> None:
    said: list[str] = []
    order: list[str] = []
    waits = threading.Event()

    def second() -> None:
        def say(words: str) -> None:
            said.append(words)
            waits.set()

        with turns.turn(tmp_path / "runs", "second", say, 60):
            order.append("second")

    with turns.turn(tmp_path / "runs", "11 measures toys", said.append, 60):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
    assert said[0].endswith("what is measured now: 11 measures toys")
    with (
        turns.turn(tmp_path / "runs", "one", said.append, 60),
        turns.turn(tmp_path / "runs", "impatient", said.append, 0.0),
    ):
        order.append("all the same")
    assert order[-1] == "all the same"
