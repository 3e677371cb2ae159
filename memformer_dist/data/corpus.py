"""A split of a corpus, read at random through memory maps. shards.py describes what lies on disk.

    corpus = Corpus.open("corpora/books/train")
    corpus.tokens(document=7, start=0, stop=100)  # a view on the file

Whoever reads documents for training calls `check` before, which compares a document with its crc32 when it is met first.

mixture.py makes one of several corpora, stream.py one text of all documents. They answer to the same names.
"""

import hashlib
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memformer_dist.data.cache import CACHE_FOLDER, CACHE_GIB
from memformer_dist.data.format import BLOCK, Manifest, Split, blocks, read_split, wrong_size
from memformer_dist.data.sampler import Source
from memformer_dist.errors import CorpusError, UserError

PAYLOADS = 4096  # documents whose views are at hand


def is_url(corpus: str | Path) -> bool:
    return "://" in str(corpus)


class LocalShards:
    """The shards of a split that lies in a folder: they are all there. `advice`: what to do about a damaged one."""

    advice = ""

    def __init__(self, folder: Path, manifest: Manifest):
        """Raises UserError naming a shard that is missing or was cut short."""
        self.folder, self._shards = folder, manifest.shards
        for problem in (wrong_size(folder, shard) for shard in manifest.shards):
            if problem:
                raise UserError(problem)

    def path(self, number: int) -> Path:
        return self.folder / self._shards[number].name

    def map(self, number: int) -> np.ndarray:
        """The bytes of the shard, uint8. Raises CorpusError if it was removed or cut since the corpus was opened."""
        if problem := wrong_size(self.folder, self._shards[number]):
            raise CorpusError(f"{problem}; it was whole when the corpus was opened")
        # A plain array: slicing np.memmap, a subclass, takes several times as long.
        return np.memmap(self.path(number), np.uint8, "r").view(np.ndarray)

    def name(self, number: int) -> str:
        """What messages call the shard."""
        return str(self.path(number))

    def expect(self, numbers: list[int]) -> set[int]:
        """The shards that are read next, in the order of need -> those whose maps may stay open."""
        return set(range(len(self._shards)))

    def tokenizer(self) -> Path:
        """The tokenizer of the corpus, on this machine."""
        return self.folder.parent / "tokenizer.model"


