"""Unpack a kernel: ``vm-kernel.py VMLINUZ VMLINUX``. QEMU boots the result without a boot loader.

A vmlinuz is a small program and the compressed ELF file; the header tells where it lies (Linux,
Documentation/arch/x86/boot.rst, fields ``setup_sects``, ``payload_offset``, ``payload_length``).
"""

import lzma
import struct
import sys
from pathlib import Path

source, target = map(Path, sys.argv[1:])
image = source.read_bytes()
if image[0x202:0x206] != b"HdrS":
    sys.exit(f"{source} is no bzImage.")
setup_bytes = (image[0x1F1] + 1) * 512
offset, length = struct.unpack_from("<II", image, 0x248)
payload = image[setup_bytes + offset : setup_bytes + offset + length]
if not payload.startswith(b"\xfd7zXZ\0"):
    sys.exit(f"{source} is not packed with xz, as Debian's kernels are.")
# Behind the packed stream stands the unpacked size, which the decompressor must not see.
target.write_bytes(lzma.LZMADecompressor().decompress(payload))
