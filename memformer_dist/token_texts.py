"""How much text token ids stand for: bytes and words, so that losses compare across tokenizers.

    texts = token_texts(Path("corpora/books/tokenizer.model"))
    texts.count(segment, before)  # of what the segment's labels stand for

The count is exact for any choice of labels: over all labels of a document it is the size of its text in UTF-8, less its
first token, which is never predicted. The end of a document stands for nothing. Where a tokenizer loses text (it drops
newlines, say), the text is the one that it decodes to. Words are what whitespace of ASCII separates; a word belongs to
the label with which it begins.
"""

import logging
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from memformer_dist.errors import UserError
from memformer_dist.segment import IGNORE, Segment
from memformer_dist.tokenizer import open_tokenizer

WHITESPACE = b" \t\n\r\v\f"
log = logging.getLogger(__name__)


class TextCount(NamedTuple):
    """How much text; nan where that is not known."""

    bytes: float  # also nan where a token stands for characters that the tokenizer did not know
    words: float

    def plus(self, other: "TextCount") -> "TextCount":
        return TextCount(self.bytes + other.bytes, self.words + other.words)


NO_TEXT, UNKNOWN_TEXT = TextCount(0.0, 0.0), TextCount(math.nan, math.nan)


class TokenTexts:
    """What each token id stands for.

    Args:
        texts: bytes by token id; none for control tokens, None where it is not known.
        escape: stands for nothing where it occurs in these bytes, whether in one token or spelled byte by byte.
    """

    def __init__(self, texts: list[bytes | None], escape: bytes = b""):
        sizes = [math.nan if text is None else len(text) for text in texts]
        known = [text or b"" for text in texts]
        if escape:
            sizes = [size - len(escape) * text.count(escape) for size, text in zip(sizes, known, strict=True)]
        spelled = [bytes([byte]) for byte in escape]
        self._spelled = [known.index(byte) for byte in spelled] if set(spelled) <= set(known) else []
        self._bytes = torch.tensor(sizes, dtype=torch.float64)
        # A word begins where whitespace, or the end of a document, is followed by something else.
        self._words_inside = torch.tensor([_words_inside(text) for text in known], dtype=torch.float64)
        self._begins_word = torch.tensor([text[:1].strip(WHITESPACE) != b"" for text in known])
        self._ends_words = torch.tensor([text[-1:].strip(WHITESPACE) == b"" for text in known])

    def count(self, segment: Segment, before: Tensor) -> TextCount:
        """Of the text that the labels stand for. On the CPU.

        Args:
            before: int64 [B], the token in front of each row, of the same document; -1 where there is none.
        """
        counted = segment.labels != IGNORE
        labels, tokens = segment.labels[counted], segment.tokens[counted]
        total = self._bytes[labels].sum()
        if self._spelled:
            first, second, third = self._spelled
            earlier = torch.cat([before[:, None], segment.tokens[:, :-1]], 1)[counted]
            total -= 3 * ((earlier == first) & (tokens == second) & (labels == third)).sum()
        begun = self._words_inside[labels] + (self._begins_word[labels] & self._ends_words[tokens])
        return TextCount(float(total), float(begun.sum()))


def _words_inside(text: bytes) -> int:
    """Words that begin behind the first byte."""
    return len(text.split()) - (text[:1].strip(WHITESPACE) != b"")


def token_texts(path: Path) -> TokenTexts | None:
    """What the tokens of a tokenizer stand for; None where it cannot be read here."""
    try:
        tokenizer = open_tokenizer(path)
    except UserError as error:
        log.warning("bits per byte are not computed: %s", error)
        return None
    return TokenTexts([tokenizer.written(token) for token in range(tokenizer.size)], tokenizer.escape)
