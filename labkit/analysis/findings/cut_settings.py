"""Judges experiment 26: settings cut from 1,024 to 512 bytes."""

from __future__ import annotations

import pandas as pd

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_BROKEN = ("map of 512 B", "Redis, proxy cuts")
_OUTCOMES = ["texts", "intact", "error", "less", "noticed", "refused"]


@judges("cut-settings")
def cut_settings(run: Run) -> Finding:
    """A cut shows as an error in one format and not at all in others."""
    outcomes = run.table("outcomes")
    longer = outcomes[outcomes["above_bytes"] >= 512]
    cut = longer[longer["variant"] == "broken"]
    by_format: pd.DataFrame = cut.groupby("format")[_OUTCOMES].sum()
    document = by_format.loc["one JSON document"]
    lines = by_format.loc["JSON lines"]
    aligned = by_format.drop(index=["one JSON document", "JSON lines"]).sum()
    total = cut[_OUTCOMES].sum()
    by_map, by_redis = (
        cut[cut["case"] == case].groupby("format")[_OUTCOMES].sum().sort_index() for case in _BROKEN
    )
    control = outcomes.loc[outcomes["variant"] == "control", _OUTCOMES].sum()
    checked = longer[longer["case"].str.endswith("CRC-32")][_OUTCOMES].sum()
    refusing = longer[longer["case"].isin(["map of 512 B, labkit Map", "Redis, proxy refuses"])]
    refused = refusing[_OUTCOMES].sum()
    versioned = outcomes[outcomes["case"] == "layout version in the map's name"][_OUTCOMES].sum()
    fixed = outcomes.loc[outcomes["variant"] == "fixed", _OUTCOMES].sum()
    checks = (
        Check(
            "cut values come out less or do not parse, and nobody tells the writer",
            total["texts"] > 0 == total["refused"] + total["noticed"]
            and all(run.count("broken", case).anomalies > 0 for case in run.cases("broken")),
            f"{total['less'] + total['error']:,} of {total['texts']:,} gone wrong, "
            f"{total['refused'] + total['noticed']:,} writers told",
        ),
        Check(
            "one JSON document does not parse any more once it is cut",
            bool(document["error"] == document["texts"] > 0),
            f"{document['error']:,} of {document['texts']:,} errors",
        ),
        Check(
            "lines that end at the cut, or a tolerant reader, give less without an error",
            bool(aligned["less"] == aligned["texts"] > 0),
            f"{aligned['less']:,} of {aligned['texts']:,} silently less",
        ),
        Check(
            "lines of any length give an error, or less where the cut falls between two of them",
            bool(lines["texts"] == lines["intact"] + lines["error"] + lines["less"])
            and bool(lines["error"] > 0),
            f"{lines['error']:,} errors, {lines['less']:,} silently less of {lines['texts']:,}",
        ),
        Check(
            "a Redis behind a cutting proxy gives what the map gives",
            len(by_map) > 0 and by_map.equals(by_redis),
            f"{by_redis['less'].sum():,} silently less and {by_redis['error'].sum():,} errors, "
            f"map {by_map['less'].sum():,} and {by_map['error'].sum():,}",
        ),
        Check(
            "without a limit every text arrives",
            control["intact"] == control["texts"] > 0 == run.count("control").anomalies,
            f"{control['intact']:,} of {control['texts']:,} intact",
        ),
        Check(
            "with length and checksum in the value the reader notices every cut",
            checked["noticed"] == checked["texts"] > 0,
            f"{checked['noticed']:,} of {checked['texts']:,}",
        ),
        Check(
            "labkit's Map and a refusing proxy tell the writer of every value that is too long",
            refused["refused"] == refused["texts"] > 0,
            f"{refused['refused']:,} of {refused['texts']:,}",
        ),
        Check(
            "writer and reader that find the map by layout version get every text",
            versioned["intact"] == versioned["texts"] > 0,
            f"{versioned['intact']:,} of {versioned['texts']:,} intact",
        ),
        Check(
            "no cure lets a reader parse anything but what was written",
            fixed["less"] + fixed["error"] + run.count("fixed").anomalies == 0,
            f"{fixed['less']:,} silently less, {fixed['error']:,} errors of {fixed['texts']:,}",
        ),
    )
    return Finding(
        run.experiment,
        f"Of {total['texts']:,} settings that were cut to 512 bytes, in a map and in a real Redis, "
        f"{total['less']:,} parsed without an error to less than was written and "
        f"{total['error']:,} gave a parse error, all by their format; no writer was told. Length "
        f"and checksum in the value showed {checked['noticed']:,} of {checked['texts']:,} cuts at "
        f"{_checksum_cost(outcomes):+.1f} us a text in Python, refusing told the writer of "
        f"{refused['refused']:,} of {refused['texts']:,}, and a layout version in the map's name "
        f"kept {versioned['intact']:,} of {versioned['texts']:,} texts intact.",
        checks,
    )


def _checksum_cost(outcomes: pd.DataFrame) -> float:
    """Microseconds that length and checksum add to a text that arrives either way."""
    short = outcomes[outcomes["above_bytes"] < 448]
    plain, checked = (
        short.loc[short["case"] == case, "carry_ns"].median()
        for case in ("map of 512 B", "map of 512 B, length and CRC-32")
    )
    return float(checked - plain) / 1e3
