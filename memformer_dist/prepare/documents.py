"""Documents from files: what tokenizer/train.py and tokenizer/shard.py read.

A text or source file is one document. So is every line of JSON lines, every element of a JSON array and every row of
Parquet and Arrow files (records.py says by which fields). What a file is, its suffix says or else its content
(kinds.py). Any of these may be compressed (`.gz`, `.zst`) and may lie behind a URL (data/transfer.py).

A document that cannot be read does not stop the others: it arrives with the reason, and the caller counts and reports
it. A fault of the machine, such as a bad or a full disk, ends the program instead. Text is kept exactly as it is in the
file: nothing is stripped, and newlines are not translated.
"""

import gzip
import io
import os
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple, cast

from pydantic import ValidationError
from pydantic_core import from_json

from memformer_dist.data import transfer
from memformer_dist.errors import UserError, first_problem
from memformer_dist.files import NO_SPACE
from memformer_dist.prepare.kinds import HEAD_BYTES, UTF8_BOM, Kind, kind_by_suffix, kind_of_content, what_it_is
from memformer_dist.prepare.records import Part, fields_of, from_line, from_row, from_value, missing_field

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESSED = (".gz", ".zst")
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_OPTIONS: dict[int, int] = {
    zstd.DecompressionParameter.window_log_max: zstd.DecompressionParameter.window_log_max.bounds()[1]
}
DAMAGED = (OSError, EOFError, zlib.error, zstd.ZstdError)
BUFFER_BYTES = 2**18
PARQUET_BUFFER_BYTES = 2**20
SHOWN_UNREADABLE = 5  # documents, or files
ARROW_MARK = b"ARROW1"
PARQUET_BATCH_BYTES, PARQUET_BATCH_ROWS = 2**22, 1024  # of rows that are decoded together, at most


class Document(NamedTuple):
    source: str  # the file
    position: int  # line, element or row, counted from 1; 0 where the file is one document or none
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


class Unreadable:
    """Counts the documents that cannot be read, which are added file by file with the others.

    lost    files with unreadable documents and without any other
    """

    def __init__(self) -> None:
        self.count = 0
        self.lost: dict[str, None] = {}  # in their order
        self._readable = ""  # the last file with a readable document

    def add(self, document: Document) -> None:
        if document.unreadable is None:
            self._readable = document.source
            self.lost.pop(document.source, None)
            return
        self.count += 1
        if document.source != self._readable:
            self.lost[document.source] = None


class Place(NamedTuple):
    """Where a document cannot be read, and why."""

    file: str
    position: int
    reason: str


def shown_places(places: Iterable[Place], lost: Collection[str]) -> list[str]:
    """Messages about the first unreadable documents; about a file of which nothing could be read there is one."""
    messages: list[str] = []
    told: set[str] = set()
    for file, position, reason in places:
        if file in told:
            continue
        where = f"line {position}: " if position else ""
        if file not in lost:
            messages.append(f"{file}, {where}{reason}" if where else f"{file}: {reason}")
        else:
            told.add(file)
            messages.append(f"{file}: {'nothing in it can be read; ' if where else ''}{where}{reason}")
        if len(messages) == SHOWN_UNREADABLE:
            break
    return messages


# ------------------------------------------------------------------------------------------------------------- files


class File(NamedTuple):
    name: str  # as it was given, or found in what was given
    size: int | None = None  # bytes; None where a server does not report it
    changed: str = ""  # time of the last change in ns; for a URL its ETag or another mark of this version
    path: str = ""  # the same for all names of one file
    kind: Kind | None = None  # None: nobody has looked yet


class Piece(NamedTuple):
    """A file, or a part of it: the lines that begin at start <= byte < stop, or the row groups start <= i < stop."""

    file: File
    start: int = 0
    stop: int | None = None  # None: to the end


def look(name: str) -> File:
    """A file as it is now, without its `path` and `kind`. Raises UserError naming it where it cannot be seen."""
    if "://" in name:
        return File(name, *transfer.look(name))
    try:
        status = os.stat(name)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    if what := special(status.st_mode):
        raise UserError(f"{name}: is {what}, expected a file or a folder; what comes out of it can be saved in a file")
    return File(name, status.st_size, str(status.st_mtime_ns))


def special(mode: int) -> str | None:
    """What a path is that is neither a file nor a folder, from its st_mode."""
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "neither a file nor a folder")


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
            with gzip.GzipFile(fileobj=raw) if compression == ".gz" else _open_zstd(raw) as unpacked:
                yield unpacked


