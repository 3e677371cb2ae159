"""Train a SentencePiece model on text, source code, JSON lines or Parquet; the inputs are those of tokenizer/shard.py.

    python tokenizer/train.py --input my_texts/ --output tokenizer_8k --vocab-size 8192      -> tokenizer_8k.model

The tokenizer is lossless: decode(encode(text)) == text for any text. That takes more than SentencePiece's defaults:
- no normalisation, no space put before the text, no spaces removed; a run of spaces may be one token;
- newline and tab are symbols of their own, because the trainer reads lines and keeps tab for itself;
- what is not in the vocabulary is spelt in bytes (256 tokens), the rarest characters if there are too many;
- SentencePiece writes a space as U+2581, so a U+2581 in the text would come back as a space. The model therefore
  carries two rewriting rules with their inverse: U+2581 -> U+E000 U+E001 and U+E000 -> U+E000 U+E002.
Text that looks like a control token ("<s>") is spelt out; only the ids 0 pad, 1 bos, 2 eos, 3 unk are control tokens.

The same inputs and options give the same bytes, whatever the number of cores.
"""

import argparse
import io
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tqdm import tqdm

from memformer_dist.errors import UserError
from memformer_dist.prepare.documents import discover, read_documents

ESCAPES = [("\u2581", "\ue000\ue001"), ("\ue000", "\ue000\ue002")]
RESERVED = 4 + 256 + 2 + 4  # tokens: control, bytes, newline and tab, those that stand for spaces and escapes
LINE_CHARACTERS = 1000  # longer lines are cut for training: the trainer drops those of more than 4192 bytes


def sample_lines(files: Sequence[str | Path], characters: int | None, seed: int = 0) -> list[str]:
    """Lines of all documents, or a seeded sample of about so many characters, every line being equally likely."""
    keep = 1.0
    if characters is not None:
        total = sum(len(line) for line in _lines(files, "counting"))
        keep = min(1.0, characters / max(total, 1))
    generator = np.random.Generator(np.random.PCG64(seed))
    return [line for line in _lines(files, "reading") if keep == 1.0 or generator.random() < keep]


def train_tokenizer(
    lines: Sequence[str],
    *,
    vocab_size: int,
    model_type: str = "unigram",
    byte_fallback: bool = True,
    cap_vocabulary: bool = False,
    threads: int = 4,
) -> bytes:
    """The model as bytes (write them to a `.model` file).

    `cap_vocabulary` makes `vocab_size` an upper bound, for texts too small to fill it. With `byte_fallback` a text of
    more characters than there is room for has its rarest spelt in bytes. `threads` has a fixed default because the
    rounding of a sum, and so the model, depends on it. Raises UserError if the text and the vocabulary do not fit
    together.
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
            required_chars="\u2581",  # a space spelt in bytes would come back as U+2581
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
        hint = " (--cap-vocabulary lowers it by itself)" if "too high" in reason else ""
        raise UserError(f"--vocab-size {vocab_size}: {reason}{hint}") from None
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.normalizer_spec.name = "lossless"
    inverse = _rewriting([(after, before) for before, after in ESCAPES], escape_whitespaces=False)
    proto.denormalizer_spec.ParseFromString(inverse.serialized_normalizer_spec())
    return proto.SerializeToString(deterministic=True)


def _lines(files: Sequence[str | Path], verb: str) -> Iterator[str]:
    for document in tqdm(read_documents(files), desc=verb, unit=" documents", disable=None):
        for line in document.text.split("\n"):
            for start in range(0, len(line), LINE_CHARACTERS):
                yield line[start : start + LINE_CHARACTERS]


def _without_rare_characters(lines: Sequence[str], keep: int) -> list[str]:
    """The lines, cut where all but their `keep` most frequent characters were: the trainer never sees these."""
    counts = Counter()
    for line in lines:
        counts.update(line)
    rare = sorted(counts, key=lambda character: (-counts[character], character))[keep:]
    cut = str.maketrans(dict.fromkeys(rare, "\n"))
    return [part for line in lines for part in line.translate(cut).split("\n") if part]


def _rewriting(rules: list[tuple[str, str]], escape_whitespaces: bool = True) -> sentencepiece.SentencePieceNormalizer:
    return sentencepiece.SentencePieceNormalizer(
        norm_map=rules, add_dummy_prefix=False, remove_extra_whitespaces=False, escape_whitespaces=escape_whitespaces
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="folders, globs, files and URLs")
    add(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="names of files and folders to pass over in folders"
    )
    add("--output", "--model-prefix", required=True, metavar="PREFIX", help="writes PREFIX.model")
    add("--vocab-size", type=int, default=8192, help="number of tokens (8192)")
    add("--cap-vocabulary", action="store_true", help="fewer tokens where the text does not support so many")
    add("--model-type", choices=["unigram", "bpe"], default="unigram")
    add(
        "--byte-fallback",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="without it, unknown characters are lost",
    )
    add(
        "--sample-characters",
        type=int,
        default=5_000_000,
        metavar="N",
        help="train on about N (5 million), 0: on all",
    )
    add("--seed", type=int, default=0, help="of the sample")
    add("--threads", type=int, default=4, help="4; another number may give another model")
    options = parser.parse_args()

    begin = time.perf_counter()
    files = [file.name for file in discover(options.input, options.exclude).files]
    lines = sample_lines(files, options.sample_characters or None, options.seed)
    characters = sum(map(len, lines))
    print(f"training on {characters:,} characters in {len(lines):,} lines ...", flush=True)
    model = train_tokenizer(
        lines,
        vocab_size=options.vocab_size,
        model_type=options.model_type,
        byte_fallback=options.byte_fallback,
        cap_vocabulary=options.cap_vocabulary,
        threads=options.threads,
    )
    path = Path(options.output.removesuffix(".model") + ".model")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model)
    os.replace(partial, path)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    print(f"{path}: {pieces:,} tokens ({options.model_type}), {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
