"""What a lookup in Go calls, and what is said of a buffer of the wrong size, and by whom."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments import bpf_calls
from experiments.bpf_calls import ATTRIBUTES, COMMANDS, LOOKUP, UPDATE, Seen
from experiments.go.programs import Started, built
from labkit.errors import BadInput
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say

_MOST_ENTRIES = 100_000

# The stages of the program in their order, and the command that one call of the library makes.
_STAGES = {
    "lookup": LOOKUP,
    "put": UPDATE,
    "iterate": 0,
    "batch-lookup": 0,
    "batch-update": 0,
    "lookup-short": LOOKUP,
    "put-short": UPDATE,
    "lookup-long": LOOKUP,
    "put-long": UPDATE,
    "article-lookup": 0,
    "article-update": 0,
}


def _derived(tables: Tables) -> Tables:
    calls = tables["calls"]
    plain = calls[calls["case"].isin(["lookup", "put"])]
    buffers = calls[calls["case"].str.endswith(("-short", "-long"))]
    article, idle = calls[calls["by"] == "article"], calls[calls["by"] == "nobody"]
    rows = pd.concat([
        article.assign(variant="broken", anomalies=article["failed"]),
        idle.assign(variant="control", anomalies=idle["bpf"] + idle["mmap"] + idle["msync"]),
        plain.assign(variant="fixed", anomalies=plain["made"] - plain["as_made"]),
        buffers.assign(variant="fixed", anomalies=buffers["made"] - buffers["failed"]),
    ])  # fmt: skip
    counted = Counted("not as made", operations="made", anomalies="anomalies")
    return {"counts": counted.table(rows), "buffers": buffers, "plain": plain}


@experiment(
    "go-lookup",
    number=83,
    family="go",
    question="Which system call does a lookup in Go make, and who checks the buffer?",
    claims=("2.1b", "2.2a", "2.2b", "2.2c", "2.2d"),
    needs=("bpf", "compile", "tracefs", "tracepoint", "batch_hash", "go", "cilium_ebpf"),
    quick={"entries": 2_000, "attempts": 200},
    full={"entries": 30_000, "attempts": 2_000},
    cases=(
        Case("broken", "article-lookup", "Syscall6, look up"),
        Case("broken", "article-update", "Syscall6, update"),
        Case("control", "idle", "nothing called"),
        Case("fixed", "lookup", "Lookup"),
        Case("fixed", "put", "Put"),
        Case("fixed", "lookup-short", "Lookup into 4 bytes of 8"),
        Case("fixed", "put-short", "Put of 4 bytes of 8"),
        Case("fixed", "lookup-long", "Lookup into 16 bytes of 8"),
        Case("fixed", "put-long", "Put of 16 bytes of 8"),
    ),
    derive=_derived,
    statements=(
        Statement("a lookup or an update is one bpf(command, attributes, size)",
                  'none(fixed["lookup", "put"]) and all(0 < plain.bpf == plain.made)'),
        Statement("nothing is mapped or synchronised",
                  "none(calls(made > 0).mmap > 0) and none(calls(made > 0).msync > 0)"),
        Statement("it works with no memory locked, and none allowed to be",
                  "all(0 == plain.locked_kib == plain.failed < plain.bpf)"),
        Statement("the article's six arguments are refused, and change nothing",
                  'all(broken) and all(0 == calls(by="article").changed '
                  '< calls(by="article").failed)'),
        Statement("a buffer of another size is an error of the library",
                  'none(fixed["lookup-short", "put-short", "lookup-long", "put-long"])'),
        Statement("of an update before the kernel is asked, of a lookup after it",
                  'none(buffers(case=("put-short", "put-long")).as_made > 0) '
                  'and all(0 < buffers(case=("lookup-short", "lookup-long")).as_made '
                  '== buffers(case=("lookup-short", "lookup-long")).made)'),
        Statement("what stands behind the buffer stays, and so does the map",
                  "none(buffers(failed > 0).changed > 0)"),
        Statement("to iterate takes two calls an element, and a batch far fewer",
                  '2 * calls(case="iterate").made <= calls(case="iterate").bpf '
                  '<= 2 * calls(case="iterate").made + 2 '
                  'and all(0 < calls(case=("batch-lookup", "batch-update")).bpf '
                  '<= calls(case=("batch-lookup", "batch-update")).made / 10)'),
    ),
    sentence='{calls(case="lookup").as_made} of {calls(case="lookup").made} lookups by cilium/ebpf '
    "were one bpf(command, attributes, size) each, of {calls(case='lookup').attributes_bytes} "
    "bytes, with {sum(calls.mmap)} mmap and {sum(calls.locked_kib)} KiB locked. The article's "
    'Syscall6 was refused in {broken} calls ("{calls(case="article-lookup").words}"). A buffer of '
    "another size passed without an error in "
    '{fixed["lookup-short", "put-short", "lookup-long", "put-long"]}.',
)  # fmt: skip
def go_lookup(*, entries: int, attempts: int) -> Tables:
    """Have a Go program look up and update, and write down what enters the kernel.

    The program keeps to one thread, whose calls of ``bpf``, ``mmap`` and ``msync`` are seen at
    their tracepoints, as in ``lookup-syscall``. It may lock no memory (RLIMIT_MEMLOCK is 0). The
    library copies through a buffer of the map's own size where the caller's has another one
    (internal/sysenc, ``SyscallOutput``).

    Parameters
    ----------
    entries : int
        Elements of the map; each is looked up or updated once in every way.
    attempts : int
        Calls with each buffer of another size, and of the article's.

    Returns
    -------
    dict of DataFrame
        ``calls``: ``case``, ``by`` (``library``, ``article``, ``nobody``), ``made`` (elements or
        calls asked for), ``failed`` (with an error), ``changed`` (bytes behind the buffer, or
        values of the map, that are not what they were; of iterations and batches what came),
        ``locked_kib`` (of the process after it), ``words`` (of the last error), ``bpf``, ``mmap``
        (of a descriptor), ``msync`` (calls seen), ``as_made`` (with the command and the
        descriptor), ``attributes_bytes`` (the size that was passed). ``commands``: ``case``,
        ``command``, ``calls``.
    """
    if not 1 <= entries <= _MOST_ENTRIES:
        raise BadInput(f"entries of go-lookup are 1 to {_MOST_ENTRIES:,}.")
    rows, commands = [], []
    with built("lookup") as program, Started(program, entries, attempts) as process:
        (thread,) = process.said()
        with bpf_calls.watching(int(thread), entries) as (watcher, loaded):
            table = loaded.map("table")
            numbers = np.arange(entries)
            table.update_many(numbers.astype(np.uint32), numbers.astype(np.uint64))
            process.go_on(table.id)
            (fd,) = process.said()

            def stage() -> list[str]:
                process.go_on()
                return process.said()

            say(f"{entries} elements, looked up and updated in Go")
            idle = watcher.watch(lambda: None)
            rows.append(
                {"case": "idle", "by": "nobody", "made": entries, "failed": 0, "changed": 0,
                 "locked_kib": 0, "words": "", **_seen(idle, 0, -1)}
            )  # fmt: skip
            for case, command in _STAGES.items():
                seen = watcher.watch(stage)
                failed, changed, locked, words = seen.result
                few = case.startswith("article") or case.endswith(("short", "long"))
                rows.append(
                    {"case": case, "by": "article" if case.startswith("article") else "library",
                     "made": attempts if few else entries, "failed": int(failed),
                     "changed": int(changed), "locked_kib": int(locked),
                     "words": words.removesuffix(".").replace("_", " "),
                     **_seen(seen, command, int(fd))}
                )  # fmt: skip
                commands += [
                    {"case": case, "command": COMMANDS.get(int(one), str(one)), "calls": int(count)}
                    for one, count in zip(
                        *np.unique(seen.calls["command"], return_counts=True), strict=True
                    )
                ]
            process.end()
    return {"calls": pd.DataFrame(rows), "commands": pd.DataFrame(commands)}


def _seen(seen: Seen, command: int, fd: int) -> dict[str, int]:
    as_made = (seen.calls["command"] == command) & (
        seen.calls["attributes"].view(ATTRIBUTES)["map_fd"] == fd
    )
    return {
        "bpf": len(seen.calls),
        "mmap": seen.mmap,
        "msync": seen.msync,
        "as_made": int(as_made.sum()),
        "attributes_bytes": int(seen.calls["size"].max(initial=0)),
    }
