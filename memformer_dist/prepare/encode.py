"""What workers do with one partition of the inputs: `encode_partition` reads it, `write_partition` makes its shards.

Both run in other processes (pool.py), so a task holds all that they need, and what they make they write to files of
CORPUS.partial (workspace.py). Neither torch nor data/corpus.py is imported here: workers start in a fraction of a
second.
"""

import functools
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from memformer_dist.data.format import Shard, ShardWriter, wrong_size
from memformer_dist.errors import UserError
from memformer_dist.files import flush, write_bytes, write_text
from memformer_dist.prepare.documents import Document, File, Reader, Unreadable, look
from memformer_dist.prepare.partitions import Partition
from memformer_dist.prepare.workspace import Workspace, cannot_write, writing
from memformer_dist.tokenizer import Tokenizer, open_tokenizer
from memformer_dist.vocabulary import Vocabulary

BATCH_CHARACTERS, BATCH_DOCUMENTS = 250_000, 2_500  # encoded together; a worker holds these and the largest document
BUFFER_BYTES = 2**20
TOKENS, MASK, QUARANTINE = ".tokens", ".mask", ".quarantine"  # suffixes of an encoded partition's files
COLUMNS, SUMMARY = ".safetensors", ".json"


# ------------------------------------------------------------------------------------------------------------ encoding


class EncodeTask(NamedTuple):
    number: int  # of the partition, from 0
    workspace: Workspace
    stem: Path  # the files of the encoded partition, without their suffix
    partition: Partition
    vocabulary: Vocabulary
    tokenizer: Path  # its copy in the workspace
    text_field: str | None = None


class Encoded(NamedTuple):
    """The summary of an encoded partition."""

    documents: int
    unreadable: int  # of these; listed in the .quarantine file
    masked: bool  # the loss of some part does not count
    lines: int  # of the last file, where it is JSON lines
    lost: Sequence[str] = ()  # files with unreadable documents and no others


def encode_partition(task: EncodeTask) -> tuple[int, Encoded]:
    """Read and encode the documents of a partition -> (its number, its summary).

    Writes the tokens of all documents, the masks of those that have one, a row of columns for each document, and for
    each unreadable one a line of JSON [file, position, reason]. The summary is written last.
    """
    stem, dtype = task.stem, task.vocabulary.token_dtype
    tokenizer = _tokenizer(task.tokenizer, task.vocabulary.tokenizer_sha256)
    length, characters, masked = array("I"), array("I"), array("B")  # 4 bytes for a number, where a list takes 36
    reader, unreadable = PartitionReader(task.partition, task.text_field), Unreadable()
    streams = [stem.with_suffix(suffix) for suffix in (TOKENS, MASK, QUARANTINE)]
    summary = stem.with_suffix(SUMMARY)
    with writing(streams[0]):
        summary.unlink(missing_ok=True)  # there is one where other settings have made shards of the tokens
        with ExitStack() as stack:
            tokens_file, mask_file, quarantine = (
                stack.enter_context(open(file, "wb", BUFFER_BYTES)) for file in streams
            )
            for document, tokens, mask in tokenise(reader, tokenizer):
                tokens_file.write(tokens.astype(dtype).data)
                if mask is not None:
                    mask_file.write(mask.data)
                length.append(len(tokens))
                characters.append(len(document.text))
                masked.append(mask is not None)
                unreadable.add(document)
                if document.unreadable is not None:
                    line = [document.source, document.position, document.unreadable]
                    quarantine.write(json.dumps(line).encode() + b"\n")
        for file in streams:
            flush(file)
    columns = {"length": length, "characters": characters, "masked": masked}
    encoded = Encoded(len(length), unreadable.count, any(masked), reader.lines, list(unreadable.lost))
    with writing(stem.with_suffix(COLUMNS)):
        raw = save_safetensors({name: np.array(column) for name, column in columns.items()})
        write_bytes(stem.with_suffix(COLUMNS), raw)
        write_text(summary, json.dumps(encoded))
    return task.number, encoded


