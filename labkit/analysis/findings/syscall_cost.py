"""Judges experiment 34: what a lookup costs, and what makes a poller late."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_SAID_LOOKUP_NS = 47e6  # the article's mean duration of a lookup
_SAID_DELAY_MS = 38.2  # and its mean delay with a poll every 200 ms


@judges("syscall-cost")
def syscall_cost(run: Run) -> Finding:
    """A call takes microseconds, half of a period is what a poll adds."""
    median = run.table("times").groupby("way")["ns"].median()
    delays = run.table("delays").groupby("period_ms")["delay_ms"]
    mean, middle = delays.mean(), delays.median()
    slow, fast = max(mean.index), min(mean.index)
    broken, fixed = run.count("broken"), run.count("fixed")
    calls = [run.count("control", case) for case in run.cases("control")]
    kernel, whole = median["lookup, inside the kernel"], median["lookup, libbpf"]
    floor = median["clock alone"]
    # By the median: one stall of the machine delays many changes of a schedule.
    share = middle[slow] / slow
    expected = int((1 - _SAID_LOOKUP_NS / 1e6 / slow) * broken.operations)
    batch = float(run.table("batches")["ns_per_entry"].median())
    return Finding(
        run.experiment,
        f"Half of the lookups took less than {whole:,.0f} ns as Python sees them and "
        f"{kernel:,.0f} ns between entry and exit of the system call; the clock alone is "
        f"{floor:,.0f} ns of that, and an entry read in a batch takes {batch:,.0f} ns. A poll "
        f"every {slow:g} ms saw changes {mean[slow]:.0f} ms late in the mean, half of them later "
        f"than {share:.2f} of its period and {broken} later than 47 ms; every {fast:g} ms, "
        f"{mean[fast]:.1f} ms and {fixed}.",
        (
            Check(
                "a single lookup or update takes no 47 ms",
                all(100 * one.anomalies < one.operations for one in calls)
                and 100 * whole < _SAID_LOOKUP_NS,
                ", ".join(f"{one} took as long" for one in calls),
            ),
            Check(
                "the kernel's part is less than what Python measures",
                0 < kernel < whole,
                f"{kernel:,.0f} of {whole:,.0f} ns",
            ),
            Check(
                "calls above the floor are told from it",
                floor < median["refused bpf(2)"] < whole,
                f"{floor:,.0f} ns the clock, {median['refused bpf(2)']:,.0f} ns a refused call",
            ),
            Check(
                "half of the changes are seen half a period late, not 38.2 ms",
                0.35 < share < 0.65 and mean[slow] > _SAID_DELAY_MS,
                f"median {middle[slow]:.0f}, mean {mean[slow]:.0f} of {slow:g} ms",
            ),
            Check(
                "most changes are seen later than 47 ms",
                2 * broken.anomalies > broken.operations,
                f"{broken}; {expected} by the rule",
            ),
            Check(
                "with the same lookups at a shorter period far fewer are",
                2 * fixed.anomalies < broken.anomalies,
                f"{fixed} against {broken}",
            ),
        ),
    )
