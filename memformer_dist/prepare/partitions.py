"""Which files there are to read, and how they are cut into partitions for many workers.

    files, ignored = discover(["texts/", "crawl/*.jsonl", "https://host/books/"], exclude=["site-packages"])
    for partition in cut_partitions(files, partition_bytes=2**26): ...

An input is a folder (read recursively), a glob, a file, or a URL of one of them (anything with `://`). In folders only
files with the suffixes below are read; a file that is named directly or by a glob is read whatever its name.

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
from memformer_dist.errors import UserError
from memformer_dist.prepare.documents import File, Piece, compression_of, import_pyarrow, look, open_file, suffix_of

TEXT_SUFFIXES = (
    ".txt .text .md .rst .tex .org .py .pyi .pyx .c .h .cc .cpp .cxx .hh .hpp .cu .cuh .java .kt .scala .js .jsx .ts "
    ".tsx .go .rs .rb .php .pl .lua .sh .sql .r .jl .swift .cs .hs .ml .lisp .el .clj .f90 .asm .s"
)
KNOWN_SUFFIXES = frozenset(TEXT_SUFFIXES.split()) | {".jsonl", ".parquet"}


# -------------------------------------------------------------------------------------------------------- which files


class Discovery(NamedTuple):
    files: list[File]
    ignored: int  # files in folders that were passed over for their suffix


def discover(inputs: Sequence[str | Path], exclude: Sequence[str] = ()) -> Discovery:
    """The files of folders, globs, files and URLs: in the order of the inputs, sorted within each, and each file once.

    `exclude`: patterns (site-packages, *_test.py) of names of files and folders that are passed over in folders.
    Raises UserError naming an input that does not exist or holds nothing to read.
    """
    names: dict[str, str] = {}  # by real path
    ignored = 0
    for given in (str(given).removeprefix("file://") for given in inputs):
        readable, passed_over = _readable_files(given, exclude)
        ignored += passed_over
        for name in readable:
            names.setdefault(name if "://" in name else os.path.realpath(name), name)
    return Discovery([look(name)._replace(path=path) for path, name in names.items()], ignored)


def _readable_files(given: str, exclude: Sequence[str]) -> tuple[list[str], int]:
    """The files of one input that are read, and how many in folders are not, for their suffix."""
    matches = transfer.matches(given) if "://" in given else _local_matches(given)
    if not matches:
        raise UserError(f"found no file or folder {given!r}")
    readable, ignored = [], 0
    for match, inside in matches:
        if inside is None:
            readable.append(match)
            continue
        kept = [name for name in inside if not _is_excluded(name, exclude)]
        known = [name for name in kept if suffix_of(name) in KNOWN_SUFFIXES]
        ignored += len(kept) - len(known)
        readable += [f"{match.rstrip('/')}/{name}" for name in known]
    if not readable:
        raise UserError(f"{given!r} holds no text file, no source file, no .jsonl and no .parquet")
    return readable, ignored


def _local_matches(given: str) -> list[tuple[str, list[str] | None]]:
    """Each file with None, each folder with the paths of all files in it, relative to it."""
    found = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
    return [(str(Path(match)), _files_inside(match) if os.path.isdir(match) else None) for match in found]


def _files_inside(folder: str) -> list[str]:
    """Sorted, following links to folders. Raises UserError where a folder cannot be listed."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}")

    seen: set[str] = set()
    found: list[Path] = []
    for path, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(path)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(path, name)), name))  # links last
        found += [Path(path, name) for name in names if os.path.isfile(os.path.join(path, name))]
    return [str(path.relative_to(folder)) for path in sorted(found)]


def _is_excluded(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(part, pattern) for part in Path(name).parts for pattern in patterns)


# --------------------------------------------------------------------------------------------------------- partitions


class Partition(NamedTuple):
    pieces: tuple[Piece, ...]
    bytes: int


def cut_partitions(files: Sequence[File], partition_bytes: int) -> list[Partition]:
    """Consecutive whole files until they have `partition_bytes`; a larger .jsonl or .parquet is cut into parts.

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
    match suffix_of(file.name):
        case ".jsonl":
            return list(_byte_ranges(file, file.size, partition_bytes))
        case ".parquet":
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
