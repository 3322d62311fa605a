"""Judges experiment 56: whether a lookup in an outer map waits for the kernel's readers."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_ASKED = "lookup in the outer map, by a process"
_NEARLY_ALL, _HARDLY_ANY = 0.9, 0.1  # other load on the CPU may hold up a call now and then


@judges("outer-lookup-wait")
def outer_lookup_wait(run: Run) -> Finding:
    """A switch waits and a program's lookup does not; a process's lookup does one or the other."""
    broken, control, fixed = run.count("broken"), run.count("control"), run.count("fixed")
    calls = run.table("calls")
    asked = calls[calls["case"] == _ASKED]
    waited, total = int(asked["waited"].sum()), int(asked["calls"].sum())
    waits = waited >= _NEARLY_ALL * total
    verb = "waited" if waits else "did not wait"
    return Finding(
        run.experiment,
        f"A process that looked up which inner map is in force {verb} for the kernel's readers: "
        f"{waited} of {total} lookups took as long as a switch does, "
        f"which waited in {broken}. A program's lookup waited in {fixed}, a lookup in a plain "
        f"array in {control}.",
        (
            Check("a switch of the inner map waits", broken.rate >= _NEARLY_ALL, str(broken)),
            Check("a lookup in a plain array does not",
                  control.operations > 0 and control.rate <= _HARDLY_ANY, str(control)),
            Check("nor does a program's lookup in the outer map",
                  fixed.operations > 0 and fixed.rate <= _HARDLY_ANY, str(fixed)),
            Check("a process's lookup in it waits always, or never",
                  total > 0 and (waits or waited <= _HARDLY_ANY * total), f"{waited} of {total}"),
        ),
    )  # fmt: skip
