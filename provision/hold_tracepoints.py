"""Keeps two programs on the tracepoints of system calls, as long as the VM lives.

The first program on a tracepoint, and the second, change the kernel's code in a place that every
system call passes. While it is changed a breakpoint stands there, and an emulated CPU may go on
with it for ever: QEMU translates it at the moment at which another CPU overwrites it. Both CPUs
then stand in ``asm_exc_int3``, entered from ``syscall_trace_enter``, and the VM is lost. Where two
programs stand already, nobody's attaching changes any code.
"""

from __future__ import annotations

import os
import signal

from labkit.kernel import libbpf
from labkit.kernel.libbpf import ProgramKind

RETURN_0 = bytes.fromhex("b700000000000000 9500000000000000")


def main() -> None:
    """Attach, and go on in the background."""
    for name in (b"sys_enter", b"sys_exit"):
        for _ in range(2):  # one program cannot stand there twice
            program = libbpf.prog_load(ProgramKind.RAW_TRACEPOINT, RETURN_0, name="hold")
            held = libbpf.api().bpf_raw_tracepoint_open(name, program)
            libbpf.checked(held, f"holding {name.decode()}")
    if os.fork():
        return
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # ssh waits for whoever has them
        os.dup2(nothing, standard)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
