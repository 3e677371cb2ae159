"""Tokenizers: SentencePiece models, and files tokenizer.json of Hugging Face's package tokenizers, behind one interface.

    tokenizer = open_tokenizer(Path("books_4k.model"))       # or a tokenizer.json: its content says which
    (ids,) = tokenizer.encode(["It was a dark"])
    tokenizer.decode(ids.tolist())

A text is encoded as it is: nothing is put before it or behind it, and what looks like a special token in it ("</s>") is
spelt out. A special token decodes to nothing. What a file says about truncation, padding and dropout is not heeded.

A corpus and a run hold a copy of their tokenizer's file, tokenizer.model or tokenizer.json. What token ids mean besides
(how many there are, BOS, EOS) is chosen once, in preparation (`vocabulary`), and kept in the corpus and in checkpoints.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from memformer_dist.errors import UserError
from memformer_dist.files import sha256_of
from memformer_dist.vocabulary import Vocabulary

SENTENCEPIECE, HUGGING_FACE = FILES = ("tokenizer.model", "tokenizer.json")  # names in a corpus and in a run
# SentencePiece writes a space as U+2581. Our own models (prepare/tokenizer.py) therefore write U+2581 and U+E000 as two
# characters each, of which this is the first.
SPACE, ESCAPE, ESCAPED = "\u2581", "\ue000", {"\ue000\ue001": "\u2581", "\ue000\ue002": "\ue000"}
# Under which names BOS and EOS go in files that do not say otherwise.
BOS_NAMES = (
    "<s>",
    "<bos>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "[BOS]",
    "[CLS]",
)
EOS_NAMES = (
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[EOS]",
    "[SEP]",
)
BESIDE = ("tokenizer_config.json", "special_tokens_map.json")  # say which is which, in a model's folder
SHOWN_TOKENS = 12  # in a message


class Tokenizer(Protocol):
    raw: bytes  # content of the file
    file_name: str  # of FILES
    size: int  # ids are 0 ... size - 1
    bos_id: int | None  # None where the file does not say
    eos_id: int | None
    escape: (
        bytes  # begins what is written for another character, and stands for nothing itself; none in most tokenizers
    )

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32 [tokens]. Raises UserError where a text cannot be encoded."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, which need not be those of a text. What is no UTF-8 in it becomes U+FFFD."""
        ...

    def piece(self, token: int) -> str:
        """How a token is written in the vocabulary."""
        ...

    def id_of(self, piece: str) -> int | None:
        """The token that is written so in the vocabulary, None where there is none."""
        ...

    def special(self) -> list[str]:
        """The pieces of the special tokens."""
        ...

    def bytes_of(self, token: int) -> bytes | None:
        """What a token adds to a text, in UTF-8; it may be part of a character. None where its neighbours decide."""
        ...

    def written(self, token: int) -> bytes | None:
        """What a token stands for: as `bytes_of`, but with escapes as they are written (see `escape`).

        None for the token of what the tokenizer does not know, too.
        """
        ...

    def is_open(self, ids: Sequence[int]) -> bool:
        """Whether the end of the text of `ids` may still change when more ids follow: half a character, for example."""
        ...


# ---- opening ---------------------------------------------------------------------------------------------------------


def open_tokenizer(path: Path, option: str = "--tokenizer") -> Tokenizer:
    """Raises UserError, beginning with `option`, where it cannot be read or is no tokenizer."""
    try:
        raw = path.read_bytes()
    except IsADirectoryError:
        there = [name for name in FILES if (path / name).exists()]
        found = f"a folder{' with ' + ' and '.join(there) if there else ''}"
        raise UserError(
            f"{option}: {path} is {found}, expected a file: a SentencePiece model or a tokenizer.json"
        ) from None
    except OSError as error:
        raise UserError(f"{option}: cannot load {path}: {error.strerror}") from None
    described = _json_object(raw)
    try:
        if described is None:
            return SentencePieceTokenizer(raw)
        return HuggingFaceTokenizer(raw, described, _stated_beside(path))
    except ImportError:
        raise UserError(
            f"{option}: {path} is a tokenizer.json, which needs the package tokenizers:"
            " pip install 'memformer_dist[tokenizers]'"
        ) from None
    except (RuntimeError, ValueError) as error:
        kind = "a SentencePiece model" if described is None else "a tokenizer.json"
        raise UserError(f"{option}: cannot load {path} as {kind}: {error}") from None


def find_tokenizer(folder: Path, sha256: str) -> Path | None:
    """The tokenizer's file in a run's folder: the one with this hash, else any; None where there is none."""
    there = [folder / name for name in FILES if (folder / name).exists()]
    return next((path for path in there if sha256_of(path) == sha256), there[0] if there else None)


def file_name_of(raw: bytes) -> str:
    """What a tokenizer with this content is called in a corpus and in a run."""
    return SENTENCEPIECE if _json_object(raw) is None else HUGGING_FACE


