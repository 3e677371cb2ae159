"""A split of a corpus, read at random through memory maps. shards.py describes what lies on disk.

    corpus = Corpus.open("corpora/books/train")
    corpus.tokens(document=7, start=0, stop=100)  # a view on the file

Whoever reads documents for training does it with `fill`, which writes tokens and labels of consecutive segments, after
`check`, which compares a document with its crc32 when it is met first.
"""

import hashlib
import zlib
from pathlib import Path
from typing import Iterable

import numpy as np

from memformer_dist.data.cache import CACHE_FOLDER, CACHE_GIB
from memformer_dist.data.shards import BLOCK, Manifest, Split, blocks, read_split, wrong_size
from memformer_dist.errors import UserError
from memformer_dist.segment import IGNORE


def is_url(corpus: str | Path) -> bool:
    return "://" in str(corpus)


class CorpusError(UserError):
    """A corpus is damaged. The message names the shard, the document and the byte offset."""


class LocalShards:
    """The shards of a split that lies in a folder: they are all there."""

    def __init__(self, folder: Path, manifest: Manifest):
        """Raises UserError naming a shard that is missing or was cut short."""
        self.folder, self._names = folder, [shard.name for shard in manifest.shards]
        for problem in (wrong_size(folder, shard) for shard in manifest.shards):
            if problem:
                raise UserError(problem)

    def path(self, number: int) -> Path:
        return self.folder / self._names[number]

    def map(self, number: int) -> np.ndarray:
        """The bytes of the shard, uint8."""
        # A plain array: slicing np.memmap, a subclass, takes several times as long.
        return np.memmap(self.path(number), np.uint8, "r").view(np.ndarray)

    def name(self, number: int) -> str:
        """What messages call the shard."""
        return str(self.path(number))

    def expect(self, numbers: list[int]) -> set[int]:
        """The shards that are read next, in the order of need -> those whose maps may stay open."""
        return set(range(len(self._names)))

    def tokenizer(self) -> Path:
        """The tokenizer of the corpus, on this machine."""
        return self.folder.parent / "tokenizer.model"


