"""Where programs run, on the kernel that runs here: planted, found, and ended by the command told.

Each test that needs devices makes them in a network namespace of its own, which goes with the
process that has it.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from labkit.inspect.diagnose import diagnose
from labkit.kernel import attachments, libbpf, tools
from labkit.kernel.attachments import Attachment, Standing, Survey
from labkit.kernel.libbpf import AttachType, MapKind, ProgramKind
from labkit.kernel.objects import snapshot
from labkit.kernel.pins import PinFolder

RETURN_ZERO = bytes([0xB7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0])
RETURN_ONE = bytes([0xB7, 0, 0, 0, 1, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0])
LIMIT_S = 30


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def pins(closing: ExitStack) -> PinFolder:
    return closing.enter_context(PinFolder())


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, f"{command}: {done.stderr}"


class Network:
    """A process in a network namespace of its own, with the pair near and far."""

    def __init__(self, closing: ExitStack) -> None:
        if not shutil.which("ip") or not shutil.which("tc"):
            pytest.skip("iproute2 is not installed")
        words = [
            "unshare", "--net", sys.executable, "-c", "print('up', flush=True); input()",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        closing.callback(self._end)
        assert self._process.stdout and self._process.stdout.readline() == "up\n"
        self.path = f"/proc/{self._process.pid}/ns/net"
        self.do("ip link add near type veth peer name far")
        self.do("ip link set near up")

    def do(self, words: str) -> None:
        run("nsenter", f"--net={self.path}", *words.split())

    def near_in_ours(self) -> tuple[str, int]:
        """Name and index of a device of our own namespace that goes when this one does."""
        name = f"labkit{os.getpid()}"
        peer = ("peer", "name", "far2", "netns", str(self._process.pid))
        run("ip", "link", "add", name, "type", "veth", *peer)
        return name, int(Path(f"/sys/class/net/{name}/ifindex").read_text())

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def network(closing: ExitStack) -> Network:
    return Network(closing)


def loaded(
    closing: ExitStack, kind: ProgramKind, code: bytes = RETURN_ZERO, **more: object
) -> tuple[int, int]:
    """Descriptor and id of a program."""
    fd = libbpf.prog_load(kind, code, name="labkit_at", **more)  # type: ignore[arg-type]
    closing.callback(libbpf.close, fd)
    return fd, libbpf.prog_info(fd).id


def seen() -> Survey:
    return attachments.survey(snapshot())


def only(program_id: int) -> Attachment:
    found = seen()
    assert found.standing(program_id) is Standing.ATTACHED, found.unseen
    (one,) = found.of(program_id)
    return one


def ended_by(one: Attachment) -> None:
    """Run the command that was told, as it stands; then the program runs nowhere."""
    run("sh", "-c", one.detach)
    assert seen().standing(one.program_id) is Standing.NOWHERE


def test_a_tc_filter_in_another_namespace(
    closing: ExitStack, pins: PinFolder, network: Network
) -> None:
    fd, program_id = loaded(closing, ProgramKind.TC)
    assert seen().standing(program_id) is Standing.NOWHERE
    libbpf.pin(fd, pins.path("tc"))
    network.do("tc qdisc add dev near clsact")
    network.do(
        "tc filter add dev near egress chain 3 protocol ip pref 7 handle 9 bpf direct-action "
        f"pinned {pins.path('tc')}"
    )
    one = only(program_id)
    assert (one.hook, one.target) == ("tc egress", "dev near")
    assert (one.priority, one.handle, one.chain) == (7, 9, 3)
    assert network.path in one.namespace and "direct-action" in one.more
    assert "protocol ip" in str(one) and one.decides
    ended_by(one)


NAMED = """
import os, subprocess, sys
from labkit.kernel import attachments, libbpf
from labkit.kernel.objects import snapshot
from labkit.kernel.pins import PinFolder
fd = libbpf.prog_load(
    libbpf.ProgramKind.XDP, bytes.fromhex(sys.argv[1]), name="labkit_at",
    attach_type=libbpf.AttachType.XDP,
)
with PinFolder() as pins:
    libbpf.pin(fd, pins.path("xdp"))
    subprocess.run(["ip", "netns", "add", "its name"], check=True)
    subprocess.run(
        ["ip", "-n", "its name", "link", "set", "dev", "lo", "xdpgeneric", "pinned",
         pins.path("xdp")], check=True,
    )
    program = libbpf.prog_info(fd).id
    (one,) = attachments.survey(snapshot()).of(program)
    print(one, one.detach, sep="\\n", flush=True)
    subprocess.run(one.detach, shell=True, check=True)
    print(attachments.survey(snapshot()).standing(program).value)
