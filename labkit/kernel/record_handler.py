"""A function of yours for each record of a ring, compiled: no interpreter runs for any of them.

It needs numba, which nothing else here does: ``pip install 'map-freshness-lab[numba]'`` (200 MB).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.errors import Unavailable


class RecordHandler:
    """A compiled function and the state that it keeps; `record_handler` makes it.

    Attributes
    ----------
    dtype : numpy.dtype
        Layout of a record.
    state : numpy.ndarray
        One row of the state's dtype, live: what the function has made of the records so far.
    address : int
        Of the compiled function, which takes the addresses of a record and of the state.
    """

    def __init__(
        self, function: Callable[[Any, Any], None], dtype: np.dtype[Any], state: np.dtype[Any]
    ) -> None:
        try:
            import numba
            from numba.np.numpy_support import from_dtype
        except ImportError as error:
            raise Unavailable(
                "numba is missing: pip install 'map-freshness-lab[numba]' gives it (200 MB)."
            ) from error
        compiled, carray, types = numba.njit(function), numba.carray, numba.types
        pointers = (types.CPointer(from_dtype(one)) for one in (dtype, state))

        def handle(record: Any, kept: Any) -> None:
            compiled(carray(record, 1)[0], carray(kept, 1)[0])

        self._held = numba.cfunc(types.void(*pointers))(handle)
        self.address: int = self._held.address
        self.dtype, self.state = dtype, np.zeros(1, state)


def record_handler(
    dtype: npt.DTypeLike, state: npt.DTypeLike
) -> Callable[[Callable[[Any, Any], None]], RecordHandler]:
    """Compile a function of one record for `labkit.kernel.ringbuf.RingReader.each`.

    Parameters
    ----------
    dtype : dtype-like
        Layout of a record: the function's first argument, whose fields it reads.
    state : dtype-like
        What it keeps from record to record: its second argument, whose fields it sets; zeros at
        first.

    Returns
    -------
    callable
        A decorator; it answers a `RecordHandler`.

    Raises
    ------
    Unavailable
        By the decorator: numba is not installed.

    Examples
    --------
    The largest value of all events, and how many there were:

    >>> @record_handler([("seq", "u8"), ("value", "u8")], [("events", "u8"), ("most", "u8")])
    ... def largest(event, kept):
    ...     kept.events += 1
    ...     kept.most = max(kept.most, event.value)

    With a ``reader`` of that dtype, ``reader.each(largest)`` takes what is in the ring now, and
    ``largest.state["most"][0]`` is the answer.
    """
    return lambda function: RecordHandler(function, np.dtype(dtype), np.dtype(state))
