"""What a tokenizer loses of the text that is to be prepared: a sample of it is encoded, decoded and compared.

    loss = compare(partitions, tokenizer)
    loss.accept(Path("spm.model"), lossy=False)         # raises UserError if there is any

Many tokenizers do not give back what they were given: an ordinary SentencePiece model turns newlines, tabs and runs of
spaces into single spaces, others write lower case or replace what they do not know. Of inputs of up to a million
characters in up to 200 files everything is compared; of larger ones a million characters from the beginnings of 200
files or parts of files.
"""

import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
REACH, AGREE = 12, 3  # a change is at most so long in either text, and so many characters that are the same follow it
CHANGES = 5_000  # that are looked for
SHOWN, RECORDED = 8, 100  # kinds of characters and changes, in a message and in sharding.json
AROUND = 20  # characters shown on either side of an example
NAMES = {"\n": "newline", "\t": "tab", "\r": "carriage return", "\f": "form feed", "\0": "zero byte"}


class Change(NamedTuple):
    """A difference of a text and what it is decoded to."""

    position: int  # in the text, in characters
    before: str
    after: str


@dataclass
class Loss:
    """The sums of a comparison."""

    compared: int = 0  # documents
    documents: int = 0  # of these, those that are not what they were
    lost: Counter[str] = field(default_factory=Counter)  # characters
    changed: Counter[tuple[str, str]] = field(default_factory=Counter)  # what became of what
    example: str = ""

    def add(self, piece: Piece, document: Document, decoded: str) -> None:
        self.compared += 1
        if decoded == document.text:
            return
        self.documents += 1
        for change in changes(document.text, decoded):
            self.example = self.example or _example(piece, document, decoded, change.position)
            if self.changed.total() >= CHANGES:
                break
            self.lost += Counter(change.before) - Counter(change.after)
            self.changed[change.before, change.after] += 1

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
        lost = {_name(character): count for character, count in self.lost.most_common()}
        changed = {f"{before!r} to {after!r}": count for (before, after), count in self.changed.most_common()}
        lines += [f"  {verb}: {_counts(found)}" for verb, found in (("lost", lost), ("changed", changed)) if found]
        return "\n".join([*lines, f"  for example {self.example}"])

    def record(self) -> dict[str, object]:
        """For sharding.json."""
        changed = [[before, after, count] for (before, after), count in self.changed.most_common(RECORDED)]
        lost = dict(self.lost.most_common(RECORDED))
        return {"compared": self.compared, "documents": self.documents, "lost": lost, "changed": changed}


# ---- the sample ------------------------------------------------------------------------------------------------------


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
    order = sorted(np.random.Generator(np.random.PCG64(0)).permutation(len(pieces))[:SAMPLE_PIECES].tolist())
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
    """About so many characters from the start, cut within a word: a tokenizer may strip spaces at the end of a text."""
    stop = max(characters, 1)
    while stop < len(text) and not (text[stop - 1].isalnum() and text[stop].isalnum()):
        stop += 1
    return text[:stop]


def _size(piece: Piece) -> float:
    """Bytes, as far as they are known before a piece is read."""
    whole = piece.file.size
    return float("inf") if whole is None else whole if piece.stop is None else min(whole, piece.stop - piece.start)


# ---- what has changed ------------------------------------------------------------------------------------------------


def changes(text: str, decoded: str) -> Iterator[Change]:
    """The differences, in their order: each the shortest after which both texts go on alike, else of one character."""
    place = other = 0
    while place < len(text) or other < len(decoded):
        if text[place : place + 64] == decoded[other : other + 64]:
            place, other = place + 64, other + 64  # mostly
        elif text[place : place + 1] == decoded[other : other + 1]:
            place, other = place + 1, other + 1
        else:
            skipped, added = _until_alike(text, place, decoded, other)
            yield Change(place, text[place : place + skipped], decoded[other : other + added])
            place, other = place + skipped, other + added


def _until_alike(text: str, place: int, decoded: str, other: int) -> tuple[int, int]:
    """How many characters the change has that begins at these places: of the text, and of what is decoded."""
    for length in range(1, 2 * REACH + 1):
        for skipped in range(max(0, length - REACH), min(length, REACH) + 1):
            after, other_after = place + skipped, other + length - skipped
            if after > len(text) or other_after > len(decoded):
                continue
            ahead, other_ahead = text[after : after + AGREE], decoded[other_after : other_after + AGREE]
            if ahead == other_ahead:  # perhaps both have ended
                return skipped, length - skipped
    return min(1, len(text) - place), min(1, len(decoded) - other)


def _example(piece: Piece, document: Document, decoded: str, position: int) -> str:
    """Where the first change of a document is, and both texts around it."""
    where = [document.source]
    if piece.start:
        where.append(f"from byte {piece.start:,}")
    if document.position:
        where.append(f"line {document.position:,}")
    around = slice(max(0, position - AROUND), position + AROUND)  # both texts are the same before it
    before, after = document.text[around], decoded[around]
    return f"{', '.join(where)}, character {position + 1:,}: {before!r} becomes {after!r}"


def _counts(found: Mapping[str, int]) -> str:
    """The first of them, which are the most frequent."""
    shown = [f"{what} {count:,} times" for what, count in list(found.items())[:SHOWN]]
    left = len(found) - len(shown)
    return ", ".join(shown) + (f" and {left:,} others" if left else "")


def _name(character: str) -> str:
    name = NAMES.get(character) or unicodedata.name(character, "").lower()
    return f"U+{ord(character):04X}" + (f" ({name})" if name else "")