"""


def test_an_action_of_a_filter_of_another_kind(
    closing: ExitStack, pins: PinFolder, network: Network
) -> None:
    fd, program_id = loaded(closing, ProgramKind.TC_ACTION)
    libbpf.pin(fd, pins.path("act"))
    network.do("tc qdisc add dev near clsact")
    words = f"tc filter add dev near ingress matchall action bpf object-pinned {pins.path('act')}"
    done = subprocess.run(
        ["nsenter", f"--net={network.path}", *words.split()], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"this kernel lacks act_bpf: {done.stderr.strip()[:80]}")
    one = only(program_id)
    assert one.hook == "tc action" and one.more == "of 1 filters"


def test_a_named_namespace_is_entered_by_its_name() -> None:
    """In a mount namespace of its own, so that the name goes with the process."""
    if not shutil.which("ip"):
        pytest.skip("iproute2 is not installed")
    inside = 'mount -t tmpfs tmpfs /run && exec "$0" -c "$1" "$2"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", inside, sys.executable, NAMED, RETURN_ONE.hex()],
        capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "xdp generic of dev lo in netns its name, the device is down",
        "ip netns exec 'its name' ip link set dev lo xdpgeneric off",
        "nowhere",
    ], done.stderr


def test_xdp_of_a_driver_and_a_link_whose_device_goes(
    closing: ExitStack, pins: PinFolder, network: Network
) -> None:
    fd, program_id = loaded(closing, ProgramKind.XDP, RETURN_ONE, attach_type=AttachType.XDP)
    libbpf.pin(fd, pins.path("xdp"))
    network.do(f"ip link set dev far xdpdrv pinned {pins.path('xdp')}")
    assert (only(program_id).hook, only(program_id).idle) == ("xdp native", "the device is down")
    network.do("ip link set dev far up")
    assert not only(program_id).idle
    network.do("ip link set dev far xdpdrv off")

    name, index = network.near_in_ours()
    link = libbpf.checked(
        libbpf.api().bpf_link_create(fd, index, int(AttachType.XDP), None), "attaching"
    )
    closing.callback(libbpf.close, link)
    one = only(program_id)
    assert one.target == f"dev {name}" and one.link_id and one.namespace == ""
    assert one.detach == f"bpftool link detach id {one.link_id}"
    run("ip", "link", "del", name)
    found = seen()
    assert found.standing(program_id) is Standing.NOWHERE
    assert [lost.id for lost in found.detached if lost.program_id == program_id] == [one.link_id]


def test_a_cgroup_with_and_without_a_link(closing: ExitStack) -> None:
    tree = attachments._cgroup_tree()
    if tree is None:
        pytest.skip("this kernel lacks a mounted cgroup2 file system")
    group = Path(tree[0]) / f"labkit-{os.getpid()}"
    group.mkdir()
    closing.callback(group.rmdir)
    where = os.open(group, os.O_RDONLY)
    closing.callback(os.close, where)
    fd, program_id = loaded(closing, ProgramKind.CGROUP_SKB, RETURN_ONE)
    assert seen().standing(program_id) is Standing.NOWHERE
    libbpf.checked(libbpf.api().bpf_prog_attach(fd, where, 1, 2), "attaching")
    one = only(program_id)
    assert (one.hook, one.target, one.link_id) == ("cgroup egress", str(group), None)
    assert one.idle == "no process is in that cgroup"
    assert one.detach == f"bpftool cgroup detach {group} egress id {program_id}"
    libbpf.checked(libbpf.api().bpf_prog_detach2(fd, where, 1), "detaching")

    link = libbpf.checked(libbpf.api().bpf_link_create(fd, where, 0, None), "attaching")
    try:
        one = only(program_id)
        assert (one.hook, one.target) == ("cgroup ingress", str(group)) and one.link_id
    finally:
        libbpf.close(link)


def test_a_tail_call_is_a_way_as_long_as_its_caller_runs(closing: ExitStack) -> None:
    table = libbpf.map_create(
        MapKind.PROG_ARRAY, name="labkit_calls", key_size=4, value_size=4, max_entries=2
    )
    number = libbpf.map_info(table).id
    # BPF_LD_MAP_FD into r1 makes the program refer to the map.
    refers = b"\x18\x11\0\0" + table.to_bytes(4, "little") + bytes(8)
    caller, caller_id = loaded(closing, ProgramKind.RAW_TRACEPOINT, refers + RETURN_ZERO)
    called, called_id = loaded(closing, ProgramKind.RAW_TRACEPOINT)
    key, value = ctypes.c_uint32(0), ctypes.c_uint32(called)
    libbpf.checked(
        libbpf.api().bpf_map_update_elem(table, ctypes.byref(key), ctypes.byref(value), 0),
        "putting",
    )
    assert seen().standing(called_id) is Standing.NOWHERE
    link = libbpf.checked(libbpf.api().bpf_raw_tracepoint_open(b"sys_enter", caller), "attaching")
    closing.callback(libbpf.close, link)
    one = only(called_id)
    assert (one.hook, one.target) == (f"tail call by map {number}", f"program {caller_id}")
    # Taken out first: a look at the map between its close and its clearing would keep it.
    libbpf.checked(libbpf.api().bpf_map_delete_elem(table, ctypes.byref(key)), "taking out")
    libbpf.close(table)


def test_a_tracing_link_tells_its_hook_by_name(closing: ExitStack) -> None:
    for hook, attach_type, shown in (
        ("sched_switch", AttachType.TRACE_RAW_TP, "raw_tracepoint of sched_switch"),
        ("task", AttachType.TRACE_ITER, "iter of task"),
    ):
        fd, program_id = loaded(
            closing,
            ProgramKind.TRACING,
            attach_type=attach_type,
            attach_btf_id=libbpf.vmlinux_function_id(hook, attach_type),
        )
        link = libbpf.api().bpf_link_create(fd, 0, int(attach_type), None)
        closing.callback(libbpf.close, libbpf.checked(link, "linking"))
        assert str(only(program_id)).startswith(shown)


def test_what_a_socket_or_a_reader_runs_is_never_called_nowhere(closing: ExitStack) -> None:
    tasks = libbpf.vmlinux_function_id("task", AttachType.TRACE_ITER)
    iterator = loaded(
        closing, ProgramKind.TRACING, attach_type=AttachType.TRACE_ITER, attach_btf_id=tasks
    )
    hidden = [loaded(closing, ProgramKind.SOCKET_FILTER)[1], iterator[1]]
    found = seen()
    for program_id in hidden:
        assert found.standing(program_id) is Standing.HIDDEN and found.blind(program_id)


def referring(closing: ExitStack, name: str) -> tuple[int, int, int]:
    """A map and a tc program that refers to it: ids of both, and the program's descriptor."""
    table = libbpf.map_create(MapKind.HASH, name=name, key_size=4, value_size=4, max_entries=8)
    closing.callback(libbpf.close, table)
    refers = b"\x18\x11\0\0" + table.to_bytes(4, "little") + bytes(8)
    fd, program_id = loaded(closing, ProgramKind.TC, refers + RETURN_ZERO)
    return libbpf.map_info(table).id, program_id, fd


