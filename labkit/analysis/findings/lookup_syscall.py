"""Judges experiment 29: what a lookup really calls."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_ITEMS = "bcc, items()"
_BATCHES = ("labkit, snapshot()", "labkit, update_many()")
_MAPPED = "mmap and msync"
_MISREAD = (-errno.E2BIG, -errno.EINVAL, -errno.EFAULT)


@judges("lookup-syscall")
def lookup_syscall(run: Run) -> Finding:
    """One bpf(2) with a pointer to attributes; no mapping, no msync, no locked memory."""
    calls, refusals = run.table("calls").set_index("case"), run.table("refusals")
    pointers = run.table("pointers")
    single = calls[calls["made"] > 0]
    lab = calls[~calls.index.isin(refusals["case"])]
    mapped, items = calls.loc[_MAPPED], calls.loc[_ITEMS]
    batches = calls.loc[list(_BATCHES)]
    by_arguments = refusals[refusals["case"] != _MAPPED]
    misread = by_arguments[by_arguments["answer"].isin(_MISREAD)]
    by_mapping = refusals[refusals["case"] == _MAPPED]
    idle = run.count("control", "nothing called")
    good = pointers[pointers["variant"] == "fixed"]
    bad = pointers[pointers["variant"] == "broken"]
    made, bytes_passed = int(single["made"].sum()), sorted(set(single["attributes_bytes"]))
    checks = (
        Check(
            "a lookup or update is one bpf(command, attributes, size) with our pointers in it",
            made > 0
            and bool((single["bpf"] == single["made"]).all())
            and bool((single["as_made"] == single["made"]).all()),
            f"{int(single['as_made'].sum()):,} of {made:,} calls by {len(single)} ways seen so, "
            f"with {', '.join(map(str, bytes_passed))} B of attributes",
        ),
        Check(
            "no library maps the map or synchronises it",
            not lab[["mmap", "msync"]].to_numpy().any(),
            f"{int(lab['mmap'].sum())} mmap of a descriptor and {int(lab['msync'].sum())} msync "
            f"in {len(lab)} ways",
        ),
        Check(
            "the watch would have seen them, and sees nothing while nothing is called",
            0 < mapped["mmap"] == mapped["msync"]
            and mapped["bpf"] == 0
            and idle.operations > 0
            and idle.anomalies == 0,
            f"{mapped['mmap']} mmap and {mapped['msync']} msync of the article's procedure, "
            f"{idle.anomalies} calls while idle",
        ),
        Check(
            "the layout Syscall6(SYS_BPF, cmd, fd, key, value, flags) is refused, nothing changes",
            len(by_arguments) == len(misread) > 0 and not by_arguments["changed"].any(),
            f"{_answers(by_arguments['answer'])} to {int(by_arguments['times'].sum())} calls, "
            f"{int(by_arguments['changed'].sum())} values changed",
        ),
        Check(
            "mmap of a hash is refused",
            len(by_mapping) > 0 and bool((by_mapping["answer"] < 0).all()),
            f"{_answers(by_mapping['answer'])} to {int(by_mapping['times'].sum())} calls",
        ),
        Check(
            "key and value may be in memory that is neither locked nor touched nor aligned",
            len(good) > 0 and not good["failed"].any() and not good["locked_kib"].any(),
            f"EFAULT in {int(good['failed'].sum())} of {int(good['calls'].sum()):,} lookups, "
            f"{int(good['locked_kib'].max())} KiB locked",
        ),
        Check(
            "EFAULT means that there is no memory at the pointer",
            len(bad) > 0 and bool((bad["failed"] == bad["calls"]).all()),
            f"{int(bad['failed'].sum()):,} of {int(bad['calls'].sum()):,} lookups with "
            f"{', '.join(bad['memory'].unique())}",
        ),
        Check(
            "a walk by key takes two calls an element, a batch far fewer than one",
            2 * items["entries"] <= items["bpf"] <= 2 * items["entries"] + 2
            and bool((10 * batches["bpf"] <= batches["entries"]).all()),
            f"{items['bpf']:,} and {int(batches['bpf'].max())} for {items['entries']:,} elements",
        ),
    )
    return Finding(
        run.experiment,
        f"{int(single['as_made'].sum()):,} of {made:,} lookups and updates were seen as one "
        f"bpf(command, attributes, size) each, whichever library made them, with "
        f"{int(lab['mmap'].sum())} mmap and {int(lab['msync'].sum())} msync. The article's "
        f"Syscall6 layout was answered {_answers(by_arguments['answer'])} in "
        f"{int(misread['times'].sum())} of {int(by_arguments['times'].sum())} calls. Memory "
        f"need not be locked: {int(good['failed'].sum())} of {int(good['calls'].sum()):,} lookups "
        f"failed with none of it locked, {int(bad['failed'].sum()):,} of "
        f"{int(bad['calls'].sum()):,} where the pointer named no memory.",
        checks,
    )


def _answers(answers: Iterable[int]) -> str:
    names = {524: "ENOTSUPP", **errno.errorcode}
    numbers = sorted({-int(answer) for answer in answers})
    return ", ".join(names.get(number, str(number)) for number in numbers)
