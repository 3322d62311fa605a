"""A ring that somebody else reads too: the reader says so, and hands out nothing twice."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from experiments.bench.bench_kernel import EVENT, Producer
from labkit.kernel import native
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.kernel.ringbuf import Consumer, RingReader, SharedRing, slot_bytes

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.usefixtures("kernel"),
    pytest.mark.outside_vm("asks nothing of the kernel that differs between kernels"),
]

EVENTS = 16
CONSUMERS = ["numpy", "libbpf"] if native.compiled() is None else ["native", "numpy", "libbpf"]


def move(ring: Map, slots: int) -> None:
    """Read on, or back, as another consumer does, who knows nothing of us."""
    page = mmap.mmap(ring.fd, mmap.PAGESIZE, mmap.MAP_SHARED)
    np.frombuffer(page, np.int64, count=1)[0] += slots * slot_bytes(EVENT.itemsize)


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("slots", [-1, 1, EVENTS, 1_000_000])
def test_a_second_consumer_is_noticed(consumer: Consumer, slots: int) -> None:
    with (
        Map.create(MapKind.RINGBUF, key=None, value=None, max_entries=1 << 14) as ring,
        RingReader(ring, EVENT, consumer=consumer) as reader,
        Producer(ring.fd) as producer,
    ):
        producer.flood(EVENTS)
        assert len(reader.read()) == EVENTS
        move(ring, slots)
        for _ in range(2):
            with pytest.raises(SharedRing, match="one consumer"):
                reader.read()
        move(ring, -slots)
        producer.flood(EVENTS)
        assert reader.read()["seq"].tolist() == [*range(EVENTS, 2 * EVENTS)]
