"""Documents from files: what tokenizer/train.py and tokenizer/shard.py read.

A text or source file is one document. So is every line of a `.jsonl` file and every row of a `.parquet` file, with a
field `text` or instead of it `parts`, [{"text": ..., "loss": true|false}, ...]; the model reads parts with "loss":
false but is not trained to predict them. Any of these may be compressed (`.gz`, `.zst`) and may lie behind a URL
(data/transfer.py).

A document that cannot be read does not stop the others: it arrives with the reason, and the caller counts and reports
it. A fault of the machine, such as a bad or a full disk, ends the program instead. Text is kept exactly as it is in the
file: nothing is stripped, and newlines are not translated.
"""

import gzip
import io
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple, cast

from pydantic import BaseModel, ValidationError, model_validator
from pydantic_core import from_json

from memformer_dist.data import transfer
from memformer_dist.errors import UserError, first_problem
from memformer_dist.files import NO_SPACE

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESSED = (".gz", ".zst")
GZIP_MAGIC = b"\x1f\x8b"
DAMAGED = (OSError, EOFError, zlib.error, zstd.ZstdError)
BUFFER_BYTES = 2**18
PARQUET_BUFFER_BYTES = 2**20
PARQUET_BATCH_BYTES, PARQUET_BATCH_ROWS = 2**22, 1024  # of rows that are decoded together, at most


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
    def has_full_loss(self) -> bool:
        """Every label counts in the loss."""
        parts = self.parts
        return parts[0].loss if len(parts) == 1 else all(part.loss for part in parts)


class JsonDocument(BaseModel):
    """One line of a .jsonl file or one row of a .parquet file; other fields are ignored."""

    text: str | None = None
    parts: list[Part] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "JsonDocument":
        if (self.text is None) == (self.parts is None):
            raise ValueError("expected either the field text or the field parts")
        return self


# ------------------------------------------------------------------------------------------------------------- files


class File(NamedTuple):
    name: str  # as it was given, or found in what was given
    size: int | None = None  # bytes; None where a server does not report it
    changed: str = ""  # time of the last change in ns; for a URL its ETag or another mark of this version
    path: str = ""  # the same for all names of one file


class Piece(NamedTuple):
    """A file, or a part of it: the lines that begin at start <= byte < stop, or the row groups start <= i < stop."""

    file: File
    start: int = 0
    stop: int | None = None  # None: to the end


def look(name: str) -> File:
    """A file as it is now, without its `path`. Raises UserError naming it where it cannot be seen."""
    if "://" in name:
        return File(name, *transfer.look(name))
    try:
        status = os.stat(name)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    return File(name, status.st_size, str(status.st_mtime_ns))


def suffix_of(name: str) -> str:
    """The suffix before `.gz` or `.zst`, in lower case: ".jsonl" for a.JSONL.gz."""
    path = _path_of(name)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def compression_of(name: str) -> str | None:
    """ ".gz", ".zst" or None."""
    suffix = _path_of(name).suffix.lower()
    return suffix if suffix in COMPRESSED else None


def _path_of(name: str) -> Path:
    return Path(name.partition("?")[0] if "://" in name else name)


@contextmanager
def open_file(file: File) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file or URL, decompressed."""
    is_remote = "://" in file.name
    with transfer.open_url(file.name, file.size) if is_remote else _open_local(file.name) as raw:
        compression = compression_of(file.name)
        if is_remote and compression == ".gz" and raw.peek(2)[:2] != GZIP_MAGIC:
            compression = None  # sent as `Content-Encoding: gzip`, which HTTP itself has decompressed
        if compression is None:
            yield raw
        else:
            with gzip.GzipFile(fileobj=raw) if compression == ".gz" else zstd.ZstdFile(raw) as unpacked:
                yield unpacked


def _open_local(name: str) -> io.BufferedReader:
    return cast(io.BufferedReader, open(name, "rb", BUFFER_BYTES))


def import_pyarrow(name: str) -> ModuleType:
    """pyarrow with its parquet module, an optional package. Raises UserError naming the file that needs it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{name}: reading .parquet needs pyarrow: pip install 'memformer_dist[parquet]'") from None
    return pyarrow


# ----------------------------------------------------------------------------------------------------------- reading


def read_documents(names: Iterable[str | Path]) -> Iterator[Document]:
    """The documents of the files, in order, one in memory at a time; an unreadable one arrives with the reason."""
    for name in names:
        yield from Reader(Piece(File(str(name))))


