"""Runs on disk: written whole or not at all, read with every doubt that a file deserves.

A run is one directory: ``run.json`` (experiment, profile, parameters, provenance, schema version)
and one Parquet file per table. ``run.json`` has the digests of the tables and one of itself: what
was edited later is no run any more. Measuring writes it, judging reads it, and nothing else passes
between the two.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from labkit.errors import BadInput
from labkit.runs.run import BadRun, Run, SaveFailed, check

SCHEMA_VERSION: Final = 2
"""Version of the layout on disk; raised by every change that an older reader would misread."""

PARTIAL: Final = ".partial-"
"""Prefix of a directory that is still being written; one that a killed process left is rubbish."""

RECORDED: Final = Path(__file__).resolve().parents[2] / "data" / "runs"
"""The recorded runs of the checkout, one folder per kernel."""

REPLACED: Final = ".replaced-"
"""Prefix of a directory that is being replaced at this moment."""

_TABLE_NAME: Final = r"[a-z][a-z0-9_]*"
_KINDS: Final = {
    "experiment": str, "profile": str, "parameters": dict, "provenance": dict, "tables": dict,
    "sha256": str,
}  # fmt: skip
_MOST_JSON_BYTES: Final = 1 << 20
_MOST_TABLE_BYTES: Final = 64 << 20
_MOST_CELLS: Final = 20_000_000
_MOST_TEXT_BYTES: Final = 256 << 20
_EXCHANGE: Final = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE: Final = -100  # AT_FDCWD


def save(run: Run, folder: Path) -> Path:
    """Write a run into a directory of its own.

    The directory ``<folder>/<experiment>/<UTC stamp>-<pid>`` appears complete or not at all.

    Parameters
    ----------
    run
        What to write.
    folder
        Folder of runs; made if it is missing.

    Returns
    -------
    Path
        The new directory.

    Raises
    ------
    BadInput
        When the run breaks the contract of `Run`; nothing is written.
    SaveFailed
        When the disk is full or the folder not writable; nothing is left.
    """
    check(run)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    target = Path(folder) / run.experiment / f"{stamp}-{os.getpid()}"
    _write(run, target)
    return target


def record(run: Run, data: Path = RECORDED) -> Path:
    """Keep a run as the recorded one of its kernel, profile and experiment.

    Replaces the one that was there once the new one is complete.

    Parameters
    ----------
    run
        What to keep.
    data
        Folder of recorded runs, ``data/runs`` of the checkout.

    Returns
    -------
    Path
        ``<data>/<kernel>/<profile>/<experiment>``.

    Raises
    ------
    BadInput, SaveFailed
        As `save`; what was there before stays.
    """
    check(run)
    target = Path(data) / run.kernel / run.profile / run.experiment
    _write(run, target)
    return target


def load(path: Path) -> Run:
    """Read a run from its directory.

    Raises
    ------
    BadRun
        When it is no run, is of another schema version, lacks a table, or is damaged.
    """
    path = Path(path)
    meta = described(path)
    names = meta["tables"]
    assert isinstance(names, dict)
    tables = {name: _read_table(path, name, **known) for name, known in names.items()}
    parameters, provenance = meta["parameters"], meta["provenance"]
    assert isinstance(parameters, dict) and isinstance(provenance, dict)
    run = Run(
        experiment=str(meta["experiment"]),
        profile=str(meta["profile"]),
        parameters=parameters,
        provenance=provenance,
        tables=tables,
        path=path,
    )
    try:
        check(run)
    except BadInput as error:
        raise BadRun(f"The run in {path} is not valid: {error}") from None
    return run


def latest(folder: Path, experiment: str, profile: str | None = None) -> Run | None:
    """Return the newest run of an experiment, or None where there is none.

    Parameters
    ----------
    folder
        Folder of runs as given to `save`.
    experiment
        Its id.
    profile
        Only runs of this profile; None takes any.

    Raises
    ------
    BadRun
        When the newest one is damaged.
    """
    for path in sorted(_runs_in(Path(folder) / experiment), reverse=True):
        if profile is None or described(path)["profile"] == profile:
            return load(path)
    return None


def recorded(experiment: str, *, profile: str, data: Path = RECORDED) -> list[Run]:
    """Return the recorded runs of an experiment, one per kernel, ordered by kernel release.

    Parameters
    ----------
    experiment
        Its id.
    profile
        ``"quick"`` or ``"full"``.
    data
        Folder of recorded runs.

    Raises
    ------
    BadRun
        When one of them is damaged.
    """
    kernels = sorted(_runs_in(Path(data), marker=""), key=lambda path: natural(path.name))
    paths = [kernel / profile / experiment for kernel in kernels]
    return [replace(load(path), recorded=True) for path in paths if path.is_dir()]


def described(path: Path) -> Mapping[str, object]:
    """Read what a run says of itself, without its tables.

    That is ``run.json``: experiment, profile, parameters, provenance, and the rows of each table.

    Raises
    ------
    BadRun
        When it is no run, is of another schema version, or is damaged.
    """
    try:
        meta = json.loads(_content(path / "run.json", _MOST_JSON_BYTES))
    except FileNotFoundError:
        raise BadRun(f"There is no run in {path}; name a directory that has a run.json.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadRun(
            f"The run.json in {path} cannot be read ({_first_line(error)}); "
            f"run the experiment again."
        ) from None
    if not isinstance(meta, dict) or meta.get("schema_version") != SCHEMA_VERSION:
        version = meta.get("schema_version") if isinstance(meta, dict) else None
        raise BadRun(
            f"The run in {path} has schema version {version!r}, this lab reads {SCHEMA_VERSION}; "
            f"run the experiment again."
        )
    for name, kind in _KINDS.items():
        if not isinstance(meta.get(name), kind):
            raise BadRun(f"The run.json in {path} lacks {name!r}; run the experiment again.")
    for name in ("kernel", "recorded_at"):
        if not isinstance(meta["provenance"].get(name), str):
            raise BadRun(f"The provenance in {path} lacks {name!r}; run the experiment again.")
    for name, known in meta["tables"].items():
        if not (
            isinstance(known, dict)
            and known.keys() == {"rows", "sha256"}
            and isinstance(known["rows"], int)
            and isinstance(known["sha256"], str)
            and re.fullmatch(_TABLE_NAME, name)
        ):
            raise BadRun(f"The run.json in {path} has no table {name!r}; run the experiment again.")
    if _digest_of(meta) != meta["sha256"]:
        raise BadRun(f"The run.json in {path} was edited; run the experiment again.")
    return meta


def natural(text: str) -> list[tuple[int, str]]:
    """Return what to sort kernel releases by: 6.9 comes before 6.18."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def _runs_in(folder: Path, marker: str = "run.json") -> Iterator[Path]:
    """Yield the directories in a folder that are complete."""
    if folder.is_dir():
        for path in folder.iterdir():
            hidden = path.name.startswith(".") or path.is_symlink()
            if not hidden and (path / marker).exists() and path.is_dir():
                yield path


