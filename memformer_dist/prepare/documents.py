"""Documents from files: what tokenizer/train.py and tokenizer/shard.py read.

An input is a folder (read recursively), a glob, a file or a URL of one of them (anything with `://`, through fsspec). A
text or source file is one document. So is every line of a `.jsonl` file and every row of a `.parquet` file, with a field
`text` or instead of it `parts`, [{"text": ..., "loss": true|false}, ...], where parts without loss are read by the model
but not learnt. Any of them may be compressed (`.gz`, `.zst`). In folders only the suffixes below are read; a file that is
named directly or by a glob is read whatever its name.

A document that cannot be read does not stop the others: it arrives with the reason, and the caller counts and reports
it. What is wrong with the machine instead, a bad disk or a full one, ends the program. Text is kept exactly as it is in
the file; nothing is stripped, and newlines are not translated.

For many workers the files are cut into partitions (`cut_partitions`) before anything is read: some whole files, or a part of one
large file. Where the cuts are depends on the files' order, names and sizes alone.
"""

import errno
import fnmatch
import glob
import gzip
import os
import shutil
import sys
import tempfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Iterable, Iterator, NamedTuple, Sequence

from pydantic import BaseModel, ValidationError, model_validator
from pydantic_core import from_json

from memformer_dist.errors import UserError
from memformer_dist.prepare import urls

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .org .py .pyi .pyx .c .h .cc .cpp .cxx .hh .hpp .cu .cuh .java .kt .scala .js .jsx .ts "
    ".tsx .go .rs .rb .php .pl .lua .sh .sql .r .jl .swift .cs .hs .ml .lisp .el .clj .f90 .asm .s".split()
)
KNOWN_SUFFIXES = TEXT_SUFFIXES | {".jsonl", ".parquet"}
COMPRESSED = (".gz", ".zst")
GZIP_MAGIC = b"\x1f\x8b"
DAMAGED = (OSError, EOFError, zlib.error, zstd.ZstdError)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BUFFER = 1 << 18  # bytes
PARQUET_BATCH = 1 << 22  # bytes of rows that are decoded together


@dataclass(slots=True)
class Part:
    text: str
    loss: bool = True


class Document(NamedTuple):
    source: str  # the file
    position: int  # line of a .jsonl or row of a .parquet file, counted from 1; 0 where the file is one document
    parts: Sequence[Part] = ()
    unreadable: str | None = None  # the reason why there are no parts

    @property
    def text(self) -> str:
        parts = self.parts
        return parts[0].text if len(parts) == 1 else "".join([part.text for part in parts])

    @property
    def learnt(self) -> bool:
        """Whether every label counts in the loss."""
        parts = self.parts
        return parts[0].loss if len(parts) == 1 else all([part.loss for part in parts])


class JsonDocument(BaseModel):
    """One line of a .jsonl file, one row of a .parquet file; other fields than these are ignored."""

    text: str | None = None
    parts: list[Part] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "JsonDocument":
        if (self.text is None) == (self.parts is None):
            raise ValueError("expected either the field text or the field parts")
        return self


# ------------------------------------------------------------------------------------------------------- which files


class File(NamedTuple):
    name: str  # as it was given, or found in what was given
    size: int | None = None  # bytes; None where a server does not tell
    changed: str = ""  # time of the last change in ns; of a URL its ETag or another mark of this version
    path: str = ""  # the same for all names of one file


class Discovery(NamedTuple):
    files: list[File]
    ignored: int  # files in folders whose suffix is not one of text


def discover(inputs: Sequence[str | Path], exclude: Sequence[str] = ()) -> Discovery:
    """The files of folders, globs, files and URLs, in the order of the inputs, sorted within each, and each file once.

    `exclude`: patterns (site-packages, *_test.py) of the names of files and folders that are passed over in folders.
    Raises UserError naming an input that does not exist or holds nothing to read.
    """
    files: dict[str, str] = {}  # by real path
    ignored = 0
    for given in (str(given).removeprefix("file://") for given in inputs):
        matches = urls.matches(given) if "://" in given else _local_matches(given)
        if not matches:
            raise UserError(f"found no file or folder {given!r}")
        readable = []
        for match, inside in matches:
            if inside is None:
                readable.append(match)
                continue
            kept = [name for name in inside if not _excluded(name, exclude)]
            known = [name for name in kept if _suffix(name) in KNOWN_SUFFIXES]
            ignored += len(kept) - len(known)
            readable += [f"{match.rstrip('/')}/{name}" for name in known]
        if not readable:
            raise UserError(f"{given!r} holds no text file, no source file, no .jsonl and no .parquet")
        for name in readable:
            files.setdefault(name if "://" in name else os.path.realpath(name), name)
    return Discovery([look(name)._replace(path=path) for path, name in files.items()], ignored)


def look(name: str) -> File:
    """A file as it is now. Raises UserError naming it where it cannot be seen."""
    if "://" in name:
        return File(name, *urls.look(name))
    try:
        status = os.stat(name)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    return File(name, status.st_size, str(status.st_mtime_ns))