def _open_zstd(raw: io.BufferedReader) -> io.BufferedIOBase:
    """Of any window (zstd --long=31): as many bytes are held in memory as the file says that it needs, up to 2 GiB."""
    return cast(io.BufferedIOBase, zstd.ZstdFile(raw, options=ZSTD_OPTIONS))


def head_of(file: File) -> tuple[bytes, bool]:
    """How a file begins, decompressed, and whether that is all of it.

    Raises UserError where it cannot be read, and one of DAMAGED where its compression is damaged.
    """
    try:
        with open_file(file) as opened:
            head = opened.read(HEAD_BYTES)
            return head, not (len(head) == HEAD_BYTES and opened.read(1))
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(f"{file.name}: cannot be read: {error.strerror or error}") from None


def kind_of(file: File) -> Kind:
    """What a file is. It is opened where its suffix does not say. Raises UserError where it cannot be read."""
    suffix = suffix_of(file.name)
    if (kind := file.kind or kind_by_suffix(suffix)) is not None:
        return kind
    try:
        head, whole = head_of(file)
    except DAMAGED:  # whoever reads it will say what is wrong
        return Kind.JSON if suffix == ".json" else Kind.TEXT
    return kind_of_content(head, whole=whole, suffix=suffix)


def _open_local(name: str) -> io.BufferedReader:
    return cast(io.BufferedReader, open(name, "rb", BUFFER_BYTES))


