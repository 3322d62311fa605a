"""Judges experiment 49: whether an outer map ever lacks a key whose inner map is switched."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_SWITCHED = "hash of maps, switched"
_OFTEN = 0.01  # of the switches: far below what a kernel shows that has the gap


@judges("outer-map-null")
def outer_map_null(run: Run) -> Finding:
    """An outer array never lacks a key; an outer hash often or never, as the kernel has it."""
    broken, control, fixed = run.count("broken"), run.count("control"), run.count("fixed")
    lookups = run.table("lookups")
    switched = lookups[lookups["case"] == _SWITCHED]
    absent, switches = int(switched["absent"].sum()), int(switched["writes"].sum())
    often = absent >= _OFTEN * switches
    how = "takes an element out and puts a new one in" if absent else "writes in place"
    return Finding(
        run.experiment,
        f"While {switches:,} inner maps of an outer hash were switched, a program that looked them "
        f"up found none {absent:,} times: this kernel {how}. In an outer array that happened "
        f"{fixed.anomalies:,} times, in a plain hash of the same keys {broken.anomalies:,} times.",
        (
            Check("the arrangement finds the gap where it is: a plain hash, overwritten",
                  broken.anomalies > 0, str(broken)),
            Check("no key is absent while nobody switches",
                  control.anomalies == 0 < control.operations, str(control)),
            Check("an outer array never lacks a key", fixed.anomalies == 0 < fixed.operations,
                  str(fixed)),
            Check("an outer hash does at many switches, or at none",
                  switches > 0 and (often or absent == 0), f"{absent:,} in {switches:,} switches"),
        ),
    )  # fmt: skip
