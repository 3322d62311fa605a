"""An incident in one file: written whole on one machine, checked and read on another without BPF.

A gzipped tar archive of the JSON documents in `SHAPES`, one each. Whoever opens one may have got it
from anybody: it is read in memory, in bounded size, nothing is unpacked to disk, and what has not
the documents' shape is refused in a sentence.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import stat
import sys
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from labkit.errors import BadInput
from labkit.inspect.whole_file import write_whole

FORMAT: Final = "labkit incident 1"

SHAPES: Final[Mapping[str, Any]] = {
    "incident": {"format": str, "made_at": str, "labkit": str, "asked": [str]},
    "objects": {"maps": [dict], "programs": [dict], "links": [dict], "left_out": int},
    "diagnosis": {"text": str, "has_cause": bool, "answers": [dict]},
    "watch": {
        "seconds": float, "maps": [str], "mechanism": str, "blind": str, "unavailable": str,
        "told": int, "dropped": int, "refused": int, "found": int, "left_out": int,
        "events": [{"time": str, "what": str, "map": str, "line": str}],
    },
    "doctor": {
        "kernel": str, "ready": bool,
        "features": [{"name": str, "works": bool, "answer": str, "remedy": str}],
    },
    "provenance": dict,
}  # fmt: skip
"""Documents, each in a file ``.json``: a type, a list of one shape, or the fields of an object."""

MOST_BYTES: Final = 32 << 20
"""Of an archive, expanded."""

_MOST_MEMBER: Final = 16 << 20
_MOST_SHOWN: Final = 40


@dataclass(frozen=True)
class Bundle:
    """An incident as it was read: documents of the shapes that they must have.

    Attributes
    ----------
    incident, objects, diagnosis, watch, doctor, provenance : dict
        JSON objects; `SHAPES` has their fields.
    """

    incident: dict[str, Any]
    objects: dict[str, Any]
    diagnosis: dict[str, Any]
    watch: dict[str, Any]
    doctor: dict[str, Any]
    provenance: dict[str, Any]

    def __str__(self) -> str:
        """What happened, for a terminal: nothing but text, whoever wrote the file."""
        asked = ", ".join(self.incident["asked"]) or "the whole machine"
        counts = ", ".join(
            f"{len(self.objects[of]):,} {of}" for of in ("maps", "programs", "links")
        )
        lacks = [one["name"] for one in self.doctor["features"] if not one["works"]]
        lines = [
            f"incident of {self.incident['made_at']}: {asked}; kernel {self.doctor['kernel']}, "
            f"labkit {self.incident['labkit']}",
            f"objects: {counts}",
            *self.diagnosis["text"].split("\n"),
            *self._watched(),
            f"features that did not work there: {', '.join(lacks) or 'none'}",
        ]
        return "\n".join(map(_plain, lines))

    def _watched(self) -> list[str]:
        watch = self.watch
        if watch["unavailable"]:
            return [f"not watched: {watch['unavailable']}"]
        events, more = watch["events"], watch["left_out"]
        shown = [f"  {one['line']}" for one in events[:_MOST_SHOWN]]
        if left := len(events) - len(shown) + more:
            shown.append(f"  and {left:,} more, {more:,} of which are not in the file")
        return [
            f"watched for {watch['seconds']:g} s by {watch['mechanism']}, which does not see "
            f"{watch['blind']}: {watch['told']:,} changes told, {watch['dropped']:,} dropped, "
            f"{watch['refused']:,} refused, {watch['found']:,} found by reading",
            *shown,
        ]


def write(path: str, documents: Mapping[str, Any]) -> None:
    """Put an incident into a file, whole or not at all; only its owner may read it.

    Parameters
    ----------
    path : str
        Replaced in one step.
    documents : mapping from str to Any
        JSON objects by the names in `SHAPES`, all of them.

    Raises
    ------
    LabError
        The file cannot be written.
    """
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz", format=tarfile.USTAR_FORMAT) as tar:
        for name in SHAPES:
            content = json.dumps(documents[name], indent=1).encode()
            member = tarfile.TarInfo(f"{name}.json")
            member.size, member.mode = len(content), 0o600
            tar.addfile(member, io.BytesIO(content))
    write_whole(path, archive.getvalue(), mode=0o600)


def read(path: str) -> Bundle:
    """Open an incident, on any machine: no root and no BPF is needed.

    Parameters
    ----------
    path : str
        As `write` made it.

    Returns
    -------
    Bundle
        Its documents.

    Raises
    ------
    BadInput
        It is no such file, or not one that may be trusted: the sentence says what is wrong.
    """
    try:
        documents = _documents(_expanded(path))
    except _Refused as refused:
        why = str(refused)
    except OSError as error:
        why = str(error.strerror)
    except zlib.error:
        why = "it is not packed by gzip, or damaged"
    else:
        return Bundle(**documents)
    raise BadInput(f"{path!r} is no incident that can be opened: {why}.")


class _Refused(Exception):
    """Why an archive is not read, as a clause."""


def _expanded(path: str) -> bytes:
    """The tar archive in a file, in bounded size; no pipe is waited for."""
    with contextlib.ExitStack() as stack:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        stack.callback(os.close, file)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "it is no plain file")
        with os.fdopen(file, "rb", closefd=False) as opened:
            packed = opened.read(MOST_BYTES + 1)
    unpack = zlib.decompressobj(wbits=31)  # gzip
    content = unpack.decompress(packed, MOST_BYTES + 1)
    if len(packed) > MOST_BYTES or len(content) > MOST_BYTES:
        raise _Refused(f"it is larger than {MOST_BYTES:,} bytes")
    if not unpack.eof:
        raise _Refused("its end is missing")
    return content


def _documents(archive: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    at = 0
    while any(block := archive[at : at + tarfile.BLOCKSIZE]):
        # By the header alone: tarfile follows links, long names and sparse files.
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.TarError, ValueError):
            raise _Refused("it is damaged") from None
        name, begin = member.name.removesuffix(".json"), at + tarfile.BLOCKSIZE
        if name not in SHAPES or member.type != tarfile.REGTYPE:
            raise _Refused(f"{member.name[:80]!r} does not belong into one")
        if name in found:
            raise _Refused(f"{name!r} stands in it twice")
        if not 0 <= member.size <= min(_MOST_MEMBER, len(archive) - begin):
            raise _Refused(f"{name!r} has no size that can be")
        found[name] = _parsed(name, archive[begin : begin + member.size])
        at = begin - -member.size // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    if missing := [name for name in SHAPES if name not in found]:
        raise _Refused(f"{missing[0]!r} is missing")
    if found["incident"]["format"] != FORMAT:
        raise _Refused("another version of labkit made it")
    return found


def _parsed(name: str, content: bytes) -> Any:
    try:
        document = json.loads(content)
    except RecursionError:
        raise _Refused(f"{name!r} is too deep") from None
    except ValueError:  # also a number of too many digits
        raise _Refused(f"{name!r} is no JSON") from None
    if where := _misfit(document, SHAPES[name], name):
        raise _Refused(f"{where} is not what it should be")
    return document


def _misfit(value: Any, shape: Any, where: str) -> str:
    """Where a value differs from its shape; empty where it does not."""
    if isinstance(shape, type):
        fits = type(value) is shape or (shape is float and type(value) is int)
        if fits and shape is float:  # an int may have more digits than a float holds
            fits = abs(value) <= sys.float_info.max
        return "" if fits else where
    if isinstance(shape, list):
        if type(value) is not list:
            return where
        found = (_misfit(one, shape[0], f"{where}[{i}]") for i, one in enumerate(value))
    else:
        if type(value) is not dict:
            return where
        found = (
            _misfit(value[name], inner, f"{where}: {name}") if name in value else f"{where}: {name}"
            for name, inner in shape.items()
        )
    return next(filter(None, found), "")


def _plain(line: str) -> str:
    """A line without what a terminal would obey."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in line)
