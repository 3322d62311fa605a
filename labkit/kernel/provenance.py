"""What a run was measured on: machine, kernel, tools and code, as JSON values.

Recorded runs are committed and published. So nothing in here tells whose machine it was: no
host name, no user, no path.
"""

from __future__ import annotations

import ctypes
import functools
import gzip
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import labkit
from labkit.errors import LabError
from labkit.kernel import native, tools

_CONFIG: Final = (
    "PREEMPT", "PREEMPT_NONE", "PREEMPT_VOLUNTARY", "PREEMPT_DYNAMIC", "PREEMPT_RT", "HZ", "SMP",
    "BPF_JIT", "BPF_JIT_ALWAYS_ON", "BPF_LSM", "DEBUG_INFO_BTF", "KPROBES", "FUNCTION_TRACER",
    "MEMCG", "DEBUG_KERNEL", "KASAN", "PROVE_LOCKING",
)  # fmt: skip
_PACKAGES: Final = ("numpy", "pandas", "pyarrow", "matplotlib", "papermill")
_CHECKOUT: Final = Path(__file__).resolve().parents[2]
_COMMAND_S: Final = 10.0
_TICKS: Final = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


def provenance() -> dict[str, object]:
    """Collect the facts about machine and code at this moment.

    Returns
    -------
    dict
        JSON values; what cannot be found out is an empty string or missing from a nested
        dict, never an error. Keys:

        - recorded_at: UTC, ISO 8601
        - kernel, kernel_version, architecture, distribution: str
        - kernel_config: option to its value (``y``, ``m``, ``n``, a number)
        - cpu: model, count, online, usable (by this process), governor
        - memory_bytes: int
        - virtual: machine (``none``, ``kvm``, ...), emulated (bool, None where unknown):
          emulated instructions make every duration useless outside of that machine
        - clocksource: str
        - mitigations: vulnerability to state, of those that cost time
        - jit: enabled (as ``net.core.bpf_jit_enable``), harden
        - load: the load averages; stolen_share: share of CPU time since boot that other
          machines on the host took
        - tools: versions of bcc, clang, libbpf, bpftool, headers, python and packages; event_path:
          who follows events, as ``labkit.kernel.native.state`` says
        - code: version, commit, modified (bool, None where there is no git), and digest, of all
          that is in labkit and bpf
    """
    return {
        "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **_lasting_facts(),
        "load": _load(),
        "stolen_share": _stolen_share({}, usage()),
    }


def usage() -> dict[str, int]:
    """Take the machine's CPU accounting now, for :func:`usage_since`.

    Returns
    -------
    dict
        Clock ticks since boot by kind (user, nice, system, idle, iowait, irq, softirq,
        steal), over all CPUs; empty where the system does not tell.
    """
    first, _, _ = _read("/proc/stat").partition("\n")
    return dict(zip(_TICKS, map(int, first.split()[1:]), strict=False))


def usage_since(before: dict[str, int]) -> dict[str, object]:
    """What the machine did between a call of :func:`usage` and now.

    Returns
    -------
    dict
        ``stolen_share`` and ``busy_share`` of all CPU time in between (float from 0 to 1; None
        where nothing is known or no time passed), and ``load``, the load averages now.
    """
    now = usage()
    spent = {name: now[name] - before.get(name, 0) for name in now}
    total = sum(spent.values())
    idle = spent.get("idle", 0) + spent.get("iowait", 0) + spent.get("steal", 0)
    return {
        "stolen_share": _stolen_share(before, now),
        "busy_share": round((total - idle) / total, 4) if total > 0 else None,
        "load": _load(),
    }


@functools.cache
def _kept_facts() -> dict[str, object]:
    return {
        "kernel": platform.release(),
        "kernel_version": platform.version(),
        "architecture": platform.machine(),
        "distribution": _distribution(),
        "kernel_config": _kernel_config(),
        "cpu": _cpu(),
        "memory_bytes": _memory_bytes(),
        "virtual": {"machine": _hypervisor(), "emulated": emulated()},
        "tools": _tools(),
    }


def _lasting_facts() -> dict[str, object]:
    # The version of the code is asked for each time: a notebook's process outlives an edit.
    return {
        **_kept_facts(),
        "clocksource": _read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "mitigations": _mitigations(),
        "jit": {
            "enabled": _read("/proc/sys/net/core/bpf_jit_enable"),
            "harden": _read("/proc/sys/net/core/bpf_jit_harden"),
        },
        "code": _code(),
    }


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _said(*command: str, **how: Any) -> str:
    """What a command prints; nothing where it fails or takes too long."""
    try:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            command,
            **how,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=_COMMAND_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _distribution() -> str:
    match = re.search(r'^PRETTY_NAME="?([^"\n]*)', _read("/etc/os-release"), re.MULTILINE)
    return match[1] if match else f"{platform.system()} {platform.release()}"


def _kernel_config() -> dict[str, str]:
    try:
        text = gzip.decompress(Path("/proc/config.gz").read_bytes()).decode(errors="replace")
    except (OSError, EOFError):
        text = _read(f"/boot/config-{platform.release()}")
    if not text:
        return {}
    found = dict(re.findall(r"^CONFIG_(\w+)=(.*)$", text, re.MULTILINE))
    return {name: found.get(name, "n").strip('"') for name in _CONFIG}


