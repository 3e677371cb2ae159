"""The corpus on disk: documents as rows of token ids in webdataset tar shards, with an index for random access.

tokenizer/shard.py writes a corpus, a folder of two splits:

    CORPUS/tokenizer.model
    CORPUS/train/
        corpus.json         what the split holds; its hash identifies the split in a checkpoint
        index.safetensors   for every document: shard, byte offset, length, crc32
        shard-000000.tar    one sample a document: 000000042.u16 (token ids) and, with a loss mask, 000000042.mask
    CORPUS/valid/           the same

A shard is an ordinary uncompressed webdataset tar, so other tools can read it. Here it is memory-mapped and read
through the index, because lanes take documents in any order and resume in their middle. Token ids are little-endian,
uint16 where the vocabulary allows. Neither BOS nor EOS is stored.

The mask is one byte per token: mask[i] = 1 if label i, the prediction of token i + 1 (of EOS for the last token),
counts in the loss.
"""

import hashlib
import io
import json
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from memformer_dist.errors import UserError

MANIFEST, INDEX = "corpus.json", "index.safetensors"
SHARD_TOKENS = 100_000_000  # tokens of a shard, unless a single document is longer


class CorpusError(UserError):
    """A corpus is damaged. The message names the shard, the document and the byte offset."""


class Shard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    bytes: int
    sha256: str
    documents: int
    tokens: int

    @field_validator("name")
    @classmethod
    def _in_this_folder(cls, name: str) -> str:
        if name in ("", "..") or "\0" in name or Path(name).name != name:  # a corpus from elsewhere reads nothing else
            raise ValueError("expected the plain name of a file in the split's folder")
        return name


class Manifest(BaseModel):
    """corpus.json"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
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


class Corpus:
    """One split, read at random through memory maps.

    lengths      int64 [documents], tokens of each document
    tokens       see `tokens(document, start, stop)`; their number is `total_tokens`
    fingerprint  sha256 of corpus.json, which holds the hashes of everything else
    """

    def __init__(self, path: Path, manifest: Manifest, fingerprint: str, index: dict[str, np.ndarray]):
        self.path = path
        self.manifest = manifest
        self.fingerprint = fingerprint
        self.vocab_size, self.bos_id, self.eos_id = manifest.vocab_size, manifest.bos_id, manifest.eos_id
        self.tokenizer_sha256, self.has_mask = manifest.tokenizer_sha256, manifest.has_mask
        self.total_tokens = manifest.tokens
        self.lengths = index["length"].astype(np.int64)
        self._index = index
        self._dtype = np.dtype(manifest.token_dtype).newbyteorder("<")
        self._maps: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, split: str | Path) -> "Corpus":
        """Raises UserError naming the file if one is missing, was cut short, or is not the one that was written."""
        path = Path(split)
        try:
            raw = (path / MANIFEST).read_bytes()
            manifest = Manifest.model_validate_json(raw)
            index = (path / INDEX).read_bytes()
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename}: not found; a corpus split (CORPUS/train, CORPUS/valid) holds it"
            ) from None
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"]))
            raise UserError(f"{path / MANIFEST}: {field}: {problem['msg']}, found {problem['input']!r}") from None
        found = hashlib.sha256(index).hexdigest()
        if found != manifest.index_sha256:
            raise UserError(f"{path / INDEX}: sha256 is {found}, {MANIFEST} says {manifest.index_sha256}")
        for shard in manifest.shards:
            file = path / shard.name
            size = file.stat().st_size if file.exists() else None
            if size != shard.bytes:
                raise UserError(
                    f"{file}: {'missing' if size is None else f'{size} bytes'}, expected {shard.bytes} bytes"
                )
        return cls(path, manifest, hashlib.sha256(raw).hexdigest(), load_safetensors(index))

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens start <= i < stop of a document: a view on the file, uint16 or uint32."""
        return self._payload(document, "offset", self._dtype)[start:stop]

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """uint8 view: 1 where the label at that token counts in the loss. Only where `has_mask`."""
        return self._payload(document, "mask_offset", np.dtype(np.uint8))[start:stop]

    def check(self, document: int) -> None:
        """Raises CorpusError if the bytes of the document are not those that were written."""
        self._compare("tokens", document, self._payload(document, "offset", self._dtype), "offset", "crc32")
        if self.has_mask:
            mask = self._payload(document, "mask_offset", np.dtype(np.uint8))
            self._compare("mask", document, mask, "mask_offset", "mask_crc32")

    def _payload(self, document: int, offset: str, dtype: np.dtype) -> np.ndarray:
        shard, start = int(self._index["shard"][document]), int(self._index[offset][document])
        if shard not in self._maps:
            # A plain array: slicing np.memmap, a subclass, takes several times as long.
            self._maps[shard] = np.memmap(self.path / self.manifest.shards[shard].name, np.uint8, "r").view(np.ndarray)
        return self._maps[shard][start : start + int(self.lengths[document]) * dtype.itemsize].view(dtype)

    def _compare(self, what: str, document: int, payload: np.ndarray, offset: str, crc32: str) -> None:
        found, expected = zlib.crc32(payload.view(np.uint8)), int(self._index[crc32][document])
        if found != expected:
            shard = self.path / self.manifest.shards[self._index["shard"][document]].name
            raise CorpusError(
                f"{shard}: the {what} of document {document} at byte {self._index[offset][document]} are damaged: "
                f"crc32 is {found:08x}, the index says {expected:08x}"
            )


