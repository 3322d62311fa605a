"""bpf_trace_printk: what it refuses, and what it cuts without a word."""

from __future__ import annotations

import errno
import os

import numpy as np
import pandas as pd

from labkit.errors import BadInput
from labkit.figures import Axes, style
from labkit.kernel import programs
from labkit.kernel.programs import Program
from labkit.kernel.tracing import PrintedLines, printed_lines
from labkit.lab.experiment import Case, Counted, Statement, Tables, experiment, say
from labkit.runs import Run

_TEXT_BYTES = 4096
_ARGUMENTS = 12  # as many as bpf_trace_vprintk takes
# The kernel's own buffers, each with a NUL: of the output (BPF_TRACE_PRINTK_SIZE, later
# MAX_BPRINTF_BUF), and of all arguments of one call (MAX_BPRINTF_BIN_ARGS).
_OUTPUT_BYTES, _STRING_BYTES = 1024, 512
_REGISTERS = 3  # what is left of five for arguments of the format
_ARTICLE_BYTES = 128  # the longest format, as the article has it
_REFUSED = -errno.EINVAL
_ODD_FORMATS = {
    "no-nul": b"abc",
    "%f": b"%f\0",
    "%n": b"%n\0",
    "lone-%": b"abc%\0",
    "control-character": b"abc\x07\0",
    "not-ascii": "é\0".encode(),  # older kernels refuse it, newer ones take it
}


def _derived(tables: Tables) -> Tables:
    """The counts: of messages of each length, and of messages with more and more specifiers."""
    lengths, specifiers = tables["lengths"], tables["specifiers"]
    printed = lengths.assign(wrong=lengths["messages"] - lengths["whole"])
    tried = specifiers[specifiers["specifiers"] <= _ARGUMENTS].assign(messages=1)
    few = tried["specifiers"] <= _REGISTERS
    by_registers = tried["helper"] == "bpf_trace_printk"
    rows = [printed]
    for variant, case, chosen in (
        ("control", "few", by_registers & few),
        ("broken", "many", by_registers & ~few),
        ("fixed", "many-array", ~by_registers & ~few),
    ):
        wrong = 1 - tried["came_out"]
        rows.append(tried.assign(variant=variant, case=case, wrong=wrong)[chosen])
    counted = Counted(
        "message cut or refused", operations="messages", anomalies="wrong", cost_ns="print_ns"
    )
    return {"counts": counted.table(pd.concat(rows))}


def _figure(run: Run, *, ax: Axes | None = None) -> Axes:
    """Draw the length of the messages that came out, for three ways to print them."""
    from matplotlib.ticker import NullLocator

    ax = style.axes(ax)
    lengths = run.table("lengths")
    for label, look, cases in (
        ("in pieces", style.look(2), ["pieces"]),
        ("as format", style.look(0), ["format-fits", "format-long"]),
        ("as %s argument", style.look(1), ["string-fits", "string-long"]),
    ):
        rows = lengths[lengths["case"].isin(cases)].sort_values("text_bytes")
        ax.plot(rows["text_bytes"], rows["came_out_bytes"], **look.line(), label=label)
    ax.axvline(_ARTICLE_BYTES, color=style.BLACK, linewidth=1, linestyle=":")
    ax.annotate(
        f"the article's\nlimit: {_ARTICLE_BYTES}", (_ARTICLE_BYTES, 2000), xytext=(-3, 0),
        textcoords="offset points", ha="right", va="center", fontsize=7,
    )  # fmt: skip
    for axis, scale in ((ax.xaxis, ax.set_xscale), (ax.yaxis, ax.set_yscale)):
        scale("log", base=2)
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_locator(NullLocator())
    ticks = [16, 64, 256, 1024, 4096]
    ax.set_xticks(ticks)
    ax.set_yticks(ticks)
    ax.set_xlabel("length of the message, bytes")
    ax.set_ylabel("bytes that came out")
    ax.legend(loc="lower right")
    return ax


