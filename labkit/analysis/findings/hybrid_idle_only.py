"""Judges experiment 52: a hybrid that pulls only when the stream idles."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import VARIANTS, Run


@judges("hybrid-idle-only")
def hybrid_idle_only(run: Run) -> Finding:
    """Lost events stay lost while the stream is busy; a pull that a loss brings on bounds that."""
    streams = run.table("streams")
    of = {name: streams[streams["variant"] == name] for name in VARIANTS}
    broken, control, fixed = (run.count(variant) for variant in VARIANTS)
    idle_s, lost = float(str(run.parameters["idle_s"])), int(str(run.parameters["lose_every"]))
    unaccounted = int(
        (streams["produced"] - streams["delivered"] - streams["dropped"] - streams["coalesced"])
        .abs()
        .sum()
    )
    known = int((streams["written"] // lost * (streams["variant"] != "control")).sum())
    busy_s = of["broken"]["busy_ns"].median() / 1e9
    idle = of["broken"]
    most = of["fixed"]["missing_most"].median(), idle["missing_most"].median()
    return Finding(
        run.experiment,
        f"One event of {lost} was lost in a stream that was busy for {busy_s:,.1f} s, with a pull "
        f"after {idle_s:g} s without an event (the article's 5 s, scaled down with the stream): "
        f"{broken} changes of its first half were still missing when it ended, the oldest for "
        f"{idle['oldest_ns'].max() / 1e9:,.1f} s, and {most[1]:,.0f} in all. "
        f"With a pull as soon as a loss shows {fixed.anomalies} were, {most[0]:,.0f} at a "
        f"time at most, the oldest for {of['fixed']['oldest_ns'].median() / 1e6:,.0f} ms.",
        (
            Check("produced = delivered + dropped + coalesced", unaccounted == 0,
                  f"{unaccounted} unaccounted for in {len(streams)} streams"),
            Check("the known share was lost, and nothing beside it",
                  int(streams["dropped"].sum()) == known > 0,
                  f"{int(streams['dropped'].sum()):,} of {known:,}"),
            Check("an idle pull never comes while the stream is busy",
                  bool((idle["resyncs_busy"] <= idle["pauses"]).all()),
                  f"{int(idle['resyncs_busy'].sum())} in {len(idle)} streams with "
                  f"{int(idle['pauses'].sum())} pauses of the writer"),
            Check("so what was lost is missing for as long as it is", broken.anomalies > 0,
                  str(broken)),
            Check("and at its end all of it", bool((idle["lost_at_end"] == idle["lost"]).all()),
                  f"{int(idle['lost_at_end'].sum())} of {int(idle['lost'].sum())}"),
            Check("after it, the idle pull makes the copy right",
                  bool((idle["resyncs"] > idle["resyncs_busy"]).all()),
                  f"{idle['healed_ns'].median() / 1e9:,.2f} s later"),
            Check("without losses nothing is missing",
                  control.anomalies == 0 < control.operations, str(control)),
            Check("a pull when a loss shows keeps it from growing",
                  fixed.anomalies == 0 < fixed.operations and most[0] < most[1],
                  f"{fixed}; {most[0]:,.0f} and {most[1]:,.0f} missing at a time"),
        ),
    )  # fmt: skip
