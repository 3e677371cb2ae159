"""Train a SentencePiece tokenizer on text, source code, JSON lines, JSON, Parquet or Arrow.

    python tokenizer/train.py --input my_texts/ --output tokenizer_8k --vocab-size 8192      # writes tokenizer_8k.model

The inputs are those of tokenizer/shard.py, and what cannot be read of them is reported in the same words. The tokenizer
is lossless: decode(encode(text)) == text for any text, with spaces, newlines and tabs kept and rare characters spelt in
bytes; memformer_dist/prepare/tokenizer.py says how. The same inputs and options give the same bytes, whatever the
number of cores.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from memformer_dist.commands.options import Options, integer, nonempty_path
from memformer_dist.errors import UserError, run_program
from memformer_dist.files import expect_writable, write_bytes
from memformer_dist.prepare.documents import Document, File, Place, Unreadable, shown_places
from memformer_dist.prepare.partitions import describe_ignored, discover
from memformer_dist.prepare.tokenizer import sample_lines, train_tokenizer
from memformer_dist.tokenizer import SentencePieceTokenizer

KEPT_UNREADABLE = 10_000  # documents, of which the first are shown


def read_lines(files: Sequence[File], options: argparse.Namespace) -> list[str]:
    """The sample of lines. What cannot be read is reported as tokenizer/shard.py reports it."""
    documents, empty, unreadable = 0, 0, Unreadable()
    places: list[Place] = []

    def observe(document: Document) -> None:
        nonlocal documents, empty
        documents += 1
        unreadable.add(document)
        if document.unreadable is None:
            empty += not document.text
        elif len(places) < KEPT_UNREADABLE:
            places.append(Place(document.source, document.position, document.unreadable))

    lines = sample_lines(
        files, options.sample_characters or None, options.seed, text_field=options.text_field, observe=observe
    )
    for place in shown_places(places, unreadable.lost):
        print(f"cannot read {place}", file=sys.stderr)
    if not any(lines):
        raise UserError(f"--input: no usable document; {empty} are empty, {unreadable.count} unreadable")
    lost = f" (nothing could be read of {len(unreadable.lost):,} files)" if unreadable.lost else ""
    print(f"{documents:,} documents; left out: {empty:,} empty documents, {unreadable.count:,} unreadable{lost}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = Options(__doc__)
    add = parser.add_argument
    parser.add_input()
    add("--output", "--model-prefix", type=nonempty_path, required=True, metavar="PREFIX", help="writes PREFIX.model")
    add("--vocab-size", type=integer(least=1, most=10**7), default=8192, help="number of tokens (default: 8192)")
    add("--cap-vocabulary", action="store_true", help="use fewer tokens where the text does not support so many")
    add("--model-type", choices=["unigram", "bpe"], default="unigram")
    add(
        "--byte-fallback", action=argparse.BooleanOptionalAction, default=True, help="spell unknown characters in bytes"
    )
    add(
        "--sample-characters",
        type=integer(),
        default=5_000_000,
        metavar="N",
        help="train on lines of about N characters in all, 0 for everything (default: 5 million)",
    )
    add("--seed", type=integer(), default=0, help="of the sample (default: 0)")
    add(
        "--threads",
        type=integer(least=1, most=1024),
        default=4,
        help="default: 4; another number may give another model",
    )
    options = parser.parse_args(arguments)

    path = Path(str(options.output).removesuffix(".model") + ".model")
    expect_writable(path, "--output")
    began = time.perf_counter()
    files, ignored = discover(options.input, options.exclude, options.text_field)
    if ignored:
        print(describe_ignored(ignored), file=sys.stderr)
    lines = read_lines(files, options)
    print(f"training on {sum(map(len, lines)):,} characters in {len(lines):,} lines ...", flush=True)
    model = train_tokenizer(
        lines,
        vocab_size=options.vocab_size,
        model_type=options.model_type,
        byte_fallback=options.byte_fallback,
        cap_vocabulary=options.cap_vocabulary,
        threads=options.threads,
    )
    try:
        write_bytes(path, model)
    except OSError as error:
        raise UserError(f"--output: cannot write {error.filename or path}: {error.strerror}") from None
    pieces = SentencePieceTokenizer(model).size
    print(f"{path}: {pieces:,} tokens ({options.model_type}), {time.perf_counter() - began:.1f} s")


def run() -> None:
    run_program(main)
