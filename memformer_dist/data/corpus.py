"""Corpus: one split of a corpus, read at random through memory maps. format.py describes the files.

    corpus = Corpus.open("corpora/books/train")  # open_data.open_split opens URLs as well
    corpus.check(Spans(np.array([7]), np.array([0]), np.array([100])))
    corpus.tokens(document=7, start=0, stop=100)  # a view of the file

Call `check` before reading: it compares a document with its crc32 the first time.

mixture.py makes one dataset of several corpora, stream.py one text of all documents; all of them are TokenDatasets
(dataset.py).
"""

import os
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np

from memformer_dist.data.dataset import Spans
from memformer_dist.data.format import BLOCK, Split, blocks, read_split
from memformer_dist.data.local import LocalShards
from memformer_dist.data.maps import DocumentViews, Mapped, Maps
from memformer_dist.data.sampler import WeightedDocuments
from memformer_dist.errors import CorpusError, UserError
from memformer_dist.files import sha256_of


class Shards(Protocol):
    """The shard files of a split: LocalShards or RemoteShards. Shards are numbered as in corpus.json."""

    folder: Path  # on this machine
    is_remote: bool
    advice: str  # what to do about a damaged shard; the end of a message

    def map(self, number: int) -> np.ndarray:
        """The bytes of a shard, uint8. Raises CorpusError where it cannot be had."""
        ...

    def name(self, number: int) -> str:
        """What messages call the shard."""
        ...

    def prefetch(self, numbers: list[int]) -> set[int]:
        """Start fetching the shards that are read next, in this order; returns those whose maps may stay open."""
        ...

    def tokenizer(self) -> Path:
        """The tokenizer of the corpus, on this machine."""
        ...


