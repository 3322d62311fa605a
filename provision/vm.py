"""A VM with Debian's stock kernel, where the machine's own kernel lacks what an experiment needs.

``provision/vm-image.sh`` builds the image. Here it is booted by QEMU, under KVM where that works
and with an emulated CPU (TCG) where it does not, which is found out by trying. Every command boots
a VM of its own, from a snapshot that forgets all changes, and ends it. QEMU is killed by the
kernel when this process dies, however it dies; this process dies with the one that started it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from labkit.errors import BadInput, LabError, TimedOut, Unavailable
from labkit.kernel.leftovers import start_time
from labkit.kernel.parallel import die_with_parent

CHECKOUT = Path(__file__).resolve().parents[1]
STATE = CHECKOUT / ".lab" / "vm"
"""One folder per VM that was booted here, named after the process that holds it."""

RESULTS = STATE / "results"
"""What a VM writes to ``/results`` is here, and stays."""

BOOT_LIMIT_S = 240.0
"""Until the VM must have answered, seconds; 15 to 60 are usual when the CPU is emulated."""

TEST_LIMIT_S = 1100.0
"""For all that `test` runs in the VM, seconds."""

REPORT_LIMIT_S = 4 * 3600.0
"""For a report made in the VM, seconds."""

_FULL_KERNEL = frozenset({"fentry", "fexit", "kprobe", "lsm"})
_WATCHES_BY_ALL_HOOKS = frozenset({"coverage-matrix", "coverage-by-type"})
_LABKIT = "provision/enter.sh .venv/bin/python -m labkit"
_PYTEST = (
    "LABKIT_KERNEL_TESTS=1 provision/enter.sh .venv/bin/python -m pytest tests/kernel"
    " -m 'not outside_vm' -q -o timeout=600 --durations=10"
)
_HOLD = "provision/enter.sh .venv/bin/python provision/hold_tracepoints.py"
_TRIAL_LIMIT_S = 20.0
_SSH_FAILED = 255  # of ssh itself, as when the guest answers no more
_ALIVE_EVERY_S = 15  # ssh asks the guest; on two CPUs with four times their load it took up to 8 s
_ALIVE_MISSED = 8  # so many answers may be missing
_LAST_WORDS_S = 20.0
_NEED_BYTES = 2 << 30  # of what a VM writes while it runs
_GUEST_CHECKOUT = "/vagrant"  # where Vagrant has it, too
_NOT_SHARED = ("/.venv/", "/.lab/", "/runs/", "/reports/", "__pycache__/", ".*_cache/")
# With the AVX2 that QEMU 7.2 emulates, numpy.argsort comes out wrong. Where a CPU says that it is
# fast at `rep movsb` (ERMS, FSRM), the kernel copies by it, and QEMU moves byte by byte: a reader
# on another CPU sees words half written. Without, it copies word by word.
_EMULATED_CPU = "max,-avx2,-erms,-fsrm"
_COMMAND_LINE = (
    "root=/dev/vda rw console=ttyS0 quiet panic=-1 net.ifnames=0 "
    # An emulated CPU has nothing to guard against its guest; these cost it a third of its speed.
    "nokaslr mitigations=off init_on_alloc=0 apparmor=0 audit=0 "
    # Asked by an NMI, a kernel that answers nothing else writes where each of its CPUs is.
    "unknown_nmi_panic panic_print=0x40"
)

# Two emulated CPUs read one TSC, of the host's. A kernel that is not told takes the HPET for its
# clock: each reading stops at one lock of QEMU's, which all its devices need, and takes four times
# as long.
_EMULATED_CLOCK = " tsc=reliable"


class GuestLost(LabError):
    """A VM that had answered does so no more. No test has failed by that, and none has passed."""


@dataclass(frozen=True)
class Machine:
    """A VM that answers.

    Parameters
    ----------
    folder : str
        Its files on the host while it runs: log of the serial line, key, port.
    image : str
        Folder of the image that it was booted from.
    port : int
        Of 127.0.0.1, where its ssh server is reached.
    pid : int
        Of the process that holds it.
    accelerator : str
        ``kvm`` or ``tcg``.
    """

    folder: str
    image: str
    port: int
    pid: int
    accelerator: str

    def ssh(self, command: str, *, terminal: bool = False) -> list[str]:
        """Command line that runs a command, or with "" a shell, as root in the checkout."""
        line = [*self._client(), "-tt" if terminal else "-T", "root@127.0.0.1"]
        return [*line, f"cd {_GUEST_CHECKOUT} && {command or 'exec bash -l'}"]

    def _client(self) -> list[str]:
        options = {
            "IdentityFile": f"{self.folder}/key",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": f"{self.folder}/known_hosts",
            "HostKeyAlias": "lab",
            "StrictHostKeyChecking": "yes",
            "LogLevel": "ERROR",
            "ConnectTimeout": "60",
            "ServerAliveInterval": str(_ALIVE_EVERY_S),
            "ServerAliveCountMax": str(_ALIVE_MISSED),
        }
        line = ["ssh", "-F", "none", "-p", str(self.port)]
        line += [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return line

    def bring_checkout(self) -> None:
        """Make the VM's checkout what this one is now; what the VM made in it stays.

        Raises
        ------
        LabError
            It could not be copied.
        """
        excluded = [f"--exclude={name}" for name in _NOT_SHARED]
        copied = subprocess.run(
            [
                *("rsync", "--archive", "--no-owner", "--no-group", "--delete", *excluded),
                *("--timeout=120", f"--rsh={shlex.join(self._client())}"),
                *(f"{CHECKOUT}/", f"root@127.0.0.1:{_GUEST_CHECKOUT}/"),
            ],
            check=False,
        )
        if copied.returncode != 0:
            raise LabError("The checkout could not be copied into the VM: see above.")

    def run(self, command: str, *, timeout_s: float | None = None, terminal: bool = False) -> int:
        """Run a shell command in the VM's checkout as root; what it prints is printed here.

        Parameters
        ----------
        command : str
            In the shell's syntax; "" is a shell.
        timeout_s : float, optional
            Seconds until it is given up; by default it may take for ever.
        terminal : bool
            Whether it gets a terminal.

        Returns
        -------
        int
            Its exit status.

        Raises
        ------
        TimedOut
            It took longer than ``timeout_s`` seconds.
        GuestLost
            ssh ended without the command's exit status.
        """
        try:
            status = subprocess.run(
                self.ssh(command, terminal=terminal), timeout=timeout_s, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            raise TimedOut(
                f"In the VM, {command!r} did not end within {timeout_s:g} s; it was stopped."
            ) from None
        if status == _SSH_FAILED:
            raise GuestLost(
                "The VM does not answer any more: ssh lost it, which waits "
                f"{_ALIVE_EVERY_S * _ALIVE_MISSED} s for a sign of life."
            )
        return status


@contextlib.contextmanager
def booted(say: Callable[[str], None], *, limit_s: float = BOOT_LIMIT_S) -> Iterator[Machine]:
    """Boot a VM that lives as long as the block.

    Parameters
    ----------
    say : callable
        Gets a sentence per step.
    limit_s : float
        Until it must have answered, seconds.

    Yields
    ------
    Machine
        With this checkout, as it stood at the boot, in ``/vagrant``.

    Raises
    ------
    Unavailable
        No image, no QEMU, or no room on the disk.
    LabError
        It did not boot; the end of its serial line's log was said.
    GuestLost
        From the block, when it was raised there; the guest's last words were said.
    """
    image = _image()
    accelerator = _accelerator(image, say)
    remove_dead()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(STATE).free < _NEED_BYTES:
        raise Unavailable(
            f"A running VM may write {_NEED_BYTES >> 30} GiB to this disk, and less is free: free "
            "some space."
        )
    folder = STATE / f"run-{os.getpid()}"
    folder.mkdir()
    try:
        _make_key(folder, image)
        port = free_port()
        machine = Machine(str(folder), str(image), port, os.getpid(), accelerator)
        start = time.monotonic()
        with _qemu(_command_line(machine), folder) as qemu:
            _await_ready(qemu, folder, start + limit_s, limit_s, say)
            machine.bring_checkout()
            say(f"the VM answers after {time.monotonic() - start:.0f} s ({_spoken(accelerator)})")
            (folder / "machine.json").write_text(json.dumps(asdict(machine)))
            try:
                yield machine
            except GuestLost:
                _say_last_words(qemu, folder, say)
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def running() -> Machine | None:
    """VM of this checkout that was booted last and still runs, or None."""
    found = sorted(STATE.glob("run-*/machine.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(found):
        machine = Machine(**json.loads(path.read_text()))
        if start_time(machine.pid) is not None:
            return machine
    return None


def _image() -> Path:
    built = subprocess.run(
        [CHECKOUT / "provision" / "vm-image.sh"], stdout=subprocess.PIPE, text=True, check=False
    )
    if built.returncode != 0:
        raise Unavailable("There is no VM image, and building it failed: see above.")
    return Path(built.stdout.splitlines()[-1])


def _spoken(accelerator: str) -> str:
    return "KVM" if accelerator == "kvm" else "emulated CPU"


def _settings() -> tuple[int, int]:
    """CPUs, and memory in MiB."""
    values = []
    for name, usual, least in (("LAB_VM_CPUS", 2, 1), ("LAB_VM_MEMORY", 4096, 1024)):
        text = os.environ.get(name, str(usual))
        if not text.isdecimal() or int(text) < least:
            raise BadInput(f"{name} is a whole number, at least {least}, not {text!r}.")
        values.append(int(text))
    return values[0], values[1]


def _accelerator(image: Path, say: Callable[[str], None]) -> str:
    """Find out whether KVM runs this kernel, by trying."""
    wanted = os.environ.get("LAB_VM_ACCEL", "")
    if wanted not in ("", "kvm", "tcg"):
        raise BadInput(f"LAB_VM_ACCEL is kvm or tcg, or unset to try, not {wanted!r}.")
    if wanted == "tcg":
        return "tcg"
    why_not = _why_no_kvm(image)
    if not why_not:
        return "kvm"
    if wanted == "kvm":
        raise Unavailable(f"KVM is asked for (LAB_VM_ACCEL), and {why_not}.")
    say(f"the VM's CPU will be emulated, some ten times slower: {why_not}")
    return "tcg"


def _why_no_kvm(image: Path) -> str:
    if not os.path.exists("/dev/kvm"):
        return "there is no /dev/kvm"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm may not be opened (join its group, or run as root)"
    if os.path.exists("/sys/module/kvm_pvm"):
        return "this machine's KVM (pvm) runs no stock kernel"
    # Boots until the kernel finds no first program, and panics, which ends QEMU.
    try:
        trial = subprocess.run(
            [
                *("qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-M", "q35"),
                *("-m", "512", "-nodefaults", "-display", "none", "-no-reboot"),
                *("-serial", "stdio", "-kernel", str(image / "vmlinux")),
                *("-append", "console=ttyS0 panic=-1 rdinit=/none root=none"),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TRIAL_LIMIT_S,
            preexec_fn=die_with_parent,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"a kernel under KVM was not up after {_TRIAL_LIMIT_S:g} s"
    except FileNotFoundError:
        raise Unavailable("There is no qemu-system-x86_64: run provision/vm-packages.sh.") from None
    if b"Kernel panic - not syncing: VFS" in trial.stdout:
        return ""
    return "/dev/kvm opens, but a kernel does not get up under it"


def _command_line(machine: Machine) -> list[str]:
    cpus, memory = _settings()
    image, folder = Path(machine.image), Path(machine.folder)
    kvm = machine.accelerator == "kvm"
    return [
        "qemu-system-x86_64",
        *("-accel", "kvm" if kvm else "tcg,thread=multi", "-cpu", "host" if kvm else _EMULATED_CPU),
        *("-M", "q35", "-smp", str(cpus), "-m", str(memory)),
        *("-nodefaults", "-display", "none", "-no-reboot", "-serial", f"file:{folder}/serial.log"),
        *("-monitor", "stdio"),
        *("-kernel", str(image / "vmlinux"), "-initrd", str(image / "initrd")),
        *("-append", _COMMAND_LINE + ("" if kvm else _EMULATED_CLOCK)),
        # A full disk is an error in the guest, not a guest that stands still.
        *("-drive", f"file={image}/disk.raw,format=raw,if=virtio,snapshot=on,cache=unsafe,"
          "werror=report,rerror=report"),
        *("-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{machine.port}-:22"),
        *("-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"),
        *_share("run", folder),
        *_share("results", RESULTS),
    ]  # fmt: skip


def _share(tag: str, path: Path) -> list[str]:
    quoted = str(path).replace(",", ",,")
    return [
        "-virtfs",
        f"local,path={quoted},mount_tag={tag},security_model=mapped-xattr,multidevs=remap",
    ]


@contextlib.contextmanager
def _qemu(line: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with open(folder / "qemu.log", "wb") as log, open(folder / "monitor.log", "wb") as monitor:
        try:
            qemu = subprocess.Popen(
                line,
                stdin=subprocess.PIPE,
                stdout=monitor,
                stderr=log,
                # Its copy of the disk is a file without a name in here: nothing stays of it.
                env={**os.environ, "TMPDIR": str(folder)},
                process_group=0,  # Ctrl-C is for what runs in the VM
                preexec_fn=die_with_parent,
            )
        except FileNotFoundError:
            raise Unavailable(
                "There is no qemu-system-x86_64: run provision/vm-packages.sh."
            ) from None
    try:
        yield qemu
    finally:
        qemu.kill()
        qemu.communicate()  # closes its stdin, and waits


def _await_ready(
    qemu: subprocess.Popen[bytes],
    folder: Path,
    deadline: float,
    limit_s: float,
    say: Callable[[str], None],
) -> None:
    """Wait until the guest has written that it is ready."""
    while not (folder / "ready").exists():
        if qemu.poll() is not None:
            _show(folder, say)
            raise LabError(f"QEMU ended with status {qemu.returncode} before the VM was up.")
        if time.monotonic() > deadline:
            _show(folder, say)
            raise TimedOut(f"The VM did not answer within {limit_s:g} s; it was stopped.")
        time.sleep(0.1)


def _say_last_words(
    qemu: subprocess.Popen[bytes], folder: Path, say: Callable[[str], None]
) -> None:
    """Where QEMU sees each CPU, then the kernel's own stacks; the guest ends by that."""
    assert qemu.stdin is not None
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        qemu.stdin.write(b"info registers -a\nnmi\n")
        qemu.stdin.flush()
        qemu.wait(_LAST_WORDS_S)
    for line in (folder / "monitor.log").read_text(errors="replace").splitlines():
        if line.startswith(("CPU#", "RIP=", "EIP=")):
            say(f"QEMU: {line.rstrip()}")
    _show(folder, say, lines=150)


