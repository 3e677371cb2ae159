"""What a file is: by its suffix where that says so, and else by how its content begins.

    kind_by_suffix(".jsonl")                     -> Kind.JSON_LINES
    kind_of_content(b'{"text": "a"}\\n', whole=True, suffix=".json")  -> Kind.JSON_LINES
    what_it_is(b"PK\\x03\\x04...", ".docx")       -> "a ZIP archive (.docx, .xlsx and .epub are some too)"

Whatever is not listed here and is valid UTF-8 is text. A table, an archive or a binary file is never taken for text.
"""

import codecs
import re
from collections.abc import Collection
from enum import Enum

from pydantic_core import from_json

TEXT_SUFFIXES = (
    ".txt .text .md .rst .tex .org .py .pyi .pyx .c .h .cc .cpp .cxx .hh .hpp .cu .cuh .java .kt .scala .js .jsx .ts "
    ".tsx .go .rs .rb .php .pl .lua .sh .sql .r .jl .swift .cs .hs .ml .lisp .el .clj .f90 .asm .s"
)
TABLE_SUFFIXES = (".csv", ".tsv")
HEAD_BYTES = 2**16  # of a file are looked at
UTF8_BOM = codecs.BOM_UTF8


class Kind(str, Enum):
    TEXT = "text"  # one document
    JSON_LINES = "json lines"  # one document per line
    JSON = "json"  # one value: an array of documents, or one document
    PARQUET = "parquet"
    ARROW = "arrow"  # Arrow IPC, as a stream or as a file
    FOREIGN = "foreign"  # not text, although it is valid UTF-8: a table, a tar of texts
    BINARY = "binary"


BY_SUFFIX = dict.fromkeys(TEXT_SUFFIXES.split(), Kind.TEXT) | {
    ".jsonl": Kind.JSON_LINES,
    ".ndjson": Kind.JSON_LINES,
    ".jsonlines": Kind.JSON_LINES,
    ".parquet": Kind.PARQUET,
    ".arrow": Kind.ARROW,
}

# (byte, what is found there, what it means)
MARKS = (
    (0, b"PAR1", "Parquet"),
    (0, b"ARROW1", "an Arrow file"),
    (0, b"PK\x03\x04", "a ZIP archive (.docx, .xlsx and .epub are some too)"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x1f\x8b", "compressed by gzip; a file with the suffix .gz is decompressed"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd; a file with the suffix .zst is decompressed"),
    (0, b"\xfd7zXZ\x00", "compressed by xz, which is not read; .gz and .zst are"),
    (0, b"BZh91AY&SY", "compressed by bzip2, which is not read; .gz and .zst are"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a RAR archive"),
    (0, b"%PDF-", "a PDF"),
    (0, b"{\\rtf", "RTF"),
    (0, b"\x89PNG\r\n\x1a\n", "a picture"),
    (0, b"\xff\xd8\xff", "a picture"),
    (0, b"GIF87a", "a picture"),
    (0, b"GIF89a", "a picture"),
    (0, b"\x7fELF", "a program"),
    (0, b"SQLite format 3\x00", "an SQLite database"),
    (0, b"\xff\xfe", "probably text in UTF-16, which is not read; UTF-8 is"),
    (0, b"\xfe\xff", "probably text in UTF-16, which is not read; UTF-8 is"),
)


def kind_by_suffix(suffix: str) -> Kind | None:
    """None where the suffix does not say what the file is."""
    return BY_SUFFIX.get(suffix)


def kind_of_content(head: bytes, *, whole: bool, suffix: str = "") -> Kind:
    """What a file is that begins with `head`, of which `whole` says whether it is all of the file.

    `suffix` is asked for what content cannot say: that text is a table, that a damaged file was to be JSON.
    """
    mark = _mark(head)
    if mark == "Parquet":
        return Kind.PARQUET
    if mark == "an Arrow file":
        return Kind.ARROW
    if not _is_utf8(head, whole):
        return Kind.BINARY
    if mark or suffix in TABLE_SUFFIXES or 10 * head.count(0) > len(head) > 16:
        return Kind.FOREIGN
    return _kind_of_json(head, whole, suffix) or Kind.TEXT


def what_it_is(head: bytes, suffix: str) -> str | None:
    """In words, of a file that is not text; None where nobody knows."""
    if mark := _mark(head):
        return mark
    return f"a table ({suffix}), expected JSON lines or Parquet" if suffix in TABLE_SUFFIXES else None


def may_hold_documents(head: bytes, kind: Kind, fields: Collection[str]) -> bool:
    """Whether JSON that begins with `head` has one of the `fields` where documents have them, as far as can be seen."""
    if kind is Kind.JSON_LINES and (rows := [row for line in head.split(b"\n") if (row := _object(line))]):
        return any(name in row for row in rows for name in fields)
    value = _value(head.removeprefix(UTF8_BOM))
    if value is not None:
        values = value if isinstance(value, list) else [value]
        return any(
            isinstance(value, str) or (isinstance(value, dict) and any(map(value.__contains__, fields)))
            for value in values
        )
    return any(re.search(rb'"%s"\s*:' % re.escape(name.encode()), head) for name in fields)


def _mark(head: bytes) -> str | None:
    return next((meaning for start, found, meaning in MARKS if head.startswith(found, start)), None)


def _is_utf8(head: bytes, whole: bool) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=whole)
    except UnicodeDecodeError:
        return False
    return True


def _kind_of_json(head: bytes, whole: bool, suffix: str) -> Kind | None:
    """JSON_LINES where a line is an object, JSON for any other value, or None. Other suffixes than .json want proof."""
    text = head.removeprefix(UTF8_BOM).strip()
    looks_like_json = re.match(rb'\[\s*[\[{"\]]|\{\s*["}]', text) is not None
    if not text or not (looks_like_json or suffix == ".json"):
        return None
    if not text.startswith(b"["):
        first, *others = text.split(b"\n")
        if any(map(_object, [first, *others])) or not (others or whole):  # or one line, longer than `head`
            return Kind.JSON_LINES
        # An object that is laid out over several lines has no other that begins with {, if anything is indented.
        if suffix == ".json" and any(line.startswith(b"{") and line.strip() != b"{" for line in others):
            return Kind.JSON_LINES
    return Kind.JSON if suffix in (".json", "") else None


def _object(line: bytes) -> dict[str, object] | None:
    """The JSON object that a line is, if it is one, with fields, and not indented."""
    line = line.removeprefix(UTF8_BOM)
    value = _value(line) if line.startswith(b"{") else None
    return value if isinstance(value, dict) and value else None


def _value(raw: bytes) -> object:
    try:
        return from_json(raw)
    except ValueError:
        return None
