"""Bytes and words that labels stand for, against the texts themselves; bits per byte of evaluations."""

import json
import math
import random
from itertools import pairwise

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from memformer_dist.cells.memformer import MemformerConfig
from memformer_dist.data.corpus import Corpus
from memformer_dist.evaluate import summary
from memformer_dist.metrics import evaluation_scalars
from memformer_dist.prepare.build import shard
from memformer_dist.prepare.tokenizer import train_tokenizer
from memformer_dist.segment import IGNORE, Segment
from memformer_dist.token_texts import TokenTexts, token_texts
from memformer_dist.tokenizer import open_tokenizer
from tests.helpers import tokenizers as made
from tests.helpers.evaluation import evaluate_documents
from tests.helpers.ranks import run_ranks

TEXTS = (
    "The quick brown fox\njumps over  the lazy dog.\n\tAnd so on.\r\n",
    "Быстрая бурая лиса перепрыгнула\nчерез ленивую собаку.\n",
    "敏捷的棕色狐狸跳过了懒狗。\n\n日本語のテキスト。",
    "Ο γρήγορος καφέ αλεπού\u00a0πηδάει 𝄞𝄞 \u2581\u2581 \ue000\ue001 é e\u0301",
    "שועל חום מהיר קופץ מעל הכלב העצלן",
)
ALPHABET = "ab \n\t\r\v\u2581\ue000\ue001\ue002é日𝄞\u00a0\u3000<s>"


@pytest.fixture(scope="module", params=["characters in the vocabulary", "characters spelled in bytes"])
def tokenizer(request, tmp_path_factory):
    """One knows the characters of TEXTS, escapes included; the other spells most of them."""
    known = TEXTS if request.param.startswith("characters in") else TEXTS[:1]
    path = tmp_path_factory.mktemp("tokenizer") / "a.model"
    lines = [line for text in known for line in (text * 20).split("\n")]
    path.write_bytes(train_tokenizer(lines, vocab_size=460, cap_vocabulary=True))
    return path


def segments(tokens: list[int], eos: int, length: int, mask=None) -> list[Segment]:
    """A document, one lane, in segments of `length`."""
    found, labels = [], [*tokens[1:], eos]
    if mask is not None:
        labels = [label if counts else IGNORE for label, counts in zip(labels, mask, strict=True)]
    for start in range(0, len(tokens), length):
        row = torch.full((2, 1, length), IGNORE)
        row[0] = 0
        for k, part in enumerate((tokens, labels)):
            part = part[start : start + length]
            row[k, 0, : len(part)] = torch.tensor(part)
        found.append(Segment(row[0], row[1], *[torch.zeros(1)] * 5))
    return found


def count(texts: TokenTexts, document: list[Segment]) -> tuple[float, float]:
    before, total = torch.tensor([-1]), [0.0, 0.0]
    for segment in document:
        found = texts.count(segment, before)
        total = [total[0] + found.bytes, total[1] + found.words]
        before = segment.tokens[:, -1]
    return total[0], total[1]


def words_in(text: bytes) -> int:
    return len(text.split())


def test_any_text_has_its_bytes_and_words(tokenizer):
    """Less those of the first token, which is never predicted. Characters that the tokenizer writes as others included."""
    model, texts = SentencePieceProcessor(model_file=str(tokenizer)), token_texts(tokenizer)
    generator = random.Random(0)
    cases = [*TEXTS, *("".join(generator.choices(ALPHABET, k=generator.randint(1, 30))) for _ in range(400))]
    for text in cases:
        tokens, raw = model.encode(text), text.encode()
        found = count(texts, segments(tokens, model.eos_id(), generator.randint(1, 9)))
        alone = count(texts, segments([model.eos_id(), tokens[0]], IGNORE, 2))  # as if it were predicted
        assert found[0] + alone[0] == len(raw), (text, [model.id_to_piece(token) for token in tokens])
        assert found[1] + alone[1] == words_in(raw), (text, [model.id_to_piece(token) for token in tokens])


def test_without_the_tokens_before_an_escape_spelled_in_bytes_is_missed(tmp_path):
    """The control: as six tokens of a byte each, U+2581 has three bytes for all that."""
    path = tmp_path / "a.model"
    path.write_bytes(train_tokenizer((TEXTS[0] * 20).split("\n"), vocab_size=400, cap_vocabulary=True))
    model, texts = SentencePieceProcessor(model_file=str(path)), token_texts(path)
    tokens = model.encode("ab\u2581cd")
    assert sum(model.is_byte(token) for token in tokens) == 6
    for length in range(1, len(tokens) + 1):
        document = segments(tokens, model.eos_id(), length)
        assert count(texts, document)[0] == 7 - len(model.id_to_piece(tokens[0]))
    wrong = sum(texts.count(segment, torch.tensor([-1])).bytes for segment in segments(tokens, model.eos_id(), 1))
    assert wrong == 10 - len(model.id_to_piece(tokens[0]))


