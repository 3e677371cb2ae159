"""Which files there are to read, and how they are cut into partitions for many workers.

    files, ignored = discover(["texts/", "crawl/*.jsonl", "https://host/books/"], exclude=["site-packages"])
    for partition in cut_partitions(files, partition_bytes=2**26): ...

An input is a folder (read recursively), a glob, a file, or a URL of one of them (anything with `://`). A file that is
named directly or by a glob is read whatever its name. In folders files with the suffixes of text (kinds.py), JSON
lines, Parquet and Arrow are read, and JSON that holds documents; the others are listed with the reason.

A partition is some whole files, or a part of one large file. The cuts are made before anything is read and depend on
the order, names and sizes of the files alone, so every run with the same files has the same partitions.
"""

import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from memformer_dist.data import transfer
from memformer_dist.errors import CorpusError, UserError
from memformer_dist.prepare.documents import (
    DAMAGED,
    File,
    Piece,
    compression_of,
    head_of,
    import_pyarrow,
    kind_of,
    look,
    open_file,
    special,
    suffix_of,
)
from memformer_dist.prepare.kinds import Kind, kind_by_suffix, kind_of_content, may_hold_documents, what_it_is
from memformer_dist.prepare.records import fields_of

LOOKED_INTO = (".json", ".feather", "")  # suffixes of files in folders that may hold documents, without saying so
ARROW_CACHE = "cache-*.arrow"  # what the datasets library keeps of results, beside the data
GLOB_READS = "a glob reads text whatever its suffix"
SHOWN_IGNORED = 10  # reasons, each with a file


# -------------------------------------------------------------------------------------------------------- which files


class Ignored(NamedTuple):
    """A file that is not read, because nobody named it and it is not text."""

    name: str
    reason: str


class Discovery(NamedTuple):
    files: list[File]
    ignored: list[Ignored]


def discover(inputs: Sequence[str | Path], exclude: Sequence[str] = (), text_field: str | None = None) -> Discovery:
    """The files of folders, globs, files and URLs: in the order of the inputs, sorted within each, and each file once.

    `exclude`: patterns (site-packages, *_test.py) of names of files and folders that are passed over in folders.
    `text_field`: the field of JSON that is read as the text, if not as usual.
    Raises UserError naming an input that does not exist, is no file, or holds nothing to read.
    """
    names: dict[str, File] = {}  # by real path
    ignored: dict[str, Ignored] = {}  # by name
    for given in (str(given).removeprefix("file://") for given in inputs):
        readable, passed_over = _readable_files(given, exclude, text_field)
        ignored |= {file.name: file for file in passed_over}
        for file in readable:
            names.setdefault(_path(file.name), file)
    files = [look(file.name)._replace(path=path, kind=kind_of(file)) for path, file in names.items()]
    return Discovery(files, [file for name, file in ignored.items() if _path(name) not in names])


def describe_ignored(ignored: Sequence[Ignored]) -> str:
    """One line per reason, the most frequent first: how many files there are, and the first of them."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in ignored:
        by_reason.setdefault(reason, []).append(name)
    reasons = sorted(by_reason, key=lambda reason: -len(by_reason[reason]))
    lines = [
        f"not read: {names[0]}{f' and {len(names) - 1:,} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in ((reason, by_reason[reason]) for reason in reasons[:SHOWN_IGNORED])
    ]
    if len(reasons) > SHOWN_IGNORED:
        left = sum(len(by_reason[reason]) for reason in reasons[SHOWN_IGNORED:])
        lines.append(f"not read: {left:,} more files, for {len(reasons) - SHOWN_IGNORED} other reasons")
    return "\n".join(lines)


def _path(name: str) -> str:
    """The same for all names of one file."""
    return name if "://" in name else os.path.realpath(name)


def _readable_files(given: str, exclude: Sequence[str], text_field: str | None) -> tuple[list[File], list[Ignored]]:
    """The files of one input that are read, and those that are not."""
    matches = transfer.matches(given) if "://" in given else _local_matches(given, exclude)
    if not matches:
        raise UserError(f"found no file or folder {given!r}")
    readable: list[File] = []
    ignored: list[Ignored] = []
    for match, inside in matches:
        if inside is None:
            if match != given and (reason := _no_file(match)):  # found by a glob
                ignored.append(Ignored(match, reason))
            else:
                readable.append(File(match))  # `look` refuses what is no file
            continue
        for name in (f"{match.rstrip('/')}/{name}" for name in inside if not _is_excluded(name, exclude)):
            found = _in_folder(name, text_field)
            readable.append(found) if isinstance(found, File) else ignored.append(found)
    if not readable:
        there = f"; {describe_ignored(ignored)}" if ignored else ""
        raise UserError(f"{given!r} holds no text file, no source file, no .jsonl and no .parquet{there}")
    return readable, ignored


def _in_folder(name: str, text_field: str | None) -> File | Ignored:
    """A file in a folder: nobody named it, so it is read if it is text, or holds documents, without doubt."""
    if reason := _no_file(name):
        return Ignored(name, reason)
    suffix, file = suffix_of(name), File(name)
    if fnmatch.fnmatch(name.rsplit("/", 1)[-1], ARROW_CACHE):
        return Ignored(name, "a cache of the datasets library")
    if (kind := kind_by_suffix(suffix)) is not None:
        return file._replace(kind=kind)
    if suffix not in LOOKED_INTO or ("://" in name and not suffix):
        what = f"not text by its suffix {suffix}" if suffix else "without a suffix"
        return Ignored(name, f"{what} ({GLOB_READS})")
    try:
        head, whole = head_of(file)
    except CorpusError:
        raise
    except (UserError, *DAMAGED) as error:  # it may not be read, or its compression is damaged
        return Ignored(name, str(error).removeprefix(f"{name}: "))
    kind = kind_of_content(head, whole=whole, suffix=suffix)
    if kind in (Kind.PARQUET, Kind.ARROW):
        return file._replace(kind=kind)
    if kind in (Kind.JSON_LINES, Kind.JSON):
        if may_hold_documents(head, kind, fields_of(text_field)):
            return file._replace(kind=kind)
        return Ignored(
            name, f"JSON without a field {' or '.join(fields_of(text_field))} (--text-field NAME reads another)"
        )
    what = what_it_is(head, suffix) or (
        "binary" if kind is not Kind.TEXT else "not JSON" if suffix else "text without a suffix"
    )
    return Ignored(name, f"{what} ({GLOB_READS})")


def _no_file(name: str) -> str | None:
    """Why a path on this machine is no file, if it is none."""
    if "://" in name:
        return None
    try:
        return special(os.stat(name).st_mode)
    except OSError as error:
        return f"a link that leads nowhere ({error.strerror})" if os.path.islink(name) else str(error.strerror)


def _local_matches(given: str, exclude: Sequence[str]) -> list[tuple[str, list[str] | None]]:
    """Each file with None, each folder with the paths of all files in it, relative to it."""
    found = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
    return [(str(Path(match)), _files_inside(match, exclude) if os.path.isdir(match) else None) for match in found]


def _files_inside(folder: str, exclude: Sequence[str]) -> list[str]:
    """Sorted, following links to folders, without excluded folders. Raises UserError where one cannot be listed."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror} (--exclude NAME passes a folder over)")

    seen: set[str] = set()
    found: list[Path] = []
    for path, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(path)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not _is_excluded(name, exclude)]
        folders.sort(key=lambda name: (os.path.islink(os.path.join(path, name)), name))  # links last
        found += [Path(path, name) for name in names]
    return [str(path.relative_to(folder)) for path in sorted(found)]


