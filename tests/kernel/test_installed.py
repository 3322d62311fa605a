"""What pip installs follows maps by itself: programs, NumPy, a command, and clear refusals."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from labkit.kernel import native

pytestmark = pytest.mark.outside_vm("what pip installs is the same on every kernel")

ROOT = Path(__file__).parents[2]
PROJECT = ("labkit", "experiments", "bpf", "pyproject.toml", "README.md", "LICENSE")

# An agent's machine: nothing of the lab's, and no bcc.
BARE = """
import sys
for name in ("bcc", "pandas", "pyarrow", "matplotlib", "IPython", "jinja2", "markupsafe", "tqdm"):
    sys.modules[name] = None
"""

FOLLOW = """
import sys
from pathlib import Path
import labkit
from labkit.kernel import compiler, native
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.sync import Poll, TraceHook

compiler.KEPT = Path.cwd()
native.KEPT = Path.cwd() / "native"
follower = {"poll": Poll, "hook": TraceHook}[sys.argv[1]]
with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8) as policy:
    with follower() as strategy:
        strategy.attach(policy)
        policy.update(80, 7)
        for changes in strategy.changes(for_s=60):
            break
        print(labkit.__file__, compiler.SOURCES, int(changes["version"][0]), sep="\\n")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel holds, as pip unpacks it, and the project's metadata beside it."""
    pytest.importorskip("setuptools", reason="a wheel is built by setuptools")
    folder = tmp_path_factory.mktemp("installed")
    source, unpacked = folder / "source", folder / "site-packages"
    source.mkdir()
    for name in PROJECT:
        if (ROOT / name).is_dir():
            left_out = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=left_out)
        else:
            shutil.copy(ROOT / name, source / name)
    unpacked.mkdir()
    built = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import setuptools; setuptools.setup()", "-q",
         "build", "--build-lib", str(unpacked), "egg_info", "--egg-base", str(unpacked)],
        cwd=source, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return unpacked


def run(where: Path, folder: Path, *arguments: str, bare: bool) -> subprocess.CompletedProcess[str]:
    """Python from another folder than the checkout, with what is installed alone."""
    if bare:
        (folder / "sitecustomize.py").write_text(BARE)
    path = os.pathsep.join([str(where), str(folder)])
    return subprocess.run(
        [sys.executable, "-P", *arguments], cwd=folder, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip


def test_an_agent_gets_numpy_the_programs_and_a_command(installed: Path) -> None:
    for source in [*(ROOT / "bpf").rglob("*.c"), *(ROOT / "bpf").rglob("*.h")]:
        assert (installed / "labkit" / source.relative_to(ROOT)).read_text() == source.read_text()
    for source in (ROOT / "experiments").rglob("*.go"):
        assert (installed / source.relative_to(ROOT)).read_text() == source.read_text()
    project = PathDistribution(installed / "map_freshness_lab.egg-info")
    needed = [one for one in project.requires or [] if "extra ==" not in one]
    assert [one.partition("==")[0] for one in needed] == ["numpy"]
    extras = project.metadata.get_all("Provides-Extra") or []
    assert {"lab", "test"} <= set(extras)
    command = {one.name: one.value for one in project.entry_points}
    assert command == {"labkit": "labkit.__main__:main"}


def test_a_map_is_followed_with_numpy_alone(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-c", FOLLOW, "poll", bare=True)
    assert done.returncode == 0, done.stderr
    module, sources, version = done.stdout.splitlines()
    assert Path(module).is_relative_to(installed)
    assert (Path(sources), version) == (installed / "labkit" / "bpf", "7")
    assert list(tmp_path.glob("native/*.so")) or native.compiled() is None


def test_a_program_is_compiled_from_where_it_was_installed(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-c", FOLLOW, "hook", bare=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [str(installed / "labkit" / "bpf"), "7"]
    assert list(tmp_path.glob("trace_hook_*.json")), "what was compiled is kept"


def test_without_bcc_a_hook_names_the_package(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-c", FOLLOW, "hook", bare=True)
    assert "Unavailable: bcc is missing" in done.stderr
    assert "apt-get install python3-bpfcc" in done.stderr.splitlines()[-1]


def test_commands_that_need_no_bcc_do_not_ask_for_it(installed: Path, tmp_path: Path) -> None:
    from labkit.kernel.libbpf import MapKind
    from labkit.kernel.maps import Map

    with Map.create(MapKind.HASH, key="u4", value="u8", max_entries=8) as policy:
        done = run(installed, tmp_path, "-m", "labkit", "diagnose", str(policy.id), bare=True)
    assert done.returncode == 0, done.stderr
    assert "bcc" not in done.stdout + done.stderr


def test_a_command_of_the_lab_names_the_extra(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-m", "labkit", "list", bare=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert "pip install 'map-freshness-lab[lab]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    told = run(installed, tmp_path, "-m", "labkit", "--version", bare=True)
    assert told.stdout.split() == ["labkit", PathDistribution(
        installed / "map_freshness_lab.egg-info"
    ).version]  # fmt: skip