def test_two_filters_of_two_loads_and_what_is_left_when_the_new_one_goes(
    closing: ExitStack, pins: PinFolder, network: Network
) -> None:
    network.do("tc qdisc add dev near clsact")
    with ExitStack() as old:
        old_map, old_program, fd = referring(old, "labkit_twice")
        libbpf.pin(fd, pins.path("old"))
        network.do(f"tc filter add dev near ingress pref 1 bpf da pinned {pins.path('old')}")
        pins.unpin("old")
    new_map, new_program, fd = referring(closing, "labkit_twice")
    libbpf.pin(fd, pins.path("new"))
    network.do(f"tc filter add dev near ingress pref 2 bpf da pinned {pins.path('new')}")
    for asked, other in ((new_map, old_map), (old_map, new_map)):
        (found,) = diagnose(str(asked))
        (cause,) = (one for one in found.diagnostics if one.weight == "cause")
        assert f"map {other} is called labkit_twice too" in cause.says
        assert "tc ingress of dev near" in cause.says and "pref 1" in cause.says
        assert "pref 1 handle 0x1 bpf" in cause.do and "pref 2" not in cause.do
    network.do("tc filter del dev near ingress pref 2")
    (found,) = diagnose(str(new_map))
    causes = [one.says for one in found.diagnostics if one.weight == "cause"]
    assert len(causes) == 2
    assert f"program {old_program} labkit_at uses it" in causes[0]
    assert f"Program {new_program} labkit_at (tc) is loaded and attached nowhere" in causes[1]
    (found,) = diagnose(str(old_map))
    assert not found.has_cause


