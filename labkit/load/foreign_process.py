"""A program that writes somebody's map and knows nothing of this lab: plain calls of libbpf.

Run it as a file: ``python foreign_process.py MAP_ID KEYS WRITES PER_SECOND``. Keys are 4 bytes;
the value is 8 bytes of version, and 8 with the time of the write, CLOCK_MONOTONIC nanoseconds.
"""

import ctypes
import sys
import time


def main(map_id: int, keys: int, writes: int, per_second: int) -> None:
    """Write versions 1, 2, ... of each key in turn, on a schedule.

    Parameters
    ----------
    map_id : int
        Id of the map.
    keys : int
        Keys 0, 1, ... that are written in turn.
    writes : int
        How many writes in all.
    per_second : int
        Their rate.
    """
    libbpf = ctypes.CDLL("libbpf.so.1")
    fd = libbpf.bpf_map_get_fd_by_id(ctypes.c_uint32(map_id))
    key, value = ctypes.c_uint32(), (ctypes.c_uint64 * 2)()
    begun = time.monotonic()
    for i in range(writes):
        time.sleep(max(0.0, begun + i / per_second - time.monotonic()))
        key.value = i % keys
        value[0], value[1] = i // keys + 1, time.monotonic_ns()
        if libbpf.bpf_map_update_elem(fd, ctypes.byref(key), value, ctypes.c_uint64(0)):
            sys.exit(f"map {map_id} could not be written")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
