"""What workers do with a partition of the inputs: `encode_partition` reads it, `write_partition` makes its shards.

Both are called in other processes pool.py, so they are told all they need, and what lasts they write to files.
Neither torch nor corpus.py is imported here: workers start in a fraction of a second.
"""

import functools
import hashlib
import json
import os
from array import array
from contextlib import ExitStack
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import numpy as np
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors
from sentencepiece import SentencePieceProcessor, SetMinLogLevel

from memformer_dist.data.format import Shard, ShardWriter, wrong_size
from memformer_dist.errors import UserError
from memformer_dist.prepare.documents import NO_SPACE, Document, File, Partition, Reader, look
from memformer_dist.vocabulary import Vocabulary

BATCH_CHARACTERS, BATCH_DOCUMENTS = 250_000, 2_500  # encoded together; what a worker holds besides the largest document
BUFFER = 1 << 20  # bytes
STREAMS = (".tokens", ".mask", ".quarantine")  # of an encoded partition


# ------------------------------------------------------------------------------------------------------------ encoding


class EncodeTask(NamedTuple):
    number: int
    folder: Path  # CORPUS.partial
    stem: Path  # of the files with what is encoded
    partition: Partition
    vocabulary: Vocabulary


def stem_of(folder: Path, partition: Partition, tokenizer_sha256: str) -> Path:
    """Named by what goes in: the same files, cuts and tokenizer, the same name."""
    pieces = [(file.path, file.size, file.changed, *place) for file, *place in partition.pieces]
    return folder / "encoded" / hashlib.sha256(json.dumps([tokenizer_sha256, pieces]).encode()).hexdigest()[:32]


class Encoded(NamedTuple):
    """What is known of a partition once its documents are encoded."""

    documents: int
    unreadable: int  # of these; listed in the .quarantine file
    masked: bool  # some part is not to be learnt
    lines: int  # where the partition is a part of a .jsonl


def encode_partition(task: EncodeTask) -> tuple[int, Encoded]:
    """Read and encode the documents of a partition -> (its number, what was found).

    Writes the tokens of all documents, the masks of those that have one, their columns, one row a document, and what
    cannot be read, a line each: file, position, reason. The record comes last.
    """
    model = _model(task.folder / "corpus" / "tokenizer.model", task.vocabulary.tokenizer_sha256)
    dtype = task.vocabulary.token_dtype
    length, characters, masked = array("I"), array("I"), array("B")  # 4 bytes a number, lists take 36
    reader, unreadable = PartitionReader(task.partition), 0
    record, streams = task.stem.with_suffix(".json"), [task.stem.with_suffix(suffix) for suffix in STREAMS]
    try:
        record.unlink(missing_ok=True)  # of tokens that have become shards of other settings
        with ExitStack() as stack:
            files = [stack.enter_context(open(stream, "wb", BUFFER)) for stream in streams]
            token_file, mask_file, quarantine = files
            for document, tokens, mask in tokenise(reader, model):
                token_file.write(tokens.astype(dtype))
                if mask is not None:
                    mask_file.write(mask)
                length.append(len(tokens))
                characters.append(len(document.text))
                masked.append(mask is not None)
                if document.unreadable:
                    unreadable += 1
                    line = [document.source, document.position, document.unreadable]
                    quarantine.write(json.dumps(line).encode() + b"\n")
            for file in files:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(streams[0], error) from None
    columns = {"length": length, "characters": characters, "masked": masked}
    store(task.stem.with_suffix(".safetensors"), save_safetensors({k: np.array(x) for k, x in columns.items()}))
    encoded = Encoded(len(length), unreadable, any(masked), reader.lines)
    store(record, json.dumps(encoded).encode())
    return task.number, encoded


def already_encoded(task: EncodeTask) -> Encoded | None:
    """What an earlier run has found, if the tokens are still there, or in shards already."""
    needed = [".json"] if finished_record(task) is not None else [".json", *STREAMS]
    if not all(task.stem.with_suffix(suffix).exists() for suffix in needed):
        return None
    return Encoded(*json.loads(task.stem.with_suffix(".json").read_text()))


def usable_documents(stem: Path) -> np.ndarray:
    """bool [documents of an encoded partition]: those that are neither empty nor unreadable."""
    return load_safetensors(stem.with_suffix(".safetensors").read_bytes())["length"] > 0


class PartitionReader:
    """Iterates over the documents of a partition, all of them.

    Raises UserError naming a file that is no longer what it was when it was listed.
    """

    def __init__(self, partition: Partition):
        self._unit = partition
        self.lines = 0  # of the last piece

    def __iter__(self) -> Iterator[Document]:
        for piece in self._unit.pieces:
            _expect_unchanged(piece.file)
            reader = Reader(piece)
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
            f" listed {file.size} bytes, {file.changed}. Run again when nobody writes it any more"
        )