def _show(folder: Path, say: Callable[[str], None], *, lines: int = 30) -> None:
    for name in ("serial.log", "qemu.log"):
        with contextlib.suppress(OSError):
            for line in (folder / name).read_text(errors="replace").splitlines()[-lines:]:
                say(f"{name}: {line.rstrip()}")


def _make_key(folder: Path, image: Path) -> None:
    try:
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(folder / "key")],
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        raise Unavailable(
            "No ssh key can be made: run provision/vm-packages.sh, and see that the disk is not "
            "full."
        ) from None
    (folder / "known_hosts").write_text("lab " + (image / "host_key").read_text())


def free_port() -> int:
    """A port of 127.0.0.1 that the kernel says is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def remove_dead() -> None:
    """Remove the folders of VMs of this checkout whose holder was killed."""
    for folder in STATE.glob("run-*"):
        if start_time(int(folder.name.removeprefix("run-"))) is None:
            shutil.rmtree(folder, ignore_errors=True)


def _say(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr, flush=True)


def _boot(arguments: argparse.Namespace) -> int:
    with booted(_say) as machine:
        _say("python -m provision.vm ssh COMMAND runs a command in it; Ctrl-C here ends it")
        print(f"ready {machine.folder}", flush=True)
        while True:
            signal.pause()


def _accelerator_only(arguments: argparse.Namespace) -> int:
    print(_accelerator(_image(), _say))
    return 0


def _test(arguments: argparse.Namespace) -> int:
    """Run the tests and the experiments that are for the full kernel; the worst exit status.

    Where the VM is lost in the middle, all of it is run once more, in a new one. A test that fails
    is never repeated.

    Raises
    ------
    TimedOut
        They took longer than `TEST_LIMIT_S` seconds.
    GuestLost
        The second VM was lost, too.
    """
    try:
        return _test_once()
    except GuestLost as lost:
        _say(f"{lost} A VM was LOST (see above); all is run once more, in a second and last one")
        status = _test_once()
        _say("this was the second VM: the first one was LOST")
        return status


def _test_once() -> int:
    """Both at once, since either keeps one CPU busy."""
    measured = f"{_LABKIT} run {' '.join(_for_full_kernel())} --folder /results/runs"
    (RESULTS / "experiments.txt").unlink(missing_ok=True)
    # At the end the VM goes first, and what still runs in it ends with it.
    with ThreadPoolExecutor() as beside, booted(_say) as machine:
        start = time.monotonic()
        if machine.run(_HOLD, timeout_s=BOOT_LIMIT_S) != 0:
            raise LabError(
                "In the VM, the tracepoints of system calls could not be held: see above."
            )
        experiments = beside.submit(
            machine.run, f"{measured} >/results/experiments.txt 2>&1", timeout_s=TEST_LIMIT_S
        )
        try:
            tests = machine.run(f"{_PYTEST} --junit-xml=/results/junit.xml", timeout_s=TEST_LIMIT_S)
            statuses = {"kernel tests": tests, "experiments": experiments.result()}
        finally:
            with contextlib.suppress(OSError):
                print((RESULTS / "experiments.txt").read_text(), flush=True)
    for name, status in statuses.items():
        _say(f"{name}: {'passed' if status == 0 else f'exit status {status}'}")
    _say(f"{time.monotonic() - start:.0f} s; results are in {RESULTS.relative_to(CHECKOUT)}")
    return max(statuses.values())


def _for_full_kernel() -> list[str]:
    """Ids of the experiments that need a hook of the full kernel, or watch by all there are."""
    from labkit.lab.catalogue import catalogue

    return [
        experiment.id
        for experiment in catalogue().values()
        if experiment.id in _WATCHES_BY_ALL_HOOKS or not _FULL_KERNEL.isdisjoint(experiment.needs)
    ]


def _report(arguments: argparse.Namespace) -> int:
    with booted(_say) as machine:
        status = machine.run(
            f"{_LABKIT} report --profile {arguments.profile} --to /results/report",
            timeout_s=REPORT_LIMIT_S,
        )
    _say(f"the report is {RESULTS.relative_to(CHECKOUT)}/report/index.html")
    return status


def _clean(arguments: argparse.Namespace) -> int:
    remove_dead()
    if machine := running():
        raise BadInput(f"A VM of this checkout runs (process {machine.pid}): end it first.")
    for folder in (STATE / "images", RESULTS):
        if folder.exists():
            shutil.rmtree(folder)
            _say(f"removed {folder.relative_to(CHECKOUT)}")
    return 0


def _bring(arguments: argparse.Namespace) -> int:
    machine = running()
    if machine is None:
        raise Unavailable("No VM of this checkout runs: make vm-boot starts one.")
    machine.bring_checkout()
    return 0


def _ssh(arguments: argparse.Namespace) -> int:
    words: list[str] = arguments.words
    # One word is a shell command, as with ssh; several are one command and its arguments.
    command = words[0] if len(words) == 1 else shlex.join(words)
    terminal = not words and sys.stdin.isatty()
    with contextlib.ExitStack() as stack:
        machine = running() or stack.enter_context(booted(_say))
        return machine.run(command, terminal=terminal)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m provision.vm", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    boot = commands.add_parser("boot", help="boot a VM, and keep it until Ctrl-C")
    boot.set_defaults(command=_boot)
    bring = commands.add_parser("bring", help="bring this checkout, as it is now, into that VM")
    bring.set_defaults(command=_bring)
    ssh = commands.add_parser(
        "ssh", help="a shell, or a command, in the VM that runs; boots one where none does"
    )
    ssh.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    ssh.set_defaults(command=_ssh)
    for name, command, help in (
        ("test", _test, "the kernel's tests, and the experiments for a full kernel, in a new VM"),
        ("report", _report, "the report, in a new VM"),
        ("clean", _clean, "remove images and results"),
        ("accelerator", _accelerator_only, "kvm or tcg: which works here, by trying"),
    ):
        one = commands.add_parser(name, help=help)
        one.set_defaults(command=command)
        if name == "report":
            one.add_argument("--profile", default="quick", choices=("quick", "full"))
    arguments = parser.parse_args(words)
    die_with_parent()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return int(arguments.command(arguments))
    except LabError as error:
        _say(str(error))
        return error.status
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
