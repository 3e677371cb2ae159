"""Lossless SentencePiece tokenizers, trained on a sample of lines.

    lines = sample_lines(["a.txt", "b.jsonl"], characters=5_000_000)
    Path("small.model").write_bytes(train_tokenizer(lines, vocab_size=8192))

Lossless means that decode(encode(text)) == text for any text. That takes more than SentencePiece's defaults:
- no normalisation, no space put before the text, no spaces removed; a run of spaces may be one token;
- newline and tab are symbols of their own, because the trainer reads lines and reserves tab for itself;
- what is not in the vocabulary is spelt in bytes (256 tokens); so are the rarest characters where there are too many;
- SentencePiece writes a space as U+2581, so a U+2581 in the text would be decoded as a space. The model therefore
  carries two rewriting rules with their inverse: U+2581 -> U+E000 U+E001 and U+E000 -> U+E000 U+E002.
Text that looks like a control token ("<s>") is spelt out; only the ids 0 pad, 1 bos, 2 eos, 3 unk are control tokens.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

from memformer_dist.errors import UserError
from memformer_dist.prepare.documents import Document, File, read_documents
from memformer_dist.tokenizer import ESCAPED

ESCAPES = [(character, escaped) for escaped, character in ESCAPED.items()]
RESERVED = 4 + 256 + 2 + 4  # tokens: control, bytes, newline and tab, those that stand for spaces and escapes
LINE_CHARACTERS = 1000  # longer lines are cut for training: the trainer drops those of more than 4192 bytes


def sample_lines(
    files: Sequence[str | Path | File],
    characters: int | None,
    seed: int = 0,
    *,
    text_field: str | None = None,
    observe: Callable[[Document], None] = lambda document: None,
) -> list[str]:
    """The lines of all documents (None), or a seeded sample of about so many characters, every line equally likely.

    `observe` is called once with every document, those that cannot be read included.
    """
    keep = 1.0
    if characters is not None:
        total = sum(len(line) for line in _lines(read_documents(files, text_field), "counting"))
        keep = min(1.0, characters / max(total, 1))
    generator = np.random.Generator(np.random.PCG64(seed))

    def observed() -> Iterator[Document]:
        for document in read_documents(files, text_field):
            observe(document)
            yield document

    return [line for line in _lines(observed(), "reading") if keep == 1.0 or generator.random() < keep]


def train_tokenizer(
    lines: Sequence[str],
    *,
    vocab_size: int,
    model_type: str = "unigram",
    byte_fallback: bool = True,
    cap_vocabulary: bool = False,
    threads: int = 4,
) -> bytes:
    """The content of a `.model` file. The same lines and options give the same bytes on any number of cores.

    cap_vocabulary   `vocab_size` is an upper bound, for texts too small to fill it
    byte_fallback    spell unknown characters in bytes, and the rarest ones of a text with more than there is room for
    threads          has a fixed default because the rounding of a sum, and with it the model, depends on the number

    Raises UserError where the text does not suit the size of the vocabulary.
    """
    if not any(lines):
        raise UserError("there is no text to train on")
    sentencepiece.SetMinLogLevel(2)  # errors arrive as exceptions

    def attempt(lines: Sequence[str]) -> bytes:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=byte_fallback,
            hard_vocab_limit=not cap_vocabulary,
            num_threads=threads,
            normalizer=_rewriting(ESCAPES),
            user_defined_symbols=["\n", "\t"],
            required_chars="\u2581",  # a space spelt in bytes would be decoded as U+2581
            allow_whitespace_only_pieces=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
        )
        return model.getvalue()

    try:
        try:
            model = attempt(lines)
        except RuntimeError as error:  # its option character_coverage would help, but does not go below 0.98
            room = vocab_size - RESERVED
            if not byte_fallback or room < 1 or "smaller than required_chars" not in str(error):
                raise
            model = attempt(_without_rare_characters(lines, room))
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        hint = " (with --cap-vocabulary it is lowered automatically)" if "too high" in reason else ""
        raise UserError(f"--vocab-size {vocab_size}: {reason}{hint}") from None
    return _with_inverse_rules(model)


def _lines(documents: Iterable[Document], verb: str) -> Iterator[str]:
    for document in tqdm(documents, desc=verb, unit=" documents", disable=None):
        for line in document.text.split("\n"):
            for start in range(0, len(line), LINE_CHARACTERS):
                yield line[start : start + LINE_CHARACTERS]


def _without_rare_characters(lines: Sequence[str], keep: int) -> list[str]:
    """The lines, cut at all but their `keep` most frequent characters, which the trainer then never sees."""
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line)
    rare = sorted(counts, key=lambda character: (-counts[character], character))[keep:]
    cut = str.maketrans(dict.fromkeys(rare, "\n"))
    return [part for line in lines for part in line.translate(cut).split("\n") if part]


def _with_inverse_rules(model: bytes) -> bytes:
    """The trained model, which decodes by the inverse of ESCAPES."""
    from sentencepiece import sentencepiece_model_pb2  # workers need no protobuf

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]  # made at import
    proto.normalizer_spec.name = "lossless"
    inverse = _rewriting([(after, before) for before, after in ESCAPES], escape_whitespaces=False)
    proto.denormalizer_spec.ParseFromString(inverse.serialized_normalizer_spec())
    return proto.SerializeToString(deterministic=True)


def _rewriting(rules: list[tuple[str, str]], escape_whitespaces: bool = True) -> sentencepiece.SentencePieceNormalizer:
    return sentencepiece.SentencePieceNormalizer(
        norm_map=rules, add_dummy_prefix=False, remove_extra_whitespaces=False, escape_whitespaces=escape_whitespaces
    )
