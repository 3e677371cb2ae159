"""What workers do with a unit of the inputs: `survey_unit` counts, `write_unit` makes its shards.

Both are called in other processes (workers.py), so they are told all they need, and what lasts they write to files.
Neither torch nor corpus.py is imported here: workers start in a fraction of a second.
"""

import errno
import functools
import hashlib
import json
import os
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import numpy as np
from safetensors.numpy import save as save_safetensors
from sentencepiece import SentencePieceProcessor, SetMinLogLevel

from memformer_dist.data.documents import Document, File, Reader, Unit, look
from memformer_dist.data.shards import Facts, Shard, ShardWriter, wrong_size
from memformer_dist.errors import UserError

BATCH_CHARACTERS = 250_000  # encoded together; what a worker holds besides the largest document


class UnitReader:
    """Iterates over the documents of a unit, all of them, and keeps count of what has passed.

    Raises UserError naming a file that is no longer what it was when it was listed.
    """

    def __init__(self, unit: Unit):
        self._unit = unit
        self.documents, self.crc32 = 0, 0
        self.lines = 0  # of the last piece

    def __iter__(self) -> Iterator[Document]:
        for piece in self._unit.pieces:
            _expect_unchanged(piece.file)
            reader = Reader(piece)
            for document in reader:
                self.documents += 1
                yield document
            self.lines = reader.lines
            self.crc32 = zlib.crc32(reader.crc32.to_bytes(4, "little"), self.crc32)
            _expect_unchanged(piece.file)


def _expect_unchanged(file: File) -> None:
    try:
        now = look(file.name)
    except UserError as error:
        raise UserError(f"{file.name}: changed while it was read: {error}") from None
    if now != file:
        raise UserError(
            f"{file.name}: changed while it was read: {now.size} bytes, changed at {now.changed}; when the inputs were"
            f" listed {file.size} bytes, {file.changed}. Run again when nobody writes it any more"
        )


class Found(NamedTuple):
    """What the survey found in a unit."""

    documents: int
    unusable: list[int]  # numbers of the documents that are empty or unreadable
    unreadable: list[list]  # [file, position, reason] of some of these
    masked: bool  # some part is not to be learnt
    lines: int  # where the unit is a part of a .jsonl
    crc32: int  # of what was read


def survey_unit(task: tuple[int, Unit]) -> tuple[int, Found]:
    """(Number, unit) -> (number, what was found)."""
    unit_number, unit = task
    reader, unusable, unreadable, masked = UnitReader(unit), [], [], False
    for number, document in enumerate(reader):
        if not document.text:
            unusable.append(number)
        if document.unreadable:
            unreadable.append([document.source, document.position, document.unreadable])
        masked = masked or not document.learnt
    return unit_number, Found(reader.documents, unusable, unreadable, masked, reader.lines, reader.crc32)


class WriteTask(NamedTuple):
    number: int
    folder: Path  # CORPUS.partial
    unit: Unit
    valid: np.ndarray  # int64 [n], numbers of the documents for validation
    found: Found
    facts: Facts


def write_unit(task: WriteTask) -> tuple[int, dict]:
    """Make the shards of a unit -> (its number, its record)."""
    model = _model(task.folder / "corpus" / "tokenizer.model", task.facts.tokenizer_sha256)
    reader, valid = UnitReader(task.unit), frozenset(task.valid.tolist())
    chosen = (
        ("valid" if number in valid else "train", document) for number, document in enumerate(reader) if document.text
    )
    writers: dict[str, ShardWriter] = {}
    figures: dict[str, dict] = {}
    path = task.folder
    try:
        with ExitStack() as stack:
            for split, document, tokens, mask in tokenise(chosen, model):
                if split not in writers:
                    path = task.folder / "corpus" / split / f"shard-{task.number:06d}.tar"
                    writer = ShardWriter(path, task.number, task.facts.token_dtype, task.facts.has_mask)
                    writers[split] = stack.enter_context(writer)
                    figures[split] = {"characters": 0, "labels": 0}
                path = writers[split].path
                if len(tokens):  # a tokenizer from elsewhere may make nothing of blanks
                    writers[split].add(tokens, mask)
                figures[split]["characters"] += len(document.text)
                figures[split]["labels"] += len(tokens) if mask is None else int(mask.sum())
            if (reader.documents, reader.crc32) != (task.found.documents, task.found.crc32):
                first, last = task.unit.pieces[0].file.name, task.unit.pieces[-1].file.name
                names = first if first == last else f"a file of {first} ... {last}"
                raise UserError(f"{names}: changed while it was read: its documents are not those of the first reading")
            for split, writer in writers.items():
                path = writer.path
                if writer.documents:
                    written = writer.close()
                    figures[split]["shard"] = written.shard.model_dump()
                    columns = {name: column for name, column in written.index._asdict().items() if column is not None}
                    store(index_path(task.folder, task.number, split), save_safetensors(columns))
        record = {split: figures[split] for split in sorted(figures)}
        store(record_path(task.folder, task.number), json.dumps(record).encode())
    except OSError as error:
        raise cannot_write(path, error) from None
    return task.number, record