def vocabulary(tokenizer: Tokenizer, bos: str | None = None, eos: str | None = None) -> Vocabulary:
    """What the ids mean; `bos` and `eos` are the pieces of these tokens where the file does not say.

    Without a BOS of its own a tokenizer's EOS stands for both, as in GPT-2. Raises UserError where EOS is not known, or
    there is no such piece.
    """
    problems, chosen = [], {"--bos": tokenizer.bos_id, "--eos": tokenizer.eos_id}
    for option, piece in (("--bos", bos), ("--eos", eos)):
        if piece is not None:
            chosen[option] = tokenizer.id_of(piece)
            if chosen[option] is None:
                problems.append(f"{option}: found no token {piece!r} in the vocabulary; {_special(tokenizer)}")
    if chosen["--eos"] is None and eos is None:
        problems.append(
            f"--eos: the tokenizer does not say which token ends a document, expected --eos TOKEN; {_special(tokenizer)}"
        )
    if problems:
        raise UserError("\n".join(problems))
    eos_id = chosen["--eos"]
    assert eos_id is not None
    bos_id = eos_id if chosen["--bos"] is None else chosen["--bos"]
    sha256 = hashlib.sha256(tokenizer.raw).hexdigest()
    return Vocabulary(size=tokenizer.size, bos_id=bos_id, eos_id=eos_id, tokenizer_sha256=sha256)


def _special(tokenizer: Tokenizer) -> str:
    pieces = tokenizer.special()
    shown = ", ".join(map(repr, pieces[:SHOWN_TOKENS])) + (" ..." if len(pieces) > SHOWN_TOKENS else "")
    return f"its special tokens are {shown}" if pieces else "it has no special tokens"


def _json_object(raw: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(raw)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


# ---- SentencePiece ---------------------------------------------------------------------------------------------------


class SentencePieceTokenizer:
    """A SentencePiece model. Raises RuntimeError where it is none."""

    file_name = SENTENCEPIECE

    def __init__(self, raw: bytes):
        import sentencepiece  # as late as its counterpart: much of what imports this module encodes nothing

        sentencepiece.SetMinLogLevel(2)  # errors arrive as exceptions
        if not raw:
            raise ValueError("it is empty")
        self.raw = raw
        self._model = sentencepiece.SentencePieceProcessor(model_proto=raw)
        self.size = self._model.vocab_size()
        self.bos_id, self.eos_id = (None if x < 0 else x for x in (self._model.bos_id(), self._model.eos_id()))
        is_ours = self._model.normalize(SPACE).startswith(ESCAPE)
        self.escape = ESCAPE.encode() if is_ours else b""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self._model.encode(list(texts), out_type="numpy", num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids)) if ids else ""

    def piece(self, token: int) -> str:
        return self._model.id_to_piece(token)

    def id_of(self, piece: str) -> int | None:
        found = self._model.piece_to_id(piece)  # unknown pieces have the id of <unk>
        return found if self._model.id_to_piece(found) == piece else None

    def special(self) -> list[str]:
        return [self.piece(token) for token in range(self.size) if self._model.is_control(token)]

    def written(self, token: int) -> bytes | None:
        if self._model.is_control(token) or self._model.is_unused(token):
            return b""
        if self._model.is_unknown(token):
            return None
        piece = self.piece(token)
        return _byte(piece) if self._model.is_byte(token) else piece.replace(SPACE, " ").encode()

    def bytes_of(self, token: int) -> bytes | None:
        written = self.written(token)
        if not written or self._model.is_byte(token):
            return written
        piece, text = self.piece(token), written.decode()
        for escaped, character in ESCAPED.items():
            text = text.replace(escaped, character)
        if text.endswith(ESCAPE) != piece.endswith("\ue000\ue002") or text.startswith(("\ue001", "\ue002")):
            return None  # half of an escape
        return text.encode()

    def is_open(self, ids: Sequence[int]) -> bool:
        tail: list[bytes] = []
        for token in reversed(ids):
            if not self._model.is_byte(token):
                break
            tail.append(_byte(self.piece(token)))
        return _is_unfinished(b"".join(tail[::-1])) or self.decode(ids).endswith(ESCAPE)


def _byte(piece: str) -> bytes:
    """The byte that is written as <0xE2>."""
    return bytes([int(piece[1:-1], 16)])