def already_encoded(task: EncodeTask) -> Encoded | None:
    """The summary by an earlier run, if the tokens are still there or are in shards by now."""
    needed = [SUMMARY] if finished_record(task) is not None else [SUMMARY, TOKENS, MASK, QUARANTINE]
    if not all(task.stem.with_suffix(suffix).exists() for suffix in needed):
        return None
    try:
        return Encoded(*json.loads(task.stem.with_suffix(SUMMARY).read_text()))
    except (ValueError, TypeError):  # damaged
        return None


def usable_documents(stem: Path) -> np.ndarray:
    """bool [documents of an encoded partition]: neither empty nor unreadable."""
    return load_safetensors(stem.with_suffix(COLUMNS).read_bytes())["length"] > 0


class PartitionReader:
    """Iterates over the documents of a partition.

    lines   lines of the last file, or part of a file, where it is JSON lines
    Raises UserError naming a file that has changed since it was listed.
    """

    def __init__(self, partition: Partition, text_field: str | None = None):
        self._partition, self._text_field = partition, text_field
        self.lines = 0

    def __iter__(self) -> Iterator[Document]:
        for piece in self._partition.pieces:
            _expect_unchanged(piece.file)
            reader = Reader(piece, self._text_field)
            yield from reader
            self.lines = reader.lines
            _expect_unchanged(piece.file)


def _expect_unchanged(file: File) -> None:
    try:
        now = look(file.name)
    except UserError as error:
        raise UserError(f"{file.name}: changed while it was read: {error}") from None
    if (now.size, now.changed) != (file.size, file.changed):
        raise UserError(
            f"{file.name}: changed while it was read: {now.size} bytes, changed at {now.changed}; when the inputs were"
            f" listed {file.size} bytes, {file.changed}. Run the command again when nothing writes to the file any more"
        )


def tokenise(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, np.ndarray, np.ndarray | None]]:
    """Each document with its tokens int32 [n] and its loss mask uint8 [n], None where every label counts.

    The parts of a document are encoded one by one. An unreadable document has no tokens.
    """
    for batch in _batches(documents):
        texts = [part.text for document in batch for part in document.parts]
        encoded = iter(tokenizer.encode(texts))
        for document in batch:
            if len(document.parts) == 1 and document.has_full_loss:
                yield document, next(encoded), None
                continue
            pieces = [next(encoded) for _ in document.parts]
            tokens, mask = np.concatenate([np.empty(0, np.int32), *pieces]), None
            if not document.has_full_loss:
                of_part = [np.full(len(piece), part.loss) for piece, part in zip(pieces, document.parts, strict=True)]
                # Label i is token i + 1; the last label, EOS, belongs to the part that ends the document.
                mask = np.append(np.concatenate(of_part)[1:], document.parts[-1].loss).astype(np.uint8)[: len(tokens)]
            yield document, tokens, mask


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path, sha256: str) -> Tokenizer:
    """Loaded once in each worker."""
    tokenizer = open_tokenizer(path)
    assert hashlib.sha256(tokenizer.raw).hexdigest() == sha256
    return tokenizer


# ------------------------------------------------------------------------------------------------------------- shards


class WriteTask(NamedTuple):
    number: int  # of the partition, from 0
    workspace: Workspace
    stem: Path  # of the encoded partition
    valid: np.ndarray  # int64 [n], numbers within the partition of the documents for validation
    vocabulary: Vocabulary
    has_mask: bool  # any partition of the corpus has masks


class ShardRecord(TypedDict):
    """A shard of a partition, as shards/000042.json keeps it for each split."""

    characters: int
    labels: int  # that count in the loss
    shard: dict[str, int | str]  # fields of data/format.py's Shard


