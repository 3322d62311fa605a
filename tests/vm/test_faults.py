"""What may go wrong around the VM: each fault for real, and none waits for a system to boot.

In the place of the lab's image stands a guest of a few instructions (``silent_guest.S``), so that
QEMU is the real one, and up at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from labkit.errors import LabError, TimedOut
from labkit.kernel.leftovers import start_time
from labkit.kernel.objects import family
from provision import vm

COMMAND = (sys.executable, "-m", "provision.vm")
BUILD = str(vm.CHECKOUT / "provision" / "vm-image.sh")
WITHIN_S = 60.0

NO_KVM = "mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3"
# Nothing tells beforehand that this machine's KVM runs no stock kernel.
UNTOLD = "mount -t tmpfs none /sys/module"
FALSE_KVM = f"{UNTOLD}; {NO_KVM}; mknod -m 666 /dev/kvm c 1 3"  # opens, and is none


DOES_NOT_RUN = "/dev/kvm opens, but a kernel does not get up under it"
STANDS_STILL = "a kernel under KVM was not up after 2 s"
# Nothing boots under a false KVM, however long one waits.
SOON_TOLD = "import sys; from provision import vm; vm._TRIAL_LIMIT_S = 2; sys.exit(vm.main())"
NEEDS_FAULTY_KVM = pytest.mark.skipif(
    not (os.path.exists("/dev/kvm") and os.path.exists("/sys/module/kvm_pvm")),
    reason="this kernel lacks a KVM that is known to run no guest",
)


@pytest.fixture(autouse=True)
def _tools() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make such faults")
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("there is no QEMU: provision/vm-packages.sh installs it")


def make_image(folder: Path, *options: str) -> Path:
    """An image of the name that the lab's own would have, with another guest."""
    name = subprocess.run([BUILD, "--name"], capture_output=True, text=True, check=True).stdout
    image = folder / name.strip()
    image.mkdir(parents=True)
    source = Path(__file__).with_name("silent_guest.S")
    linked = ("-m32", "-nostdlib", "-static", "-Wl,-Ttext=0x100000", "-Wl,--build-id=none")
    subprocess.run(["gcc", *linked, *options, "-o", image / "vmlinux", source], check=True)
    (image / "initrd").write_bytes(b"none")
    (image / "disk.raw").write_bytes(bytes(1 << 20))
    (image / "host_key").write_text("ssh-ed25519 none\n")
    return image


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of images in which the guest never answers; its CPU is emulated."""
    monkeypatch.setenv("LAB_VM_CACHE", str(tmp_path))
    monkeypatch.setenv("LAB_VM_ACCEL", "tcg")
    make_image(tmp_path)
    return tmp_path


def wait_for(what: Callable[[], object], why: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.05)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def qemu_of(pid: int) -> list[int]:
    return [one for one in family(pid) if command_line(one).startswith("qemu-system-x86_64 ")]


def ended(*command: str, mounts: str = "true") -> subprocess.CompletedProcess[str]:
    """A command that ends, where the mounts are as the shell's lines make them."""
    inside = ["sh", "-ec", f'{mounts}; exec "$@"', "sh", *command]
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", *inside],
        cwd=vm.CHECKOUT, capture_output=True, text=True, timeout=WITHIN_S, check=False,
    )  # fmt: skip