class Corpus:
    """One split.

    lengths      int64 [documents], tokens of each document
    tokens       see `tokens(document, start, stop)`; their number is `total_tokens`
    fingerprint  sha256 of corpus.json, which holds the hashes of everything else
    """

    def __init__(self, path: str | Path, split: Split, shards: LocalShards):
        manifest, self.fingerprint, self._index = split
        self.path, self.manifest, self._shards = path, manifest, shards
        self.vocab_size, self.bos_id, self.eos_id = manifest.vocab_size, manifest.bos_id, manifest.eos_id
        self.tokenizer_sha256, self.has_mask = manifest.tokenizer_sha256, manifest.has_mask
        self.total_tokens = manifest.tokens
        self.lengths = self._index.length.astype(np.int64)
        self._ends = np.cumsum([shard.documents for shard in manifest.shards])  # of shards, in documents
        self._dtype = np.dtype(manifest.token_dtype).newbyteorder("<")
        self._maps: dict[int, np.ndarray] = {}
        self._checked = np.zeros(len(self.lengths), bool)

    @classmethod
    def open(cls, split: str | Path, *, cache: str | Path = CACHE_FOLDER, cache_gib: float = CACHE_GIB) -> "Corpus":
        """Raises UserError naming the file if one is missing, was cut short, or is not the one that was written.

        split            a folder, or a URL, whose shards are fetched when they are needed (remote.py)
        cache, cache_gib  where shards from a URL are kept, and how many GiB of them
        """
        if is_url(split):
            from memformer_dist.data.remote import open_remote  # imports fsspec

            found, remote = open_remote(str(split), Path(cache), int(cache_gib * 2**30))
            corpus = cls(split, found, remote)
            remote.forget = lambda number: corpus._maps.pop(number, None)
            return corpus
        folder = Path(split)
        found = read_split(folder)
        return cls(folder, found, LocalShards(folder, found.manifest))

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens start <= i < stop of a document: a view on the file, uint16 or uint32."""
        return self._tokens(document)[start:stop]

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """uint8 view: 1 where the label at that token counts in the loss. Only where `has_mask`."""
        return self._mask(document)[start:stop]

    def fill(self, document: int, start: int, tokens: np.ndarray, labels: np.ndarray) -> None:
        """Write the segments of a document from token `start` on; the last may end before its row does.

        tokens, labels   int64 [segments, S], padded with 0 and IGNORE
        """
        segments, length = tokens.shape
        text = self._tokens(document)
        stop = min(start + segments * length, len(text))
        # Rows whose labels all stand in the text; what ends the document is one row more.
        full = segments if stop < len(text) else (stop - start - 1) // length
        middle = start + full * length
        tokens[:full] = text[start:middle].reshape(full, length)
        labels[:full] = text[start + 1 : middle + 1].reshape(full, length)
        if full < segments:
            rest = stop - middle
            tokens[full, :rest], tokens[full, rest:] = text[middle:stop], 0
            labels[full, : rest - 1], labels[full, rest:] = text[middle + 1 : stop], IGNORE
            labels[full, rest - 1] = self.eos_id
        if self.has_mask:
            mask = self._mask(document)
            labels[:full][mask[start:middle].reshape(full, length) == 0] = IGNORE
            if full < segments:
                labels[full, :rest][mask[middle:stop] == 0] = IGNORE

    def labels_between(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> int:
        """Labels that count in the loss, over all the stretches start <= i < stop, int64 [n] each."""
        if self.has_mask:
            return sum(np.count_nonzero(self.mask(*place)) for place in zip(document, start, stop))
        return int((stop - start).sum())

    def check(self, document: int) -> None:
        """Raises CorpusError if the bytes of the document are not those that were written. Compares once."""
        if self._checked[document]:
            return
        shard, start = self._place(document)
        tokens = self._tokens(document)
        self._compare("tokens", document, shard, start, tokens, self._index.crc32)
        if self.has_mask:
            start += (blocks(tokens.nbytes) + 1) * BLOCK
            self._compare("mask", document, shard, start, self._mask(document), self._index.mask_crc32)
        self._checked[document] = True

    def expect(self, documents: Iterable[int]) -> None:
        """Say which documents are read next, in the order of need."""
        shards = np.searchsorted(self._ends, np.fromiter(documents, np.int64), side="right")
        kept = self._shards.expect(list(dict.fromkeys(shards.tolist())))
        for number in self._maps.keys() - kept:
            self._maps.pop(number, None)

    def tokenizer(self) -> Path:
        """The tokenizer that the split was made with, on this machine: CORPUS/tokenizer.model, fetched from a URL.

        Raises UserError where it is missing or is another.
        """
        file = self._shards.tokenizer()
        try:
            found = hashlib.sha256(file.read_bytes()).hexdigest()
        except FileNotFoundError:
            raise UserError(
                f"{file}: not found; the tokenizer that the shards in {self.path} were made with is needed"
            ) from None
        if found != self.tokenizer_sha256:
            raise UserError(
                f"{file}: is not the tokenizer that the shards in {self.path} were made with:"
                f" sha256 {found[:16]}, the shards say {self.tokenizer_sha256[:16]}"
            )
        return file

    def place(self, document: int) -> tuple[str, int]:
        """The shard that a document lies in, as messages call it, and the byte in it at which the tokens start."""
        shard, start = self._place(document)
        return self._shards.name(shard), start

    def _place(self, document: int) -> tuple[int, int]:
        """The number of the shard, and the byte in it at which the tokens start."""
        return int(np.searchsorted(self._ends, document, side="right")), int(self._index.block[document]) * BLOCK

    def _map(self, shard: int) -> np.ndarray:
        found = self._maps.get(shard)
        if found is None:
            found = self._maps[shard] = self._shards.map(shard)
        return found

    def _tokens(self, document: int) -> np.ndarray:
        shard, start = self._place(document)
        return self._map(shard)[start : start + int(self.lengths[document]) * self._dtype.itemsize].view(self._dtype)

    def _mask(self, document: int) -> np.ndarray:
        shard, start = self._place(document)
        length = int(self.lengths[document])
        start += (blocks(length * self._dtype.itemsize) + 1) * BLOCK
        return self._map(shard)[start : start + length]

    def _compare(self, what: str, document: int, shard: int, start: int, payload: np.ndarray, crc32: np.ndarray) -> None:
        found, expected = zlib.crc32(payload.view(np.uint8)), int(crc32[document])
        if found != expected:
            raise CorpusError(
                f"{self._shards.name(shard)}: the {what} of document {document} at byte {start} are damaged: "
                f"crc32 is {found:08x}, the index says {expected:08x}"
            )


def open_corpora(
    corpus: str | Path, *, cache: str | Path = CACHE_FOLDER, cache_gib: float = CACHE_GIB
) -> tuple[Corpus, Corpus]:
    """The training and validation split of a corpus in a folder or at a URL (see Corpus.open).

    Raises UserError where one of them was made with another tokenizer than the corpus holds.
    """
    folder = str(corpus).rstrip("/")
    train, valid = (Corpus.open(f"{folder}/{name}", cache=cache, cache_gib=cache_gib) for name in ("train", "valid"))
    for split in (train, valid):
        split.tokenizer()
    return train, valid