class Mapped(NamedTuple):
    """A shard in memory."""

    raw: np.ndarray  # uint8
    file: str
    stamp: tuple[int, ...]  # of the file, when it was mapped


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
        self.shard_ends = np.cumsum([shard.documents for shard in manifest.shards])  # of shards, in documents
        self.token_dtype = np.dtype(manifest.token_dtype).newbyteorder("<")
        self._maps: dict[int, Mapped] = {}
        self.folder = shards.folder  # on this machine
        self.is_remote = is_url(path)
        self._payloads: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
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
            remote.on_evict = corpus._forget
            return corpus
        folder = Path(split)
        found = read_split(folder)
        return cls(folder, found, LocalShards(folder, found.manifest))

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens start <= i < stop of a document: a view on the file, uint16 or uint32."""
        return self._payload(document)[0][start:stop]

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """uint8 view: 1 where the label at that token counts in the loss. Only where `has_mask`."""
        return self._payload(document)[1][start:stop]

    def last_labels(self, document: np.ndarray) -> np.ndarray:
        """int64 [n]: what is to be predicted from the last token of documents."""
        return np.full(len(document), self.eos_id)

    def sources(self, min_tokens: int = 1) -> list[Source]:
        """What an epoch is dealt from: the documents of so many tokens. Raises UserError if there are none."""
        usable = np.flatnonzero(self.lengths >= min_tokens)
        if not len(usable):
            raise UserError(
                f"data.min_tokens: no document of {self.path} has {min_tokens} tokens; the longest has {self.lengths.max()}"
            )
        return [Source(usable)]

    def labels_between(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> int:
        """Labels that count in the loss, over all the stretches of tokens start <= i < stop, int64 [n] each."""
        if self.has_mask:
            return sum(np.count_nonzero(self.mask(*place)) for place in zip(document, start, stop))
        return int((stop - start).sum())

    def check(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> None:
        """Raises CorpusError where documents are not those that were written, or their shards have changed since.

        Asked before stretches of tokens start <= i < stop are read, int64 [n] each. Whole documents are compared, once each.
        """
        shards = np.searchsorted(self.shard_ends, document, side="right")
        for shard in set(shards.tolist()):
            self._check_unchanged(shard)
        for number in np.unique(document[~self._checked[document]]).tolist():
            self._compare(number)
            self._checked[number] = True

    def expect(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> None:
        """Say which stretches of tokens are read next, in the order of need, int64 [n] each: their shards are fetched."""
        shards = np.searchsorted(self.shard_ends, document, side="right")
        kept = self._shards.expect(list(dict.fromkeys(shards.tolist())))
        self._forget(self._maps.keys() - kept)

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

    def _forget(self, shards: set[int]) -> None:
        """Unmap them; threads that are reading keep what they have."""
        if shards:
            for number in shards:
                self._maps.pop(number, None)
            self._payloads.clear()

    def _place(self, document: int) -> tuple[int, int]:
        """The number of the shard, and the byte in it at which the tokens start."""
        return int(np.searchsorted(self.shard_ends, document, side="right")), int(self._index.block[document]) * BLOCK

    def _map(self, shard: int) -> np.ndarray:
        found = self._maps.get(shard)
        if found is None:
            raw, file = self._shards.map(shard), os.path.join(self._shards.folder, self.manifest.shards[shard].name)
            found = self._maps[shard] = Mapped(raw, file, _stamp(file))
        return found.raw

    def _payload(self, document: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Views of a document's tokens and of its mask. Those of a document in reading are at hand."""
        found = self._payloads.get(document)
        if found is None:
            shard, start = self._place(document)
            raw, length = self._map(shard), int(self.lengths[document])
            tokens, mask = raw[start : start + length * self.token_dtype.itemsize].view(self.token_dtype), None
            if self.has_mask:
                start += (blocks(tokens.nbytes) + 1) * BLOCK  # behind the tokens and a header
                mask = raw[start : start + length]
            if len(self._payloads) >= PAYLOADS:
                self._payloads.clear()
            found = self._payloads[document] = tokens, mask
        return found

    def _compare(self, document: int) -> None:
        shard, start = self._place(document)
        tokens, mask = self._payload(document)
        members = [("tokens", tokens, start, self._index.crc32)]
        if mask is not None:
            members.append(("mask", mask, start + (blocks(tokens.nbytes) + 1) * BLOCK, self._index.mask_crc32))
        for what, payload, place, crc32 in members:
            found, expected = zlib.crc32(payload.view(np.uint8)), int(crc32[document])
            if found != expected:
                raise CorpusError(
                    f"{self._shards.name(shard)}: the {what} of document {document} at byte {place} are damaged: "
                    f"crc32 is {found:08x}, the index says {expected:08x}{self._shards.advice}"
                )

    def _check_unchanged(self, shard: int) -> None:
        """Another file of the same name leaves the map as it was; writing to the mapped file, or cutting it, does not."""
        mapped = self._maps.get(shard)  # as long as this has it mapped, no other file has its inode
        if mapped is None:
            return
        then, now = mapped.stamp, _stamp(mapped.file)
        if now != then and now[:1] == then[:1]:
            raise CorpusError(
                f"{self._shards.name(shard)}: was changed while it was read: it had {then[1]} bytes, it has {now[1]}, and"
                " was written to since"
            )


def _stamp(file: str) -> tuple[int, ...]:
    """Inode, size and time of the last change; nothing if the file is gone. A map outlives its file."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


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