@experiment(
    "trace-printk-limits",
    number=27,
    family="value-size",
    question="Which formats and arguments does bpf_trace_printk refuse, and which does it cut?",
    claims=("2.5a",),
    needs=("bpf", "compile", "test_run", "tracefs"),
    quick={
        "text_bytes": [16, 64, 127, 128, 129, 220, 511, 512, 768, 1023, 1024, 1025, 2048, 4095],
        "messages": 20,
    },
    full={
        "text_bytes": [
            16, 32, 64, 96, 127, 128, 129, 160, 192, 220, 256, 320, 384, 448, 510, 511, 512, 513,
            640, 768, 896, 1000, 1022, 1023, 1024, 1025, 1100, 1280, 1536, 2048, 3072, 4095,
        ],
        "messages": 400,
    },
    cases=(
        Case("control", "format-fits", "format that fits"),
        Case("broken", "format-long", "format too long"),
        Case("control", "string-fits", "string that fits"),
        Case("broken", "string-long", "string too long"),
        Case("fixed", "pieces", "long text in pieces"),
        Case("control", "few", "0 to 3 specifiers, bpf_trace_printk"),
        Case("broken", "many", "4 to 12 specifiers, bpf_trace_printk"),
        Case("fixed", "many-array", "4 to 12 specifiers, bpf_trace_vprintk"),
    ),
    derive=_derived,
    statements=(
        Statement(f"formats longer than the article's {_ARTICLE_BYTES} B come out whole",
                  f'all(lengths(text_bytes > {_ARTICLE_BYTES}, case="format-fits").whole == '
                  f'lengths(text_bytes > {_ARTICLE_BYTES}, case="format-fits").messages)'),
        Statement("what fits the kernel's buffers comes out whole", "none(control)"),
        Statement("a format beyond the output buffer is cut to it, while the helper answers its "
                  "full length",
                  'all(broken["format-long"]) '
                  f'and all(lengths(case="format-long").came_out_bytes == {_OUTPUT_BYTES - 1}) '
                  'and all(lengths(case="format-long").returned '
                  '== lengths(case="format-long").text_bytes)'),
        Statement("a long string argument is cut to its buffer, and the answer does not tell",
                  'all(broken["string-long"]) '
                  f'and all(lengths(case="string-long").came_out_bytes == {_STRING_BYTES - 1}) '
                  'and all(lengths(case="string-long").returned '
                  '== lengths(case="string-long").came_out_bytes)'),
        Statement("bpf_trace_printk refuses a fourth specifier with EINVAL, and no earlier one",
                  'all(broken["many"]) and all(specifiers(specifiers > 3, '
                  f'helper="bpf_trace_printk").returned == {_REFUSED}) and none(specifiers('
                  f'specifiers <= 3, helper="bpf_trace_printk").returned == {_REFUSED})'),
        Statement("bpf_trace_vprintk takes 12 and refuses 13",
                  'all(specifiers(specifiers > 12, helper="bpf_trace_vprintk").returned '
                  f'== {_REFUSED}) and none(specifiers(specifiers <= 12, '
                  f'helper="bpf_trace_vprintk").returned == {_REFUSED})'),
        Statement("formats without a NUL, with %f, %n, a lone % or a control character are refused",
                  'all(odd_formats(format=("no-nul", "%f", "%n", "lone-%", "control-character"))'
                  f'.returned == {_REFUSED})'),
        Statement("in pieces, and by bpf_trace_vprintk, everything comes out", "none(fixed)"),
    ),
    sentence=f"There is no limit of {_ARTICLE_BYTES} bytes: formats of up to "
    '{max(lengths(case="format-fits").text_bytes)} bytes came out whole. Longer ones were cut to '
    '{max(lengths(case="format-long").came_out_bytes)} bytes in {broken["format-long"]} messages, '
    'and string arguments to {max(lengths(case="string-long").came_out_bytes)} in '
    '{broken["string-long"]}, without an error. The limit of three arguments is real: a fourth '
    "answers EINVAL; bpf_trace_vprintk takes 12. A letter that is not ASCII was answered with "
    '{odd_formats(format="not-ascii").returned}.',
    figure=_figure,
)  # fmt: skip
def trace_printk_limits(*, text_bytes: list[int], messages: int) -> Tables:
    """Print texts of many lengths by format and by argument, and read back what came out.

    ``bpf_trace_printk`` formats into a buffer of 1024 bytes and copies string arguments
    into one of 512 (kernel/trace/bpf_trace.c, ``bpf_bprintf_prepare`` in
    kernel/bpf/helpers.c). What does not fit is cut; the helper answers the length that a
    format would have had, and for a string argument the length after the cut. Format and
    argument come from a map, so one program serves every length. The messages are read
    from a private trace instance; the kernel turns the event on in the top one as well
    when it loads such a program, and leaves it on.

    Parameters
    ----------
    text_bytes : list of int
        Lengths of the messages, 16 to 4095 bytes.
    messages : int
        Messages of every length, at most 1000.

    Returns
    -------
    dict of DataFrame
        ``lengths``: one row per way to print and length with columns ``variant``, ``case``,
        ``text_bytes``, ``messages``, ``whole`` (came out as given), ``came_out_bytes`` (of the
        shortest), ``returned`` (the last call's answer; all int64) and ``print_ns`` (float64, of
        a message, the kernel's own mean);
        ``specifiers``: ``helper``, ``specifiers``, ``returned`` and ``came_out`` (1 or 0)
        for 0 to 13 specifiers; ``odd_formats``: ``format`` and ``returned``.
    """
    if not all(16 <= size < _TEXT_BYTES for size in text_bytes):
        raise BadInput(f"text_bytes of trace-printk-limits are 16 to {_TEXT_BYTES - 1}.")
    if messages > 1000:
        raise BadInput("trace-printk-limits prints at most 1000 messages of every length.")
    tag = f"p{os.getpid():06x}:"
    with (
        programs.load(
            "trace_printk_limits", TEXT_BYTES=_TEXT_BYTES, ARGUMENTS=_ARGUMENTS
        ) as loaded,
        printed_lines(tag) as lines,
    ):
        printer = _Printer(loaded, lines, tag)
        say(f"{messages} messages of each of {len(text_bytes)} lengths, printed in three ways")
        lengths = pd.DataFrame(
            [
                {"text_bytes": size, "messages": messages, **by(printer, size, messages)}
                for by in (_by_format, _by_argument, _by_pieces)
                for size in text_bytes
            ]
        )
        say("0 to 13 specifiers by both helpers, and formats that are odd")
        specifiers = pd.DataFrame(
            [
                _specifiers(printer, helper, count)
                for helper in ("bpf_trace_printk", "bpf_trace_vprintk")
                for count in range(_ARGUMENTS + 2)
            ]
        )
        odd = pd.DataFrame(
            [
                {"format": name, "returned": printer.print(printer.register, given)[0]}
                for name, given in _ODD_FORMATS.items()
            ]
        )
    return {
        "lengths": lengths,
        "specifiers": specifiers,
        "odd_formats": odd,
    }


