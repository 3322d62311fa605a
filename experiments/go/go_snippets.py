"""The article's code in Go, given to the compiler: what does not compile, and what does instead."""

from __future__ import annotations

import difflib
import itertools
import re
from pathlib import Path

import pandas as pd

from experiments import go_program
from labkit.kernel import leftovers
from labkit.lab.experiment import Case, Statement, Tables, experiment, say
from labkit.runs import Triad

_PACKAGES = "snippets"
_PRINTED, _REPAIRED = "printed", "repaired"
_LINE = re.compile(rf"(\w+)/({_PRINTED}|{_REPAIRED})/\w+\.go:(\d+):\d+: (.*)")

# A folder of experiments/go/module/snippets, and the words of the compiler that are the finding.
_REFUSED = {
    "newmap": ("2.1", "NewMap with PinPath", ("PinPath",)),
    "mapread": ("2.2", "Map.Read and Map.Get", ("Read", "Get")),
    "doublemap": ("4.3", "the swap of two sync.Maps", ("expected", "*unsafe.Pointer")),
    "ringreader": (
        "4.1", "a reader with Events, Lost, ...", ("Events", "Lost", "Available", "Consumed")
    ),
}  # fmt: skip
_ACCEPTED = {
    "bpfsyscall": ("2.2", "Syscall6(SYS_BPF, ...)"),
    "maprace": ("2.3", "a map that is read and written"),
    "pollloop": ("3.2", "the poll of an HTTP status"),
}
_PATTERNS = {
    name: [
        f"undefined .* no field or method {word}\\)|unknown field {word} in|not used: {word}$"
        f"|value of type {re.escape(word)}\\)"
        for word in words
    ]
    for name, (_, _, words) in _REFUSED.items()
}


def _derived(tables: Tables) -> Tables:
    """Builds that failed, and whether the compiler said each word that is the finding."""
    builds, lines = tables["builds"], tables["lines"]
    triad = Triad("build refused")
    for (variant, case), some in builds.groupby(["variant", "case"], sort=False):
        triad.add(
            str(variant), case=str(case), operations=len(some), anomalies=int(some["refused"].sum())
        )
    expected = [
        {
            "case": name,
            "version": version,
            "word": word,
            "said": bool(said["words"].str.contains(pattern, regex=True).any()),
        }
        for version in builds["version"].unique()
        for name, patterns in _PATTERNS.items()
        for word, pattern in zip(_REFUSED[name][2], patterns, strict=True)
        if (said := lines[(lines["case"] == name) & (lines["version"] == version)]) is not None
    ]
    said_by = lines.groupby(["case", "line", "words"], sort=False)["version"].agg(", ".join)
    return {
        "counts": triad.table(),
        "expected": pd.DataFrame(expected),
        "compiler": said_by.rename("versions").reset_index(),
    }


@experiment(
    "go-snippets",
    number=81,
    family="go",
    question="Does the article's code in Go compile?",
    claims=("2.1c", "2.2a", "2.2b", "4.1", "4.3a"),
    needs=("go", "cilium_ebpf"),
    quick={},
    full={},
    cases=(
        *(Case("broken", name, f"{where}: {what}") for name, (where, what, _) in _REFUSED.items()),
        *(Case("control", name, f"{where}: {what}") for name, (where, what) in _ACCEPTED.items()),
        *(Case("fixed", f"{name}-{_REPAIRED}", f"{where}: {what}, repaired")
          for name, (where, what, *_) in (_REFUSED | _ACCEPTED).items()),
    ),
    derive=_derived,
    statements=(
        Statement("no version of cilium/ebpf lets these compile", "all(broken)"),
        Statement("for the reasons that are given", "all(expected.said)"),
        Statement("these compile, whatever they do when they run",
                  'none(control)'),
        Statement("each has a repair that compiles with the newest version",
                  'none(fixed)'),
    ),
    sentence="With {rows(builds(case='newmap'))} versions of cilium/ebpf the compiler refused "
    "{broken} builds of what the article prints, {control} of the snippets whose faults only show "
    "when they run, and {fixed} repairs.",
)  # fmt: skip
def go_snippets() -> Tables:
    """Compile the article's code, and a repair of each, with every version of cilium/ebpf here.

    What is compiled is what the article is known to print: names, fields, calls and types are as
    the ledger of claims quotes them, and the rest is the least that makes a package of it. Each
    source says at its head what is quoted.

    Returns
    -------
    dict of DataFrame
        ``builds``: ``variant``, ``case``, ``version`` (of cilium/ebpf), ``refused`` (bool).
        Repairs are built with the newest version alone. ``lines``: what the compiler said of the
        printed code, a row for each line: ``case``, ``version``, ``line`` (of the file),
        ``words``. ``repairs``: ``case``, ``printed``, ``repaired``: the lines in which the sources
        of what was refused differ.
    """
    builds, lines = [], []
    for version, libraries in go_program.versions().items():
        say(f"compiling with cilium/ebpf {version}")
        with leftovers.temporary_folder() as folder:
            said = go_program.complaints(_PACKAGES, libraries, folder)
        found = [match.groups() for line in said if (match := _LINE.fullmatch(line))]
        refused = {(name, form) for name, form, _, _ in found}
        for variant, names in (("broken", _REFUSED), ("control", _ACCEPTED)):
            builds += [
                {"variant": variant, "case": name, "version": version,
                 "refused": (name, _PRINTED) in refused}
                for name in names
            ]  # fmt: skip
        lines += [
            {"case": name, "version": version, "line": int(line), "words": words}
            for name, form, line, words in found
            if form == _PRINTED
        ]
    builds += [
        {"variant": "fixed", "case": f"{name}-{_REPAIRED}", "version": version,
         "refused": (name, _REPAIRED) in refused}
        for name in (*_REFUSED, *_ACCEPTED)
    ]  # fmt: skip
    return {
        "builds": pd.DataFrame(builds),
        "lines": pd.DataFrame(lines, columns=["case", "version", "line", "words"]),
        "repairs": pd.DataFrame([row for name in _REFUSED for row in _repairs(name)]),
    }


def _repairs(name: str) -> list[dict[str, str]]:
    printed, repaired = (
        _code(go_program.MODULE / _PACKAGES / name / form / f"{form}.go")
        for form in (_PRINTED, _REPAIRED)
    )
    compared = difflib.SequenceMatcher(None, printed, repaired, autojunk=False)
    return [
        {"case": name, _PRINTED: before, _REPAIRED: after}
        for tag, a, b, c, d in compared.get_opcodes()
        if tag != "equal"
        for before, after in itertools.zip_longest(printed[a:b], repaired[c:d], fillvalue="")
    ]


def _code(path: Path) -> list[str]:
    """The lines of a source that do something, without their indentation."""
    lines = path.read_text().partition("package snippet")[2].splitlines()
    return [line.strip() for line in lines if re.search(r"\w", line)]