def _is_unfinished(raw: bytes) -> bool:
    """Whether the last character of some bytes lacks bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(raw)
    return bool(decoder.getstate()[0])


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


class HuggingFaceTokenizer:
    """A tokenizer.json, parsed as `described`. Raises ValueError where it is none, ImportError without the package.

    stated: pieces of BOS and EOS by those names, from elsewhere.
    """

    file_name = HUGGING_FACE
    escape = b""

    def __init__(self, raw: bytes, described: dict[str, Any], stated: dict[str, str] | None = None):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # preparation has processes of its own
        import tokenizers

        if "model" not in described:
            raise ValueError(f"expected an object with the field model, found {', '.join(described) or 'none'}")
        self.raw = raw
        self._model = tokenizers.Tokenizer.from_buffer(raw)
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # in a text they are text
        if getattr(self._model.model, "dropout", None):
            self._model.model.dropout = None
        self.size = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # there may be gaps
        added = self._model.get_added_tokens_decoder()
        self._special = {token: added[token].content for token in sorted(added) if added[token].special}
        kinds = set(_kinds(described.get("decoder")))
        model = described["model"] if isinstance(described["model"], dict) else {}
        named = model.get("unk_token")
        self._unknown = model.get("unk_id") if named is None else self._model.token_to_id(named)
        self._spells_bytes, self._falls_back = "ByteLevel" in kinds, "ByteFallback" in kinds
        first, last = _around(described.get("post_processor"))
        stated = stated or {}
        self.bos_id = self._one_of([stated.get("bos"), first], BOS_NAMES)
        self.eos_id = self._one_of([stated.get("eos"), last], EOS_NAMES)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            found = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the package raises nothing more special
            raise UserError(f"--tokenizer: a text cannot be encoded: {error}") from None
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids), skip_special_tokens=True)

    def piece(self, token: int) -> str:
        return self._model.id_to_token(token) or ""

    def id_of(self, piece: str) -> int | None:
        return self._model.token_to_id(piece)

    def special(self) -> list[str]:
        return list(self._special.values())

    def bytes_of(self, token: int) -> bytes | None:
        piece = self._model.id_to_token(token)
        if piece is None or token in self._special:
            return b""
        if self._spells_bytes:
            if all(character in BYTE_OF for character in piece):
                return bytes(BYTE_OF[character] for character in piece)
            return piece.encode()
        if self._is_byte(token):
            return _byte(piece)
        alone, twice = self.decode([token]), self.decode([token, token])  # decoders treat the first token otherwise
        return twice[len(alone) :].encode() if twice.startswith(alone) else None

    def written(self, token: int) -> bytes | None:
        return None if token == self._unknown else self.bytes_of(token)

    def is_open(self, ids: Sequence[int]) -> bool:
        if self._spells_bytes:
            return _is_unfinished(b"".join(self.bytes_of(token) or b"" for token in ids))
        # The package decodes bytes that follow one another together, and none of them where one is wrong.
        last = next((token for token in reversed(ids) if token not in self._special), None)
        return last is not None and self._is_byte(last)

    def _is_byte(self, token: int) -> bool:
        piece = self.piece(token)
        return self._falls_back and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")

    def _one_of(self, said: list[str | None], names: Sequence[str]) -> int | None:
        """The first token that is said to be it, else the one special token that has one of these names."""
        for piece in filter(None, said):
            if (token := self.id_of(piece)) is not None:
                return token
        named = [token for token, piece in self._special.items() if piece in names]
        return named[0] if len(named) == 1 else None


def _bytes_by_character() -> dict[str, int]:
    """How ByteLevel writes bytes: those that are printable as themselves, the others as U+0100 and on (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _bytes_by_character()


def _kinds(described: Any) -> Iterator[str]:
    """The types of a decoder and of those that it consists of."""
    if isinstance(described, dict):
        yield str(described.get("type"))
        for part in described.get("decoders") or []:
            yield from _kinds(part)


def _around(described: Any) -> tuple[str | None, str | None]:
    """The pieces that a post-processor puts before and behind a text."""
    match described:
        case {"type": "TemplateProcessing", "single": [*parts]}:
            pieces = [part.get("SpecialToken", {}).get("id") for part in parts]
            ends = [pieces[0], pieces[-1]] if pieces else [None, None]
            return ends[0], ends[1]
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [first, _], "sep": [last, _]}:
            return str(first), str(last)
        case {"type": "Sequence", "processors": [*parts]}:
            found = [_around(part) for part in parts]
            return next((a for a, _ in found if a), None), next((b for _, b in found if b), None)
    return None, None


def _stated_beside(path: Path) -> dict[str, str]:
    """The pieces of BOS and EOS as other files in the folder of a tokenizer.json have them, as far as they do."""
    stated: dict[str, str] = {}
    for name in BESIDE:
        try:
            described = _json_object((path.parent / name).read_bytes()) or {}
        except OSError:
            continue
        for token in "bos", "eos":
            piece = described.get(f"{token}_token")
            piece = piece.get("content") if isinstance(piece, dict) else piece
            if isinstance(piece, str):
                stated.setdefault(token, piece)
    return stated


# ---- text, token by token --------------------------------------------------------------------------------------------


class TextStream:
    """Decodes tokens one by one. All the pieces of text together equal the tokenizer's `decode` of all the tokens.

    Text that further tokens may change waits: that of a character that is spelt in bytes for its last byte.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.pending: list[int] = []
        self.context: list[int] = []  # tokens with some text before: `decode` may strip a space at the start

    def push(self, token: int) -> str:
        """The text that is complete with this token, perhaps none."""
        self.pending.append(token)
        return "" if self.tokenizer.is_open(self.pending) else self.finish()

    def finish(self) -> str:
        """The text that is still waiting, incomplete as it may be."""
        before, after = (self.tokenizer.decode(tokens) for tokens in (self.context, self.context + self.pending))
        self.context = self.pending if self.tokenizer.decode(self.pending) else self.context + self.pending
        self.pending = []
        return after[len(before) :]