def tokenise(
    documents: Iterable[Document], model: SentencePieceProcessor
) -> Iterator[tuple[Document, np.ndarray, np.ndarray | None]]:
    """Each document with its tokens int32 [n] and its mask uint8 [n], None where every label counts.

    The parts of a document are encoded one by one. One that cannot be read has no tokens.
    """
    for batch in _batches(documents):
        texts = [part.text for document in batch for part in document.parts]
        encoded = iter(model.encode(texts, out_type="numpy", num_threads=1))
        for document in batch:
            if len(document.parts) == 1 and document.learnt:
                yield document, next(encoded), None
                continue
            pieces = [next(encoded) for _ in document.parts]
            tokens, mask = np.concatenate([np.empty(0, np.int32), *pieces]), None
            if not document.learnt:
                learnt = np.concatenate([np.full(len(piece), part.loss) for piece, part in zip(pieces, document.parts)])
                # Label i is token i + 1; the last label, EOS, belongs to the part that ends the document.
                mask = np.append(learnt[1:], document.parts[-1].loss).astype(np.uint8)[: len(tokens)]
            yield document, tokens, mask


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
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


# ------------------------------------------------------------------------------------------------------------- shards


class WriteTask(NamedTuple):
    number: int
    folder: Path  # CORPUS.partial
    stem: Path  # of the encoded partition
    valid: np.ndarray  # int64 [n], numbers of the documents for validation
    vocabulary: Vocabulary
    has_mask: bool  # of the whole corpus


def write_partition(task: WriteTask) -> tuple[int, dict]:
    """Make the shards of an encoded partition -> (its number, its record). Its tokens are then no longer needed and go."""
    files = [task.stem.with_suffix(suffix) for suffix in STREAMS[:2]]
    columns = load_safetensors(task.stem.with_suffix(".safetensors").read_bytes())
    length, masked = columns["length"], columns["masked"].astype(bool)
    valid, dtype = frozenset(task.valid.tolist()), task.vocabulary.token_dtype
    for file, size in zip(files, (dtype.itemsize * length.sum(dtype=np.int64), length[masked].sum(dtype=np.int64))):
        if file.stat().st_size != size:
            raise UserError(
                f"{file}: {file.stat().st_size} bytes, expected {size}; remove {task.folder} and start again"
            )
    writers: dict[str, ShardWriter] = {}
    figures: dict[str, dict] = {}
    path = task.folder
    try:
        with ExitStack() as stack:
            token_file, mask_file = (stack.enter_context(open(file, "rb", BUFFER)) for file in files)
            rows = zip(*map(memoryview, (length, columns["characters"], masked)))  # numbers one by one, no lists
            for number, (count, characters, has_mask) in enumerate(rows):
                if not count:
                    continue
                tokens = np.frombuffer(token_file.read(count * dtype.itemsize), dtype)
                mask = np.frombuffer(mask_file.read(count), np.uint8) if has_mask else None
                split = "valid" if number in valid else "train"
                if split not in writers:
                    path = task.folder / "corpus" / split / f"shard-{task.number:06d}.tar"
                    writer = ShardWriter(path, task.number, dtype, task.has_mask)
                    writers[split] = stack.enter_context(writer)
                    figures[split] = {"characters": 0, "labels": 0}
                path = writers[split].path
                writers[split].add(tokens, mask)
                figures[split]["characters"] += characters
                figures[split]["labels"] += count if mask is None else int(mask.sum())
            for split, writer in writers.items():
                path = writer.path
                written = writer.close()
                figures[split]["shard"] = written.shard.model_dump()
                index = {name: column for name, column in written.index._asdict().items() if column is not None}
                store(index_path(task.folder, task.number, split), save_safetensors(index))
        record = {split: figures[split] for split in sorted(figures)}
        store(record_path(task.folder, task.number), json.dumps(record).encode())
        for file in files:
            file.unlink()
    except OSError as error:
        raise cannot_write(path, error) from None
    return task.number, record


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
    return folder / "shards" / f"{number:06d}.json"


def index_path(folder: Path, number: int, split: str) -> Path:
    return folder / "shards" / f"{number:06d}-{split}.safetensors"


def finished_record(task: EncodeTask | WriteTask) -> dict | None:
    """The record of a partition whose shards are written."""
    folder, number = task.folder, task.number
    try:
        record = json.loads(record_path(folder, number).read_text())
    except FileNotFoundError:
        return None
    for split, figures in record.items():
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
    full = error.errno in NO_SPACE
    advice = "; what is finished is kept: with more space, the same command goes on from there" if full else ""
    return UserError(f"cannot write {error.filename or path}: {error.strerror}{advice}")
