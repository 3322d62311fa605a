"""Runs: what an experiment observed, with what, and where; in memory and on disk."""

from labkit.runs.disk import (
    PARTIAL,
    RECORDED,
    REPLACED,
    SCHEMA_VERSION,
    described,
    latest,
    load,
    natural,
    record,
    recorded,
    save,
)
from labkit.runs.index import Complete, RunIndex, Usual, series
from labkit.runs.run import PROFILES, SLOWER, VARIANTS, BadRun, Count, Run, SaveFailed, Triad

__all__ = [
    "PARTIAL",
    "PROFILES",
    "RECORDED",
    "REPLACED",
    "SCHEMA_VERSION",
    "SLOWER",
    "VARIANTS",
    "BadRun",
    "Complete",
    "Count",
    "Run",
    "RunIndex",
    "SaveFailed",
    "Triad",
    "Usual",
    "described",
    "latest",
    "load",
    "natural",
    "record",
    "recorded",
    "save",
    "series",
]
