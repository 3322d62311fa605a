"""Files below ``runs/`` that are no runs: each is named and left out, and none is waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labkit import runs
from labkit.runs import BadRun, Run, RunIndex, disk

TEXT = "x" * 4096


def run(**changes: Any) -> Run:
    facts = {"kernel": "6.18.44", "recorded_at": "2026-11-22T22:00:00+00:00"}
    tables = {"rounds": pd.DataFrame({"reads": [1, 2, 3], "case": ["a", "b", None]})}
    return Run("torn-reads", "quick", {"n": 1, "share": 0.5}, facts | changes, tables)


def rewritten(path: Path, change: Callable[[dict[str, Any]], object], *, signed: bool) -> None:
    """Edit run.json; signed, as whoever made the lab's own digest would."""
    meta = json.loads((path / "run.json").read_text())
    change(meta)
    if signed:
        meta["sha256"] = disk._digest_of(meta)
    (path / "run.json").write_text(json.dumps(meta))


def table_of(path: Path, table: pa.Table, rows: int = 3) -> None:
    """Put another table into a run, with its digest."""
    pq.write_table(table, path / "rounds.parquet", compression="zstd")
    digest = disk._sha256((path / "rounds.parquet").read_bytes())
    rewritten(
        path, lambda meta: meta["tables"].update(rounds={"rows": rows, "sha256": digest}),
        signed=True,
    )  # fmt: skip


def in_place(path: Path, name: str, make: Callable[[Path], object]) -> None:
    (path / name).unlink()
    make(path / name)


def one_long_text_in_every_row(path: Path) -> None:
    piece = pa.table({"case": [TEXT] * 20_000})
    writer = pq.ParquetWriter(path / "rounds.parquet", pa.schema([("case", pa.string())]))
    for _ in range(8):
        writer.write_table(piece)
    writer.close()
    digest = disk._sha256((path / "rounds.parquet").read_bytes())
    rewritten(
        path, lambda meta: meta["tables"].update(rounds={"rows": 160_000, "sha256": digest}),
        signed=True,
    )  # fmt: skip


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: rewritten(path, lambda meta: meta["provenance"].pop("kernel"), signed=True),
     "lacks 'kernel'"),
    (lambda path: rewritten(path, lambda meta: meta["provenance"].update(kernel=6), signed=True),
     "lacks 'kernel'"),
    (lambda path: rewritten(path, lambda meta: meta.update(provenance=[]), signed=True),
     "lacks 'provenance'"),
    (lambda path: rewritten(path, lambda meta: meta["tables"].update(rounds=3), signed=True),
     "has no table 'rounds'"),
    (lambda path: rewritten(
        path, lambda meta: meta["tables"].update({"../x": {"rows": 1, "sha256": ""}}), signed=True),
     "has no table '../x'"),
    (lambda path: rewritten(path, lambda meta: meta["parameters"].update(n=2), signed=False),
     "was edited"),
    (lambda path: (path / "run.json").write_text("[" * 200_000), "cannot be read"),
    (lambda path: (path / "run.json").write_bytes(b"\xff\xfe"), "cannot be read"),
    (lambda path: (path / "run.json").write_text(" " * (2 << 20)), "larger than"),
    (lambda path: in_place(path, "run.json", os.mkfifo), "no plain file"),
    (lambda path: in_place(path, "run.json", lambda at: at.symlink_to("/dev/zero")), "cannot be"),
    (lambda path: in_place(path, "run.json", lambda at: at.mkdir()), "no plain file"),
    (lambda path: in_place(path, "rounds.parquet", os.mkfifo), "no plain file"),
    (lambda path: in_place(path, "rounds.parquet", lambda at: at.symlink_to("/dev/zero")),
     "is damaged"),
    (lambda path: table_of(path, pa.table({f"c{i}": pa.nulls(3_000_000) for i in range(9)})),
     "more than 20,000,000 cells"),
    (one_long_text_in_every_row, "its texts have more than"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "sentence"), DAMAGE)
def test_what_is_no_run_is_refused_in_a_sentence(
    damage: Callable[[Path], object], sentence: str, tmp_path: Path
) -> None:
    path = runs.save(run(), tmp_path)
    damage(path)
    with pytest.raises(BadRun, match=sentence) as refused:
        runs.load(path)
    assert "\n" not in str(refused.value)


def test_a_run_comes_back_with_its_texts(tmp_path: Path) -> None:
    loaded = runs.load(runs.save(run(), tmp_path))
    pd.testing.assert_frame_equal(loaded.tables["rounds"], run().tables["rounds"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_that_is_changed_is_noticed(data: st.DataObject, tmp_path: Path) -> None:
    path = runs.save(run(), tmp_path)
    name = data.draw(st.sampled_from(["run.json", "rounds.parquet"]))
    content = bytearray((path / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    (path / name).write_bytes(content)
    try:
        loaded = runs.load(path)
    except BadRun:
        return
    # Blank space of run.json, or another way to write the same.
    assert name == "run.json"
    assert loaded.parameters == run().parameters and loaded.provenance == run().provenance


def test_the_index_names_what_it_left_out_and_goes_on(tmp_path: Path) -> None:
    good = runs.save(run(), tmp_path)
    bad = runs.save(run(recorded_at="2026-11-23T22:00:00+00:00"), tmp_path)
    rewritten(bad, lambda meta: meta["provenance"].pop("kernel"), signed=True)
    index = RunIndex(tmp_path / "none", tmp_path)
    found = index.newest("torn-reads", "6.18")
    assert isinstance(found, Run) and found.path == good
    assert len(index.left_out) == 1 and str(bad) in index.left_out[0]


def test_the_verdicts_do_without_what_is_no_run(tmp_path: Path) -> None:
    for spoil, _ in DAMAGE:
        spoil(runs.save(run(), tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "labkit", "verdicts", "--folder", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stdout.count(str(tmp_path)) >= 10 and "No verdict has changed" in done.stdout


def test_a_recorded_run_is_replaced_in_one_step(tmp_path: Path) -> None:
    target = runs.record(run(), tmp_path)
    script = (
        "import sys; from pathlib import Path; from labkit import runs\n"
        "one = runs.load(Path(sys.argv[1]))\n"
        "while True:\n"
        "    runs.record(one, Path(sys.argv[2]))\n"
        "    print('recorded', flush=True)"
    )
    command = [sys.executable, "-c", script, str(target), str(tmp_path)]
    for wait_s in (0.0, 0.002, 0.005, 0.01, 0.02):  # one takes some ten milliseconds
        with subprocess.Popen(command, stdout=subprocess.PIPE) as recording:
            assert recording.stdout is not None and recording.stdout.readline() == b"recorded\n"
            time.sleep(wait_s)
            recording.kill()
        assert runs.load(target).parameters == run().parameters
