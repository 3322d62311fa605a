"""Judges experiment 36: knobs that do not exist, and the limit that does."""

from __future__ import annotations

import errno

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_BEYOND = "maps beyond the limit of a control group"


@judges("memory-accounting")
def memory_accounting(run: Run) -> Finding:
    """A bpffs limits nothing; a control group's limit holds, for its own processes."""
    knobs, beyond = run.count("broken"), run.count("fixed", _BEYOND)
    controls = {case: run.count("control", case) for case in run.cases("control")}
    maps, kinds = run.table("maps"), run.table("filesystems").set_index("place")["kind"]
    pins, limits = str(kinds.iloc[0]), str(kinds.iloc[1])
    made = maps[maps["limited"] & (maps["answer"] == 0)]
    outside = maps[~maps["limited"]]
    refused = maps[maps["limited"] & (maps["answer"] != 0)]
    share = float((made["charged_mib"] / made["mib"]).min())
    return Finding(
        run.experiment,
        f"Pins stand in a file system of type {pins}, memory is limited in one of type {limits} "
        f"(control groups v{int(run.table('hierarchy')['version'].iloc[0])}). {knobs} writes to "
        f"the article's knobs were refused. Under a group's limit {beyond} maps beyond it could "
        f"be made, and each map that could was charged to the group of its maker.",
        (
            Check(
                "the article's knobs do not exist",
                knobs.anomalies == knobs.operations > 0,
                f"{knobs} writes refused",
            ),
            Check(
                "where maps are pinned is a bpffs and no control group",
                pins == "bpf" and limits in ("cgroup", "cgroup2"),
                f"{pins}, not {limits}",
            ),
            Check(
                "a control group's limit refuses what is beyond it, with ENOMEM",
                beyond.operations > 0
                and beyond.anomalies == 0
                and set(refused["answer"]) == {-errno.ENOMEM},
                f"{beyond} made",
            ),
            Check(
                "what fits is made, and so is everything without a limit",
                all(one.operations > 0 == one.anomalies for one in controls.values()),
                "; ".join(f"{case}: {one} refused" for case, one in controls.items()),
            ),
            Check(
                "a map is charged to the group of the process that makes it, and to no other",
                share > 0.8 and bool((outside["charged_mib"].abs() < 0.5 * outside["mib"]).all()),
                f"at least {100 * share:.0f} % of its size",
            ),
        ),
    )