def tokenise(
    documents: Iterable[tuple[str, Document]], model: SentencePieceProcessor
) -> Iterator[tuple[str, Document, np.ndarray, np.ndarray | None]]:
    """Each (split, document) with its tokens int32 [n] and its mask uint8 [n], None where every label counts.

    The parts of a document are encoded one by one.
    """
    for batch in _batches(documents):
        texts = [part.text for _, document in batch for part in document.parts]
        encoded = iter(model.encode(texts, out_type="numpy", num_threads=1))
        for split, document in batch:
            if len(document.parts) == 1 and document.learnt:
                yield split, document, next(encoded), None
                continue
            pieces = [next(encoded) for _ in document.parts]
            tokens, mask = np.concatenate(pieces), None
            if not document.learnt:
                learnt = np.concatenate([np.full(len(piece), part.loss) for piece, part in zip(pieces, document.parts)])
                # Label i is token i + 1; the last label, EOS, belongs to the part that ends the document.
                mask = np.append(learnt[1:], document.parts[-1].loss).astype(np.uint8)[: len(tokens)]
            yield split, document, tokens, mask


def _batches(documents: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    batch, size = [], 0
    for split, document in documents:
        batch.append((split, document))
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def _model(path: Path, sha256: str) -> SentencePieceProcessor:
    """Once in a worker."""
    model, raw = load_tokenizer(path)
    assert hashlib.sha256(raw).hexdigest() == sha256
    return model


# ------------------------------------------------------------------------------------------- files of CORPUS.partial


def load_tokenizer(path: Path) -> tuple[SentencePieceProcessor, bytes]:
    """The model and its file's bytes."""
    SetMinLogLevel(2)  # errors arrive as exceptions
    try:
        raw = path.read_bytes()
        model = SentencePieceProcessor(model_proto=raw)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--tokenizer: cannot load {path}: {error}") from None
    if min(model.bos_id(), model.eos_id()) < 0:
        raise UserError(f"--tokenizer: {path} has no BOS or no EOS token; train it with tokenizer/train.py")
    return model, raw


def record_path(folder: Path, number: int) -> Path:
    return folder / "units" / f"{number:06d}.json"


def index_path(folder: Path, number: int, split: str) -> Path:
    return folder / "units" / f"{number:06d}-{split}.safetensors"


def finished_record(folder: Path, number: int) -> dict | None:
    """The record of a unit in CORPUS.partial, if it is finished."""
    try:
        record = json.loads(record_path(folder, number).read_text())
    except FileNotFoundError:
        return None
    for split, figures in record.items():
        if "shard" in figures:
            shard = Shard(**figures["shard"])
            if not index_path(folder, number, split).exists() or wrong_size(folder / "corpus" / split, shard):
                return None
    return record


def store(path: Path, raw: bytes) -> None:
    """Write a file under another name first: one that is there is whole. Raises UserError where the disk is full."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "; what is finished is kept: with more space, the same command goes on from there" if full else ""
    return UserError(f"cannot write {error.filename or path}: {error.strerror}{advice}")
