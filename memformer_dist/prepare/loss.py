"""What a tokenizer loses of the text that is to be prepared: a sample of it is encoded, decoded and compared.

    loss = compare(partitions, tokenizer)
    loss.accept(Path("spm.model"), lossy=False)         # raises UserError if there is any

Many tokenizers do not give back what they were given: an ordinary SentencePiece model turns newlines, tabs and runs of
spaces into single spaces, others write lower case or replace what they do not know. Of inputs of up to a million
characters everything is compared; of larger ones a million characters, spread over up to 200 files and parts of files.
"""

import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memformer_dist.errors import UserError
from memformer_dist.prepare.documents import Document, Piece, Reader
from memformer_dist.prepare.encode import tokenise
from memformer_dist.prepare.partitions import Partition
from memformer_dist.prepare.records import Part
from memformer_dist.tokenizer import Tokenizer

SAMPLE_CHARACTERS, SAMPLE_PIECES = 1_000_000, 200
READ_CHARACTERS = 100_000_000  # at most, for these: a file of text is read whole
SHOWN_CHARACTERS = 8  # that were lost, in a message
AROUND = 20  # characters shown on either side of an example
NAMES = {"\n": "newline", "\t": "tab", "\r": "carriage return", "\f": "form feed", "\0": "zero byte"}


class Example(NamedTuple):
    """The first difference of a document."""

    place: str
    before: str
    after: str


@dataclass
class Loss:
    """The sums of a comparison. `lost` and `added`: how many of each character the decoded texts have less, and more."""

    compared: int = 0  # documents
    documents: int = 0  # of these, those that are not what they were
    lost: Counter[str] = field(default_factory=Counter)
    added: Counter[str] = field(default_factory=Counter)
    example: Example | None = None

    def add(self, piece: Piece, document: Document, decoded: str) -> None:
        text = document.text
        self.compared += 1
        if decoded == text:
            return
        self.documents += 1
        before, after = Counter(text), Counter(decoded)
        self.lost += before - after
        self.added += after - before
        if self.example is None:
            self.example = _example(piece, document, decoded)

    def accept(self, tokenizer: Path, lossy: bool) -> None:
        """Say what is lost, if anything is. Raises UserError unless `lossy` allows it."""
        if not self.documents:
            return
        if not lossy:
            raise UserError(
                f"--tokenizer: {self.describe(tokenizer)}\nexpected a tokenizer that keeps every text, as those of"
                " tokenizer/train.py do; --lossy makes the corpus all the same"
            )
        print(f"warning: --lossy: {self.describe(tokenizer)}", file=sys.stderr)

    def describe(self, tokenizer: Path) -> str:
        """In some lines."""
        share = f"{self.documents:,} of {self.compared:,} documents ({self.documents / self.compared:.1%})"
        lines = [f"{tokenizer} loses text: {share} of a sample are not the same once they are encoded and decoded"]
        lines += [
            f"  {verb}: {_counts(found)}" for verb, found in (("lost", self.lost), ("added", self.added)) if found
        ]
        if self.example is not None:
            place, before, after = self.example
            lines.append(f"  for example {place}: {before!r} becomes {after!r}")
        return "\n".join(lines)

    def record(self) -> dict[str, object]:
        """For sharding.json."""
        counts = {"compared": self.compared, "documents": self.documents}
        return counts | {"lost": dict(self.lost.most_common(100)), "added": dict(self.added.most_common(100))}


def compare(partitions: Sequence[Partition], tokenizer: Tokenizer, text_field: str | None = None) -> Loss:
    """Encode and decode a sample of the documents; those that cannot be read are passed over.

    Raises UserError where a text cannot be encoded, or an input cannot be read at all.
    """
    loss = Loss()
    for piece, document in sample([piece for partition in partitions for piece in partition.pieces], text_field):
        for _, ids, _ in tokenise([document], tokenizer):
            loss.add(piece, document, tokenizer.decode(ids.tolist()))
    return loss


def sample(pieces: Sequence[Piece], text_field: str | None = None) -> Iterator[tuple[Piece, Document]]:
    """Documents from the beginnings of the pieces, with their piece. What small pieces leave is for larger ones."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(pieces))[:SAMPLE_PIECES].tolist()
    chosen = sorted((pieces[number] for number in order), key=_size)
    left, read = SAMPLE_CHARACTERS, 0
    for number, piece in enumerate(chosen):
        if read > READ_CHARACTERS:
            break
        share = left // (len(chosen) - number)
        for document in Reader(piece, text_field):
            if document.unreadable is not None or not document.text:
                continue
            read += len(document.text)
            if len(document.parts) == 1:
                document = document._replace(parts=[Part(beginning(document.text, share), document.parts[0].loss)])
            yield piece, document
            share -= len(document.text)
            left -= len(document.text)
            if share <= 0:
                break


def beginning(text: str, characters: int) -> str:
    """About so many characters from the start, cut within a word: where a tokenizer may strip a text's end, it does not."""
    stop = max(characters, 1)
    if stop >= len(text):
        return text
    while stop < len(text) and not (text[stop - 1].isalnum() and text[stop].isalnum()):
        stop += 1
    return text[:stop]


def _size(piece: Piece) -> float:
    """Bytes, as far as they are known before a piece is read."""
    whole = piece.file.size
    return float("inf") if whole is None else whole if piece.stop is None else min(whole, abs(piece.stop - piece.start))


def _example(piece: Piece, document: Document, decoded: str) -> Example:
    text = document.text
    first = next((i for i, (a, b) in enumerate(zip(text, decoded)) if a != b), min(len(text), len(decoded)))
    start = max(0, first - AROUND)
    where = [document.source]
    if piece.start:
        where.append(f"from byte {piece.start:,}")
    if document.position:
        where.append(f"line {document.position:,}")
    where.append(f"character {first + 1:,}")
    return Example(", ".join(where), text[start : first + AROUND], decoded[start : first + AROUND])


def _counts(found: Counter[str]) -> str:
    shown = [f"{_name(character)} {count:,} times" for character, count in found.most_common(SHOWN_CHARACTERS)]
    left = len(found) - len(shown)
    return ", ".join(shown) + (f" and {left:,} other characters" if left else "")


def _name(character: str) -> str:
    name = NAMES.get(character) or unicodedata.name(character, "").lower()
    return f"U+{ord(character):04X}" + (f" ({name})" if name else "")
