"""Programs in Go that experiments compare with: built offline, with what set-up has fetched."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

from labkit.errors import LabError, TimedOut, Unavailable
from labkit.kernel import tools

LIBRARIES: Final = tools.cache_folder() / "go-libraries" / "usr/share/gocode/src"
"""What ``provision/go-libraries.sh`` unpacks: modules by their names."""

_CACHE: Final = tools.cache_folder() / "go-cache"
_LIMIT_S: Final = 600.0  # the first compiles Go's own library: minutes on an emulated CPU


def build(
    source: Path, folder: Path, *, modules: tuple[str, ...] = (), detector: bool = False
) -> Path:
    """Build a program of one file.

    Parameters
    ----------
    source : Path
        The file.
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
    go = tools.go_command()
    if missing := [name for name in modules if not (LIBRARIES / name).is_dir()]:
        raise Unavailable(
            f"The Go module {missing[0]} is missing: remove .lab/go-libraries, and make setup "
            "fetches it from Debian sid."
        )
    program = folder / f"{source.stem}{'_race' * detector}"
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
    command = [go, "build", *["-race"] * detector, "-o", str(program)]
    place = folder
    if modules:
        place = folder / "module"  # Go passes over a go.mod in TMPDIR itself
        place.mkdir()
        versions = "".join(f"require {name} v0.0.0\n" for name in modules)
        replaced = "".join(f"replace {name} => {LIBRARIES / name}\n" for name in modules)
        (place / "go.mod").write_text(f"module {source.stem}\ngo 1.25\n{versions}{replaced}")
        (place / source.name).write_bytes(source.read_bytes())
    else:
        command.append(str(source))
    try:
        built = subprocess.run(
            command, env=environment, cwd=place, capture_output=True, text=True, timeout=_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise TimedOut(f"go build did not end within {_LIMIT_S:g} s.") from None
    if built.returncode:
        raise LabError(f"go build failed: {built.stderr.strip().splitlines()[-1]}")
    return program
