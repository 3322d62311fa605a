"""The lab's commands: ``python -m labkit``. Each is a thin shell over a function.

The exit status tells what kind of end it was: see `EXIT`.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from labkit import __version__, console
from labkit.errors import CAUSE_FOUND, FALLS_SHORT, BadInput, LabError, Unavailable
from labkit.kernel.tools import CHECKOUT

# What takes long to import is imported by the command that needs it.

REPORTS = (CHECKOUT or Path.cwd()) / "reports"
"""Where the report goes unless the caller says otherwise."""

EXIT = (
    "Exit status: 0 all is well; 1 a diagnosis has a cause; 2 the command was misused; 3 this "
    "machine lacks what it needs; 4 it could not do its work (the kernel refused, the disk is "
    "full, time was up); 5 a finding fails, a bar falls short, a verdict changed or a canary was "
    "not seen within its limit; 70 an error of the lab itself; 130 after Ctrl-C."
)
OWN_ERROR = 70
_MOST_ARGUMENT_BYTES = 4096  # PATH_MAX
_MOST_TIMES = 10_000
_READ_S = 1.0  # so long a watch that is over waits for who reads its lines
_OF_FILES = {
    errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.EROFS,
    errno.ENOSPC, errno.EDQUOT, errno.EIO,
}  # fmt: skip

_OF_LIMITS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_LEAST_DESCRIPTORS = 64

Command = Callable[[argparse.Namespace], int]


class _NotInstalled(Unavailable):
    """A command of the lab, where only what an agent needs was installed."""

    def __init__(self, package: str | None) -> None:
        super().__init__(
            f"This command needs the Python package {package}: pip install "
            "'map-freshness-lab[lab]' brings what experiments, figures and reports need."
        )


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("", "labkit", "experiments")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    arguments : sequence of str, optional
        By default those of the process.

    Returns
    -------
    int
        Exit status; see the module.
    """
    console.open_missing()
    _heed_signals()
    try:
        _require_descriptors()
        with console.guarded_output() as output:
            chosen = _parser().parse_args(_sized(sys.argv[1:] if arguments is None else arguments))
            chosen.output = output
            status: int = chosen.command(chosen)
        return status
    except LabError as error:
        return _complain(error)
    except KeyboardInterrupt:
        console.tell("\nInterrupted; what was running has been stopped and removed.")
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        return 0
    except Exception as error:
        if os.environ.get("LABKIT_TRACEBACK"):
            raise
        if isinstance(error, ModuleNotFoundError) and not _is_ours(error.name or ""):
            return _complain(_NotInstalled(error.name))
        if isinstance(error, OSError) and error.errno in _OF_FILES and error.filename:
            named = os.fsdecode(error.filename)
            console.tell(f"{named!r} cannot be used ({error.strerror}): name another.")
            return LabError.status
        if _is_of_a_limit(error):
            why = str(error) or "no memory is left"
            console.tell(f"A limit of this process is reached ({why}): raise it (ulimit -a).")
            return LabError.status
        what = " ".join(f"{type(error).__name__}: {error}".split())
        console.tell(
            f"This is an error of the lab itself ({what}). LABKIT_TRACEBACK=1 shows where."
        )
        return OWN_ERROR


def _is_of_a_limit(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) in _OF_LIMITS
        or str(error) == "can't start new thread"  # CPython's words, of a plain RuntimeError
    )


def _doctor(chosen: argparse.Namespace) -> int:
    from labkit.kernel import probe

    text, status = probe.doctor(chosen.json)
    print(text)
    return status


