"""What a notebook shows, remembers and demands, however its experiments end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from labkit import runs
from labkit.errors import BadInput, LabError, Unavailable
from labkit.judge.findings import FindingFailed
from labkit.lab import catalogue, driver, measure, notebook
from labkit.lab.catalogue import find
from labkit.lab.notebook import FINDING_MIME, KEY_FIGURE, Investigation
from labkit.runs import Run

pytestmark = pytest.mark.usefixtures("toys")


class Handle:
    """A display whose output is replaced, as a front end does it."""

    def __init__(self, bundle: dict[str, Any]) -> None:
        self.bundle = bundle

    def update(self, bundle: dict[str, Any], *, raw: bool) -> None:
        self.bundle.clear()
        self.bundle.update(bundle)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every output, in order."""
    outputs: list[dict[str, Any]] = []

    def display(bundle: dict[str, Any], metadata: dict[str, Any] | None = None) -> Handle:
        outputs.append({**bundle, "metadata": metadata} if metadata else bundle)
        return Handle(outputs[-1])

    monkeypatch.setattr(notebook, "_display", display)
    return outputs


@pytest.fixture(autouse=True)
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measure toys in this process; have them judged and drawn."""

    def measured(
        experiment: str,
        profile: str,
        changed: dict[str, Any] | None,
        *,
        folder: Path,
        time_limit_s: float | None,
        say: Callable[[str], None],
        worker: object,
    ) -> Run:
        say("round 1 of 1")
        return runs.load(runs.save(driver.measured(find(experiment), profile, changed), folder))

    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(notebook, "Worker", lambda: None)


def laboratory(tmp_path: Path, **changes: dict[str, Any]) -> Investigation:
    return Investigation("01-toys", profile="quick", runs_folder=tmp_path / "runs", changes=changes)


def section(lab: Investigation, experiment: str) -> None:
    run = lab.measure(experiment)
    lab.show(run, "counts")
    lab.draw(run, key=True)
    lab.conclude(run)


def found(shown: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        out[FINDING_MIME]["experiment"]: out[FINDING_MIME] for out in shown if FINDING_MIME in out
    }


def text(shown: list[dict[str, Any]]) -> str:
    return "\n".join(out["text/plain"] for out in shown)


def test_a_section_measures_draws_and_concludes(
    tmp_path: Path, shown: list[dict[str, Any]]
) -> None:
    lab = laboratory(tmp_path)
    section(lab, "toy-counts")
    lab.assert_findings()
    lab.provenance()
    assert "Measured in" in text(shown) and "saved as" in text(shown)
    assert "round 1 of 1" not in text(shown)  # progress is replaced
    pictures = [out for out in shown if "image/png" in out]
    assert len(pictures) == 1 and pictures[0]["image/png"].startswith(b"\x89PNG")
    assert pictures[0]["metadata"][KEY_FIGURE] is True
    outcome = found(shown)["toy-counts"]
    assert (outcome["state"], outcome["live"], outcome["sentence"]) == ("holds", True, "7 <lost>.")
    assert outcome["kernel"] and outcome["run"] and not outcome["lacks"]
    assert "1 finding held on this kernel." in text(shown)
    assert "parameters of toy-counts: lost 7" in text(shown)


def test_what_fails_hides_nothing_and_is_named_in_the_end(
    tmp_path: Path, shown: list[dict[str, Any]]
) -> None:
    lab = laboratory(tmp_path, **{"toy-counts": {"lost": 9}})
    section(lab, "toy-raises")
    section(lab, "toy-counts")
    with pytest.raises(FindingFailed) as caught:
        lab.assert_findings()
    assert str(caught.value).splitlines() == [
        "2 of 2 experiments failed (0 findings held on this kernel):",
        "- toy-raises: ZeroDivisionError: a bug in a toy",
        "- toy-counts: 9 <lost>.",
    ]
    states = {id: outcome["state"] for id, outcome in found(shown).items()}
    assert states == {"toy-raises": "error", "toy-counts": "fails"}


def test_what_was_not_concluded_is_a_failure(tmp_path: Path, shown: list[dict[str, Any]]) -> None:
    lab = laboratory(tmp_path)
    lab.measure("toy-counts")
    with pytest.raises(FindingFailed, match="toy-counts: measured, but never concluded"):
        lab.assert_findings()


def test_a_figure_that_fails_is_a_failure(
    tmp_path: Path, shown: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(run: Run, of: str) -> NoReturn:
        raise BadInput(f"There is no figure of {run.experiment}.")

    monkeypatch.setattr(notebook, "draw", draw)
    lab = laboratory(tmp_path)
    section(lab, "toy-counts")
    assert found(shown)["toy-counts"]["state"] == "error"
    with pytest.raises(FindingFailed, match="There is no figure of toy-counts"):
        lab.assert_findings()


def test_a_recorded_run_stands_in_and_is_marked(
    tmp_path: Path, shown: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = driver.measured(find("toy-counts"))
    for kernel in ("6.1.0-25-amd64", "6.18.44"):
        facts = run.provenance | {"kernel": kernel}
        stand_in = replace(run, experiment="toy-lacks", provenance=facts)
        runs.record(stand_in, tmp_path / "data")
    known = catalogue.recorded
    monkeypatch.setattr(
        notebook,
        "recorded",
        lambda id, *, profile: known(id, profile=profile, data=tmp_path / "data"),
    )
    lab = laboratory(tmp_path)
    section(lab, "toy-lacks")
    lab.assert_findings()
    outcome = found(shown)["toy-lacks"]
    assert (outcome["state"], outcome["live"], outcome["kernel"]) == ("holds", False, "6.18.44")
    assert outcome["lacks"] == "This kernel lacks toys: use one that has some."
    for words in ("Recorded on kernel 6.18.44", "lacks toys",
                  "0 findings held on this kernel; 1 recorded run stood in and held."):  # fmt: skip
        assert words in text(shown)


def test_without_a_recorded_run_the_missing_feature_is_named(
    tmp_path: Path, shown: list[dict[str, Any]]
) -> None:
    lab = laboratory(tmp_path)
    section(lab, "toy-lacks")
    lab.assert_findings()
    assert found(shown)["toy-lacks"]["state"] == "lacks"
    assert "No recorded run stands in for it." in text(shown)
    assert "toy-lacks could not run" in text(shown)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"profile": "slow"}, "quick or full"),
        ({"changes": {"toy-count": {}}}, "did you mean toy-counts"),
        ({"changes": {"toy-counts": {"loss": 1}}}, "no parameter 'loss'"),
        ({"changes": {"toy-counts": {"lost": -1}}}, "greater than 0"),
        ({"changes": {"toy-counts": 1}}, "changes maps"),
        ({"changes": 3}, "changes maps"),
        ({"time_limit_s": 0}, "above 0"),
        ({"time_limit_s": "soon"}, "above 0"),
    ],
)
def test_wrong_parameters_are_refused_at_once(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Investigation("01-toys", **{"profile": "quick", **arguments})


def test_a_notebook_shows_an_error_of_the_lab_as_a_sentence() -> None:
    assert LabError("What to do.")._render_traceback_() == ["LabError: What to do."]
    assert issubclass(Unavailable, LabError)


def test_the_doctor_is_shown(tmp_path: Path, shown: list[dict[str, Any]]) -> None:
    laboratory(tmp_path).doctor()
    assert "ringbuf" in text(shown) and "<table>" in shown[-1]["text/html"]


def test_a_stop_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: object, **options: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure", stopped)
    with pytest.raises(notebook.Stopped) as caught:
        laboratory(tmp_path).measure("toy-counts")
    (sentence,) = caught.value._render_traceback_()
    assert sentence.startswith("toy-counts was stopped") and "\n" not in sentence