def write_partition(task: WriteTask) -> tuple[int, dict[str, ShardRecord]]:
    """Make the shards of an encoded partition -> (its number, its record). Its tokens are then removed.

    The record has an entry for each split in which the partition has documents.
    """
    valid = frozenset(task.valid.tolist())
    with ExitStack() as stack:
        shards: dict[str, PartitionShard] = {}
        for number, (tokens, mask, characters) in enumerate(_encoded_documents(task)):
            if not len(tokens):
                continue
            split = "valid" if number in valid else "train"
            if split not in shards:
                shards[split] = stack.enter_context(PartitionShard(task, split))
            shards[split].add(tokens, mask, characters)
        record = {split: shards[split].close() for split in sorted(shards)}
    path = task.workspace.shard_record(task.number)
    with writing(path):
        write_text(path, json.dumps(record))
    for suffix in TOKENS, MASK:
        task.stem.with_suffix(suffix).unlink()
    return task.number, record


def _encoded_documents(task: WriteTask) -> Iterator[tuple[np.ndarray, np.ndarray | None, int]]:
    """Tokens, mask if there is one, and characters of each document. Raises UserError where a file is not whole."""
    tokens_path, mask_path = task.stem.with_suffix(TOKENS), task.stem.with_suffix(MASK)
    columns = load_safetensors(task.stem.with_suffix(COLUMNS).read_bytes())
    length, masked, dtype = columns["length"], columns["masked"].astype(bool), task.vocabulary.token_dtype
    expected = {
        tokens_path: dtype.itemsize * length.sum(dtype=np.int64),
        mask_path: length[masked].sum(dtype=np.int64),
    }
    for path, size in expected.items():
        found = path.stat().st_size
        if found != size:
            raise UserError(f"{path}: {found} bytes, expected {size}; remove {task.workspace.folder} and start again")
    with open(tokens_path, "rb", BUFFER_BYTES) as tokens_file, open(mask_path, "rb", BUFFER_BYTES) as mask_file:
        rows = zip(length.data, columns["characters"].data, masked.data, strict=True)  # no lists: these are long
        for count, characters, has_mask in rows:
            tokens = np.frombuffer(tokens_file.read(count * dtype.itemsize), dtype)
            mask = np.frombuffer(mask_file.read(count), np.uint8) if has_mask else None
            yield tokens, mask, characters


class PartitionShard:
    """The shard of a partition in one split, being written. Leaving a `with` block unclosed removes it."""

    def __init__(self, task: WriteTask, split: str):
        self._path = task.workspace.shard(task.number, split)
        self._index_path = task.workspace.shard_index(task.number, split)
        self._characters = self._labels = 0
        with writing(self._path):
            self._writer = ShardWriter(self._path, task.number, task.vocabulary.token_dtype, task.has_mask)

    def __enter__(self) -> "PartitionShard":
        return self

    def __exit__(self, *_: object) -> None:
        with writing(self._path):
            self._writer.discard()

    def add(self, tokens: np.ndarray, mask: np.ndarray | None, characters: int) -> None:
        try:  # not `writing`, which takes as long as the rest of the method
            self._writer.add(tokens, mask)
        except OSError as error:
            raise cannot_write(self._path, error) from None
        self._characters += characters
        self._labels += len(tokens) if mask is None else int(mask.sum())

    def close(self) -> ShardRecord:
        with writing(self._path):
            written = self._writer.close()
        columns = {name: column for name, column in written.index._asdict().items() if column is not None}
        with writing(self._index_path):
            write_bytes(self._index_path, save_safetensors(columns))
        return {"characters": self._characters, "labels": self._labels, "shard": written.shard.model_dump()}


def finished_record(task: EncodeTask | WriteTask) -> dict[str, ShardRecord] | None:
    """The record of a partition whose shards an earlier run has written."""
    workspace, number = task.workspace, task.number
    try:
        record: dict[str, ShardRecord] = json.loads(workspace.shard_record(number).read_text())
    except (FileNotFoundError, ValueError):  # ValueError: damaged
        return None
    for split, shard_record in record.items():
        shard = Shard.model_validate(shard_record["shard"])
        if not workspace.shard_index(number, split).exists() or wrong_size(workspace.split(split), shard):
            return None
    return record
