"""What the probe answers where the kernel does not: no BPF is needed for these."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from labkit.errors import BadInput, LabError, Unavailable
from labkit.kernel import probe, tools, trials
from labkit.kernel.trials import TRIALS, Trial


@pytest.fixture(autouse=True)
def fresh_answers() -> Iterator[None]:
    probe.probe.cache_clear()
    yield
    probe.probe.cache_clear()


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put one trial in the place of all."""
    placed: dict[str, Trial] = {}
    monkeypatch.setattr(probe, "TRIALS", placed)

    def place(
        run: Callable[[], str], name: str = "one", needs: tuple[str, ...] = (), limit_s: float = 20
    ) -> None:
        placed[name] = Trial(run, "do this", needs, True, limit_s)

    return place


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="nothing is tried elsewhere")


def refuse() -> str:
    raise OSError(errno.EPERM, "loading: EPERM")


def complain() -> str:
    raise LabError("it is not there.")


def miss() -> str:
    raise Unavailable("The tool (of Debian: this one) is missing: install it.")


def break_down() -> str:
    raise KeyError("what")


def crash() -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def hang() -> str:
    time.sleep(600)
    return ""


@linux_only
def test_what_works_has_an_answer_and_no_remedy(only: Callable[..., None]) -> None:
    only(lambda: "well")
    assert probe.probe("one") == probe.Feature("one", True, "well", "")
    assert probe.doctor()[1] == 0
    probe.require("one")


@linux_only
@pytest.mark.parametrize(
    ("run", "answer", "remedy"),
    [
        (refuse, "loading: EPERM", "do this"),
        (complain, "it is not there", "do this"),
        (miss, "The tool (of Debian: this one) is missing", "install it"),
        (break_down, "KeyError: 'what'", "do this"),
        (crash, "A child process ended without a result (status -9)", "do this"),
    ],
)
def test_a_failure_of_any_kind_is_an_answer(
    only: Callable[..., None], run: Callable[[], str], answer: str, remedy: str
) -> None:
    only(run)
    assert probe.probe("one") == probe.Feature("one", False, answer, remedy)
    text, status = probe.doctor()
    assert status == 3 and answer in text and remedy in text


@linux_only
def test_a_hung_trial_is_ended(only: Callable[..., None]) -> None:
    only(hang, limit_s=0.3)
    began = time.monotonic()
    assert probe.probe("one").answer == "no answer within 0.3 s"
    assert time.monotonic() - began < 60


@linux_only
def test_an_answer_is_kept_and_a_missing_need_is_not_tried(only: Callable[..., None]) -> None:
    only(refuse)
    only(lambda: "well", name="two", needs=("one",))
    two = probe.probe("two")
    assert (two.works, two.answer, two.remedy) == (False, "not tried without one", "do this")
    assert probe.probe("two") is two


@linux_only
def test_require_says_what_is_missing_in_one_sentence(only: Callable[..., None]) -> None:
    only(refuse)
    with pytest.raises(Unavailable) as caught:
        probe.require("one")
    assert str(caught.value) == (
        "This needs the feature one, which does not work here (loading: EPERM): do this."
    )


def test_an_unknown_feature_is_bad_input() -> None:
    with pytest.raises(BadInput, match="no feature 'fentri'"):
        probe.probe("fentri")
    with pytest.raises(BadInput):
        probe.require("fentri")


def test_elsewhere_than_on_linux_nothing_works_and_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    found = probe.features()
    assert [f.name for f in found] == list(probe.names())
    assert not any(f.works for f in found)
    assert all("not Linux" in f.answer and "vagrant up" in f.remedy for f in found)
    text, status = probe.doctor(json=True)
    report = json.loads(text)
    assert status == 3 and report["ready"] is False
    assert {"name", "works", "answer", "remedy", "essential"} == set(report["features"][0])


def test_every_trial_is_complete() -> None:
    earlier: set[str] = set()
    for name, trial in TRIALS.items():
        assert set(trial.needs) <= earlier, f"{name} needs what comes after it"
        assert trial.remedy and not trial.remedy.endswith(".")
        assert 0 < trial.limit_s <= 180
        earlier.add(name)
    assert {"bpf", "compile", "tracefs"} <= set(probe.essential())


def test_the_namesake_of_bcc_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", types.ModuleType("bcc"))
    with pytest.raises(Unavailable, match="namesake on the Python index"):
        tools.prepare_bcc()


def test_a_missing_bcc_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)
    with pytest.raises(Unavailable, match="make setup installs python3-bpfcc"):
        tools.import_bcc()


def test_headers_that_are_named_wrongly_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BCC_KERNEL_SOURCE", str(tmp_path))
    with pytest.raises(Unavailable, match="BCC_KERNEL_SOURCE names no kernel headers"):
        tools.headers_folder()
    release = tmp_path / "include" / "generated" / "utsrelease.h"
    release.parent.mkdir(parents=True)
    assert (tools.headers_folder(), tools.headers_version()) == (tmp_path, "")
    release.write_text('#define UTS_RELEASE "6.1.0-99-amd64"\n')
    assert tools.headers_version() == "6.1.0-99-amd64"


def test_missing_headers_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)
    monkeypatch.setattr(tools, "MERGED_HEADERS", tmp_path)
    monkeypatch.setattr(platform, "release", lambda: "0.0.0-none")
    if not Path("/sys/kernel/kheaders.tar.xz").exists():
        with pytest.raises(Unavailable, match="make setup"):
            tools.headers_folder()


def test_missing_tools_are_one_sentence_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find_tool", lambda *_: None)
    for find in (tools.redis_server_command, tools.go_command, tools.bpftool_command):
        with pytest.raises(Unavailable, match="There is no"):
            find()


def test_the_redis_server_goes_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "redis-check-rdb"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(
        tools, "find_tool", lambda name: str(script) if name == script.name else None
    )
    assert tools.redis_server_command() == (str(script), "redis-server")


@linux_only
def test_a_tool_that_fails_is_refused_with_its_complaint() -> None:
    with pytest.raises(trials.Refused, match="no such"):
        trials._first_line(["sh", "-c", "echo no such thing >&2; exit 3"])
    assert trials._first_line(["sh", "-c", "echo one; echo two"]) == "one"