def _local_matches(given: str) -> list[tuple[str, list[str] | None]]:
    """Each file or folder, and what is in the folder, recursively and relative to it."""
    found = []
    for match in [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True)):
        found.append((str(Path(match)), _below(match) if os.path.isdir(match) else None))
    return found


def _below(folder: str) -> list[str]:
    """The files in it, sorted, those behind links to folders among them. Raises UserError where one cannot be listed."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}")

    seen, found = set(), []
    for path, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(path)
        if real in seen:  # a link back to where it came from
            folders.clear()
            continue
        seen.add(real)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(path, name)), name))
        found += [Path(path, name) for name in names if os.path.isfile(os.path.join(path, name))]
    return [str(path.relative_to(folder)) for path in sorted(found)]


def _excluded(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(part, pattern) for part in Path(name).parts for pattern in patterns)


def _suffix(name: str) -> str:
    """The suffix below `.gz` and `.zst`, in lower case."""
    path = Path(name.partition("?")[0] if "://" in name else name)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def _compression(name: str) -> str | None:
    suffix = Path(name.partition("?")[0] if "://" in name else name).suffix.lower()
    return suffix if suffix in COMPRESSED else None


# ------------------------------------------------------------------------------------------------------------- partitions


class Piece(NamedTuple):
    """A file or a part of it: the lines that begin at start <= byte < stop, or row groups start <= i < stop."""

    file: File
    start: int = 0
    stop: int | None = None  # None: to the end


class Partition(NamedTuple):
    pieces: tuple[Piece, ...]
    bytes: int


def cut_partitions(files: Sequence[File], partition_bytes: int) -> list[Partition]:
    """Consecutive whole files until they have `partition_bytes`; a larger .jsonl or .parquet is cut.

    A pure function of the files' order, names and sizes, and of the footers of large .parquet files.
    """
    partitions: list[Partition] = []
    together: list[Piece] = []
    gathered = 0

    def finish() -> None:
        nonlocal gathered
        if together:
            partitions.append(Partition(tuple(together), gathered))
        together.clear()
        gathered = 0

    for file in files:
        size = partition_bytes if file.size is None else file.size
        if size > partition_bytes and not _compression(file.name) and _suffix(file.name) in (".jsonl", ".parquet"):
            finish()
            jsonl = _suffix(file.name) == ".jsonl"
            partitions += _byte_ranges(file, partition_bytes) if jsonl else _row_groups(file, partition_bytes)
            continue
        together.append(Piece(file))
        gathered += size
        if gathered >= partition_bytes:
            finish()
    finish()
    return partitions


def _byte_ranges(file: File, partition_bytes: int) -> list[Partition]:
    number = -(-file.size // partition_bytes)
    cuts = [file.size * cut // number for cut in range(number + 1)]
    return [Partition((Piece(file, start, stop),), stop - start) for start, stop in zip(cuts, cuts[1:])]


def _row_groups(file: File, partition_bytes: int) -> list[Partition]:
    pyarrow = _pyarrow(file.name)
    try:
        with _open(file) as raw:
            metadata = pyarrow.parquet.ParquetFile(raw).metadata
            sizes = [_stored_bytes(metadata.row_group(number)) for number in range(metadata.num_row_groups)]
    except (OSError, pyarrow.ArrowException):  # without a footer: one partition, whose reading tells what is wrong
        return [Partition((Piece(file),), file.size)]
    partitions, start, gathered = [], 0, 0
    for number, size in enumerate(sizes, start=1):
        gathered += size
        if gathered >= partition_bytes or number == len(sizes):
            partitions.append(Partition((Piece(file, start, number),), gathered))
            start, gathered = number, 0
    return partitions or [Partition((Piece(file),), file.size)]


def _stored_bytes(group) -> int:
    return sum(group.column(number).total_compressed_size for number in range(group.num_columns))


# ----------------------------------------------------------------------------------------------------------- reading


def read_documents(names: Iterable[str | Path]) -> Iterator[Document]:
    """The documents of the files, in order, one in memory at a time; what cannot be read comes with the reason."""
    for name in names:
        yield from Reader(Piece(File(str(name))))


class Reader:
    """Iterates over the documents of a piece.

    lines   lines of a .jsonl file passed so far, also empty ones. In a part of a file they are counted from its start,
            and so are the positions of documents: nobody knows yet how many lines come before.
    """

    def __init__(self, piece: Piece):
        self.piece, self.name, self.lines = piece, piece.file.name, 0

    def __iter__(self) -> Iterator[Document]:
        kind = _suffix(self.name)
        try:
            with _open(self.piece.file) as file:
                if kind == ".jsonl":
                    yield from self._read_lines(file)
                elif kind == ".parquet":
                    yield from self._read_rows(file)
                else:
                    yield Document(self.name, 0, [Part(file.read().decode("utf-8"))])
        except UnicodeDecodeError as error:
            yield Document(self.name, 0, unreadable=f"not UTF-8: {error}")
        except DAMAGED as error:  # from here on: what came before the damage has been read
            yield self._damage(self.lines, error)

    def _damage(self, position: int, error: Exception) -> Document:
        """Raises UserError where it is not the file's content that is wrong, but this machine."""
        if isinstance(error, OSError) and error.errno is not None:
            where = f" in {tempfile.gettempdir()}, where .parquet files are unpacked" if error.errno in NO_SPACE else ""
            raise UserError(f"{self.name}: cannot be read: {error.strerror or error}{where}") from None
        return Document(self.name, position, unreadable=f"{type(error).__name__}: {error}")

    def _read_lines(self, file: BinaryIO) -> Iterator[Document]:
        _, start, stop = self.piece
        position = start
        if start:  # the line that goes on here began in the part before, unless the byte before is a line's end
            position = file.seek(start - 1)
            while position < stop:
                rest = file.readline(BUFFER)
                position += len(rest)
                if not rest or rest.endswith(b"\n"):
                    break
        while stop is None or position < stop:
            line = file.readline()
            if not line:
                break
            position += len(line)
            self.lines += 1
            if not line.isspace():
                yield self._parse(self.lines, _from_line, line)

    def _read_rows(self, file: BinaryIO) -> Iterator[Document]:
        """A damaged row group ends with what is wrong; those behind it are read."""
        pyarrow = _pyarrow(self.name)
        with tempfile.TemporaryFile() as unpacked:
            if _compression(self.name):  # the footer is at the end
                shutil.copyfileobj(file, unpacked, BUFFER)
                file = unpacked
            try:
                opened = pyarrow.parquet.ParquetFile(
                    file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
                )
            except (OSError, pyarrow.ArrowException) as error:
                yield self._damage(0, error)
                return
            columns = [name for name in opened.schema_arrow.names if name in JsonDocument.model_fields]
            if not columns or len(set(columns)) < len(columns):
                found = ", ".join(opened.schema_arrow.names)
                yield Document(self.name, 0, unreadable=f"expected a column text or parts, found {found}")
                return
            groups = opened.metadata.num_row_groups
            rows = [opened.metadata.row_group(number).num_rows for number in range(groups)]
            for group in range(self.piece.start, groups if self.piece.stop is None else self.piece.stop):
                yield from self._read_row_group(opened, group, columns, sum(rows[:group]))

    def _read_row_group(self, opened, group: int, columns: list[str], position: int) -> Iterator[Document]:
        """`position`: rows before the group."""
        facts = opened.metadata.row_group(group)
        many = max(1, min(1024, PARQUET_BATCH * facts.num_rows // max(facts.total_byte_size, 1)))
        done = 0
        for together in (many, 1):  # where rows cannot be read together: one by one, as far as they can
            row = 0
            try:
                for batch in opened.iter_batches(together, row_groups=[group], columns=columns, use_threads=False):
                    for values in zip(*(batch.column(name) for name in columns)):
                        row += 1
                        if row > done:
                            done = row
                            yield self._parse(position + row, _from_row, dict(zip(columns, values)))
                return
            except (OSError, _pyarrow(self.name).ArrowException) as error:
                if together == 1:
                    yield self._damage(position + done, error)
                    return

    def _parse(self, position: int, parse, raw) -> Document:
        try:
            document = parse(raw)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            return Document(self.name, position, unreadable=": ".join(filter(None, [field, first["msg"]])))
        except UnicodeDecodeError as error:
            return Document(self.name, position, unreadable=f"not UTF-8: {error}")
        if type(document) is Part:
            return Document(self.name, position, [document])
        return Document(self.name, position, [Part(document.text)] if document.parts is None else document.parts)


def _from_line(line: bytes) -> JsonDocument | Part:
    """The usual line, which takes most of the time, in a third of it; JsonDocument says what is wrong with others."""
    try:
        fields = from_json(line)
    except ValueError:
        return JsonDocument.model_validate_json(line)
    if type(fields) is dict and type(fields.get("text")) is str and fields.get("parts") is None:
        return Part(fields["text"])
    return JsonDocument.model_validate_json(line)


def _from_row(values: dict) -> JsonDocument:
    return JsonDocument.model_validate({name: value.as_py() for name, value in values.items()})


@contextmanager
def _open(file: File) -> Iterator[BinaryIO]:
    """The bytes of a file or URL, decompressed."""
    remote = "://" in file.name
    with urls.open_url(file.name, file.size) if remote else open(file.name, "rb", BUFFER) as raw:
        compression = _compression(file.name)
        if remote and compression == ".gz" and raw.peek(2)[:2] != GZIP_MAGIC:
            compression = None  # sent as `Content-Encoding: gzip`, which HTTP itself has decompressed
        if compression is None:
            yield raw
        else:
            with gzip.GzipFile(fileobj=raw) if compression == ".gz" else zstd.ZstdFile(raw) as unpacked:
                yield unpacked


def _pyarrow(name: str):
    try:
        import pyarrow.parquet  # not needed by whoever has no such files
    except ImportError:
        raise UserError(f"{name}: reading .parquet needs pyarrow: pip install 'memformer_dist[parquet]'") from None
    return pyarrow
