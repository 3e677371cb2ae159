"""The format of a corpus on disk: token ids in webdataset tar shards, with an index for random access.

A corpus is a folder of two splits, written by tokenizer/shard.py:

    CORPUS/tokenizer.model  or tokenizer.json
    CORPUS/train/
        corpus.json         what the split holds; its hash identifies the split in a checkpoint
        index.safetensors   for every document: length, place in its shard, crc32 (12 bytes; 16 with loss masks)
        shard-000000.tar    one sample per document: 000000-00000042.u16 (token ids) and, with a loss mask, .mask
    CORPUS/valid/           the same

A shard is an ordinary uncompressed webdataset tar, so other tools can read it. Here it is memory-mapped and read
through the index, because lanes read documents in any order and resume in the middle of one. Payloads start at
multiples of 512 bytes, as in any tar. Token ids are little-endian, uint16 where the vocabulary allows. Neither BOS nor
EOS is stored.

A loss mask is one byte per token: mask[i] = 1 if label i, which is token i + 1 (EOS for the last token), counts in the
loss. Its tar member follows that of the tokens, so the index needs no column for its place.

SplitWriter writes a split in one process; preparation writes shards in several, with ShardWriter and `write_manifest`.
"""

import hashlib
import json
import tarfile
import zlib
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from memformer_dist.errors import UserError, first_problem
from memformer_dist.files import PARTIAL, flush, make_way, remove_folder, write_bytes, write_text
from memformer_dist.tokenizer import SENTENCEPIECE
from memformer_dist.vocabulary import Vocabulary

MANIFEST, INDEX = "corpus.json", "index.safetensors"
BLOCK = tarfile.BLOCKSIZE  # 512 bytes: the size of a header; payloads are padded to multiples of it
SHARD_TOKENS = 100_000_000  # tokens in a shard of SplitWriter, unless a single document is longer


class Shard(BaseModel):
    """A shard's record in corpus.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    bytes: int
    sha256: str
    documents: int
    tokens: int

    @field_validator("name")
    @classmethod
    def _in_this_folder(cls, name: str) -> str:
        # A corpus from a stranger must not make us read other files.
        if name in ("", "..") or "\0" in name or Path(name).name != name:
            raise ValueError(f"found {name!r}, expected the plain name of a file in the split's folder")
        return name


class Manifest(BaseModel):
    """corpus.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[2] = 2
    token_dtype: Literal["uint16", "uint32"]
    vocab_size: int
    bos_id: int
    eos_id: int
    tokenizer_sha256: str
    has_mask: bool
    documents: int
    tokens: int
    shards: list[Shard]
    index_sha256: str
    tokenizer: Literal["tokenizer.model", "tokenizer.json"] = "tokenizer.model"  # its file, beside the splits
    lossy: bool = False  # the tokenizer loses some of the text, which was accepted

    def to_json(self) -> str:
        """The content of the file. What came later is there only where it says something: older corpora keep their hash."""
        since = {
            name for name in ("tokenizer", "lossy") if getattr(self, name) == type(self).model_fields[name].default
        }
        return json.dumps(self.model_dump(exclude=since), indent=1) + "\n"

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(
            size=self.vocab_size, bos_id=self.bos_id, eos_id=self.eos_id, tokenizer_sha256=self.tokenizer_sha256
        )


class Index(NamedTuple):
    """One row per document, in the order of the shards."""

    length: np.ndarray  # uint32 [documents], tokens
    block: np.ndarray  # uint32 [documents], where the tokens start in their shard, in blocks of 512 bytes
    crc32: np.ndarray  # uint32 [documents], of the tokens
    mask_crc32: np.ndarray | None = None  # uint32 [documents], of the masks; None where there are none


class Split(NamedTuple):
    manifest: Manifest
    fingerprint: str  # sha256 of corpus.json, which holds the hashes of everything else
    index: Index  # type: ignore[assignment]  # hides tuple.index, which nobody calls