def _list(chosen: argparse.Namespace) -> int:
    from labkit.lab.catalogue import catalogue
    from labkit.lab.experiment import FAMILIES

    entries = [_entry(experiment) for experiment in catalogue().values()]
    if chosen.json:
        print(json.dumps(entries, indent=1))
        return 0
    width = max((len(entry["id"]) for entry in entries), default=0)
    for family, title in FAMILIES.items():
        of_family = [entry for entry in entries if entry["family"] == family]
        if of_family:
            print(f"{title} ({family})")
        for entry in of_family:
            print(f"  {entry['number']:>3}  {entry['id']:{width}}  {entry['question']}")
            known = ", ".join(f"{one['kernel']} {one['profile']}" for one in entry["recorded"])
            state = [entry["state"]] + ([f"recorded: {known}"] if known else [])
            claims = f"claims {', '.join(entry['claims'])}; " if entry["claims"] else ""
            print(f"       {'':{width}}  {claims}{'; '.join(state)}")
    return 0


def _entry(experiment: Any) -> dict[str, Any]:
    """What `list` tells of one experiment."""
    from labkit.lab.driver import missing as missing_features
    from labkit.runs import RECORDED

    missing = missing_features(experiment)
    return {
        "id": experiment.id,
        "number": experiment.number,
        "family": experiment.family,
        "question": experiment.question,
        "claims": list(experiment.claims),
        "features": list(experiment.needs),
        "state": "lacks: " + ", ".join(feature.name for feature in missing) if missing else "runs",
        "lacks": [feature.name for feature in missing],
        "recorded": [
            {"kernel": path.parts[-4], "profile": path.parts[-3]}
            for path in sorted(RECORDED.glob(f"*/*/{experiment.id}/run.json"))
        ],
        "profiles": {name: dict(values) for name, values in experiment.profiles.items()},
    }


def _run(chosen: argparse.Namespace) -> int:
    from labkit.lab.catalogue import catalogue, find
    from labkit.lab.measure import RUNS

    changed = dict(map(_setting, chosen.set))
    wanted = list(catalogue()) if "all" in chosen.experiment else chosen.experiment
    for id in wanted:  # all input is looked at before anything runs
        find(id).parameters(chosen.profile, changed)
    folder = Path(chosen.folder) if chosen.folder else RUNS
    return max(_run_one(id, chosen, changed, folder) for id in dict.fromkeys(wanted))


def _run_one(id: str, chosen: argparse.Namespace, changed: dict[str, Any], folder: Path) -> int:
    """Measure, judge and show one experiment; its exit status."""
    from labkit import runs
    from labkit.judge.findings import FAILS
    from labkit.lab.catalogue import judge
    from labkit.lab.measure import measure

    line = _Line()
    try:
        run = measure(
            id,
            chosen.profile,
            changed,
            folder=folder,
            time_limit_s=chosen.time_limit,
            say=lambda words: line.tell(f"{id}: {words}"),
        )
        line.clear()
        finding = judge(run)
        print(run.counts.to_string(index=False, na_rep=""))
        print(finding)
        if isinstance(known := run.provenance.get("continued"), dict):
            print(f"begun at {known['begun_at']}, continued after {known['parts_before']} parts")
        print(f"saved as {run.path}", flush=True)
        if chosen.record and finding.holds:
            print(f"recorded as {runs.record(run)}", flush=True)
        elif chosen.record:
            state = "fails" if finding.state == FAILS else "is undecided"
            print(f"not recorded: the finding {state}", file=sys.stderr)
        return FALLS_SHORT if finding.state == FAILS else 0
    except LabError as error:
        line.clear()
        return _complain(error, id)


def _report(chosen: argparse.Namespace) -> int:
    from labkit.lab.report import make_report

    line = _Line()
    return make_report(chosen.profile, Path(chosen.to), say=line.show, done=line.keep)


def _verdicts(chosen: argparse.Namespace) -> int:
    from labkit.lab import verdicts
    from labkit.lab.measure import RUNS

    ledger = verdicts.evaluate(Path(chosen.folder) if chosen.folder else RUNS)
    if chosen.json:
        print(json.dumps(verdicts.as_json(ledger), indent=1))
    else:
        print(verdicts.as_text(ledger))
    return FALLS_SHORT if ledger.changes else 0


