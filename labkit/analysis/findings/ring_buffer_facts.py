"""Judges experiment 32: sizes, losses and wakeups of a ring buffer."""

from __future__ import annotations

import errno

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_REFUSED_SIZE = "size: no power of two, or no whole pages"
_FULL = "full ring, told by the reader"
_NO_WAKEUP = "NO_WAKEUP, reader waits"


@judges("ring-buffer-facts")
def ring_buffer_facts(run: Run) -> Finding:
    """Powers of two in whole pages; losses that only the program knows; wakeups by flag."""
    sizes, fillings, query = (run.table(name) for name in ("sizes", "fillings", "query"))
    consumers = run.table("consumers").set_index("consumer")
    refused, taken = run.count("broken", _REFUSED_SIZE), run.count("control", _taken(run))
    rounded = run.count("fixed", "size: rounded up")
    full, fits = run.count("broken", _FULL), run.count("control", "as many records as fit")
    counted = run.count("fixed", "full ring, counted by the program")
    asleep, silent = run.count("broken", _NO_WAKEUP), run.count("control", "nothing is sent")
    told = [run.count("fixed", case) for case in run.cases("fixed") if case.endswith("waits")]
    over = fillings[fillings["sent"] > fillings["room"]]
    known = query[query["name"] != "unknown"]
    ways = ", ".join(
        f"{name} {delivered:,} of {sent:,} ({100 * delivered / sent:.0f} %)"
        for name, delivered, sent in zip(
            consumers.index, consumers["delivered"], consumers["sent"], strict=True
        )
    )
    missing = consumers["sent"] - consumers["delivered"]
    rings = consumers.index.str.startswith("ring")
    return Finding(
        run.experiment,
        f"A ring took every size that is a power of two and whole pages, and refused {refused} "
        f"others. Full, it lost {full} records, and none of its four queries tells that; "
        f"the program's own count left {counted} unexplained. NO_WAKEUP left the waiting reader "
        f"asleep in {asleep} waits. At full speed, of {int(consumers['sent'].max()):,} records "
        f"each: {ways}.",
        (
            Check(
                "a size that is no power of two, or no whole pages, is refused with EINVAL",
                refused.anomalies == refused.operations > 0
                and set(sizes.loc[~sizes["takes"], "answer"]) == {-errno.EINVAL},
                f"{refused} sizes",
            ),
            Check(
                "a power of two of whole pages is taken",
                taken.operations > 0 and taken.anomalies == 0 and rounded.anomalies == 0,
                f"refused {taken}; rounded up {rounded}",
            ),
            Check(
                "exactly floor((size - 1) / (header + record)) records fit",
                bool((fillings["delivered"] == fillings[["sent", "room"]].min(axis=1)).all())
                and fits.operations > 0
                and fits.anomalies == 0,
                ", ".join(
                    f"{room} of {size} B"
                    for size, room in zip(over["record_bytes"], over["room"], strict=True)
                ),
            ),
            Check(
                "a full ring drops, with EAGAIN to the program",
                full.anomalies > 0 and set(over["answer"]) == {-errno.EAGAIN},
                f"{full} records",
            ),
            Check(
                "produced = delivered + what the program counted",
                counted.operations > 0 and counted.anomalies == 0,
                f"{counted} unexplained",
            ),
            Check(
                "queries tell unread bytes, size and positions, and nothing else",
                bool((query["answer"] == query["expected"]).all()) and len(known) > 0,
                f"{int((query['answer'] == query['expected']).sum())} of {len(query)} answers, "
                f"{int((query['name'] == 'unknown').sum())} of them 0 for an unknown flag",
            ),
            Check(
                "NO_WAKEUP leaves the waiting reader asleep",
                asleep.anomalies == asleep.operations > 0,
                f"{asleep} waits",
            ),
            Check(
                "the default and FORCE_WAKEUP wake it",
                len(told) == 2 and all(one.operations > 0 == one.anomalies for one in told),
                ", ".join(f"{one} not woken" for one in told),
            ),
            Check(
                "nothing wakes it where nothing is sent",
                silent.operations > 0 and silent.anomalies == 0,
                f"{silent} waits",
            ),
            Check(
                "of every consumer, produced = delivered + refused",
                bool((missing == consumers["refused"]).all()) and len(consumers) > 0,
                ways,
            ),
            Check(
                "the perf buffer tells its losses with the next record, a ring buffer never",
                not consumers.loc[rings, "told_lost"].any()
                and bool((consumers["told_lost"] == consumers["refused"])[~rings].all())
                and not rings.all(),
                f"{int(consumers['told_lost'].sum()):,} told",
            ),
        ),
    )


def _taken(run: Run) -> str:
    return next(case for case in run.cases("control") if case.startswith("size"))