def read_split(folder: Path, name: str | None = None) -> Split:
    """Read corpus.json and the index of a split. `name`: what messages call the folder, where it is a copy.

    Raises UserError naming a file that is missing or is not the one that was written.
    """
    name = name or str(folder)
    try:
        raw = (folder / MANIFEST).read_bytes()
        manifest = Manifest.model_validate_json(raw)
        index = (folder / INDEX).read_bytes()
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise UserError(f"{name}/{missing}: not found; expected it in a split (CORPUS/train, CORPUS/valid)") from None
    except ValidationError as error:
        problem = first_problem(error)
        hint = "; prepare the corpus again with tokenizer/shard.py" if problem.startswith("version: ") else ""
        raise UserError(f"{name}/{MANIFEST}: {problem}{hint}") from None
    found = hashlib.sha256(index).hexdigest()
    if found != manifest.index_sha256:
        raise UserError(f"{name}/{INDEX}: sha256 is {found}, {MANIFEST} says {manifest.index_sha256}")
    return Split(manifest, hashlib.sha256(raw).hexdigest(), Index(**load_safetensors(index)))


def wrong_size(folder: Path, shard: Shard) -> str | None:
    """What is wrong with the size of a shard's file; None if nothing is."""
    file = folder / shard.name
    size = file.stat().st_size if file.exists() else None
    if size == shard.bytes:
        return None
    return f"{file}: {'missing' if size is None else f'{size} bytes'}, expected {shard.bytes} bytes"


