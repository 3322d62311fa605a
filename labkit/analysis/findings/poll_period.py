"""Judges experiment 41: what a poll period costs in delay, missed versions and CPU."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

# Growth of the mean delay over that of the period: the uniform law gives 0.5, and what a look
# itself takes is in both delays, be the CPU as slow as it may. The band is wide enough for a busy
# machine and for the few independent periods of a short run, and far from 0 and from 1.
_LEAST, _MOST = 0.3, 0.75


@judges("poll-period")
def poll_period(run: Run) -> Finding:
    """Delay and missed versions grow with the period, CPU falls; events have neither."""
    follows = run.table("follows").set_index("case")
    polls = follows.loc[run.cases("broken")].sort_values("period_ms")
    broken = {case: run.count("broken", case) for case in polls.index}
    control, fixed = run.count("control"), run.count("fixed")
    delay = run.table("delays").groupby("case")["delay_ms"].mean()
    shortest, longest = str(polls.index[0]), str(polls.index[-1])
    period = float(polls["period_ms"].iloc[-1])
    events = float(delay[run.cases("fixed")].mean())
    longer = period - float(polls["period_ms"].iloc[0])
    ratio = float(delay[longest] - delay[shortest]) / longer
    cpu = polls["cpu_ns"] / polls["elapsed_ns"]
    accounted = follows["delivered"] + follows["coalesced"] + follows["dropped"]
    exact = (
        (follows["produced"] == follows["changes"])
        & (accounted == follows["produced"])
        & (follows["coalesced"] + follows["dropped"] == follows["missed"])
    )
    return Finding(
        run.experiment,
        f"Polled every {period:g} ms, a change was seen {delay[longest]:.3g} ms late in the mean, "
        f"and {broken[longest].rate:.0%} of the versions never; every "
        f"{polls['period_ms'].iloc[0]:g} ms it was {delay[shortest]:.2g} ms, and the follower took "
        f"{cpu.iloc[0]:.0%} of a CPU. Events missed {fixed}, {events:.2g} ms late in the mean.",
        (
            Check(
                "the mean delay grows by about half of what the period grows by",
                _LEAST <= ratio <= _MOST,
                f"{ratio:.2f} of {longer:g} ms",
            ),
            Check(
                "the longest period is seen later than the shortest",
                bool(delay[longest] > delay[shortest]),
                f"{delay[longest]:.2g} ms against {delay[shortest]:.2g} ms",
            ),
            Check(
                "and misses more versions",
                broken[longest].anomalies > 0 and broken[longest].rate > broken[shortest].rate,
                f"{broken[longest].rate:.0%} against {broken[shortest].rate:.0%}",
            ),
            Check(
                "and takes less CPU",
                bool(cpu.iloc[-1] < cpu.iloc[0] / 2),
                f"{cpu.iloc[-1]:.2%} against {cpu.iloc[0]:.1%} of a CPU",
            ),
            Check(
                "produced = delivered + coalesced + dropped, and what was coalesced was missed",
                bool(exact.all()),
                f"exact for {int(exact.sum())} of {len(exact)} ways to follow",
            ),
            Check("a writer that waits for the poller hides it", control.anomalies == 0,
                  str(control)),
            Check("events miss no version", fixed.anomalies == 0, str(fixed)),
            Check(
                "and come sooner than by the longest period",
                events < float(delay[longest]),
                f"{events:.2g} ms against {delay[longest]:.2g} ms",
            ),
        ),
    )  # fmt: skip
