"""Judges experiment 35: policies under a hash of their path."""

from __future__ import annotations

import math

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_SPREAD = 3  # standard deviations; the seed is fixed, so a run does not leave them by chance


@judges("path-hash")
def path_hash(run: Run) -> Finding:
    """Some paths get another's policy, as many as chance says; none where the path is kept."""
    wrong, few = run.count("broken"), run.count("control")
    cures = {case: run.count("fixed", case) for case in run.cases("fixed")}
    ways = run.table("ways").set_index("way").to_dict("index")
    compared, by_path = (ways[case] for case in cures)
    expected = float(run.table("sizes")["expected"].iloc[-1])
    collisions = run.table("birthdays")["collisions"]
    rounds, met = len(collisions), int((collisions > 0).sum())
    spread = _SPREAD * math.sqrt(rounds) / 2
    return Finding(
        run.experiment,
        f"Under a 32-bit hash of its path, {wrong} paths were given the policy of another one, "
        f"without an error; {expected:.1f} were to be expected by chance. Of {rounds} tables of "
        f"77,163 paths {met} had such a pair. With the path kept in the value and compared, "
        f"{compared['wrong']} were wrong and {compared['unserved']} told to have no "
        f"policy; with the path as key, {by_path['wrong']} and {by_path['unserved']}.",
        (
            Check("some paths are given the policy of another", wrong.anomalies > 0, str(wrong)),
            Check(
                "as many as the birthday rule says",
                abs(wrong.anomalies - expected) <= _SPREAD * math.sqrt(expected),
                f"{wrong.anomalies}, expected {expected:.1f}",
            ),
            Check(
                "about every second table of 77,163 paths has a pair",
                rounds > 0 and abs(met - rounds / 2) <= spread,
                f"{met} of {rounds}",
            ),
            Check("a thousand paths do not collide", few.anomalies == 0 < few.operations, str(few)),
            Check(
                "with the path compared, no policy is another's",
                compared["wrong"] == 0 and all(one.anomalies == 0 for one in cures.values()),
                f"{compared['wrong']} of {compared['paths']:,}, {compared['unserved']} unserved",
            ),
            Check(
                "with the path as key every path has its own",
                by_path["unserved"] == 0 and by_path["stored"] == by_path["paths"],
                f"{by_path['stored']:,} of {by_path['paths']:,} stored",
            ),
        ),
    )
