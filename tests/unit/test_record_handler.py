"""A function of the user's for each record: what it makes of a ring, where numba is installed."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from labkit.errors import BadInput, Unavailable
from labkit.kernel import native, record_handler
from tests.unit.test_native import FakeReader
from tests.unit.test_ringbuf_layout import PlainRing

RECORD = np.dtype([("low", "u4"), ("high", "u4")])


def test_without_numba_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(Unavailable, match=r"pip install 'map-freshness-lab\[numba\]'"):
        record_handler.record_handler(RECORD, RECORD)(lambda record, kept: None)


@pytest.mark.skipif(native.compiled() is None, reason=f"event path: {native.state()}")
def test_a_function_of_a_record_is_called_for_each() -> None:
    pytest.importorskip("numba", reason="numba, an optional extra, is not installed")

    @record_handler.record_handler(RECORD, [("events", "u8"), ("sum", "u8")])
    def add(record, kept):  # type: ignore[no-untyped-def]
        kept.events += 1
        kept.sum += record.low

    ring = PlainRing(RECORD.itemsize)
    sent = [content for content in range(1, 200) if ring.put(content)]
    reader = FakeReader(ring, "native")
    with pytest.raises(BadInput, match="for records of"):
        reader.each(add)
    reader._dtype = RECORD
    assert reader.each(add) == len(sent) and reader.each(add) == 0
    assert add.state[0].tolist() == (len(sent), sum(0x01010101 * content for content in sent))
    assert reader.account()[3] == len(sent)