def _mutation(chosen: argparse.Namespace) -> int:
    from labkit.lab import mutation

    planted = mutation.over_recorded_runs()
    print(mutation.as_text(planted))
    return FALLS_SHORT if any(one.survivors or one.never_held for one in planted) else 0


def _soak(chosen: argparse.Namespace) -> int:
    from labkit import runs
    from labkit.lab import soak
    from labkit.lab.catalogue import catalogue, find
    from labkit.lab.measure import RUNS, check_writable

    for id in chosen.experiment:
        find(id)
    folder = Path(chosen.folder) if chosen.folder else RUNS
    check_writable(folder)
    run = soak.soak(
        chosen.experiment or list(catalogue()),
        folder,
        times=chosen.times,
        times_by_times=chosen.times_by_times,
    )
    print(soak.as_text(run))
    print(f"saved as {runs.save(run, folder)}")
    return FALLS_SHORT if (run.table("decisions")["came_to"] == soak.WRONG).any() else 0


def _bench(chosen: argparse.Namespace) -> int:
    from labkit import runs
    from labkit.judge.findings import FAILS
    from labkit.lab import bench
    from labkit.lab.measure import RUNS

    folder = Path(chosen.folder) if chosen.folder else RUNS
    changed = {name: getattr(chosen, name, None) for name in ("seconds", "rate")}
    changed = {name: value for name, value in changed.items() if value is not None}
    run, results, finding = bench.run(chosen.benchmark, chosen.profile, folder, changed)
    print(*results, f"saved as {run.path}", sep="\n")
    if chosen.record:
        print(f"recorded as {runs.record(run)}")
    return FALLS_SHORT if finding.state == FAILS else 0


def _diagnose(chosen: argparse.Namespace) -> int:
    from labkit.inspect import machine, prometheus
    from labkit.inspect.diagnose import diagnose
    from labkit.inspect.whole_file import require_writable

    if chosen.prometheus is not None:
        require_writable(chosen.prometheus)
    if chosen.map is None:
        seen = machine.diagnose_machine()
        print(json.dumps(seen.as_json(), indent=1) if chosen.json else seen)
    else:
        found = diagnose(chosen.map)
        seen = machine.Machine(tuple(map(machine.Finding.of, found)))
        if chosen.json:
            print(json.dumps([one.as_json() for one in found], indent=1))
        else:
            print("\n\n".join(map(str, found)))
    if chosen.prometheus is not None:
        prometheus.write(chosen.prometheus, seen.as_metrics(chosen.map or ""))
    return CAUSE_FOUND if seen.has_cause else 0


def _incident(chosen: argparse.Namespace) -> int:
    if chosen.read:
        from labkit.inspect import bundle

        print(bundle.read(chosen.file))
        return 0
    from labkit.inspect.incident import incident

    line = _Line()
    incident(chosen.file, chosen.map, seconds=chosen.seconds, say=line.show)
    line.clear()
    print(f"The incident is in {chosen.file}: labkit incident --read shows it, on any machine.")
    return 0


def _watch(chosen: argparse.Namespace) -> int:
    from labkit.inspect.watch import show
    from labkit.inspect.watch_output import Output, Wanted

    if bool(chosen.map or chosen.program is not None) == chosen.all:
        raise BadInput("Name maps, or a --program of which you mean the maps, or say --all.")
    chosen.output.deadline = time.monotonic() + chosen.seconds + _READ_S
    with Output(chosen.json, chosen.parquet, chosen.keys, chosen.values) as output:
        show(
            chosen.map,
            program=chosen.program,
            seconds=chosen.seconds,
            output=output,
            wanted=Wanted(
                frozenset(chosen.key), frozenset(chosen.pid), frozenset(chosen.kind), chosen.keys
            ),
        )
    return 0