class Corpus:
    """One split. A TokenDataset; `fingerprint` is the sha256 of corpus.json, which holds the hashes of everything else.

    maps: given where the shards unmap what they remove (RemoteShards).
    """

    def __init__(self, path: str | Path, split: Split, shards: Shards, maps: Maps | None = None):
        self.manifest, self.fingerprint, self._index = split
        self.path, self.folder, self.is_remote = path, shards.folder, shards.is_remote
        self.vocabulary, self.has_mask = self.manifest.vocabulary, self.manifest.has_mask
        self.total_tokens = self.manifest.tokens
        self.lengths = self._index.length.astype(np.int64)
        self._ends = np.cumsum([shard.documents for shard in self.manifest.shards])
        self.shard_ends: np.ndarray | None = self._ends
        self.token_dtype = np.dtype(self.manifest.token_dtype).newbyteorder("<")
        self._shards, self._maps = shards, maps or Maps()
        self._checked = np.zeros(len(self.lengths), bool)
        self._stamps: dict[int, tuple[int, ...]] = {}  # of the shards' files, when they were mapped last

    @classmethod
    def open(cls, split: str | Path) -> "Corpus":
        """Open a split in a folder.

        Raises UserError naming a file that is missing or is not the one that was written.
        """
        folder = Path(split)
        found = read_split(folder)
        return cls(split, found, LocalShards(folder, found.manifest))

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return self._views(document).tokens[start:stop]

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        mask = self._views(document).mask
        assert mask is not None
        return mask[start:stop]

    def last_labels(self, documents: np.ndarray) -> np.ndarray:
        return np.full(len(documents), self.vocabulary.eos_id)

    def labels_in(self, spans: Spans) -> int:
        if self.has_mask:
            return sum(int(np.count_nonzero(self.mask(*span))) for span in zip(*spans))
        return int((spans.stop - spans.start).sum())

    def check(self, spans: Spans) -> None:
        """Compares whole documents, once each."""
        for shard in set(self._shards_of(spans.document).tolist()):
            self._check_unchanged(shard)
        for number in np.unique(spans.document[~self._checked[spans.document]]).tolist():
            self._compare(number)
            self._checked[number] = True

    def prefetch(self, spans: Spans) -> None:
        kept = self._shards.prefetch(list(dict.fromkeys(self._shards_of(spans.document).tolist())))
        self._maps.unmap_others(kept)

    def place(self, document: int) -> tuple[str, int]:
        shard, start = self._place(document)
        return self._shards.name(shard), start

    def sources(self, min_tokens: int = 1) -> list[WeightedDocuments]:
        usable = np.flatnonzero(self.lengths >= min_tokens)
        if not len(usable):
            raise UserError(
                f"data.min_tokens: no document of {self.path} has {min_tokens} tokens; the longest has"
                f" {self.lengths.max()}"
            )
        return [WeightedDocuments(usable)]

    def tokenizer(self) -> Path:
        file, expected = self._shards.tokenizer(), self.vocabulary.tokenizer_sha256
        try:
            found = sha256_of(file)
        except FileNotFoundError:
            raise UserError(
                f"{file}: not found; expected the tokenizer that the shards in {self.path} were made with"
            ) from None
        if found != expected:
            raise UserError(
                f"{file}: is not the tokenizer that the shards in {self.path} were made with:"
                f" sha256 {found[:16]}, the shards say {expected[:16]}"
            )
        return file

    def _shards_of(self, documents: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._ends, documents, side="right")

    def _place(self, document: int) -> tuple[int, int]:
        """The number of a document's shard, and the byte in it at which the tokens start."""
        return int(np.searchsorted(self._ends, document, side="right")), int(self._index.block[document]) * BLOCK

    def _mask_start(self, start: int, tokens: np.ndarray) -> int:
        """The byte at which a document's mask starts: behind the tokens, which start at `start`, and a header."""
        return start + (int(blocks(tokens.nbytes)) + 1) * BLOCK

    def _map(self, shard: int) -> Mapped:
        raw, file = self._shards.map(shard), os.path.join(self.folder, self.manifest.shards[shard].name)
        stamp = _stamp(file)
        if self._stamps.setdefault(shard, stamp) != stamp:  # another file, or one that was written to
            self._stamps[shard] = stamp
            if not self.is_remote:  # remote ones are verified whenever they are fetched
                first = int(self._ends[shard - 1]) if shard else 0
                self._checked[first : self._ends[shard]] = False
        return Mapped(raw, file, stamp, set())

    def _views(self, document: int) -> DocumentViews:
        views = self._maps.documents.get(document)
        if views is None:
            shard, start = self._place(document)
            was_checked, length = self._checked[document], int(self.lengths[document])
            mapped = self._maps.shard(shard, lambda: self._map(shard))
            raw = mapped.raw
            tokens, mask = raw[start : start + length * self.token_dtype.itemsize].view(self.token_dtype), None
            if self.has_mask:
                start = self._mask_start(start, tokens)
                mask = raw[start : start + length]
            views = DocumentViews(tokens, mask)
            if (
                was_checked and not self._checked[document]
            ):  # its shard was unmapped, and changed before it was mapped again
                self._compare_views(document, views)
                self._checked[document] = True
            self._maps.keep(document, views, shard, mapped)
        return views

    def _compare(self, document: int) -> None:
        """Raises CorpusError where a document's tokens or mask are not those that were written."""
        self._compare_views(document, self._views(document))

    def _compare_views(self, document: int, views: DocumentViews) -> None:
        """Raises CorpusError where a document's tokens or mask are not those that were written."""
        shard, start = self._place(document)
        tokens, mask = views
        members = [("tokens", tokens, start, self._index.crc32)]
        if mask is not None:
            assert self._index.mask_crc32 is not None
            members.append(("mask", mask, self._mask_start(start, tokens), self._index.mask_crc32))
        for what, payload, place, crc32 in members:
            found, expected = zlib.crc32(payload.data), int(crc32[document])
            if found != expected:
                raise CorpusError(
                    f"{self._shards.name(shard)}: the {what} of document {document} at byte {place} are damaged: "
                    f"crc32 is {found:08x}, the index says {expected:08x}{self._shards.advice}"
                )

    def _check_unchanged(self, shard: int) -> None:
        """Raises CorpusError where a mapped file was written to or cut short.

        Where another file took its place the map is still the old one, as it was.
        """
        mapped = self._maps.touch(shard)  # as long as this has it mapped, no other file has its inode
        if mapped is None:
            return
        then, now = mapped.stamp, _stamp(mapped.file)
        if now != then and now[:1] == then[:1]:
            raise CorpusError(
                f"{self._shards.name(shard)}: was changed while it was read: it had {then[1]} bytes, it has {now[1]},"
                " and was written to since"
            )


def _stamp(file: str) -> tuple[int, ...]:
    """Inode, size and time of the last change; empty if the file is gone. A map outlives its file."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns
