"""A trace_printk, really watched; and what a line beside an update says of the update."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd

from labkit.errors import BadInput, LabError
from labkit.figures import Axes, style
from labkit.kernel import programs
from labkit.kernel.leftovers import helper_process, temporary_folder
from labkit.kernel.programs import BpfObject, Program
from labkit.kernel.tools import find_tool, tracefs_folder
from labkit.kernel.tracing import PRINTK_EVENT, PrintedLines, printed_lines
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say
from labkit.runs import Run

_ARTICLE_EVENT = "tracepoint:bpf:trace_printk"
_ARTICLE_FOLDER = "bpf/trace_printk"
_EVENT = PRINTK_EVENT.replace("/", ":")
_STEPS = 20
_LINES_AT_ONCE = 1_000  # a private buffer holds them with ease
_MOST_CALLS = 100_000
_PERF_LIMIT_S = 20.0
# Without -B and -N perf fills a cache of build ids in the user's home, and leaves it there.
_PERF_RECORD = ("record", "-q", "-B", "-N")

_CASES = (
    Case("broken", "one-key", "NOEXIST on one key, print each call", program="print_calls"),
    Case("control", "new-keys", "NOEXIST on new keys, print each call",
         program="print_calls_on_new_keys"),
    Case("fixed", "changes", "NOEXIST on one key, print changes", program="print_changes"),
    Case("fixed", "overwrites", "overwrite one key, print changes",
         program="overwrite_and_print_changes"),
)  # fmt: skip


def _derived(tables: Tables) -> Tables:
    """The counts, what the programs had done by their last call, and who watched and was asked."""
    progress, watchers, names = (tables[name] for name in ("progress", "watchers", "names"))
    last = progress.groupby("case", sort=False).tail(1)
    apart = last.assign(
        wrong=(last["lines"] - last["changed"]).abs(),
        run_ns=last["case"].map(progress.groupby("case")["run_ns"].median()),
    )
    counted = Counted("line or change alone", operations="calls", anomalies="wrong",
                      cost_ns="run_ns")  # fmt: skip
    used = watchers[watchers["used"]]
    # A perf that does not work here knows no name at all.
    answered = (names["asked"] == "tracefs") | bool(watchers["used"].all())
    return {"counts": counted.table(apart), "totals": last, "used": used, "events": names[answered]}


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw how lines and changes grow with the calls, in the article's example and its cures."""
    ax = style.axes(ax)
    progress = run.table("progress")
    for number, (case, column, label) in enumerate(
        (
            ("one-key", "lines", "lines, article's example"),
            ("one-key", "changed", "changes of the map by it"),
            ("changes", "lines", "lines, if it prints changes alone"),
            ("overwrites", "lines", "lines, if it also overwrites"),
        )
    ):
        rows = progress[progress["case"] == case]
        # Curves that lie on one another show by markers at different places.
        ax.plot(
            rows["calls"], rows[column], **style.look(number).line(), label=label,
            markevery=(number, 4),
        )  # fmt: skip
    ax.set_yscale("log")
    ax.set_ylim(0.7, None)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("calls")
    ax.set_ylabel("lines, or changes")
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1))
    return ax


@experiment(
    "printk-watch",
    number=30,
    family="kernel-facts",
    question="Can a line of bpf_trace_printk be watched, and does it show that a map was updated?",
    claims=("2.5b", "2.5c"),
    needs=("bpf", "compile", "test_run", "tracefs", "hash"),
    quick={"calls": 2_000, "perf_calls": 500},
    full={"calls": 20_000, "perf_calls": 5_000},
    cases=_CASES,
    derive=_derived,
    statements=(
        Statement("whoever watches reads every line that was printed, once",
                  "all(used(printed > 0).lines == used(printed > 0).printed) "
                  "and none(used.printed == 0) and none(used.lost != 0)"),
        Statement("every program's lines are read back",
                  "all(totals(calls > 0).lines == totals(calls > 0).printed)"),
        Statement(f"the event is called {_EVENT}, and none is called as the article has it",
                  f'all(events(event="{_EVENT}").exists) '
                  f'and none(events(event != "{_EVENT}").exists)'),
        Statement("the article's example prints a line for each call and updates once",
                  'totals(case="one-key").lines == totals(case="one-key").calls > 0 '
                  'and totals(case="one-key").changed == 1 '
                  'and totals(case="one-key").exists == totals(case="one-key").calls - 1 '
                  'and broken.anomalies == totals(case="one-key").exists'),
        Statement("the map agrees: it holds what the first call wrote",
                  'maps(case="one-key").entries == 1 and maps(case="one-key").newest == 1'),
        Statement("where every call inserts a new key, the lines are right", "none(control)"),
        Statement("printing successful updates alone, lines and changes agree", "none(fixed)"),
        Statement("and with them the map: it holds what the last line tells",
                  'totals(case="overwrites").lines == maps(case="overwrites").newest > 0'),
    ),
    sentence="Of {sum(used.printed)} lines of bpf_trace_printk, {sum(used.lines)} were read back "
    f"from {_EVENT}, by {{rows(used)}} of {{rows(watchers)}} watchers (trace_pipe of a private "
    "instance, perf); an event bpf:trace_printk was found by "
    f'{{rows(events(event != "{_EVENT}", exists == 1))}} of '
    f'{{rows(events(event != "{_EVENT}"))}}. The article\'s example printed '
    '{totals(case="one-key").lines} lines for {totals(case="one-key").changed} change of the map: '
    "{broken} calls show nothing but a refused update. Printed after a successful update alone, "
    "the lines of {fixed} calls were wrong.",
    figure=_figure,
)  # fmt: skip
def printk_watch(*, calls: int, perf_calls: int) -> Tables:
    """Run the article's example and its cures, and read every line that they print.

    ``bpf_trace_printk`` fires the trace event ``bpf_trace:bpf_trace_printk``
    (kernel/trace/bpf_trace.c, since Linux 5.9, ac5a72ea5c89), which any instance of tracefs
    can follow, and perf too. The example updates with ``BPF_NOEXIST`` and prints whatever the
    update answered.

    perf is used where it is installed; the table ``watchers`` says whether it was.

    Parameters
    ----------
    calls : int
        Runs of each program, 20 to 100,000.
    perf_calls : int
        Runs of the article's example under perf, at most as many.

    Returns
    -------
    dict of DataFrame
        ``progress``: per case and step ``variant``, ``case``, ``calls``, ``lines`` (read),
        ``printed`` (by the helper's answer), ``changed`` and ``exists`` (by the update's
        answer), all since the start, and ``run_ns`` (float64, the kernel's own mean). ``maps``:
        per case ``case``, ``entries`` and ``newest`` (the highest number of a call that stands in
        the map, found from user space). ``names``: ``event``, ``asked`` (``tracefs`` or
        ``perf``), ``exists`` (bool), ``answer``. ``watchers``: ``watcher`` (``instance`` or
        ``perf``), ``used`` (bool), ``printed``, ``lines``, ``lost`` and ``answer`` (why it was
        not used).
    """
    if not _STEPS <= calls <= _MOST_CALLS or not 1 <= perf_calls <= calls:
        raise BadInput(
            f"calls of printk-watch are {_STEPS} to {_MOST_CALLS:,}, perf_calls at most as many."
        )
    mark = f"MAP_UPD {os.getpid()} "
    progress, maps = [], []
    with programs.load("printk_watch", ENTRIES=calls, OWNER_ID=os.getpid()) as loaded:
        with printed_lines(mark) as lines:
            for case in _CASES:
                say(f"{calls} calls: {case.label}")
                for row in _steps(loaded, loaded.program(case.program), lines, calls):
                    progress.append({"variant": case.variant, "case": case.id, **row})
                maps.append({"case": case.id, **_found(loaded)})
            lost = lines.lost()
        say("the event's names, and perf")
        example = loaded.program(_CASES[0].program)
        by_perf = _watched_by_perf(loaded, example, mark, perf_calls)
    table = pd.DataFrame(progress)
    last = table.groupby("case", sort=False).tail(1)
    in_private = {
        "watcher": "instance",
        "used": True,
        "printed": int(last["printed"].sum()),
        "lines": int(last["lines"].sum()),
        "lost": lost,
        "answer": "",
    }
    return {
        "progress": table,
        "maps": pd.DataFrame(maps),
        "names": _names(),
        "watchers": pd.DataFrame([in_private, by_perf]),
    }


def _reset(loaded: BpfObject) -> None:
    counts, table = loaded.map("counts"), loaded.map("table")
    counts.update(0, np.zeros(1, counts.value_dtype)[0])
    table.delete_many(table.snapshot().keys)