def blocks(size: int) -> int:
    """The number of blocks that `size` bytes take in a tar."""
    return -(-size // BLOCK)


def _header(name: bytes, size: int) -> bytes:
    """TarInfo(name).tobuf(USTAR_FORMAT) with this size, 20 times as fast, because documents may be short.

    Time and owner are left empty: the bytes depend on the documents alone.
    """
    if size >= 8**11:
        raise ValueError(f"{name.decode()}: {size} bytes, a tar holds less than {8**11}")
    digits = b"%011o" % size
    checksum = b"%06o" % (_EMPTY_SUM + sum(name) + sum(digits))
    return b"".join((name.ljust(100, b"\0"), _EMPTY[100:124], digits, _EMPTY[135:148], checksum, _EMPTY[154:]))


_EMPTY = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_EMPTY_SUM = sum(_EMPTY[:124] + _EMPTY[135:148] + b" " * 8 + _EMPTY[156:])  # without the size's digits


class WrittenShard(NamedTuple):
    shard: Shard
    index: Index  # type: ignore[assignment]  # hides tuple.index, which nobody calls


class ShardWriter:
    """Writes one shard as `<path>.partial`, which `close` renames: a shard under its own name is whole.

    The bytes depend only on the number of the shard and its documents. Leaving a `with` block before `close` removes
    what was written. Raises OSError where the disk is full.
    """

    def __init__(self, path: Path, number: int, token_dtype: np.dtype, has_mask: bool = False):
        self.path, self.number = path, number
        self._dtype = np.dtype(token_dtype).newbyteorder("<")
        self._partial = path.with_name(path.name + PARTIAL)
        self._file = self._partial.open("wb")
        self._hash = hashlib.sha256()
        self._blocks = 0
        self._columns = {name: array("I") for name in ("length", "block", "crc32")}  # 4 bytes per number, lists take 36
        if has_mask:
            self._columns["mask_crc32"] = array("I")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    @property
    def documents(self) -> int:
        return len(self._columns["length"])

    def add(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append a document of at least one token. Without a mask every label counts.

        tokens  integers [n], without BOS and EOS
        mask    0 or 1 [n], see the top of this file; only where the writer was made with `has_mask`
        """
        has_mask = "mask_crc32" in self._columns
        assert 0 < len(tokens) < 2**32
        assert mask is None or (has_mask and len(mask) == len(tokens))
        key = f"{self.number:06d}-{self.documents:08d}"
        self._columns["block"].append(self._blocks + 1)  # behind the member's header
        self._columns["crc32"].append(
            self._append(f"{key}.u{8 * self._dtype.itemsize}", np.asarray(tokens, self._dtype))
        )
        if has_mask:
            mask = np.ones(len(tokens)) if mask is None else mask
            self._columns["mask_crc32"].append(self._append(f"{key}.mask", np.asarray(mask, np.uint8)))
        self._columns["length"].append(len(tokens))

    def close(self) -> WrittenShard:
        """Finish the file and give it its name."""
        ending = 2 * BLOCK  # a tar ends with two empty blocks, padded to a whole record
        self._write(bytes(ending + -(self._blocks * BLOCK + ending) % tarfile.RECORDSIZE))
        self._file.close()
        flush(self._partial)
        self._partial.rename(self.path)
        shard = Shard(
            name=self.path.name,
            bytes=self._blocks * BLOCK,
            sha256=self._hash.hexdigest(),
            documents=self.documents,
            tokens=sum(self._columns["length"]),
        )
        return WrittenShard(shard, Index(**{name: np.array(x, np.uint32) for name, x in self._columns.items()}))

    def discard(self) -> None:
        """Remove what was written; does nothing after `close`."""
        try:
            self._file.close()  # may find the disk full again
        finally:
            self._partial.unlink(missing_ok=True)

    def _append(self, name: str, payload: np.ndarray) -> int:
        raw = payload.tobytes()
        self._write(_header(name.encode(), len(raw)) + raw + bytes(-len(raw) % BLOCK))
        return zlib.crc32(raw)

    def _write(self, raw: bytes) -> None:
        self._file.write(raw)
        self._hash.update(raw)
        self._blocks += len(raw) // BLOCK


def write_manifest(
    folder: Path,
    vocabulary: Vocabulary,
    written: Iterable[WrittenShard],
    *,
    has_mask: bool = False,
    tokenizer: str = SENTENCEPIECE,
    lossy: bool = False,
) -> Manifest:
    """Write index and corpus.json of the shards in `folder`. corpus.json comes last: a split that has one is whole.

    Args:
        tokenizer: the name of its file beside the splits.
        lossy: it loses some of the text, which was accepted.
    """
    shards, indices = zip(*written)
    columns = {
        name: np.concatenate([getattr(index, name) for index in indices])
        for name in Index._fields
        if name != "mask_crc32" or has_mask
    }
    index = save_safetensors(columns)
    manifest = Manifest(
        token_dtype=vocabulary.token_dtype.name,
        documents=len(columns["length"]),
        tokens=sum(shard.tokens for shard in shards),
        shards=shards,
        index_sha256=hashlib.sha256(index).hexdigest(),
        vocab_size=vocabulary.size,
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        tokenizer_sha256=vocabulary.tokenizer_sha256,
        has_mask=has_mask,
        tokenizer=tokenizer,
        lossy=lossy,
    )
    write_bytes(folder / INDEX, index)
    write_text(folder / MANIFEST, manifest.to_json())
    return manifest


class SplitWriter:
    """Writes one split in one process, in shards of up to `shard_tokens` tokens. Same documents, same bytes.

    Everything goes to `<split>.partial`, which `close` renames: a split under its own name is whole. Leaving a `with`
    block closes the split; leaving it by an exception removes what was written.
    """

    def __init__(
        self, split: str | Path, vocabulary: Vocabulary, *, has_mask: bool = False, shard_tokens: int = SHARD_TOKENS
    ):
        self.path, self._vocabulary = Path(split), vocabulary
        self._has_mask, self._shard_tokens = has_mask, shard_tokens
        if self.path.exists():
            raise UserError(f"{self.path} exists already")
        self._partial = self.path.with_name(self.path.name + PARTIAL)
        make_way(self._partial)  # left by an interrupted process
        self._partial.mkdir(parents=True)
        self._shard: ShardWriter | None = None
        self._tokens_in_shard = 0
        self._written: list[WrittenShard] = []

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def add(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append a document (see ShardWriter.add)."""
        if self._shard and self._tokens_in_shard + len(tokens) > self._shard_tokens:
            self._finish_shard()
        if not self._shard:
            number = len(self._written)
            path = self._partial / f"shard-{number:06d}.tar"
            self._shard = ShardWriter(path, number, self._vocabulary.token_dtype, self._has_mask)
        self._shard.add(tokens, mask)
        self._tokens_in_shard += len(tokens)

    def close(self) -> None:
        """Finish the split and give it its name. Raises UserError if there is no document."""
        if not self._shard:
            self.discard()
            raise UserError(f"{self.path}: no document to write")
        self._finish_shard()
        write_manifest(self._partial, self._vocabulary, self._written, has_mask=self._has_mask)
        self._partial.rename(self.path)

    def discard(self) -> None:
        if self._shard:
            self._shard.discard()
        remove_folder(self._partial)

    def _finish_shard(self) -> None:
        assert self._shard is not None
        self._written.append(self._shard.close())
        self._shard, self._tokens_in_shard = None, 0
