"""Judges experiment 29: what a lookup really calls."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterable

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Count, Run

_ITEMS = "bcc, items()"
_BATCHES = ("labkit, snapshot()", "labkit, update_many()")
_MAPPED = "mmap and msync"
_MISREAD = (-errno.E2BIG, -errno.EINVAL, -errno.EFAULT)


@judges("lookup-syscall")
def lookup_syscall(run: Run) -> Finding:
    """One bpf(2) with a pointer to attributes; no mapping, no msync, no locked memory."""
    calls, refusals = run.table("calls").set_index("case"), run.table("refusals")
    single = calls[calls["made"] > 0]
    lab = calls[~calls.index.isin(refusals["case"])]
    mapped, items = calls.loc[_MAPPED], calls.loc[_ITEMS]
    batches = calls.loc[list(_BATCHES)]
    by_arguments = refusals[refusals["case"] != _MAPPED]
    by_mapping = refusals[refusals["case"] == _MAPPED]
    unlocked = run.table("pointers").query("variant == 'fixed'")
    missing = run.table("pointers").query("variant == 'broken'")

    unseen = _added(run, "fixed", single.index)
    misread = _added(run, "broken", by_arguments["case"].unique())
    unmapped = run.count("broken", _MAPPED)
    idle = run.count("control", "nothing called")
    good, bad, locked = (_by_memory(run, variant) for variant in ("fixed", "broken", "control"))
    seen = f"{unseen.operations - unseen.anomalies:,} of {unseen.operations:,}"
    sizes = ", ".join(map(str, sorted(set(single["attributes_bytes"]))))
    checks = (
        Check(
            "a lookup or update is one bpf(command, attributes, size) with our pointers in it",
            unseen.operations > 0
            and unseen.anomalies == 0
            and bool((single["bpf"] == single["made"]).all()),
            f"{seen} calls by {len(single)} ways seen so, with {sizes} B of attributes",
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
            misread.anomalies == misread.operations > 0
            and bool(by_arguments["answer"].isin(_MISREAD).all())
            and not by_arguments["changed"].any(),
            f"{_answers(by_arguments['answer'])} to {misread} calls, "
            f"{int(by_arguments['changed'].sum())} values changed",
        ),
        Check(
            "mmap of a hash is refused",
            unmapped.anomalies == unmapped.operations > 0,
            f"{_answers(by_mapping['answer'])} to {unmapped} calls",
        ),
        Check(
            "key and value may be in memory that is neither locked nor touched nor aligned",
            good.operations > 0
            and good.anomalies == 0
            and locked.anomalies == 0
            and not unlocked["locked_kib"].any(),
            f"EFAULT in {good} lookups with {int(unlocked['locked_kib'].max())} KiB locked, "
            f"in {locked} with locked memory",
        ),
        Check(
            "EFAULT means that there is no memory at the pointer",
            bad.anomalies == bad.operations > 0,
            f"{bad} lookups with {', '.join(missing['memory'].unique())}",
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
        f"{seen} lookups and updates were seen as one bpf(command, attributes, size) each, "
        f"whichever library made them, with {int(lab['mmap'].sum())} mmap and "
        f"{int(lab['msync'].sum())} msync. The article's Syscall6 layout was refused in {misread} "
        f"calls ({_answers(by_arguments['answer'])}). Memory need not be locked: {good} lookups "
        f"failed with none of it locked, {bad} where the pointer named no memory.",
        checks,
    )


def _added(run: Run, variant: str, cases: Iterable[object]) -> Count:
    counts = [run.count(variant, str(case)) for case in cases]
    return Count(
        sum(one.operations for one in counts), sum(one.anomalies for one in counts), math.nan
    )


def _by_memory(run: Run, variant: str) -> Count:
    return _added(run, variant, (case for case in run.cases(variant) if " in memory: " in case))


def _answers(answers: Iterable[int]) -> str:
    names = {524: "ENOTSUPP", **errno.errorcode}
    numbers = sorted({-int(answer) for answer in answers})
    return ", ".join(names.get(number, str(number)) for number in numbers)
