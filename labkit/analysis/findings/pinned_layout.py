"""Judges experiment 24: a pinned map that outlives the layout of its values."""

from __future__ import annotations

import pandas as pd

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_VERSION = "layout version in the pin's name"


@judges("pinned-layout")
def pinned_layout(run: Run) -> Finding:
    """Any map is taken by bcc, one of its size by libbpf; only a version tells fields apart."""
    builds, tried = run.table("builds"), run.table("programs")
    of_bcc = builds[builds["case"] == "bcc"]
    changed = of_bcc[of_bcc["layout"] != "kept"]
    grown, shrunk = (changed[changed["layout"] == layout] for layout in ("grown", "shrunk"))
    sized = builds[
        builds["case"].isin(["libbpf", "labkit Map"]) & builds["layout"].isin(["grown", "shrunk"])
    ]
    unseen = builds[
        builds["case"].isin(["libbpf", "labkit Map"]) & (builds["layout"] == "reordered")
    ]
    versioned = builds[builds["case"] == _VERSION]
    control, fixed = run.count("control"), run.count("fixed")
    rejected = tried[tried["loads"] == 0]
    narrow = (tried["field"] == "expires") & (tried["map_bytes"] < tried["map_bytes"].max())
    checks = (
        Check(
            "bcc takes a pinned map of any layout without an error",
            len(changed) > 0 and bool((changed["accepted"] == 1).all()),
            f"{int(changed['accepted'].sum())} of {len(changed)} layouts",
        ),
        Check(
            "each of them leaves one of the two builds with policies that it misreads",
            all(run.count("broken", case).anomalies > 0 for case in run.cases("broken")),
            str(run.count("broken")),
        ),
        Check(
            "where the struct grew, the new build writes fields that are not stored",
            len(grown) > 0
            and bool((grown["new_wrong"] == grown["new_reads"]).all())
            and bool((grown["old_wrong"] == 0).all()),
            f"{_wrong(grown, 'new')} misread by the new build, {_wrong(grown, 'old')} by the old",
        ),
        Check(
            "where it shrank, the old build decodes wrong fields",
            len(shrunk) > 0 and bool((shrunk["old_wrong"] == shrunk["old_reads"]).all()),
            f"{_wrong(shrunk, 'old')} misread by the old build",
        ),
        Check(
            "libbpf and labkit's Map refuse a map whose values have another size",
            len(sized) > 0 and int(sized["accepted"].sum()) == 0,
            f"{len(sized) - int(sized['accepted'].sum())} of {len(sized)} refused",
        ),
        Check(
            "nobody who compares sizes sees fields that changed places",
            len(unseen) > 0
            and bool((unseen["accepted"] == 1).all())
            and bool((unseen["old_wrong"] == unseen["old_reads"]).all()),
            f"{int(unseen['accepted'].sum())} of {len(unseen)} accepted, "
            f"{_wrong(unseen, 'old')} misread by the old build",
        ),
        Check(
            "the verifier rejects the program that reads past the pinned value, and only that",
            list(rejected.index) == list(tried.index[narrow]) and len(rejected) > 0,
            f"{len(tried) - len(rejected)} of {len(tried)} programs load",
        ),
        Check(
            "with one layout everybody reads what was meant", control.anomalies == 0, str(control)
        ),
        Check(
            "with a layout version in the pin's name old and new build read what was meant",
            len(versioned) > 0
            and bool((versioned["accepted"] == 1).all())
            and int((versioned["old_wrong"] + versioned["new_wrong"]).sum()) == 0,
            f"{_wrong(versioned, 'old')} and {_wrong(versioned, 'new')} misread",
        ),
        Check("no cure lets a policy be misread", fixed.anomalies == 0, str(fixed)),
    )
    return Finding(
        run.experiment,
        f"bcc took the pinned map for each of {len(changed)} changed layouts: "
        f"where the struct grew, the new build misread {_wrong(grown, 'new')} policies, where it "
        f"shrank, the old one {_wrong(shrunk, 'old')}. libbpf and labkit's Map refused both, but "
        "let pass a struct of the same size whose fields changed places. A layout version in the "
        "pin's name, "
        f"and a copy at {versioned['copy_ns'].median():.0f} ns an entry, left "
        f"{_wrong(versioned, 'old')} and {_wrong(versioned, 'new')} misread.",
        checks,
    )


def _wrong(rows: pd.DataFrame, build: str) -> str:
    return f"{int(rows[f'{build}_wrong'].sum()):,} of {int(rows[f'{build}_reads'].sum()):,}"