def open_corpora(folder: Path) -> tuple[Corpus, Corpus]:
    """The training and validation split of a corpus.

    Raises UserError where one of them was made with another tokenizer than the corpus holds.
    """
    tokenizer = folder / "tokenizer.model"
    train, valid = Corpus.open(folder / "train"), Corpus.open(folder / "valid")
    try:
        found = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise UserError(
            f"{tokenizer}: not found; the tokenizer that the shards of {folder} were made with is needed"
        ) from None
    for split in (train, valid):
        if split.tokenizer_sha256 != found:
            raise UserError(
                f"{tokenizer}: is not the tokenizer that the shards in {split.path} were made with:"
                f" sha256 {found[:16]}, the shards say {split.tokenizer_sha256[:16]}"
            )
    return train, valid


class SplitWriter:
    """Writes one split. Same documents, same bytes.

    Everything goes to `<split>.partial`, which `close` renames: a split that exists is whole. Leaving a `with` block by
    an exception removes it.
    """

    def __init__(
        self,
        split: str | Path,
        *,
        vocab_size: int,
        bos_id: int,
        eos_id: int,
        tokenizer_sha256: str,
        has_mask: bool = False,
        shard_tokens: int = SHARD_TOKENS,
    ):
        self.path = Path(split)
        if self.path.exists():
            raise UserError(f"{self.path} exists already")
        self._partial = self.path.with_name(self.path.name + ".partial")
        shutil.rmtree(self._partial, ignore_errors=True)  # of an interrupted run
        self._partial.mkdir(parents=True)
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._facts = dict(
            token_dtype=self._dtype.name,
            vocab_size=vocab_size,
            bos_id=bos_id,
            eos_id=eos_id,
            tokenizer_sha256=tokenizer_sha256,
            has_mask=has_mask,
        )
        self._has_mask = has_mask
        self._shard_tokens = shard_tokens
        self._tar: tarfile.TarFile | None = None
        self._tokens_in_shard = 0
        self._shards: list[Shard] = []
        self._columns: dict[str, list[int]] = {"shard": [], "offset": [], "length": [], "crc32": []}
        if has_mask:
            self._columns |= {"mask_offset": [], "mask_crc32": []}

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def add(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append a document of at least one token; without a mask every label counts.

        tokens  integers [n], without BOS and EOS
        mask    0 or 1 [n], by label (see the top of this file); only where the writer was made with `has_mask`
        """
        assert len(tokens) > 0 and (mask is None or (self._has_mask and len(mask) == len(tokens)))
        if self._tar and self._tokens_in_shard + len(tokens) > self._shard_tokens:
            self._finish_shard()
        if not self._tar:
            name = self._partial / f"shard-{len(self._shards):06d}.tar"
            self._tar = tarfile.open(name, "w", format=tarfile.USTAR_FORMAT)
        number = len(self._columns["length"])
        self._columns["shard"].append(len(self._shards))
        self._columns["length"].append(len(tokens))
        self._append(f"{number:09d}.u{8 * self._dtype.itemsize}", np.asarray(tokens, self._dtype), "offset", "crc32")
        if self._has_mask:
            mask = np.ones(len(tokens)) if mask is None else mask
            self._append(f"{number:09d}.mask", np.asarray(mask, np.uint8), "mask_offset", "mask_crc32")
        self._tokens_in_shard += len(tokens)

    def close(self) -> None:
        """Raises UserError if there is no document."""
        if not self._columns["length"]:
            self.discard()
            raise UserError(f"{self.path}: no document to write")
        self._finish_shard()
        dtypes = {"offset": np.uint64, "mask_offset": np.uint64}
        index = save_safetensors(
            {name: np.array(column, dtypes.get(name, np.uint32)) for name, column in self._columns.items()}
        )
        (self._partial / INDEX).write_bytes(index)
        manifest = Manifest(
            documents=len(self._columns["length"]),
            tokens=sum(self._columns["length"]),
            shards=self._shards,
            index_sha256=hashlib.sha256(index).hexdigest(),
            **self._facts,
        )
        (self._partial / MANIFEST).write_text(json.dumps(manifest.model_dump(), indent=1) + "\n")
        self._partial.rename(self.path)

    def discard(self) -> None:
        if self._tar:
            self._tar.close()
        shutil.rmtree(self._partial)

    def _append(self, name: str, payload: np.ndarray, offset: str, crc32: str) -> None:
        raw = payload.tobytes()
        member = tarfile.TarInfo(name)  # no time, no owner: the bytes depend on the documents alone
        member.size = len(raw)
        self._columns[offset].append(self._tar.offset + tarfile.BLOCKSIZE)  # a USTAR header is one block
        self._columns[crc32].append(zlib.crc32(raw))
        self._tar.addfile(member, io.BytesIO(raw))

    def _finish_shard(self) -> None:
        self._tar.close()
        path = Path(self._tar.name)
        documents = len(self._columns["length"]) - sum(shard.documents for shard in self._shards)
        sha256 = hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()
        self._shards.append(
            Shard(
                name=path.name,
                bytes=path.stat().st_size,
                sha256=sha256,
                documents=documents,
                tokens=self._tokens_in_shard,
            )
        )
        self._tar, self._tokens_in_shard = None, 0
