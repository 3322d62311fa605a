"""What this kernel and machine can do, found out by trying, never by a version number.

Each feature is tried the way the lab uses it: a small program of that kind is loaded,
attached and must be seen to run; a map of that kind must give back what was stored. The
kernel's own refusal is kept as the answer. A trial runs in a child process with a time limit,
so that neither a hung load nor a crash reaches the caller, and leaves nothing. Answers are kept
for the life of the process.
"""

from __future__ import annotations

import functools
import json as json_format
import platform
import sys
from dataclasses import asdict, dataclass

from labkit.errors import BadInput, LabError, TimedOut, Unavailable
from labkit.kernel.parallel import Child
from labkit.kernel.trials import TRIALS


@dataclass(frozen=True)
class Feature:
    """What was found out about one feature.

    Attributes
    ----------
    name : str
        As given to :func:`probe`.
    works : bool
        It was tried, and did what the lab needs of it.
    answer : str
        What the kernel or tool answered, in its own words where it has some.
    remedy : str
        What to do where it does not work; empty where it does.
    """

    name: str
    works: bool
    answer: str
    remedy: str


def names() -> tuple[str, ...]:
    """Names of all features, in the order of the table."""
    return tuple(TRIALS)


@functools.cache
def probe(name: str) -> Feature:
    """Try one feature, once per process.

    Parameters
    ----------
    name : str
        One of :func:`names`.

    Returns
    -------
    Feature
        Never raises for what the machine lacks.

    Raises
    ------
    BadInput
        There is no such feature.
    """
    if name not in TRIALS:
        raise BadInput(f"There is no feature {name!r}; there are {', '.join(TRIALS)}.")
    trial = TRIALS[name]
    if sys.platform != "linux":
        return Feature(
            name,
            False,
            f"this system is {platform.system()}, not Linux",
            "use the virtual machine: vagrant up",
        )
    for needed in trial.needs:
        if not (other := probe(needed)).works:
            return Feature(name, False, f"not tried without {needed}", other.remedy)
    remedy = trial.remedy
    try:
        with Child(trial.run) as child:
            return Feature(name, True, str(child.result(trial.limit_s)), "")
    except Unavailable as error:  # it knows better what to do than the trial
        answer, colon, better = str(error).removesuffix(".").rpartition(": ")
        answer, remedy = (answer, better) if colon else (better, remedy)
    except TimedOut:
        answer = f"no answer within {trial.limit_s:g} s"
    except OSError as error:
        answer = str(error.args[-1] if error.args else error)
    except LabError as error:
        answer = str(error).removesuffix(".")
    except Exception as error:  # whatever a strange machine comes up with is its answer
        answer = f"{type(error).__name__}: {error}"
    return Feature(name, False, answer, remedy)


def features() -> list[Feature]:
    """Try every feature.

    Returns
    -------
    list of Feature
        In the order of :func:`names`. The first call takes a second or two, and some more
        where bcc compiles slowly.
    """
    return [probe(name) for name in TRIALS]


def essential() -> tuple[str, ...]:
    """Names of the features without which the lab cannot measure on any kernel."""
    return tuple(name for name, trial in TRIALS.items() if trial.essential)


def require(*names: str) -> None:
    """Demand that features work.

    Parameters
    ----------
    *names : str
        Of :func:`names`.

    Raises
    ------
    Unavailable
        Of the first that does not: its name, the kernel's answer and the remedy, in one
        sentence.
    BadInput
        There is no such feature.
    """
    for feature in map(probe, names):
        if not feature.works:
            raise Unavailable(
                f"This needs the feature {feature.name}, which does not work here "
                f"({feature.answer}): {feature.remedy}."
            )


def doctor(json: bool = False) -> tuple[str, int]:
    """Examine the machine for a user or a script.

    Parameters
    ----------
    json : bool
        Text for programs in place of a table.

    Returns
    -------
    str
        The table; or a JSON object with ``kernel``, ``ready`` and ``features``, a list of
        objects with name, works, answer, remedy, essential.
    int
        Exit status: 0 where every essential feature works, else that of `Unavailable`.
    """
    found = features()
    lacking = [f for f in found if not f.works and TRIALS[f.name].essential]
    status = Unavailable.status if lacking else 0
    if json:
        return json_format.dumps(
            {
                "kernel": platform.release(),
                "ready": not lacking,
                "features": [asdict(f) | {"essential": TRIALS[f.name].essential} for f in found],
            },
            indent=2,
        ), status
    width = max(len(f.name) for f in found)
    lines = [f"{'feature':{width}}  works  answer, and what to do"]
    for f in found:
        works = "yes" if f.works else "NO" if TRIALS[f.name].essential else "no"
        lines.append(f"{f.name:{width}}  {works:5}  {f.answer}")
        if f.remedy:
            lines.append(f"{'':{width}}         -> {f.remedy}")
    if lacking:
        lines.append(f"\nNot ready: the lab needs {', '.join(f.name for f in lacking)} everywhere.")
    else:
        lines.append("\nReady: all that the lab needs everywhere works on this kernel.")
    return "\n".join(lines), status
