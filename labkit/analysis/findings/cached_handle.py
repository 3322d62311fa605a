"""Judges experiment 3: a kept handle to a map that was unpinned and made again."""

from __future__ import annotations

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_COMPARED = "ids compared before each write"


@judges("cached-handle")
def cached_handle(run: Run) -> Finding:
    """All traffic is cut off behind a kept handle, none once ids are compared."""
    broken, control = run.count("broken"), run.count("control")
    cured = {case: run.count("fixed", case) for case in run.cases("fixed")}
    table = run.table("recreations")
    kept = table[table["variant"] == "broken"]
    writes, confirmed = int(kept["writes"].sum()), int(kept["read_back"].sum())
    told = int((kept["handle_id"] != kept["path_id"]).sum())
    obeyed = int((table["path_id"] == table["obeyed_id"]).sum())
    reopened = table[table["case"] == _COMPARED]["reopened"]
    cost = run.count("fixed", _COMPARED).cost_ns - control.cost_ns
    return Finding(
        run.experiment,
        f"Once the map was made again behind its pin, {broken} datagrams of an allowed peer "
        f"were cut off, though all writes through the kept handle succeeded and its own "
        f"lookups confirmed {confirmed:,} of {writes:,}. With the map left in place {control} "
        f"were. Comparing the id behind the path with the id behind the handle before each "
        f"write brought it to {cured[_COMPARED]}, for {cost / 1e3:.1f} µs more a write in Python.",
        (
            Check("everything written through the kept handle is lost on the program",
                  broken.anomalies == broken.operations > 0, str(broken)),
            Check("the handle's own lookups confirm every write", confirmed == writes > 0,
                  f"{confirmed:,} of {writes:,}"),
            Check("the ids behind handle and path differ each time",
                  told == len(kept) > 0, f"{told} of {len(kept)}"),
            Check("the attached program always uses the map behind the path",
                  obeyed == len(table), f"{obeyed} of {len(table)}"),
            Check("no datagram is cut off while the map stays",
                  control.anomalies == 0 < control.operations, str(control)),
            *(Check(f"cured by: {case}", count.anomalies == 0 < count.operations, str(count))
              for case, count in cured.items()),
            Check("comparing ids opens the path once for each new map",
                  bool((reopened == 1).all()) and len(reopened) > 0,
                  f"{int(reopened.sum())} for {len(reopened)}"),
        ),
    )  # fmt: skip
