"""Programs in Go: built offline, with what set-up has fetched."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from labkit.errors import LabError, TimedOut, Unavailable
from labkit.kernel import tools

_FETCHED: Final = tools.go_libraries()
_SOURCES: Final = Path("usr/share/gocode/src")

LIBRARIES: Final = _FETCHED / _SOURCES
"""What ``provision/go-libraries.sh`` unpacks: modules by their names, as Debian sid has them."""

MODULE: Final = Path(__file__).parent / "go" / "module"
"""The module of the experiments below ``experiments/go``: a folder for each package."""

EBPF: Final = ("github.com/cilium/ebpf", "golang.org/x/sys")
"""cilium/ebpf, and what it needs."""

_CACHE: Final = tools.cache_folder() / "go-cache"
_LIMIT_S: Final = 600.0  # the first compiles Go's own library: minutes on an emulated CPU


def build(
    source: Path, folder: Path, *, modules: tuple[str, ...] = (), detector: bool = False
) -> Path:
    """Build a program of one file, or of a package of `MODULE`.

    Parameters
    ----------
    source : Path
        The file, or the folder of the package.
    folder : Path
        Gets the program; what a killed compiler leaves goes with it.
    modules : tuple of str
        Modules of `LIBRARIES` that it imports.
    detector : bool
        With the race detector.

    Returns
    -------
    Path
        The program.

    Raises
    ------
    Unavailable
        There is no Go toolchain, or a module is missing.
    TimedOut
        It took more than ten minutes.
    LabError
        It does not compile.
    """
    program = folder / f"{source.stem}{'_race' * detector}"
    command = ["build", *["-race"] * detector, "-o", str(program)]
    if modules:
        place = _module(folder, dict.fromkeys(modules, LIBRARIES))
        if source.is_dir():
            shutil.copytree(MODULE, place, dirs_exist_ok=True)
            command.append(f"./{source.relative_to(MODULE)}")
        else:
            shutil.copy(source, place)
    else:
        place = folder
        command.append(str(source))
    built = _go(command, folder, place, modules=bool(modules), detector=detector)
    if built.returncode:
        raise LabError(f"go build failed: {built.stderr.strip().splitlines()[-1]}")
    return program


def versions() -> Mapping[str, Path]:
    """Where the modules are that go with each version of cilium/ebpf, the newest last.

    Raises
    ------
    Unavailable
        There is none.
    """
    found = {}
    for root in (*sorted(path.parent for path in _FETCHED.glob("*/usr")), _FETCHED):
        log = root / "usr/share/doc/golang-github-cilium-ebpf-dev/changelog.Debian.gz"
        if log.is_file():
            first = gzip.decompress(log.read_bytes()).decode().partition(")")[0]
            found[first.partition("(")[2].partition("-")[0].partition("+")[0]] = root / _SOURCES
    if not found:
        raise _missing(EBPF[0])
    return found


def complaints(packages: str, libraries: Path, folder: Path) -> list[str]:
    """Compile packages of `MODULE`, and answer what the compiler says of them.

    Parameters
    ----------
    packages : str
        The folder that holds them.
    libraries : Path
        Where the modules are that they import: of `versions`.
    folder : Path
        Of the caller's own, empty.

    Returns
    -------
    list of str
        Its lines: ``<file from packages on>:<line>:<column>: <words>``.

    Raises
    ------
    Unavailable, TimedOut
        As for `build`.
    LabError
        What does not compile is none of these packages.
    """
    names = [name for name in (*EBPF, "golang.org/x/exp") if (libraries / name).is_dir()]
    place = _module(folder, dict.fromkeys(names, libraries))
    shutil.copytree(MODULE / packages, place / packages)
    built = _go(["build", "-gcflags=-e", f"./{packages}/..."], folder, place, modules=True)
    said = [line for line in built.stderr.splitlines() if not line.startswith(("#", "go: "))]
    lines = [line.removeprefix("./").removeprefix(f"{packages}/") for line in said
             if line.removeprefix("./").startswith(f"{packages}/")]  # fmt: skip
    if len(lines) < len(said) or (built.returncode and not lines):
        raise LabError(f"go build failed: {built.stderr.strip().splitlines()[-1]}")
    return lines


def _module(folder: Path, places: Mapping[str, Path]) -> Path:
    """An empty module that takes others from where they were unpacked."""
    for name, libraries in places.items():
        if not (libraries / name).is_dir():
            raise _missing(name)
    place = folder / "module"  # Go passes over a go.mod in TMPDIR itself
    place.mkdir()
    lines = ["module lab", "go 1.25"]
    lines += [f"require {name} v0.0.0" for name in places]
    lines += [f"replace {name} => {libraries / name}" for name, libraries in places.items()]
    (place / "go.mod").write_text("\n".join(lines) + "\n")
    return place


def _missing(name: str) -> Unavailable:
    return Unavailable(
        f"The Go module {name} is missing: remove .lab/go-libraries, and make setup "
        "fetches it from Debian."
    )


def _go(
    command: list[str], folder: Path, place: Path, *, modules: bool, detector: bool = False
) -> subprocess.CompletedProcess[str]:
    go = tools.go_command()
    _CACHE.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "GOCACHE": str(_CACHE),
        "TMPDIR": str(folder),
        "GOPROXY": "off",  # nothing is to be fetched
        "GOSUMDB": "off",
        "GOFLAGS": "-mod=mod" if modules else "",
        "GOTOOLCHAIN": "local",
        "GO111MODULE": "on" if modules else "off",
        "CGO_ENABLED": "1" if detector else "0",
    }
    try:
        return subprocess.run(
            [go, *command], env=environment, cwd=place, capture_output=True, text=True,
            timeout=_LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TimedOut(f"go build did not end within {_LIMIT_S:g} s.") from None
