"""Judges experiment 12: what a poll interval costs in age and in missed changes."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

# Median delay over period: the uniform law gives 0.5, as for the mean, which a single stall of a
# busy machine moves. The band is wide enough for the few independent periods of a short run, and
# far from 0 and from 1.
_LEAST, _MOST = 0.35, 0.75


@judges("poll-interval")
def poll_interval(run: Run) -> Finding:
    """Delays are uniform on the period, versions within one period are missed."""
    broken = [run.count("broken", case) for case in run.cases("broken")]
    control, fixed = run.count("control"), run.count("fixed")
    delays = run.table("delays")
    polled = delays[delays["case"].isin(run.cases("broken"))]
    longest = polled["period_ms"].max()
    median = polled.groupby("period_ms")["delay_ms"].median()
    mean = float(polled.loc[polled["period_ms"] == longest, "delay_ms"].mean())
    ratio = float(median[longest]) / longest
    events = float(delays[delays["case"].isin(run.cases("fixed"))]["delay_ms"].median())
    rates = [count.rate for count in broken]
    return Finding(
        run.experiment,
        f"Polled every {longest:g} ms, a change was seen {mean:.3g} ms late in the mean, "
        f"{ratio:.2f} of the period in the median, and {broken[-1]} changes were never seen. Ring "
        f"buffer events missed {fixed}, at a median of {events:.2g} ms.",
        (
            Check(
                "the median delay is about half the longest period",
                _LEAST <= ratio <= _MOST,
                f"{ratio:.2f} of {longest:g} ms",
            ),
            Check(
                "the median delay grows with the period",
                bool(median.sort_index().is_monotonic_increasing),
                ", ".join(f"{delay:.2g} ms at {period:g} ms" for period, delay in median.items()),
            ),
            Check(
                "the longest period misses more than the shortest",
                rates[-1] > rates[0] and broken[-1].anomalies > 0,
                f"{rates[-1]:.0%} against {rates[0]:.0%}",
            ),
            Check("a writer that waits for the poller hides it", control.anomalies == 0,
                  str(control)),
            Check("events miss no change", fixed.anomalies == 0, str(fixed)),
            Check(
                "and are seen sooner than by the longest poll",
                events < float(median[longest]),
                f"{events:.2g} ms against {median[longest]:.2g} ms",
            ),
        ),
    )  # fmt: skip
