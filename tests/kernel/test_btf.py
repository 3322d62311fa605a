"""Offsets in the running kernel's structs."""

from __future__ import annotations

import pytest

from labkit.errors import Unavailable
from labkit.kernel.btf import member_offset

pytestmark = pytest.mark.usefixtures("kernel")


def test_members_stand_where_the_kernel_has_them() -> None:
    # The first member of a file's table is a counter, and the fd table comes behind it.
    assert member_offset("files_struct", "count") == 0
    assert member_offset("files_struct", "fdt") > 0
    assert member_offset("list_head", "prev") == 8


def test_a_member_of_an_anonymous_union_counts_as_the_structs_own() -> None:
    assert member_offset("bpf_insn", "imm") == 4
    assert member_offset("sk_buff", "next") == 0  # inside a union of a struct


@pytest.mark.parametrize("names", [("bpf_map", "nonesuch"), ("nonesuch", "id")])
def test_what_this_kernel_has_not_is_told_in_a_sentence(names: tuple[str, str]) -> None:
    with pytest.raises(Unavailable, match="BTF has no member"):
        member_offset(*names)
