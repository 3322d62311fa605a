"""Judges experiment 27: the limits of bpf_trace_printk."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from labkit.analysis.findings import Check, Finding, judges
from labkit.analysis.runs import Run

_ARTICLE_BYTES = 128
_MAY_PASS = "a letter that is not ASCII"  # older kernels refuse it, newer ones take it


@judges("trace-printk-limits")
def trace_printk_limits(run: Run) -> Finding:
    """Long formats are not refused but cut; only the number of arguments is refused."""
    lengths, specifiers = run.table("lengths"), run.table("specifiers")
    odd = run.table("odd_formats")
    whole = lengths[lengths["case"] == "format that fits"]
    beyond = whole[whole["text_bytes"] > _ARTICLE_BYTES]
    long_format = lengths[lengths["case"] == "format too long"]
    long_string = lengths[lengths["case"] == "string too long"]
    too_long = run.count("broken", "format too long")
    too_long_string = run.count("broken", "string too long")
    many = run.count("broken", "4 to 12 specifiers, bpf_trace_printk")
    by_registers = specifiers[specifiers["helper"] == "bpf_trace_printk"]
    by_array = specifiers[specifiers["helper"] == "bpf_trace_vprintk"]
    refused = by_registers[by_registers["returned"] == -errno.EINVAL]["specifiers"]
    array_refused = by_array[by_array["returned"] == -errno.EINVAL]["specifiers"]
    control, fixed = run.count("control"), run.count("fixed")
    surely_odd = odd[odd["format"] != _MAY_PASS]
    other = odd.loc[odd["format"] == _MAY_PASS, "returned"]
    checks = (
        Check(
            f"formats longer than the article's {_ARTICLE_BYTES} B come out whole",
            len(beyond) > 0 and bool((beyond["whole"] == beyond["messages"]).all()),
            f"{int(beyond['whole'].sum()):,} of {int(beyond['messages'].sum()):,}, the longest "
            f"{int(beyond['text_bytes'].max()) if len(beyond) else 0:,} B",
        ),
        Check(
            "what fits the kernel's buffers comes out whole",
            control.anomalies == 0,
            f"{control} cut or refused",
        ),
        Check(
            "a format beyond the output buffer is cut, while the helper answers its full length",
            too_long.anomalies == too_long.operations > 0
            and bool((long_format["returned"] == long_format["text_bytes"]).all())
            and bool((long_format["came_out_bytes"] < long_format["text_bytes"]).all())
            and long_format["came_out_bytes"].nunique() == 1,
            f"{too_long} cut to {_sizes(long_format['came_out_bytes'])} B",
        ),
        Check(
            "a long string argument is cut, and the answer does not tell",
            too_long_string.anomalies == too_long_string.operations > 0
            and bool((long_string["returned"] == long_string["came_out_bytes"]).all())
            and long_string["came_out_bytes"].nunique() == 1,
            f"{too_long_string} cut to {_sizes(long_string['came_out_bytes'])} B",
        ),
        Check(
            "bpf_trace_printk refuses a fourth specifier with EINVAL, and no earlier one",
            many.anomalies == many.operations > 0
            and len(refused) > 0
            and int(refused.min()) == 4
            and len(refused) == int((by_registers["specifiers"] >= 4).sum()),
            f"EINVAL from {int(refused.min()) if len(refused) else 'no'} specifiers on",
        ),
        Check(
            "bpf_trace_vprintk takes 12 and refuses 13",
            array_refused.tolist() == [13],
            f"EINVAL for {_sizes(array_refused)}",
        ),
        Check(
            "formats without a NUL, with %f, %n, a lone % or a control character are refused",
            len(surely_odd) > 0 and bool((surely_odd["returned"] == -errno.EINVAL).all()),
            f"answers {_sizes(surely_odd['returned'])}",
        ),
        Check(
            "in pieces, and by bpf_trace_vprintk, everything comes out",
            fixed.anomalies == 0,
            f"{fixed} cut or refused",
        ),
    )
    letters = "takes" if len(other) and int(other.iloc[0]) >= 0 else "refuses"
    return Finding(
        run.experiment,
        f"There is no limit of {_ARTICLE_BYTES} bytes: formats of up to "
        f"{int(whole['text_bytes'].max()):,} bytes came out whole. Longer ones were cut to "
        f"{_sizes(long_format['came_out_bytes'])} bytes in {too_long} messages, and string "
        f"arguments to {_sizes(long_string['came_out_bytes'])} in {too_long_string}, without an "
        "error. The limit of three arguments is real: a fourth answers EINVAL; "
        f"bpf_trace_vprintk takes 12. This kernel {letters} letters that are not ASCII.",
        checks,
    )


def _sizes(values: Iterable[int]) -> str:
    return ", ".join(f"{value:,}" for value in sorted(set(values)))
