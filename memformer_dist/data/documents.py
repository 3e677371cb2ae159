"""Documents from files: what tokenizer/train.py and tokenizer/shard.py read.

An input is a folder (read recursively), a glob or a file. A text or source file is one document. So is every line of a
`.jsonl` file, with a field `text` or instead of it `parts`, [{"text": ..., "loss": true|false}, ...], where parts
without loss are read by the model but not learnt. Any of them may be compressed (`.gz`). In folders only the suffixes
below are read; a file that is named directly or by a glob is read whatever its name.

A document that cannot be read does not stop the others: it arrives with the reason, and the caller counts and reports
it. Text is kept exactly as it is in the file; nothing is stripped, and newlines are not translated.
"""

import fnmatch
import glob
import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

from pydantic import BaseModel, ValidationError, model_validator

from memformer_dist.errors import UserError

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .org .py .pyi .pyx .c .h .cc .cpp .cxx .hh .hpp .cu .cuh .java .kt .scala .js .jsx .ts "
    ".tsx .go .rs .rb .php .pl .lua .sh .sql .r .jl .swift .cs .hs .ml .lisp .el .clj .f90 .asm .s".split()
)


@dataclass(frozen=True)
class Part:
    text: str
    loss: bool = True


class Document(NamedTuple):
    source: str  # the file
    position: int  # the line of a .jsonl file, counted from 1; 0 where the file is one document
    parts: Sequence[Part] = ()
    unreadable: str | None = None  # the reason why there are no parts

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)


class JsonDocument(BaseModel):
    """One line of a .jsonl file; other fields than these are ignored."""

    text: str | None = None
    parts: list[Part] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "JsonDocument":
        if (self.text is None) == (self.parts is None):
            raise ValueError("expected either the field text or the field parts")
        return self


class Discovery(NamedTuple):
    files: list[Path]
    ignored: int  # files in folders whose suffix is not one of text


def discover(inputs: Sequence[str | Path], exclude: Sequence[str] = ()) -> Discovery:
    """The files of folders, globs and files, in the order of the inputs, sorted within each, and each file once.

    `exclude`: patterns (site-packages, *_test.py) of the names of files and folders that are passed over in folders.
    Raises UserError naming an input that does not exist or holds nothing to read.
    """
    files: dict[str, Path] = {}  # by real path
    ignored = 0
    for given in map(str, inputs):
        matches = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        if not matches:
            raise UserError(f"found no file or folder {given!r}")
        readable = []
        for match in map(Path, matches):
            if match.is_dir():
                inside = sorted(path for path in match.rglob("*") if path.is_file())
                inside = [path for path in inside if not _excluded(path.relative_to(match), exclude)]
                known = [path for path in inside if _suffix(path) in TEXT_SUFFIXES or _suffix(path) == ".jsonl"]
                ignored += len(inside) - len(known)
                readable += known
            else:
                readable.append(match)
        if not readable:
            raise UserError(f"{given!r} holds no text file, no source file and no .jsonl")
        for path in readable:
            files.setdefault(os.path.realpath(path), path)
    return Discovery(list(files.values()), ignored)


def read_documents(files: Sequence[Path]) -> Iterator[Document]:
    """The documents of the files, in order, one in memory at a time; what cannot be read comes with the reason."""
    for path in files:
        position = 0
        try:
            with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
                if _suffix(path) != ".jsonl":
                    yield Document(str(path), 0, [Part(file.read().decode("utf-8"))])
                    continue
                for position, line in enumerate(file, start=1):
                    if not line.isspace():
                        yield _parse(path, position, line)
        except UnicodeDecodeError as error:
            yield Document(str(path), 0, unreadable=f"not UTF-8: {error}")
        except (OSError, EOFError, zlib.error) as error:  # from here on: what came before the damage has been read
            yield Document(str(path), position, unreadable=f"{type(error).__name__}: {error}")


def _parse(path: Path, position: int, line: bytes) -> Document:
    try:
        document = JsonDocument.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        return Document(str(path), position, unreadable=": ".join(filter(None, [field, first["msg"]])))
    return Document(str(path), position, [Part(document.text)] if document.parts is None else document.parts)


def _excluded(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(part, pattern) for part in path.parts for pattern in patterns)


def _suffix(path: Path) -> str:
    """The suffix below `.gz`, in lower case."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
