"""Judges experiment 42: where the delay goes when a change is polled for over HTTP."""

from __future__ import annotations

import pandas as pd

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import SLOWER, Run

_PARTS = ["wait", "name lookup", "connect", "TLS", "request", "server", "compare"]
_CHEAP, _DEAR = "plain, kept", "TLS, new connection"
_LEAST, _MOST = 0.3, 0.75  # mean wait over period: the uniform law gives 0.5, as for poll-period


@judges("http-poll")
def http_poll(run: Run) -> Finding:
    """The parts make up the delay, half a period is wait, and an ignored error is no answer."""
    polls, changes, requests = run.table("polls"), run.table("changes"), run.table("requests")
    control, broken, fixed = (run.count(variant) for variant in ("control", "broken", "fixed"))
    refused = requests.groupby("variant")["refused"].sum()
    logged = int(polls["false"].sum())
    counted = control.anomalies + broken.anomalies + fixed.anomalies
    sums = changes[_PARTS].sum(axis=1) == changes["delay"]
    of_poll = polls[_PARTS[1:]].sum(axis=1).groupby(polls["case"]).median() / 1e6
    wait = (changes["wait"] / changes["delay"]).groupby(changes["case"]).median()
    ignored = polls[polls["case"].isin(run.cases("broken"))]
    period_ms = float(str(run.parameters["period_ms"])) * (SLOWER if run.emulated else 1)
    waited = changes.loc[changes["case"] == _CHEAP, "wait"].mean()
    of_period = float(waited) / 1e6 / period_ms
    return Finding(
        run.experiment,
        f"Over a plain connection that is kept, {wait[_CHEAP]:.0%} of a change's delay was the "
        f"wait for the next poll. The poll itself took {of_poll[_CHEAP]:.2g} ms there, and "
        f"{of_poll[_DEAR]:.2g} ms with TLS and a new connection each time. A client that ignores "
        f"errors believed {broken} times wrongly that nothing had changed; one that heeds them "
        f"{fixed}.",
        (
            Check(
                "the parts of every delay add up to it, to the nanosecond",
                bool(sums.all()) and bool((changes[_PARTS] >= 0).all(axis=None)),
                f"{int(sums.sum())} of {len(sums)} changes",
            ),
            Check(
                "the wait is half a period in the mean, where the connection is plain and kept",
                _LEAST <= of_period <= _MOST,
                f"{of_period:.2f} of {period_ms:g} ms",
            ),
            Check(
                "which is most of the delay",
                bool(wait[_CHEAP] > 0.5),
                f"{wait[_CHEAP]:.0%}, the median over changes",
            ),
            Check(
                "TLS on a new connection makes the poll itself longer",
                bool(of_poll[_DEAR] > of_poll[_CHEAP]),
                f"{of_poll[_DEAR]:.2g} ms against {of_poll[_CHEAP]:.2g} ms, medians",
            ),
            Check(
                "every request that was sent was served",
                bool((requests["served"] == requests["polls"]).all()),
                f"{requests['served'].sum()} of {requests['polls'].sum()}",
            ),
            _connections(requests),
            Check("a server that answers hides no change", control.anomalies == 0, str(control)),
            Check(
                "ignored errors pass for no change, and nothing else does",
                0 < broken.anomalies <= int(refused["broken"])
                and bool(ignored.loc[ignored["false"], "refused"].all())
                and logged == counted,
                f"{broken} polls, of which {refused['broken']} were refused",
            ),
            Check(
                "errors that are heeded hide no change",
                fixed.anomalies == 0 and int(refused["fixed"]) > 0,
                f"{fixed}, of which {refused['fixed']} were refused",
            ),
        ),
    )


def _connections(requests: pd.DataFrame) -> Check:
    kept = requests["case"].str.contains("kept")
    wanted = requests["polls"].where(~kept, 1)
    return Check(
        "a kept connection is opened once, and the others once a poll",
        bool((requests["connections"] == wanted).all()) and bool(kept.any()),
        f"{requests.loc[kept, 'connections'].sum()} for {requests.loc[kept, 'polls'].sum()} polls, "
        f"{requests.loc[~kept, 'connections'].sum()} for {requests.loc[~kept, 'polls'].sum()}",
    )