def _write(run: Run, target: Path) -> None:
    """Write a run beside its target and rename it; replaces what is there."""
    partial = target.with_name(f"{PARTIAL}{target.name}-{os.getpid()}")
    observed = {
        name: frame for name, frame in run.tables.items() if name not in run.derived_tables
    }
    meta = {
        "schema_version": SCHEMA_VERSION,
        "experiment": run.experiment,
        "profile": run.profile,
        "parameters": run.parameters,
        "provenance": run.provenance,
    }
    try:
        json.dumps(meta, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"Parameters and provenance of {run.experiment} must be JSON values: {error}."
        ) from None
    there = next(one for one in partial.absolute().parents if one.exists())
    try:
        partial.mkdir(parents=True)
        for name, frame in observed.items():
            pq.write_table(
                pa.Table.from_pandas(frame, preserve_index=False),
                partial / f"{name}.parquet",
                compression="zstd",
                write_page_checksum=True,
            )
        meta["tables"] = {
            name: {
                "rows": len(frame),
                "sha256": _sha256((partial / f"{name}.parquet").read_bytes()),
            }
            for name, frame in observed.items()
        }
        meta = json.loads(json.dumps(meta, default=_plain))
        meta["sha256"] = _digest_of(meta)
        text = json.dumps(meta, indent=1)
        (partial / "run.json").write_text(text + "\n", encoding="utf-8")
        _make_lasting(*partial.iterdir(), partial)
        put_in_place(partial, target)
        made = takewhile(lambda one: one != there, target.absolute().parents)
        _make_lasting(*made, there)
    except OSError as error:
        raise SaveFailed(
            f"The run of {run.experiment} could not be saved in {target.parent} "
            f"({error.strerror or error}); free some space or name a folder that can be written."
        ) from None
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise BadInput(
            f"A table of {run.experiment} does not fit into Parquet: {_first_line(error)}."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_lasting(*paths: Path) -> None:
    """Have files and directories survive a power cut: a name is kept by the one that holds it."""
    for path in paths:
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def put_in_place(partial: Path, target: Path) -> None:
    """Put a complete directory in the place of another; a failure leaves the other in place.

    Where the file system can, the two change places in one step, and whatever ends this process,
    a complete one stands there.
    """
    if not target.exists():
        partial.rename(target)
        return
    if _exchange(partial, target):
        return  # what was there before is removed as what is partial
    old = target.with_name(f"{REPLACED}{target.name}-{os.getpid()}")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places; False where this system has no such call."""
    if sys.platform != "linux":
        return False
    call = ctypes.CDLL(None, use_errno=True).renameat2
    return bool(call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)


def _content(path: Path, most_bytes: int) -> bytes:
    """Read a file that is a plain one and not too large; neither waits for a pipe nor follows."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    with contextlib.ExitStack() as stack:
        file = os.open(path, flags)
        stack.callback(os.close, file)
        known = os.fstat(file)
        if not stat.S_ISREG(known.st_mode):
            raise OSError(errno.EINVAL, "it is no plain file")
        if known.st_size > most_bytes:
            raise OSError(errno.EFBIG, f"it is larger than {most_bytes:,} bytes")
        with os.fdopen(file, "rb", closefd=False) as opened:
            return opened.read(most_bytes)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_of(meta: Mapping[str, object]) -> str:
    """The digest of all that ``run.json`` says, but for the digest itself."""
    said = {name: value for name, value in meta.items() if name != "sha256"}
    return _sha256(json.dumps(said, sort_keys=True).encode())


def _read_table(path: Path, name: str, *, rows: int, sha256: str) -> pd.DataFrame:
    file = path / f"{name}.parquet"
    try:
        content = _content(file, _MOST_TABLE_BYTES)
        if _sha256(content) != sha256:
            raise BadRun(f"{file} is not what was saved; run the experiment again.")
        frame = _expanded(pa.BufferReader(content))
    except FileNotFoundError:
        raise BadRun(
            f"The run in {path} lacks its table {name!r}; run the experiment again."
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise BadRun(
            f"{file} is damaged ({_first_line(error)}); run the experiment again."
        ) from None
    if len(frame) != rows:
        raise BadRun(
            f"{file} has {len(frame)} rows where run.json says {rows}; run the experiment again."
        )
    return frame


def _expanded(content: pa.BufferReader) -> pd.DataFrame:
    """A table from Parquet; OSError where it would take more memory than any of ours."""
    with pq.ParquetFile(content, page_checksum_verification=True) as parquet:
        known = parquet.metadata
        if known.num_rows * known.num_columns > _MOST_CELLS:
            raise OSError(errno.EFBIG, f"it has more than {_MOST_CELLS:,} cells")
        kinds = {one.name: one.type for one in parquet.schema_arrow if _is_text(one.type)}
    # One long text may stand in every row: its length counts before it is repeated.
    with pq.ParquetFile(
        content, page_checksum_verification=True, read_dictionary=list(kinds)
    ) as parquet:
        table = parquet.read()
    for i, name in enumerate(table.column_names):
        if name in kinds:
            lengths = [
                pc.sum(pc.take(pc.binary_length(part.dictionary), part.indices)).as_py() or 0
                for part in table.column(i).chunks
            ]
            if sum(lengths) > _MOST_TEXT_BYTES:
                raise OSError(errno.EFBIG, f"its texts have more than {_MOST_TEXT_BYTES:,} bytes")
            table = table.set_column(i, name, table.column(i).cast(kinds[name]))
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _plain(value: object) -> object:
    """Turn what NumPy returns into JSON's own numbers and lists."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
