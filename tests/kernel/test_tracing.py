"""Lines of bpf_trace_printk, from an instance of our own."""

import os

import pytest

from labkit.errors import BadInput
from labkit.kernel import programs
from labkit.kernel.tracing import printed_lines


def test_our_lines_come_out_once_and_in_order() -> None:
    mark = f"MAP_UPD {os.getpid()} "
    with (
        programs.load("printk_watch", ENTRIES=100, OWNER_ID=os.getpid()) as unit,
        printed_lines(mark) as ours,
        printed_lines("MAP_UPD 0 ") as others,
    ):
        program = unit.program("print_calls_on_new_keys")
        program.test_run(repeat=50)
        assert ours.read() == [f"{mark}{number}".encode() for number in range(1, 51)]
        assert ours.read() == []
        program.test_run()
        assert ours.read() == [f"{mark}51".encode()]
        assert others.read() == []
        assert ours.lost() == others.lost() == 0


@pytest.mark.parametrize("mark", ["", "1st", 'a"b', "a*"])
def test_a_mark_that_the_filter_would_misread_is_refused(mark: str) -> None:
    with pytest.raises(BadInput, match="mark"), printed_lines(mark):
        pass