def _is_excluded(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(part, pattern) for part in Path(name).parts for pattern in patterns)


# --------------------------------------------------------------------------------------------------------- partitions


class Partition(NamedTuple):
    pieces: tuple[Piece, ...]
    bytes: int


def cut_partitions(files: Sequence[File], partition_bytes: int) -> list[Partition]:
    """Consecutive whole files until they have `partition_bytes`; larger JSON lines or Parquet are cut into parts.

    Depends on the order, names and sizes of the files alone, and on the footers of large .parquet files.
    """
    partitions: list[Partition] = []
    pieces: list[Piece] = []  # of the partition that is being filled
    size = 0

    def finish() -> None:
        nonlocal size
        if pieces:
            partitions.append(Partition(tuple(pieces), size))
        pieces.clear()
        size = 0

    for file in files:
        parts = _parts(file, partition_bytes)
        if parts is not None:
            finish()
            partitions += parts
            continue
        pieces.append(Piece(file))
        size += partition_bytes if file.size is None else file.size  # one that a server reports no size of fills it
        if size >= partition_bytes:
            finish()
    finish()
    return partitions


def _parts(file: File, partition_bytes: int) -> list[Partition] | None:
    """The partitions of a file that is large enough and of a kind that can be cut, else None."""
    if file.size is None or file.size <= partition_bytes or compression_of(file.name):
        return None
    match kind_of(file):
        case Kind.JSON_LINES:
            return list(_byte_ranges(file, file.size, partition_bytes))
        case Kind.PARQUET:
            return _row_groups(file, file.size, partition_bytes)
        case _:
            return None


def _byte_ranges(file: File, size: int, partition_bytes: int) -> Iterator[Partition]:
    number = -(-size // partition_bytes)
    cuts = [size * cut // number for cut in range(number + 1)]
    for start, stop in pairwise(cuts):
        yield Partition((Piece(file, start, stop),), stop - start)


def _row_groups(file: File, size: int, partition_bytes: int) -> list[Partition]:
    """Consecutive row groups until they have `partition_bytes`."""
    pyarrow = import_pyarrow(file.name)
    whole = [Partition((Piece(file),), size)]
    try:
        with open_file(file) as raw:
            metadata = pyarrow.parquet.ParquetFile(raw).metadata
            sizes = [_stored_bytes(metadata.row_group(number)) for number in range(metadata.num_row_groups)]
    except (OSError, pyarrow.ArrowException):  # whoever reads the file will say what is wrong with it
        return whole
    partitions, start, gathered = [], 0, 0
    for number, group_size in enumerate(sizes, start=1):
        gathered += group_size
        if gathered >= partition_bytes or number == len(sizes):
            partitions.append(Partition((Piece(file, start, number),), gathered))
            start, gathered = number, 0
    return partitions or whole


def _stored_bytes(row_group: Any) -> int:
    return sum(row_group.column(number).total_compressed_size for number in range(row_group.num_columns))