def import_pyarrow(name: str) -> ModuleType:
    """pyarrow with its modules parquet and ipc, an optional package. Raises UserError naming the file that needs it."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{name}: reading .parquet and .arrow needs pyarrow: pip install 'memformer_dist[parquet]'"
        ) from None
    return pyarrow


# ----------------------------------------------------------------------------------------------------------- reading


def read_documents(files: Iterable[str | Path | File], text_field: str | None = None) -> Iterator[Document]:
    """The documents of the files, in order, one in memory at a time; an unreadable one arrives with the reason."""
    for file in files:
        yield from Reader(Piece(file if isinstance(file, File) else File(str(file))), text_field)


class Reader:
    """Iterates over the documents of a piece. `text_field`: the field that is read as the text, if not as usual.

    lines   JSON lines read so far, empty ones included. In a part of a file lines are counted from the start of the
            part, and so are the positions of documents: nobody knows yet how many lines come before it.
    """

    def __init__(self, piece: Piece, text_field: str | None = None):
        self.piece, self.name, self.lines = piece, piece.file.name, 0
        self._text_field = text_field

    def __iter__(self) -> Iterator[Document]:
        kind = kind_of(self.piece.file)
        try:
            with open_file(self.piece.file) as file:
                match kind:
                    case Kind.JSON_LINES:
                        yield from self._read_lines(file)
                    case Kind.JSON:
                        yield from self._read_json(file)
                    case Kind.PARQUET:
                        yield from self._read_parquet(file)
                    case Kind.ARROW:
                        yield from self._read_arrow(file)
                    case Kind.FOREIGN | Kind.BINARY:
                        yield self._refused(file.read(HEAD_BYTES))
                    case Kind.TEXT:
                        yield self._read_text(file)
        except DAMAGED as error:  # the documents before the damage have been read
            yield self._damaged(self.lines, error)

    def _read_text(self, file: io.BufferedIOBase) -> Document:
        raw = file.read()
        try:
            return Document(self.name, 0, [Part(raw.decode("utf-8"))])
        except UnicodeDecodeError as error:
            what = what_it_is(raw[:HEAD_BYTES], suffix_of(self.name))
            return Document(self.name, 0, unreadable=f"not UTF-8: {error}" + (f"; it is {what}" if what else ""))

    def _refused(self, head: bytes) -> Document:
        what = what_it_is(head, suffix_of(self.name)) or "a binary file"
        return Document(self.name, 0, unreadable=f"not text but {what}")

    def _damaged(self, position: int, error: Exception) -> Document:
        """Raises UserError where the fault is not in the content of the file but in this machine."""
        if isinstance(error, OSError) and error.errno is not None:
            is_full = error.errno in NO_SPACE
            where = f" in {tempfile.gettempdir()}, where .parquet and .arrow files are unpacked" if is_full else ""
            raise UserError(f"{self.name}: cannot be read: {error.strerror or error}{where}") from None
        if isinstance(error, zstd.ZstdError) and "memory" in str(error):
            raise UserError(f"{self.name}: {error}: its window needs up to 2 GiB; fewer --workers need less") from None
        limit = "; what was compressed with a dictionary is not read" if "Dictionary" in str(error) else ""
        return Document(self.name, position, unreadable=f"{type(error).__name__}: {error}{limit}")

    def _read_lines(self, file: io.BufferedIOBase) -> Iterator[Document]:
        _, position, stop = self.piece
        if position:
            position = _seek_to_line(file, position, stop)
        while stop is None or position < stop:
            line = file.readline()
            if not line:
                break
            text = line if position else line.removeprefix(UTF8_BOM)
            position += len(line)
            self.lines += 1
            if text and not text.isspace():
                yield self._document(self.lines, from_line, text)

    def _read_json(self, file: io.BufferedIOBase) -> Iterator[Document]:
        """The elements of an array, or the one object. It is held in memory whole."""
        try:
            value = from_json(file.read().removeprefix(UTF8_BOM))
        except ValueError as error:
            yield Document(self.name, 0, unreadable=f"neither JSON nor JSON lines: {error}")
            return
        if not isinstance(value, list):
            yield self._document(0, from_value, value)
            return
        for position, element in enumerate(value, start=1):
            yield self._document(position, from_value, element)

    def _read_parquet(self, file: io.BufferedIOBase) -> Iterator[Document]:
        """A damaged row group ends with a document that says so; the groups after it are read."""
        pyarrow = import_pyarrow(self.name)
        with self._seekable(file) as source:
            try:
                opened = pyarrow.parquet.ParquetFile(
                    source, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
                )
            except (OSError, pyarrow.ArrowException) as error:
                yield self._damaged(0, error)
                return
            columns, problem = self._columns(opened.schema_arrow.names)
            if problem:
                yield problem
                return
            groups = opened.metadata.num_row_groups
            rows = [opened.metadata.row_group(number).num_rows for number in range(groups)]
            for group in range(self.piece.start, groups if self.piece.stop is None else self.piece.stop):
                yield from self._read_row_group(opened, group, columns, sum(rows[:group]))

    def _read_arrow(self, file: io.BufferedIOBase) -> Iterator[Document]:
        """Where a batch of rows is damaged the file ends with a document that says so."""
        pyarrow = import_pyarrow(self.name)
        done = 0
        with self._seekable(file) as source:
            try:
                is_file = source.read(len(ARROW_MARK)) == ARROW_MARK
                source.seek(0)
                opened = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source)
                columns, problem = self._columns(opened.schema.names)
                if problem:
                    yield problem
                    return
                batches = map(opened.get_batch, range(opened.num_record_batches)) if is_file else opened
                for batch in batches:
                    for values in zip(*(batch.column(name) for name in columns), strict=True):
                        done += 1
                        yield self._document(done, from_row, dict(zip(columns, values, strict=True)))
            except (OSError, pyarrow.ArrowException) as error:
                yield self._damaged(done, error)

    @contextmanager
    def _seekable(self, file: io.BufferedIOBase) -> Iterator[io.BufferedIOBase | IO[bytes]]:
        """Parquet and Arrow are read from their end, a compressed file only from its start."""
        if compression_of(self.name) is None:
            yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(file, unpacked, PARQUET_BUFFER_BYTES)
            unpacked.seek(0)
            yield unpacked

    def _columns(self, found: list[str]) -> tuple[list[str], Document | None]:
        """The columns to be read, or what is wrong with them."""
        columns = [name for name in found if name in fields_of(self._text_field)]
        if columns and len(set(columns)) == len(columns):
            return columns, None
        twice = "; a column is there twice" if columns else ""
        return [], Document(self.name, 0, unreadable=missing_field(found, self._text_field, "column") + twice)

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
                    yield self._document(before + done, from_row, row)
                return
            except (OSError, import_pyarrow(self.name).ArrowException) as error:
                damage = error
        yield self._damaged(before + done, damage)

    def _document(self, position: int, parse: Callable[[Any, str | None], list[Part]], raw: object) -> Document:
        try:
            return Document(self.name, position, parse(raw, self._text_field))
        except ValidationError as error:
            return Document(self.name, position, unreadable=first_problem(error))
        except UnicodeDecodeError as error:
            return Document(self.name, position, unreadable=f"not UTF-8: {error}")
        except ValueError as error:
            return Document(self.name, position, unreadable=str(error))


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