def _steps(
    loaded: BpfObject, function: Program, lines: PrintedLines, calls: int
) -> list[dict[str, float]]:
    _reset(loaded)
    counts = loaded.map("counts")
    read, done, rows = 0, 0, []
    for step in range(1, _STEPS + 1):
        spent = 0.0
        wanted = calls * step // _STEPS - done
        for start in range(0, wanted, _LINES_AT_ONCE):
            repeat = min(_LINES_AT_ONCE, wanted - start)
            spent += repeat * function.test_run(repeat=repeat).mean_ns
            read += len(lines.read())
        done += wanted
        seen = counts.lookup(0)
        rows.append(
            {
                "calls": done,
                "lines": read,
                "printed": int(seen["printed"]),
                "changed": int(seen["changed"]),
                "exists": int(seen["exists"]),
                "run_ns": spent / wanted,
            }
        )
    return rows


def _found(loaded: BpfObject) -> dict[str, int]:
    """What stands in the map, whatever the program believes."""
    snapshot = loaded.map("table").snapshot()
    return {"entries": len(snapshot), "newest": int(snapshot.values.max(initial=0))}


def _names() -> pd.DataFrame:
    rows: list[dict[str, object]] = []
    for folder in (PRINTK_EVENT, _ARTICLE_FOLDER):
        exists = (tracefs_folder() / "events" / folder).is_dir()
        answer = "" if exists else "no such event"
        rows.append({"event": folder.replace("/", ":"), "asked": "tracefs", "exists": exists,
                     "answer": answer})  # fmt: skip
    perf = find_tool("perf")
    for event in (_EVENT, _ARTICLE_EVENT) if perf else ():
        answer = _perf_answer(str(perf), event)
        rows.append({"event": event, "asked": "perf", "exists": not answer, "answer": answer})
    return pd.DataFrame(rows)


def _perf_answer(perf: str, event: str) -> str:
    """What perf says against an event; empty where it takes it."""
    with temporary_folder() as folder:
        data = str(folder / "perf.data")
        command = [perf, *_PERF_RECORD, "-e", event, "-o", data, "--", "true"]
        try:
            done = _bounded(command)
        except subprocess.TimeoutExpired:
            return f"no answer within {_PERF_LIMIT_S:g} s"
    if done.returncode == 0:
        return ""
    said = [line.strip(" \\_") for line in done.stderr.decode(errors="replace").splitlines()]
    return next((line for line in said if "unknown" in line), "") or " ".join(said[:1]) or "refused"


def _bounded(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PERF_LIMIT_S, check=False
    )


def _watched_by_perf(
    loaded: BpfObject, example: Program, mark: str, calls: int
) -> dict[str, object]:
    row: dict[str, object] = {"watcher": "perf", "used": False,
                              "printed": 0, "lines": 0, "lost": 0, "answer": ""}  # fmt: skip
    perf = find_tool("perf")
    if perf is None:
        return row | {"answer": "perf is not installed"}
    _reset(loaded)
    try:
        with temporary_folder() as folder:
            data = folder / "perf.data"
            _record(perf, data, mark, lambda: example.test_run(repeat=calls))
            script = _bounded([perf, "script", "-i", str(data), "-F", "trace"])
    except (OSError, LabError, subprocess.TimeoutExpired) as error:
        return row | {"answer": f"perf did not record: {error}"}
    printed = int(loaded.map("counts").lookup(0)["printed"])
    lines = script.stdout.count(mark.encode())
    return row | {"used": True, "printed": printed, "lines": lines, "lost": printed - lines}


def _record(perf: str, data: Path, mark: str, work: Callable[[], object]) -> None:
    """Have perf record while some work is done; it says itself when it is ready."""
    with ExitStack() as ends:
        orders, to_perf = os.pipe()
        from_perf, answers = os.pipe()
        for end in (to_perf, from_perf):
            ends.callback(os.close, end)
        command = [
            perf, *_PERF_RECORD, "-a", "-m", "1024", "-e", _EVENT,
            "--filter", f'bpf_string ~ "{mark}*"', "-o", str(data),
            "--delay=-1", f"--control=fd:{orders},{answers}",
        ]  # fmt: skip
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(orders, answers),
            )
        finally:
            os.close(orders)
            os.close(answers)
        ends.callback(process.wait)
        ends.callback(process.kill)  # before the wait; nothing once it has ended
        ends.enter_context(helper_process(process.pid))
        os.write(to_perf, b"enable\n")
        if not select.select([from_perf], [], [], _PERF_LIMIT_S)[0] or not os.read(from_perf, 64):
            raise LabError("it did not get ready")
        work()
        process.send_signal(signal.SIGINT)
        process.wait(_PERF_LIMIT_S)
