"""What is made of a canary's sightings, and how it is told; no kernel."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labkit.errors import BadInput, LabError
from labkit.inspect import prometheus
from labkit.inspect.canary import Freshness, _parsed, canary
from labkit.inspect.prometheus import Metric
from labkit.inspect.whole_file import require_writable

MS = 1_000_000


def sighting(seen_ms: list[float], itself: list[bool], **given: Any) -> Freshness:
    """Versions wanted every 10 ms, each seen so many milliseconds after the beginning."""
    count = len(seen_ms)
    intended = 1_000 * MS + 10 * MS * np.arange(count)
    seen = [0 if math.isinf(at) else round((1_000 + at) * MS) for at in seen_ms]
    rest: dict[str, Any] = {
        "started_ns": intended,
        "ended_ns": intended + MS,
        "statuses": np.zeros(count, np.int64),
    }
    return Freshness(
        map_id=7, map_name="policy", key="80", first=1, intended_ns=intended,
        seen_ns=np.array(seen, np.int64), itself=np.array(itself), **{**rest, **given},
    )  # fmt: skip


def test_age_counts_from_the_intended_moment() -> None:
    seen = sighting([3, 14, 22], [True] * 3)
    assert seen.ages_ms.tolist() == [3, 4, 2]
    assert [seen.age_ms(share) for share in (0.5, 0.99, 1)] == [3, 4, 4]
    assert (seen.passed_over, seen.unseen) == (0, 0)
    assert seen.holds(None) and seen.holds(4) and not seen.holds(3.9)


def test_a_version_that_was_passed_over_has_the_age_of_the_newer_one() -> None:
    seen = sighting([25, 25, 25], [False, False, True])
    assert seen.ages_ms.tolist() == [25, 15, 5]
    assert (seen.passed_over, seen.unseen) == (2, 0)
    assert "2 were passed over for a newer one" in seen.as_text(None)


def test_what_was_never_seen_fails_any_limit() -> None:
    seen = sighting([3, math.inf], [True, False])
    assert seen.ages_ms.tolist() == [3, math.inf]
    assert (seen.unseen, seen.holds(None), seen.holds(1e9)) == (1, False, False)
    assert "labkit diagnose 7" in seen.as_text(1e9)
    told = json.loads(json.dumps(seen.as_json(1e9)))
    assert (told["age_ms"]["0.5"], told["age_ms"]["0.99"], told["holds"]) == (3, None, False)


def test_one_slow_version_in_a_hundred_is_within_the_limit_and_two_are_not() -> None:
    quick = [10.0 * place + 1 for place in range(100)]
    for slow, holds in ((1, True), (2, False)):
        late = [at + 500 * (place < slow) for place, at in enumerate(quick)]
        assert sighting(late, [True] * 100).holds(2) is holds


def test_a_command_that_waited_for_the_one_before_it_is_counted() -> None:
    intended = 1_000 * MS + 10 * MS * np.arange(3)
    ended = intended + MS * np.array([15, 7, 1])
    seen = sighting([16, 18, 22], [True] * 3, ended_ns=ended, statuses=np.array([0, 2, 0]))
    assert (seen.delayed, seen.failed) == (1, 1)
    assert "1 commands waited" in seen.as_text(None) and "1 commands did not" in seen.as_text(None)


@pytest.mark.parametrize(
    ("text", "key"),
    [("80", 80), ("[6, 80]", (6, 80)), ('{"port": 80}', {"port": 80}), ("hex:0a01", b"\n\x01")],
)
def test_a_key_is_json_or_hex(text: str, key: object) -> None:
    assert _parsed(text) == key


@pytest.mark.parametrize("text", ["", "eighty", "hex:0", "hex:zz", "{"])
def test_another_key_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is no key: give JSON"):
        _parsed(text)


@pytest.mark.parametrize(
    ("command", "settings", "words"),
    [
        (["true"], {}, "no place for the version"),
        (["true", "{version}"], {"reader": "eyes"}, "A reader is one of lookups, program"),
        (["true", "{version}"], {"per_second": 0.0}, "The rate of a canary"),
        (["true", "{version}"], {"seconds": math.inf}, "The time of a canary"),
        (["true", "{version}"], {"wait_s": -1.0}, "The wait of a canary"),
        (["true", "{version}"], {"per_second": 1e9}, "1,000,000 versions at most"),
    ],
)
def test_settings_are_looked_at_before_the_kernel(
    command: list[str], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        canary("no map", command, key="80", **settings)


def test_metrics_are_written_whole_and_readable(tmp_path: Path) -> None:
    file = tmp_path / "canary.prom"
    file.write_text("old")
    seen = sighting([3, math.inf], [True, False])
    prometheus.write(str(file), seen.as_metrics(5.0))
    lines = file.read_text().splitlines()
    labels = 'map="policy",map_id="7",key="80"'
    assert f'labkit_canary_age_seconds{{{labels},share="0.5"}} 0.003' in lines
    assert f'labkit_canary_age_seconds{{{labels},share="1"}} +Inf' in lines
    assert f'labkit_canary_versions{{{labels},state="unseen"}} 1.0' in lines
    assert f"labkit_canary_holds{{{labels}}} 0.0" in lines
    assert f"labkit_canary_limit_seconds{{{labels}}} 0.005" in lines
    for line in lines:
        name = line.split()[2] if line.startswith("#") else line.partition("{")[0]
        assert name.startswith("labkit_canary_")
    assert file.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [file]


def test_labels_are_escaped(tmp_path: Path) -> None:
    file = tmp_path / "one.prom"
    prometheus.write(str(file), [Metric("m", "gauge", "help", [({"map": 'a"b\\c\nd'}, 1)])])
    assert file.read_text().splitlines()[-1] == 'm{map="a\\"b\\\\c\\nd"} 1.0'


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none" / "a.prom", "No file can be written"),
                      (tmp_path, "is no plain file")):  # fmt: skip
        with pytest.raises(BadInput, match=why):
            require_writable(str(path))
    (tmp_path / "folder.prom").mkdir()
    with pytest.raises(LabError, match="cannot be written"):
        prometheus.write(str(tmp_path / "folder.prom"), [])
    assert [one.name for one in tmp_path.iterdir()] == ["folder.prom"]