class Holder:
    """A command that boots a VM, once its QEMU runs."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(command, cwd=vm.CHECKOUT, stderr=subprocess.DEVNULL)
        wait_for(lambda: qemu_of(self.process.pid), "QEMU was not started")
        (self.qemu,) = qemu_of(self.process.pid)
        text = command_line(self.qemu)
        self.port = text.partition("hostfwd=tcp:127.0.0.1:")[2].partition("-")[0]
        self.folder = Path(text.partition("file:")[2].partition("/serial.log")[0])

    def end(self, by: signal.Signals) -> None:
        self.process.send_signal(by)
        self.process.wait(WITHIN_S)
        wait_for(lambda: start_time(self.qemu) is None, "QEMU outlived the command that started it")


@pytest.fixture
def hold(images: Path) -> Iterator[Callable[..., Holder]]:
    holders: list[Holder] = []

    def start(*command: str) -> Holder:
        holders.append(Holder(*command))
        return holders[-1]

    yield start
    for holder in holders:
        holder.end(signal.SIGKILL)


def test_a_guest_that_never_answers_is_given_up_and_its_log_shown(images: Path) -> None:
    said: list[str] = []
    with (
        pytest.raises(TimedOut, match="did not answer within 3 s"),
        vm.booted(said.append, limit_s=3),
    ):
        pass
    assert "serial.log: here is a guest that never answers" in said
    assert not qemu_of(os.getpid())
    assert not list(vm.STATE.glob(f"run-{os.getpid()}"))


def test_a_guest_that_ends_at_once_is_told_from_one_that_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_VM_CACHE", str(tmp_path))
    monkeypatch.setenv("LAB_VM_ACCEL", "tcg")
    make_image(tmp_path, "-DENDS")
    said: list[str] = []
    with pytest.raises(LabError, match="QEMU ended with status 0 before"), vm.booted(said.append):
        pass
    assert "serial.log: here is a guest that never answers" in said


def test_a_guest_that_is_lost_is_asked_where_its_cpus_are(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(vm, "_LAST_WORDS_S", 2.0)
    # As if it had answered.
    monkeypatch.setattr(vm, "_await_ready", lambda *_: None)
    monkeypatch.setattr(vm.Machine, "bring_checkout", lambda _: None)
    with pytest.raises(vm.GuestLost, match="does not answer"), vm.booted(said.append) as machine:
        log = Path(machine.folder, "serial.log")
        wait_for(lambda: log.exists() and "here is" in log.read_text(), "it did not start")
        dataclasses.replace(machine, port=vm.free_port()).run("true")
    assert {"QEMU: CPU#0", "serial.log: here is a guest that never answers"} <= set(said)
    assert any(re.match(r"QEMU: [ER]IP=", line) for line in said)
    assert not qemu_of(os.getpid())


@pytest.mark.parametrize(
    ("ends", "status"),
    [([0], 0), ([1], 1), (["lost", 0], 0), (["lost", 1], 1), (["lost", "lost"], None)],
)
def test_only_a_lost_guest_is_replaced_and_only_once(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ends: list[int | str],
    status: int | None,
) -> None:
    left = list(ends)

    def once() -> int:
        end = left.pop(0)
        if isinstance(end, str):
            raise vm.GuestLost("It does not answer.")
        return end

    monkeypatch.setattr(vm, "_test_once", once)
    if status is None:
        with pytest.raises(vm.GuestLost):
            vm._test(argparse.Namespace())
    else:
        assert vm._test(argparse.Namespace()) == status
    assert not left
    assert ("LOST" in capsys.readouterr().err) == (ends[0] == "lost")


@pytest.mark.parametrize(
    "command", [(*COMMAND, "boot"), ("make", "vm-boot")], ids=["python", "make"]
)
def test_kill_9_leaves_no_qemu(hold: Callable[..., Holder], command: tuple[str, ...]) -> None:
    holder = hold(*command)
    holder.end(signal.SIGKILL)
    assert holder.folder.exists()
    vm.remove_dead()
    assert not holder.folder.exists()


def test_an_end_by_timeout_leaves_nothing(hold: Callable[..., Holder]) -> None:
    holder = hold(*COMMAND, "boot")
    holder.end(signal.SIGTERM)
    assert not holder.folder.exists()


def test_two_at_once_share_nothing(hold: Callable[..., Holder]) -> None:
    one, other = hold(*COMMAND, "boot"), hold(*COMMAND, "boot")
    assert one.port != other.port and one.folder != other.folder
    one.end(signal.SIGTERM)
    assert start_time(other.qemu) is not None and other.folder.exists()


@pytest.mark.parametrize(
    ("mounts", "reasons"),
    [
        pytest.param(NO_KVM, {"there is no /dev/kvm"}, id="none"),
        pytest.param(FALSE_KVM, {DOES_NOT_RUN}, id="false"),
        pytest.param(
            UNTOLD, {DOES_NOT_RUN, STANDS_STILL}, id="this machine's", marks=NEEDS_FAULTY_KVM
        ),
    ],
)
def test_without_a_kvm_that_works_the_cpu_is_emulated(
    images: Path, monkeypatch: pytest.MonkeyPatch, mounts: str, reasons: set[str]
) -> None:
    command = (sys.executable, "-c", SOON_TOLD, "accelerator")
    monkeypatch.delenv("LAB_VM_ACCEL")
    done = ended(*command, mounts=mounts)
    assert (done.returncode, done.stdout) == (0, "tcg\n"), done.stderr
    emulated = "lab: the VM's CPU will be emulated, some ten times slower: "
    assert done.stderr in {f"{emulated}{why}\n" for why in reasons}
    monkeypatch.setenv("LAB_VM_ACCEL", "kvm")
    done = ended(*command, mounts=mounts)
    assert (done.returncode, done.stdout) == (3, "")
    refused = "lab: KVM is asked for (LAB_VM_ACCEL), and "
    assert done.stderr in {f"{refused}{why}.\n" for why in reasons}


@pytest.mark.parametrize(
    ("name", "value"),
    [("LAB_VM_CPUS", "none"), ("LAB_VM_MEMORY", "512"), ("LAB_VM_ACCEL", "hvf")],
)
def test_settings_that_cannot_be_meant_are_refused(
    images: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    done = ended(*COMMAND, "boot")
    assert done.returncode == 2
    assert done.stderr.startswith(f"lab: {name} is ") and done.stderr.count("\n") == 1


def test_a_full_disk_is_told_before_anything_is_started(images: Path, tmp_path: Path) -> None:
    vm.STATE.mkdir(parents=True, exist_ok=True)
    full = f"mount -t tmpfs -o size=16m none {vm.STATE}"
    done = ended(*COMMAND, "boot", mounts=full)
    assert done.returncode == 3
    assert "A running VM may write 2 GiB" in done.stderr and done.stderr.count("\n") == 1
    full = f"mount -t tmpfs -o size=16m none {tmp_path}"
    done = ended(BUILD, mounts=full)
    assert done.returncode == 1
    assert "needs 5000 MB of disk" in done.stderr and done.stderr.count("\n") == 1


def wheels() -> str:
    """Name of the folder that tells the build that the Python packages have been fetched."""
    pins = re.findall(r'"((?!numba=)[^" ]*==[^" ]*)"', (vm.CHECKOUT / "pyproject.toml").read_text())
    return "wheels-" + hashlib.sha256("".join(f"{pin}\n" for pin in pins).encode()).hexdigest()[:16]


FILLS_THE_DISK = """#!/bin/sh -e
for word; do case $word in */root) root=$word ;; esac; done
mkdir "$root"
fallocate -l "$(df -B1 --output=avail "$root" | tail -n 1)" "$root/most"
cp /dev/zero "$root/rest"
"""


def test_a_disk_that_fills_during_a_build_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mmdebstrap").write_text(FILLS_THE_DISK)
    (tmp_path / "bin" / "mmdebstrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("LAB_VM_CACHE", f"{tmp_path}/cache")
    disk = f"""
        truncate -s 6G {tmp_path}/disk
        mkfs.ext4 -q -m 0 {tmp_path}/disk
        mount -o loop {tmp_path}/disk {tmp_path}/cache
        mkdir {tmp_path}/cache/{wheels()}"""
    done = ended("sh", "-c", f"{BUILD}; status=$?; ls {tmp_path}/cache; exit $status", mounts=disk)
    assert done.returncode == 1, done.stderr
    assert "lab: The disk became full while the VM image was built" in done.stderr.splitlines()[-1]
    assert done.stdout.split() == ["lost+found", wheels()]
    loops = subprocess.run(["losetup", "--associated", tmp_path / "disk"], capture_output=True)
    assert not loops.stdout


def test_a_build_that_is_cut_off_leaves_no_image_and_no_process(tmp_path: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        pytest.skip("there is no mmdebstrap: provision/vm-packages.sh installs it")
    (tmp_path / wheels()).mkdir()
    builder = subprocess.Popen(
        [BUILD],
        env={**os.environ, "LAB_VM_CACHE": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    begun = str(Path("*.part", "root", "*"))
    wait_for(lambda: list(tmp_path.glob(begun)), "the build did not begin")
    # With their start times, for the number of a process that has ended is given again.
    others = {(pid, start_time(pid)) for pid in family(builder.pid) - {builder.pid}}
    builder.kill()
    builder.wait()
    wait_for(
        lambda: not any(start_time(pid) == began for pid, began in others if began),
        "the build went on",
    )
    assert [path.suffix for path in tmp_path.glob("[!w]*")] == [".part"]
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_what_a_guest_makes_in_a_share_is_plain_data_here(images: Path) -> None:
    """Its devices, links, owners and modes are words beside empty or short files of ours."""
    machine = vm.Machine("/run", str(images), 1, os.getpid(), "tcg")
    shares = [word for word in vm._command_line(machine) if "mount_tag" in word]
    assert len(shares) == 2
    assert all(",security_model=mapped-xattr," in one for one in shares)
