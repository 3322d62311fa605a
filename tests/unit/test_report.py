"""Reports from toy notebooks: what fails is told, what is written is whole."""

from __future__ import annotations

import fcntl
import html
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from labkit.errors import BadInput
from labkit.judge import claims
from labkit.judge.claims import Case, Claim
from labkit.lab import verdicts
from labkit.lab.report import ReportFailed, make_report, sweep

pytestmark = [pytest.mark.usefixtures("toys"), pytest.mark.timeout(180)]


@pytest.fixture(autouse=True)
def few_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the ledger only the beginning: to judge all of it for each report takes seconds."""
    few = claims.read()[:3]
    monkeypatch.setattr(claims, "read", lambda: few)


OPEN = """
from labkit.lab.notebook import Investigation
lab = Investigation("toys", profile=profile, runs_folder=runs_folder, changes=changes)
"""
COUNTS = 'run = lab.measure("toy-counts")\nlab.draw(run)\nlab.conclude(run)'
ASSERT = "lab.assert_findings()"


def write_notebook(folder: Path, name: str, *cells: str) -> None:
    """Write a notebook with the parameters of the real ones."""
    (folder / "params").mkdir(parents=True, exist_ok=True)
    (folder / "params" / "quick.yaml").write_text("profile: quick\n")
    parameters = new_code_cell(
        f'profile = "full"\nruns_folder = {str(folder / "runs")!r}\nchanges = {{}}'
    )
    parameters.metadata["tags"] = ["parameters"]
    code = [new_code_cell(cell.strip()) for cell in (OPEN, *cells)]
    notebook = new_notebook(
        cells=[new_markdown_cell(f"# {name} <title>"), parameters, *code],
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}},
    )
    nbformat.write(notebook, folder / f"{name}.ipynb")


def plain(page: str) -> str:
    return re.sub(
        r"\s+",
        " ",
        html.unescape(re.sub(r"<(style|img)[^>]*>(.*?</style>)?|<[^>]+>", " ", page, flags=re.S)),
    )


def test_one_that_fails_stops_no_other(tmp_path: Path) -> None:
    books, folder = tmp_path / "books", tmp_path / "deep" / "reports"
    write_notebook(books, "00-good", COUNTS, 'lab.conclude(lab.measure("toy-lacks"))', ASSERT)
    write_notebook(books, "01-bad", 'changes["toy-counts"] = {"lost": 9}\n' + OPEN, COUNTS, ASSERT)
    write_notebook(books, "02-broken", "1 / 0", COUNTS)
    write_notebook(books, "03-dies", "import os; os.kill(os.getpid(), 9)")
    write_notebook(books, "04-floods", "for i in range(30000): print(i)", COUNTS, ASSERT)
    kept: list[str] = []
    assert make_report("quick", folder, notebooks=books, done=kept.append) == 5
    states = dict(re.findall(r"^(\d\d-\w+): (\w+)", "\n".join(kept), re.MULTILINE))
    assert states == {
        "00-good": "ok", "01-bad": "FAILED", "02-broken": "FAILED", "03-dies": "FAILED",
        "04-floods": "ok",
    }  # fmt: skip
    index = (folder / "index.html").read_text()
    words = plain(index) + plain((folder / "findings.html").read_text())
    for expected in (
        "5 experiments: 2 hold on this kernel, 2 fail, 1 could not run here.",
        "00-good <title> ok", "7 <lost>.", "cannot run here", "lacks toys",
        "01-bad <title> FAILED", "9 <lost>.", "02-broken <title> FAILED",
        "ZeroDivisionError: division by zero", "stopped before it came to a finding",
        "Its kernel process died",
    ):  # fmt: skip
        assert expected in words, expected
    assert index.count("data:image/png") == 3
    for name in states:
        page = (folder / f"{name}.html").read_text()
        assert nbformat.read(folder / f"{name}.ipynb", as_version=4).cells
        for loads in re.findall(r"""(?:src|href)=["']?([^"'> ]+)|url\(([^)]+)|@import""", page):
            assert not any(part.startswith(("http", "//")) for part in loads)
        assert "<script" not in page and "No description has been provided" not in page
    assert not list(folder.parent.glob(".*"))


@pytest.mark.skipif(sys.platform != "linux", reason="sockets by /proc")
def test_a_notebooks_kernel_is_spoken_to_by_no_port(tmp_path: Path) -> None:
    """The VM's report is the same command, in the VM."""
    books = tmp_path / "books"
    kept: list[str] = []
    ask = """
import json, os
from pathlib import Path
from ipykernel.connect import get_connection_file
assert json.loads(Path(get_connection_file()).read_text())["transport"] == "ipc"
ports = set()
held = [os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
for table in ("tcp", "tcp6"):
    rows = [row.split() for row in Path("/proc/self/net", table).read_text().splitlines()[1:]]
    ports |= {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in held}
# ipykernel's own pipe for the output of forked processes, which takes only what has its secret.
assert len(ports) <= 1, ports
"""
    write_notebook(books, "00-asks", ask, COUNTS, ASSERT)
    assert make_report("quick", tmp_path / "reports", notebooks=books, done=kept.append) == 0, kept


def test_a_notebook_that_does_not_end_is_stopped(tmp_path: Path) -> None:
    write_notebook(tmp_path, "00-hangs", "import time; time.sleep(600)")
    begun = time.monotonic()
    assert make_report("quick", tmp_path / "reports", notebooks=tmp_path, time_limit_s=6.0) == 5
    assert time.monotonic() - begun < 120
    index = plain((tmp_path / "reports" / "index.html").read_text())
    assert "It did not end within 6 s and was stopped." in index


def test_a_later_report_replaces_an_earlier_one(tmp_path: Path) -> None:
    books, folder = tmp_path / "books", tmp_path / "reports"
    write_notebook(books, "00-first", ASSERT)
    assert make_report("quick", folder, notebooks=books) == 0
    (books / "00-first.ipynb").rename(books / "01-second.ipynb")
    assert make_report("quick", folder, notebooks=books) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "01-second.html", "01-second.ipynb", "findings.html", "index.html",
    ]  # fmt: skip