def _canary(chosen: argparse.Namespace) -> int:
    from labkit.inspect import canary

    held = canary.show(
        chosen.map,
        chosen.writer,
        key=chosen.key,
        field=chosen.field,
        reader=chosen.reader,
        per_second=chosen.rate,
        seconds=chosen.seconds,
        wait_s=chosen.wait,
        limit_ms=chosen.limit_ms,
        as_json=chosen.json,
        prometheus_file=chosen.prometheus,
    )
    return 0 if held else FALLS_SHORT


def _clean(chosen: argparse.Namespace) -> int:
    from labkit.kernel import leftovers
    from labkit.lab import parts
    from labkit.lab.measure import RUNS
    from labkit.lab.report import sweep
    from labkit.runs import RECORDED

    removed = leftovers.clean(print, [RUNS, RECORDED]) + parts.forget_all(RUNS, print)
    if unfinished := sweep(REPORTS):
        print(f"Removed {unfinished} half-written reports.")
    if not removed and not unfinished:
        print("Nothing was left behind.")
    return 0


class _Line:
    """Progress on a terminal: one line that is written over; elsewhere line by line."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()

    def show(self, words: str) -> None:
        """Show what goes on now."""
        if self._terminal:
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            print(f"\r\033[K{words[: width - 1]}", end="", file=sys.stderr, flush=True)
        else:
            print(words, file=sys.stderr, flush=True)

    def tell(self, words: str) -> None:
        """Keep what is marked so, show other words."""
        from labkit.lab.progress import KEPT

        if KEPT in words:
            self.keep(words.replace(KEPT, ""))
        else:
            self.show(words)

    def keep(self, words: str) -> None:
        """Write a line that stays."""
        self.clear()
        print(words, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line away."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _seconds(text: str) -> float:
    return _positive(text, "seconds")


def _positive(text: str, what: str = "a number") -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"give {what}, more than 0 and finite, not {text!r}")
    return value


def _times(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= _MOST_TIMES):
        raise argparse.ArgumentTypeError(f"give a number from 1 to {_MOST_TIMES:,}, not {text!r}")
    return int(text)


def _setting(text: str) -> tuple[str, Any]:
    """Split ``name=value``; the value is JSON, or else a word."""
    name, equals, value = text.partition("=")
    if not (equals and name):
        raise BadInput(f"--set takes name=value, such as rounds=5, not {text!r}.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
    except RecursionError:
        raise BadInput(f"The value of --set {name} is too deep: give a plain one.") from None


def _complain(error: LabError, about: str = "") -> int:
    words = f"{about}: {error}" if about else str(error)
    if getattr(error, "errno", None) in _OF_LIMITS:
        words += "; a limit of this process is reached: raise it (ulimit -a)"
    console.tell(words)
    return error.status


def _sized(arguments: Sequence[str]) -> Sequence[str]:
    """The arguments, if none is longer than the longest path."""
    for one in arguments:
        if (size := len(os.fsencode(one))) > _MOST_ARGUMENT_BYTES:
            raise BadInput(
                f"An argument has {size:,} bytes, and a command takes {_MOST_ARGUMENT_BYTES:,} at "
                "the most: shorten it."
            )
    return arguments


def _require_descriptors() -> None:
    """With fewer, a kernel that has all that is needed would look as if it had not."""
    if sys.platform == "linux":
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if most < _LEAST_DESCRIPTORS:
            raise Unavailable(
                f"This process may open {most} files, and a command needs {_LEAST_DESCRIPTORS}: "
                "raise the limit (ulimit -n 1024)."
            )


def _heed_signals() -> None:
    """End by way of every clean-up when told to, and when make is gone that this was started by.

    In the background of a script SIGINT is ignored, which nobody wished; SIGHUP is ignored for who
    asks for it (nohup).
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _terminated)
    if sys.platform == "linux" and os.environ.get("MAKELEVEL"):
        from labkit.kernel.parallel import die_with_parent

        die_with_parent(signal.SIGTERM)