class _Printer:
    """Prints what it is told, and reads back what came out."""

    def __init__(self, loaded: programs.BpfObject, lines: PrintedLines, tag: str) -> None:
        self._orders = loaded.map("orders")
        self.register = loaded.program("print")
        self.text = loaded.program("print_text")
        self.array = loaded.program("print_array")
        self._lines = lines
        self.tag = tag.encode()

    def message(self, size: int) -> bytes:
        """A message of so many bytes that shows where it was cut."""
        letters = b"abcdefghijklmnopqrstuvwxyz" * (size // 26 + 1)
        return (self.tag + letters)[:size]

    def print(
        self,
        function: Program,
        format: bytes,
        *,
        text: bytes = b"",
        arguments: int = 0,
        times: int = 1,
    ) -> tuple[int, float, list[bytes]]:
        """The helper's answer, nanoseconds of a call, and our lines that came out."""
        order = np.zeros(1, self._orders.value_dtype)
        order["format_bytes"], order["argument_bytes"] = len(format), 8 * arguments
        order["arguments"][0, :arguments] = np.arange(1, arguments + 1)
        order["format"][0, : len(format)] = np.frombuffer(format, np.int8)
        order["text"][0, : len(text)] = np.frombuffer(text, np.int8)
        self._orders.update(0, order[0])
        done = function.test_run(repeat=times)
        returned = int(np.uint32(done.value).astype(np.int32))
        return returned, float(done.mean_ns), self._lines.read()


def _by_format(printer: _Printer, size: int, times: int) -> dict[str, object]:
    given = printer.message(size)
    returned, spent, lines = printer.print(printer.register, given + b"\0", times=times)
    fits = size < _OUTPUT_BYTES
    return {
        "variant": "control" if fits else "broken",
        "case": "format-fits" if fits else "format-long",
        **_outcome(given, lines, returned, spent),
    }


def _by_argument(printer: _Printer, size: int, times: int) -> dict[str, object]:
    given = printer.message(size)
    returned, spent, lines = printer.print(printer.text, b"%s\0", text=given + b"\0", times=times)
    fits = size < _STRING_BYTES
    return {
        "variant": "control" if fits else "broken",
        "case": "string-fits" if fits else "string-long",
        **_outcome(given, lines, returned, spent),
    }


def _by_pieces(printer: _Printer, size: int, times: int) -> dict[str, object]:
    given = printer.message(size)
    body, step = given[len(printer.tag) :], _OUTPUT_BYTES - 1 - len(printer.tag)
    joined = [printer.tag] * times
    returned, spent = 0, 0.0
    for start in range(0, len(body), step):
        piece = printer.tag + body[start : start + step] + b"\0"
        returned, took, lines = printer.print(printer.register, piece, times=times)
        spent += took
        parts = [line[len(printer.tag) :] for line in lines]
        joined = [whole + part for whole, part in zip(joined, parts, strict=False)]
    return {
        "variant": "fixed",
        "case": "pieces",
        **_outcome(given, joined, returned, spent),
    }


def _outcome(given: bytes, lines: list[bytes], returned: int, spent: float) -> dict[str, object]:
    return {
        "whole": sum(line == given for line in lines),
        "came_out_bytes": min(map(len, lines), default=0),
        "returned": returned,
        "print_ns": spent,
    }


def _specifiers(printer: _Printer, helper: str, count: int) -> dict[str, object]:
    function = printer.register if helper == "bpf_trace_printk" else printer.array
    format = printer.tag + b",".join([b"%d"] * count) + b"\0"
    given = printer.tag + b",".join(b"%d" % number for number in range(1, count + 1))
    returned, _, lines = printer.print(function, format, arguments=min(count, _ARGUMENTS))
    return {
        "helper": helper,
        "specifiers": count,
        "returned": returned,
        "came_out": int(lines == [given]),
    }
