"""Judges experiment 9: keys of an LRU map that were confirmed and are gone."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

# Nodes move between lists in small numbers; kernels before the free target was made to follow the
# map's size (2025) take a fixed 128 at once.
_SLACK = 0.1


@judges("lru-eviction")
def lru_eviction(run: Run) -> Finding:
    """A full LRU evicts at every update; per-CPU lists hold one CPU's share."""
    per_cpu = run.count("broken", "LRU, NO_COMMON_LRU, filled to max_entries from one CPU")
    touched = run.count("broken", "LRU, common lists, full, one key updated with EXIST")
    beyond = run.count("broken", "LRU, common lists, filled an eighth beyond max_entries")
    control, fixed = run.count("control"), run.count("fixed")
    share = 1 / int(run.table("cpus")["possible"].iloc[0])
    kept = 1 - per_cpu.rate
    touch = run.table("touch")
    touch = touch[touch["case"] == "LRU, common lists"]
    absent, touches = int(touch["answered_absent"].sum()), int(touch["touches"].sum())
    fill = run.table("fill")
    refused = int(fill[fill["case"] == "plain hash"]["refused"].max())
    return Finding(
        run.experiment,
        f"Filled from one CPU, an LRU map with NO_COMMON_LRU kept {kept:.0%} of its keys, that "
        f"CPU's share of {share:.0%}, without one error. In a full common LRU, updating one "
        f"present key evicted {touched} keys, and {absent:,} of "
        f"{touches:,} updates did not find their own key. A plain hash lost {fixed} and "
        "refused what did not fit.",
        (
            Check(
                "NO_COMMON_LRU keeps one CPU's share",
                abs(kept - share) <= _SLACK and share < 1,
                f"{kept:.1%} kept, share {share:.1%}",
            ),
            Check("updating a present key of a full LRU evicts others", touched.anomalies > 0,
                  str(touched)),
            Check(
                "and the key itself: EXIST answers ENOENT",
                absent > 0,
                f"{absent:,} of {touches:,}",
            ),
            Check("beyond max_entries the LRU evicts in silence", beyond.anomalies > 0,
                  str(beyond)),
            Check("an LRU filled to half keeps all", control.anomalies == 0, str(control)),
            Check("a plain hash keeps all", fixed.anomalies == 0, str(fixed)),
            Check("and refuses aloud what does not fit", refused > 0, f"{refused:,} E2BIG"),
        ),
    )  # fmt: skip
