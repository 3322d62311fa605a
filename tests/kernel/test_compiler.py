"""The compiler: in a process of its own, where its faults are nobody else's; kept, and bound."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from labkit.errors import BadInput
from labkit.kernel import compiler, programs
from labkit.kernel.compiler import LoadFailed, compiled
from labkit.kernel.libbpf import MapKind
from labkit.kernel.maps import Map
from labkit.sync.trace_hook import way_to_map

pytestmark = pytest.mark.outside_vm("asks nothing of the kernel that differs between kernels")

COUNT = """
BPF_TABLE("array", u32, u64, counts, 1);
int count(struct __sk_buff *skb)
{
	u32 zero = 0;
	u64 *one = bpf_map_lookup_elem((void *)bpf_pseudo_fd(1, GIVEN_FD), &zero);
	counts.increment(zero);
	return one ? *one : -1;
}
"""
# bpf has no call of memset: LLVM ends the process that it compiles in.
TOO_LARGE = """
struct large { char bytes[8192]; };
int clear(struct __sk_buff *skb)
{
	struct large here;
	__builtin_memset(&here, skb->len, sizeof(here));
	return here.bytes[skb->mark & 4095];
}
"""
ENDS = "int end(struct __sk_buff *skb) { return 0; }\n#pragma clang __debug llvm_fatal_error\n"
CRASHES = "int crash(struct __sk_buff *skb) { return 0; }\n#pragma clang __debug crash\n"


@pytest.fixture
def source(kernel: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources and one of what was compiled, both empty; the path of a source there."""
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    monkeypatch.setattr(compiler, "KEPT", tmp_path / "kept")
    return tmp_path / "some.bpf.c"


def test_what_was_compiled_is_kept_and_bound_to_other_descriptors(source: Path) -> None:
    source.write_text(COUNT)
    for value in (7, 8):
        with Map.create(MapKind.ARRAY, key="u4", value="u8", max_entries=1) as given:
            given.update(0, value)
            with programs.load("some", GIVEN_FD=given.fd) as loaded:
                assert loaded.program("count").test_run(repeat=5).value == value
                assert loaded.map("counts").lookup(0) == 5
    (kept,) = (source.parent / "kept").iterdir()
    source.write_text(COUNT.replace("*one :", "*one + 1 :"))
    compiled("some", {"GIVEN_FD": 0})
    assert len(list(kept.parent.iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"\xff", b"[]", b"0\n{}"])
def test_a_damaged_file_is_compiled_anew(source: Path, damage: bytes) -> None:
    source.write_text(COUNT)
    whole = compiled("some", {"GIVEN_FD": 0})
    (kept,) = (source.parent / "kept").iterdir()
    good = kept.read_bytes()
    for spoiled in (damage, good[:-9], good.replace(b'"maps"', b'"naps"')):
        kept.write_bytes(spoiled)
        assert compiled("some", {"GIVEN_FD": 0}) == whole
        assert kept.read_bytes() == good


def test_a_folder_that_cannot_be_written_keeps_nothing(source: Path) -> None:
    source.write_text(COUNT)
    (source.parent / "kept").write_text("a file where the folder should be")
    assert compiled("some", {"GIVEN_FD": 0}).programs["count"].places


def test_a_module_may_lie_at_any_address(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A thread allocates far above 4 GiB; bcc's own declarations cut such a pointer to 32 bits.
    compile_here = compiler._compile

    def compile_in_a_thread(*given: Any) -> str:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(compile_here, *given).result()

    monkeypatch.setattr(compiler, "_compile", compile_in_a_thread)
    source.write_text(COUNT)
    assert set(compiled("some", {"GIVEN_FD": 0}).maps) == {"counts"}


@pytest.mark.parametrize("text", [TOO_LARGE, ENDS, CRASHES])
def test_a_fault_of_the_compiler_is_a_sentence(
    source: Path, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    source.write_text(text)
    with pytest.raises(LoadFailed, match=r"^bpf/some\.bpf\.c does not compile or load: \S") as one:
        programs.load("some")
    assert "\n" not in str(one.value)
    said = capfd.readouterr()
    assert said.out == said.err == ""
    assert not (source.parent / "kept").exists()


def test_an_error_in_the_source_is_the_compilers_first(source: Path) -> None:
    source.write_text("int wrong(struct __sk_buff *skb) { return nothing; }")
    with pytest.raises(LoadFailed, match="error: use of undeclared identifier 'nothing'"):
        programs.load("some")
    with pytest.raises(BadInput, match="knows no constant"):
        programs.load("some", GIVEN_FD=3)


@pytest.mark.usefixtures("kernel")
def test_what_this_kernel_cannot_run_compiles_all_the_same() -> None:
    constants = dict.fromkeys(["TABLE_FD", "WRITES", "MAP_ID", *way_to_map()], 8)
    assert "on_bpf" in compiled("lsm_watch", constants).programs