def test_two_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    books, folder = tmp_path / "books", tmp_path / "reports"
    write_notebook(books, "00-good", COUNTS, ASSERT)
    script = (
        "import sys; from pathlib import Path; from labkit.lab.report import make_report; "
        f"sys.exit(make_report('quick', Path({str(folder)!r}), notebooks=Path({str(books)!r})))"
    )
    both = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [one.wait(120) for one in both] == [0, 0]
    assert sorted(path.name for path in folder.iterdir()) == [
        "00-good.html", "00-good.ipynb", "findings.html", "index.html",
    ]  # fmt: skip
    assert len(list((books / "runs").glob("toy-counts/*/run.json"))) == 2
    assert not list(tmp_path.glob(".*"))


def test_an_unknown_parameter_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    write_notebook(tmp_path, "00-good", COUNTS)
    (tmp_path / "params" / "quick.yaml").write_text("profile: quick\nprofil: full\n")
    with pytest.raises(BadInput, match="has no parameter 'profil'; it has profile, runs_folder"):
        make_report("quick", tmp_path / "reports", notebooks=tmp_path)
    assert not (tmp_path / "reports").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [("[1, 2]", "must map names"), ("a: [", "cannot be read"), (None, "cannot be read")],
)
def test_unreadable_parameters_are_refused(tmp_path: Path, content: str | None, words: str) -> None:
    write_notebook(tmp_path, "00-good", COUNTS)
    file = tmp_path / "params" / "quick.yaml"
    file.write_text(content) if content is not None else file.unlink()
    with pytest.raises(BadInput, match=words):
        make_report("quick", tmp_path / "reports", notebooks=tmp_path)


def test_a_wrong_value_is_told_in_a_sentence(tmp_path: Path) -> None:
    write_notebook(tmp_path, "00-good", COUNTS, ASSERT)
    given = {"changes": {"toy-counts": {"lost": "many"}}}
    assert make_report("quick", tmp_path / "reports", notebooks=tmp_path, parameters=given) == 5
    index = plain((tmp_path / "reports" / "index.html").read_text())
    assert "BadInput: lost of toy-counts is of type int such as 7, not 'many'." in index
    page = (tmp_path / "reports" / "00-good.html").read_text()
    assert "Traceback (most" not in page


def test_what_is_no_report_is_not_replaced(tmp_path: Path) -> None:
    write_notebook(tmp_path / "books", "00-good", COUNTS)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    with pytest.raises(BadInput, match="no report of this lab"):
        make_report("quick", mine, notebooks=tmp_path / "books")
    assert (mine / "letter.txt").read_text() == "dear"
    with pytest.raises(BadInput, match="There are no notebooks"):
        make_report("quick", tmp_path / "reports", notebooks=mine)
    with pytest.raises(BadInput, match="quick or full"):
        make_report("slow", tmp_path / "reports", notebooks=tmp_path / "books")


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(tmp_path: Path) -> None:
    write_notebook(tmp_path, "00-good", COUNTS)
    (tmp_path / "file").touch()
    said: list[str] = []
    with pytest.raises(ReportFailed, match="could not be written"):
        make_report("quick", tmp_path / "file" / "reports", notebooks=tmp_path, say=said.append)
    assert said == []


def test_only_what_dead_reports_left_is_swept(tmp_path: Path) -> None:
    dead, live = tmp_path / ".partial-reports-1", tmp_path / ".partial-reports-2"
    other = tmp_path / ".partial-other-3"
    for folder in (dead, live, other, tmp_path / ".replaced-reports-4"):
        folder.mkdir()
    held = os.open(live, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        assert sweep(tmp_path / "reports") == 2
    finally:
        os.close(held)
    assert sorted(tmp_path.iterdir()) == [other, live]


def test_the_verdicts_stand_first_and_lead_to_the_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook that only reads runs comes after those that measure, whatever its number."""
    books, folder = tmp_path / "books", tmp_path / "reports"
    write_notebook(books, "00-reads", "print('nothing measured')", ASSERT)
    write_notebook(books, "01-good", COUNTS, ASSERT)
    case = Case("toy-counts", "", "broken.anomalies == 0")
    claim = Claim("1.1", "Toys", "None is lost.", "No loss.", (case,), "", "{broken} lost.", "Hm.")
    monkeypatch.setattr(
        verdicts,
        "evaluate",
        lambda fresh: claims.judge([claim], recorded=tmp_path, fresh=books / "runs"),
    )
    kept: list[str] = []
    assert make_report("quick", folder, notebooks=books, done=kept.append) == 0
    assert [line.split(":")[0] for line in kept[:2]] == ["01-good", "00-reads"]
    claims_page = (folder / "claims.html").read_text()
    (anchor,) = re.findall(
        r"<td>.*?<a href='(01-good.html#cell-id=[^']+)'>toy-counts</a>", claims_page
    )
    assert f"id={anchor.split('#')[1].removeprefix('cell-')}" in (
        folder / "01-good.html"
    ).read_text().replace('"', "").replace("cell-id=", "id=")
    index = plain((folder / "index.html").read_text())
    assert "Of its 1 claims 0 are true" in index and "All 1 claims" in index
    assert index.index("All 1 claims") < index.index("The notebooks")
    page = (folder / "claim-1.1.html").read_text()
    assert "7 of 100 lost." in plain(page) and "data:image/png;base64," in page
    assert "claims.html#claim-1.1" in page
