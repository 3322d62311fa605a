"""A guarded socket, a network of our own, and a plain libbpf object: they work, and go away."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from labkit.errors import BadInput, LabError
from labkit.kernel import elf, libbpf, network, programs
from labkit.kernel.compiler import LoadFailed
from labkit.kernel.libbpf import ProgramKind
from labkit.kernel.maps import NotPermitted
from labkit.kernel.parallel import Child
from labkit.kernel.sockets import GuardedSocket

pytestmark = pytest.mark.usefixtures("kernel")

DENY = (2).to_bytes(4, "little")


def test_a_guarded_socket_lets_in_what_the_program_lets_in() -> None:
    with programs.load("socket_policy") as unit, GuardedSocket() as traffic:
        assert traffic.send(3) == 3
        guard = unit.program("guard", ProgramKind.SOCKET_FILTER)
        traffic.attach(guard)
        assert traffic.send(3) == 0
        unit.map("policy").update(0, 1)
        assert traffic.send(3) == 3
        with pytest.raises(BadInput, match="socket filter"):
            traffic.attach(programs.Program("guard", ProgramKind.TC, guard.fd))


def test_an_own_network_carries_frames_and_ends_with_its_process(
    require_feature: Callable[[str], None],
) -> None:
    require_feature("netns_veth")

    def pass_one_frame() -> tuple[bytes, str]:
        network.enter_own_network()
        near, far = network.ENDS
        with (
            network.packet_socket(near) as sender,
            network.packet_socket(far, network.LAB_PROTOCOL) as receiver,
        ):
            receiver.settimeout(10)
            sender.send(network.frame(b"payload"))
            return receiver.recv(2048), os.readlink("/proc/self/ns/net")

    with Child(pass_one_frame) as child:
        received, namespace = child.result(30)
    assert received == network.frame(b"payload") and len(received) == 64
    assert namespace != os.readlink("/proc/self/ns/net")
    assert not set(network.ENDS) & {name for _, name in socket.if_nameindex()}


@pytest.fixture
def compiled(require_feature: Callable[[str], None]) -> bytes:
    require_feature("clang")
    return elf.compile("rodata_folded")


def test_a_plain_object_runs_and_its_read_only_data_are_frozen(compiled: bytes) -> None:
    with elf.load("rodata_folded", compiled) as loaded:
        assert loaded.program("obey_constant").test_run().value == 0
        with pytest.raises(NotPermitted):
            loaded.map(".rodata", value="u4").update(0, 2)
        loaded.map(".data", value="u4").update(0, 2)
        assert loaded.program("obey_variable").test_run().value == 0x5EED
        instructions = libbpf.prog_instructions(loaded.program("obey_map").fd)
        assert instructions["code"][-1] == 0x95  # exit
        for wrong in (loaded.map, loaded.program):
            with pytest.raises(BadInput, match="no_such_one"):
                wrong("no_such_one")


def test_read_only_data_can_be_set_before_the_load(compiled: bytes) -> None:
    with elf.load("rodata_folded", compiled, {".rodata": DENY}) as loaded:
        assert loaded.program("obey_constant").test_run().value == 0x5EED


@pytest.mark.parametrize("initial", [{".rodata": b"\2"}, {".nothing": DENY}])
def test_a_section_that_does_not_fit_is_refused(compiled: bytes, initial: dict[str, bytes]) -> None:
    with pytest.raises(LoadFailed, match="bytes to set"):
        elf.load("rodata_folded", compiled, initial)


def test_what_is_no_program_is_refused_in_a_sentence(
    require_feature: Callable[[str], None],
) -> None:
    require_feature("clang")
    with pytest.raises(BadInput, match="no_such_program"):
        elf.compile("no_such_program")
    with pytest.raises(LabError, match="does not compile"):
        elf.compile("self_test")  # in bcc's dialect
    with pytest.raises(LoadFailed, match="cannot read"):
        elf.load("self_test", b"no object file")
