"""The figures that decided a statement, in words for who does not read its language."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Final

from labkit.runs import VARIANTS, Run

_OF_ONE: Final = {"sum": "sum of", "max": "largest", "min": "smallest", "mean": "mean",
                  "median": "median", "first": "first", "last": "last", "rows": "rows of",
                  "share": "share of", "spread": ""}  # fmt: skip
_SIGNS: Final = {
    ast.Lt: "below", ast.LtE: "at most", ast.Eq: "equal to", ast.NotEq: "other than",
    ast.GtE: "at least", ast.Gt: "above", ast.Add: "+", ast.Sub: "−", ast.Mult: "×", ast.Div: "/",
}  # fmt: skip
_UNITS: Final = re.compile(r"_(ns|us|ms|s|bytes|kb|mb)$")
_INTERVAL: Final = re.compile(r"^(\S+) \[(.+)\]$")


def plainly(figures: Sequence[tuple[str, str]], run: Run | None) -> str:
    """Tell figures in words.

    Parameters
    ----------
    figures
        As `labkit.judge.language.Answer` has them: what the statement calls each, and its value.
    run
        Where they come from; it knows the labels of cases and what its anomaly is called.

    Returns
    -------
    str
        ``"evicted: 512 of 1,024"``, or ``"p99 of hybrid was 13.6x that of events (9 to 15)"``.
    """
    several = len(figures) > 1
    return "; ".join(
        _told(ast.parse(name, mode="eval").body, value, run, several) for name, value in figures
    )


def _told(node: ast.expr, value: str, run: Run | None, several: bool) -> str:
    if (ratio := _ratio(node, value)) is not None:
        return ratio
    spread = _INTERVAL.match(value)
    value = f"{spread[1]} ({spread[2]})" if spread else value
    counted = node.value if isinstance(node, ast.Attribute) and node.attr == "anomalies" else node
    if run is not None and (cases := _cases(counted, run)) is not None:
        words, ids = cases
        anomalies = run.counts.loc[run.counts["case"].isin(ids), "anomaly"].unique()
        return f"{', '.join([words] * several + [*anomalies[:1]])}: {value}"
    return f"{_phrase(node)}: {value}"


def _cases(node: ast.expr, run: Run) -> tuple[str, list[str]] | None:
    """What a choice of cases is called, and their ids; None where it is something else."""
    if isinstance(node, ast.Name) and node.id in VARIANTS:
        return node.id, list(run.cases(node.id))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in VARIANTS:
        return _phrase(node), list(run.cases(node.func.id))
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        ids = [str(one) for one in _values(node.slice)]
        return ", ".join(map(run.label, ids)), ids
    return None


def _ratio(node: ast.expr, value: str) -> str | None:
    """A ratio of one column between two choices of rows, as a sentence."""
    spread = _INTERVAL.match(value)
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "ratio" and spread):
        return None
    above, below = node.args
    if not (isinstance(above, ast.Attribute) and isinstance(below, ast.Attribute)):
        return f"ratio of {_phrase(above)} to {_phrase(below)}: {spread[1]}x ({spread[2]})"
    ours, theirs = _filters(above.value), _filters(below.value)
    mine, other = (
        ", ".join(text for name, text in chosen.items() if against.get(name) != text)
        for chosen, against in ((ours, theirs), (theirs, ours))
    )
    what = _UNITS.sub("", above.attr).replace("_", " ")
    if above.attr != below.attr or not (mine and other):
        return f"ratio of {_phrase(above)} to {_phrase(below)}: {spread[1]}x ({spread[2]})"
    return f"{what} of {mine} was {spread[1]}x that of {other} ({spread[2]})"


def _filters(node: ast.expr) -> dict[str, str]:
    """What chooses rows, by the names of columns."""
    if isinstance(node, ast.Name) and node.id not in VARIANTS:
        return {"": _phrase(node)}
    if not isinstance(node, ast.Call):
        return {}
    return {
        **{str(place): _phrase(one) for place, one in enumerate(node.args)},
        **{one.arg or "": _phrase(one.value) for one in node.keywords},
    }


def _values(node: ast.expr) -> list[object]:
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return [one.value for one in parts if isinstance(one, ast.Constant)]


def _phrase(node: ast.expr) -> str:
    """An expression in words."""
    match node:
        case ast.Constant(value=value):
            return f"{value:,}" if isinstance(value, int | float) else str(value)
        case ast.Name():
            return node.id.replace("_", " ")
        case ast.Tuple():
            return " or ".join(map(_phrase, node.elts))
        case ast.Attribute(value=ast.Name(id="parameters" | "machine")):
            return node.attr.replace("_", " ")
        case ast.Attribute():
            unit = _UNITS.search(node.attr)
            words = _UNITS.sub("", node.attr).replace("_", " ") + (f" in {unit[1]}" if unit else "")
            chosen = ", ".join(_filters(node.value).values())
            return f"{words} ({chosen})" if chosen else words
        case ast.Call(func=ast.Name(id=name)) if name in _OF_ONE and len(node.args) == 1:
            return f"{_OF_ONE[name]} {_phrase(node.args[0])}".strip()
        case ast.Call(func=ast.Name(id="rounds")):
            return ", ".join(_filters(node).values())
        case ast.Call():
            return f"{_phrase(node.func)} ({', '.join(_filters(node).values())})"
        case ast.Subscript():
            return " or ".join(map(str, _values(node.slice)))
        case ast.Compare():
            compared = _phrase(node.left)
            for sign, side in zip(node.ops, node.comparators, strict=True):
                compared += f" {_SIGNS[type(sign)]} {_phrase(side)}"
            return compared
        case ast.BinOp():
            left, right = (
                f"({_phrase(one)})" if isinstance(one, ast.BinOp) else _phrase(one)
                for one in (node.left, node.right)
            )
            return f"{left} {_SIGNS[type(node.op)]} {right}"
        case ast.BoolOp():
            return f" {type(node.op).__name__.lower()} ".join(map(_phrase, node.values))
        case ast.UnaryOp(op=ast.USub()):
            return f"−{_phrase(node.operand)}"
        case _:
            return ast.unparse(node)