class Reader:
    """Iterates over the documents of a piece.

    lines   lines of a .jsonl file read so far, empty ones included. In a part of a file lines are counted from the
            start of the part, and so are the positions of documents: nobody knows yet how many lines come before it.
    """

    def __init__(self, piece: Piece):
        self.piece, self.name, self.lines = piece, piece.file.name, 0

    def __iter__(self) -> Iterator[Document]:
        kind = suffix_of(self.name)
        try:
            with open_file(self.piece.file) as file:
                if kind == ".jsonl":
                    yield from self._read_lines(file)
                elif kind == ".parquet":
                    yield from self._read_rows(file)
                else:
                    yield Document(self.name, 0, [Part(file.read().decode("utf-8"))])
        except UnicodeDecodeError as error:
            yield Document(self.name, 0, unreadable=f"not UTF-8: {error}")
        except DAMAGED as error:  # the documents before the damage have been read
            yield self._damaged(self.lines, error)

    def _damaged(self, position: int, error: Exception) -> Document:
        """Raises UserError where the fault is not in the content of the file but in this machine."""
        if isinstance(error, OSError) and error.errno is not None:
            where = f" in {tempfile.gettempdir()}, where .parquet files are unpacked" if error.errno in NO_SPACE else ""
            raise UserError(f"{self.name}: cannot be read: {error.strerror or error}{where}") from None
        return Document(self.name, position, unreadable=f"{type(error).__name__}: {error}")

    def _read_lines(self, file: io.BufferedIOBase) -> Iterator[Document]:
        _, position, stop = self.piece
        if position:
            position = _seek_to_line(file, position, stop)
        while stop is None or position < stop:
            line = file.readline()
            if not line:
                break
            position += len(line)
            self.lines += 1
            if not line.isspace():
                yield self._document(self.lines, _from_line, line)

    def _read_rows(self, file: io.BufferedIOBase) -> Iterator[Document]:
        """A damaged row group ends with a document that says so; the groups after it are read."""
        pyarrow = import_pyarrow(self.name)
        with tempfile.TemporaryFile() as unpacked:
            source: io.BufferedIOBase | IO[bytes] = file
            if compression_of(self.name):  # Parquet is read from its end, a compressed file only from its start
                shutil.copyfileobj(file, unpacked, PARQUET_BUFFER_BYTES)
                source = unpacked
            try:
                opened = pyarrow.parquet.ParquetFile(
                    source, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
                )
            except (OSError, pyarrow.ArrowException) as error:
                yield self._damaged(0, error)
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

    def _read_row_group(self, opened: Any, group: int, columns: list[str], before: int) -> Iterator[Document]:
        """`opened`: pyarrow's ParquetFile. `before`: rows of the file before the group."""
        metadata = opened.metadata.row_group(group)
        rows_that_fit = PARQUET_BATCH_BYTES * metadata.num_rows // max(metadata.total_byte_size, 1)
        done = 0
        # Where rows cannot be decoded together, they are decoded one by one as far as that goes.
        for batch_rows in max(1, min(PARQUET_BATCH_ROWS, rows_that_fit)), 1:
            try:
                for row in islice(_rows(opened, group, columns, batch_rows), done, None):
                    done += 1
                    yield self._document(before + done, _from_row, row)
                return
            except (OSError, import_pyarrow(self.name).ArrowException) as error:
                damage = error
        yield self._damaged(before + done, damage)

    def _document(self, position: int, parse: Callable[[Any], JsonDocument | Part], raw: object) -> Document:
        try:
            document = parse(raw)
        except ValidationError as error:
            return Document(self.name, position, unreadable=first_problem(error))
        except UnicodeDecodeError as error:
            return Document(self.name, position, unreadable=f"not UTF-8: {error}")
        if isinstance(document, Part):
            return Document(self.name, position, [document])
        return Document(self.name, position, [Part(document.text or "")] if document.parts is None else document.parts)


def _seek_to_line(file: io.BufferedIOBase, start: int, stop: int | None) -> int:
    """The position of the first line that begins at byte `start` or after it, not looking further than `stop`."""
    position = file.seek(start - 1)  # a line begins at `start` if the byte before it ends one
    while stop is None or position < stop:
        rest = file.readline(BUFFER_BYTES)
        position += len(rest)
        if not rest or rest.endswith(b"\n"):
            break
    return position


def _rows(opened: Any, group: int, columns: list[str], batch_rows: int) -> Iterator[dict[str, Any]]:
    """The rows of a row group, with pyarrow's values."""
    for batch in opened.iter_batches(batch_rows, row_groups=[group], columns=columns, use_threads=False):
        for values in zip(*(batch.column(name) for name in columns), strict=True):
            yield dict(zip(columns, values, strict=True))


def _from_line(line: bytes) -> JsonDocument | Part:
    """The usual line, which has a text alone, takes a third of the time; JsonDocument explains what is wrong."""
    try:
        fields = from_json(line)
    except ValueError:
        return JsonDocument.model_validate_json(line)
    if type(fields) is dict and type(fields.get("text")) is str and fields.get("parts") is None:
        return Part(fields["text"])
    return JsonDocument.model_validate_json(line)


def _from_row(values: dict[str, Any]) -> JsonDocument:
    return JsonDocument.model_validate({name: value.as_py() for name, value in values.items()})