def test_masked_labels_stand_for_nothing(tokenizer):
    model, texts = SentencePieceProcessor(model_file=str(tokenizer)), token_texts(tokenizer)
    one, two = (model.encode(text) for text in TEXTS[1:3])
    mask = [0] * (len(one) - 1) + [1] * len(two) + [0]  # label i is token i + 1
    document = segments(one + two, model.eos_id(), 7, mask)
    assert count(texts, document)[0] == len(TEXTS[2].encode())


def other_model(folder, **options) -> SentencePieceProcessor:
    """A tokenizer by SentencePiece's defaults: it normalises, drops newlines, and may not know a character."""
    raw = made.ordinary_sentencepiece([line for text in TEXTS for line in text.split("\n")], vocab_size=400, **options)
    (folder / "other.model").write_bytes(raw)
    return SentencePieceProcessor(model_proto=raw)


def test_a_tokenizer_that_loses_text_counts_what_it_decodes_to(tmp_path):
    model = other_model(tmp_path, byte_fallback=True)
    texts = token_texts(tmp_path / "other.model")
    for text in TEXTS:
        tokens = model.encode(text)
        found = count(texts, segments([model.bos_id(), *tokens], model.eos_id(), 5))
        decoded = model.decode(tokens)
        assert found == (len(decoded.encode()) + 1, words_in(decoded.encode())), "and the space that it puts in front"


def test_what_a_tokenizer_does_not_know_has_no_size(tmp_path):
    model = other_model(tmp_path, byte_fallback=False, character_coverage=0.99)
    texts = token_texts(tmp_path / "other.model")
    known, unknown = model.encode("quick brown fox"), model.encode("quick ♔ fox")
    assert model.unk_id() in unknown and model.unk_id() not in known
    assert count(texts, segments(known, model.eos_id(), 5))[0] > 0
    assert math.isnan(count(texts, segments(unknown, model.eos_id(), 5))[0])
    assert token_texts(tmp_path / "nothing.model") is None
    (tmp_path / "else.model").write_text("{}")
    assert token_texts(tmp_path / "else.model") is None