def test_filters_of_two_devices_are_two_instances(
    closing: ExitStack, pins: PinFolder, network: Network
) -> None:
    asked = []
    for device in ("near", "far"):
        map_id, _, fd = referring(closing, "labkit_each")
        asked.append(map_id)
        libbpf.pin(fd, pins.path(device))
        network.do(f"tc qdisc add dev {device} clsact")
        network.do(f"tc filter add dev {device} ingress bpf da pinned {pins.path(device)}")
    for map_id in asked:
        (found,) = diagnose(str(map_id))
        assert not found.has_cause and "attached nowhere" not in str(found)
        assert "map {} is called".format(*{*asked} - {map_id}) in str(found)


def test_a_program_without_a_qdisc(closing: ExitStack, network: Network) -> None:
    name, index = network.near_in_ours()
    fd, program_id = loaded(closing, ProgramKind.TC)
    link = libbpf.api().bpf_link_create(fd, index, 46, None)
    if link < 0:
        pytest.skip(f"this kernel lacks tcx: {libbpf.error_name(-link)}")
    closing.callback(libbpf.close, link)
    one = only(program_id)
    assert (one.hook, one.target) == ("tcx ingress", f"dev {name}") and one.link_id
    assert one.point == ("tc ingress", f"dev {name}", "")


def test_this_process_stays_in_its_namespace(closing: ExitStack, network: Network) -> None:
    loaded(closing, ProgramKind.TC)  # otherwise there is no reason to look into any
    before = os.readlink("/proc/self/ns/net"), os.readlink("/proc/thread-self/ns/net")
    now = snapshot()
    attachments.survey(now)
    assert (os.readlink("/proc/self/ns/net"), os.readlink("/proc/thread-self/ns/net")) == before
    assert network.path in now.network_namespaces.values()
    assert next(iter(now.network_namespaces)) == os.stat("/proc/self/ns/net").st_ino


def test_bpftool_knows_no_attachment_that_was_missed(closing: ExitStack, network: Network) -> None:
    """Every program that bpftool's list of the network names is attached here too."""
    tool = shutil.which("bpftool") or tools.find_tool("bpftool")
    if not tool:
        pytest.skip("bpftool is not installed")

    def named() -> set[int]:
        done = subprocess.run([tool, "-j", "net", "show"], capture_output=True, text=True)
        (told,) = json.loads(done.stdout)
        return {one["id"] for some in told.values() for one in some if "id" in one}

    _, index = network.near_in_ours()
    fd, program_id = loaded(closing, ProgramKind.XDP, RETURN_ONE, attach_type=AttachType.XDP)
    link = libbpf.api().bpf_link_create(fd, index, int(AttachType.XDP), None)
    closing.callback(libbpf.close, libbpf.checked(link, "attaching"))
    before = named()
    found = seen()
    stayed = before & named()
    assert program_id in stayed
    assert [one for one in stayed if not found.of(one)] == []