def _cpu() -> dict[str, object]:
    model = re.search(r"^(?:model name|Model|uarch)\s*:\s*(.*)$", _cpu_info(), re.MULTILINE)
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return {
        "model": model[1].strip() if model else platform.processor(),
        "count": os.cpu_count(),
        "online": _read("/sys/devices/system/cpu/online"),
        "usable": len(affinity(0)) if affinity else os.cpu_count(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
    }


@functools.cache
def _cpu_info() -> str:
    return _read("/proc/cpuinfo")


def _memory_bytes() -> int | None:
    match = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _hypervisor() -> str:
    """Kind of machine below the kernel, as far as it shows: ``none`` where nothing shows."""
    if said := _said("systemd-detect-virt", "--vm"):
        return said
    identity = " ".join(
        _read(f"/sys/class/dmi/id/{name}").lower() for name in ("sys_vendor", "product_name")
    )
    for word, name in (
        ("qemu", "qemu"), ("virtualbox", "oracle"), ("vmware", "vmware"), ("kvm", "kvm"),
        ("amazon", "amazon"), ("google", "google"), ("microsoft", "microsoft"),
    ):  # fmt: skip
        if word in identity:
            return name
    if "kvm-clock" in _read("/sys/devices/system/clocksource/clocksource0/available_clocksource"):
        return "kvm"
    if kind := _read("/sys/hypervisor/type"):
        return kind
    flags = re.search(r"^flags\s*:(.*)$", _cpu_info(), re.MULTILINE)
    if flags is None:
        return ""
    return "unknown hypervisor" if "hypervisor" in flags[1].split() else "none"


@functools.cache
def emulated() -> bool | None:
    """Whether QEMU interprets the instructions (TCG) in place of a CPU that executes them."""
    info = _cpu_info()
    if not info:
        return None
    if "TCG CPU" in info or "QEMU Virtual CPU" in info:
        return True
    if _hypervisor() == "none":
        return False
    # A CPU model by name hides TCG. What an emulator cannot hide: no paravirtual interface of
    # KVM, and QEMU's identity.
    vendor = _read("/sys/class/dmi/id/sys_vendor") == "QEMU"
    clocks = _read("/sys/devices/system/clocksource/clocksource0/available_clocksource")
    return vendor and "kvm-clock" not in clocks


def _mitigations() -> dict[str, str]:
    folder = Path("/sys/devices/system/cpu/vulnerabilities")
    try:
        states = {path.name: _read(path) for path in sorted(folder.iterdir())}
    except OSError:
        return {}
    return {name: state for name, state in states.items() if state != "Not affected"}


def _load() -> list[float]:
    try:
        return [round(one, 2) for one in os.getloadavg()]
    except OSError:
        return []


def _stolen_share(before: dict[str, int], now: dict[str, int]) -> float | None:
    total = sum(now.values()) - sum(before.values())
    stolen = now.get("steal", 0) - before.get("steal", 0)
    return round(stolen / total, 4) if total > 0 else None


def _tools() -> dict[str, object]:
    bpftool = tools.find_tool("bpftool")
    return {
        "python": platform.python_version(),
        **{name: _package_version(name) for name in _PACKAGES},
        "bcc": _bcc_version(),
        "clang": _clang_version(),
        "event_path": native.state(),
        "libbpf": _libbpf_version(),
        "bpftool": _version_in(_said(bpftool, "version")) if bpftool else "",
        "headers": _headers_version(),
    }


def _package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _bcc_version() -> str:
    try:
        return str(getattr(tools.import_bcc(), "__version__", ""))
    except LabError:
        return ""


def _clang_version() -> str:
    """Version of the compiler inside of libbcc, by the LLVM library that it is linked with."""
    mapped = _read("/proc/self/maps") if _bcc_version() else ""
    libraries = re.findall(r"lib(?:LLVM|clang-cpp)[-.](?:so\.)?(\d+(?:\.\d+)*)", mapped)
    return max(libraries, key=len, default="")


def _libbpf_version() -> str:
    try:
        library = ctypes.CDLL("libbpf.so.1")
        library.libbpf_version_string.restype = ctypes.c_char_p
        return str(library.libbpf_version_string().decode().lstrip("v"))
    except (OSError, AttributeError):
        return ""


def _headers_version() -> str:
    try:
        return tools.headers_version()
    except LabError:
        return ""


def _version_in(text: str) -> str:
    match = re.search(r"\d+(?:\.\d+)+", text)
    return match[0] if match else ""


def _code() -> dict[str, object]:
    """Version of the code: from git where the checkout has it, else of the package."""
    # Without locks: somebody may be committing right now.
    git = ("git", "--no-optional-locks", "-C", str(_CHECKOUT))
    how = _as_owner(_CHECKOUT)
    commit = _said(*git, "rev-parse", "HEAD", **how) if (_CHECKOUT / ".git").exists() else ""
    return {
        "version": labkit.__version__,
        "commit": commit,
        "modified": bool(_said(*git, "status", "--porcelain", "--", "labkit", "bpf", **how))
        if commit
        else None,
        "digest": _digest(),
    }


def _as_owner(folder: Path) -> dict[str, Any]:
    """How to run git as the owner of a checkout: what its settings name is run, and not by root."""
    known = folder.stat()
    if os.geteuid() != 0 or known.st_uid == 0:
        return {}
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": "/", "LC_ALL": "C"}
    return {
        "user": known.st_uid, "group": known.st_gid, "extra_groups": [], "env": environment,
    }  # fmt: skip


def _digest() -> str:
    known = hashlib.sha256()
    for folder in ("labkit", "bpf"):
        for path in sorted((_CHECKOUT / folder).rglob("*")):
            if path.suffix in (".py", ".c", ".h", ".go") and path.is_file():
                known.update(f"{path.relative_to(_CHECKOUT)}\n".encode() + path.read_bytes())
    return known.hexdigest()
