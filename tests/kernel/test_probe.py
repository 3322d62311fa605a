"""The trials on the kernel that runs here: each either works or says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from labkit.errors import Unavailable
from labkit.kernel import libbpf, probe, tools
from labkit.kernel.libbpf import AttachType, ProgramKind
from labkit.kernel.trials import TRIALS

CHECKOUT = Path(probe.__file__).resolve().parents[2]
RETURN_ZERO = bytes([0xB7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("name", list(TRIALS))
def test_each_feature_answers_in_words(name: str) -> None:
    found = probe.probe(name)
    assert found.name == name
    assert found.answer and "\n" not in found.answer
    assert bool(found.remedy) is not found.works
    # A mistake of ours in a trial would show as the name of a Python error.
    assert "Error:" not in found.answer and "Traceback" not in found.answer


def test_what_the_other_kernel_tests_use_works() -> None:
    probe.require("bpf", "test_run", "hash", "ringbuf", "raw_tracepoint", "bpffs_detached")


def test_the_answer_on_fentry_is_the_kernels_own() -> None:
    """Load one by hand: both must come to the same end, at load time or after."""
    try:
        fd = libbpf.prog_load(
            ProgramKind.TRACING,
            RETURN_ZERO,
            name="labkit_test",
            attach_type=AttachType.TRACE_FENTRY,
            attach_btf_id=libbpf.vmlinux_function_id("vfs_read", AttachType.TRACE_FENTRY),
        )
    except OSError as error:
        found = probe.probe("fentry")
        assert not found.works
        assert libbpf.error_name(error.errno or 0) in found.answer
        with pytest.raises(Unavailable, match=r"feature fentry.*: use a kernel that has it"):
            probe.require("fentry")
    else:
        os.close(fd)


def test_the_doctor_agrees_with_the_features() -> None:
    text, status = probe.doctor(json=True)
    report = json.loads(text)
    works = {one.name: one.works for one in probe.features()}
    assert {one["name"]: one["works"] for one in report["features"]} == works
    assert report["ready"] is all(works[name] for name in probe.essential())
    assert status == (0 if report["ready"] else 3)
    shown, same_status = probe.doctor()
    assert same_status == status
    assert all(name in shown for name in probe.names())


@pytest.mark.outside_vm("starts Python anew: a minute on an emulated CPU")
def test_an_ordinary_user_gets_reasons_and_no_traceback() -> None:
    if os.geteuid() != 0:
        pytest.skip("this kernel lacks nothing: only root can become another user")
    code = "from labkit.kernel import probe; text, status = probe.doctor(); print(text, status)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT), "HOME": "/nonexistent"},
        user=65534,
        group=65534,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if "Permission denied" in done.stderr or "No module" in done.stderr:
        pytest.skip("this kernel lacks nothing: an ordinary user may not read this checkout")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert rows["bpf"].split()[1] == "NO" and "EPERM" in rows["bpf"]
    assert "not tried without bpf" in rows["ringbuf"]
    assert done.stdout.rstrip().endswith("3")


@pytest.mark.outside_vm("starts Python anew: a minute on an emulated CPU")
def test_a_trial_leaves_the_environment_of_its_caller_alone() -> None:
    before = (os.getcwd(), dict(os.environ), os.sched_getaffinity(0))
    for name in ("compile", "perf_buffer", "xdp"):
        probe.probe.cache_clear()
        probe.probe(name)
    assert (os.getcwd(), dict(os.environ), os.sched_getaffinity(0)) == before


def test_bcc_gets_headers(require_feature: Callable[[str], None]) -> None:
    require_feature("compile")
    bcc = tools.prepare_bcc()
    assert hasattr(bcc, "BPF")
    folder = tools.headers_folder()
    assert folder.exists()
    if folder == tools.MERGED_HEADERS:
        assert os.environ["BCC_KERNEL_SOURCE"] == str(folder)


def test_a_redis_server_is_what_it_says(require_feature: Callable[[str], None]) -> None:
    require_feature("redis-server")
    executable, name = tools.redis_server_command()
    done = subprocess.run(
        [name, "--version"], executable=executable, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Redis server")