HUGGING_FACE = {
    "byte_level": ("the quick\n  fox\t\u2581 \ue000 \U0001d11e \u65e5", None),
    "byte_fallback": ("a bad cab\n  fed\t\u00e9 \ue000\ue001 \u65e5 a", None),
    "metaspace": ("the quick brown fox", "the quick \u265e fox"),
    "lower_case_words": ("the quick brown fox", "the quick \u265e fox"),
}


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_a_tokenizer_json(kind, tmp_path):
    """Exact where it loses nothing, whatever the text; else of what it decodes to, and unknown where it did not know."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(getattr(made, kind)())
    model, texts = open_tokenizer(path), token_texts(path)
    text, unknown = HUGGING_FACE[kind]
    (tokens,) = (ids.tolist() for ids in model.encode([text]))
    for length in (1, 4, 100):
        found = count(texts, segments(tokens, IGNORE, length))
        assert found[0] == len(model.decode(tokens).encode()) - len(model.decode(tokens[:1]).encode())
        assert found[1] == len(text.split()) - 1 if unknown else found[1] > 0
    if unknown is None:
        assert model.decode(tokens) == text
    else:
        (tokens,) = (ids.tolist() for ids in model.encode([unknown]))
        assert math.isnan(count(texts, segments(tokens, IGNORE, 5))[0])


# ---- bits per byte ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tokenizer, tmp_path_factory):
    """Documents of several alphabets, some of whose parts do not count; which text does, by document."""
    folder = tmp_path_factory.mktemp("corpus")
    plain = [
        {"text": "The " + text * (1 + n)} for n, text in enumerate(TEXTS)
    ]  # whose first tokens are whole characters
    chats = [
        {"parts": [{"text": one, "loss": False}, {"text": two, "loss": True}, {"text": one, "loss": False}]}
        for one, two in pairwise(TEXTS)
    ]
    (folder / "valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*plain, *chats]))
    (folder / "train.txt").write_text(TEXTS[0])
    shard(folder / "corpus", tokenizer, [folder / "train.txt"], [folder / "valid.jsonl"])
    return folder / "corpus", plain, chats


def size(model: SentencePieceProcessor, plain: list[dict], chats: list[dict]) -> int:
    """Bytes of the text that counts, less the first token of each document."""
    firsts = [model.decode(model.encode(document["text"])[:1]).encode() for document in plain]
    whole = sum(len(document["text"].encode()) for document in plain) - sum(map(len, firsts))
    return whole + sum(len(part["text"].encode()) for chat in chats for part in chat["parts"] if part["loss"])


def small_cell(vocabulary):
    torch.manual_seed(0)
    config = MemformerConfig(width=8, heads=2, feed_forward=12, slots=3, encoder_layers=1, decoder_layers=1)
    return config.build(vocab_size=vocabulary.size, bos_id=1, segment_length=16).double().eval()


def bits_per_byte_rank(world, path, expected_bytes, tokenizer) -> None:
    valid = Corpus.open(path / "valid")
    cell, texts = small_cell(valid.vocabulary), token_texts(tokenizer)
    for options in ({"lanes": 4}, {"lanes": 9}, {"lanes": 3, "warmup_segments": 1}):
        found = evaluate_documents(cell, cell, valid, world, segment_length=16, texts=texts, **options)
        carried = found["carried"]
        assert carried.text.bytes == expected_bytes
        nats = carried.loss * carried.labels
        assert carried.bits_per_byte == pytest.approx(nats / math.log(2) / expected_bytes, rel=1e-12)
        assert evaluation_scalars("eval", found)["eval/bits_per_byte"] == carried.bits_per_byte
        figures = summary(found)
        assert figures["eval_bytes"] == expected_bytes and figures["eval_tokens"] == carried.labels
        for mode in ("no_memory", "no_state"):
            ratio = figures[f"eval_bits_per_byte_{mode}"] / figures["eval_bits_per_byte"]
            assert ratio == pytest.approx(figures[f"eval_loss_{mode}"] / figures["eval_loss"], rel=1e-12)
        assert (found["shuffled"].text.bytes < expected_bytes) == (found["shuffled"].labels < carried.labels)


def test_bits_per_byte_are_those_of_the_text(world, corpus, tokenizer):
    path, plain, chats = corpus
    expected = size(SentencePieceProcessor(model_file=str(tokenizer)), plain, chats)
    bits_per_byte_rank(world, path, expected, tokenizer)


@pytest.mark.slow
def test_bits_per_byte_on_two_ranks(corpus, tokenizer):
    path, plain, chats = corpus
    expected = size(SentencePieceProcessor(model_file=str(tokenizer)), plain, chats)
    run_ranks(2, bits_per_byte_rank, path, expected, tokenizer)


def test_of_a_part_of_the_documents(world, corpus, tokenizer):
    """The first segments of every document: bytes of the text up to there."""
    _, plain, chats = corpus
    model, valid = SentencePieceProcessor(model_file=str(tokenizer)), Corpus.open(corpus[0] / "valid")
    cell, texts = small_cell(valid.vocabulary), token_texts(tokenizer)
    found = evaluate_documents(cell, cell, valid, world, lanes=20, segment_length=16, segments=2, texts=texts)[
        "carried"
    ]
    expected = labels = 0
    for document in [*plain, *chats]:
        parts = document.get("parts", [{"text": document.get("text"), "loss": True}])
        tokens = [(token, part["loss"]) for part in parts for token in model.encode(part["text"])]
        counted = [token for token, counts in tokens[1 : 2 * 16 + 1] if counts]
        written = b"".join(_bytes(model, token) for token in counted)
        expected += len(written.replace("\ue000".encode(), b""))
        labels += len(counted) + (len(tokens) <= 2 * 16 and parts[-1]["loss"])
    assert found.labels == labels
    assert found.text.bytes == expected < 0.8 * size(model, plain, chats)


def _bytes(model: SentencePieceProcessor, token: int) -> bytes:
    piece = model.id_to_piece(token)
    return bytes([int(piece[1:-1], 16)]) if model.is_byte(token) else piece.replace("\u2581", " ").encode()


def test_without_a_tokenizer_there_are_none(world, corpus):
    valid = Corpus.open(corpus[0] / "valid")
    cell = small_cell(valid.vocabulary)
    found = evaluate_documents(cell, cell, valid, world, lanes=4, segment_length=16)
    assert found["carried"].bits_per_byte is None and summary(found)["eval_bits_per_byte"] is None
    assert summary(found)["eval_bytes"] is None and "eval/bits_per_byte" not in evaluation_scalars("eval", found)