def _terminated(number: int, frame: FrameType | None) -> None:
    """End by way of every clean-up."""
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="labkit",
        description="A laboratory for stale, lost and torn eBPF map data on the running kernel.",
        epilog=EXIT,
    )
    parser.add_argument("--version", action="version", version=f"labkit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, help: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=help, description=help)
        one.set_defaults(command=command)
        return one

    def shared(one: argparse.ArgumentParser) -> None:
        """What measures takes these."""
        one.add_argument("--profile", default="quick", choices=("quick", "full"))
        one.add_argument("--folder", help="folder of runs (default: runs of the checkout)")
        one.add_argument(
            "--record", action="store_true", help="keep the run in data/runs as this kernel's"
        )

    doctor = add("doctor", _doctor, "what this kernel can do, found out by trying")
    doctor.add_argument("--json", action="store_true", help="for scripts")

    listing = add("list", _list, "every experiment, and whether this kernel can run it")
    listing.add_argument("--json", action="store_true", help="for scripts")

    run = add("run", _run, "measure experiments, save the runs, and say what they show")
    run.add_argument("experiment", nargs="+", metavar="EXPERIMENT", help="id, or all")
    shared(run)
    run.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="a parameter that differs from the profile's; the value is JSON",
    )  # fmt: skip
    run.add_argument(
        "--time-limit",
        type=float,
        metavar="S",
        help="seconds until an experiment is stopped; ten times as many where the CPU is emulated",
    )

    report = add("report", _report, "run every notebook, and write reports/index.html")
    report.add_argument("--profile", default="quick", choices=("quick", "full"))
    report.add_argument("--to", default=REPORTS, help="folder of the report, replaced as a whole")

    verdicts = add(
        "verdicts", _verdicts, "every claim of the article, judged by the runs; 5: one has changed"
    )
    verdicts.add_argument("--json", action="store_true", help="for scripts")
    verdicts.add_argument(
        "--folder",
        help="folder of fresh runs, to be held against the recorded ones (default: runs)",
    )

    add("mutation", _mutation, "spoil recorded runs; 5: a statement does not mind")

    soak = add("soak", _soak, "run the quick experiments again and again, quiet and under load")
    soak.add_argument("experiment", nargs="*", metavar="EXPERIMENT", help="id; by default all")
    soak.add_argument("--times", type=_times, default=3, metavar="N",
                      help="measurements in each condition (3)")  # fmt: skip
    soak.add_argument("--times-by-times", type=_times, default=20, metavar="N",
                      help="the same where times or rates decide (20)")  # fmt: skip
    soak.add_argument("--folder", help="folder of runs (default: runs of the checkout)")

    bench = add("bench", _bench, "what the lab itself takes, against its bars; 5: one falls short")
    bench.add_argument("benchmark", choices=("kernel", "sync", "load"))
    shared(bench)

    follow = add("soak-follow", _bench,
                 "followers and a watch under load for long: is each change accounted for, is "
                 "memory flat; Ctrl-C ends it early; 5: one falls short")  # fmt: skip
    follow.set_defaults(benchmark="follow")
    follow.add_argument("--seconds", type=_seconds, metavar="S",
                        help="how long (20, or with the profile full 1800)")  # fmt: skip
    follow.add_argument("--rate", type=int, metavar="N",
                        help="changes a second of each of two maps (100000)")  # fmt: skip
    shared(follow)

    diagnosis = add(
        "diagnose", _diagnose,
        "why somebody may see old values of a map of yours; 1: a cause was found",
    )  # fmt: skip
    diagnosis.add_argument("map", metavar="MAP", nargs="?",
                           help="id, path of a pin, or name; none: the whole machine")  # fmt: skip
    diagnosis.add_argument("--json", action="store_true", help="for scripts")
    diagnosis.add_argument("--prometheus", metavar="FILE",
                           help="text for node_exporter's textfile collector")  # fmt: skip

    report_of = add(
        "incident", _incident,
        "put objects, diagnosis, a watch and doctor's answers into one file, or show such a file",
    )  # fmt: skip
    report_of.add_argument("file", metavar="FILE", help="such as incident.tar.gz; replaced")
    report_of.add_argument("map", nargs="*", metavar="MAP",
                           help="id, path of a pin, or name; none: the whole machine")  # fmt: skip
    report_of.add_argument("--seconds", type=_seconds, default=10.0, metavar="S",
                           help="how long to watch (10)")  # fmt: skip
    report_of.add_argument("--read", action="store_true",
                           help="show what stands in FILE; needs neither root nor BPF")  # fmt: skip

    watch = add("watch", _watch, "show the changes of a map of yours as they are made, by anybody")
    watch.add_argument("map", nargs="*", metavar="MAP", help="id, path of a pin, or name")
    watch.add_argument("--program", type=int, metavar="ID", help="the maps that a program uses")
    watch.add_argument("--all", action="store_true", help="all maps, without keys and values")
    watch.add_argument("--seconds", type=_seconds, default=math.inf, metavar="S",
                       help="when to end; else by Ctrl-C")  # fmt: skip
    watch.add_argument("--json", action="store_true", help="one line of JSON an event")
    watch.add_argument("--parquet", type=Path, metavar="FILE",
                       help="write the events there instead, once the watch ends")  # fmt: skip
    watch.add_argument("--key", action="append", default=[], metavar="KEY",
                       help="only this key, as it is shown, or 0x and its bytes")  # fmt: skip
    watch.add_argument("--pid", action="append", default=[], type=int, metavar="PID",
                       help="only what this process asked for")  # fmt: skip
    watch.add_argument("--kind", action="append", default=[],
                       choices=("update", "delete", "refused", "found", "gone"),
                       help="only events of this kind")  # fmt: skip
    for what in ("keys", "values"):
        watch.add_argument(f"--{what}", default="btf", choices=("btf", "hex", "ip", "text"),
                           help=f"show {what} by the map's layout, or so")  # fmt: skip

    canary = add(
        "canary", _canary,
        "how fresh your control plane keeps a map: have versions of a key written, see them there; "
        "5: one is never seen, or the limit is exceeded",
    )  # fmt: skip
    canary.add_argument("map", metavar="MAP", help="id, path of a pin, or name")
    canary.add_argument(
        "writer", nargs="+", metavar="COMMAND",
        help="behind --; writes the key through your control plane; {version} is the number",
    )  # fmt: skip
    canary.add_argument("--key", required=True, metavar="KEY",
                        help="that nobody else writes: 80, [6, 80] or hex:0a000001")  # fmt: skip
    canary.add_argument("--field", default="version", metavar="NAME",
                        help="of a value of several fields: its version (version)")  # fmt: skip
    canary.add_argument(
        "--reader", choices=("lookups", "program"), default="lookups",
        help="who looks at the key: this process, or a BPF program at the tick of a clock, which "
        "needs bcc (lookups)",
    )  # fmt: skip
    canary.add_argument("--rate", type=_positive, default=10.0, metavar="N",
                        help="versions a second (10)")  # fmt: skip
    canary.add_argument("--seconds", type=_seconds, default=10.0, metavar="S",
                        help="how long to go on (10)")  # fmt: skip
    canary.add_argument("--wait", type=_seconds, default=5.0, metavar="S",
                        help="how long a command, and the last version, may take (5)")  # fmt: skip
    canary.add_argument("--limit-ms", type=_positive, metavar="MS",
                        help="age that 99 %% of the versions must keep to")  # fmt: skip
    canary.add_argument("--json", action="store_true", help="for scripts")
    canary.add_argument("--prometheus", metavar="FILE",
                        help="text for node_exporter's textfile collector")  # fmt: skip

    add("clean", _clean, "remove what a killed run left in the kernel")
    return parser


if __name__ == "__main__":
    sys.exit(main())
