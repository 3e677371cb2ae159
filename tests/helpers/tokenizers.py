"""Tokenizers of other makers for tests: an ordinary SentencePiece model, and several kinds of tokenizer.json.

Each function returns the content of a file. Files of Hugging Face's package are made with the package itself.
"""

import io
import json

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = ["the quick brown fox jumps over the lazy dog", "It was a dark and stormy night; the rain fell in torrents."]
END = "<|endoftext|>"


def ordinary_sentencepiece(lines: list[str] = LINES, **options) -> bytes:
    """By the trainer's defaults: newlines, tabs and runs of spaces become a space. With all bytes as tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20),
        model_writer=model,
        **dict(vocab_size=330, model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=9) | options,
    )
    return model.getvalue()


def byte_level(lines: list[str] = LINES, special: list[str] | None = None, **changes) -> bytes:
    """As GPT-2's: lossless. `changes`: fields of the file to be replaced."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=[END] if special is None else special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return json.dumps(json.loads(tokenizer.to_str()) | changes).encode()


def byte_fallback() -> bytes:
    """As Llama 2's: spaces are written as U+2581, unknown characters in bytes that are tokens of their own; lossless."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefghij", "\u2581a"]
    model = models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[("\u2581", "a")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str().encode()


def lower_case_words(lines: list[str] = LINES) -> bytes:
    """As BERT's: lower case, spaces lost, unknown words replaced."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer.to_str().encode()


def metaspace(lines: list[str] = LINES) -> bytes:
    """As T5's: a unigram model with U+2581 for spaces, and no BOS."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    return tokenizer.to_str().encode()


def words(lines: list[str] = LINES) -> bytes:
    """Whole words, without a decoder: tokens are joined by spaces. Nothing stands for what is unknown."""
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(" ".join(lines).split()))}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str().encode()
